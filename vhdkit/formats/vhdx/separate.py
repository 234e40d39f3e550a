# SPDX-License-Identifier: Apache-2.0
"""Separating blocks of a VHDX that overlap each other or other structures, in a draft of the image.

Decides which of them move, and which parts of the disk are doubtful afterwards. Must not know about consent, the
states of entries (`repair_blocks`), or how a draft reaches the file (`repair`).

- Of overlapping blocks, as many as possible stay where they are; the others are copied to the end of the file. So each
  block reads as its entry says. What two blocks shared may be wrong in either, and is doubtful.
- The part of a block that overlaps headers, log or regions is not the guest's data, and is lost; the structures stay.
- A sector bitmap makes way for a guest's data. The blocks whose bits it may have lost are doubtful.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vhdkit.formats.draft import DraftStore
from vhdkit.formats.format import ByteRange
from vhdkit.formats.spans import covered, joined, lengths, of_blocks, touches, within
from vhdkit.formats.vhdx.bat import Bat, BlockState, offset_of
from vhdkit.formats.vhdx.entries import places
from vhdkit.formats.vhdx.metadata import Metadata
from vhdkit.units import MIB

MAX_MOVED_BYTES = 20 * MIB  # of data, which an undo log holds beside the table
MAX_MOVED_BLOCKS = 4096


@dataclass(slots=True)
class Separation:
    """The plan: the numbers of the entries whose blocks move, or are dropped.

    `lost` and `doubtful` are ranges of the disk. With `too_much`, blocks that would have moved are dropped instead.
    """

    moved: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    lost: list[ByteRange] = field(default_factory=list)
    doubtful: list[ByteRange] = field(default_factory=list)
    too_much: bool = False


class Overlaps:
    """The blocks and bitmaps of one image, all inside the file, and the ranges that they share."""

    def __init__(self, draft: DraftStore, metadata: Metadata, bat: Bat) -> None:
        self._draft = draft
        self._metadata = metadata
        self._bat = bat
        numbers, starts, sizes = places(metadata, bat)
        is_bitmap = numbers % (metadata.shape.ratio + 1) == metadata.shape.ratio
        order = np.lexsort((is_bitmap, starts))
        self._numbers, self._starts, self._is_bitmap = numbers[order], starts[order], is_bitmap[order]
        self._ends = self._starts + sizes[order]
        structures = np.array([(at, at + size) for _, at, size in metadata.structures()], dtype=np.int64)
        self._structures = covered(structures[:, 0], structures[:, 1], 1)
        self._shared = covered(
            np.concatenate([self._starts, self._structures[:, 0]]),
            np.concatenate([self._ends, self._structures[:, 1]]),
            2,
        )

    def plan(self) -> Separation:
        """Make the plan; changes nothing."""
        if not len(self._shared):
            return Separation()
        over = touches(self._structures, self._starts, self._ends)
        gone = over & (lengths(self._shared, self._starts, self._ends) >= self._ends - self._starts)
        gone |= over & self._is_bitmap
        leaving = self._leaving(over) & ~gone
        made = Separation(dropped=self._numbers[gone].tolist())
        made.too_much = (
            int(np.count_nonzero(leaving)) > MAX_MOVED_BLOCKS or self._held(np.flatnonzero(leaving)) > MAX_MOVED_BYTES
        )
        concerned = touches(self._shared, self._starts, self._ends)
        if made.too_much:
            gone |= leaving
            made.dropped = self._numbers[gone].tolist()
            made.doubtful = self._whole(concerned & ~gone)
        else:
            made.moved = self._numbers[leaving].tolist()
            for position in np.flatnonzero(concerned & ~gone & ~self._is_bitmap).tolist():
                self._judge(position, made)
            made.doubtful += self._whole(concerned & ~gone & self._is_bitmap)
        made.lost += self._whole(gone & ~self._is_bitmap)
        made.lost, made.doubtful = joined(made.lost), joined(made.doubtful)
        return made

    def _leaving(self, over: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The blocks that cannot stay: over structures, or over a block before them that stays."""
        leaving, end = over.copy(), -1
        crowded = np.append(self._starts[1:] < np.maximum.accumulate(self._ends)[:-1], False)
        crowded[1:] |= crowded[:-1].copy()  # the others overlap with no block
        for position in np.flatnonzero(crowded & ~over).tolist():
            if self._starts[position] < end:
                leaving[position] = True
            else:
                end = int(self._ends[position])
        return leaving

    def _held(self, positions: NDArray[np.intp]) -> int:
        """How many bytes of data these blocks hold; counting stops once it is too much."""
        held = 0
        for position in positions.tolist():
            start, end = int(self._starts[position]), int(self._ends[position])
            held += sum(size for _, size, may_hold in self._draft.data_runs(start, end - start) if may_hold)
            if held > MAX_MOVED_BYTES:
                break
        return held

    def _judge(self, position: int, made: Separation) -> None:
        """Add to the plan which parts of a block are lost or doubtful."""
        start, end = int(self._starts[position]), int(self._ends[position])
        block = self._metadata.shape.block_of(int(self._numbers[position]))
        assert block is not None
        first = block * self._metadata.items.block_size
        for low, high in within(self._structures, start, end).tolist():
            made.lost.append(ByteRange(first + low - start, high - low))
        for low, high in within(self._shared, start, end).tolist():
            made.doubtful.append(ByteRange(first + low - start, high - low))

    def _whole(self, chosen: NDArray[np.bool_]) -> list[ByteRange]:
        """The ranges of the disk in the chosen blocks, and in all partial blocks of chosen bitmaps."""
        shape, items = self._metadata.shape, self._metadata.items
        blocks = np.zeros(shape.block_count, dtype=np.bool_)
        chunks, inner = np.divmod(self._numbers[chosen], shape.ratio + 1)
        is_bitmap = self._is_bitmap[chosen]
        blocks[(chunks * shape.ratio + inner)[~is_bitmap]] = True
        if is_bitmap.any():
            partial = self._bat.in_states(BlockState.PARTIALLY_PRESENT)
            for chunk in chunks[is_bitmap].tolist():
                part = slice(chunk * shape.ratio, (chunk + 1) * shape.ratio)
                blocks[part] |= partial[part]
        return of_blocks(blocks, items.block_size, items.size_bytes)

    def apply(self, plan: Separation, end_bytes: int) -> int:
        """Move the blocks of the plan to `end_bytes` and after it, where nothing lies; returns where they end.

        Their entries change in the BAT in memory, which is not written here.
        """
        positions = {int(number): position for position, number in enumerate(self._numbers)} if plan.moved else {}
        for number in plan.moved:
            position = positions[number]
            self._copy(position, end_bytes)
            entry = self._bat.entry(number)
            self._bat.set(number, end_bytes | (entry & ~offset_of(entry)))
            end_bytes += MIB if self._is_bitmap[position] else self._metadata.items.block_size
        self._draft.reserve(end_bytes - 1, 1)
        for number in plan.dropped:
            self._bat.set(number, 0)
        return end_bytes

    def _copy(self, position: int, place: int) -> None:
        """Copy a block, with zeros for the parts that belong to other structures."""
        start, end = int(self._starts[position]), int(self._ends[position])
        for offset, count, may_hold_data in list(self._draft.data_runs(start, end - start)):
            for piece in range(offset, offset + count, MIB) if may_hold_data else ():
                raw = self._draft.pread(piece, min(MIB, offset + count - piece))
                if raw.strip(b"\0"):
                    self._draft.pwrite(place + piece - start, raw)
        for low, high in within(self._structures, start, end).tolist():
            if place + low - start < self._draft.size():
                self._draft.punch(place + low - start, high - low)
