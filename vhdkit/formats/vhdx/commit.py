# SPDX-License-Identifier: Apache-2.0
"""The one write order of a VHDX, and where new blocks go.

Decides which pages of metadata are dirty, what must be durable before they are logged, in which order several entries
follow each other, and where a new block is placed. Must not know virtual sectors: `blocks` says which block and which
bits.

    a write:  room for the block -> data          (page cache)            BAT entry and bits change only in memory
    a flush:  copy the dirty pages -> sync, where the table says so -> log entry -> sync -> the pages in their places

    sync before the entry?
        without a parent    no: the block lies in space that reads as zeros; a cut that keeps the entry and loses the
                            data shows zeros, which is what was there
        with a parent       yes: zeros would hide it

- `INV-DATA-BEFORE-METADATA`: whatever the log makes visible is durable, or shows what was there before.
- `INV-FLUSHED-OR-NEWER`: pages that do not fit into one entry follow in an order in which every prefix is a sound
  image: existing bitmaps, the BAT from its end to its start (the entry of a chunk's bitmap follows those of its
  blocks), and then new bitmaps, whose bits are all clear until then.
- `INV-NO-REUSE`: space in the file that one block has used is never given to another.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

from vhdkit import errors
from vhdkit.at_once import taken
from vhdkit.formats.guard import SyncGuard, WholeWrite
from vhdkit.formats.remember import FLUSH, WRITER, Notes
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.bat import ENTRIES_PER_PAGE, Bat, BlockState
from vhdkit.formats.vhdx.entries import end_of_structures
from vhdkit.formats.vhdx.journal import Journal
from vhdkit.formats.vhdx.log import SECTOR, LogChange
from vhdkit.formats.vhdx.metadata import Metadata
from vhdkit.formats.vhdx.recall import Noted, NotedBytes, note_of
from vhdkit.formats.vhdx.reserved import Reserved
from vhdkit.store import Store
from vhdkit.units import MIB, round_down, round_up

MAX_DIRTY_PAGES = 2048  # 8 MiB of metadata waiting for a flush; reaching it flushes
MAX_CACHED_PAGES = 4096  # 16 MiB of clean bitmap pages kept in memory


_NO_NOTES = contextlib.nullcontext()


@contextlib.contextmanager
def _announced(notes: Notes) -> Iterator[None]:
    notes.change_begins(FLUSH)
    try:
        yield
    finally:
        notes.change_ended(FLUSH)


class _Changing:
    """A change of one block's metadata in memory, under `Commit.lock`; in the end it is noted as a whole."""

    def __init__(self, commit: Commit) -> None:
        self._commit = commit

    def __enter__(self) -> None:
        self._commit.lock.acquire()

    def __exit__(self, *_: object) -> None:
        try:
            self._commit.put_note()
        finally:
            self._commit.lock.release()


class Commit:
    """What one open image must still write: dirty pages of the BAT and of sector bitmaps.

    One writer at a time calls the methods that place and change; `flush` may run beside it.
    """

    def __init__(
        self,
        store: Store,
        metadata: Metadata,
        bat: Bat,
        journal: Journal,
        guard: SyncGuard,
        notes: Notes | None = None,
    ) -> None:
        """`notes` take each change that is only in memory; None where that is not wanted."""
        self._store = store
        self._notes = notes
        self.takes_notes = notes is not None
        self._bat = bat
        self._has_parent = metadata.items.has_parent
        self._free_bytes = end_of_structures(metadata, bat)  # the file may end before that, inside its last block
        self.guard = guard
        self.lock = threading.Lock()  # over everything that a flush copies
        self.changing, self.whole = _Changing(self), WholeWrite(guard, self.change_ended)
        self._changed: list[NotedBytes] = []  # that are not noted yet; always empty without `lock`
        self._flush_lock = threading.Lock()  # one flush at a time
        self._journal = journal
        self._journal_lock = threading.Lock()  # a session is begun by a writer or a flush
        self._bits: dict[int, bytearray] = {}  # pages of sector bitmaps; those dirty or in flight never leave
        self._dirty_bits: set[int] = set()
        self._dirty_bat: set[int] = set()  # pages of the table, by number
        self._in_flight: tuple[set[int], set[int]] = (set(), set())
        self._fresh_bitmaps: set[int] = set()  # offsets of bitmap blocks that are not in the file's BAT yet
        self._reserved = Reserved(store)  # under `lock`, because no other metadata may be dirty or in flight
        self.has_begun = False  # a session: the headers say that the disk changes

    # -- sessions ---------------------------------------------------------------------------------------------------

    def change_begins(self) -> None:
        """Announce that a writer is about to change something that a guest can see, even if only in place."""
        if not self.has_begun:
            with self._journal_lock:
                self._journal.begin(changes_disk=True, needs_log=False)
            self.has_begun = True
        if self._notes is not None:
            self._notes.change_begins(WRITER)

    def change_ended(self) -> None:
        """Announce that a writer has changed the file, or failed to."""
        if self._notes is not None:
            self._notes.change_ended(WRITER)

    def begin(self) -> None:
        """Prepare to log pages that change what a guest sees. Raises SyncFailed, NoSpace, IoFailed."""
        with self._journal_lock:
            self._journal.begin(changes_disk=True)
        self.has_begun = True

    @property
    def renewed_id(self) -> bytes | None:
        """See `Format.renewed_id`."""
        return self._journal.renewed_id

    def set_renewed_id(self, data_write_guid: bytes) -> None:
        """See `Format.set_renewed_id`."""
        self._journal.set_renewed_id(data_write_guid)

    @property
    def header(self) -> layout.Header:
        """The current header."""
        return self._journal.header

    # -- space ------------------------------------------------------------------------------------------------------

    def place(self, size_bytes: int, fill: Callable[[int], object] | None) -> int:
        """Make room at the end of the file and have `fill` write what belongs there; returns its offset.

        Nothing points there until `point`. On failure the file is cut back to what it was. Raises NoSpace.
        """
        size_before = self._store.size()
        start = round_up(max(self._free_bytes, size_before), MIB)
        end = start + size_bytes
        if end > layout.MAX_FILE_BYTES:
            raise errors.NoSpace("a VHDX file cannot grow past 66 TiB", path=self._store.name)
        if self._notes is not None:
            self._notes.prepare()  # the slow part of a note, while nothing waits for it
        self._journal.lasting_bytes = size_before  # an entry of a flush meanwhile must not count on more
        try:
            self._store.truncate(end)
            if fill is not None:
                fill(start)
        except BaseException:  # Ctrl-C too: what was written there must not be under a later block
            self._give_back(size_before, end)
            raise
        self._free_bytes = self._journal.lasting_bytes = end
        return start

    def _give_back(self, size_before: int, end: int) -> None:
        """Undo a half-made extension; if that fails, too, the space is never used, since it may not be zeros."""
        self._reserved.forget_from(size_before)
        try:
            self._store.truncate(size_before)
        except errors.VhdkitError:
            self._free_bytes = end

    # -- what changes in memory -------------------------------------------------------------------------------------

    def point(self, block_index: int, state: BlockState, offset_bytes: int = 0) -> None:
        """Give a block this state and place, now in memory and at the next flush in the file (in `changing`)."""
        self.set_entry(self._bat.shape.block_entry(block_index), state, offset_bytes)

    def set_entry(self, entry_index: int, state: BlockState, offset_bytes: int = 0) -> None:
        """As `point`, for any entry of the BAT (in `changing`)."""
        number = entry_index // ENTRIES_PER_PAGE
        if number not in self._dirty_bat:  # a dirty page has space
            self._reserved.ensure(self._bat.offset_bytes + number * SECTOR)
        if self._notes is not None:
            before, after = (
                one.to_bytes(layout.BAT_ENTRY_SIZE, "little")
                for one in (self._bat.entry(entry_index), offset_bytes | state)
            )
            place = self._bat.offset_bytes + entry_index * layout.BAT_ENTRY_SIZE
            self._changed.append(NotedBytes(place, before, after))
        self._bat.set(entry_index, offset_bytes | state)
        self._dirty_bat.add(number)

    def put_note(self) -> None:
        """Note what was changed in memory since the last note (under `lock`): no flush has copied it yet."""
        if self._notes is not None and self._changed:
            self._notes.note(note_of(self._journal.moment, self._changed))
            self._changed.clear()

    def prepare_entry(self, entry_index: int) -> None:
        """Do what could make `set_entry` fail. Raises NoSpace, IoFailed."""
        number = entry_index // ENTRIES_PER_PAGE
        if number not in self._dirty_bat:
            with self.lock:
                self._reserved.ensure(self._bat.offset_bytes + number * SECTOR)

    def prepare_bits(self, offset_bytes: int, size_bytes: int) -> None:
        """Do what could make `put_bits` fail for these bytes. Raises NoSpace, IoFailed."""
        for page in range(offset_bytes // SECTOR * SECTOR, offset_bytes + size_bytes, SECTOR):
            if page not in self._dirty_bits:
                with self.lock:
                    self._reserved.ensure(page)
                    self._page_to_change(page)

    def point_bitmap(self, chunk_index: int, offset_bytes: int) -> None:
        """Give a chunk a sector bitmap of zeros at this place, which no flush may show before (in `changing`)."""
        self._fresh_bitmaps.add(offset_bytes)
        self.set_entry(self._bat.shape.bitmap_entry(chunk_index), BlockState.FULLY_PRESENT, offset_bytes)

    def bits(self, offset_bytes: int, size_bytes: int) -> bytes:
        """Bytes of a sector bitmap, from memory or from the file. They lie in one page."""
        with taken(self.lock):
            return bytes(self.bits_to_change(offset_bytes, size_bytes))

    def bits_to_change(self, offset_bytes: int, size_bytes: int) -> bytearray:
        """A copy of bytes of a sector bitmap, which lie in one page (under `lock`)."""
        page = round_down(offset_bytes, SECTOR)
        return self._page_to_change(page)[offset_bytes - page : offset_bytes - page + size_bytes]

    def _page_to_change(self, page: int) -> bytearray:
        kept = self._bits.get(page)
        if kept is None:
            kept = self._bits[page] = self._load(page)
        return kept

    def _load(self, page: int) -> bytearray:
        return bytearray(self._store.pread(page, SECTOR).ljust(SECTOR, b"\0"))

    def put_bits(self, offset_bytes: int, raw: bytes | bytearray) -> None:
        """Change bytes of a sector bitmap, which lie in one page (in `changing`)."""
        page = round_down(offset_bytes, SECTOR)
        kept = self._page_to_change(page)
        within = offset_bytes - page
        before = kept[within : within + len(raw)]
        if before == raw:
            return
        if page not in self._dirty_bits:
            self._reserved.ensure(page)
        if self._notes is not None:
            self._changed.append(NotedBytes(offset_bytes, bytes(before), bytes(raw)))
        kept[within : within + len(raw)] = raw
        self._dirty_bits.add(page)

    def put_noted(self, noted: Noted) -> None:
        """Change in memory what a killed process had changed there."""
        with self.lock:
            for number, entry in noted.entries.items():
                was_there = self._bat.entry(number) & layout.BAT_OFFSET_MASK
                self.set_entry(number, BlockState(entry & layout.BAT_STATE_MASK), entry & layout.BAT_OFFSET_MASK)
                if self._bat.shape.block_of(number) is None and not was_there:
                    self._fresh_bitmaps.add(entry & layout.BAT_OFFSET_MASK)
            for page, raw in noted.bits.items():
                self.put_bits(page, raw)

    # -- limits -----------------------------------------------------------------------------------------------------

    def half_full(self) -> bool:
        """Whether dirty pages have reached half of their limit, so that a flush beside the writers is worthwhile."""
        return 2 * self._dirty_count() >= MAX_DIRTY_PAGES or self._has_long_notes()

    def _has_long_notes(self) -> bool:
        return self._notes is not None and self._notes.is_long()

    def _dirty_count(self) -> int:
        return len(self._dirty_bits) + len(self._dirty_bat)

    def limit(self) -> None:
        """Flush when too much is dirty, forget bitmap pages when too many are clean. For writers."""
        if self._dirty_count() >= MAX_DIRTY_PAGES or self._has_long_notes():
            self.flush()
        self.forget_clean()

    def forget_clean(self) -> None:
        """Forget bitmap pages when too many are clean. Writes nothing, so a reader may call it."""
        if len(self._bits) > MAX_CACHED_PAGES + MAX_DIRTY_PAGES:
            with self.lock:
                keep = self._dirty_bits | self._in_flight[0]
                self._bits = {page: self._bits[page] for page in keep}

    # -- flushing ---------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Make everything written so far durable, in the named order. Raises SyncFailed, NoSpace, IoFailed.

        After NoSpace, IoFailed or Ctrl-C nothing is lost: the pages stay dirty and the next flush tries again.
        """
        with self._flush_lock, self._changing():
            with self.lock:
                self._take_back()
                self._in_flight = self._dirty_bits, self._dirty_bat
                self._dirty_bits, self._dirty_bat = set(), set()
                fresh = set(self._fresh_bitmaps)
                groups = self._copied(fresh)
                if self._notes is not None:
                    self._notes.flush_begins()
            try:
                self._write(groups)
            except BaseException:
                with self.lock:
                    self._take_back()
                raise
            with self.lock:
                self._in_flight = set(), set()
                self._fresh_bitmaps -= fresh
                if self._notes is not None:
                    self._notes.flush_ended()

    def _changing(self) -> AbstractContextManager[None]:
        """Announce to the notes, if there are any, that a flush changes the file."""
        return _NO_NOTES if self._notes is None else _announced(self._notes)

    def _goes_on(self) -> None:
        """Announce that a flush changes the file again, after a sync that may have taken long."""
        if self._notes is not None:
            self._notes.change_begins(FLUSH)

    def _take_back(self) -> None:
        """Mark dirty again what an earlier flush did not make durable (under `lock`). Repeating it is harmless."""
        self._dirty_bits |= self._in_flight[0]
        self._dirty_bat |= self._in_flight[1]
        self._in_flight = set(), set()

    def _copied(self, fresh: set[int]) -> list[LogChange]:
        """Copies of the dirty pages in the order in which they may reach the device (under `lock`)."""
        bits, table = self._in_flight
        is_new = {page: round_down(page, layout.BITMAP_BLOCK_SIZE) in fresh for page in bits}
        old = [self._page_of_bits(page) for page in sorted(bits) if not is_new[page]]
        new = [self._page_of_bits(page) for page in sorted(bits) if is_new[page]]
        return [*old, *(self._page_of_table(number) for number in sorted(table, reverse=True)), *new]

    def _page_of_bits(self, page: int) -> LogChange:
        return LogChange(page, SECTOR, bytes(self._bits[page]))

    def _page_of_table(self, number: int) -> LogChange:
        return LogChange(self._bat.offset_bytes + number * SECTOR, SECTOR, self._bat.page(number))

    def _write(self, pages: list[LogChange]) -> None:
        with self._journal_lock:
            if not pages:
                self._journal.sync()
                return
            self._journal.begin(changes_disk=False)
            if self._has_parent:
                self._journal.sync()
            for first in range(0, len(pages), self._journal.max_pages):
                group = pages[first : first + self._journal.max_pages]
                self._goes_on()
                self._journal.log(group)
                self._journal.sync()
                self._goes_on()
                self._journal.logged(group)

    @property
    def max_logged_pages(self) -> int:
        """How many pages one call of `write_pages` can change."""
        return self._journal.max_pages

    def write_pages(self, writes: list[tuple[int, bytes]]) -> None:
        """Change these bytes of metadata, (offset, bytes), as one: after an interruption all of them or none.

        Nothing else is dirty. They lie in the file, not in the BAT or in a sector bitmap. Raises as `flush` does.
        """
        pages: dict[int, bytearray] = {}
        for offset, raw in writes:
            for page in range(round_down(offset, SECTOR), offset + len(raw), SECTOR):
                kept = pages.get(page)
                if kept is None:
                    kept = pages[page] = self._load(page)
                start, stop = max(offset, page), min(offset + len(raw), page + SECTOR)
                kept[start - page : stop - page] = raw[start - offset : stop - offset]
        changed = [
            LogChange(page, SECTOR, bytes(raw)) for page, raw in sorted(pages.items()) if raw != self._load(page)
        ]
        assert not self._dirty_count() and len(changed) <= self._journal.max_pages
        for one in changed:
            self._reserved.ensure_now(one.file_offset_bytes, SECTOR)
        with self._flush_lock:
            self._write(changed)

    def write_in_order(self, pages: Iterable[LogChange]) -> None:
        """Set whole pages of metadata, durable, in an order in which every prefix is a sound image.

        Nothing else is dirty. Raises as `flush` does.
        """
        assert not self._dirty_count()
        remaining = iter(pages)
        with self._flush_lock:
            while group := list(itertools.islice(remaining, self._journal.max_pages)):
                for one in group:
                    self._reserved.ensure_now(one.file_offset_bytes, SECTOR)
                self._write(group)

    def sync(self) -> None:
        """Make the data that were written durable, without what is dirty. Raises SyncFailed."""
        with self._journal_lock:
            self._journal.sync()

    def move_log(self, offset_bytes: int) -> None:
        """Put the empty log of an image that is settled into free space. Raises SyncFailed, IoFailed."""
        with self._journal_lock:
            self._journal.move_log(offset_bytes)

    def close(self) -> None:
        """Flush, and leave a file with nothing in its log. Raises as `flush` does; see `SyncGuard.finish`."""
        try:
            self.guard.finish(self._finish)
        finally:
            if self._notes is not None:
                self._notes.leave()

    def _finish(self) -> None:
        self.settle()
        if self._notes is not None:
            self._notes.close()
            self._notes = None

    def settle(self) -> None:
        """Flush, and leave nothing in the log. Raises as `flush` does."""
        self.flush()
        with self._journal_lock:
            self._journal.settle()
            self._journal.end()
            self.has_begun = False  # the next change begins with the headers as they are then
