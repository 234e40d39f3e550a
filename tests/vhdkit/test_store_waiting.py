# SPDX-License-Identifier: Apache-2.0
"""What a file can say about data that is not in memory."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vhdkit.store import FileStore


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
    monkeypatch.setattr("vhdkit.space.file_system", lambda fd: magic)
    with FileStore.open(path) as store:
        for _ in range(2):
            assert store.try_pread_into(0, room) is not waits
        assert (bytes(room) == b"data") is not waits
