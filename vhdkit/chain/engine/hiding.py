# SPDX-License-Identifier: Apache-2.0
"""Whether zeros written to a leaf hide any data.

Decides where a differencing leaf needs no block for written zeros: only where no layer below it
can show anything else, now or later. Must not write.

A parent is read-only as long as it has children, and merges, rebases and snapshots preserve what the leaf
reads. So zeros that no layer owns stay zeros, with three exceptions, in which the leaf owns its zeros:

    a raw parent                       has no id: nothing keeps other programs from writing to it or enlarging it
    data under clear bits              is zeros by the specification (of a dynamic disk), but some programs show it
    data after a smaller layer's end   is hidden only by the size of that layer
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vhdkit.image import ExtentKind, Layer
from vhdkit.units import sectors_to_bytes, whole_sectors


def zeros_to_write(layers: Sequence[Layer], sector_index: int, sector_count: int) -> Iterator[tuple[int, int]]:
    """(first sector, count) of the parts of a run that the leaf must own for the run to read as zeros permanently.

    `layers` are those of a chain, leaf first. Raises IoFailed.
    """
    leaf, below = layers[0], layers[1:]
    if leaf.unowned is not ExtentKind.ABSENT or any(_may_change(layer) for layer in below):
        yield sector_index, sector_count
        return
    end, per_block = sector_index + sector_count, whole_sectors(leaf.block_size_bytes)
    start = sector_index  # of the sectors to write, among those examined so far
    for block in range(sector_index // per_block, -(-end // per_block)):
        first, stop = max(block * per_block, sector_index), min((block + 1) * per_block, end)
        if leaf.block_offset(block) < 0 and all(_shows_zeros(layer, first, stop - first) for layer in below):
            if first > start:
                yield start, first - start
            start = stop
    if end > start:
        yield start, end - start


def _may_change(layer: Layer) -> bool:
    return layer.unique_id is None or not any(layer.unique_id)


def _shows_zeros(layer: Layer, sector_index: int, sector_count: int) -> bool:
    """True if the layer has only holes there, whatever its bits say, or nothing at all."""
    end = min(sector_index + sector_count, whole_sectors(layer.size_bytes))
    per_block = whole_sectors(layer.block_size_bytes) or max(end, 1)
    for block in range(sector_index // per_block, -(-end // per_block)):
        first, stop = max(block * per_block, sector_index), min((block + 1) * per_block, end)
        offset = layer.block_offset(block)
        if offset < 0 or stop <= first or _owns_nothing(layer, block, first - block * per_block, stop - first):
            continue
        place = offset + sectors_to_bytes(first - block * per_block)
        if any(is_data for _, _, is_data in layer.store.data_runs(place, sectors_to_bytes(stop - first))):
            return False
    return True


def _owns_nothing(layer: Layer, block: int, first: int, count: int) -> bool:
    """True for sectors that a differencing layer leaves to its parents, on which all programs agree."""
    if layer.unowned is not ExtentKind.ABSENT:
        return False
    owned = layer.owned_sectors(block)
    return owned is not None and not owned[first : first + count].any()
