# SPDX-License-Identifier: Apache-2.0
"""Which layer owns how much of each part of a disk: the numbers behind every picture of a map.

Decides how a disk is cut into cells. Pure: extents in, arrays out, in memory bounded by cells and layers.

    disk     |--------|--------|--------|--------|     cells of one size, a power of two sectors
    leaf          ######                                bytes per cell: 0 3 2 0 ...
    base     ########          ##########               bytes per cell: 4 0 4 3 ...
    zeros                                               what is left
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vhdkit import Extent, ExtentKind
from vhdkit.units import SECTOR_SIZE

UNOWNED = -1  # the owner of a cell that is all zeros


@dataclass(frozen=True, slots=True)
class Tally:
    """`data` holds, per layer (leaf first) and cell, how many bytes are that layer's data; the rest is zeros."""

    size_bytes: int
    cell_bytes: int
    data: NDArray[np.int64]
    zero_bytes: tuple[int, ...]  # per layer: zeros it holds itself, by a hole in its file

    @property
    def cell_count(self) -> int:
        """How many cells the disk has; the last may reach past its end."""
        return int(self.data.shape[1])

    @property
    def layer_count(self) -> int:
        """How many layers the chain has."""
        return int(self.data.shape[0])

    def data_bytes(self, layer: int) -> int:
        """All data that the layer owns."""
        return int(self.data[layer].sum())

    def owners(self) -> NDArray[np.int64]:
        """Per cell the layer with most data there, the one nearer to the leaf when equal; UNOWNED for zeros."""
        return np.where(self.data.any(axis=0), self.data.argmax(axis=0), UNOWNED)

    def fill(self) -> NDArray[np.float64]:
        """Per cell how much of it is data of any layer, 0 to 1."""
        filled: NDArray[np.float64] = self.data.sum(axis=0) / self._cell_sizes()
        return filled

    def lane(self, layer: int, cell_count: int) -> NDArray[np.float64]:
        """One layer's share of each of `cell_count` equal parts of the disk, 0 to 1."""
        cuts = np.linspace(0, self.cell_count, cell_count + 1)
        edges = np.arange(self.cell_count + 1)
        mine, whole = (
            np.diff(np.interp(cuts, edges, np.concatenate(([0], values.cumsum()))))
            for values in (self.data[layer], self._cell_sizes())
        )
        share: NDArray[np.float64] = mine / whole
        return share

    def _cell_sizes(self) -> NDArray[np.int64]:
        sizes = np.full(self.cell_count, self.cell_bytes, dtype=np.int64)
        sizes[-1] = self.size_bytes - (self.cell_count - 1) * self.cell_bytes
        return sizes


def cell_size(size_bytes: int, max_cells: int) -> int:
    """The smallest power of two of bytes, at least a sector, with which the disk has at most `max_cells` cells."""
    cell_bytes = SECTOR_SIZE
    while -(-size_bytes // cell_bytes) > max_cells:
        cell_bytes *= 2
    return cell_bytes


def tally(extents: Iterable[Extent], size_bytes: int, layer_count: int, max_cells: int) -> Tally:
    """Count the extents, which cover the disk in order."""
    cell_bytes = cell_size(size_bytes, max_cells)
    data = np.zeros((layer_count, -(-size_bytes // cell_bytes)), dtype=np.int64)
    zeros = [0] * layer_count
    for extent in extents:
        if extent.kind is ExtentKind.DATA:
            _add(data[extent.layer_index], cell_bytes, extent.offset_bytes, extent.size_bytes)
        elif extent.layer_index >= 0:
            zeros[extent.layer_index] += extent.size_bytes
    return Tally(size_bytes, cell_bytes, data, tuple(zeros))


def _add(row: NDArray[np.int64], cell_bytes: int, offset: int, size: int) -> None:
    end = offset + size
    first, last = offset // cell_bytes, (end - 1) // cell_bytes
    if first == last:
        row[first] += size
        return
    row[first] += (first + 1) * cell_bytes - offset
    row[first + 1 : last] += cell_bytes
    row[last] += end - last * cell_bytes


def alike(values: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """The runs of equal neighbours as (first, end)."""
    edges = (np.flatnonzero(values[1:] != values[:-1]) + 1).tolist()
    return itertools.pairwise([0, *edges, len(values)])
