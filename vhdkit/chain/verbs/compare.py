# SPDX-License-Identifier: Apache-2.0
"""Comparing the content of two disks of any kinds, depths and block sizes.

Decides what counts as a difference: a byte that reads differently; if one disk is longer, its rest is compared with
zeros. Ranges that are zeros in both, or the same bytes of the same file, are not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain as joined
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from vhdkit.arguments import AnyPath, checked
from vhdkit.chain.engine.ahead import Ahead, announced
from vhdkit.chain.engine.chain import Chain, Progress
from vhdkit.chain.engine.steady import steady
from vhdkit.chain.names.options import OpenOptions
from vhdkit.image import Extent, ExtentKind
from vhdkit.store import FileStore
from vhdkit.units import MIB, SECTOR_SIZE, sectors_to_bytes, whole_sectors

_PIECE_SECTORS = whole_sectors(MIB)
_WORDS_PER_SECTOR = SECTOR_SIZE // 8

_Piece: TypeAlias = tuple[int, int, bool]  # first sector, count, known to be equal
Sectors: TypeAlias = NDArray[np.uint64]  # a row of words for each


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a comparison found."""

    first_size_bytes: int
    second_size_bytes: int
    first_difference_bytes: int | None  # offset of the first byte that differs; None when there is none
    different_sector_count: int

    @property
    def same_content(self) -> bool:
        """True if no byte differs (the sizes may, if the longer disk ends in zeros)."""
        return self.different_sector_count == 0


@checked
def compare(
    first: AnyPath,
    second: AnyPath,
    *,
    options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare two images, each with its parents. Raises what `open_disk` raises, and IoFailed."""
    with Chain.open(first, options=options) as one, Chain.open(second, options=options) as other:
        return compare_chains(one, other, progress)


def compare_chains(one: Chain, other: Chain, progress: Progress | None = None) -> Comparison:
    """Compare two open chains. Raises IoFailed."""
    with steady(one), steady(other):
        return _compare(one, other, progress)


def _compare(one: Chain, other: Chain, progress: Progress | None) -> Comparison:
    first_difference, different = None, 0
    for position, mine, theirs in _different_pieces(one, other, progress):
        bad = np.flatnonzero((mine != theirs).any(axis=1))
        different += len(bad)
        if first_difference is None:
            sector = int(bad[0])
            within = np.flatnonzero(mine[sector].view(np.uint8) != theirs[sector].view(np.uint8))
            first_difference = sectors_to_bytes(position + sector) + int(within[0])
    return Comparison(one.size_bytes, other.size_bytes, first_difference, different)


def different_pieces(
    one: Chain, other: Chain, progress: Progress | None = None
) -> Iterator[tuple[int, Sectors, Sectors]]:
    """Every piece of at most 1 MiB, as (first sector, sectors of the one, of the other), that is not the same in both.

    The arrays are valid until the next piece is taken. Raises IoFailed.
    """
    with steady(one), steady(other):
        yield from _different_pieces(one, other, progress)


def _different_pieces(one: Chain, other: Chain, progress: Progress | None) -> Iterator[tuple[int, Sectors, Sectors]]:
    size = max(one.size_bytes, other.size_bytes)
    for chain in (one, other):
        chain.map.walked_once()
    readers = Ahead(one), Ahead(other)

    def announce(piece: _Piece) -> None:
        for chain, reader in zip((one, other), readers, strict=True):
            inside = _inside(chain, piece)
            if inside:
                reader.expect(piece[0], inside)

    buffers = [memoryview(bytearray(sectors_to_bytes(_PIECE_SECTORS))) for _ in range(2)]
    for piece in announced(_pieces(one, other), lambda piece: 0 if piece[2] else piece[1], announce):
        position, count, alike = piece
        if not alike:
            mine, theirs = [
                _read(reader, piece, _inside(chain, piece), buffer)
                for chain, reader, buffer in zip((one, other), readers, buffers, strict=True)
            ]
            if not np.array_equal(mine, theirs):
                yield position, mine, theirs
        if progress is not None:
            progress(sectors_to_bytes(position + count), size)


def _inside(chain: Chain, piece: _Piece) -> int:
    """How many sectors of the piece are to be read from this chain, whose disk may end before it."""
    position, count, alike = piece
    return 0 if alike else min(max(whole_sectors(chain.size_bytes) - position, 0), count)


def _read(reader: Ahead, piece: _Piece, inside: int, buffer: memoryview) -> Sectors:
    """Sectors as rows of words; zeros past those inside the disk."""
    view, end = buffer[: sectors_to_bytes(piece[1])], sectors_to_bytes(inside)
    if inside:
        reader.read_into(piece[0], view[:end])
    view[end:] = bytes(len(view) - end)
    return np.frombuffer(view, dtype=np.uint64).reshape(-1, _WORDS_PER_SECTOR)


def _pieces(one: Chain, other: Chain) -> Iterator[_Piece]:
    """The longer disk; pieces that may differ have a bounded size."""
    end = whole_sectors(max(one.size_bytes, other.size_bytes))
    runs, others = _runs(one, end), _runs(other, end)
    a, b = next(runs), next(others)
    position = 0
    while position < end:
        stop = min(a.end_sector, b.end_sector)
        alike = _alike(one, a, other, b)
        while position < stop:
            count = stop - position if alike else min(stop - position, _PIECE_SECTORS)
            yield position, count, alike
            position += count
        if position < end:
            a = next(runs) if a.end_sector == stop else a
            b = next(others) if b.end_sector == stop else b


def _runs(chain: Chain, end: int) -> Iterator[Extent]:
    """The chain's extents, then zeros from its end to `end`."""
    size = whole_sectors(chain.size_bytes)
    rest = [Extent(size, end - size, ExtentKind.ZERO, -1)] if end > size else []
    return joined(chain.extents(0, size, find_holes=True), rest)


def _alike(one: Chain, a: Extent, other: Chain, b: Extent) -> bool:
    if a.store_offset_bytes is None or b.store_offset_bytes is None:
        return a.store_offset_bytes is b.store_offset_bytes
    mine, theirs = one.layers[a.layer_index].store, other.layers[b.layer_index].store
    if not (isinstance(mine, FileStore) and isinstance(theirs, FileStore) and mine.identity == theirs.identity):
        return False
    return a.store_offset_bytes - b.store_offset_bytes == sectors_to_bytes(a.sector_index - b.sector_index)
