# SPDX-License-Identifier: Apache-2.0
"""Which parts of an image's file a merge can have changed; all others have the bytes that they had.

Decides that from what the merge moves and from where blocks lie. Must not know sums or records.

A merge changes in its target the sectors that a source owns, and structures: headers, tables, bitmaps. A block that it
touches may also get another place, or be new; then all of it counts, and so does whatever lies outside of blocks. In
an image whose parent is exchanged only structures change.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from vhdkit.backup.sums import RANGE_BYTES, joined
from vhdkit.chain.records import pending
from vhdkit.chain.verbs.merge_in_place import InPlacePlan
from vhdkit.formats.probe import open_layer
from vhdkit.image import Layer
from vhdkit.store import FileStore
from vhdkit.units import sectors_to_bytes

_MOST_GAP_BYTES = RANGE_BYTES  # between two blocks that lie next to each other: a bitmap, and the way to a page


@dataclass(frozen=True, slots=True)
class Touched:
    """What a merge writes to a disk: ascending runs of (offset, size) in bytes. `places` are where the blocks lay that
    it touches, by index, before it began; empty if that is unknown.
    """

    runs: tuple[tuple[int, int], ...] = ()
    places: Mapping[int, int] = field(default_factory=dict)


NOTHING = Touched()  # structures change, and nothing else


def touched_blocks(plan: InPlacePlan) -> Touched:
    """What the merge writes, in whole blocks: all that is known once it has begun."""
    unit = plan.moves.unit_bytes
    return Touched(tuple(joined((int(one) * unit, unit) for one in plan.moves.units)))


def touched_sectors(plan: InPlacePlan) -> Touched:
    """The same to the sector, before it begins. Reads the bitmaps of the sources."""
    target, runs = plan.target, []
    for pieces in plan.moves.blocks():
        of_block = ((sectors_to_bytes(one.sector_index), one.size_bytes) for one in pieces)
        runs += list(_coarsely(of_block))
    places = {}
    if target.block_size_bytes:
        count = len(target.allocated_blocks())
        places = {int(one): target.block_offset(int(one)) for one in plan.moves.units if one < count}
    return Touched(tuple(joined(runs)), places)


def _coarsely(runs: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Runs that lie close together as one: sums do not tell them apart, and a block has few that way."""
    begin = end = -1
    for offset, size in runs:
        if begin >= 0 and offset - end < RANGE_BYTES:
            end = max(end, offset + size)
            continue
        if begin >= 0:
            yield begin, end - begin
        begin, end = offset, offset + size
    if begin >= 0:
        yield begin, end - begin


def changed_ranges(store: FileStore, touched: Touched) -> list[tuple[int, int]]:
    """The parts of the file, as it is now, that can have changed: ascending (offset, size) in bytes."""
    layer, size = open_layer(pending.view(store)), store.size()
    if not layer.block_size_bytes:
        tail = max(size - RANGE_BYTES, 0)  # a fixed VHD has a footer there
        return joined([*touched.runs, (0, min(size, RANGE_BYTES)), (tail, size - tail)])
    changed, at = [], 0
    for begin, end in _unchanged(layer, touched):
        changed.append((at, begin - at))
        at = min(end, size)
    return joined([*changed, (at, size - at)])


def _unchanged(layer: Layer, touched: Touched) -> Iterator[tuple[int, int]]:
    """(begin, end) in the file of what stays, ascending; with the gaps between neighbours that are not touched."""
    unit, allocated = layer.block_size_bytes, layer.allocated_blocks()
    starts = [offset for offset, _ in touched.runs]
    blocks = sorted((layer.block_offset(int(one)), int(one)) for one in np.flatnonzero(allocated))
    last_end = -1  # of an untouched block
    for place, index in blocks:
        if place < 0:
            continue
        runs = list(_within(touched.runs, starts, index * unit, unit))
        if not runs:
            begin = last_end if 0 <= place - last_end <= _MOST_GAP_BYTES and last_end >= 0 else place
            yield begin, place + unit
            last_end = place + unit
            continue
        last_end = -1
        if touched.places.get(index) == place:
            at = 0
            for offset, size in runs:
                if offset > at:
                    yield place + at, place + offset
                at = offset + size
            if at < unit:
                yield place + at, place + unit


def _within(runs: tuple[tuple[int, int], ...], starts: list[int], begin: int, size: int) -> Iterator[tuple[int, int]]:
    """The runs inside a block, from its beginning."""
    first = max(bisect.bisect_right(starts, begin) - 1, 0)
    for number in range(first, len(runs)):
        offset, length = runs[number]
        if offset >= begin + size:
            break
        low, high = max(offset, begin), min(offset + length, begin + size)
        if high > low:
            yield low - begin, high - low
