# SPDX-License-Identifier: Apache-2.0
"""Copying between files: every method gives the same bytes, and the file system decides which is used."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.clones import FakeClone
from tests.mounting import SHARING, file_system
from tests.support import run
from vhdkit import space, transfer
from vhdkit.transfer import MIN_SHARED_BYTES, Transfer
from vhdkit.units import KIB, MIB, PAGE_SIZE

_SIZE = 3 * MIB + 700
_CONTENT = os.urandom(_SIZE)


@contextlib.contextmanager
def _files(folder: Path) -> Iterator[tuple[int, int]]:
    """(source, destination) as open descriptors; the destination holds a few other bytes."""
    (folder / "source").write_bytes(_CONTENT)
    (folder / "here").write_bytes(b"x" * 5 * MIB)
    source = os.open(folder / "source", os.O_RDONLY)
    here = os.open(folder / "here", os.O_RDWR)
    try:
        yield source, here
    finally:
        os.close(source)
        os.close(here)


def _copied(folder: Path, source_offset: int, offset: int, size: int) -> None:
    """Copy, and compare the whole destination with the expected content."""
    with _files(folder) as (source, here):
        copying = Transfer(here)
        there = max(min(size, _SIZE - source_offset), 0)
        assert copying.copy(source, source_offset, offset, size) == there
        copying.close()
        expected = bytearray(b"x" * 5 * MIB)
        expected[offset : offset + there] = _CONTENT[source_offset : source_offset + there]
        assert (folder / "here").read_bytes() == expected


_places = st.integers(0, _SIZE) | st.sampled_from([0, PAGE_SIZE, 512, MIB, MIB + 512])
_sizes = st.integers(0, MIB) | st.sampled_from([0, PAGE_SIZE, 64 * KIB, MIB])


@given(source_offset=_places, offset=_places, size=_sizes)
@settings(max_examples=60, deadline=None)
def test_every_way_copies_exactly_the_range(
    source_offset: int, offset: int, size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Through memory, shared and by the kernel the range arrives, nothing else changes, and its end is returned."""
    folder = tmp_path_factory.mktemp("copy")
    with pytest.MonkeyPatch.context() as patch:
        _copied(folder, source_offset, offset, size)
        patch.setattr(fcntl, "ioctl", FakeClone())
        _copied(folder, source_offset, offset, size)
        patch.setattr(transfer, "kept_elsewhere", lambda fd: True)
        patch.setattr(fcntl, "ioctl", FakeClone(errno.EOPNOTSUPP))
        _copied(folder, source_offset, offset, size)


def test_whole_pages_are_shared_and_only_the_edges_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A range aligned alike in both files shares all but its partial pages; a small one is copied."""
    clone = FakeClone()
    monkeypatch.setattr(fcntl, "ioctl", clone)
    _copied(tmp_path, 512, MIB + 512, MIB)
    assert clone.shared_bytes == MIB - PAGE_SIZE
    _copied(tmp_path, 0, 0, MIN_SHARED_BYTES - PAGE_SIZE)
    _copied(tmp_path, 512, 0, MIB)  # is at another offset in its page
    assert clone.calls == 1
    _copied(tmp_path, 0, 0, MIN_SHARED_BYTES)
    assert clone.calls == 2


def test_missing_support_for_sharing_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without sharing is not asked again; the refusal of one range does not count as that."""
    for refusal, calls in ((errno.EOPNOTSUPP, 1), (errno.EXDEV, 1), (errno.EINVAL, 3)):
        clone = FakeClone(refusal)
        monkeypatch.setattr(fcntl, "ioctl", clone)
        with _files(tmp_path) as (source, here):
            copying = Transfer(here)
            for place in (0, MIB, 2 * MIB):
                assert copying.copy(source, place, place, MIB) == MIB
            assert os.pread(here, 3 * MIB, 0) == _CONTENT[: 3 * MIB]
        assert clone.calls == calls


@pytest.mark.parametrize("way", ["clone", "read", "write", "kernel"])
def test_real_failures_are_raised(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full or broken device is not a reason to try another method."""

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if way == "clone":
        monkeypatch.setattr(fcntl, "ioctl", full)
    elif way == "kernel":
        monkeypatch.setattr(transfer, "kept_elsewhere", lambda fd: True)
        monkeypatch.setattr(os, "copy_file_range", full)
    else:
        monkeypatch.setattr(os, "preadv" if way == "read" else "pwrite", full)
    with _files(tmp_path) as (source, here):
        copying = Transfer(here)
        with pytest.raises(OSError, match="No space"):
            copying.copy(source, 0, 0, MIB)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that takes only a part, as before a full disk or at a signal, is continued where it stopped."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, memoryview(data)[:100_000], offset))
    _copied(tmp_path, 7, 9, MIB)


@pytest.mark.parametrize("outcome", ["reserved", "impossible", "no space"])
def test_long_ranges_are_reserved_where_that_is_quicker(
    outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The space of a long range is reserved before it is copied, inside or past the file, whose size follows from what
    was copied alone. A file system that cannot is asked once; a failure is left to the write."""
    asked: list[tuple[int, int]] = []
    reserve = space.reserve_inside

    def reserving(fd: int, offset: int, size: int) -> bool:
        asked.append((offset, size))
        if outcome == "no space":
            raise OSError(errno.ENOSPC, "simulated")
        return outcome == "reserved" and (reserve(fd, offset, size) or True)

    monkeypatch.setattr(transfer, "is_quicker_reserved", lambda fd: True)
    monkeypatch.setattr(transfer, "reserve_inside", reserving)
    with _files(tmp_path) as (source, here):
        copying = Transfer(here)
        assert copying.copy(source, 0, 100, MIB) == MIB
        assert copying.copy(source, 0, 5 * MIB + 3, 255 * KIB) == 255 * KIB
        assert copying.copy(source, 2 * MIB, 6 * MIB, 2 * MIB) == _SIZE - 2 * MIB  # the source ends
        copying.close()
        assert os.fstat(here).st_size == 4 * MIB + _SIZE
        assert os.pread(here, MIB, 100) == _CONTENT[:MIB]
        assert os.pread(here, 2 * MIB, 6 * MIB) == _CONTENT[2 * MIB :]
    assert asked == ([(100, MIB)] if outcome == "impossible" else [(100, MIB), (6 * MIB, 2 * MIB)])


def test_the_device_begins_while_more_is_copied(tmp_path: Path) -> None:
    """What was copied counts for the file's `WriteBehind`, which starts the device."""
    with _files(tmp_path) as (source, here):
        copying = Transfer(here)
        copying.copy(source, 1, 0, MIB)
        assert copying.behind._behind_bytes == MIB
        copying.copy(source, 1, 2 * MIB, _SIZE)
        assert copying.behind._behind_bytes == MIB + _SIZE - 1
        copying.close()


@pytest.mark.interop
@pytest.mark.parametrize("kind", SHARING)
def test_a_real_file_system_shares(kind: str, tmp_path: Path) -> None:
    """On XFS and Btrfs a copied range takes no additional space, and both files read the same."""
    with file_system(tmp_path, kind) as folder:
        (folder / "source").write_bytes(_CONTENT)
        (folder / "here").touch()
        run(["sync", "-f", folder])
        free = os.statvfs(folder).f_bavail
        with (folder / "source").open("rb") as source, (folder / "here").open("rb+") as here:
            copying = Transfer(here.fileno())
            assert transfer.may_share(here.fileno()) and copying.shares_with(source.fileno())
            assert os.fstat(here.fileno()).st_size == 0
            assert copying.copy(source.fileno(), 0, MIB, _SIZE) == _SIZE
            copying.close()
        run(["sync", "-f", folder])
        taken = (free - os.statvfs(folder).f_bavail) * os.statvfs(folder).f_frsize
        assert (folder / "here").read_bytes() == bytes(MIB) + _CONTENT
        assert taken < MIB


def test_whether_files_can_share_is_tried_without_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial leaves size and content as they were, also where it is refused or fails."""
    with _files(tmp_path) as (source, here):
        before = os.pread(here, 8 * MIB, 0)
        refusals = ((None, True), (errno.EOPNOTSUPP, False), (errno.EXDEV, False), (errno.EINVAL, False))
        for refusal, expected in refusals:
            monkeypatch.setattr(fcntl, "ioctl", FakeClone(refusal))
            assert Transfer(here).shares_with(source) is expected
            assert os.pread(here, 8 * MIB, 0) == before
        monkeypatch.setattr(fcntl, "ioctl", FakeClone(errno.ENOSPC))
        with pytest.raises(OSError, match="No space"):
            Transfer(here).shares_with(source)
        assert os.pread(here, 8 * MIB, 0) == before
        os.truncate(tmp_path / "source", MIN_SHARED_BYTES - 1)
        monkeypatch.setattr(fcntl, "ioctl", FakeClone())
        assert not Transfer(here).shares_with(source)
