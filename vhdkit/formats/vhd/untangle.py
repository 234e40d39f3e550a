# SPDX-License-Identifier: Apache-2.0
"""Separates blocks that overlap each other, or headers, in a draft of the image.

Decides which of them move, and which sectors of the disk are doubtful afterwards. Must not know footers, consent or
how a draft reaches the file (`repair`).

- `INV-UNTANGLED`: afterwards each block reads as it did when the damage was ignored. Only what two structures shared
  may be wrong, and it is reported as doubtful. Content that lay over headers is not the guest's and is dropped.
- Of overlapping blocks, as many as possible stay where they are; the others are copied to the end of the file.
- A bitmap in a shared sector may be a neighbour's data. In a dynamic disk all sectors of that block become owned,
  since its bits can only hide zeros. In a differencing image its bits are kept, and sectors that hold data are owned.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vhdkit.formats.bits import runs
from vhdkit.formats.draft import DraftStore
from vhdkit.formats.format import ByteRange
from vhdkit.formats.spans import covered, joined, lengths, touches, within
from vhdkit.formats.vhd import bitmap
from vhdkit.formats.vhd.bat import Bat
from vhdkit.formats.vhd.entries import used_sizes
from vhdkit.formats.vhd.metadata import Metadata
from vhdkit.store import ReadStore
from vhdkit.units import MIB, PAGE_SIZE, SECTOR_SIZE, covering_sectors, round_up, sectors_to_bytes, whole_sectors

MAX_MOVED_BYTES = 20 * MIB  # of data, which an undo log holds beside the largest BAT
MAX_MOVED_BLOCKS = 4096


@dataclass(slots=True)
class Untangling:
    """The blocks to move, and those to drop because nothing of them lies outside headers and other blocks.

    `lost`, of the blocks that move, and `doubtful` are ranges of the disk.
    """

    moved: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    lost: list[ByteRange] = field(default_factory=list)
    doubtful: list[ByteRange] = field(default_factory=list)
    cut_count: int = 0  # moved blocks that lose a part
    too_much: bool = False  # more would move than one change of the file can hold: nothing is planned


class Tangle:
    """The allocated blocks of one image and what they share. All entries lie inside the file."""

    def __init__(self, store: ReadStore, metadata: Metadata, bat: Bat) -> None:
        assert metadata.header is not None
        self._store = store
        self._bat = bat
        self._is_differencing = metadata.is_differencing
        self._size = metadata.size_bytes
        self._block_size = metadata.header.block_size
        self._bitmap_size = bitmap.bitmap_size(self._block_size)
        whole, last = used_sizes(metadata)
        self._blocks = np.flatnonzero(bat.allocated())
        starts = bat.entries[self._blocks].astype(np.int64)
        lengths = np.full(len(starts), whole // SECTOR_SIZE)
        lengths[self._blocks == len(bat) - 1] = covering_sectors(last)
        order = np.lexsort((self._blocks, starts))
        self._blocks, self._starts = self._blocks[order], starts[order]
        self._ends = self._starts + lengths[order]
        places = [(offset, offset + size) for _, offset, size in metadata.forbidden_to_blocks()]
        sectors = [(start // SECTOR_SIZE, covering_sectors(end)) for start, end in places]
        edges = np.array(sectors, dtype=np.int64)
        self._headers = covered(edges[:, 0], edges[:, 1], 1)
        self._shared = covered(
            np.concatenate([self._starts, self._headers[:, 0]]), np.concatenate([self._ends, self._headers[:, 1]]), 2
        )

    def plan(self) -> Untangling:
        """What has to be done; changes nothing."""
        if not len(self._shared):
            return Untangling()
        firsts = self._starts + self._bitmap_size // SECTOR_SIZE
        over = touches(self._headers, self._starts, self._ends)
        gone = over & (lengths(self._shared, firsts, self._ends) >= self._ends - firsts)
        leaving = self._leaving(over) & ~gone
        if np.count_nonzero(leaving) > MAX_MOVED_BLOCKS:
            return Untangling(too_much=True)
        made = Untangling(moved=self._blocks[leaving].tolist(), dropped=self._blocks[gone].tolist())
        if sum(self._held(block) for block in made.moved) > MAX_MOVED_BYTES:
            return Untangling(too_much=True)
        for position in np.flatnonzero(touches(self._shared, self._starts, self._ends) & ~gone).tolist():
            self._judge(position, made)
        made.lost, made.doubtful = joined(made.lost), joined(made.doubtful)
        return made

    def _leaving(self, over: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The blocks that cannot stay: over headers, or over a block before them that stays."""
        leaving, end = over.copy(), -1
        crowded = np.append(self._starts[1:] < np.maximum.accumulate(self._ends)[:-1], False)
        crowded[1:] |= crowded[:-1].copy()  # the others share nothing with a block
        for position in np.flatnonzero(crowded & ~over).tolist():
            if self._starts[position] < end:
                leaving[position] = True
            else:
                end = int(self._ends[position])
        return leaving

    def _size_of(self, block: int) -> int:
        """Bytes of the disk in a block."""
        return min(self._block_size, self._size - block * self._block_size)

    def _data(self, position: int) -> tuple[int, int]:
        """(first sector, end) of a block's data in the file."""
        return int(self._starts[position]) + self._bitmap_size // SECTOR_SIZE, int(self._ends[position])

    def _held(self, block: int) -> int:
        start, size = self._bat.block_start(block), self._bitmap_size + self._size_of(block)
        return sum(count for _, count, may_hold_data in self._store.data_runs(start, size) if may_hold_data)

    def _judge(self, position: int, made: Untangling) -> None:
        """Note what of a block is lost, and what is doubtful."""
        block = int(self._blocks[position])
        first, end = self._data(position)
        made.cut_count += bool(len(within(self._headers, first, end)))
        for low, high in within(self._headers, first, end).tolist():
            made.lost.append(self._part(block, low - first, high - low))
        for low, high in within(self._shared, first, end).tolist():
            made.doubtful.append(self._part(block, low - first, high - low))
        if not len(within(self._shared, int(self._starts[position]), first)):
            return
        found = self._found_bits(block)
        is_whole = found[: whole_sectors(self._size_of(block))].all()
        if self._is_differencing and not is_whole:
            made.doubtful.append(ByteRange(block * self._block_size, self._size_of(block)))
        elif not is_whole:
            for number, count, is_odd in runs(self._has_data(block) & ~found):
                if is_odd:
                    made.doubtful.append(self._part(block, number, count))

    def _part(self, block: int, first: int, count: int) -> ByteRange:
        """`count` sectors of a block, as far as they are inside the disk."""
        start, size_bytes = sectors_to_bytes(first), sectors_to_bytes(count)
        return ByteRange(block * self._block_size + start, max(min(size_bytes, self._size_of(block) - start), 0))

    def _found_bits(self, block: int) -> NDArray[np.bool_]:
        """The block's bits as they are in the file."""
        raw = self._store.pread(self._bat.block_start(block), self._bitmap_size).ljust(self._bitmap_size, b"\0")
        return bitmap.owned(raw, whole_sectors(self._block_size))

    def _has_data(self, block: int) -> NDArray[np.bool_]:
        """Which sectors of the block are not zeros."""
        found = np.zeros(whole_sectors(self._block_size), dtype=np.bool_)
        start = self._bat.block_start(block) + self._bitmap_size
        for offset, size, may_hold_data in self._store.data_runs(start, round_up(self._size_of(block), SECTOR_SIZE)):
            for place in range(offset, offset + size, MIB) if may_hold_data else ():
                raw = self._store.pread(place, min(MIB, offset + size - place))
                sectors = np.frombuffer(raw.ljust(round_up(len(raw), SECTOR_SIZE), b"\0"), dtype=np.uint8)
                first = (place - start) // SECTOR_SIZE
                found[first : first + len(sectors) // SECTOR_SIZE] |= sectors.reshape(-1, SECTOR_SIZE).any(axis=1)
        return found

    def _wanted_bits(self, block: int, position: int) -> bytearray | None:
        """The bitmap that the block gets; None to keep the one in the file."""
        first, end = self._data(position)
        over = within(self._headers, first, end)
        bits = self._found_bits(block)
        if len(within(self._shared, int(self._starts[position]), first)):
            bits = bits | self._has_data(block) if self._is_differencing else np.ones_like(bits)
        elif not len(over):
            return None
        for low, high in over.tolist() if self._is_differencing else ():
            bits[low - first : high - first] = False  # the parent shows there
        bits[whole_sectors(self._size_of(block)) :] = False
        return bitmap.packed(bits, self._bitmap_size)

    def end_of(self, plan: Untangling, end_bytes: int) -> int:
        """Where the blocks of the plan end at most if they are moved after `end_bytes`."""
        return end_bytes + len(plan.moved) * (self._bitmap_size + self._block_size + PAGE_SIZE)

    def apply(self, draft: DraftStore, plan: Untangling, end_bytes: int) -> int:
        """Move the blocks of the plan after `end_bytes`, entries in the BAT included; returns where they end.

        `draft` holds what this was made from, with nothing at or after `end_bytes`; the BAT in it is not written.
        """
        positions = {int(block): position for position, block in enumerate(self._blocks)} if plan.moved else {}
        bitmaps = {block: self._wanted_bits(block, positions[block]) for block in plan.moved}
        moving = set(plan.moved) | set(plan.dropped)
        for position in np.flatnonzero(touches(self._shared, self._starts, self._ends)).tolist():
            block = int(self._blocks[position])
            if block not in moving:
                bitmaps[block] = self._wanted_bits(block, position)
        places = {}
        for block in plan.moved:
            data = round_up(end_bytes + self._bitmap_size, PAGE_SIZE)
            places[block] = data - self._bitmap_size
            self._copy(draft, block, positions[block], places[block])
            end_bytes = data + self._block_size
        draft.reserve(end_bytes - 1, 1)
        for block, raw in bitmaps.items():
            if raw is not None:
                draft.pwrite(places.get(block, self._bat.block_start(block)), raw)
        for block in plan.dropped:
            self._bat.clear(block)
        for block, place in places.items():
            self._bat.set(block, place)
        return end_bytes

    def _copy(self, draft: DraftStore, block: int, position: int, place: int) -> None:
        """Copy bitmap and data as they are, without the parts that are headers."""
        start, size = self._bat.block_start(block), self._bitmap_size + self._size_of(block)
        for offset, count, may_hold_data in self._store.data_runs(start, size):
            for piece in range(offset, offset + count, MIB) if may_hold_data else ():
                raw = self._store.pread(piece, min(MIB, offset + count - piece))
                if raw.strip(b"\0"):
                    draft.pwrite(place + piece - start, raw)
        first, end = self._data(position)
        for low, high in within(self._headers, first, end).tolist():
            draft.punch(place + sectors_to_bytes(low) - start, sectors_to_bytes(high - low))
