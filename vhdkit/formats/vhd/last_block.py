# SPDX-License-Identifier: Apache-2.0
"""Bits and batmap entries that claim more than the disk has.

Decides which bits of the last block's bitmap are meaningless, because the disk ends before their sectors, and which
bits of a batmap are wrong. Changes nothing.

XenServer's coalesce copies the sector of every set bit of a child, and every sector of a block that its batmap marks
as whole; past the end of the disk this fails.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vhdkit.formats.vhd import batmap, bitmap
from vhdkit.formats.vhd.bat import Bat
from vhdkit.formats.vhd.metadata import Metadata
from vhdkit.store import ReadStore
from vhdkit.units import whole_sectors


@dataclass(frozen=True, slots=True)
class BitsPastEnd:
    """Set bits past the end of the disk: the bitmap's offset and block, their number, and the correct bitmap."""

    offset_bytes: int
    block_index: int
    count: int
    cleared: bytes


def bits_past_end(store: ReadStore, metadata: Metadata, bat: Bat) -> BitsPastEnd | None:
    """The set bits past the end of the disk in the last block, or None. Raises IoFailed."""
    assert metadata.header is not None
    block, block_size = len(bat) - 1, metadata.header.block_size
    inside = whole_sectors(metadata.size_bytes - block * block_size)
    start, sector_count = bat.block_start(block), whole_sectors(block_size)
    if start < 0 or inside == sector_count:
        return None
    size = bitmap.bitmap_size(block_size)
    raw = bytearray(store.pread(start, size).ljust(size, b"\0"))
    count = int(np.count_nonzero(bitmap.owned(raw, sector_count)[inside:]))
    if not bitmap.clear_from(raw, inside) or not count:
        return None
    return BitsPastEnd(start, block, count, bytes(raw))


def wrong_batmap_bits(store: ReadStore, metadata: Metadata, bat: Bat) -> NDArray[np.int64]:
    """The blocks that a batmap wrongly marks as whole: they own less, or are not allocated. Raises IoFailed."""
    if not batmap.ranges(metadata):
        return np.zeros(0, dtype=np.int64)
    assert metadata.header is not None
    raw = batmap.read_map(store, metadata)
    called = bitmap.owned(raw, min(len(raw) * 8, len(bat)))
    allocated = bat.allocated()[: len(called)]
    size, sector_count = bitmap.bitmap_size(metadata.header.block_size), whole_sectors(metadata.header.block_size)
    wrong = called & ~allocated
    for block in np.flatnonzero(called & allocated).tolist():
        found = store.pread(bat.block_start(block), size).ljust(size, b"\0")
        # A block that reaches past the end of the disk is never whole: not all of its sectors can be written.
        is_cut = (block + 1) * metadata.header.block_size > metadata.size_bytes
        wrong[block] = is_cut or not bitmap.is_full(found, sector_count)
    return np.flatnonzero(wrong).astype(np.int64)
