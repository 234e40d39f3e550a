# SPDX-License-Identifier: Apache-2.0
"""Changing the virtual size of a VHD.

Decides the content of footers and header for the new size, where a longer BAT goes, and the order. Must not judge
whether a disk may shrink: the caller (`chain.verbs.resize`) ensures that nothing of value lies after the new end.

A dynamic or differencing image (blocks move by `move`, header and footers change by `switch`):

    grow:    bytes after the old end -> zeros; blocks out of the way of the longer BAT; the BAT's new part   | sync
             header and footers                                                                             | switch
    shrink:  header and footers                                                                             | switch
             entries that are no longer needed; then the gaps are filled and the file is truncated          | move

Until the switch, the old header, BAT and size are valid, after it the new ones: a power cut leaves one or the other.

The BAT grows where it is if only blocks are in its way; otherwise it is moved to the first place where only blocks
are (after the locators, say). Moving the few blocks there costs little, while a BAT at the end of the file
would keep the file from ever becoming shorter.

A fixed image has one footer, so no order is safe: `fixed_writes` returns the changes, and `chain.records.pending`
makes them atomic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from vhdkit.errors import InvalidArgument
from vhdkit.formats.vhd import batmap, geometry, layout
from vhdkit.formats.vhd.create import CREATOR_APPLICATION, CREATOR_HOST_OS, CREATOR_VERSION
from vhdkit.formats.vhd.dynamic import DynamicImage
from vhdkit.formats.vhd.last_block import bits_past_end
from vhdkit.formats.vhd.layout import BAT_ENTRY_SIZE, FOOTER_SIZE, DynamicHeader, Footer
from vhdkit.formats.vhd.metadata import Metadata, batmap_header_offset
from vhdkit.formats.vhd.move import (
    Indices,
    Packing,
    block_space,
    clear_batmap,
    cut_end,
    move_blocks,
    plan_clearing,
    plan_packing,
    punch_free,
)
from vhdkit.formats.vhd.opening import open_dynamic
from vhdkit.formats.vhd.places import end_of_structures, structure_ranges, table_range
from vhdkit.formats.vhd.switch import switch_header
from vhdkit.units import PAGE_SIZE, SECTOR_SIZE, round_up

_FREE_ENTRY = b"\xff" * BAT_ENTRY_SIZE


@dataclass(frozen=True, slots=True)
class GrowPlan:
    """How the BAT grows: the new header, the range of the BAT and what follows it, the blocks that move away."""

    header: DynamicHeader
    start_bytes: int
    end_bytes: int
    packing: Packing
    table_bytes: int


def resized_footer(footer: Footer, size_bytes: int) -> Footer:
    """`footer` for a disk of `size_bytes`.

    Both sizes are set, since some programs use the original one. A creator whose size is cylinders x heads x sectors
    would shorten the disk, so it is replaced by ours; any other creator stays.
    """
    shape = geometry.geometry_for(size_bytes)
    resized = replace(
        footer,
        original_size=size_bytes,
        current_size=size_bytes,
        cylinders=shape.cylinders,
        heads=shape.heads,
        sectors_per_track=shape.sectors_per_track,
    )
    if geometry.size_is_chs(resized):
        resized = replace(
            resized,
            creator_application=CREATOR_APPLICATION,
            creator_version=CREATOR_VERSION,
            creator_host_os=CREATOR_HOST_OS,
        )
    assert geometry.virtual_size(resized, size_bytes) == size_bytes
    return resized


def fixed_writes(metadata: Metadata, size_bytes: int) -> tuple[list[tuple[int, bytes]], int]:
    """The (offset, bytes) that change a fixed image's size, and the file size afterwards.

    The old footer becomes zeros; the new one comes right after the data.
    """
    footer = layout.build_footer(resized_footer(metadata.footer, size_bytes))
    old = metadata.tail
    return [(old.offset_bytes, bytes(len(old.raw))), (size_bytes, footer)], size_bytes + FOOTER_SIZE


def plan_grow(image: DynamicImage, size_bytes: int) -> GrowPlan:
    """Where the BAT for a larger disk goes, and which blocks move out of its way.

    Raises NoSpace, and InvalidArgument if a last block past the disk's end has no space to become whole.
    """
    metadata, header = image.metadata, image.metadata.header
    assert header is not None
    _check_last_block(image)
    count = -(-size_bytes // image.block_size_bytes)
    table_bytes = round_up(count * BAT_ENTRY_SIZE, SECTOR_SIZE)
    others = [place for place in structure_ranges(metadata, image.bat) if place[0] != header.table_offset]
    start, end = header.table_offset, header.table_offset + table_bytes
    # The batmap follows the table's stated length. It keeps its place only where spare entries are enough.
    if _first_in_way(start, end, others) is not None or (metadata.batmap and count > header.max_table_entries):
        others.append((start, start + metadata.block_count * BAT_ENTRY_SIZE))  # in use until the switch
        length = table_bytes
        if metadata.batmap is not None:
            length += layout.BATMAP_HEADER_SIZE + batmap.map_size(count)
        start = round_up(layout.FOOTER_SIZE + layout.HEADER_SIZE, PAGE_SIZE)
        while (blocked := _first_in_way(start, start + length, others)) is not None:
            start = round_up(blocked, PAGE_SIZE)
        end = start + length
        count_stated = count
    else:
        count_stated = max(count, header.max_table_entries)
    wanted = replace(header, table_offset=start, max_table_entries=count_stated)
    return GrowPlan(wanted, start, end, plan_clearing(image, start, end), table_bytes)


def _check_last_block(image: DynamicImage) -> None:
    """Refuse to make the last block whole if another structure begins in the part that the disk does not use."""
    start = image.bat.block_start(len(image.bat) - 1)
    used = image.size_bytes - (len(image.bat) - 1) * image.block_size_bytes
    end = start + block_space(image)
    unused = end - (image.block_size_bytes - used)
    if start < 0 or unused == end:
        return
    others = image.bat.entries[:-1][image.allocated_blocks()[:-1]].astype(np.int64) * SECTOR_SIZE
    block = bool(((others < end) & (others >= unused)).any())
    if block or any(low < end and high > unused for low, high in structure_ranges(image.metadata, image.bat)):
        raise InvalidArgument(
            "the last block cannot become whole: another structure begins in the part that the disk does not use",
            path=image.store.name,
            structure=f"block {len(image.bat) - 1}",
            offset_bytes=unused,
            hint="convert it to a new image and resize that",
        )


def _first_in_way(start: int, end: int, others: list[tuple[int, int]]) -> int | None:
    """The end of one of the others that shares bytes with this range, or None."""
    return next((high for low, high in others if low < end and high > start), None)


def grow_dynamic(
    image: DynamicImage, size_bytes: int, plan: GrowPlan, moved: Callable[[int], None] | None = None
) -> None:
    """Make the disk larger. The image, opened for writing, still has the old size: close it.

    Raises NoSpace, IoFailed, SyncFailed; the disk then has its old size, or the new one, and every byte.
    """
    store, metadata = image.store, image.metadata
    last = image.bat.block_start(len(image.bat) - 1)
    used = image.size_bytes - (len(image.bat) - 1) * image.block_size_bytes
    if last >= 0 and used < image.block_size_bytes:
        # These bytes were not part of the disk until now; they must read as zeros.
        end = last + block_space(image)
        store.punch(end - (image.block_size_bytes - used), image.block_size_bytes - used)
    vacated = _vacated(image, plan)
    move_blocks(image, plan.packing, moved)
    _give_way(image, plan.end_bytes)
    for offset, raw in _table_writes(image, plan):
        store.pwrite(offset, raw)
    store.sync()
    switch_header(image, plan.header, footer=resized_footer(metadata.footer, size_bytes))
    _tidy(image, vacated)


def _vacated(image: DynamicImage, plan: GrowPlan) -> list[tuple[int, int]]:
    """(offset, end) of the places that blocks, table and batmap leave when they move."""
    starts = [image.bat.block_start(block) for block in plan.packing.blocks.tolist()]
    ranges = [(start, start + block_space(image)) for start in starts]
    table = table_range(image.metadata, image.bat)
    return ranges if plan.start_bytes == table[0] else [*ranges, table, *batmap.ranges(image.metadata)]


def _give_way(image: DynamicImage, end_bytes: int) -> None:
    """Move the trailing footer after `end_bytes`; the copy serves the image in the meantime."""
    store = image.store
    if store.size() - FOOTER_SIZE < end_bytes:
        size_before = store.size()
        try:
            store.reserve(size_before, end_bytes + FOOTER_SIZE - size_before)
        except BaseException:
            store.truncate(size_before)
            raise
        store.pwrite(end_bytes, image.metadata.footer_raw)
        store.sync()


def _table_writes(image: DynamicImage, plan: GrowPlan) -> list[tuple[int, bytes]]:
    """The BAT's new part, or all of it in its new place with the batmap after it."""
    metadata = image.metadata
    assert metadata.header is not None
    known = len(image.bat) * BAT_ENTRY_SIZE
    if plan.start_bytes == metadata.header.table_offset:
        return [(plan.start_bytes + known, b"\xff" * (plan.table_bytes - known))]
    entries = image.bat.entries.astype(">u4").tobytes()
    writes = [(plan.start_bytes, entries.ljust(plan.table_bytes, b"\xff"))]
    if metadata.batmap is not None:
        place = batmap_header_offset(plan.header)
        old = batmap.read_map(image.store, metadata)
        raw_header, raw = batmap.moved(metadata.batmap, old, place, plan.header.max_table_entries)
        writes.append((place, raw_header + raw))
    return writes


def shrink_dynamic(image: DynamicImage, size_bytes: int, moved: Callable[[int], None] | None = None) -> None:
    """Make the disk and its file smaller. The image, opened for writing, is unusable afterwards: close it.

    Nothing of value may lie after the new end. Raises NoSpace, IoFailed, SyncFailed; the disk then has its old size,
    or the new one.
    """
    metadata = image.metadata
    assert metadata.header is not None
    count = -(-size_bytes // image.block_size_bytes)
    entries = count if metadata.batmap is None else metadata.header.max_table_entries  # the map keeps its place
    header = replace(metadata.header, max_table_entries=entries)
    switch_header(image, header, footer=resized_footer(metadata.footer, size_bytes))
    gone = len(image.bat) - count
    # What is past the new end is not owned, and a block that reaches past it is not whole.
    clear_batmap(image, np.arange(size_bytes // image.block_size_bytes, len(image.bat), dtype=np.int64))
    if gone:
        place = metadata.header.table_offset + count * BAT_ENTRY_SIZE
        image.store.pwrite(place, _FREE_ENTRY * gone)
        image.store.sync()
    smaller = open_dynamic(image.store, writable=True)
    _clear_bits_past_end(smaller)
    packing = plan_packing(smaller)
    move_blocks(smaller, packing, moved)
    cut_end(smaller, packing.end_bytes)
    punch_free(smaller, [table_range(metadata, image.bat)])


def _clear_bits_past_end(image: DynamicImage) -> None:
    """In the last block, whose bits were valid as long as the disk was larger."""
    place = bits_past_end(image.store, image.metadata, image.bat)
    if place is not None:
        image.store.pwrite(place.offset_bytes, place.cleared)
        image.store.sync()


def plan_shrink(image: DynamicImage, size_bytes: int) -> tuple[int, int, int]:
    """(blocks dropped, blocks moved, end of the file's blocks) of a shrink, before it is done."""
    count = -(-size_bytes // image.block_size_bytes)
    allocated = np.flatnonzero(image.allocated_blocks()).astype(np.int64)
    dropped = allocated[allocated >= count]
    packing = plan_packing(image, dropped)
    return len(dropped), len(packing.blocks), packing.end_bytes


def _tidy(image: DynamicImage, vacated: list[tuple[int, int]]) -> None:
    """Free what the larger disk no longer needs: the end of the file, and the vacated places before it."""
    larger = open_dynamic(image.store, writable=True)
    packing = plan_packing(larger)
    # A block that fits into a vacated place moves there. What was free before is left to `compact`.
    if len(packing.blocks) and _lie_in(packing.targets, block_space(larger), vacated):
        move_blocks(larger, packing)
    cut_end(larger, end_of_structures(larger.metadata, larger.bat))
    punch_free(larger, vacated)


def _lie_in(starts: Indices, size: int, ranges: list[tuple[int, int]]) -> bool:
    """True when every place of that size shares bytes with one of the ranges."""
    return all(any(start < high and start + size > low for low, high in ranges) for start in starts.tolist())
