# SPDX-License-Identifier: Apache-2.0
"""The write order of a dynamic or differencing image, and where new blocks go.

Decides where a new block is placed and in which order its parts reach the device. Must not know virtual sectors:
`dynamic` says which block and which bits.

    a new block:    size -> footer after it -> bitmap -> data    (page cache)   its BAT entry changes only in memory
    another write:  data                                         (page cache)   bits change only in memory
    a flush:        copy what is dirty -> sync -> bitmaps, BAT -> sync

- `INV-DATA-BEFORE-METADATA`: a bit or a BAT entry is written only after a sync that followed its data. The first
  bitmap of a block is written with its data, because nothing points there yet.
- `INV-FLUSHED-OR-NEWER`: a new block lies in space that reads as zeros, past the last trailing footer.
- `INV-FOOTER-COPY`: the trailing footer changes while the copy at offset 0 does not; the one before it stays in the
  file, in the gap between two blocks. The file first gets its new size: if the writes brought it about, a power cut
  could leave a file that ends within a block, and what a guest put there would be read as the footer.
- `INV-NO-REUSE`: no space of the file is ever given to a second block.

Footer, bitmap and data are plain writes, so that a file system that allocates late gives all of them one extent. When
the space of bitmap and footer was reserved before the data had any, each bitmap lay apart from its block: on ext4, a
full image of 1 GiB had 1,100 extents, and now has 25, and a MiB that is read from the device costs less by a quarter.

On a device the footer stays at the end, and new blocks go before it, into space that is zeroed first.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from vhdkit import errors
from vhdkit.formats.guard import SyncGuard
from vhdkit.formats.remember import FLUSH, WRITER, Notes
from vhdkit.formats.vhd.bat import Bat
from vhdkit.formats.vhd.layout import BAT_UNALLOCATED, FOOTER_SIZE
from vhdkit.formats.vhd.recall import note_of
from vhdkit.store import Store
from vhdkit.units import MIB, PAGE_SIZE, round_up, sectors_to_bytes
from vhdkit.unnamed import UnnamedStore

MAX_DIRTY_BYTES = 8 * MIB  # of bitmaps waiting for a flush; reaching it flushes
MAX_CACHED_BYTES = 16 * MIB  # of clean bitmaps kept in memory


class Commit:
    """What one open image must still write: dirty bitmaps, dirty BAT sectors, the trailing footer.

    `free_bytes` is where new space begins: past every block and past the trailing footer. `room_end_bytes` is where
    the trailing footer is on a device, see `room`; new space then lies between the two. One writer at a time
    calls `place_block`, `publish` and `touch`; `flush` may run beside it.
    """

    def __init__(
        self,
        store: Store,
        bat: Bat,
        *,
        footer_raw: bytes,
        bitmap_size_bytes: int,
        block_size_bytes: int,
        free_bytes: int,
        room_end_bytes: int | None = None,
        notes: Notes | None = None,
    ) -> None:
        self._room_end = room_end_bytes
        self._store = store
        self._notes = notes
        self._bat = bat
        self._footer_raw = footer_raw
        self._bitmap_size = bitmap_size_bytes
        self._block_size = block_size_bytes
        self._free_bytes = free_bytes
        self._footer_unsynced = False
        self.guard = SyncGuard(store)
        self.lock = threading.Lock()  # over everything a flush copies
        self._flush_lock = threading.Lock()  # one flush at a time
        self.bitmaps: dict[int, bytearray] = {}  # by block; dirty ones and those in flight are never dropped
        self._dirty: set[int] = set()
        self._vacated: list[tuple[int, int]] = []  # places of moved blocks, to be punched after the next flush
        # What a flush took of the three above, until it is durable: a flush that fails or is interrupted leaves it
        # here, and the next one marks it dirty again.
        self._in_flight: set[int] = set()
        self._table_in_flight: dict[int, bytes] = {}
        self._vacating: list[tuple[int, int]] = []
        self._has_placed = False

    def use_table(self, bat: Bat) -> None:
        """Use another `Bat` of the same table; nothing may be dirty."""
        assert not self._bat.is_dirty and not self._dirty
        self._bat = bat

    def expect_whole_block(self) -> None:
        """The next block is written whole: a new file reserves its space at once, with that of bitmap and footer."""
        if isinstance(self._store, UnnamedStore):
            start = self._next_data_offset(self._store.size()) - self._bitmap_size
            self._store.expect(start, self._bitmap_size + self._block_size + FOOTER_SIZE)

    def _next_data_offset(self, size_bytes: int) -> int:
        """Where the data of the next block goes, in a file of this size."""
        free_bytes = self._free_bytes
        if self._room_end is None:
            # Another program may have extended the file: leave what lies there alone (`INV-NO-REUSE`).
            free_bytes = max(free_bytes, size_bytes)
        return round_up(free_bytes + self._bitmap_size, PAGE_SIZE)

    def place_block(self, raw_bitmap: bytes | bytearray, fill: Callable[[int], object] | None) -> int:
        """Make room for a block, write its bitmap and have `fill` write its content; returns the offset of the bitmap.

        `fill` gets the offset of the data. Nothing points at the block until `publish`. On failure the file is cut
        back to what it was. Raises NoSpace, also where a BAT entry could not express the offset.
        """
        size_before = self._store.size()
        data_offset = self._next_data_offset(size_before)
        start, end = data_offset - self._bitmap_size, data_offset + self._block_size
        if start >= sectors_to_bytes(BAT_UNALLOCATED):
            raise errors.NoSpace("a VHD file cannot grow past 2 TiB", path=self._store.name)
        if self._room_end is not None:
            self._place_in_room(start, end, raw_bitmap, fill)
            return start
        self._has_placed = True
        if self._notes is not None:  # if we are killed before the block is noted, its space must stay unused
            self._notes.prepare()
        try:
            self._store.truncate(end + FOOTER_SIZE)
            self._store.pwrite(end, self._footer_raw)
            self._store.pwrite(start, raw_bitmap)
            if fill is not None:
                fill(data_offset)
        except BaseException:  # also Ctrl-C: a later block must not lie over what was written there
            self._give_back(size_before, end)
            raise
        self._free_bytes = end + FOOTER_SIZE
        return start

    def _place_in_room(
        self, start: int, end: int, raw_bitmap: bytes | bytearray, fill: Callable[[int], object] | None
    ) -> None:
        """As `place_block`, on a device. After an exception nothing points there: the next block takes the place."""
        assert self._room_end is not None
        if end > self._room_end:
            raise errors.NoSpace(
                f"the device has no space for another block of {self._block_size} bytes before its footer at byte"
                f" {self._room_end:#x}",
                path=self._store.name,
                hint="move the disk to a larger device or into a file: `vhdkit convert`",
            )
        if self._notes is not None:
            self._notes.prepare()
        data_offset = start + self._bitmap_size
        self._store.pwrite(start, raw_bitmap)
        self._store.punch(data_offset, self._block_size)
        if fill is not None:
            fill(data_offset)
        self._free_bytes = end

    def _give_back(self, size_before: int, end: int) -> None:
        """Undo a half-made extension; if even that fails, the space leaks, since it may not be zeros."""
        try:
            self._store.truncate(size_before)
        except errors.VhdkitError:
            self._free_bytes = end + FOOTER_SIZE

    def publish(
        self, block_index: int, start_bytes: int, bitmap: bytearray | None, vacated: tuple[int, int] | None = None
    ) -> None:
        """Make a block that was placed reachable, now in memory and with the next flush in the file.

        Its `bitmap` is the one in the file, and is kept in memory unless it is None. `vacated` is the place
        (offset, size) that the block leaves; once the BAT on the device has changed, it is punched, and never used
        again.
        """
        with self.lock:
            if bitmap is None:
                self.bitmaps.pop(block_index, None)
            else:
                self.bitmaps[block_index] = bitmap
            self._dirty.discard(block_index)
            self._in_flight.discard(block_index)
            self._note(block_index, start_bytes, bitmap)
            self._bat.set(block_index, start_bytes)
            if vacated is not None:
                self._vacated.append(vacated)
        self.limit()

    def touch(self, block_index: int) -> None:
        """The block's bitmap in `bitmaps` has changed (under `lock`)."""
        self._dirty.add(block_index)
        self._note(block_index, self._bat.block_start(block_index), self.bitmaps[block_index])

    def _note(self, block_index: int, start_bytes: int, bitmap: bytearray | None) -> None:
        """Note a change before it is made to the BAT in memory."""
        if self._notes is not None:
            before = self._bat.block_start(block_index)
            self._notes.note(note_of(block_index, start_bytes, before, self._free_bytes, bitmap or b""))

    def change_begins(self) -> None:
        """A writer is about to change the file, possibly in place."""
        if self._notes is not None:
            self._notes.change_begins(WRITER)

    def change_ended(self) -> None:
        """A writer has changed the file, or could not."""
        if self._notes is not None:
            self._notes.change_ended(WRITER)

    def half_full(self) -> bool:
        """True when half of what may wait for a flush is waiting: time for a flush beside the writers."""
        return 2 * len(self._dirty) * self._bitmap_size >= MAX_DIRTY_BYTES or self._has_long_notes()

    def _has_long_notes(self) -> bool:
        return self._notes is not None and self._notes.is_long()

    def limit(self) -> None:
        """Flush when too much is dirty, forget bitmaps when too many are clean. For writers."""
        self._limit_dirty()
        self.forget_clean()

    def forget_clean(self) -> None:
        """Forget bitmaps when too many are clean. Writes nothing, so a reader may call it."""
        if len(self.bitmaps) * self._bitmap_size > MAX_CACHED_BYTES + MAX_DIRTY_BYTES:
            with self.lock:
                keep = self._dirty | self._in_flight
                self.bitmaps = {block: self.bitmaps[block] for block in keep}

    def _limit_dirty(self) -> None:
        if len(self._dirty) * self._bitmap_size >= MAX_DIRTY_BYTES or self._has_long_notes():
            self.flush()

    def flush(self) -> None:
        """Make everything written so far durable, in the named order. Raises SyncFailed, NoSpace, IoFailed.

        After NoSpace, IoFailed or Ctrl-C nothing is lost: the metadata stays dirty and the next flush tries again.
        """
        with self._flush_lock, self._changing():
            with self.lock:
                self._take_back()
                bitmaps = {self._bat.block_start(block): bytes(self.bitmaps[block]) for block in sorted(self._dirty)}
                footer_offset = self._place_of_footer()
                fresh: set[int] = set()
                self._in_flight, self._dirty = self._dirty, fresh
                self._table_in_flight = table = self._bat.take_dirty()
                self._vacating, self._vacated = self._vacated, []
                if self._notes is not None:
                    self._notes.flush_begins()
            try:
                self._sync_data()
                if bitmaps or table:
                    self._write_metadata(bitmaps, table)
            except BaseException:
                with self.lock:
                    self._take_back()
                raise
            vacated = self._vacating
            self._in_flight, self._table_in_flight, self._vacating = set(), {}, []
            if self._notes is not None:
                with self.lock:
                    self._notes.flush_ended()
            if footer_offset is not None:
                self._write_footer(footer_offset)
            with contextlib.suppress(errors.VhdkitError):  # it only frees space: a flush does not fail because of it
                for offset, size in vacated:
                    self._store.punch(offset, size)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Announce to the notes that a flush changes the file."""
        if self._notes is None:
            yield
            return
        self._notes.change_begins(FLUSH)
        try:
            yield
        finally:
            self._notes.change_ended(FLUSH)

    def _take_back(self) -> None:
        """Mark as dirty what an earlier flush did not make durable (under `lock`). Idempotent."""
        self._dirty |= self._in_flight
        self._bat.mark_dirty(self._table_in_flight)
        self._vacating, self._vacated = [], self._vacating + self._vacated

    def _place_of_footer(self) -> int | None:
        """Where the trailing footer must be written: a block whose writing was interrupted may have covered its place.

        None if it is where it should be.
        """
        if not (self.guard.is_interrupted and self._has_placed):
            return None
        self._free_bytes = max(self._free_bytes, round_up(self._store.size(), FOOTER_SIZE))
        return self._free_bytes - FOOTER_SIZE

    def _sync_data(self) -> None:
        self.guard.sync()
        self._footer_unsynced = False

    def _write_metadata(self, bitmaps: dict[int, bytes], table: dict[int, bytes]) -> None:
        """Bitmaps and BAT may land in any order: see `INV-FLUSHED-OR-NEWER` above."""
        if self._notes is not None:
            self._notes.change_begins(FLUSH)  # again, because the sync took time
        for start_bytes, raw in bitmaps.items():
            self._store.pwrite(start_bytes, raw)
        for number, raw in table.items():
            self._store.pwrite(self._bat.sector_offset(number), raw)
        self.guard.sync()

    def _write_footer(self, footer_offset: int) -> None:
        if self._notes is not None:
            self._notes.change_begins(FLUSH)
        self._store.pwrite(footer_offset, self._footer_raw)
        self._footer_unsynced = True

    def close(self) -> None:
        """Flush, and let the trailing footer reach the device too. Raises as `flush` does; see `SyncGuard.finish`."""
        try:
            self.guard.finish(self._finish)
        finally:
            if self._notes is not None:
                self._notes.leave()

    def settle(self) -> None:
        """Flush, and leave a trailing footer that is on the device, too. Raises as `flush` does."""
        self.flush()
        if self._footer_unsynced:
            self._sync_data()

    def _finish(self) -> None:
        self.settle()
        if self._notes is not None:
            self._notes.close()
            self._notes = None
