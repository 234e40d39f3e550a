# SPDX-License-Identifier: Apache-2.0
"""What the kernel is asked to read ahead."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.waiting import wait_until
from vhdkit import errors, page_cache
from vhdkit.page_cache import AT_ONCE_BYTES
from vhdkit.store import FileStore
from vhdkit.units import KIB, MIB, PAGE_SIZE


def test_a_range_is_asked_for_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pieces cover the range without gaps; none is longer than what every kernel reads for one call."""
    asked: list[tuple[int, int]] = []

    def fadvise(fd: int, offset: int, size: int, advice: int) -> None:
        assert fd == 7 and advice == os.POSIX_FADV_WILLNEED
        asked.append((offset, size))

    monkeypatch.setattr(page_cache, "_fadvise", fadvise)
    page_cache.prefetch(7, 512, 4096)
    assert asked == [(512, 4096)]
    asked.clear()
    size = 3 * AT_ONCE_BYTES + 1
    page_cache.prefetch(7, 100, size)
    assert all(0 < count <= AT_ONCE_BYTES for _, count in asked)
    assert [offset for offset, _ in asked] == [100 + sum(count for _, count in asked[:n]) for n in range(len(asked))]
    assert sum(count for _, count in asked) == size


def test_a_failed_hint_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel refuses the hint, nothing is raised, for the read itself works."""

    def refuse(fd: int, offset: int, size: int, advice: int) -> None:
        raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr(page_cache, "_fadvise", refuse)
    (tmp_path / "a").write_bytes(b"x" * 100)
    with FileStore.open(tmp_path / "a") as store:
        store.prefetch(0, 100)
        assert store.pread(0, 100) == b"x" * 100


def test_what_was_prefetched_is_read_without_waiting(tmp_path: Path) -> None:
    """The range comes into the page cache, on file systems that use it, by the hint alone; a closed store refuses."""
    (tmp_path / "a").write_bytes(os.urandom(2 * MIB))
    with FileStore.open(tmp_path / "a") as store:
        os.fsync(store.fileno())
        os.posix_fadvise(store.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        store.prefetch(MIB, MIB)
        buffer = memoryview(bytearray(PAGE_SIZE))
        for offset in range(MIB, 2 * MIB, PAGE_SIZE):
            wait_until(lambda offset=offset: store.try_pread_into(offset, buffer), "the page is read")  # type: ignore[misc]
            assert buffer == store.pread(offset, PAGE_SIZE)
    with pytest.raises(errors.DiskClosed):
        store.prefetch(0, 1)


def test_which_pages_are_there(tmp_path: Path) -> None:
    """A range is in the cache if all of its pages are; where the kernel does not say, nothing is."""
    path = tmp_path / "file"
    path.write_bytes(bytes(MIB))
    with path.open("rb") as file:
        os.fdatasync(file.fileno())
        file.read()
        says = page_cache.holds(file.fileno(), 0, MIB)
        kernel = tuple(int(part) for part in os.uname().release.split(".")[:2])
        assert says == (kernel >= (6, 5)) or not page_cache._HAS_CACHESTAT
        assert page_cache.holds(file.fileno(), 100, MIB - 200) == says
        assert not page_cache.holds(file.fileno(), 0, MIB + 1)  # past the end there are none
        assert not page_cache.holds(-1, 0, MIB)


def test_how_far_the_kernel_reads_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of the device below a file; 0 where the system does not say."""
    numbers = [(os.makedev(0, 0xFFFFF), 0)]
    for disk in list(Path("/sys/block").iterdir())[:4]:
        major, minor = (disk / "dev").read_text().split(":")
        limit = int((disk / "queue/read_ahead_kb").read_text()) * KIB
        numbers.append((os.makedev(int(major), int(minor)), limit))
    for number, limit in numbers:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fstat", lambda fd, number=number: SimpleNamespace(st_dev=number))
            found = page_cache.read_ahead_bytes(0)
        assert found == limit
