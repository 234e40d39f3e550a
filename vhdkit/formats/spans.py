# SPDX-License-Identifier: Apache-2.0
"""Arithmetic with ranges: what several of them share, and how much of one others cover.

Decides nothing about images. A repair uses it to find what blocks and structures share; the unit (bytes or sectors) is
the caller's.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from vhdkit.formats.bits import runs
from vhdkit.formats.format import ByteRange

Spans = NDArray[np.int64]  # (start, end), disjoint, in order
Places = NDArray[np.int64]  # one number for each range


def covered(starts: Places, ends: Places, times: int) -> Spans:
    """The spans that at least so many of the ranges cover."""
    if not len(starts):
        return np.zeros((0, 2), dtype=np.int64)
    edges = np.concatenate([starts, ends])
    steps = np.concatenate([np.ones(len(starts), dtype=np.int64), -np.ones(len(ends), dtype=np.int64)])
    order = np.argsort(edges, kind="stable")
    edges, depth = edges[order], np.cumsum(steps[order])
    last = np.append(edges[1:] != edges[:-1], True)  # of several edges in one place, the last one counts
    edges, enough = edges[last], depth[last] >= times
    turns = np.flatnonzero(np.diff(np.concatenate([[False], enough, [False]]).astype(np.int8)))
    spans: Spans = edges[turns.reshape(-1, 2)] if len(turns) else np.zeros((0, 2), dtype=np.int64)
    return spans


def touches(spans: Spans, starts: Places, ends: Places) -> NDArray[np.bool_]:
    """For each range, whether it shares anything with one of the spans."""
    if not len(spans):
        return np.zeros(len(starts), dtype=np.bool_)
    after = np.searchsorted(spans[:, 1], starts, side="right")  # the first span that ends after the start
    inside = after < len(spans)
    touched: NDArray[np.bool_] = inside & (spans[np.minimum(after, len(spans) - 1), 0] < ends)
    return touched


def within(spans: Spans, start: int, end: int) -> Spans:
    """The parts of the spans in [start, end)."""
    low = int(np.searchsorted(spans[:, 1], start, side="right"))
    high = int(np.searchsorted(spans[:, 0], end, side="left"))
    return np.clip(spans[low:high], start, end) if low < high else spans[:0]


def lengths(spans: Spans, starts: Places, ends: Places) -> Places:
    """For each range, how much of it is in the spans."""
    if not len(spans):
        return np.zeros(len(starts), dtype=np.int64)
    total = np.concatenate([[0], np.cumsum(spans[:, 1] - spans[:, 0])])

    def before(places: Places) -> Places:
        whole = np.searchsorted(spans[:, 1], places, side="right")  # spans that end at or before the place
        inside = np.minimum(whole, len(spans) - 1)
        part = np.where(whole < len(spans), np.maximum(places - spans[inside, 0], 0), 0)
        counted: Places = total[whole] + part
        return counted

    return before(ends) - before(starts)


def of_blocks(chosen: NDArray[np.bool_], block_size_bytes: int, size_bytes: int) -> list[ByteRange]:
    """The chosen blocks of a disk of this size as ranges of it, neighbours joined."""
    found = []
    for first, count, is_chosen in runs(chosen) if len(chosen) else ():
        if is_chosen:
            start, end = first * block_size_bytes, min((first + count) * block_size_bytes, size_bytes)
            found.append(ByteRange(start, end - start))
    return found


def joined(ranges: list[ByteRange]) -> list[ByteRange]:
    """The ranges in order, with adjacent and overlapping ranges joined."""
    return list(_join(sorted(one for one in ranges if one.size_bytes)))


def _join(ranges: list[ByteRange]) -> Iterator[ByteRange]:
    start = end = -1
    for offset, size in ranges:
        if offset > end:
            if end > start >= 0:
                yield ByteRange(start, end - start)
            start, end = offset, offset
        end = max(end, offset + size)
    if end > start >= 0:
        yield ByteRange(start, end - start)
