# SPDX-License-Identifier: Apache-2.0
"""What a merge moves: for each block of the target, which run of sectors comes from which file.

Decides which layer wins (`INV-SECTOR-RULE`: the first owner from the leaf) and what must become zeros in the target.
Reads bitmaps and looks for holes; moves and changes nothing.

    sources' BATs --fold--> the blocks of the target that any source touches      (one vectorised pass per layer)
    each of those --bitmaps, holes--> pieces: sectors, and where they lie (nowhere: zeros)

Zeros are never omitted: a hole in a source hides the data of the target or its parents, and so does the end of
a source that is smaller than the leaf. Plans are made block by block, so memory use is independent of the disk's size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vhdkit.image import ZEROS_WITHOUT_SPACE, ExtentKind, Layer, Piece
from vhdkit.units import MIB, SECTOR_SIZE, covering_sectors, sectors_to_bytes, whole_sectors

_LINEAR_GRAIN_BYTES = 2 * MIB  # where no layer has blocks
_KEEP, _ZERO = 255, 254  # owner bytes besides the indexes of the sources: keep the target's own, and zeros


class Moves(Protocol):
    """What a copy into a target moves, block by block. Sizes in bytes; `units` are the indexes of the blocks."""

    @property
    def sources(self) -> tuple[Layer, ...]:
        """The layers from which data comes."""
        ...

    @property
    def unit_bytes(self) -> int:
        """The size of a block."""
        ...

    @property
    def units(self) -> NDArray[np.int64]:
        """The blocks that are examined, in order."""
        ...

    @property
    def touched_bytes(self) -> int:
        """Bytes of all these blocks: the total for progress."""
        ...

    def blocks(self) -> Iterator[list[Piece]]:
        """The pieces of each of them, block after block. Raises IoFailed."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class MergePlan:
    """The blocks that a merge examines, and the pieces that make its target read like the leaf, `sources[0]`.

    `sources` are the merged layers, leaf first; `units` are the indexes of the target's blocks that change, each of
    `unit_bytes`. Only the sources are read for the pieces, so the plan stays valid while the target is filled, and
    when it gets another size.
    """

    sources: tuple[Layer, ...]
    size_bytes: int
    unit_bytes: int
    units: NDArray[np.int64]
    _visible: tuple[int, ...]  # bytes of each source that can be seen through those above it
    _grain_bytes: int  # pieces are made for so much at once

    @property
    def touched_bytes(self) -> int:
        """Bytes of all the blocks that will be examined: the total for progress."""
        return len(self.units) * self.unit_bytes

    # -- what is in them ----------------------------------------------------------------------------------------

    def blocks(self) -> Iterator[list[Piece]]:
        """The pieces of each block of the target that changes, block after block. Raises IoFailed."""
        return map(self.pieces_of, self.units.tolist())

    def pieces_of(self, unit: int) -> list[Piece]:
        """The pieces of one block of the target, in order; none where no source has anything. Raises IoFailed."""
        step, end = whole_sectors(self._grain_bytes), whole_sectors(self.size_bytes)
        per_unit = whole_sectors(self.unit_bytes)
        pieces: list[Piece] = []
        for first in range(unit * per_unit, min((unit + 1) * per_unit, end), step):
            pieces += self._grain_pieces(first, min(step, end - first))
        return pieces

    def _grain_pieces(self, first: int, count: int) -> list[Piece]:
        """The pieces of one grain: from one source alone if no other matters there, the usual case."""
        layer = self._sole_owner(first, count)
        return self._mixed_pieces(first, count) if layer is None else list(_pieces_of(layer, first, count))

    def _sole_owner(self, first: int, count: int) -> Layer | None:
        """The only source with anything in the grain, or the first one, if that owns all of it. None is always safe:
        then the sources are looked at sector by sector.
        """
        sole = None
        for layer, visible in zip(self.sources, self._visible, strict=True):
            if not layer.block_size_bytes or visible < sectors_to_bytes(first + count):
                return None
            block = first // whole_sectors(layer.block_size_bytes)
            offset = layer.block_offset(block)
            if offset >= 0 and sole is None:
                sole = layer
                if len(self.sources) > 1 and layer.owned_sectors(block) is None:
                    return sole  # what lies below is hidden
            elif offset >= 0 or offset == ZEROS_WITHOUT_SPACE:
                return None
        return sole

    def _mixed_pieces(self, first: int, count: int) -> list[Piece]:
        owners = np.full(count, _KEEP, dtype=np.uint8)
        undecided = np.ones(count, dtype=np.bool_)
        bases: dict[int, int] = {}
        for index, layer in enumerate(self.sources):
            seen = max(whole_sectors(self._visible[index]) - first, 0)
            if seen < count:
                owners[seen:][undecided[seen:]] = _ZERO
                undecided[seen:] = False
            offset, owned = _owned_by(layer, first, count)
            if offset == ZEROS_WITHOUT_SPACE:
                owners[undecided] = _ZERO
                break
            if offset < 0:
                continue
            taken = undecided if owned is None else undecided & owned
            bases[index] = offset
            owners[taken] = index
            for start, stop in _holes(layer, offset, count):
                owners[start:stop][taken[start:stop]] = _ZERO
            undecided = undecided & ~taken
            if not undecided.any():
                break
        return list(self._runs(owners, first, bases))

    def _runs(self, owners: NDArray[np.uint8], first: int, bases: dict[int, int]) -> Iterator[Piece]:
        edges = (np.flatnonzero(owners[1:] != owners[:-1]) + 1).tolist()
        starts, ends = [0, *edges], [*edges, len(owners)]
        for start, stop, owner in zip(starts, ends, owners[starts].tolist(), strict=True):
            if owner == _ZERO:
                yield Piece(first + start, stop - start)
            elif owner != _KEEP:
                place, layer = bases[owner] + sectors_to_bytes(start), self.sources[owner]
                short = 0
                if not layer.block_size_bytes:
                    short = max(place + sectors_to_bytes(stop - start) - layer.store.size(), 0)
                yield Piece(first + start, stop - start, layer.store, place, short)


def plan_merge(
    sources: Sequence[Layer],
    target: Layer,
    *,
    below_bytes: int = 0,
    fresh: bool = False,
    seen_bytes: int | None = None,
) -> MergePlan:
    """The plan for merging `sources`, leaf first, into `target`. Reads tables and looks for holes.

    `below_bytes` is how much of the disk can be seen through the target's parents. A `fresh` target is an empty image
    that reads as zeros wherever it is not written. `seen_bytes` is given if the sources are seen through the target,
    a disk of this size, instead: see `pull_plan`.
    Raises CorruptImage for a source that can be read but not written to, since its blocks overlap: a merge
    would remove it. Where the sources stay, with `fresh` and with `seen_bytes`, it is copied as it reads.
    """
    for layer in sources if not fresh and seen_bytes is None else ():
        if layer.damage is not None:
            raise layer.damage
    size = sources[0].size_bytes if seen_bytes is None else seen_bytes
    blocks = [layer.block_size_bytes for layer in sources if layer.block_size_bytes]
    grain = min(blocks, default=_LINEAR_GRAIN_BYTES)
    grain = min(grain, target.block_size_bytes or grain)
    unit = target.block_size_bytes or grain
    seen, visible = size, []
    for layer in sources:
        seen = min(seen, layer.size_bytes)
        visible.append(seen)
    touched = _touched(sources, visible, -(-size // unit), unit)
    hidden = _hidden(target, size, visible[-1], unit, below_bytes, fresh)
    units = np.flatnonzero(touched | hidden).astype(np.int64)
    return MergePlan(tuple(sources), size, unit, units, tuple(visible), grain)


def _touched(sources: Sequence[Layer], visible: Sequence[int], count: int, unit_bytes: int) -> NDArray[np.bool_]:
    """The `count` blocks of the target in which a source has space, or zeros without space."""
    touched = np.zeros(count, dtype=np.bool_)
    for layer, size in zip(sources, visible, strict=True):
        if layer.block_size_bytes:
            seen = -(-size // unit_bytes)
            owned, zeros = layer.allocated_blocks(), layer.zero_blocks()
            allocated = _by_unit(owned | zeros if len(zeros) else owned, layer.block_size_bytes, unit_bytes)[:seen]
            touched[: len(allocated)] |= allocated
        else:
            for offset, length, is_data in layer.store.data_runs(0, size):
                if is_data:
                    touched[offset // unit_bytes : -(-(offset + length) // unit_bytes)] = True
    return touched


def _hidden(
    target: Layer, size_bytes: int, visible_bytes: int, unit_bytes: int, below_bytes: int, fresh: bool
) -> NDArray[np.bool_]:
    """The blocks past the end of a source where older data would reappear."""
    count = -(-size_bytes // unit_bytes)
    hidden = np.zeros(count, dtype=np.bool_)
    first = visible_bytes // unit_bytes
    if visible_bytes == size_bytes or (fresh and target.unowned is ExtentKind.ZERO):
        return hidden
    if not target.block_size_bytes:
        hidden[first:] = True
        return hidden
    allocated = target.allocated_blocks()[:count]
    hidden[: len(allocated)] = allocated
    if target.unowned is ExtentKind.ABSENT:
        hidden[: -(-min(below_bytes, size_bytes) // unit_bytes)] = True
    hidden[:first] = False
    return hidden


def _by_unit(blocks: NDArray[np.bool_], block_bytes: int, unit_bytes: int) -> NDArray[np.bool_]:
    """One boolean per unit from one per block: does any of it have space?"""
    if block_bytes >= unit_bytes:
        return np.repeat(blocks, block_bytes // unit_bytes)
    ratio = unit_bytes // block_bytes
    padded = np.zeros(-(-len(blocks) // ratio) * ratio, dtype=np.bool_)
    padded[: len(blocks)] = blocks
    return np.asarray(padded.reshape(-1, ratio).any(axis=1))


def _owned_by(layer: Layer, first: int, count: int) -> tuple[int, NDArray[np.bool_] | None]:
    """Where these sectors lie in the layer's file (or as `Layer.block_offset`), and which it owns (None: all)."""
    if not layer.block_size_bytes:
        return sectors_to_bytes(first), None
    block, within = divmod(first, whole_sectors(layer.block_size_bytes))
    if sectors_to_bytes(first) >= layer.size_bytes:
        return -1, None
    if (offset := layer.block_offset(block)) < 0:
        return offset, None
    owned = layer.owned_sectors(block)
    return offset + sectors_to_bytes(within), None if owned is None else owned[within : within + count]


def _pieces_of(layer: Layer, first: int, count: int) -> Iterator[Piece]:
    """The pieces of a grain in which the layer has space, and no other source has anything."""
    offset, owned = _owned_by(layer, first, count)
    runs = [(0, count)]
    if owned is not None:
        edges = (np.flatnonzero(owned[1:] != owned[:-1]) + 1).tolist()
        bounds = [0, *edges, count] if owned[0] else [*edges, count]
        runs = list(zip(bounds[::2], bounds[1::2], strict=False))  # the last one may lack its partner
    if not runs:
        return
    begin, end = runs[0][0], runs[-1][1]
    holes = [(begin + start, begin + stop) for start, stop in
             _holes(layer, offset + sectors_to_bytes(begin), end - begin)]  # fmt: skip
    for start, stop, is_zero in _cut(runs, holes):
        if is_zero:
            yield Piece(first + start, stop - start)
        else:
            yield Piece(first + start, stop - start, layer.store, offset + sectors_to_bytes(start))


def _cut(runs: Sequence[tuple[int, int]], holes: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, bool]]:
    """The runs, which do not touch each other, as the longest possible parts (from, to, is it in a hole), in order."""
    number = 0
    for start, stop in runs:
        while start < stop:
            while number < len(holes) and holes[number][1] <= start:
                number += 1
            if number == len(holes) or holes[number][0] >= stop:
                yield start, stop, False
                break
            hole, end = holes[number]
            if hole > start:
                yield start, hole, False
            following = number + 1
            while following < len(holes) and holes[following][0] == end:  # one that begins where this one ends
                end, following = holes[following][1], following + 1
            yield max(start, hole), min(end, stop), True
            start = min(end, stop)


def _holes(layer: Layer, offset_bytes: int, count: int) -> Iterator[tuple[int, int]]:
    """Sectors (from, to) of this part of the file that are zeros because they were never written."""
    stored = min(sectors_to_bytes(max(layer.data_end_bytes - offset_bytes, 0) // SECTOR_SIZE), sectors_to_bytes(count))
    position = 0
    for offset, size, is_data in layer.store.data_runs(offset_bytes, stored):
        # A sector with any data in it is data.
        stop_bytes = offset + size - offset_bytes
        stop = covering_sectors(stop_bytes) if is_data else stop_bytes // SECTOR_SIZE
        if not is_data and stop > position:
            yield position, stop
        position = max(position, stop)
    if position < count:  # the file, or its data, ends before the block does
        yield position, count
