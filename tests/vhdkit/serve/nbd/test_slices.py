# SPDX-License-Identifier: Apache-2.0
"""Long commands in slices: every byte once, cut where it may be cut, and the same answer however it is sliced."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.power import open_mem
from tests.vhdkit.serve.disks import SIZE, child
from vhdkit.serve.nbd import slices
from vhdkit.serve.nbd.slices import ALLOCATION, DEPTH, Ranged, StatusRuns
from vhdkit.units import GIB, KIB, MIB


@given(offset=st.integers(0, GIB), length=st.integers(0, GIB), grain=st.sampled_from([512, MIB, 2 * MIB, 256 * MIB]))
def test_parts_of_a_range(offset: int, length: int, grain: int) -> None:
    """The parts follow one another, make up the range, and only its ends lie within a grain."""
    parts = list[tuple[int, int]]()
    work = Ranged(lambda start, size: parts.append((start, size)), offset, length, grain, b"answer")
    while (answer := work()) is None:
        pass
    assert answer == b"answer" and sum(size for _, size in parts) == length
    position = offset
    for start, size in parts:
        assert start == position and (start == offset or start % grain == 0)
        assert size <= max(slices._MOST_BYTES, grain)
        position += size


def whole(runs: StatusRuns, seconds: float) -> tuple[list[tuple[int, int]], int]:
    """What is collected in slices of that length, and their number."""
    with open_mem(SCENE.leaf, SCENE.parents) as disk:
        count = 1
        while not runs.collect(disk, seconds):
            count += 1
    return list(zip(runs.lengths, runs.flags, strict=True)), count


SCENE = child()


@pytest.fixture(autouse=True, scope="module")
def short_slices() -> Iterator[None]:
    """Look at the clock at every second extent; each slice takes at least one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "_EXTENTS_AT_ONCE", 2)
        yield


@given(
    place=st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)),
    context=st.sampled_from([ALLOCATION, DEPTH]),
    limit=st.integers(1, 40),
    extended=st.booleans(),
)
def test_slices_do_not_change_a_listing(place: tuple[int, int], context: str, limit: int, extended: bool) -> None:
    """A listing in the shortest slices is the same as in one: neighbours differ, and it stays within its range."""
    offset, length = place[0], min(place[1], SIZE - place[0])
    once, one = whole(StatusRuns(context, offset, length, extended=extended, limit=limit), 60)
    often, many = whole(StatusRuns(context, offset, length, extended=extended, limit=limit), 0)
    assert once == often and one == 1 and many >= one
    assert 0 < len(once) <= limit and 0 < sum(size for size, _ in once) <= length
    assert all(first[1] != second[1] for first, second in itertools.pairwise(once))
    assert sum(size for size, _ in once) == length or len(once) == limit


def test_a_listing_has_many_slices() -> None:
    """The disk of these tests is listed in many slices of no length."""
    assert whole(StatusRuns(DEPTH, 0, SIZE, extended=True), 0)[1] > 5


def test_runs_longer_than_the_framing() -> None:
    """A run that the compact framing cannot express is cut, and ends the listing."""
    runs = StatusRuns(DEPTH, 0, 6 * GIB, extended=False)
    assert runs._take(3 * GIB, 1) and not runs._take(2 * GIB, 1)
    assert list(runs.lengths) == [4 * GIB - 4 * KIB]
