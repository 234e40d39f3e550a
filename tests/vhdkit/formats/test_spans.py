# SPDX-License-Identifier: Apache-2.0
"""Arithmetic with ranges, against one that looks at each unit."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vhdkit.formats.format import ByteRange
from vhdkit.formats.spans import covered, joined, lengths, of_blocks, touches, within

RANGES = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 10)), max_size=8)


@given(RANGES, RANGES, st.integers(1, 3))
def test_spans_are_what_units_say(ranges: list[tuple[int, int]], others: list[tuple[int, int]], times: int) -> None:
    """What several ranges share, which other ranges touch it, how much of them, and the parts of it."""
    starts = np.array([start for start, _ in ranges], dtype=np.int64)
    spans = covered(starts, starts + np.array([size for _, size in ranges], dtype=np.int64), times)
    units = {unit for unit in range(40) if sum(start <= unit < start + size for start, size in ranges) >= times}
    assert {unit for start, end in spans.tolist() for unit in range(start, end)} == units
    assert all(left[1] < right[0] for left, right in pairwise(spans.tolist()))
    low = np.array([start for start, _ in others], dtype=np.int64)
    high = low + np.array([size for _, size in others], dtype=np.int64)
    shared = [len(units & set(range(start, start + size))) for start, size in others]
    assert lengths(spans, low, high).tolist() == shared
    assert touches(spans, low, high).tolist() == [bool(count) for count in shared]
    for (start, size), count in zip(others, shared, strict=True):
        assert sum(end - begin for begin, end in within(spans, start, start + size).tolist()) == count


@given(RANGES)
def test_joined_ranges_cover_the_same(ranges: list[tuple[int, int]]) -> None:
    """In order, apart from each other."""
    found = joined([ByteRange(*one) for one in ranges])
    assert {unit for start, size in found for unit in range(start, start + size)} == {
        unit for start, size in ranges for unit in range(start, start + size)
    }
    assert all(sum(left) < right[0] for left, right in pairwise(found))


def test_blocks_end_with_the_disk() -> None:
    """Neighbours are one range, and the last block is as long as the disk."""
    chosen = np.array([True, True, False, True])
    assert of_blocks(chosen, 10, 35) == [(0, 20), (30, 5)]
    assert of_blocks(np.zeros(0, dtype=np.bool_), 10, 0) == []
