# SPDX-License-Identifier: Apache-2.0
"""A range of a disk as a file, without FUSE: reads, writes, refusals and counts."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import vhdkit
from vhdkit.serve.mount.view import (
    FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE,
    FALLOC_ZERO_RANGE,
    MAX_OPEN_LAYERS,
    SEEK_DATA,
    SEEK_HOLE,
    LayerDisks,
    LayerSource,
    LiveSource,
    View,
)

MIB = 1 << 20
SIZE = 8 * MIB
SECTOR = 512


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[vhdkit.Disk]:
    """A differencing disk: its parent has data in the first MiB, the child from the fifth on."""
    vhdkit.create_image(tmp_path / "base.vhd", SIZE, block_size_bytes=MIB)
    with vhdkit.open_disk(tmp_path / "base.vhd", writable=True) as base:
        base.write(0, b"\xaa" * MIB)
    vhdkit.create_child(tmp_path / "leaf.avhd", tmp_path / "base.vhd", block_size_bytes=MIB)
    with vhdkit.open_disk(tmp_path / "leaf.avhd", writable=True) as leaf:
        leaf.write(5 * MIB, b"\xbb" * MIB)
        yield leaf


def view_of(disk: vhdkit.Disk, offset: int = 0, size: int = SIZE) -> View:
    """A writable view."""
    return View(LiveSource(disk, 1), size, offset_bytes=offset, writable=True)


def read(view: View, offset: int, size: int) -> bytes:
    """Read as a process does."""
    buffer = bytearray(size)
    done = view.open(write=False).read_into(offset, memoryview(buffer))
    return bytes(buffer[:done])


def refused(code: int, function: object, *arguments: object) -> None:
    """The call fails with this errno."""
    assert callable(function)
    with pytest.raises(OSError) as caught:
        function(*arguments)
    assert caught.value.errno == code, os.strerror(caught.value.errno or 0)


def test_reading_ends_where_the_range_ends(disk: vhdkit.Disk) -> None:
    """A read at the end is short, one behind it empty: bytes of the disk behind the range are not readable."""
    view = view_of(disk, MIB // 2, MIB)
    assert read(view, 0, 4) == b"\xaa" * 4
    assert read(view, MIB // 2 - 2, 4) == b"\xaa\xaa\0\0"
    assert read(view, MIB - 3, 10) == bytes(3)
    assert read(view, MIB, 10) == b"" and read(view, 5 * MIB, 10) == b""


def test_writing_ends_where_the_range_ends(disk: vhdkit.Disk) -> None:
    """A write across the end is short, one behind it gets ENOSPC, as on a device; the neighbour is unchanged."""
    view = view_of(disk, MIB, MIB)
    handle = view.open(write=True)
    assert handle.write(10, memoryview(b"hello")) == 5
    assert handle.write(MIB - 2, memoryview(b"wxyz")) == 2
    refused(errno.ENOSPC, handle.write, MIB, memoryview(b"z"))
    assert disk.read(MIB + 10, 5) == b"hello" and disk.read(2 * MIB - 2, 4) == b"wx\0\0"


def test_a_read_only_file_cannot_be_opened_for_writing(disk: vhdkit.Disk) -> None:
    """EACCES at open, EBADF for a write through a read-only handle."""
    refused(errno.EACCES, lambda: View(LiveSource(disk, 1), SIZE).open(write=True))
    handle = view_of(disk).open(write=False)
    refused(errno.EBADF, handle.write, 0, memoryview(b"x"))
    refused(errno.EBADF, handle.zero, FALLOC_ZERO_RANGE, 0, 1)


@pytest.mark.parametrize("mode", [FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, FALLOC_ZERO_RANGE])
def test_holes_hide_what_the_parent_has(disk: vhdkit.Disk, mode: int) -> None:
    """A punched or zeroed range reads as zeros even if an ancestor has data; its neighbours are unchanged."""
    view_of(disk).open(write=True).zero(mode, 100, MIB // 2)
    assert disk.read(0, 100) == b"\xaa" * 100
    assert disk.read(100, MIB // 2) == bytes(MIB // 2)
    assert disk.read(100 + MIB // 2, 10) == b"\xaa" * 10


def test_modes_of_fallocate(disk: vhdkit.Disk) -> None:
    """Growing is refused, space cannot be promised, and a hole may extend behind the end."""
    handle = view_of(disk, 0, MIB).open(write=True)
    refused(errno.EOPNOTSUPP, handle.zero, 0, 0, 10)
    refused(errno.EOPNOTSUPP, handle.zero, FALLOC_PUNCH_HOLE, 0, 10)
    refused(errno.ENOSPC, handle.zero, FALLOC_ZERO_RANGE, MIB - 10, 20)
    handle.zero(FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, MIB - 512, 5 * MIB)
    assert disk.read(MIB - 512, 512) == bytes(512) and disk.read(5 * MIB, 1) == b"\xbb"


def test_seeking_for_data_and_holes(disk: vhdkit.Disk) -> None:
    """By ownership; there is always a hole at the end, and no data behind the last data."""
    handle = view_of(disk).open(write=False)
    assert [handle.seek(offset, SEEK_DATA) for offset in (0, 7, MIB, 5 * MIB + 3)] == [0, 7, 5 * MIB, 5 * MIB + 3]
    assert [handle.seek(offset, SEEK_HOLE) for offset in (0, MIB + 9, 5 * MIB)] == [MIB, MIB + 9, 6 * MIB]
    refused(errno.ENXIO, handle.seek, 6 * MIB, SEEK_DATA)
    refused(errno.ENXIO, handle.seek, SIZE, SEEK_HOLE)
    refused(errno.EINVAL, handle.seek, 0, 0)
    part = view_of(disk, 0, MIB // 2).open(write=False)
    assert part.seek(100, SEEK_HOLE) == MIB // 2


def test_allocated_bytes_follow_what_is_written(disk: vhdkit.Disk) -> None:
    """Data counts, holes do not; a range counts only its own part."""
    view = view_of(disk)
    assert view.allocated_bytes() == 2 * MIB
    assert view_of(disk, 5 * MIB, MIB).allocated_bytes() == MIB
    assert view_of(disk, 2 * MIB, MIB).allocated_bytes() == 0
    view.open(write=True).write(7 * MIB, memoryview(bytes([1]) * 4096))
    view._count_again = 0.0
    assert view.allocated_bytes() == 2 * MIB + 4096


def test_allocated_bytes_of_many_pieces_are_estimated(disk: vhdkit.Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block if counting runs would take long: never less than the true number."""
    disk.write(7 * MIB, b"x" * 4096)
    monkeypatch.setattr("vhdkit.serve.mount.view.MAX_COUNTED_BLOCKS", 1)
    assert view_of(disk).allocated_bytes() == 3 * MIB


def test_truncating_to_the_same_size_only(disk: vhdkit.Disk) -> None:
    """EPERM, as ftruncate(2) documents for file systems that cannot."""
    view_of(disk).truncate(SIZE)
    refused(errno.EPERM, view_of(disk).truncate, SIZE - 1)
    refused(errno.EPERM, view_of(disk).open(write=True).truncate, SIZE + 1)


def test_closing_flushes_what_was_written(disk: vhdkit.Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only once, and only through the handle that wrote."""
    flushes = []
    monkeypatch.setattr(disk, "flush", lambda: flushes.append(1))
    reader, writer = view_of(disk).open(write=False), view_of(disk).open(write=True)
    reader.closing()
    writer.closing()
    assert flushes == []
    writer.write(0, memoryview(b"x"))
    writer.closing()
    writer.closing()
    assert flushes == [1]


def test_a_flush_beside_a_write_does_not_cover_it(disk: vhdkit.Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing flushes again, also after a failed flush, so that the closing process learns of it."""
    flushes: list[int] = []
    writer = view_of(disk).open(write=True)
    monkeypatch.setattr(disk, "flush", lambda: flushes.append(1))
    monkeypatch.setattr(disk, "write", lambda offset, data: writer.flush())
    writer.write(0, memoryview(b"x"))
    writer.closing()
    assert flushes == [1, 1]

    def fails() -> None:
        raise vhdkit.IoFailed("the device is gone")

    writer.write(0, memoryview(b"x"))
    monkeypatch.setattr(disk, "flush", fails)
    for _ in range(2):
        with pytest.raises(vhdkit.IoFailed):
            writer.closing()


def test_layers_show_the_disk_as_it_was(disk: vhdkit.Disk) -> None:
    """The base does not show the leaf's writes, even while the leaf is written to."""
    disks = LayerDisks(disk.chain)
    view = View(LayerSource(disks, 1, 7), SIZE)
    disk.write(0, b"new")
    assert read(view, 0, 3) == b"\xaa" * 3 and read(view, 5 * MIB, 3) == bytes(3)
    assert view.allocated_bytes() == MIB and view.source.written_ns == 7
    assert disks.get(1) is disks.get(1)


def test_only_a_few_layers_are_kept_open(tmp_path: Path) -> None:
    """INV-BOUNDED: reading all layers of a deep chain keeps only the last few maps; open files stay usable."""
    vhdkit.create_image(tmp_path / "0.vhd", MIB)
    depth = MAX_OPEN_LAYERS + 3
    for number in range(1, depth):
        vhdkit.create_child(tmp_path / f"{number}.vhd", tmp_path / f"{number - 1}.vhd")
    with vhdkit.open_disk(tmp_path / f"{depth - 1}.vhd") as leaf:
        disks = LayerDisks(leaf.chain)
        first = View(LayerSource(disks, 1, 0), MIB).open(write=False)
        for number in range(1, depth):
            disks.get(number)
        assert len(disks._kept) == MAX_OPEN_LAYERS
        assert first.read_into(0, memoryview(bytearray(10))) == 10
