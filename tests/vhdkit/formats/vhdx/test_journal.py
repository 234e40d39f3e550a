# SPDX-License-Identifier: Apache-2.0
"""What a session leaves in headers and log: when the DataWriteGuid changes, and what a failed write leaves."""

from __future__ import annotations

import contextlib
import itertools
import random
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

import vhdkit
from tests.harness.power import open_mem
from tests.harness.stores import CrashStore, Fault, FaultyStore, MemStore, no_space
from tests.support import daily_or_nightly
from tests.vhdkit.formats.vhdx.images import BAT, LOG, METADATA, PARENT, add_log, assert_equal_headers, image
from vhdkit.errors import CorruptImage
from vhdkit.formats.guard import SyncGuard
from vhdkit.formats.vhdx import journal as journal_module
from vhdkit.formats.vhdx import replay
from vhdkit.formats.vhdx.create import new_locator
from vhdkit.formats.vhdx.format import VHDX
from vhdkit.formats.vhdx.header import current_header, read_headers
from vhdkit.formats.vhdx.journal import Journal
from vhdkit.formats.vhdx.layout import HEADER_OFFSETS
from vhdkit.formats.vhdx.locator import build_locator
from vhdkit.formats.vhdx.log import SECTOR, LogChange
from vhdkit.formats.vhdx.opening import open_vhdx
from vhdkit.formats.vhdx.replay import read_log
from vhdkit.image import ParentRef
from vhdkit.store import Buffer, Store
from vhdkit.units import KIB, MIB


def test_a_session_that_writes_brings_one_new_id() -> None:
    """The first write of a session changes it; a flush, more writes and a session that only reads keep it."""
    store = image()
    before = VHDX.linkage_id(store)
    with open_mem(store, writable=True) as disk:
        assert disk.read(0, 512) == bytes(512) and VHDX.linkage_id(store) == before
        disk.write(0, b"a" * 512)
        during = VHDX.linkage_id(store)
        disk.flush()
        disk.write(MIB, b"b" * 512)
    assert before != during == VHDX.linkage_id(store)
    assert_equal_headers(store)
    with open_mem(store, writable=True) as disk:
        disk.read(0, MIB)
    assert VHDX.linkage_id(store) == during


def test_a_replay_keeps_the_id() -> None:
    """A replay keeps the DataWriteGuid, because the disk reads as before."""
    store = image()
    before = VHDX.linkage_id(store)
    add_log(store, [[LogChange(BAT, SECTOR, None)]])
    open_mem(store, writable=True).close()
    assert VHDX.linkage_id(store) == before
    assert_equal_headers(store)


def test_new_names_of_the_parent_keep_the_id() -> None:
    """Relinking keeps the DataWriteGuid, but gives the file a new FileWriteGuid."""
    store = image(parent=PARENT)
    before = read_headers(store)[0].header
    VHDX.relink(store, PARENT)
    after = read_headers(store)[0].header
    assert before.data_write_guid == after.data_write_guid and before.file_write_guid != after.file_write_guid
    assert_equal_headers(store)


def test_pages_that_could_not_be_put_in_their_places_are_put_there_at_the_end() -> None:
    """INV-LOG-WHOLE: whichever write of a metadata change fails, closing the image makes all of the change or none."""
    names = ParentRef.of_paths(b"n" * 16, 0, relative=".\\new.vhdx", absolute="\\new.vhdx", name="new.vhdx")
    old, new, seen = (PARENT.linkage_id,), (names.linkage_id,), set()
    for at in range(1, 40):
        store = FaultyStore(image(parent=PARENT), Fault("write", no_space, at=at))
        opened = open_vhdx(store, writable=True)
        item = opened.metadata.items.locator
        assert item is not None
        writes = [(item.offset_bytes, build_locator(new_locator(names)))]
        try:
            opened.log_writes(writes)
        except vhdkit.NoSpace:
            seen.add(recorded(store))
        with contextlib.suppress(vhdkit.NoSpace):
            opened.finish()
        assert recorded(store) in (old, new)
        seen.add(recorded(store))
        if store.faults and store.faults[0].seen < at:
            break
    assert seen == {old, new} and at > 5
    assert_equal_headers(store)


def recorded(store: Store) -> tuple[bytes, ...]:
    """The ids that the image records for its parent."""
    parent = VHDX.facts(store).parent
    assert parent is not None
    return parent.linkage_ids


def test_an_opening_whose_file_got_a_log_from_another_one_stops_writing() -> None:
    """Entries that a failed change through another opening left in the log would be lost with the next header."""
    store = image()
    disk = open_mem(store, writable=True)
    disk.write(0, b"a" * 512)
    disk.chain.leaf.seal()
    add_log(store, [[LogChange(BAT, SECTOR, None)]])
    for _ in range(2):
        with pytest.raises(vhdkit.SyncFailed, match="another open handle"):
            disk.write(MIB, b"b" * 512)
    disk.close()
    assert VHDX.describe(store)[1].log_entries == 1


# -- the log at a power cut -------------------------------------------------------------------------------------------

RING = 28 * KIB  # seven sectors: two entries of a page, an empty one, and one sector that stays free
FREE = METADATA + MIB // 2  # pages of the metadata region that hold nothing
PAGES = 5


class JournalRun:
    """Log entries with random pages in a short ring; several cuts are examined inside each write and sync.

    What a reader finds is the state after the last entry that is durable, or after the one that is being written.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int, cuts: int) -> None:
        monkeypatch.setattr(replay, "log_place", lambda store, place: (LOG, RING))
        self.rng, self.cuts = random.Random(seed), cuts
        self.store = CrashStore(image())
        self.states = [[bytes(SECTOR)] * PAGES]
        guard = SyncGuard(self.store)
        current = current_header(self.store.name, read_headers(self.store))
        self.journal = Journal(self.store, current, (LOG, RING), guard)
        self.store.watcher = self.judge

    def judge(self) -> None:
        """Every file that a cut here can leave opens, and holds exactly one of the states."""
        for _ in range(self.cuts):
            found = self.store.after_cut(self.rng)
            try:
                current = current_header(found.name, read_headers(found))
                replayed = read_log(found, current)
            except CorruptImage as error:
                raise AssertionError(f"INV-LOG-WHOLE, INV-HEADER-PAIR: {error}") from error
            view = found if replayed is None else replayed.view
            state = [view.pread(FREE + number * SECTOR, SECTOR) for number in range(PAGES)]
            assert state in self.states, "not the state after an entry"

    def step(self) -> None:
        """Log an entry with one or two pages."""
        state = list(self.states[-1])
        numbers = self.rng.sample(range(PAGES), self.rng.choice((1, 1, 2)))
        for number in numbers:
            state[number] = self.rng.randbytes(16).ljust(SECTOR, b"x")
        group = [LogChange(FREE + number * SECTOR, SECTOR, state[number]) for number in sorted(numbers)]
        self.journal.begin(changes_disk=False)
        self.states.append(state)
        self.journal.log(group)
        self.journal.sync()
        self.states = [state]
        self.journal.logged(group)

    def run(self) -> None:
        """Log entries until the ring has been used several times, then end the session."""
        for _ in range(14):
            self.step()
            if self.rng.random() < 0.1:
                self.journal.sync()
        self.journal.settle()
        self.journal.end()
        self.judge()


@pytest.mark.parametrize("seed", range(daily_or_nightly(3, 60)))
def test_inv_log_whole_in_a_ring_that_runs_full(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """INV-LOG-WHOLE, INV-HEADER-PAIR: whatever a cut leaves can be opened, with whole entries, and none that counted
    is lost.
    """
    JournalRun(monkeypatch, seed, cuts=4).run()


def caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least one of a few runs detects a wrong order."""
    with pytest.raises(AssertionError):
        for seed in range(20):
            JournalRun(monkeypatch, seed, cuts=20).run()


def test_a_tail_that_moves_before_the_pages_are_durable_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-test: detects a tail after an entry whose pages were written to their places, but not synced."""
    real = Journal.logged

    def eager(self: Journal, pages: list[LogChange]) -> None:
        real(self, pages)
        self._unsettled.clear()

    monkeypatch.setattr(Journal, "logged", eager)
    caught(monkeypatch)


def test_a_ring_that_is_freed_by_the_tail_in_memory_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-test: detects a torn entry that overwrites the tail recorded by the newest durable entry."""

    def free(self: Journal) -> int:
        return self._log_size - (self._head - self._tail()) % self._log_size

    monkeypatch.setattr(Journal, "_free_bytes", free)
    caught(monkeypatch)


# -- Ctrl-C inside the log --------------------------------------------------------------------------------------------


SETTLING = ("logged", "_put_empty", "_write_header")  # what notes that something is durable


class Strike:
    """Raises KeyboardInterrupt once, before the line number `at` of those that these functions execute."""

    def __init__(self, at: int) -> None:
        self.remaining = at

    def __call__(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        """See `sys.settrace`."""
        if frame.f_code.co_filename != journal_module.__file__ or frame.f_code.co_name not in SETTLING:
            return None
        if event == "line":
            self.remaining -= 1
            if self.remaining == 0:
                raise KeyboardInterrupt
        return self


class InterruptedRun(JournalRun):
    """The same, with one interrupt. The pages of an interrupted entry are logged again, as a flush does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int, at: int) -> None:
        super().__init__(monkeypatch, seed, cuts=0)
        self.strike = Strike(at)

    def run(self) -> None:
        """See `JournalRun.run`."""
        earlier = sys.gettrace()
        for _ in range(9):
            before = self.states[-1]
            sys.settrace(self.strike)
            try:
                self.step()
            except KeyboardInterrupt:
                sys.settrace(earlier)
                self.cuts = 8
                self.log_again(before)
                self.cuts = 1
            finally:
                sys.settrace(earlier)
        self.journal.settle()
        self.journal.end()
        self.judge()

    def log_again(self, before: list[bytes]) -> None:
        """An entry with everything that the interrupted one changed, and one page more."""
        state = [*self.states[-1][:-1], self.rng.randbytes(16).ljust(SECTOR, b"y")]
        group = [
            LogChange(FREE + number * SECTOR, SECTOR, one) for number, one in enumerate(state) if one != before[number]
        ]
        self.states = [before, *self.states, state]  # the interrupted call promised nothing
        self.journal.begin(changes_disk=False)
        self.journal.log(group)
        self.journal.sync()
        self.states = [state]
        self.journal.logged(group)


@pytest.mark.parametrize("seed", range(daily_or_nightly(1, 6)))
def test_an_interrupt_before_any_line_breaks_no_promise(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """INV-LOG-WHOLE, INV-HEADER-PAIR: after Ctrl-C where the journal notes what is durable, the next
    entries are as safe as before.
    """
    step, tried = daily_or_nightly(2, 1), 0
    for at in itertools.count(1, step):
        run = InterruptedRun(monkeypatch, seed, at)
        run.run()
        if run.strike.remaining > 0:
            break
        tried += 1
    assert tried > 50 // step


class HeaderStore(MemStore):
    """Raises KeyboardInterrupt in the sync number `at`, and refuses a header slot while the other is not durable."""

    def __init__(self, start: MemStore, at: int) -> None:
        super().__init__(start.name, sectors=dict(start._sectors), size_bytes=start.size())
        self.at, self.count = at, 0
        self.unsynced: set[int] = set()

    def pwrite(self, offset_bytes: int, data: Buffer) -> None:
        """See `Store.pwrite`."""
        if offset_bytes in HEADER_OFFSETS:
            assert self.unsynced <= {offset_bytes}, "INV-HEADER-PAIR: both slots are being written"
            self.unsynced.add(offset_bytes)
        super().pwrite(offset_bytes, data)

    def sync(self) -> None:
        """See `Store.sync`."""
        self.count += 1
        if self.count == self.at:
            raise KeyboardInterrupt
        super().sync()
        self.unsynced.clear()


def test_an_interrupted_sync_of_a_header_leaves_the_other_slot_alone() -> None:
    """INV-HEADER-PAIR: the other slot waits for a sync that returned, in every way to begin and to end a session."""
    for at in itertools.count(1):
        store = HeaderStore(image(), at)
        current = current_header(store.name, read_headers(store))
        journal = Journal(store, current, (LOG, RING), SyncGuard(store))
        for needs_log in (False, True):
            with contextlib.suppress(KeyboardInterrupt):
                journal.begin(changes_disk=True, needs_log=needs_log)
            journal.begin(changes_disk=True, needs_log=needs_log)
        with contextlib.suppress(KeyboardInterrupt):
            journal.end()
        journal.end()
        if store.count < at:
            break
        assert_equal_headers(store)
    assert at > 5


class SpaceStore(MemStore):
    """A file that notes which space was reserved, and what was written over it, until a header names the log."""

    def __init__(self, store: MemStore) -> None:
        super().__init__(store.name, sectors=store.copy()._sectors, size_bytes=store.size())
        self.reserved: list[tuple[int, int]] = []
        self.zeroed: list[tuple[int, int]] = []

    def reserve(self, offset_bytes: int, size_bytes: int) -> None:
        """See `Store.reserve`."""
        self.reserved.append((offset_bytes, size_bytes))
        super().reserve(offset_bytes, size_bytes)

    def pwrite(self, offset_bytes: int, data: Buffer) -> None:
        """See `Store.pwrite`."""
        if not any(data):
            assert any(start == offset_bytes and len(data) <= size for start, size in self.reserved)
            self.zeroed.append((offset_bytes, len(data)))
        super().pwrite(offset_bytes, data)


@pytest.mark.parametrize("ahead", [RING // 2, MIB])
def test_the_space_of_a_log_in_a_hole_is_written_before_the_first_entry(
    monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    """All of a log in a hole is reserved, and what a session uses soon is written, so that the sync of an entry need
    not wait for the file system's own journal. A part that holds data is left alone."""
    monkeypatch.setattr(journal_module, "_WRITTEN_AHEAD", ahead)
    store = SpaceStore(image())
    old = b"old" * 171
    store.pwrite(LOG + SECTOR, old)
    journal = Journal(store, current_header(store.name, read_headers(store)), (LOG, RING), SyncGuard(store))
    journal.begin(changes_disk=True)
    assert store.pread(LOG + SECTOR, len(old)) == old
    holes = [(LOG, SECTOR), (LOG + SECTOR + KIB, RING - SECTOR - KIB)]
    assert store.reserved == holes
    end = LOG + min(ahead, RING)
    assert store.zeroed == [(start, min(size, end - start)) for start, size in holes if start < end]
