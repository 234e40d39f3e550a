# SPDX-License-Identifier: Apache-2.0
"""The open image: blocks found through the BAT, sectors owned according to the block's state and bits.

Decides which sectors the image owns, where they lie, and which state a block gets. The order in which bytes reach the
device is decided in `commit`. Knows nothing of a parent: in a differencing image a sector that it does not own is
ABSENT, and the chain looks further.

`INV-SECTOR-RULE`: all sectors of a fully present block are owned; of a partially present block, those whose bits are
set. In a differencing image a block in the state UNDEFINED, ZERO or UNMAPPED is owned as a whole: zeros that take no
space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from vhdkit.errors import CorruptImage
from vhdkit.finding import Finding
from vhdkit.formats.bits import runs
from vhdkit.formats.vhdx import bitmap, layout
from vhdkit.formats.vhdx.bat import Bat, BatInFile, BlockState, offset_of, state_of
from vhdkit.formats.vhdx.commit import Commit
from vhdkit.formats.vhdx.entries import reserved_bits
from vhdkit.formats.vhdx.facts import facts_of
from vhdkit.formats.vhdx.header import exhausted
from vhdkit.formats.vhdx.identify import FORMAT_NAME
from vhdkit.formats.vhdx.metadata import Metadata
from vhdkit.image import ZEROS_WITHOUT_SPACE, Extent, ExtentKind, ImageFacts, Piece, copy_piece, merged_extents
from vhdkit.store import Store
from vhdkit.units import PAGE_SIZE, round_down, sectors_to_bytes, whole_sectors

NO_END = 1 << 62  # a store offset no file reaches
NO_SPACE = -1
_FULL, _PARTIAL = BlockState.FULLY_PRESENT, BlockState.PARTIALLY_PRESENT  # quicker to look up than the class
Runs = Sequence[tuple[int, int]]  # (first sector of a block, sectors)
ZERO_STATES = (BlockState.UNDEFINED, BlockState.ZERO, BlockState.UNMAPPED)


class VhdxImage:
    """See `image.Layer`."""

    format_name = FORMAT_NAME
    ignore_bitmaps = False
    data_end_bytes = NO_END  # a truncated last block lacks only bytes past the end of the disk

    def __init__(self, store: Store, metadata: Metadata, bat: Bat, commit: Commit | None = None) -> None:
        """Use `open_vhdx`. `commit` collects what an image open for writing must still write; None for reading."""
        self.store = store
        self.metadata = metadata
        self.bat = bat
        self.writable = commit is not None
        self._commit = commit
        self.size_bytes = metadata.items.size_bytes
        self.sector_bytes = metadata.items.logical_sector_bytes
        self.block_size_bytes = metadata.items.block_size
        self.is_differencing = metadata.items.has_parent
        self.unowned = ExtentKind.ABSENT if self.is_differencing else ExtentKind.ZERO
        self.findings: list[Finding] = list(metadata.findings)
        self.damage: CorruptImage | None = exhausted(store.name, metadata.current) or reserved_bits(metadata, bat)
        self._sectors_per_block = whole_sectors(self.block_size_bytes)
        self._bytes_of_bits = bitmap.bytes_per_block(self.block_size_bytes, self.sector_bytes)
        full = np.zeros(bat.shape.block_count if self.writable else 0, dtype=np.uint8)  # no memory for what stays 0
        self._full = memoryview(full)  # type: ignore[arg-type]  # 1: partial, all bits set

    @property
    def unique_id(self) -> bytes | None:
        """See `Layer.unique_id`: the DataWriteGuid, which changes when the disk is written to."""
        return (self.metadata.header if self._commit is None else self._commit.header).data_write_guid

    @property
    def commit(self) -> Commit:
        """Through which the structures are changed. The image must be open for writing."""
        assert self._commit is not None
        return self._commit

    @property
    def renewed_id(self) -> bytes | None:
        """See `Format.renewed_id`."""
        return None if self._commit is None else self._commit.renewed_id

    def set_renewed_id(self, data_write_guid: bytes) -> None:
        """See `Format.set_renewed_id`."""
        assert self._commit is not None
        self._commit.set_renewed_id(data_write_guid)

    @property
    def facts(self) -> ImageFacts:
        """See `Layer.facts`."""
        return facts_of(self.metadata)

    @property
    def table_bytes(self) -> int:
        """See `Layer.table_bytes`."""
        return 0 if isinstance(self.bat, BatInFile) else self.bat.memory_bytes

    def leave_table(self) -> None:
        """See `Layer.leave_table`."""
        self.bat = BatInFile(self.metadata.view, self.bat)

    # -- what lies where --------------------------------------------------------------------------------------------

    def allocated_blocks(self) -> NDArray[np.bool_]:
        """See `Layer.allocated_blocks`."""
        return self.bat.in_states(BlockState.FULLY_PRESENT, BlockState.PARTIALLY_PRESENT)

    def zero_blocks(self) -> NDArray[np.bool_]:
        """See `Layer.zero_blocks`."""
        return self.bat.in_states(*ZERO_STATES) if self.is_differencing else np.zeros(0, dtype=np.bool_)

    def block_offset(self, block_index: int) -> int:
        """See `Layer.block_offset`."""
        entry = self.bat.block(block_index)
        state = state_of(entry)
        if state >= BlockState.FULLY_PRESENT:
            return offset_of(entry)
        return ZEROS_WITHOUT_SPACE if state and self.is_differencing else NO_SPACE

    def owned_sectors(self, block_index: int) -> NDArray[np.bool_] | None:
        """See `Layer.owned_sectors`."""
        if state_of(self.bat.block(block_index)) != BlockState.PARTIALLY_PRESENT:
            return None
        if self.writable and self._full[block_index]:
            return None
        owned = bitmap.owned(self._bits(block_index), self.sector_bytes)
        if not owned[: self._sectors_inside(block_index)].all():
            return owned
        if self.writable:
            self._full[block_index] = 1
        return None

    def prefetch_ownership(self, block_index: int) -> None:
        """See `Layer.prefetch_ownership`: the bits of a block that is known to be partially present."""
        if self.writable and self._full[block_index]:
            return
        entry = self.bat.known_entry(self.bat.shape.block_entry(block_index))
        if entry is None or state_of(entry) != BlockState.PARTIALLY_PRESENT:
            return
        chunk, within = divmod(block_index, self.bat.shape.ratio)
        entry = self.bat.known_entry(self.bat.shape.bitmap_entry(chunk))
        if entry is not None and state_of(entry) == BlockState.FULLY_PRESENT:
            self.metadata.view.prefetch(offset_of(entry) + within * self._bytes_of_bits, self._bytes_of_bits)

    def _bits(self, block_index: int) -> bytes:
        """The bits of a block that is partially present."""
        chunk, within = divmod(block_index, self.bat.shape.ratio)
        place = self.bat.bitmap_offset(chunk) + within * self._bytes_of_bits
        return self._read_bits(place, self._bytes_of_bits)

    def _read_bits(self, place: int, size: int) -> bytes:
        if self._commit is None:
            return self.metadata.view.pread(place, size).ljust(size, b"\0")
        pages = [self._commit.bits(start, stop - start) for start, stop in _by_page(place, size)]
        self._commit.forget_clean()
        return b"".join(pages)

    def _sectors_inside(self, block_index: int) -> int:
        """How many sectors of a block belong to the disk, which may end inside its last block."""
        return min(whole_sectors(self.size_bytes) - block_index * self._sectors_per_block, self._sectors_per_block)

    def extents(self, sector_index: int, sector_count: int) -> Iterator[Extent]:
        """See `Layer.extents`."""
        return merged_extents(self._extents(sector_index, sector_count))

    def _extents(self, sector_index: int, sector_count: int) -> Iterator[Extent]:
        for block, first, count in self._split(sector_index, sector_count):
            position = block * self._sectors_per_block + first
            offset = self.block_offset(block)
            if offset < 0:
                yield Extent(position, count, self.unowned if offset == NO_SPACE else ExtentKind.ZERO)
                continue
            owned = self.owned_sectors(block)
            if owned is None:
                yield Extent(position, count, ExtentKind.DATA, 0, offset + sectors_to_bytes(first))
                continue
            for run_first, run_count, is_owned in runs(owned[first : first + count]):
                kind = ExtentKind.DATA if is_owned else self.unowned
                place = offset + sectors_to_bytes(first + run_first) if is_owned else None
                yield Extent(position + run_first, run_count, kind, 0, place)

    def _split(self, sector_index: int, sector_count: int) -> Iterator[tuple[int, int, int]]:
        """The range as (block, first sector in it, count)."""
        assert sector_index >= 0 and sectors_to_bytes(sector_index + sector_count) <= self.size_bytes
        while sector_count > 0:
            block, first = divmod(sector_index, self._sectors_per_block)
            count = min(sector_count, self._sectors_per_block - first)
            yield block, first, count
            sector_index += count
            sector_count -= count

    # -- writing ----------------------------------------------------------------------------------------------------

    def _to_write(self, sector_index: int, sector_count: int) -> Commit:
        """The `Commit` through which these sectors are changed. Raises SyncFailed after an earlier failure."""
        assert self._commit is not None
        assert sector_index >= 0 and sectors_to_bytes(sector_index + sector_count) <= self.size_bytes
        per_sector = whole_sectors(self.sector_bytes)
        assert sector_index % per_sector == 0 and sector_count % per_sector == 0
        self._commit.guard.check()
        self._commit.change_begins()
        return self._commit

    def write(self, sector_index: int, data: memoryview) -> bool:
        """See `Layer.write`. Raises NoSpace, IoFailed, SyncFailed."""
        commit = self._to_write(sector_index, whole_sectors(len(data)))
        grew, position = False, 0
        with commit.whole:
            for block, first, count in self._split(sector_index, whole_sectors(len(data))):
                size = sectors_to_bytes(count)
                grew |= self._write_block(commit, block, first, count, data[position : position + size])
                position += size
        return grew

    def write_in_place(self, store_offset_bytes: int, data: memoryview) -> None:
        """See `Layer.write_in_place`."""
        commit = self._commit
        assert commit is not None
        if commit.guard.failure is not None:
            commit.guard.check()
        if commit.has_begun and not commit.takes_notes:
            self.store.pwrite(store_offset_bytes, data)
            return
        commit.change_begins()
        try:
            self.store.pwrite(store_offset_bytes, data)
        finally:
            commit.change_ended()

    def write_zeroes(self, sector_index: int, sector_count: int) -> bool:
        """See `Layer.write_zeroes`. In a differencing image this hides the parent's data."""
        commit = self._to_write(sector_index, sector_count)
        grew = False
        with commit.whole:
            for block, first, count in self._split(sector_index, sector_count):
                grew |= self._write_block(commit, block, first, count, None)
        return grew

    def _write_block(self, commit: Commit, block: int, first: int, count: int, data: memoryview | None) -> bool:
        """Own a run of one block, holding `data`, or zeros when that is None."""
        if commit.takes_notes:
            commit.change_begins()  # again for each block, since a block may take time
        entry = self.bat.block(block)
        state = state_of(entry)
        if state < _FULL:
            return self._new_block(commit, block, first, count, data)
        offset = offset_of(entry) + sectors_to_bytes(first)
        if data is None:
            self.store.punch(offset, sectors_to_bytes(count))
        else:
            self.store.pwrite(offset, data)
        return state == _PARTIAL and not self._full[block] and self._own(commit, block, first, count)

    def _new_block(self, commit: Commit, block: int, first: int, count: int, data: memoryview | None) -> bool:
        shows_parent = self.is_differencing and state_of(self.bat.block(block)) == BlockState.NOT_PRESENT
        if data is None and not shows_parent:
            return False  # it reads as zeros
        is_whole = first == 0 and count == self._sectors_inside(block)
        if data is None and is_whole:
            with commit.changing:
                commit.point(block, BlockState.ZERO)
            commit.limit()
            return True
        fill = None if data is None else lambda offset: self.store.pwrite(offset + sectors_to_bytes(first), data)
        self._place(commit, block, [(first, count)] if shows_parent and not is_whole else None, fill)
        return True

    def _place(self, commit: Commit, block: int, owned: Runs | None, fill: Callable[[int], object] | None) -> None:
        """Give a block space that `fill` fills, and own these runs of it, or the whole block.

        All or nothing: what may fail comes before the first change in memory. Raises as `write` does.
        """
        shape, size = self.bat.shape, self.block_size_bytes
        chunk, within = divmod(block, shape.ratio)
        within *= self._bytes_of_bits
        bitmap_offset = -1 if owned is None else self.bat.bitmap_offset(chunk)
        before = layout.BITMAP_BLOCK_SIZE if owned is not None and bitmap_offset < 0 else 0  # a new sector bitmap
        commit.prepare_entry(shape.block_entry(block))
        if before:
            commit.prepare_entry(shape.bitmap_entry(chunk))
        elif owned is not None:
            commit.prepare_bits(bitmap_offset + within, self._bytes_of_bits)

        def fill_both(start: int) -> None:
            commit.prepare_bits(start + within, self._bytes_of_bits)
            if fill is not None:
                fill(start + before)

        start = commit.place(before + size, fill_both if before else fill)
        with commit.changing:
            if before:
                commit.point_bitmap(chunk, start)
            if owned is not None:
                self._put_bits(commit, block, owned)
            commit.point(block, _FULL if owned is None else _PARTIAL, start + before)
        commit.limit()

    def _own(self, commit: Commit, block: int, first: int, count: int) -> bool:
        """Set bits for data that is already in the file. Returns True if any was clear."""
        with commit.changing:
            grew = self._set_bits(commit, block, first, count)
        if grew:
            commit.limit()
        return grew

    def _place_of_bits(self, block: int) -> int:
        chunk, within = divmod(block, self.bat.shape.ratio)
        return self.bat.bitmap_offset(chunk) + within * self._bytes_of_bits

    def _put_bits(self, commit: Commit, block: int, owned: Runs) -> None:
        """Set exactly the bits of these runs (in `changing`): another program may have left others set."""
        place, raw = self._place_of_bits(block), bytearray(self._bytes_of_bits)
        per_sector = whole_sectors(self.sector_bytes)
        for first, count in owned:
            bitmap.set_run(raw, first // per_sector, count // per_sector)
        for start, end in _by_page(place, len(raw)):
            commit.put_bits(start, raw[start - place : end - place])

    def _set_bits(self, commit: Commit, block: int, first: int, count: int) -> bool:
        """Set the bits of a run of sectors (in `changing`); returns True if any was clear."""
        per_sector, base, grew = whole_sectors(self.sector_bytes), self._place_of_bits(block), False
        first, stop = first // per_sector, (first + count) // per_sector
        for start, end in _by_page(base + first // 8, -(-stop // 8) - first // 8):
            raw = commit.bits_to_change(start, end - start)
            low = max(first - (start - base) * 8, 0)
            high = min(stop - (start - base) * 8, len(raw) * 8)
            if bitmap.set_run(raw, low, high - low):
                commit.put_bits(start, raw)
                grew = True
        return grew

    def clear_bits(self, commit: Commit, block: int) -> None:
        """Clear every bit of a block (in `changing`)."""
        self._put_bits(commit, block, [])

    def copy_in(self, pieces: Sequence[Piece]) -> None:
        """See `Layer.copy_in`: in place, or into a new block. Raises as `write` does."""
        end = pieces[-1].sector_index + pieces[-1].sector_count
        commit = self._to_write(pieces[0].sector_index, end - pieces[0].sector_index)
        block, _ = divmod(pieces[0].sector_index, self._sectors_per_block)
        with commit.whole:
            if state_of(self.bat.block(block)) >= BlockState.FULLY_PRESENT:
                self._take_in_place(commit, block, pieces)
            else:
                self._take_anew(commit, block, pieces)

    def _take_in_place(self, commit: Commit, block: int, pieces: Sequence[Piece]) -> None:
        base = self.block_offset(block) - sectors_to_bytes(block * self._sectors_per_block)
        for piece in pieces:
            offset = base + sectors_to_bytes(piece.sector_index)
            if piece.source is None:
                self.store.punch(offset, piece.size_bytes)
            else:
                copy_piece(piece, self.store, offset)
        if state_of(self.bat.block(block)) == BlockState.PARTIALLY_PRESENT:
            with commit.changing:
                for piece in pieces:
                    first = piece.sector_index - block * self._sectors_per_block
                    self._set_bits(commit, block, first, piece.sector_count)
        commit.limit()

    def _take_anew(self, commit: Commit, block: int, pieces: Sequence[Piece]) -> None:
        """Allocate a block for the pieces or, if all of them are zeros, give it a state that reads as zeros."""
        first_sector = block * self._sectors_per_block
        shows_parent = self.is_differencing and state_of(self.bat.block(block)) == BlockState.NOT_PRESENT
        is_whole = sum(piece.sector_count for piece in pieces) == self._sectors_inside(block)
        if all(piece.source is None for piece in pieces) and (is_whole or not shows_parent):
            if shows_parent:
                with commit.changing:
                    commit.point(block, BlockState.ZERO)
                commit.limit()
            return

        def fill(offset: int) -> None:
            for piece in pieces:
                if piece.source is not None:
                    copy_piece(piece, self.store, offset + sectors_to_bytes(piece.sector_index - first_sector))

        owned = [(piece.sector_index - first_sector, piece.sector_count) for piece in pieces]
        self._place(commit, block, owned if shows_parent and not is_whole else None, fill)

    def trim(self, sector_index: int, sector_count: int) -> None:
        """See `Layer.trim`. Bits and BAT stay as they are (`INV-NO-REUSE`)."""
        commit = self._to_write(sector_index, sector_count)
        try:
            for extent in self.extents(sector_index, sector_count):
                if extent.store_offset_bytes is not None:
                    commit.change_begins()
                    self.store.punch(extent.store_offset_bytes, extent.size_bytes)
        finally:
            commit.change_ended()

    @property
    def max_logged_pages(self) -> int:
        """How many pages of metadata one call of `log_writes` can change."""
        assert self._commit is not None
        return self._commit.max_logged_pages

    def log_writes(self, writes: list[tuple[int, bytes]]) -> None:
        """Change these bytes of metadata, (offset, bytes), all or none of them, durable: see `Commit.write_pages`."""
        assert self._commit is not None
        self._commit.guard.check()
        self._commit.write_pages(writes)

    def refuse_writing(self) -> None:
        """See `Layer.refuse_writing`. What was flushed is in the file."""
        if self._commit is not None:
            self._commit.guard.refuse()

    def pin_blocks(self) -> None:
        """See `Layer.pin_blocks`: no block moves while the image is open."""

    def flush_is_due(self) -> bool:
        """See `Layer.flush_is_due`."""
        return self._commit is not None and self._commit.half_full()

    def flush(self) -> None:
        """See `Layer.flush`."""
        if self._commit is not None:
            self._commit.flush()

    def seal(self) -> None:
        """See `Layer.seal`: the log is empty afterwards."""
        if self._commit is not None:
            self._commit.settle()

    def finish(self) -> None:
        """Close the image and leave its file open. Raises as `flush` does."""
        if self._commit is not None:
            self._commit.close()

    def close(self) -> None:
        """See `Layer.close`."""
        try:
            self.finish()
        finally:
            self.store.close()


def _by_page(place: int, size: int) -> Iterator[tuple[int, int]]:
    """A range of bytes, split at page boundaries."""
    end = place + size
    while place < end:
        stop = min(round_down(place, PAGE_SIZE) + PAGE_SIZE, end)
        yield place, stop
        place = stop
