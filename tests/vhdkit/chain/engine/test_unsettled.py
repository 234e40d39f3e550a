# SPDX-License-Identifier: Apache-2.0
"""Where unsettled parts of a disk lie, found out without a read that waits."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

import vhdkit
from tests.vhdkit.serve.disks import child, export_of
from vhdkit import at_once, errors
from vhdkit import store as store_module
from vhdkit.chain.engine.unsettled import prefetch_likely, settle_at_once
from vhdkit.disk import Disk
from vhdkit.store import FileStore
from vhdkit.units import KIB, MIB, PAGE_SIZE

SIZE = 16 * MIB


def dynamic(folder: Path) -> Path:
    """A dynamic VHD in which some blocks have data."""
    path = folder / "base.vhd"
    vhdkit.create_image(path, SIZE)
    with vhdkit.open_disk(path, writable=True) as disk:
        disk.write(0, b"b" * 3 * MIB)
        disk.write(9 * MIB, b"B" * 64 * KIB)
    return path


def differencing(folder: Path) -> Path:
    """A VHD over that one: its blocks are owned in part."""
    path = folder / "leaf.avhd"
    vhdkit.create_child(path, dynamic(folder))
    with vhdkit.open_disk(path, writable=True) as disk:
        disk.write(1 * MIB, b"l" * 512)
        disk.write(9 * MIB + 512, b"L" * 4096)
    return path


def differencing_vhdx(folder: Path) -> Path:
    """The same in the other format."""
    base, path = folder / "base.vhdx", folder / "leaf.avhdx"
    vhdkit.convert(dynamic(folder), base, disk_format=vhdkit.DiskFormat.VHDX)
    vhdkit.create_child(path, base)
    with vhdkit.open_disk(path, writable=True) as disk:
        disk.write(1 * MIB, b"l" * 512)
        disk.write(9 * MIB + 512, b"L" * 4096)
    return path


class Cold:
    """In place of preadv: a page is in memory from the second attempt on."""

    def __init__(self) -> None:
        self.here: set[tuple[int, int]] = set()

    def read(self, fd: int, buffers: tuple[memoryview], offset: int, flags: int = 0) -> int:
        """As `os.preadv`."""
        if (fd, offset // PAGE_SIZE) not in self.here:
            self.here.add((fd, offset // PAGE_SIZE))
            raise BlockingIOError
        return os.preadv(fd, buffers, offset)


def no_wait(read: Callable[..., bytes]) -> Callable[..., bytes]:
    """A read that may wait, which must not happen where that is not allowed."""

    def checked(*arguments: int) -> bytes:
        assert not at_once.is_required()
        return read(*arguments)

    return checked


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("make", [dynamic, differencing, differencing_vhdx])
def test_every_grain(
    make: Callable[[Path], Path], writable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names what it lacks until that is there, waits for nothing, and finds what `settle` finds."""
    path = make(tmp_path)
    with vhdkit.open_disk(path) as disk:
        disk.settle(0, SIZE)
        expected = disk.chain.map.entries.tolist(), disk.chain.map.fine.tolist()
    monkeypatch.setattr(os, "pread", no_wait(os.pread))
    with vhdkit.open_disk(path, writable=writable) as disk:
        monkeypatch.setattr(store_module, "_preadv", Cold().read)
        lacked = 0
        order = list(range(0, SIZE, disk.chain.map.grain_bytes))
        random.Random(1).shuffle(order)
        for offset in order:
            while (missing := settle_at_once(disk.chain, offset // 512, 8)) is not None:
                assert isinstance(missing.file, FileStore) and missing.offset_bytes < missing.file.size()
                lacked += 1
                assert lacked < 100
            assert disk.is_settled(offset, 4096)
        assert lacked > 0
        assert (disk.chain.map.entries.tolist(), disk.chain.map.fine.tolist()) == expected


def test_what_cannot_be_found_out_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is no file, a lock that is held, and an error of the device."""
    export = export_of(child())
    missing = settle_at_once(export.disk.chain, 0, 8)
    assert missing is not None and missing.file is None
    export.disk.close()
    with vhdkit.open_disk(dynamic(tmp_path)) as disk:
        with disk.chain.map._lock:
            missing = settle_at_once(disk.chain, 0, 8)
        assert missing is not None and missing.file is None and not disk.is_settled(0, 4096)

        def failing(*arguments: object) -> int:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(store_module, "_preadv", failing)
        with pytest.raises(errors.IoFailed):
            settle_at_once(disk.chain, 0, 8)
        assert not at_once.is_required()


def test_data_that_one_layer_can_have_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The place of the data in the only layer with the block; nothing where two have it, or none."""
    asked: list[tuple[str, int, int]] = []
    monkeypatch.setattr(
        FileStore, "prefetch", lambda store, offset, size: asked.append((Path(store.name).name, offset, size))
    )

    def likely(disk: Disk, offset: int) -> list[tuple[str, int, int]]:
        asked.clear()
        prefetch_likely(disk.chain, offset // 512, 8)
        return asked

    with vhdkit.open_disk(differencing(tmp_path)) as disk:
        disk.settle(0, SIZE)
        for offset in (2 * MIB, 3 * MIB - 4096):  # in the base alone
            file, place, size = disk.chain.file_run(offset // 512, 8) or pytest.fail("it is settled")
            assert likely(disk, offset) == [(Path(file.name).name, place, size)]
        assert likely(disk, 1 * MIB) == [] and likely(disk, 12 * MIB) == []
