# SPDX-License-Identifier: Apache-2.0
"""Dynamic and differencing images: blocks found through the BAT, sectors owned according to the block's bitmap.

Decides which sectors the image owns, where they lie, and to which block a write goes. The order in which bytes
reach the device is decided in `commit`, what a writable open repairs in `mend`. Knows no parent: in a
differencing image, a sector that it does not own is ABSENT, and the chain looks further.

`INV-SECTOR-RULE`: a sector is owned if its block is allocated and its bit is set. In a dynamic disk the other
sectors are zeros (with `ignore_bitmaps` they are data, as for some other programs).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from vhdkit import errors
from vhdkit.at_once import taken
from vhdkit.errors import CorruptImage
from vhdkit.finding import Finding
from vhdkit.formats.bits import runs
from vhdkit.formats.remember import Notes
from vhdkit.formats.vhd import bitmap
from vhdkit.formats.vhd.bat import Bat, BatInFile, FewFlags
from vhdkit.formats.vhd.commit import Commit
from vhdkit.formats.vhd.entries import used_sizes
from vhdkit.formats.vhd.facts import FORMAT_NAME, facts_of
from vhdkit.formats.vhd.layout import BAT_ENTRY_SIZE
from vhdkit.formats.vhd.metadata import Metadata
from vhdkit.formats.vhd.places import block_data_end, end_of_structures, nominal_end
from vhdkit.image import Extent, ExtentKind, ImageFacts, Piece, copy_piece, merged_extents
from vhdkit.store import Store
from vhdkit.units import PAGE_SIZE, SECTOR_SIZE, sectors_to_bytes, whole_sectors

NO_END = 1 << 62  # a store offset that no file reaches


class DynamicImage:
    """See `image.Layer`."""

    format_name = FORMAT_NAME
    sector_bytes = SECTOR_SIZE

    def __init__(
        self,
        store: Store,
        metadata: Metadata,
        bat: Bat,
        *,
        writable: bool = False,
        ignore_bitmaps: bool = False,
        notes: Notes | None = None,
        room_end_bytes: int | None = None,
    ) -> None:
        """Use `open_dynamic`. `notes` and `room_end_bytes` are as for `Commit`, for a writable image."""
        assert metadata.header is not None
        self.store = store
        self.metadata = metadata
        self.bat = bat
        self.unique_id: bytes | None = metadata.footer.unique_id
        self.size_bytes = metadata.size_bytes
        self.writable = writable
        self.is_differencing = metadata.is_differencing
        self.unowned = ExtentKind.ABSENT if self.is_differencing else ExtentKind.ZERO
        self.block_size_bytes = metadata.header.block_size
        # A writable image has no truncated last block: `mend` repaired it, and new blocks come after the old end.
        self.data_end_bytes = NO_END if writable else block_data_end(metadata)
        self.findings: list[Finding] = list(metadata.findings)
        self.ignore_bitmaps = ignore_bitmaps and not self.is_differencing
        self.damage: CorruptImage | None = None  # why it cannot be written to: its blocks overlap
        self._keeps_places = False  # True: an open chain reads the blocks at their places, so none may move
        self._sectors_per_block = whole_sectors(self.block_size_bytes)
        self._bitmap_size = bitmap.bitmap_size(self.block_size_bytes)
        self._full: bytearray | FewFlags = bytearray(len(bat))  # 1: the block is known to be wholly owned
        self._noting = notes is not None
        free = max(nominal_end(metadata, bat), metadata.file_size_bytes)
        self._commit = Commit(
            store,
            bat,
            footer_raw=metadata.footer_raw,
            bitmap_size_bytes=self._bitmap_size,
            block_size_bytes=self.block_size_bytes,
            free_bytes=free if room_end_bytes is None else end_of_structures(metadata, bat),
            room_end_bytes=room_end_bytes,
            notes=notes,
        )

    @property
    def facts(self) -> ImageFacts:
        """See `Layer.facts`."""
        return facts_of(self.metadata)

    @property
    def table_bytes(self) -> int:
        """See `Layer.table_bytes`."""
        return 0 if self.writable or isinstance(self.bat, BatInFile) else len(self.bat) * (BAT_ENTRY_SIZE + 1)

    def leave_table(self) -> None:
        """See `Layer.leave_table`."""
        assert not self.writable and self.metadata.header is not None
        self.bat = BatInFile(self.store, self.metadata.header.table_offset, len(self.bat))
        self._commit.use_table(self.bat)
        self._full = FewFlags()

    # -- what lies where ----------------------------------------------------------------------------------------

    def allocated_blocks(self) -> NDArray[np.bool_]:
        """See `Layer.allocated_blocks`."""
        return self.bat.allocated()

    def zero_blocks(self) -> NDArray[np.bool_]:
        """See `Layer.zero_blocks`: zeros take space here."""
        return np.zeros(0, dtype=np.bool_)

    def block_offset(self, block_index: int) -> int:
        """See `Layer.block_offset`."""
        start = self.bat.block_start(block_index)
        return start if start < 0 else start + self._bitmap_size

    def owned_sectors(self, block_index: int) -> NDArray[np.bool_] | None:
        """See `Layer.owned_sectors`."""
        if self.ignore_bitmaps or self._full[block_index]:
            return None
        raw = self._bitmap(block_index)
        return None if self._full[block_index] else bitmap.owned(raw, self._sectors_per_block)

    def prefetch_ownership(self, block_index: int) -> None:
        """See `Layer.prefetch_ownership`: the bitmap, once it is known where it lies."""
        if self.ignore_bitmaps or self._full[block_index] or block_index in self._commit.bitmaps:
            return
        start = self.bat.known_start(block_index)
        if start is not None and start >= 0:
            self.store.prefetch(start, self._bitmap_size)

    def _bitmap(self, block_index: int) -> bytearray:
        """The bitmap of an allocated block, from memory or file. Records whether it is full."""
        with taken(self._commit.lock):
            raw = self._commit.bitmaps.get(block_index)
            if raw is None:
                stored = self.store.pread(self.bat.block_start(block_index), self._bitmap_size)
                raw = bytearray(stored.ljust(self._bitmap_size, b"\0"))
                if self.writable:
                    self._commit.bitmaps[block_index] = raw
            if bitmap.is_full(raw, self._sectors_inside(block_index)):
                self._full[block_index] = 1
        self._commit.forget_clean()
        return raw

    def extents(self, sector_index: int, sector_count: int) -> Iterator[Extent]:
        """See `Layer.extents`."""
        return merged_extents(self._extents(sector_index, sector_count))

    def _extents(self, sector_index: int, sector_count: int) -> Iterator[Extent]:
        for block, first, count in self._split(sector_index, sector_count):
            position = self._block_sector(block) + first
            offset = self.block_offset(block)
            if offset < 0:
                yield Extent(position, count, self.unowned)
                continue
            owned = self.owned_sectors(block)
            if owned is None:
                yield from self._owned_run(position, count, offset + sectors_to_bytes(first))
                continue
            for run_first, run_count, is_owned in runs(owned[first : first + count]):
                if not is_owned:
                    yield Extent(position + run_first, run_count, self.unowned)
                    continue
                yield from self._owned_run(
                    position + run_first, run_count, offset + sectors_to_bytes(first + run_first)
                )

    def _owned_run(self, sector_index: int, sector_count: int, offset: int) -> Iterator[Extent]:
        """An owned run, cut where the file's data ends: the last block may be truncated."""
        inside = min(max(0, (self.data_end_bytes - offset) // SECTOR_SIZE), sector_count)
        if inside:
            yield Extent(sector_index, inside, ExtentKind.DATA, 0, offset)
        if inside < sector_count:
            yield Extent(sector_index + inside, sector_count - inside, ExtentKind.ZERO)

    def _block_sector(self, block_index: int) -> int:
        return block_index * self._sectors_per_block

    def _sectors_inside(self, block_index: int) -> int:
        """The number of sectors of a block inside the disk, which may end within the last one."""
        return min(whole_sectors(self.size_bytes) - self._block_sector(block_index), self._sectors_per_block)

    def _split(self, sector_index: int, sector_count: int) -> Iterator[tuple[int, int, int]]:
        """The range as (block, first sector in it, count)."""
        self._assert_inside(sector_index, sector_count)
        while sector_count > 0:
            block, first = divmod(sector_index, self._sectors_per_block)
            count = min(sector_count, self._sectors_per_block - first)
            yield block, first, count
            sector_index += count
            sector_count -= count

    def _assert_inside(self, sector_index: int, sector_count: int) -> None:
        assert sector_index >= 0 and sectors_to_bytes(sector_index + sector_count) <= self.size_bytes

    # -- writing ------------------------------------------------------------------------------------------------

    def _assert_writable(self, sector_index: int, sector_count: int) -> None:
        assert self.writable
        self._assert_inside(sector_index, sector_count)

    def write(self, sector_index: int, data: memoryview) -> bool:
        """See `Layer.write`. Raises NoSpace, IoFailed, SyncFailed."""
        self._assert_writable(sector_index, whole_sectors(len(data)))
        grew, position = False, 0
        try:
            for block, first, count in self._split(sector_index, whole_sectors(len(data))):
                size = sectors_to_bytes(count)
                grew |= self._write_block(block, first, count, data[position : position + size])
                position += size
        except errors.VhdkitError:
            raise
        except BaseException:
            self._commit.guard.interrupted()
            raise
        finally:
            self._commit.change_ended()
        return grew

    def write_in_place(self, store_offset_bytes: int, data: memoryview) -> None:
        """See `Layer.write_in_place`."""
        if self._commit.guard.failure is not None:
            self._commit.guard.check()
        assert self.writable
        if not self._noting:
            self.store.pwrite(store_offset_bytes, data)
            return
        self._commit.change_begins()
        try:
            self.store.pwrite(store_offset_bytes, data)
        finally:
            self._commit.change_ended()

    def _write_block(self, block: int, first: int, count: int, data: memoryview | None) -> bool:
        """Write a run of one block, which then owns it: `data`, or zeros for None."""
        self._commit.guard.check()
        self._commit.change_begins()
        start = self.bat.block_start(block)
        if start < 0:
            self._new_block(block, first, count, data)
            return True
        offset = start + self._bitmap_size + sectors_to_bytes(first)
        if data is None:
            self.store.punch(offset, sectors_to_bytes(count))
        else:
            self.store.pwrite(offset, data)
        return False if self._full[block] else self._own(block, first, count)

    def _new_block(self, block: int, first: int, count: int, data: memoryview | None) -> None:
        within = sectors_to_bytes(first)
        fill = None if data is None else lambda offset: self.store.pwrite(offset + within, data)
        if self.is_differencing:
            raw = bytearray(self._bitmap_size)
            bitmap.set_run(raw, first, count)
        else:
            # Programs read clear bits in a dynamic disk differently, so ours has none: the rest of the block is zeros.
            raw = bitmap.full(self.block_size_bytes, self._sectors_inside(block))
        if data is not None and count == self._sectors_per_block:
            self._commit.expect_whole_block()
        self._commit.publish(block, self._commit.place_block(raw, fill), raw)
        if bitmap.is_full(raw, self._sectors_inside(block)):
            self._full[block] = 1

    def _own(self, block: int, first: int, count: int) -> bool:
        """Set bits for data that is already in the file. True when one was clear."""
        raw = self._bitmap(block)
        if self.ignore_bitmaps:
            first, count = 0, self._sectors_inside(block)  # what was read as data must stay data for every reader
        with self._commit.lock:
            grew = bitmap.set_run(raw, first, count)
            if grew:
                self._commit.bitmaps[block] = raw
                self._commit.touch(block)
                if bitmap.is_full(raw, self._sectors_inside(block)):
                    self._full[block] = 1
        if grew:
            self._commit.limit()
        return grew

    def write_zeroes(self, sector_index: int, sector_count: int) -> bool:
        """See `Layer.write_zeroes`. In a differencing image this hides the parent's data."""
        self._assert_writable(sector_index, sector_count)
        grew = False
        try:
            for block, first, count in self._split(sector_index, sector_count):
                if self.is_differencing or self.bat.block_start(block) >= 0:
                    grew |= self._write_block(block, first, count, None)
        except errors.VhdkitError:
            raise
        except BaseException:
            self._commit.guard.interrupted()
            raise
        finally:
            self._commit.change_ended()
        return grew

    def refuse_writing(self) -> None:
        """See `Layer.refuse_writing`. What was flushed is in the file."""
        self._commit.guard.refuse()

    def pin_blocks(self) -> None:
        """See `Layer.pin_blocks`."""
        self._keeps_places = True

    def copy_in(self, pieces: Sequence[Piece]) -> None:
        """See `Layer.copy_in`. A block that ends wholly owned moves to a 4 KiB boundary. Raises as `write` does."""
        self._commit.guard.check()
        block = pieces[0].sector_index // self._sectors_per_block
        self._assert_writable(pieces[0].sector_index, pieces[-1].sector_index - pieces[0].sector_index + 1)
        start = self.bat.block_start(block)
        if start < 0 and not self.is_differencing:
            pieces = [piece for piece in pieces if piece.source is not None]
            if not pieces:
                return
        self._commit.change_begins()
        try:
            owned, grew = self._owned_with(block, pieces)
            moves = self._owns_all(block, owned) and (start + self._bitmap_size) % PAGE_SIZE and not self._keeps_places
            if start >= 0 and not moves:
                self._take_in_place(block, pieces, owned, grew)
            else:
                self._take_anew(block, pieces, owned)
        except errors.VhdkitError:
            raise
        except BaseException:
            self._commit.guard.interrupted()
            raise
        finally:
            self._commit.change_ended()

    def _owned_with(self, block: int, pieces: Sequence[Piece]) -> tuple[NDArray[np.bool_], bool]:
        """Which sectors the block owns once it has the pieces, and whether they are more than now."""
        if self.bat.block_start(block) < 0:
            owned = np.full(self._sectors_per_block, not self.is_differencing)
        elif self._full[block]:
            owned = np.ones(self._sectors_per_block, dtype=np.bool_)
        else:
            owned = bitmap.owned(self._bitmap(block), self._sectors_per_block).copy()
        owned[self._sectors_inside(block) :] = False
        before = int(np.count_nonzero(owned))
        if self.ignore_bitmaps:
            owned[: self._sectors_inside(block)] = True  # what was read as data must stay data for every reader
        for piece in pieces:
            first = piece.sector_index - self._block_sector(block)
            owned[first : first + piece.sector_count] = True
        return owned, int(np.count_nonzero(owned)) > before

    def _owns_all(self, block: int, owned: NDArray[np.bool_]) -> bool:
        """True when `owned` has every sector of the block inside the disk."""
        return bool(owned[: self._sectors_inside(block)].all())

    def _take_in_place(self, block: int, pieces: Sequence[Piece], owned: NDArray[np.bool_], grew: bool) -> None:
        base = self.block_offset(block) - sectors_to_bytes(self._block_sector(block))
        for piece in pieces:
            offset = base + sectors_to_bytes(piece.sector_index)
            if piece.source is None:
                self.store.punch(offset, piece.size_bytes)
            else:
                copy_piece(piece, self.store, offset)
        if not grew:
            return
        with self._commit.lock:
            self._commit.bitmaps[block] = bitmap.packed(owned, self._bitmap_size)
            self._commit.touch(block)
            self._full[block] = self._owns_all(block, owned)
        self._commit.limit()

    def _take_anew(self, block: int, pieces: Sequence[Piece], owned: NDArray[np.bool_]) -> None:
        """Place the block after everything else with all that it owns: the pieces, and its present content."""
        first_sector, old = self._block_sector(block), self.block_offset(block)
        end_sector = min(first_sector + len(owned), whole_sectors(self.size_bytes))

        def fill(offset: int) -> None:
            for piece in pieces:
                if piece.source is not None:
                    copy_piece(piece, self.store, offset + sectors_to_bytes(piece.sector_index - first_sector))
            for first, count in _gaps(pieces, first_sector, end_sector) if old >= 0 else ():
                place = old + sectors_to_bytes(first - first_sector)
                for position, size, is_data in self.store.data_runs(place, sectors_to_bytes(count)):
                    if is_data:
                        self.store.copy_from(self.store, position, offset + position - old, size)

        start = self._commit.place_block(bitmap.packed(owned, self._bitmap_size), fill)
        vacated = None
        if old >= 0:
            whole, last = used_sizes(self.metadata)
            vacated = (old - self._bitmap_size, last if block == len(self.bat) - 1 else whole)
        self._commit.publish(block, start, None, vacated)
        self._full[block] = self._owns_all(block, owned)

    def trim(self, sector_index: int, sector_count: int) -> None:
        """See `Layer.trim`. Bits and BAT stay as they are (`INV-NO-REUSE`)."""
        assert self.writable
        self._commit.guard.check()
        try:
            for extent in self.extents(sector_index, sector_count):
                if extent.store_offset_bytes is not None:
                    self._commit.change_begins()
                    self.store.punch(extent.store_offset_bytes, sectors_to_bytes(extent.sector_count))
        finally:
            self._commit.change_ended()

    def flush_is_due(self) -> bool:
        """See `Layer.flush_is_due`."""
        return self._commit.half_full()

    def flush(self) -> None:
        """See `Layer.flush`."""
        if self.writable:
            self._commit.flush()

    def seal(self) -> None:
        """See `Layer.seal`."""
        if self.writable:
            self._commit.settle()

    def close(self) -> None:
        """See `Layer.close`."""
        try:
            if self.writable:
                self._commit.close()
        finally:
            self.store.close()


def _gaps(pieces: Sequence[Piece], first: int, end: int) -> Iterator[tuple[int, int]]:
    """(first, count) of the sectors from `first` to `end` that no piece covers."""
    for piece in pieces:
        if piece.sector_index > first:
            yield first, piece.sector_index - first
        first = piece.sector_index + piece.sector_count
    if end > first:
        yield first, end - first
