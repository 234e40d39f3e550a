# SPDX-License-Identifier: Apache-2.0
"""Header and parent names: before the first block, where other programs expect them.

Decides where they go and which blocks make way; the order in which this happens is decided in `switch` and `move`.
XenServer treats an image as invalid if a block begins before the last of its structures ends.

    0        512       1536     4096                                   the first block
    | copy   | header  | free   | BAT, batmap ...   | names  | free   | bitmap, data ...

The names take the place of the old ones if they fit there, otherwise the first free sectors: in our own images there
are some between header and BAT, and after the BAT. If there are too few, the blocks that follow the structures move
away, as they do for a longer BAT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vhdkit.formats.vhd import layout
from vhdkit.formats.vhd.bat import Bat
from vhdkit.formats.vhd.dynamic import NO_END, DynamicImage
from vhdkit.formats.vhd.layout import DynamicHeader, Footer
from vhdkit.formats.vhd.locator import MAX_LOCATOR_BYTES, Locator
from vhdkit.formats.vhd.metadata import Metadata
from vhdkit.formats.vhd.move import (
    Packing,
    block_space,
    cut_end,
    free_ranges,
    move_blocks,
    plan_clearing,
    punch_free,
)
from vhdkit.formats.vhd.opening import open_dynamic
from vhdkit.formats.vhd.places import block_starts, end_of_structures, fixed_ranges, nominal_end
from vhdkit.formats.vhd.switch import in_use, switch_header
from vhdkit.units import SECTOR_SIZE, round_up

_HOME = layout.FOOTER_SIZE  # of the header, in nearly every image: right after the footer copy


@dataclass(frozen=True, slots=True)
class Front:
    """Offsets of the header and of each name in bytes, and the blocks that move to make room for them."""

    header_offset: int
    offsets: tuple[int, ...]
    packing: Packing | None = None


def after_first_block(metadata: Metadata, bat: Bat) -> list[tuple[str, int]]:
    """(name, offset) of the header and the parent's names that end after the beginning of a block."""
    starts = block_starts(bat)
    if not len(starts):
        return []
    first = int(starts.min())
    places = [("dynamic header", metadata.footer.data_offset, layout.HEADER_SIZE)]
    places += [(one.structure, one.data_offset_bytes, one.data_length_bytes) for one in _movable(metadata)]
    return [(name, offset) for name, offset, size in places if offset + size > first]


def _movable(metadata: Metadata) -> list[Locator]:
    """The locators whose text is in the file and has a possible length."""
    stray = metadata.stray_locators()
    return [one for one in metadata.locators if one not in stray and 0 < one.data_length_bytes <= MAX_LOCATOR_BYTES]


def settle_front(image: DynamicImage) -> bool:
    """Move header and names before the first block where necessary. True when the image was changed: then close it.

    Raises as `write_front` does.
    """
    metadata, header = image.metadata, image.metadata.header
    assert header is not None
    if not after_first_block(metadata, image.bat):
        return False
    entries, texts = list(header.parent_locators), []
    for one in _movable(metadata):
        raw = image.store.pread(one.data_offset_bytes, one.data_length_bytes)
        raw = raw.ljust(round_up(len(raw), SECTOR_SIZE), b"\0")
        entries[one.slot] = replace(entries[one.slot], data_space=len(raw))
        texts.append((one.slot, raw))
    write_front(image, replace(header, parent_locators=tuple(entries)), texts)
    return True


def write_front(
    image: DynamicImage, header: DynamicHeader, texts: Sequence[tuple[int, bytes]], *, footer: Footer | None = None
) -> None:
    """Write this header and its names into an image opened for writing, before the first block; and `footer` if given.

    `texts` are (slot of the locator, bytes), whole sectors; the offsets in their entries are ignored.
    Raises NoSpace, IoFailed, SyncFailed; the image then has its old header and names or the new ones. Close it.
    """
    front, vacated = find_room(image, [len(raw) for _, raw in texts]), []
    if front.packing is not None:
        old = [image.bat.block_start(block) for block in front.packing.blocks.tolist()]
        vacated = [(start, start + block_space(image)) for start in old]
        move_blocks(image, front.packing)
    entries = list(header.parent_locators)
    for (slot, _), offset in zip(texts, front.offsets, strict=True):
        entries[slot] = replace(entries[slot], data_offset=offset)
    placed = [(offset, raw) for offset, (_, raw) in zip(front.offsets, texts, strict=True)]
    end = _end_without_old_names(image)
    header = replace(header, parent_locators=tuple(entries))
    switch_header(image, header, footer=footer, texts=placed, home_bytes=front.header_offset)
    if vacated or end is not None:
        settled = open_dynamic(image.store, writable=True)
        punch_free(settled, vacated)
        if end is not None:
            cut_end(settled, max(end, end_of_structures(settled.metadata, settled.bat)))


def _end_without_old_names(image: DynamicImage) -> int | None:
    """Where the file can end without the old names, if they, or the old header, are the last in it."""
    tail = round_up(image.store.size() - layout.FOOTER_SIZE, SECTOR_SIZE)
    last = nominal_end(replace(image.metadata, footer=replace(image.metadata.footer, data_offset=_HOME)), image.bat)
    behind = [one for one in in_use(image) if last <= one[0] < tail]
    if not behind or round_up(max(end for _, end in behind), SECTOR_SIZE) != tail:
        return None
    return min(start for start, _ in behind)


def find_room(image: DynamicImage, sizes: Sequence[int]) -> Front:
    """Where the header and names of these sizes, whole sectors, go.

    Raises NoSpace if a block would have to move to a place that no BAT entry can express.
    """
    metadata, starts = image.metadata, block_starts(image.bat)
    limit = int(starts.min()) if len(starts) else NO_END
    taken = list(fixed_ranges(metadata, image.bat))
    wanted, home = [*sizes], None
    for place in (_HOME, metadata.footer.data_offset):
        if place + layout.HEADER_SIZE <= limit and not _in_way(place, place + layout.HEADER_SIZE, taken):
            home = place
            taken.append((place, place + layout.HEADER_SIZE))
            break
    else:
        wanted.insert(0, layout.HEADER_SIZE)
    old = [start for start, end in in_use(image)[1:] if end <= limit]
    free = list(free_ranges(taken, 0, limit))
    offsets = _fit(_from(free, round_up(min(old), SECTOR_SIZE)), wanted) if old else None
    offsets = offsets or _fit(free, wanted)
    packing = None
    if offsets is None:
        start, total = 0, sum(wanted)
        while (blocked := _in_way(start, start + total, taken)) is not None:
            start = round_up(blocked, SECTOR_SIZE)
        packing = plan_clearing(image, start, start + total)
        offsets = _fit([(start, start + total)], wanted)
    assert offsets is not None
    return Front(home, tuple(offsets), packing) if home is not None else Front(offsets[0], tuple(offsets[1:]), packing)


def _in_way(start: int, end: int, taken: Sequence[tuple[int, int]]) -> int | None:
    """The end of a taken range that shares bytes with this one, or None."""
    return next((high for low, high in taken if low < end and high > start), None)


def _from(free: Sequence[tuple[int, int]], preferred: int) -> list[tuple[int, int]]:
    """Free ranges in the order of their use: from a preferred place on, then from the beginning."""
    behind = [(max(start, preferred), end) for start, end in free if end > preferred]
    return behind + [(start, min(end, preferred)) for start, end in free if start < preferred]


def _fit(free: Sequence[tuple[int, int]], sizes: Sequence[int]) -> list[int] | None:
    """An offset for each size, the first one that fits; None without space for all."""
    ranges, offsets = list(free), []
    for size in sizes:
        found = next((index for index, (start, end) in enumerate(ranges) if end - start >= size), None)
        if found is None:
            return None
        start, end = ranges[found]
        offsets.append(start)
        ranges[found] = (start + size, end)
    return offsets
