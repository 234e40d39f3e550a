# SPDX-License-Identifier: Apache-2.0
"""Counting a map into cells."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vhdkit import Extent, ExtentKind
from vhdkit.cli.tally import UNOWNED, alike, cell_size, tally

LAYERS = 3


@given(st.lists(st.integers(-1, LAYERS - 1), min_size=1, max_size=200), st.integers(1, 40))
def test_counts_agree_with_counting_sectors(owners: list[int], max_cells: int) -> None:
    """Cells hold what a count of every single sector gives."""
    size_bytes = len(owners) * 512
    counted = tally(extents_of(owners), size_bytes, LAYERS, max_cells)
    assert counted.cell_count <= max_cells and counted.data.sum() == 512 * sum(owner >= 0 for owner in owners)
    per_cell = counted.cell_bytes // 512
    for cell in range(counted.cell_count):
        inside = owners[cell * per_cell : (cell + 1) * per_cell]
        counts = [inside.count(layer) for layer in range(LAYERS)]
        assert (counted.data[:, cell] == np.array(counts) * 512).all()
        owner = counts.index(max(counts)) if any(counts) else UNOWNED
        assert counted.owners()[cell] == owner
        assert counted.fill()[cell] == sum(counts) / len(inside)
    for layer in range(LAYERS):
        assert counted.data_bytes(layer) == owners.count(layer) * 512


def extents_of(owners: list[int]) -> list[Extent]:
    """One extent per sector; -1 means that no layer owns it."""
    return [
        Extent(index, 1, ExtentKind.ZERO if owner < 0 else ExtentKind.DATA, owner, None if owner < 0 else index * 512)
        for index, owner in enumerate(owners)
    ]


def test_zeros_of_a_layer_are_counted_separately() -> None:
    """A hole in a layer's file does not count as data, but as zeros of that layer."""
    counted = tally([Extent(0, 4, ExtentKind.ZERO, 1), Extent(4, 4, ExtentKind.DATA, 0, 0)], 4096, 2, 8)
    assert counted.zero_bytes == (0, 2048) and counted.data_bytes(0) == 2048


def test_lanes_keep_the_proportions() -> None:
    """A lane covers the whole disk, whether it has more or fewer positions than the disk has cells."""
    counted = tally(extents_of([0, 0, 0, -1, -1, -1]), 6 * 512, 1, 6)
    assert counted.lane(0, 2).tolist() == [1, 0]
    assert counted.lane(0, 12).tolist() == [1] * 6 + [0] * 6
    assert counted.lane(0, 4).tolist() == [1, 1, 0, 0] or np.allclose(counted.lane(0, 4), [1, 1, 0, 0])


def test_cells_are_powers_of_two() -> None:
    """A cell is never smaller than a sector, and 2 TiB fits, too."""
    assert cell_size(512, 1000) == 512
    assert cell_size(2 << 40, 512) == 4 << 30
    assert cell_size((2 << 40) + 512, 512) == 8 << 30


def test_runs_of_equal_neighbours() -> None:
    """Every position is in exactly one run."""
    assert list(alike(np.array([1, 1, 2, 1]))) == [(0, 2), (2, 3), (3, 4)]
