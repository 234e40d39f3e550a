# SPDX-License-Identifier: Apache-2.0
"""Where unsettled parts of a disk lie, found out without waiting for a device.

Decides what is tried, and what is read meanwhile. Must not know who waits, nor what follows if it cannot be found out.
"""

from __future__ import annotations

from vhdkit.at_once import NotInMemory, required
from vhdkit.chain.engine.chain import Chain
from vhdkit.units import sectors_to_bytes

_MOST_GRAINS = 4  # in a range: more take a while, so that no caller that must not wait should do it


def settle_at_once(chain: Chain, sector_index: int, sector_count: int) -> NotInMemory | None:
    """`Chain.settle` of a range if that need not wait.

    If it must, returns what it lacks, which the system is reading now; in that case call it again when that is there.
    Raises IoFailed.
    """
    if not chain.is_of_files or sector_count > _MOST_GRAINS * chain.map.grain_sectors:
        return NotInMemory()
    try:
        with required():
            chain.settle(sector_index, sector_count)
    except NotInMemory as missing:
        return missing
    return None


def prefetch_likely(chain: Chain, sector_index: int, sector_count: int) -> None:
    """Have the data of an unsettled range read if a single layer can have it: reading what tells takes as long."""
    offset, size = sectors_to_bytes(sector_index), sectors_to_bytes(sector_count)
    found = []
    try:
        with required():
            for layer in chain.layers:
                if offset + size > layer.size_bytes:
                    return
                block_bytes = layer.block_size_bytes or layer.size_bytes
                block, within = divmod(offset, block_bytes)
                place = layer.block_offset(block)
                if place >= 0:
                    found.append((layer.store, place + within, min(size, block_bytes - within)))
    except NotInMemory:
        return
    if len(found) == 1:
        store, place, size = found[0]
        store.prefetch(place, size)
