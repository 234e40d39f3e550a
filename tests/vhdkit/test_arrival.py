# SPDX-License-Identifier: Apache-2.0
"""Word that data is in the page cache, from the kernel that runs the tests."""

from __future__ import annotations

import os
import random
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

import vhdkit
from vhdkit import arrival
from vhdkit.arrival import MOST, Arrivals
from vhdkit.store import FileStore
from vhdkit.units import MIB, PAGE_SIZE

pytestmark = pytest.mark.timeout(60)
PAGES = 512


@pytest.fixture
def arrivals() -> Iterator[Arrivals]:
    """Those of the system."""
    found = Arrivals.open()
    if found is None:
        pytest.skip("this system allows no io_uring with deferred work")
    yield found
    found.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of which nothing is in memory, unless the file system is in memory itself."""
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(random.Random(1).randbytes(PAGES * PAGE_SIZE))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


def all_of(arrivals: Arrivals, wanted: set[int]) -> None:
    """Wait for word of each of these questions, which comes once."""
    with select.epoll() as poll:
        poll.register(arrivals.event, select.EPOLLIN)
        while wanted:
            assert poll.poll(30), "word comes"
            told = arrivals.take()
            assert len(set(told)) == len(told) and wanted.issuperset(told)
            wanted = wanted.difference(told)


def test_word_comes_when_the_data_is_there(arrivals: Arrivals, path: Path) -> None:
    """After the word, the page can be read without waiting; every question is answered, however many there are."""
    order = random.Random(2).sample(range(PAGES), PAGES)
    with FileStore.open(path) as store:
        store._no_wait = os.RWF_NOWAIT
        for start in range(0, PAGES, MOST):
            places = [page * PAGE_SIZE + 5 for page in order[start : start + MOST]]
            numbers = [store.ask(place, arrivals) for place in places]
            assert store.ask(0, arrivals) is None, "more than can be asked at once"
            all_of(arrivals, {number for number in numbers if number is not None})
            assert all(store.try_pread_into(place, memoryview(bytearray(7))) for place in places)
    assert arrivals.take() == []


def test_what_cannot_be_read(arrivals: Arrivals, path: Path) -> None:
    """Word comes also where there is nothing to read: past the end, and of a descriptor that is not open."""
    with FileStore.open(path) as store:
        numbers = {store.ask(PAGES * PAGE_SIZE + 1, arrivals), arrivals.ask(-1, 0)}
        all_of(arrivals, {number for number in numbers if number is not None})
    with pytest.raises(vhdkit.errors.DiskClosed):
        store.ask(0, arrivals)


def test_questions_in_progress_at_the_end(path: Path) -> None:
    """Closing leaves nothing behind: neither descriptors nor locks of the files that were asked about."""
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        arrivals = Arrivals.open()
        if arrivals is None:
            return
        with FileStore.open_held(path) as store:
            os.posix_fadvise(store._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            for page in range(MOST):
                store.ask(page * PAGE_SIZE, arrivals)
        arrivals.close()
        arrivals.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("refused", [arrival._SETUP, arrival._REGISTER])
def test_systems_without_it(refused: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a system call is refused, there are none, and nothing stays open."""
    call, before = arrival._call, len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(arrival, "_call", lambda number, *rest: -1 if number == refused else call(number, *rest))
    assert Arrivals.open() is None
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_chain_knows_whom_to_ask(arrivals: Arrivals, tmp_path: Path) -> None:
    """The file in which a sector lies is asked; of sectors that are in no file there is no word."""
    base, leaf = tmp_path / "base.vhd", tmp_path / "leaf.avhd"
    vhdkit.create_image(base, 8 * MIB)
    with vhdkit.open_disk(base, writable=True) as disk:
        disk.write(0, b"b" * PAGE_SIZE)
    vhdkit.create_child(leaf, base)
    with vhdkit.open_disk(leaf, writable=True) as disk:
        disk.write(2 * MIB, b"l" * PAGE_SIZE)
        disk.settle(0, disk.size_bytes)
        for offset in (0, 2 * MIB):
            number = disk.chain.ask(offset // 512, arrivals)
            assert number is not None
            all_of(arrivals, {number})
        assert disk.chain.ask(4 * MIB // 512, arrivals) is None
