# SPDX-License-Identifier: Apache-2.0
"""Disks through pipes."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest

import vhdkit
from vhdkit import DiskFormat, FormatName, errors
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.verbs.stream import export_stream, import_stream, pass_stream
from vhdkit.units import MIB, PAGE_SIZE, SECTOR_SIZE, round_up

SIZE = 3 * MIB + 7 * SECTOR_SIZE


def body(size: int = SIZE) -> bytes:
    """Data with zeros in the middle."""
    rng = random.Random(3)
    return (rng.randbytes(MIB) + bytes(MIB) + rng.randbytes(2 * MIB))[:size]


class Trickle:
    """A pipe that delivers a little at a time, never up to a boundary."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)
        self._rng = random.Random(4)

    def read(self, size: int) -> bytes:
        """Some bytes, at least one until the end."""
        return self._file.read(min(size, self._rng.randrange(1, 200_000)))


def size_in(to: DiskFormat, size: int) -> int:
    """The size of a disk that gets this many bytes: a VHDX has whole pages."""
    return round_up(size, PAGE_SIZE if to in (DiskFormat.VHDX, DiskFormat.VHDX_FIXED) else SECTOR_SIZE)


def exported(path: Path, to: DiskFormat) -> bytes:
    """The image as a stream."""
    out = io.BytesIO()
    with Chain.open(path) as chain:
        export_stream(chain, out.write, to)
    return out.getvalue()


@pytest.mark.parametrize("to", list(DiskFormat))
@pytest.mark.parametrize("size", [SECTOR_SIZE, MIB, SIZE])
def test_import_of_a_raw_stream(tmp_path: Path, to: DiskFormat, size: int) -> None:
    """A raw stream of any length, in any pieces, becomes an image with that content."""
    out = tmp_path / "out.img"
    assert import_stream(Trickle(body(size)).read, out, to) == size_in(to, size)
    with vhdkit.open_disk(out) as disk:
        assert disk.read(0, disk.size_bytes) == body(size).ljust(size_in(to, size), b"\0")
    assert list(tmp_path.iterdir()) == [out]


def test_import_keeps_holes(tmp_path: Path) -> None:
    """Zeros in a stream take no space in the result."""
    import_stream(io.BytesIO(bytes(32 * MIB) + b"x").read, tmp_path / "out", DiskFormat.RAW)
    assert (tmp_path / "out").stat().st_size == 32 * MIB + SECTOR_SIZE
    assert (tmp_path / "out").stat().st_blocks * 512 < MIB


@pytest.mark.parametrize("to", list(DiskFormat))
def test_import_of_a_fixed_vhd_drops_its_footer(tmp_path: Path, to: DiskFormat) -> None:
    """A stream that is a fixed VHD is recognised by its footer, unless the caller says that it is raw."""
    vhdkit.create_image(tmp_path / "fixed.vhd", SIZE, disk_format=DiskFormat.FIXED)
    with vhdkit.open_disk(tmp_path / "fixed.vhd", writable=True) as disk:
        disk.write(0, body())
    stream = (tmp_path / "fixed.vhd").read_bytes()
    assert import_stream(Trickle(stream).read, tmp_path / "out", to) == size_in(to, SIZE)
    with vhdkit.open_disk(tmp_path / "out") as disk:
        assert disk.read(0, disk.size_bytes) == body().ljust(size_in(to, SIZE), b"\0")
    size = import_stream(Trickle(stream).read, tmp_path / "raw", DiskFormat.RAW, source_format=FormatName.RAW)
    assert size == len(stream)


def test_import_of_unsuitable_streams_is_refused(tmp_path: Path) -> None:
    """An empty stream and a dynamic VHD are refused, and no file is left."""
    vhdkit.create_image(tmp_path / "dynamic.vhd", SIZE)
    stream = (tmp_path / "dynamic.vhd").read_bytes()
    for to in DiskFormat:
        with pytest.raises(errors.InvalidArgument, match="empty"):
            import_stream(io.BytesIO(b"").read, tmp_path / "out", to)
        with pytest.raises(errors.InvalidArgument, match="dynamic"):
            import_stream(io.BytesIO(stream).read, tmp_path / "out", to)
    assert [one.name for one in tmp_path.iterdir()] == ["dynamic.vhd"]


@pytest.mark.parametrize("to", [DiskFormat.RAW, DiskFormat.FIXED])
def test_export_gives_the_whole_disk_in_order(tmp_path: Path, to: DiskFormat) -> None:
    """A stream is the disk with its zeros; a fixed VHD ends in a footer that is valid when read back."""
    import_stream(io.BytesIO(body()).read, tmp_path / "d.vhd", DiskFormat.DYNAMIC)
    stream = exported(tmp_path / "d.vhd", to)
    assert stream[:SIZE] == body()
    assert len(stream) == SIZE + (512 if to is DiskFormat.FIXED else 0)
    (tmp_path / "back").write_bytes(stream)
    assert vhdkit.compare(tmp_path / "back", tmp_path / "d.vhd").same_content


def test_export_of_a_dynamic_vhd_is_refused(tmp_path: Path) -> None:
    """A dynamic VHD cannot be written in order: refused before a byte is written."""
    vhdkit.create_image(tmp_path / "d.vhd", SIZE)
    with pytest.raises(errors.InvalidArgument, match="pipe"):
        exported(tmp_path / "d.vhd", DiskFormat.DYNAMIC)


def test_from_pipe_to_pipe() -> None:
    """Raw in, Azure's fixed VHD out: rounded up to whole MiB, with a footer."""
    out = io.BytesIO()
    assert pass_stream(Trickle(body()).read, out.write, DiskFormat.FIXED, azure=True) == 4 * MIB
    assert out.getvalue()[: 4 * MIB] == body().ljust(4 * MIB, b"\0")
    assert len(out.getvalue()) == 4 * MIB + 512


@pytest.mark.parametrize("magic", [b"QFI\xfb", b"KDMV"])
def test_streams_of_other_formats_are_refused_too(tmp_path: Path, magic: bytes) -> None:
    """A stream is probed like a file: another format is named, and not taken for raw bytes."""
    for to in DiskFormat:
        with pytest.raises(errors.UnsupportedFormat, match="standard input"):
            import_stream(io.BytesIO(magic.ljust(8192, b"\0")).read, tmp_path / "out", to)
    with pytest.raises(errors.CorruptImage, match="standard input"):
        import_stream(io.BytesIO(bytes(4096)).read, tmp_path / "out", DiskFormat.RAW, source_format=FormatName.VHD)
    assert list(tmp_path.iterdir()) == []


def test_a_dynamic_stream_without_its_footer_is_still_refused(tmp_path: Path) -> None:
    """The footer copy identifies it: its metadata must not become the disk."""
    vhdkit.create_image(tmp_path / "d.vhd", SIZE)
    stream = (tmp_path / "d.vhd").read_bytes()[:-512]
    with pytest.raises(errors.InvalidArgument, match="dynamic"):
        import_stream(io.BytesIO(stream).read, tmp_path / "out.raw", DiskFormat.RAW)


def test_an_invalid_destination_is_refused_before_the_stream_is_read(tmp_path: Path) -> None:
    """An existing file or an impossible option is reported before a long stream is read."""
    (tmp_path / "there").touch()

    def never(size: int) -> bytes:
        raise AssertionError("the stream was read")

    for to in DiskFormat:
        with pytest.raises(errors.AlreadyExists):
            import_stream(never, tmp_path / "there", to)
        with pytest.raises(errors.InvalidArgument, match="block size"):
            import_stream(never, tmp_path / "new", to, block_size_bytes=3 * MIB)
