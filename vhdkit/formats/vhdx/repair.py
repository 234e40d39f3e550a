# SPDX-License-Identifier: Apache-2.0
"""The repair of a damaged VHDX: the writes, made to a draft of it.

Decides the order of the parts, and which of them wait for another. Writes nothing into the file: how the draft gets
there, atomically, is decided in `chain.verbs.repair`, and so is everything about parents.

    identifier -> headers -> log -> region tables -> metadata table -> locator -> BAT and bitmaps -> a log

Each part builds on those before it, so the first one that waits for consent ends the repair.

- What is stored twice is restored from the other place: a header, a region table.
- What is stored once is restored only if the rest of the file confirms it, or with consent.
- A file made by a newer program is left alone: it is not damaged.
- A repaired file has a new FileWriteGuid. Its DataWriteGuid stays, so children still recognise the image.
"""

from __future__ import annotations

from collections.abc import Iterator

from vhdkit.errors import CorruptImage
from vhdkit.formats.draft import DraftStore
from vhdkit.formats.format import Consent, Fix
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.bat import Bat
from vhdkit.formats.vhdx.entries import end_of_blocks
from vhdkit.formats.vhdx.header import current_slot, read_headers
from vhdkit.formats.vhdx.identify import FILE_IDENTIFIER, has_identifier
from vhdkit.formats.vhdx.metadata import Metadata, read_metadata
from vhdkit.formats.vhdx.repair_blocks import mend_blocks
from vhdkit.formats.vhdx.repair_headers import LOSS, mend_headers, mend_identifier, mend_missing_log, stamp
from vhdkit.formats.vhdx.repair_locator import mend_locator
from vhdkit.formats.vhdx.repair_log import mend_log
from vhdkit.formats.vhdx.repair_regions import has_metadata, mend_regions, mend_table
from vhdkit.formats.vhdx.stray_bits import stray_bits
from vhdkit.units import MIB, round_up


def repair_vhdx(draft: DraftStore, consent: Consent) -> list[Fix]:
    """Repair the image in `draft`; returns what was fixed or could be, in order.

    What cannot be repaired is left: `check_vhdx` reports it afterwards. Raises IoFailed, InvalidArgument for a repair
    that is too large.
    """
    fixes = _mended(draft, consent)
    if any(one.needs is None for one in fixes):
        stamp(draft)
    return fixes


def _mended(draft: DraftStore, consent: Consent) -> list[Fix]:
    if draft.size() <= layout.HEADER_SECTION_SIZE:
        return []  # nothing of a disk is in it
    fixes = list(mend_identifier(draft))
    if not has_identifier(draft):
        if not has_metadata(draft):
            return []
        if not consent.data_loss:
            message = "neither identifier, nor headers, nor region tables are there, but metadata of a VHDX are"
            return [Fix("file-identifier", message, LOSS)]
        draft.pwrite(0, FILE_IDENTIFIER)
        fixes.append(Fix("file-identifier", "the file begins as a VHDX does again: it has the metadata of one"))
    for part in (mend_headers, mend_log, mend_regions):
        fixes += part(draft, consent)
        if any(one.needs for one in fixes) or current_slot(read_headers(draft)) is None:
            return fixes  # what follows could be wrong
    fixes += mend_table(draft)
    fixes += mend_locator(draft, consent)
    try:
        metadata = read_metadata(draft)
    except CorruptImage:
        return fixes
    mended = list(mend_blocks(draft, metadata, consent))
    if not any(one.needs for one in mended):
        mended += _settle(draft, read_metadata(draft))
        mended += mend_missing_log(draft)
    return fixes + mended


def _settle(draft: DraftStore, metadata: Metadata) -> Iterator[Fix]:
    """What only wastes space or misleads other programs, once every block has its place."""
    bat = Bat.load(draft, metadata.regions.bat.file_offset, metadata.shape)
    end = round_up(end_of_blocks(metadata, bat), MIB)
    if draft.size() < end:
        draft.reserve(end - 1, 1)
        yield Fix("block-cut", "the file ended inside its last block, behind the end of the disk: extended with zeros")
    found = [one for one in stray_bits(metadata, bat) if not one.past_end]
    for one in found:
        for offset, raw in one.writes:
            draft.pwrite(offset, raw)
    if found:
        yield Fix("bits-absent", f"cleared {sum(one.count for one in found)} bits of blocks that are not present")
