# SPDX-License-Identifier: Apache-2.0
"""A quick test whether a BAT is certainly sound: an image of 2 TiB has a million entries.

Decides nothing of its own: True means that `entries.faults` finds nothing, False that it must be called. The test
takes a small part of the time, because it examines the table in pieces that fit into the processor's cache, and sorts
blocks only if they are out of order.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.bat import Bat, BlockState, states_of
from vhdkit.formats.vhdx.metadata import Metadata

_OFFSET = np.uint64(layout.BAT_OFFSET_MASK)
_BEYOND = 1 << 62  # no file is that long; below it, the distance of two places fits into 64 bits with a sign
_NEVER = {False: (4, 5, BlockState.PARTIALLY_PRESENT), True: (4, 5)}  # by whether there is a parent

Offsets = NDArray[np.int64]


def is_sound(metadata: Metadata, bat: Bat) -> bool:
    """Whether all entries are certainly sound. Does no I/O: the table is in memory."""
    if metadata.replay is not None:
        return False  # what the log changes has to be compared with the blocks
    shape, has_parent = metadata.shape, metadata.items.has_parent
    last = shape.block_entry(shape.block_count - 1)
    blocks: list[NDArray[np.uint64]] = []
    bitmaps: list[NDArray[np.uint64]] = []
    for start, entries in bat.parts():
        states = states_of(entries)
        first_bitmap = (shape.ratio - start) % (shape.ratio + 1)
        places = slice(first_bitmap, None, shape.ratio + 1)
        if has_parent:
            kinds, here = states[places], entries[places]
            if not ((kinds == BlockState.NOT_PRESENT) | (kinds == BlockState.FULLY_PRESENT)).all():
                return False
            bitmaps.append(here[kinds == BlockState.FULLY_PRESENT] & _OFFSET)
        states[places] = BlockState.NOT_PRESENT
        if states[max(last + 1 - start, 0) :].any():
            return False
        if any((states == one).any() for one in _NEVER[has_parent]):
            return False
        if has_parent and not _have_bitmaps(bat, start, states):
            return False
        blocks.append(entries[states >= BlockState.FULLY_PRESENT] & _OFFSET)
    if any(int(np.bitwise_or.reduce(part)) >= _BEYOND for part in (*blocks, *bitmaps)):
        return False
    found = [part.view(np.int64) for part in blocks if len(part)]
    return _are_apart(metadata, found, [start for part in bitmaps for start in part.tolist()])


def _have_bitmaps(bat: Bat, start: int, states: NDArray[np.uint8]) -> bool:
    """Whether the chunks of all blocks that are partially present have a sector bitmap."""
    is_partial = states == BlockState.PARTIALLY_PRESENT
    if not is_partial.any():
        return True
    partial = (np.flatnonzero(is_partial) + start) // (bat.shape.ratio + 1)
    first = int(partial[0])
    return all(bat.bitmap_offset(first + one) >= 0 for one in np.flatnonzero(np.bincount(partial - first)).tolist())


def _are_apart(metadata: Metadata, parts: list[Offsets], bitmaps: list[int]) -> bool:
    """Whether all blocks, given in parts, lie inside the file, apart from each other and from everything else."""
    size, end = metadata.items.block_size, min(metadata.view.size(), layout.MAX_FILE_BYTES)
    if not _in_order(parts, size):
        parts = [np.sort(np.concatenate(parts))]
        if not _in_order(parts, size):
            return False
    if parts and (int(parts[0][0]) < layout.HEADER_SECTION_SIZE or int(parts[-1][-1]) > end - size):
        return False
    others = [(start, start + length) for _, start, length in metadata.structures()]
    others += [(start, start + layout.BITMAP_BLOCK_SIZE) for start in bitmaps]
    edges = np.array(sorted(others), dtype=np.int64)
    starts, ends = np.ascontiguousarray(edges[:, 0]), np.ascontiguousarray(edges[:, 1])
    if int(starts[0]) < 0 or int(ends[-1]) > end or (starts[1:] < ends[:-1]).any():
        return False
    return all(_is_free_of(part, size, starts, ends) for part in parts)


def _in_order(parts: list[Offsets], size: int) -> bool:
    """Whether the blocks are in order and do not overlap."""
    if any(int(after[0] - before[-1]) < size for before, after in pairwise(parts)):
        return False
    return all(len(part) == 1 or int((part[1:] - part[:-1]).min()) >= size for part in parts)


def _is_free_of(part: Offsets, size: int, starts: Offsets, ends: Offsets) -> bool:
    """Whether blocks in order share nothing with these ranges, which are in order and apart."""
    low = int(np.searchsorted(ends, part[0], side="right"))
    high = int(np.searchsorted(starts, part[-1] + size))
    before = np.searchsorted(part, starts[low:high] - size, side="right")
    return bool((before == np.searchsorted(part, ends[low:high])).all())
