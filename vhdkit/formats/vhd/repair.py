# SPDX-License-Identifier: Apache-2.0
"""The repair of a damaged VHD: the writes, made to a draft of it.

Decides what may be repaired, what requires consent, and what cannot be repaired. Writes nothing into the file: how
the draft gets there, atomically, is decided in `chain.verbs.repair`, and so is everything about parents.

    footers -> header -> locators -> BAT -> space and trailing footer -> geometry      each builds on those before

- What is stored twice is restored from the other place: a footer from its copy, the copy from the footer.
- What is stored once and wrong is restored only if the rest of the file confirms it (a header's checksum).
- An impossible BAT entry is cleared, with consent: its block then reads as zeros, or as the parent's.
- Overlapping blocks are separated: only what they share is doubtful (`untangle`).
- The mark of another program that writes (0xC7, `v_poison`) is removed only if the user confirms that it has died.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from vhdkit.errors import CorruptImage, CorruptReason, printable
from vhdkit.formats.draft import DraftStore
from vhdkit.formats.format import Consent, Fix
from vhdkit.formats.spans import joined, of_blocks
from vhdkit.formats.vhd import batmap, geometry, layout
from vhdkit.formats.vhd.bat import ENTRIES_PER_SECTOR, Bat
from vhdkit.formats.vhd.check import (
    LEAK_BYTES,
    MAX_FREED_BYTES,
    gaps,
    has_spare_entries,
    held_bytes,
    is_much,
    spare_of_fixed,
)
from vhdkit.formats.vhd.entries import bad_entries
from vhdkit.formats.vhd.footers import FooterState
from vhdkit.formats.vhd.last_block import bits_past_end, wrong_batmap_bits
from vhdkit.formats.vhd.layout import BAT_UNALLOCATED, FOOTER_SIZE, HEADER_SIZE
from vhdkit.formats.vhd.locator import NO_PLATFORM, encode_parent_name
from vhdkit.formats.vhd.metadata import Metadata, read_metadata
from vhdkit.formats.vhd.move import batmap_lies_apart
from vhdkit.formats.vhd.places import end_of_structures, nominal_end
from vhdkit.formats.vhd.repair_footers import DEAD, is_sound, mend_footers
from vhdkit.formats.vhd.untangle import Tangle
from vhdkit.units import SECTOR_SIZE, format_size, round_down, round_up, sectors_to_bytes

LOSS = "--accept-data-loss"
CONVERT = "vhdkit convert"  # it reads the image as it is, and writes one where nothing overlaps
COMPACT = "vhdkit compact"  # it moves blocks into such space
BY_HAND = "a copy by hand"


def repair_vhd(draft: DraftStore, consent: Consent) -> list[Fix]:
    """Repair the image in `draft`; returns what was fixed or could be, in order.

    What cannot be repaired is left: `check_vhd` reports it afterwards. Raises IoFailed.
    """
    fixes = list(mend_footers(draft, consent))
    if any(one.needs == DEAD for one in fixes):
        return fixes  # the program that left the mark may be changing any part of it
    fixes += _mend_header(draft, consent)
    try:
        metadata = read_metadata(draft)
    except CorruptImage:
        return fixes
    if metadata.header is None:
        fixes += _free_fixed(draft, metadata)
    else:
        fixes += _clear_stray_locators(draft, metadata)
        fixes += _name_parent(draft, read_metadata(draft))
        metadata = read_metadata(draft)
        mended = list(_mend_table(draft, metadata, consent))
        fixes += mended
        if not any(one.needs for one in mended):
            fixes += _settle_end(draft, read_metadata(draft), keep_space=bool(mended))
            fixes += _clear_promises(draft, read_metadata(draft))
    fixes += _mend_geometry(draft)
    return fixes


# -- header and locators ----------------------------------------------------------------------------------------------


def _mend_header(draft: DraftStore, consent: Consent) -> Iterator[Fix]:
    """A header of which only the checksum is wrong. It has no second copy, so the rest of the file must confirm it."""
    try:
        read_metadata(draft)
        return
    except CorruptImage as error:
        if error.reason is not CorruptReason.HEADER_CHECKSUM or error.offset_bytes is None:
            return
        offset = error.offset_bytes
    trial = DraftStore(draft)
    raw = layout.sealed(draft.pread(offset, HEADER_SIZE), layout.HEADER_CHECKSUM_OFFSET)
    trial.pwrite(offset, raw)
    if not is_sound(trial):
        return
    metadata = read_metadata(trial)
    assert metadata.header is not None
    bat = Bat.load(trial, metadata.header.table_offset, metadata.block_count)
    sure = metadata.header.max_table_entries == metadata.block_count and not list(gaps(metadata, bat))
    if not sure and not consent.data_loss:
        yield Fix(
            "header-checksum",
            "the header's checksum is wrong, and its block size or table does not quite fit the rest of the file:"
            " using it as it is may show wrong data",
            LOSS,
        )
        return
    draft.pwrite(offset, raw)
    reason = "the rest of the file agrees with it" if sure else "used as it is, as you requested"
    yield Fix("header-checksum", f"corrected the header's checksum: {reason}")


def _clear_stray_locators(draft: DraftStore, metadata: Metadata) -> Iterator[Fix]:
    """Locators whose text would lie outside the file: they are useless, and the file may grow to there."""
    assert metadata.header is not None
    stray = {one.slot for one in metadata.stray_locators()}
    if not stray:
        return
    entries = tuple(
        replace(entry, platform_code=NO_PLATFORM, data_space=0, data_length=0, data_offset=0)
        if slot in stray
        else entry
        for slot, entry in enumerate(metadata.header.parent_locators)
    )
    draft.pwrite(metadata.footer.data_offset, layout.build_header(replace(metadata.header, parent_locators=entries)))
    slots = ", ".join(str(slot + 1) for slot in sorted(stray))
    yield Fix("locator-outside-file", f"parent locator {slots} pointed outside the file: cleared")


def _name_parent(draft: DraftStore, metadata: Metadata) -> Iterator[Fix]:
    """A blank name in the header, although locators have one."""
    texts = [one.text for one in metadata.locators if one.text]
    if metadata.header is None or not metadata.is_differencing or metadata.parent_name or not texts:
        return
    name = texts[0].replace("/", "\\").rsplit("\\", 1)[-1]
    if not name:
        return
    header = replace(metadata.header, parent_unicode_name=encode_parent_name(name))
    draft.pwrite(metadata.footer.data_offset, layout.build_header(header))
    yield Fix("parent-name", f"the header now names the parent {printable(name)}, as the locators do")


# -- the table --------------------------------------------------------------------------------------------------------


def _mend_table(draft: DraftStore, metadata: Metadata, consent: Consent) -> Iterator[Fix]:
    """Clear entries that point outside the file; separate blocks from headers and other blocks."""
    assert metadata.header is not None
    bat = Bat.load(draft, metadata.header.table_offset, metadata.block_count)
    outside = dict(bad_entries(metadata, bat)).get(CorruptReason.BLOCK_OUTSIDE_FILE, np.zeros(0, dtype=np.intp))
    cleared = np.zeros(len(bat), dtype=np.bool_)
    cleared[outside] = True
    bat.entries[outside] = BAT_UNALLOCATED
    tangle = Tangle(draft, metadata, bat)
    plan = tangle.plan()
    cleared[plan.dropped] = True
    dropped = of_blocks(cleared, metadata.header.block_size, metadata.size_bytes)
    lost = tuple(joined([*dropped, *plan.lost]))
    shows = "their parent's content" if metadata.is_differencing else "zeros"
    blocks = int(cleared.sum()) + plan.cut_count
    message = f"{blocks} blocks have impossible places: {format_size(sum(s for _, s in lost))} of the disk"
    if lost and not consent.data_loss:
        yield Fix("bat", f"{message} would show {shows}", LOSS, lost, tuple(plan.doubtful))
        return
    if plan.too_much:
        yield Fix("blocks-overlap", "too many blocks overlap to be separated in place", CONVERT)
    if not lost and not plan.moved:
        return
    end = tangle.end_of(plan, max(nominal_end(metadata, bat), draft.size()))
    if plan.moved and end > sectors_to_bytes(BAT_UNALLOCATED):
        yield Fix("blocks-overlap", "blocks overlap, and cannot be moved past the 2 TiB that a VHD may have", CONVERT)
        return
    if plan.moved:
        _clear_the_end(draft, metadata, bat)
        plan = tangle.plan()  # again, for the present content
        end = tangle.apply(draft, plan, max(nominal_end(metadata, bat), round_up(draft.size(), SECTOR_SIZE)))
        if metadata.tail.state.usable:
            draft.pwrite(end, metadata.footer_raw)
    bat.entries[cleared] = BAT_UNALLOCATED
    _write_entries(draft, bat, [*np.flatnonzero(cleared).tolist(), *plan.moved])
    if lost:
        yield Fix("bat", f"{message} now shows {shows}", None, lost, () if plan.moved else tuple(plan.doubtful))
    if plan.moved:
        shared = format_size(sum(size for _, size in plan.doubtful))
        done = f"separated {len(plan.moved)} blocks that overlapped others or headers"
        yield Fix("blocks-overlap", f"{done}; {shared} that they shared may be wrong", None, (), tuple(plan.doubtful))


def _write_entries(draft: DraftStore, bat: Bat, blocks: list[int]) -> None:
    """Write the sectors of the table with these entries."""
    for number in sorted({block // ENTRIES_PER_SECTOR for block in blocks}):
        first = number * ENTRIES_PER_SECTOR
        raw = bat.entries[first : first + ENTRIES_PER_SECTOR].astype(">u4").tobytes()
        draft.pwrite(bat.sector_offset(number), raw)


def _clear_the_end(draft: DraftStore, metadata: Metadata, bat: Bat) -> None:
    """Before the file grows: clear what follows a truncated block, so that it reads as zeros, not as a footer."""
    size, end = draft.size(), nominal_end(metadata, bat)
    if metadata.tail.state.usable and metadata.tail.offset_bytes < end:
        draft.punch(metadata.tail.offset_bytes, size - metadata.tail.offset_bytes)
    elif not metadata.tail.state.usable and size < end and size % SECTOR_SIZE:
        draft.punch(round_down(size, SECTOR_SIZE), SECTOR_SIZE)


def _clear_promises(draft: DraftStore, metadata: Metadata) -> Iterator[Fix]:
    """Bits past the end of the disk, and bits of a batmap for blocks that are not whole."""
    assert metadata.header is not None
    bat = Bat.load(draft, metadata.header.table_offset, metadata.block_count)
    if any(len(blocks) for _, blocks in bad_entries(metadata, bat)):
        return
    bits = bits_past_end(draft, metadata, bat)
    if bits is not None:
        draft.pwrite(bits.offset_bytes, bits.cleared)
        yield Fix("bits-past-end", f"cleared {bits.count} bits past the end of the disk")
    blocks = wrong_batmap_bits(draft, metadata, bat)
    if len(blocks) and batmap_lies_apart(metadata, bat) and batmap.clear_bits(draft, metadata, blocks):
        yield Fix("batmap", f"the batmap no longer marks {len(blocks)} blocks as full that are not")


# -- space ------------------------------------------------------------------------------------------------------------


def _free_fixed(draft: DraftStore, metadata: Metadata) -> Iterator[Fix]:
    """Zeros after the footer of a fixed disk, and bytes before it, unless other programs read them as data."""
    footer_end = metadata.tail.offset_bytes + len(metadata.tail.raw)
    padding = draft.size() - footer_end
    if padding:
        draft.truncate(footer_end)
        yield Fix("padding", f"cut off {padding} bytes of zeros after the footer")
    data_end = spare_of_fixed(metadata)
    if data_end is None:
        return
    spare = metadata.tail.offset_bytes - data_end
    if is_much(draft, data_end, spare):
        yield Fix(
            "trailing-space",
            f"there are {format_size(spare)} of data between the disk and its footer",
            "a copy by hand",
        )
        return
    raw = metadata.footer_raw
    draft.truncate(data_end)
    draft.pwrite(data_end, raw)
    yield Fix("trailing-space", f"cut off {spare} bytes between the data and the footer")


def _settle_end(draft: DraftStore, metadata: Metadata, *, keep_space: bool) -> Iterator[Fix]:
    """Put the trailing footer after everything, and free unreferenced space (not with `keep_space`)."""
    assert metadata.header is not None
    bat = Bat.load(draft, metadata.header.table_offset, metadata.block_count)
    end = end_of_structures(metadata, bat)
    keep_space |= has_spare_entries(draft, metadata)
    if not metadata.tail.state.usable:
        yield from _restore_tail(draft, metadata, bat, end, keep_space=keep_space)
    elif metadata.tail.offset_bytes < end:
        # The footer is inside a block: the rest of the block becomes zeros.
        draft.punch(metadata.tail.offset_bytes, draft.size() - metadata.tail.offset_bytes)
        draft.pwrite(end, metadata.footer_raw)
        yield Fix("block-cut", "extended a truncated block with zeros, and put the footer after it")
    elif metadata.tail.offset_bytes - end >= LEAK_BYTES and not keep_space:
        spare = metadata.tail.offset_bytes - end
        message = f"{format_size(spare)} after the last block are unreferenced"
        if held_bytes(draft, end, spare) > MAX_FREED_BYTES:
            yield Fix("leaked-space", message, COMPACT)
        else:
            draft.truncate(end)
            draft.pwrite(end, metadata.footer_raw)
            yield Fix("leaked-space", f"{message}: freed")
    if not keep_space:
        yield from _free_gaps(draft, read_metadata(draft), bat, end)


def _restore_tail(draft: DraftStore, metadata: Metadata, bat: Bat, end: int, *, keep_space: bool) -> Iterator[Fix]:
    """Write a new trailing footer: after the last structure, or after everything if that must stay."""
    tail, size = metadata.tail, draft.size()
    if size < nominal_end(metadata, bat) and size % SECTOR_SIZE:  # the file ends inside a block
        draft.punch(round_down(size, SECTOR_SIZE), SECTOR_SIZE)  # a partial sector reads as zeros
    behind = max(size - end, 0)
    place = max(end, round_up(size, SECTOR_SIZE))
    if not keep_space and held_bytes(draft, end, behind) <= MAX_FREED_BYTES:
        place = end
    elif tail.state is not FooterState.ABSENT and tail.offset_bytes >= end and tail.offset_bytes % SECTOR_SIZE == 0:
        place = tail.offset_bytes  # over the damaged one
    draft.truncate(place)
    draft.pwrite(place, metadata.footer_raw)
    yield Fix("footer", f"the trailing footer was {tail.state}: restored from its copy")
    if behind > FOOTER_SIZE and place == end:
        yield Fix("trailing-garbage", f"cut off {behind} unreferenced bytes after the last structure")


def _free_gaps(draft: DraftStore, metadata: Metadata, bat: Bat, end: int) -> Iterator[Fix]:
    """Make unreferenced space between blocks, before `end`, a hole."""
    inner = [(offset, size) for offset, size in gaps(metadata, bat) if offset < end]
    sizes = [(offset, size, held_bytes(draft, offset, size)) for offset, size in inner]
    found = [one for one in sizes if one[2] >= LEAK_BYTES]
    data = sum(held for _, _, held in found)
    if not found:
        return
    if data > MAX_FREED_BYTES:
        yield Fix("leaked-space", f"{format_size(data)} between blocks are unreferenced", COMPACT)
        return
    for offset, size, _ in found:
        draft.punch(offset, size)
    yield Fix("leaked-space", f"{format_size(data)} between blocks were unreferenced: made a hole")


# -- geometry ---------------------------------------------------------------------------------------------------------


def _mend_geometry(draft: DraftStore) -> Iterator[Fix]:
    """Cylinders, heads and sectors that describe more than the disk, or less than they should."""
    try:
        metadata = read_metadata(draft)
    except CorruptImage:
        return
    if not metadata.tail.state.usable or geometry.size_is_chs(metadata.footer):
        return  # the geometry defines the size, so it must not change
    shape, wanted = geometry.footer_geometry(metadata.footer), geometry.geometry_for(metadata.size_bytes)
    if shape == geometry.NO_GEOMETRY or wanted.size_bytes <= shape.size_bytes <= metadata.size_bytes:
        return
    cylinders, heads, sectors = wanted
    footer = replace(metadata.footer, cylinders=cylinders, heads=heads, sectors_per_track=sectors)
    if geometry.virtual_size(footer, metadata.tail.offset_bytes) != metadata.size_bytes:
        return  # a creator whose disks are as large as their geometry, which was zero
    raw = layout.build_footer(footer)
    draft.pwrite(metadata.tail.offset_bytes, raw[: len(metadata.tail.raw)])
    if metadata.copy is not None:
        draft.pwrite(0, raw)
    yield Fix("geometry", f"changed {'/'.join(map(str, shape))} to {'/'.join(map(str, wanted))}, which the size gives")
