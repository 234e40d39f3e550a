# SPDX-License-Identifier: Apache-2.0
"""The repair of a damaged VHDX, made to a draft of the file.

Decides the order of the steps, and when a repair must stop early. Writes nothing to the file: `chain.verbs.repair`
decides how the draft is written there atomically, and everything about parents.

    identifier -> headers -> log -> region tables -> metadata table -> locator -> BAT and bitmaps -> a log

Each step builds on those before it, so the repair ends at the first step that needs consent.

- A header or region table, which are stored twice, is restored from its other copy.
- Structures that are stored once are restored only if the rest of the file confirms the result, or with consent.
- A file that needs a newer program is left alone: it is not damaged.
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
    """Repair the image in `draft`; returns in order what was fixed, or could be with consent.

    What cannot be repaired stays: `check_vhdx` reports it afterwards. Raises IoFailed, InvalidArgument for a repair
    that is too large.
    """
    fixes = _mended(draft, consent)
    if any(one.needs is None for one in fixes):
        stamp(draft)
    return fixes


def _mended(draft: DraftStore, consent: Consent) -> list[Fix]:
    if draft.size() <= layout.HEADER_SECTION_SIZE:
        return []  # too short to hold anything of a disk
    fixes = list(mend_identifier(draft))
    if not has_identifier(draft):
        if not has_metadata(draft):
            return []
        if not consent.data_loss:
            message = "the identifier, headers and region tables are lost, but the file has the metadata of a VHDX"
            return [Fix("file-identifier", message, LOSS)]
        draft.pwrite(0, FILE_IDENTIFIER)
        fixes.append(
            Fix("file-identifier", "wrote the file type identifier of a VHDX: the file has the metadata of one")
        )
    for part in (mend_headers, mend_log, mend_regions):
        fixes += part(draft, consent)
        if any(one.needs for one in fixes) or current_slot(read_headers(draft)) is None:
            return fixes  # later steps could rest on a wrong guess
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
    """Mend what only misleads other programs, once every block has its place."""
    bat = Bat.load(draft, metadata.regions.bat.file_offset, metadata.shape)
    end = round_up(end_of_blocks(metadata, bat), MIB)
    if draft.size() < end:
        draft.reserve(end - 1, 1)
        yield Fix(
            "block-cut", "the file ended inside its last block, past the end of the disk: extended it with zeros"
        )
    found = [one for one in stray_bits(metadata, bat) if not one.past_end]
    for one in found:
        for offset, raw in one.writes:
            draft.pwrite(offset, raw)
    if found:
        count = sum(one.count for one in found)
        yield Fix("bits-absent", f"cleared {count} {'bit' if count == 1 else 'bits'} of blocks that are not present")
