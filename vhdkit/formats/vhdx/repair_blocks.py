# SPDX-License-Identifier: Apache-2.0
"""The repair of a VHDX's BAT and sector bitmaps.

Decides what an impossible entry becomes, and what is lost by that. Must not know how overlapping blocks are separated
(`separate`), nor how a draft reaches the file. Headers, log and regions have been repaired when this step begins.

- Reserved bits are cleared. Without a parent, partially present blocks become fully present, and bitmaps are removed.
- An entry in an impossible state keeps its block if nothing else claims the space. This needs consent, since the file
  does not show whether the block holds the guest's data. The block is doubtful.
- An entry with an offset outside the file is cleared, with consent: its block then reads as zeros or as the parent. If
  the file ends inside a block, the part before its end stays.
- If a sector bitmap is missing, all sectors with data are taken as the image's own, with consent.

Source: [MS-VHDX] 2.4, 2.5.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from vhdkit.formats.draft import DraftStore
from vhdkit.formats.format import ByteRange, Consent, Fix
from vhdkit.formats.spans import covered, joined, of_blocks, touches
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.bat import ENTRIES_PER_PAGE, Bat, BlockState, offset_of
from vhdkit.formats.vhdx.bitmap import bytes_per_block, packed
from vhdkit.formats.vhdx.entries import faults, places, sizes_in_file, whole_sizes
from vhdkit.formats.vhdx.metadata import Metadata
from vhdkit.formats.vhdx.repair_headers import LOSS
from vhdkit.formats.vhdx.separate import Overlaps, Separation
from vhdkit.units import MIB, format_size, round_up

_MAX_GUESSED_BLOCKS = 4096  # whose data are read to find the sectors that are the image's own
_STATE = np.uint64(layout.BAT_STATE_MASK)
_OFFSET = np.uint64(layout.BAT_OFFSET_MASK)
_RESERVED = np.uint64(layout.BAT_RESERVED_MASK)


def mend_blocks(draft: DraftStore, metadata: Metadata, consent: Consent) -> Iterator[Fix]:
    """Leave a table with which the image can be read and written. `metadata` are those of the draft."""
    mending = _Mending(draft, metadata)
    yield from mending.certain()
    yield from mending.doubtful(consent)
    mending.write()


class _Mending:
    """One repair of the table, made in memory first."""

    def __init__(self, draft: DraftStore, metadata: Metadata) -> None:
        self._draft = draft
        self._metadata = metadata
        self._shape = metadata.shape
        self._size = draft.size()
        self._bat = Bat.load(draft, metadata.regions.bat.file_offset, metadata.shape)
        parts = list(self._bat.used())
        self._numbers = np.concatenate([np.zeros(0, dtype=np.int64), *(numbers for numbers, _ in parts)])
        self._entries = np.concatenate([np.zeros(0, dtype=np.uint64), *(entries for _, entries in parts)])
        self._before = self._entries.copy()
        chunks, inner = np.divmod(self._numbers, self._shape.ratio + 1)
        self._is_bitmap = inner == self._shape.ratio
        self._blocks = chunks * self._shape.ratio + inner  # valid where `_is_bitmap` is False
        self._is_block = ~self._is_bitmap & (self._blocks < self._shape.block_count)
        self._added: list[int] = []  # entries that were 0
        self._is_cut = False  # the file ends inside a block or bitmap

    def _set(self, chosen: NDArray[np.bool_], entries: NDArray[np.uint64] | int) -> None:
        self._entries[chosen] = entries

    def _states(self) -> NDArray[np.uint64]:
        return self._entries & _STATE

    def _ranges(self, chosen: NDArray[np.bool_]) -> list[ByteRange]:
        """The chosen entries' blocks; for bitmaps, the blocks of their chunks that are partially present."""
        mask = np.zeros(self._shape.block_count, dtype=np.bool_)
        mask[self._blocks[chosen & self._is_block]] = True
        partial = self._is_block & (self._states() == BlockState.PARTIALLY_PRESENT)
        chunks = self._numbers // (self._shape.ratio + 1)
        concerned = partial & np.isin(chunks, chunks[chosen & self._is_bitmap])
        mask[self._blocks[concerned]] = True
        return of_blocks(mask, self._metadata.items.block_size, self._metadata.items.size_bytes)

    def write(self) -> None:
        """Write the pages of the table that changed into the draft."""
        changed = self._numbers[self._bat.entries_of(self._numbers) != self._before].tolist() + self._added
        for page in sorted({number // ENTRIES_PER_PAGE for number in changed}):
            offset = self._bat.offset_bytes + page * layout.LOG_PAGE_SIZE
            needed = min(layout.LOG_PAGE_SIZE, self._table_end - offset)
            self._draft.pwrite(offset, self._bat.page(page)[:needed])

    @property
    def _table_end(self) -> int:
        return self._bat.offset_bytes + self._shape.entry_count * layout.BAT_ENTRY_SIZE

    # -- what is certain ----------------------------------------------------------------------------------------------

    def certain(self) -> Iterator[Fix]:
        """Correct entries whose meaning is certain."""
        reserved = (self._entries & _RESERVED) != 0
        if reserved.any():
            stored = self._is_block & reserved & (self._states() >= BlockState.FULLY_PRESENT)
            doubtful = tuple(self._ranges(stored))
            self._set(reserved, self._entries[reserved] & ~_RESERVED)
            count = int(np.count_nonzero(reserved))
            yield Fix("bat-reserved", f"cleared reserved bits of {count} BAT entries", None, (), doubtful)
        stray = ~self._is_bitmap & ~self._is_block & (self._states() >= BlockState.FULLY_PRESENT)
        if stray.any() and any(True for _ in faults(self._metadata, self._bat)):
            self._set(stray, 0)
            count = int(np.count_nonzero(stray))
            yield Fix("bat-past-end", f"cleared {count} BAT entries of blocks past the end of the disk")
        if self._metadata.items.has_parent:
            return
        bitmaps = self._is_bitmap & (self._entries != 0)
        if bitmaps.any():
            self._set(bitmaps, 0)
            count = int(np.count_nonzero(bitmaps))
            yield Fix(
                "bitmap-unexpected",
                f"cleared the BAT entries of {count} sector bitmaps, which only differencing images have",
            )
        partial = self._is_block & (self._states() == BlockState.PARTIALLY_PRESENT)
        if partial.any():
            self._set(partial, (self._entries[partial] & ~_STATE) | np.uint64(BlockState.FULLY_PRESENT))
            message = (
                f"blocks that were partially present in an image without a parent: {int(np.count_nonzero(partial))}"
            )
            yield Fix("block-state", f"{message}; made them fully present", None, (), tuple(self._ranges(partial)))

    # -- what needs consent -------------------------------------------------------------------------------------------

    def doubtful(self, consent: Consent) -> Iterator[Fix]:
        """Correct or clear impossible entries, separate overlapping blocks, and replace missing bitmaps."""
        self._bat.put(self._numbers, self._entries)
        before = self._entries.copy()
        lost, doubtful = self._clear_impossible()
        self._bat.put(self._numbers, self._entries)
        overlaps = Overlaps(self._draft, self._metadata, self._bat)
        plan = overlaps.plan()
        missing = self._without_bitmap(plan)
        lost = joined([*lost, *plan.lost])
        needs_consent = bool(lost or doubtful or plan.too_much or len(missing))
        doubtful = joined([*doubtful, *plan.doubtful, *self._ranges_of_blocks(missing)])
        if needs_consent and not consent.data_loss:
            self._bat.put(self._numbers, before)
            shows = "their parent's content" if self._metadata.items.has_parent else "zeros"
            message = (
                f"BAT entries or sector bitmaps are impossible; after a repair, blocks would show {shows} or old data"
            )
            yield Fix("bat", message, LOSS, tuple(lost), tuple(doubtful))
            return
        if lost or plan.dropped or (self._entries != before).any():
            message = f"cleared or corrected impossible BAT entries: {format_size(_total(lost))} of the disk are lost"
            yield Fix("bat", message, None, tuple(lost), () if plan.moved or len(missing) else tuple(doubtful))
        end = self._end()
        if plan.moved or plan.dropped:
            end = overlaps.apply(plan, end)
        elif self._is_cut:
            self._draft.reserve(end - 1, 1)
            if not lost:  # a bitmap, in whose chunk no block is partially present
                message = "the file ended inside a sector bitmap of which no bit counts: extended it with zeros"
                yield Fix("block-cut", message)
        if plan.moved:
            message = f"separated {len(plan.moved)} blocks that overlapped others or structures"
            rest = () if len(missing) else tuple(doubtful)
            yield Fix("blocks-overlap", f"{message}; the parts that they shared may be wrong", None, (), rest)
        if len(missing):
            self._make_bitmaps(missing, end)
            message = (
                f"blocks without a sector bitmap: {len(missing)}; took their sectors with data as the image's own"
            )
            yield Fix("bitmap-missing", message, None, (), tuple(doubtful))

    def _clear_impossible(self) -> tuple[list[ByteRange], list[ByteRange]]:
        """Correct or clear entries with impossible states and offsets; returns (lost ranges, doubtful ranges)."""
        odd = self._odd()
        offsets = (self._entries & _OFFSET).astype(np.int64)
        needed = sizes_in_file(self._metadata, self._numbers)
        possible = (offsets >= layout.HEADER_SECTION_SIZE) & (offsets < self._size)
        claims = self._claims()
        free = self._is_free(offsets, offsets + needed, claims & possible, odd & possible)
        kept = odd & possible & free & (offsets + needed <= self._size)
        self._correct(kept)
        gone = (odd & ~kept) | (claims & ~possible)
        cut = (claims | kept) & possible & (offsets + needed > self._size)
        lost = self._ranges(gone & self._is_block) + self._cut_parts(cut & self._is_block, offsets)
        lost += self._ranges(cut & self._is_bitmap)
        doubtful = self._ranges(kept)
        self._set(gone, 0)
        self._is_cut = bool(cut.any())
        return joined(lost), joined(doubtful)

    def _odd(self) -> NDArray[np.bool_]:
        """Entries in impossible states."""
        states = self._states()
        odd = self._is_block & ((states == 4) | (states == 5))
        if self._metadata.items.has_parent:
            odd |= self._is_bitmap & (states != BlockState.NOT_PRESENT) & (states != BlockState.FULLY_PRESENT)
        return np.asarray(odd)

    def _claims(self) -> NDArray[np.bool_]:
        """Entries in a possible state that refers to space in the file."""
        states = self._states()
        bitmaps = self._is_bitmap & (states == BlockState.FULLY_PRESENT)
        return np.asarray((self._is_block & (states >= BlockState.FULLY_PRESENT)) | bitmaps)

    def _is_free(
        self,
        starts: NDArray[np.int64],
        ends: NDArray[np.int64],
        claims: NDArray[np.bool_],
        others: NDArray[np.bool_],
    ) -> NDArray[np.bool_]:
        """For each range, whether it is free of structures, of `claims`, and of all `others` except itself."""
        taken = np.array([(at, at + size) for _, at, size in self._metadata.structures()], dtype=np.int64)
        low = np.concatenate([taken[:, 0], starts[claims]])
        high = np.concatenate([taken[:, 1], ends[claims]])
        shared = covered(starts[others], ends[others], 2)
        return ~touches(covered(low, high, 1), starts, ends) & ~touches(shared, starts, ends)

    def _correct(self, kept: NDArray[np.bool_]) -> None:
        """Give entries in impossible states the most likely possible one."""
        self._set(kept, (self._entries[kept] & ~_STATE) | np.uint64(BlockState.FULLY_PRESENT))
        if not self._metadata.items.has_parent:
            return
        self._bat.put(self._numbers, self._entries)
        for place in np.flatnonzero(kept & self._is_block).tolist()[:_MAX_GUESSED_BLOCKS]:
            bits = self._place_of_bits(int(self._blocks[place]))
            if bits is not None and any(self._draft.pread(bits, self._bytes_of_bits)):
                self._entries[place] |= np.uint64(1)

    @property
    def _bytes_of_bits(self) -> int:
        items = self._metadata.items
        return bytes_per_block(items.block_size, items.logical_sector_bytes)

    def _place_of_bits(self, block: int) -> int | None:
        chunk, inner = divmod(block, self._shape.ratio)
        offset = self._bat.bitmap_offset(chunk)
        return offset + inner * self._bytes_of_bits if 0 <= offset < self._size else None

    def _cut_parts(self, cut: NDArray[np.bool_], offsets: NDArray[np.int64]) -> list[ByteRange]:
        """The ranges of the disk that are missing because the file ends inside their blocks."""
        found, items = [], self._metadata.items
        for place in np.flatnonzero(cut).tolist():
            first = int(self._blocks[place]) * items.block_size
            there = self._size - int(offsets[place])
            found.append(ByteRange(first + there, min(items.block_size, items.size_bytes - first) - there))
        return found

    # -- bitmaps that are missing -------------------------------------------------------------------------------------

    def _without_bitmap(self, plan: Separation) -> NDArray[np.int64]:
        """The partially present blocks whose chunk has no bitmap."""
        if not self._metadata.items.has_parent:
            return np.zeros(0, dtype=np.int64)
        dropped = np.isin(self._numbers, np.array(plan.dropped, dtype=np.int64))
        states, chunks = self._states(), self._numbers // (self._shape.ratio + 1)
        there = chunks[self._is_bitmap & (states == BlockState.FULLY_PRESENT) & ~dropped]
        partial = self._is_block & (states == BlockState.PARTIALLY_PRESENT) & ~dropped & ~np.isin(chunks, there)
        return np.asarray(self._blocks[partial])

    def _ranges_of_blocks(self, blocks: NDArray[np.int64]) -> list[ByteRange]:
        mask = np.zeros(self._shape.block_count, dtype=np.bool_)
        mask[blocks] = True
        return of_blocks(mask, self._metadata.items.block_size, self._metadata.items.size_bytes)

    def _make_bitmaps(self, blocks: NDArray[np.int64], end: int) -> None:
        """Make bitmaps at `end`, with bits for sectors with data. Blocks beyond the limit own all their sectors."""
        for block in blocks.tolist()[_MAX_GUESSED_BLOCKS:]:
            number = self._shape.block_entry(block)
            self._bat.set(number, offset_of(self._bat.entry(number)) | BlockState.FULLY_PRESENT)
        for block in blocks.tolist()[:_MAX_GUESSED_BLOCKS]:
            chunk, inner = divmod(block, self._shape.ratio)
            offset = self._bat.bitmap_offset(chunk)
            if offset < 0:
                offset = end
                end += layout.BITMAP_BLOCK_SIZE
                self._draft.reserve(end - 1, 1)
                number = self._shape.bitmap_entry(chunk)
                self._bat.set(number, offset | BlockState.FULLY_PRESENT)
                self._added.append(number)
            self._draft.pwrite(offset + inner * self._bytes_of_bits, packed(self._with_data(block)))

    def _with_data(self, block: int) -> NDArray[np.bool_]:
        """Which logical sectors of a block, inside the disk, are not all zeros."""
        items = self._metadata.items
        sector, place = items.logical_sector_bytes, offset_of(self._bat.block(block))
        found = np.zeros(items.block_size // sector, dtype=np.bool_)
        size = min(items.block_size, items.size_bytes - block * items.block_size)
        for offset, length, may_hold_data in self._draft.data_runs(place, size):
            first = offset - (offset - place) % sector
            for position in range(first, offset + length, MIB) if may_hold_data else ():
                raw = self._draft.pread(position, min(MIB, round_up(offset + length - position, sector)))
                whole = np.frombuffer(raw.ljust(round_up(len(raw), sector), b"\0"), dtype=np.uint8)
                start = (position - place) // sector
                part = np.asarray(whole.reshape(-1, sector).any(axis=1))[: len(found) - start]
                found[start : start + len(part)] |= part
        found[size // sector :] = False
        return found

    def _end(self) -> int:
        """The first MiB after the end of the file and of all blocks."""
        numbers, offsets, _ = places(self._metadata, self._bat)
        ends = offsets + whole_sizes(self._metadata, numbers)
        last = max([self._size, *(at + size for _, at, size in self._metadata.structures())])
        return round_up(max(last, int(ends.max()) if len(ends) else 0), MIB)


def _total(ranges: list[ByteRange]) -> int:
    return sum(size for _, size in ranges)
