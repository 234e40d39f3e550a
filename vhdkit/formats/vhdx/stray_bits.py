# SPDX-License-Identifier: Apache-2.0
"""Bits of sector bitmaps that mean nothing: past the end of the disk, or of blocks that are not present.

Decides which bits these are, for `check` and for repairs. A program that goes by the states of blocks ignores them;
other programs take them for sectors that the image owns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.bat import Bat, BlockState
from vhdkit.formats.vhdx.bitmap import bytes_per_block
from vhdkit.formats.vhdx.metadata import Metadata
from vhdkit.units import MIB

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class StrayBits:
    """`count` bits of one bitmap that should be clear; `writes`, as (offset, bytes), clear them."""

    chunk_index: int
    offset_bytes: int
    count: int
    past_end: bool
    writes: tuple[tuple[int, bytes], ...]


def stray_bits(
    metadata: Metadata, bat: Bat, progress: Callable[[int, int], None] | None = None
) -> Iterator[StrayBits]:
    """The stray bits of every bitmap, in order of chunks. The BAT must be sound. Raises IoFailed."""
    shape, size = metadata.shape, metadata.view.size()
    for chunk, offset in bat.bitmaps():
        if progress is not None:
            progress(chunk * shape.ratio * metadata.items.block_size, metadata.items.size_bytes)
        if not _holds_data(metadata, offset):
            continue
        raw = metadata.view.pread(offset, min(layout.BITMAP_BLOCK_SIZE, size - offset)).ljust(MIB, b"\0")
        bits = np.frombuffer(raw, dtype=np.uint8)
        inside = _inside(metadata, chunk)
        for wrong, past_end in ((~_allowed(metadata, bat, chunk) & inside, False), (~inside, True)):
            kept = bits & ~wrong
            if (bits != kept).any():
                yield _found(chunk, offset, bits, kept, past_end=past_end)
            bits = kept


def _holds_data(metadata: Metadata, offset: int) -> bool:
    return any(may_hold for _, _, may_hold in metadata.view.data_runs(offset, layout.BITMAP_BLOCK_SIZE))


def _allowed(metadata: Metadata, bat: Bat, chunk: int) -> Bytes:
    """Ones for the blocks of a chunk whose bits may be set: all except those that are not present."""
    shape = metadata.shape
    blocks = np.arange(min(shape.ratio, shape.block_count - chunk * shape.ratio))
    states = bat.entries_of(blocks + chunk * (shape.ratio + 1)) & np.uint64(layout.BAT_STATE_MASK)
    may = np.full(shape.ratio, 0xFF, dtype=np.uint8)
    may[blocks[states == BlockState.NOT_PRESENT]] = 0
    return np.repeat(may, bytes_per_block(metadata.items.block_size, metadata.items.logical_sector_bytes))


def _inside(metadata: Metadata, chunk: int) -> Bytes:
    """Ones for the sectors of a chunk that are inside the disk."""
    sectors = -(-metadata.items.size_bytes // metadata.items.logical_sector_bytes) - chunk * layout.SECTORS_PER_CHUNK
    whole, rest = divmod(min(sectors, layout.SECTORS_PER_CHUNK), 8)
    inside = np.zeros(layout.BITMAP_BLOCK_SIZE, dtype=np.uint8)
    inside[:whole] = 0xFF
    if rest:
        inside[whole] = (1 << rest) - 1
    return inside


def _found(chunk: int, offset: int, bits: Bytes, kept: Bytes, *, past_end: bool) -> StrayBits:
    stray = bits & ~kept
    writes = []
    for start in range(0, len(kept), layout.LOG_PAGE_SIZE):
        if stray[start : start + layout.LOG_PAGE_SIZE].any():
            writes.append((offset + start, kept[start : start + layout.LOG_PAGE_SIZE].tobytes()))
    return StrayBits(chunk, offset, int(np.unpackbits(stray).sum()), past_end, tuple(writes))
