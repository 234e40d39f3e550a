# SPDX-License-Identifier: Apache-2.0
"""What a file can say about data that is not in memory."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vhdkit.store import FileStore
from vhdkit.units import MIB


@pytest.mark.parametrize("magic, waits", [(0x01021994, False), (0x6969, True), (0x65735546, True), (None, True)])
def test_file_systems_that_cannot_say_what_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, magic: int | None, waits: bool
) -> None:
    """Where the system cannot read without waiting, nothing is read at once, unless there is no device to wait for."""
    path, room = tmp_path / "file", memoryview(bytearray(4))
    path.write_bytes(b"data")

    def preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags:
            raise OSError(errno.EOPNOTSUPP, "no such flag")
        return os.preadv(fd, buffers, offset)

    monkeypatch.setattr("vhdkit.store._preadv", preadv)
    asked: list[int] = []

    def file_system(fd: int) -> int | None:
        asked.append(fd)
        return magic

    monkeypatch.setattr("vhdkit.space.file_system", file_system)
    with FileStore.open(path) as store:
        for _ in range(2):
            assert store.try_pread_into(0, room) is not waits
        assert (bytes(room) == b"data") is not waits
        assert len(asked) == 1, "a file system that hangs answers no more"


def test_a_file_system_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system cannot say what is in memory, attempts make no call that FUSE would have to answer, once it is
    known: the file is not opened again for a stream, its size is not asked for, and nothing is sent of it."""
    path, room = tmp_path / "file", memoryview(bytearray(MIB))
    path.write_bytes(bytes(8 * MIB))

    def preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        raise OSError(errno.EOPNOTSUPP, "no such flag")

    def hang(*arguments: object, **named: object) -> int:
        raise AssertionError("FUSE would have to answer")

    with FileStore.open(path) as store:
        monkeypatch.setattr("vhdkit.space.file_system", lambda fd: 0x65735546)
        monkeypatch.setattr("vhdkit.page_cache.holds", lambda fd, offset, size: True)
        for module in ("store", "streams"):
            monkeypatch.setattr(f"vhdkit.{module}._preadv", preadv)
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", preadv)
            patch.setattr(os, "lseek", hang)
            patch.setattr("vhdkit.streams.opened", hang)
            for offset in range(0, 8 * MIB, MIB):
                assert not store.try_pread_into(offset, room)
                assert not store.can_send(offset, MIB)
                patch.setattr("vhdkit.space.file_system", hang)
