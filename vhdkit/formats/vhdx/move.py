# SPDX-License-Identifier: Apache-2.0
"""Making the file of a VHDX smaller: dropping blocks, filling gaps with the last blocks, and truncating the file.

Decides which blocks move where, in which order, and when space in the file may be reused. Must not know why blocks are
dropped: the caller (`chain.verbs.compact`) found that the disk reads the same without them.

    drop     entries of the blocks; then those of sector bitmaps that are no longer needed      | log
             the log is closed                                                                  | space is free now
    move     copies in free space -> sync -> their entries                                      | log
             the BAT and the metadata region: a copy -> sync -> both region tables              | one entry of the log
             the log is closed; if it moves as well, its place in the headers                   | header by header
    cut      the log is closed, the file is truncated, gaps become holes

- `INV-COMPACT-PRESERVES`: at every moment a block is complete in its old place or in its new one. Nothing moves into
  space that another block or structure vacates in the same run.
- Space of a guest's data may be reused once nothing durable refers to it. Space of metadata may be reused only after
  the log has been closed as well, so that the next entries have another log id: until then an entry may be replayed
  over it; some programs replay even entries before the tail.
- An entry in a state without content may keep the offset of space that its block once had. That space is free, so the
  offset is durably removed from the entry before the space is reused.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vhdkit import errors
from vhdkit.formats.format import Moved
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.bat import BlockState, offset_of, state_of
from vhdkit.formats.vhdx.blocks import VhdxImage
from vhdkit.formats.vhdx.entries import places, whole_sizes
from vhdkit.formats.vhdx.layout import RegionEntry
from vhdkit.formats.vhdx.regions import Regions, table_writes
from vhdkit.store import Store
from vhdkit.units import MIB

Indices = NDArray[np.int64]  # numbers of entries of the BAT, or offsets in bytes
_BATCH_BYTES = 256 * MIB  # copied between two syncs: the work that an interruption loses


@dataclass(frozen=True, slots=True)
class Packing:
    """Where blocks, sector bitmaps, regions and the log move, and where the file ends afterwards.

    `entries` are numbers of BAT entries, `targets` their new offsets and `sizes` their sizes, in bytes; `log_bytes` is
    the offset of the log.
    """

    entries: Indices
    targets: Indices
    sizes: Indices
    regions: Regions
    log_bytes: int
    end_bytes: int


def gone_entries(image: VhdxImage, dropped: Indices) -> Indices:
    """The entries of these blocks, and of the sector bitmaps that no other block needs."""
    shape = image.bat.shape
    gone = [dropped + (dropped >> shape.ratio_shift)]
    if image.is_differencing:
        partial = image.bat.in_states(BlockState.PARTIALLY_PRESENT)
        partial[dropped] = False
        needed = np.unique(np.flatnonzero(partial) >> shape.ratio_shift)
        bitmaps = np.array(
            [one for one in range(shape.chunk_count) if image.bat.bitmap_offset(one) >= 0], dtype=np.int64
        )
        gone.append(np.setdiff1d(bitmaps, needed) * (shape.ratio + 1) + shape.ratio)
    return np.concatenate(gone)


def plan_packing(image: VhdxImage, gone: Indices) -> Packing:
    """How to fill the gaps with what lies last in the file, once the entries in `gone` are dropped.

    The last block or structure moves to the lowest gap that is large enough, as long as that is further down: nothing
    moves twice or needlessly.
    """
    metadata = image.metadata
    numbers, offsets, _ = places(metadata, image.bat)
    kept = ~np.isin(numbers, gone)
    numbers, offsets = numbers[kept], offsets[kept]
    sizes = whole_sizes(metadata, numbers)
    structures = [(start, size) for _, start, size in metadata.structures()]
    gaps = _Gaps(structures, offsets, sizes)
    waiting = sorted(structures)  # those not examined yet, in order of offset
    placed: dict[int, int] = {}  # the new places of structures, by their old ones
    movable = {metadata.regions.bat.file_offset, metadata.regions.metadata.file_offset, metadata.log[0]}
    moved, targets, end = len(numbers), [], 0
    while True:
        block = int(offsets[moved - 1]) if moved else 0
        place, size = waiting[-1]
        is_block = block > place
        if is_block:
            place, size = block, int(sizes[moved - 1])
        target = gaps.take(size, place) if is_block or place in movable else None
        if target is None:
            break
        end = max(end, target + size)
        if is_block:
            moved -= 1
            targets.append(target)
        else:
            waiting.pop()
            placed[place] = target
    ends = [start + size for start, size in waiting]
    ends += [int((offsets[:moved] + sizes[:moved]).max())] if moved else []
    end, last_first = max([end, *ends]), slice(moved, None)
    regions = metadata.regions
    regions = replace(regions, bat=_placed(regions.bat, placed), metadata=_placed(regions.metadata, placed))
    log = placed.get(metadata.log[0], metadata.log[0])
    blocks, size_of = numbers[last_first][::-1], sizes[last_first][::-1]
    return Packing(blocks, np.array(targets, dtype=np.int64), size_of, regions, log, end)


def _placed(region: RegionEntry, placed: dict[int, int]) -> RegionEntry:
    return replace(region, file_offset=placed.get(region.file_offset, region.file_offset))


class _Gaps:
    """The free ranges between used ones, all on mebibytes, lowest first. Used ranges that overlap are merged."""

    def __init__(self, structures: list[tuple[int, int]], offsets: Indices, sizes: Indices) -> None:
        """`structures` are (offset, size); blocks have offsets and sizes, both in any order."""
        starts = np.concatenate([np.array([one for one, _ in structures], dtype=np.int64), offsets])
        ends = starts + np.concatenate([np.array([one for _, one in structures], dtype=np.int64), sizes])
        order = np.argsort(starts, kind="stable")
        low, high = np.maximum.accumulate(ends[order])[:-1], starts[order][1:]
        is_gap = high > low
        self._gaps: list[tuple[int, int]] = list(
            zip(low[is_gap].tolist(), high[is_gap].tolist(), strict=True)
        )  # (start, end)
        self._first: dict[int, int] = {}  # by size: no gap before this one is large enough

    def take(self, size: int, below: int) -> int | None:
        """Take the lowest free range of this size that lies below an offset; returns its offset, or None."""
        number = self._first.get(size, 0)
        while number < len(self._gaps) and self._gaps[number][1] - self._gaps[number][0] < size:
            number += 1
        self._first[size] = number
        if number == len(self._gaps) or self._gaps[number][0] >= below:
            return None
        start, end = self._gaps[number]
        self._gaps[number] = start + size, end
        return start

    def remaining(self) -> list[tuple[int, int]]:
        """(start, end) of the ranges that are still free."""
        return [gap for gap in self._gaps if gap[0] < gap[1]]


def drop(image: VhdxImage, dropped: Indices) -> None:
    """Free the space of these blocks, of sector bitmaps no longer needed, and of entries without content.

    The disk reads the same. Raises IoFailed, NoSpace, SyncFailed; each block is then either unchanged or dropped.
    """
    commit, bat = image.commit, image.bat
    partial = [block for block in dropped.tolist() if state_of(bat.block(block)) == BlockState.PARTIALLY_PRESENT]
    bitmaps = gone_entries(image, dropped)[len(dropped) :]
    for block in dropped.tolist():
        is_whole = image.is_differencing and image.owned_sectors(block) is None
        with commit.changing:
            commit.point(block, BlockState.ZERO if is_whole else BlockState.NOT_PRESENT)
        commit.limit()
    for number in _anchors(image).tolist():
        hides_parent = image.is_differencing and state_of(bat.entry(number)) != BlockState.NOT_PRESENT
        with commit.changing:
            commit.set_entry(number, BlockState.ZERO if hides_parent else BlockState.NOT_PRESENT)
        commit.limit()
    commit.flush()  # a block that is partially present needs its bitmap
    for number in bitmaps.tolist():
        with commit.changing:
            commit.set_entry(number, BlockState.NOT_PRESENT)
        commit.limit()
    for block in partial:
        if bat.bitmap_offset(block >> bat.shape.ratio_shift) >= 0:
            with commit.changing:
                image.clear_bits(commit, block)
            commit.limit()
    commit.flush()
    commit.settle()


def _anchors(image: VhdxImage) -> Indices:
    """Entries whose offset leads to no content: those of blocks without space, and of sector bitmaps not in use."""
    shape, found = image.bat.shape, [np.zeros(0, dtype=np.int64)]
    for numbers, entries in image.bat.used():
        states = entries & np.uint64(layout.BAT_STATE_MASK)
        is_bitmap = numbers % (shape.ratio + 1) == shape.ratio
        unused = states < BlockState.FULLY_PRESENT
        if not image.is_differencing:
            unused |= is_bitmap
        found.append(numbers[unused & (entries > layout.BAT_STATE_MASK)])
    return np.concatenate(found)


def carry_out(image: VhdxImage, packing: Packing, moved: Moved | None = None) -> None:
    """Carry out the plan and truncate the file. Afterwards the image can only be closed.

    Raises IoFailed, NoSpace, SyncFailed; each block is then in its old place or its new one.
    """
    count = max(1, _BATCH_BYTES // image.block_size_bytes)
    for first in range(0, len(packing.entries), count):
        _move_batch(image, packing, slice(first, first + count), moved)
    _move_regions(image, packing.regions)
    if packing.log_bytes != image.metadata.log[0]:
        image.commit.settle()
        image.commit.move_log(packing.log_bytes)
    cut_end(image, packing.end_bytes)
    _punch_gaps(image, packing)
    image.refuse_writing()


def _move_batch(image: VhdxImage, packing: Packing, part: slice, moved: Moved | None) -> None:
    commit, bat = image.commit, image.bat
    entries, targets = packing.entries[part].tolist(), packing.targets[part].tolist()
    sizes, sources = packing.sizes[part].tolist(), [offset_of(bat.entry(number)) for number in entries]
    try:
        for source, target, size in zip(sources, targets, sizes, strict=True):
            _copy(image.store, source, target, size)
            if moved is not None:
                moved(size)
        commit.sync()
    except BaseException:  # Ctrl-C too: nothing refers to the copies
        _punch(image.store, zip(targets, sizes, strict=True))
        raise
    for number, target in zip(entries, targets, strict=True):
        with commit.changing:
            commit.set_entry(number, BlockState(state_of(bat.entry(number))), target)
    commit.flush()
    is_block = [bat.shape.block_of(number) is not None for number in entries]
    _punch(image.store, itertools.compress(zip(sources, sizes, strict=True), is_block))


def _punch(store: Store, ranges: Iterable[tuple[int, int]]) -> None:
    """Give back the space of (offset, size) ranges that are free. No error is raised if that fails."""
    with contextlib.suppress(errors.VhdkitError):
        for offset, size in ranges:
            store.punch(offset, size)


def _copy(store: Store, source: int, target: int, size: int) -> None:
    """Copy to free space; holes stay holes, and bytes past the end of the file are zeros."""
    stored = min(size, store.size() - source)
    for offset, count, may_hold_data in store.data_runs(source, stored):
        if may_hold_data:
            store.copy_from(store, offset, target + offset - source, count)
        else:
            store.punch(target + offset - source, count)
    store.punch(target + stored, size - stored)


def _move_regions(image: VhdxImage, regions: Regions) -> None:
    """Copy the BAT and the metadata to their new places, and record these in both region tables in one entry."""
    store, old = image.store, image.metadata.regions
    if regions == old:
        return
    if regions.bat != old.bat:
        store.punch(regions.bat.file_offset, regions.bat.length)
        for first, raw in image.bat.pieces():
            store.pwrite(regions.bat.file_offset + first * layout.BAT_ENTRY_SIZE, raw)
    if regions.metadata != old.metadata:
        _copy(store, old.metadata.file_offset, regions.metadata.file_offset, old.metadata.length)
    image.commit.sync()
    image.commit.write_pages(table_writes(regions))


def cut_end(image: VhdxImage, end_bytes: int) -> None:
    """Truncate the file to `end_bytes`, after which nothing is in use.

    The log is closed first: its entries record a minimum size of the file. Raises NoSpace, IoFailed, SyncFailed.
    """
    image.commit.settle()
    if end_bytes < image.store.size():
        image.store.truncate(end_bytes)
        image.commit.sync()


def _punch_gaps(image: VhdxImage, packing: Packing) -> None:
    """Punch holes into the free ranges of the file. That only frees space, so no error is raised if it fails."""
    numbers, offsets, _ = places(image.metadata, image.bat)
    sizes = whole_sizes(image.metadata, numbers)
    log = packing.log_bytes, image.metadata.log[1]
    structures = replace(image.metadata, regions=packing.regions, log=log).structures()
    gaps = _Gaps([(start, size) for _, start, size in structures], offsets, sizes)
    _punch(image.store, ((start, end - start) for start, end in gaps.remaining()))
