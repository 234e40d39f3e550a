# SPDX-License-Identifier: Apache-2.0
"""Writing a file that has no name yet: what is reserved, and when the device starts."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vhdkit.folder import NewFile
from vhdkit.units import MIB


def test_large_writes_reserve_their_space_where_that_is_quicker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly the range of a large write is reserved; where reserving is not quicker, or fails, it is only written."""
    reserved: list[tuple[int, int]] = []

    def reserve(fd: int, offset_bytes: int, size_bytes: int) -> bool:
        reserved.append((offset_bytes, size_bytes))
        if offset_bytes > 8 * MIB:
            raise OSError(errno.ENOSPC, "simulated")
        return offset_bytes < 8 * MIB

    content = os.urandom(3 * MIB + 512)
    monkeypatch.setattr("vhdkit.space.reserve", reserve)
    for is_quicker in (True, False):
        monkeypatch.setattr("vhdkit.space.is_quicker_reserved", lambda fd, answer=is_quicker: answer)
        with NewFile(tmp_path / f"new-{is_quicker}") as new:
            for place in (512, 9 * MIB, 8 * MIB, 16 * MIB):
                new.store.pwrite(place, content if place == 512 else content[:MIB])
                new.store.pwrite(place + 4 * MIB, content[:4096])
            new.commit(sync=False)
        raw = (tmp_path / f"new-{is_quicker}").read_bytes()
        assert raw[512 : 512 + len(content)] == content and raw[8 * MIB : 9 * MIB] == content[:MIB]
        assert raw[16 * MIB :] == content[:MIB] + bytes(3 * MIB) + content[:4096]
    assert reserved == [(512, len(content)), (9 * MIB, MIB), (8 * MIB, MIB)]  # after "cannot" it is not tried again


def test_a_range_that_is_expected_is_reserved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large writes inside it reserve nothing more, others do; the size of the file follows from what was written."""
    reserved: list[tuple[str, int, int]] = []

    def reserving(kind: str) -> Callable[[int, int, int], bool]:
        def noted(fd: int, offset_bytes: int, size_bytes: int) -> bool:
            reserved.append((kind, offset_bytes, size_bytes))
            return True

        return noted

    monkeypatch.setattr("vhdkit.space.is_quicker_reserved", lambda fd: True)
    monkeypatch.setattr("vhdkit.space.reserve", reserving("reserve"))
    monkeypatch.setattr("vhdkit.space.reserve_inside", reserving("reserve inside"))
    with NewFile(tmp_path / "new") as new:
        new.store.expect(512, 2 * MIB + 1024)
        assert new.store.size() == 0
        new.store.pwrite(1024, bytes(2 * MIB))
        new.store.pwrite(4 * MIB, bytes(MIB))
        new.store.pwrite(2 * MIB, bytes(MIB))
        new.commit(sync=False)
    assert reserved == [
        ("reserve inside", 512, 2 * MIB + 1024),
        ("reserve", 4 * MIB, MIB),
        ("reserve", 2 * MIB, MIB),  # not all of it was expected
    ]


def test_a_file_that_starts_early_counts_what_is_written(tmp_path: Path) -> None:
    """Only after `start_early` the device is asked to write before the commit."""
    with NewFile(tmp_path / "new") as new:
        new.store.pwrite(0, bytes(MIB))
        assert new.store._transfer.behind._behind_bytes == 0
        new.start_early()
        new.store.pwrite(0, bytes(MIB))
        new.store.pwrite(MIB, b"x")
        assert new.store._transfer.behind._behind_bytes == MIB + 1
