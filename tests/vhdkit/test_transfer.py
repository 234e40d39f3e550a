# SPDX-License-Identifier: Apache-2.0
"""Copying between files: every method gives the same bytes, and the file system decides which is used."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import not_available, require_tool, run
from vhdkit import transfer
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


class _FakeClone:
    """FICLONERANGE of a file system with blocks of one page, simulated by copying; counts the shared bytes."""

    def __init__(self, refusal: int | None = None) -> None:
        self.shared_bytes = 0
        self.calls = 0
        self._refusal = refusal

    def __call__(self, fd: int, request: int, argument: bytes) -> int:
        self.calls += 1
        if self._refusal is not None:
            raise OSError(self._refusal, os.strerror(self._refusal))
        source, source_offset, size, offset = struct.unpack("=qQQQ", argument)
        if source_offset % PAGE_SIZE or offset % PAGE_SIZE or size % PAGE_SIZE:
            raise OSError(errno.EINVAL, "unaligned")
        if source_offset + size > os.fstat(source).st_size:
            raise OSError(errno.EINVAL, "past the end")
        os.pwrite(fd, os.pread(source, size, source_offset), offset)
        self.shared_bytes += size
        return 0


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
        patch.setattr(fcntl, "ioctl", _FakeClone())
        _copied(folder, source_offset, offset, size)
        patch.setattr(transfer, "kept_elsewhere", lambda fd: True)
        patch.setattr(fcntl, "ioctl", _FakeClone(errno.EOPNOTSUPP))
        _copied(folder, source_offset, offset, size)


def test_whole_pages_are_shared_and_only_the_edges_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A range aligned alike in both files shares all but its partial pages; a small one is copied."""
    clone = _FakeClone()
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
        clone = _FakeClone(refusal)
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


def test_the_device_begins_early_and_close_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After enough was copied the kernel is asked to write, and no thread outlives the descriptor."""
    monkeypatch.setattr(transfer, "_WRITE_BEHIND_BYTES", 2 * MIB)
    with _files(tmp_path) as (source, here):
        copying = Transfer(here)
        copying.copy(source, 1, 0, MIB)
        assert copying._writing is None
        copying.copy(source, 1, 2 * MIB, MIB)
        writing = copying._writing
        assert writing is not None
        copying.close()
        assert not writing.is_alive()


@contextlib.contextmanager
def _xfs(folder: Path) -> Iterator[Path]:
    image, mounted = folder / "xfs.img", folder / "xfs"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(512 * MIB)
    run([require_tool("mkfs.xfs"), "-q", image])
    done = subprocess.run(["mount", "-o", "loop", image, mounted], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        not_available(f"cannot mount an XFS image: {done.stderr.strip()}")
    try:
        yield mounted
    finally:
        run(["umount", mounted])


@pytest.mark.interop
def test_a_real_file_system_shares(tmp_path: Path) -> None:
    """On XFS a copied range takes no additional space, and both files read the same."""
    if os.geteuid() != 0:
        not_available("mounting needs root")
    with _xfs(tmp_path) as folder:
        (folder / "source").write_bytes(_CONTENT)
        (folder / "here").touch()
        run(["sync", "-f", folder])
        free = os.statvfs(folder).f_bavail
        with (folder / "source").open("rb") as source, (folder / "here").open("rb+") as here:
            copying = Transfer(here.fileno())
            assert copying.copy(source.fileno(), 0, MIB, _SIZE) == _SIZE
            copying.close()
        run(["sync", "-f", folder])
        taken = (free - os.statvfs(folder).f_bavail) * os.statvfs(folder).f_frsize
        assert (folder / "here").read_bytes() == bytes(MIB) + _CONTENT
        assert taken < MIB
