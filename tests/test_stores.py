# SPDX-License-Identifier: Apache-2.0
"""The stores on which the proofs rest: power cuts lose what they may, and never more."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.stores import CrashStore, Fault, FaultyStore, MemStore, PowerCut, io_failed, no_space, sync_failed
from tests.harness.vhd_builder import Vhd
from vhdkit import errors
from vhdkit.store import FileStore
from vhdkit.units import MIB, SECTOR_SIZE

OFFSETS = st.one_of(st.integers(0, 9000), st.sampled_from([0, 511, 512, 513, 4096]))
CHANGES = st.lists(
    st.tuples(st.sampled_from(["write", "punch", "reserve", "truncate"]), OFFSETS, st.integers(0, 3000)), max_size=12
)


@given(changes=CHANGES, reads=st.lists(st.tuples(OFFSETS, st.integers(0, 3000)), min_size=3, max_size=5))
def test_memory_behaves_as_a_file(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[str, int, int]], reads: list[tuple[int, int]]
) -> None:
    """The store in memory and a real file give the same bytes and sizes after the same calls."""
    path = tmp_path_factory.mktemp("store") / "file"
    path.touch()
    memory = MemStore()
    with FileStore.open(path, writable=True) as file:
        for number, (kind, offset, size) in enumerate(changes):
            for store in (memory, file):
                if kind == "write":
                    store.pwrite(offset, bytes([number + 1]) * size)
                elif kind == "punch":
                    store.punch(offset, size)
                elif kind == "truncate":
                    store.truncate(offset)
                elif size:
                    store.reserve(offset, size)
            assert memory.size() == file.size()
        for offset, size in reads:
            assert memory.pread(offset, size) == file.pread(offset, size)
            buffers = bytearray(b"\xee" * size), bytearray(b"\xee" * size)
            memory.pread_into(offset, memoryview(buffers[0]))
            file.pread_into(offset, memoryview(buffers[1]))
            assert buffers[0] == buffers[1]
        for offset, size, is_data in memory.data_runs(0, memory.size()):
            assert is_data or not any(file.pread(offset, size))
        assert memory.contents() == Path(path).read_bytes()


def test_holes_take_no_memory() -> None:
    """A store of many terabytes takes memory only for its data."""
    store = MemStore()
    store.truncate(1 << 46)
    store.pwrite(1 << 45, b"x")
    store.punch(MIB, 1 << 44)
    assert store.allocated_bytes() == SECTOR_SIZE


def test_writing_to_a_frozen_store_fails() -> None:
    """Every way to change a frozen store is an AssertionError, which the engine never catches."""
    store = MemStore(size_bytes=4096, frozen=True)
    with pytest.raises(AssertionError):
        store.pwrite(0, b"x")
    with pytest.raises(AssertionError):
        store.punch(0, 512)
    with pytest.raises(AssertionError):
        store.truncate(0)
    with pytest.raises(AssertionError):
        store.reserve(0, 512)


def possible_files(store: CrashStore) -> set[bytes]:
    """The results of a thousand cuts."""
    return {store.after_cut(random.Random(seed)).contents() for seed in range(1000)}


def sectors(text: str) -> bytes:
    """One sector per letter."""
    return b"".join(letter.encode() * SECTOR_SIZE for letter in text)


def test_synced_data_survives_every_cut() -> None:
    """After a sync only one file is possible."""
    store = CrashStore(MemStore())
    store.pwrite(0, sectors("abc"))
    store.sync()
    assert possible_files(store) == {sectors("abc")}


def test_unsynced_sectors_are_written_independently() -> None:
    """Every subset of the unsynced sectors is possible, also a later one without an earlier one, and an older version
    of one next to the newest of another."""
    store = CrashStore(MemStore())
    store.pwrite(0, sectors("abc"))
    store.sync()
    store.pwrite(0, sectors("x"))
    store.pwrite(2 * SECTOR_SIZE, sectors("z"))
    assert possible_files(store) == {sectors(text) for text in ("abc", "xbc", "abz", "xbz")}
    store.pwrite(0, sectors("y"))
    assert possible_files(store) == {sectors(one + "b" + other) for one in "axy" for other in "cz"}


def test_an_unsynced_length_may_be_anything_between() -> None:
    """An extended file may be short after a cut, and data beyond its end is lost; the rest reads as zeros."""
    store = CrashStore(MemStore())
    store.pwrite(0, sectors("a"))
    store.sync()
    store.pwrite(SECTOR_SIZE, sectors("bc"))
    found = possible_files(store)
    zero = bytes(SECTOR_SIZE)
    assert {sectors("a"), sectors("ab"), sectors("abc"), sectors("a") + 2 * zero, sectors("a") + zero} <= found
    assert all(SECTOR_SIZE <= len(one) <= 3 * SECTOR_SIZE and one.startswith(sectors("a")) for one in found)
    assert any(len(one) % SECTOR_SIZE for one in found)


def test_punches_and_truncates_may_be_lost_too() -> None:
    """A punch or a truncate that was not synced has happened or not."""
    store = CrashStore(MemStore())
    store.pwrite(0, sectors("ab"))
    store.sync()
    store.punch(0, SECTOR_SIZE)
    store.truncate(SECTOR_SIZE)
    found = possible_files(store)
    assert {sectors("ab"), sectors("a"), bytes(SECTOR_SIZE)} <= found


def test_only_footers_are_torn() -> None:
    """A footer in flight may be neither old nor new; any other sector, even one with its cookie, is one of the two."""
    store = CrashStore(MemStore(size_bytes=2 * SECTOR_SIZE))
    footer, other = Vhd(size=8 * MIB).footer(), b"conectix".ljust(SECTOR_SIZE, b"f")
    store.pwrite(0, footer + other)
    found = possible_files(store)
    assert {one[SECTOR_SIZE:] for one in found} == {other, bytes(SECTOR_SIZE)}
    assert len({one[:SECTOR_SIZE] for one in found}) > 10
    store.sync()
    assert possible_files(store) == {footer + other}


def test_power_is_cut_inside_the_nth_operation() -> None:
    """A write that is cut may have been done, a sync that is cut promises nothing; afterwards the store is dead."""
    for cut_at, expected in ((1, {"a", "x"}), (2, {"a", "x"}), (3, {"x", "y"})):
        start = MemStore()
        start.pwrite(0, sectors("a"))
        store = CrashStore(start)
        store.cut_at = cut_at
        with pytest.raises(PowerCut):
            store.pwrite(0, sectors("x"))
            store.sync()
            store.pwrite(0, sectors("y"))
        assert possible_files(store) == {sectors(text) for text in expected}
        with pytest.raises(PowerCut):
            store.pwrite(0, b"z")
        with pytest.raises(PowerCut):
            store.sync()
        with pytest.raises(PowerCut):
            store.pread(0, 1)
        assert possible_files(store) == {sectors(text) for text in expected}


def test_faults_occur_as_configured() -> None:
    """A fault fails the n-th call of its kind at its place, once or permanently, and can leave half of a write."""
    store = FaultyStore(
        MemStore(),
        Fault("write", no_space, at=2, partly=True),
        Fault("sync", sync_failed, at=2, persistent=True),
        Fault("read", io_failed, where=lambda offset: offset >= 100),
    )
    store.pwrite(0, b"aaaa")
    with pytest.raises(errors.NoSpace):
        store.pwrite(0, b"bbbb")
    store.pwrite(4, b"cc")
    assert store.pread(0, 10) == b"bbaacc"
    store.sync()
    for _ in range(2):
        with pytest.raises(errors.SyncFailed):
            store.sync()
    assert store.sync_count == 1
    with pytest.raises(errors.IoFailed):
        store.pread(100, 1)
    assert store.pread(100, 1) == b""
