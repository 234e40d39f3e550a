# SPDX-License-Identifier: Apache-2.0
"""Blocks that move to another place of the file, or are dropped.

Decides where free space is, which blocks move into it, and the order. A block is reachable only where it is whole:

    copy to free space -> sync -> BAT -> sync -> only then is the old place free

Many blocks share the syncs of one batch. Space is free if no block or structure uses it and the BAT on the device
does not point at it, so after a power cut each block is in its old place or its new one, and both hold the same
content (`INV-NO-REUSE`). The trailing footer comes last: it is written to its new place while the old one and the
copy are still there, then the file is truncated.

The data of a block that moves is placed on a 4 KiB boundary, unless it goes into a gap that is too narrow for that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vhdkit import errors
from vhdkit.formats.vhd import batmap, bitmap
from vhdkit.formats.vhd.bat import Bat
from vhdkit.formats.vhd.dynamic import NO_END, DynamicImage
from vhdkit.formats.vhd.layout import BAT_UNALLOCATED, FOOTER_SIZE
from vhdkit.formats.vhd.metadata import Metadata
from vhdkit.formats.vhd.places import block_starts, nominal_end, structure_ranges
from vhdkit.store import Store
from vhdkit.units import MIB, PAGE_SIZE, SECTOR_SIZE, round_down, round_up, sectors_to_bytes

Indices = NDArray[np.int64]  # block indices, or offsets in bytes
_BATCH_BYTES = 256 * MIB  # copied between two syncs: the work that an interruption loses
_PREFER_ALIGNED = 7 / 8  # of the blocks that fit closely: aligned slots of a gap may lose one in eight


@dataclass(frozen=True, slots=True)
class Packing:
    """Which blocks move where (the offset of their bitmap), and where blocks and structures end afterwards."""

    blocks: Indices
    targets: Indices
    end_bytes: int


def block_space(image: DynamicImage) -> int:
    """Bytes of a block in the file, its bitmap included."""
    return bitmap.bitmap_size(image.block_size_bytes) + image.block_size_bytes


def _starts(image: DynamicImage, blocks: Indices) -> Indices:
    return image.bat.entries[blocks].astype(np.int64) * SECTOR_SIZE


def plan_packing(image: DynamicImage, dropped: Indices | None = None) -> Packing:
    """How to fill the gaps with the last blocks, without the `dropped` ones.

    The lowest gaps take the highest blocks, for as long as that moves a block down: nothing moves twice, or without
    need. The moved blocks fill the slots in the order of the disk.
    """
    kept_mask = image.allocated_blocks()
    if dropped is not None:
        kept_mask[dropped] = False
    kept = np.flatnonzero(kept_mask).astype(np.int64)
    starts = _starts(image, kept)
    space = block_space(image)
    structures = structure_ranges(image.metadata, image.bat)
    slots = _free_slots(image, structures, starts)
    downward = np.argsort(-starts, kind="stable")
    count = min(len(slots), len(kept))
    count = int(np.count_nonzero(slots[:count] < starts[downward[:count]]))
    moving, staying = downward[:count], downward[count:]
    ends = [end for _, end in structures]
    ends += [int(slots[:count].max()) + space] if count else []
    ends += [int(starts[staying].max()) + space] if len(staying) else []
    return Packing(np.sort(kept[moving]), slots[:count], round_up(max(ends), SECTOR_SIZE))


def _free_slots(image: DynamicImage, taken: Sequence[tuple[int, int]], starts: Indices) -> Indices:
    """Offsets of free places for a block, ascending, none after the last block or structure."""
    space, bitmap_bytes = block_space(image), bitmap.bitmap_size(image.block_size_bytes)
    fixed = np.array(taken, dtype=np.int64).reshape(-1, 2)
    edges = np.concatenate([fixed, np.stack([starts, starts + space], axis=1)])
    edges = edges[np.argsort(edges[:, 0], kind="stable")]
    low = np.maximum.accumulate(edges[:, 1])[:-1]
    low = -(-low // SECTOR_SIZE) * SECTOR_SIZE
    high = edges[1:, 0]
    wide = high - low >= space
    low, high = low[wide], high[wide]
    closely = (high - low) // space
    aligned_low = -(-(low + bitmap_bytes) // PAGE_SIZE) * PAGE_SIZE - bitmap_bytes
    stride = round_up(space, PAGE_SIZE)
    aligned = np.maximum(high - aligned_low - space + stride, 0) // stride
    use_aligned = aligned >= closely * _PREFER_ALIGNED
    counts = np.where(use_aligned, aligned, closely)
    first = np.repeat(np.where(use_aligned, aligned_low, low), counts)
    steps = np.repeat(np.where(use_aligned, stride, space), counts)
    number = np.arange(len(first)) - np.repeat(np.cumsum(counts) - counts, counts)
    slots: Indices = first + number * steps
    return slots


def plan_clearing(image: DynamicImage, start_bytes: int, end_bytes: int) -> Packing:
    """How to move every block out of a range of the file: into the lowest gaps elsewhere, else after everything.

    Raises NoSpace if a BAT entry cannot express the place.
    """
    space, bitmap_bytes = block_space(image), bitmap.bitmap_size(image.block_size_bytes)
    kept = np.flatnonzero(image.allocated_blocks()).astype(np.int64)
    starts = _starts(image, kept)
    structures = structure_ranges(image.metadata, image.bat)
    moving = kept[(starts < end_bytes) & (starts + space > start_bytes)]
    slots = _free_slots(image, [*structures, (start_bytes, end_bytes)], starts)[: len(moving)]
    # New space begins after the trailing footer, as always: that footer stays until another follows it.
    free = max(nominal_end(image.metadata, image.bat), image.store.size(), end_bytes)
    first = round_up(free + bitmap_bytes, PAGE_SIZE) - bitmap_bytes
    behind = first + np.arange(len(moving) - len(slots), dtype=np.int64) * round_up(space, PAGE_SIZE)
    targets: Indices = np.concatenate([slots, behind])
    end = int(behind[-1]) + space if len(behind) else round_up(free, SECTOR_SIZE)
    if end - space >= sectors_to_bytes(BAT_UNALLOCATED):
        raise errors.NoSpace("a VHD file cannot grow past 2 TiB", path=image.store.name)
    return Packing(moving, targets, end)


def drop_blocks(image: DynamicImage, blocks: Indices) -> None:
    """Free the space of `blocks`, which is unreferenced when this returns.

    Raises IoFailed, NoSpace, SyncFailed; each block is then as it was, or dropped.
    """
    if not len(blocks):
        return
    clear_batmap(image, blocks)
    for block in blocks.tolist():
        image.bat.clear(block)
    _write_table(image)


def clear_batmap(image: DynamicImage, blocks: Indices) -> None:
    """Clear the batmap's bits of `blocks`, and sync. Raises IoFailed, NoSpace, SyncFailed."""
    if batmap_lies_apart(image.metadata, image.bat) and batmap.clear_bits(image.store, image.metadata, blocks):
        image.store.sync()


def batmap_lies_apart(metadata: Metadata, bat: Bat) -> bool:
    """False for a batmap whose stated place overlaps something else: a hint is not worth a write there."""
    assert metadata.header is not None
    ranges, starts = batmap.ranges(metadata), block_starts(bat)
    space = bitmap.bitmap_size(metadata.header.block_size) + metadata.header.block_size
    for low, high in ranges:
        others = [(offset, offset + size) for _, offset, size in metadata.forbidden_to_blocks()]
        others += [one for one in ranges if one != (low, high)]
        over_block = bool(np.any((starts < high) & (starts + space > low)))
        if over_block or any(low < end and start < high for start, end in others):
            return False
    return bool(ranges)


def move_blocks(image: DynamicImage, packing: Packing, moved: Callable[[int], None] | None = None) -> None:
    """Move the blocks of a plan; `moved` is called with the bytes of each block.

    Raises IoFailed, NoSpace, SyncFailed; each block is then in its old place or its new one.
    """
    store, space = image.store, block_space(image)
    if not len(packing.blocks):
        return
    size_before = store.size()
    if packing.targets.max() + space > size_before:
        # The last sector of the file is a footer or zeros, never data of a guest, which might forge a footer.
        store.reserve(packing.end_bytes, FOOTER_SIZE)
    count = max(1, _BATCH_BYTES // space)
    try:
        for first in range(0, len(packing.blocks), count):
            _move_batch(image, packing, slice(first, first + count), moved)
    except BaseException:
        used = nominal_end(image.metadata, image.bat)
        if store.size() > size_before >= used:  # nothing went past the old end: free the space
            store.truncate(size_before)
        raise
    if store.size() > size_before:
        store.pwrite(packing.end_bytes, image.metadata.footer_raw)
        store.sync()


def _move_batch(image: DynamicImage, packing: Packing, part: slice, moved: Callable[[int], None] | None) -> None:
    blocks, targets = packing.blocks[part].tolist(), packing.targets[part].tolist()
    space = block_space(image)
    for block, target in zip(blocks, targets, strict=True):
        _copy(image.store, image.bat.block_start(block), target, space)
        if moved is not None:
            moved(space)
    image.store.sync()
    for block, target in zip(blocks, targets, strict=True):
        image.bat.set(block, target)
    _write_table(image)


def _copy(store: Store, source: int, target: int, size: int) -> None:
    """Copy a whole block to free space; holes stay holes."""
    for offset, count, may_hold_data in store.data_runs(source, size):
        place = target + offset - source
        if may_hold_data:
            store.copy_from(store, offset, place, count)
        else:
            store.punch(place, count)


def _write_table(image: DynamicImage) -> None:
    """Write the changed entries and sync. What they point at must be on the device."""
    table = image.bat.take_dirty()
    try:
        for number, raw in table.items():
            image.store.pwrite(image.bat.sector_offset(number), raw)
        image.store.sync()
    except BaseException:
        image.bat.mark_dirty(table)
        raise


def punch_free(image: DynamicImage, ranges: Sequence[tuple[int, int]]) -> None:
    """Punch the parts of vacated (offset, end) ranges that no block or structure uses.

    This only frees space, so no error is raised if it fails.
    """
    if not ranges:
        return
    space, starts = block_space(image), block_starts(image.bat)
    near = starts[(starts < max(high for _, high in ranges)) & (starts + space > min(low for low, _ in ranges))]
    taken = structure_ranges(image.metadata, image.bat) + [(start, start + space) for start in near.tolist()]
    taken.append((max(image.store.size() - FOOTER_SIZE, 0), NO_END))
    with contextlib.suppress(errors.VhdkitError):
        for low, high in ranges:
            for start, end in free_ranges(taken, low, high):
                image.store.punch(start, end - start)


def free_ranges(taken: Sequence[tuple[int, int]], low: int, high: int) -> Iterator[tuple[int, int]]:
    """The whole sectors between `low` and `high` outside the (offset, end) ranges, ascending."""
    position = round_up(low, SECTOR_SIZE)
    for start, end in sorted(one for one in taken if one[0] < high and one[1] > low):
        if round_down(start, SECTOR_SIZE) > position:
            yield position, round_down(start, SECTOR_SIZE)
        position = max(position, round_up(end, SECTOR_SIZE))
    if high > position:
        yield position, high


def cut_end(image: DynamicImage, end_bytes: int) -> None:
    """Truncate the file after `end_bytes`, where nothing is in use, and put the trailing footer there.

    Raises IoFailed, NoSpace, SyncFailed; the image can be opened by one of its footers at any point.
    """
    store = image.store
    if end_bytes + FOOTER_SIZE >= store.size():
        return
    store.pwrite(end_bytes, image.metadata.footer_raw)
    store.sync()
    store.truncate(end_bytes + FOOTER_SIZE)
    store.sync()
