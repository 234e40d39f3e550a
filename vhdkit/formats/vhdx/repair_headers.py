# SPDX-License-Identifier: Apache-2.0
"""The repair of a VHDX's first bytes and headers, on which the rest of a repair depends.

Decides what a lost header can be restored from, and how certain the result is. Must not know what the log holds
(`repair_log`). A repair is made to a draft (`repair`); this is its first step.

- The identifier is restored if a header or a region table is intact: only a VHDX has their signatures and checksums.
- A damaged header is written anew from the other one.
- If both checksums are wrong, a header is used as it is if both headers agree, or if the log and the file confirm it.
- Lost headers are replaced, with consent, by new ones with new ids and an empty log: changes in the log are lost.

Source: [MS-VHDX] 2.2.1, 2.2.2.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import replace

from vhdkit.errors import CorruptImage
from vhdkit.formats.draft import DraftStore
from vhdkit.formats.format import Consent, Fix
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.bat import Bat
from vhdkit.formats.vhdx.crc import sealed
from vhdkit.formats.vhdx.entries import end_of_structures, read_bat
from vhdkit.formats.vhdx.header import HeaderPlace, HeaderState, current_slot, is_dirty, read_headers
from vhdkit.formats.vhdx.identify import FILE_IDENTIFIER, has_identifier
from vhdkit.formats.vhdx.layout import Header
from vhdkit.formats.vhdx.metadata import read_metadata
from vhdkit.formats.vhdx.regions import read_table, table_state
from vhdkit.formats.vhdx.replay import is_applied, log_place, read_log
from vhdkit.image import NULL_ID
from vhdkit.store import ReadStore, Store
from vhdkit.units import MIB, round_up

LOSS = "--accept-data-loss"
NEW_LOG_BYTES = MIB
_LAST_NUMBER = (1 << 64) - 4  # two headers get the next two


def mend_identifier(draft: DraftStore) -> Iterator[Fix]:
    """Restore the first bytes of the file if the rest proves that it is a VHDX."""
    if has_identifier(draft):
        return
    headers = [one.state is HeaderState.GOOD for one in read_headers(draft)]
    tables = [table_state(read_table(draft, copy)) == "good" for copy in range(2)]
    if any(headers) or any(tables):
        draft.pwrite(0, FILE_IDENTIFIER)
        proof = "headers" if any(headers) else "region tables"
        yield Fix(
            "file-identifier", f"wrote the file type identifier of a VHDX again: the {proof} prove that it is one"
        )


def mend_headers(draft: DraftStore, consent: Consent) -> Iterator[Fix]:
    """Leave two intact headers that agree, if their content can be determined."""
    places = read_headers(draft)
    slot = current_slot(places)
    if slot is None:
        yield from _rescue(draft, places, consent)
        return
    current, other = places[slot], places[1 - slot]
    if current.header.version != layout.HEADER_VERSION:
        return  # made by a newer program
    if other.state is not HeaderState.GOOD:
        done = f"{other.structure} was damaged ({other.state}): written anew from the other one"
        yield Fix("header-damaged", done)
    elif other.raw == current.raw:
        done = "both headers had the same number, as Disk2VHD leaves them: gave each its own"
        yield Fix("headers-equal", done)
    elif other.header.data_write_guid != current.header.data_write_guid:
        yield Fix(
            "headers-differ", f"{other.structure} had another DataWriteGuid: gave it the ids of the current header"
        )
    else:
        return
    write_headers(draft, current.header)


def write_headers(store: Store, header: Header) -> None:
    """Write `header` to both slots, with the next numbers; the second slot is then current, as Windows leaves it."""
    number = header.sequence_number if header.sequence_number < _LAST_NUMBER else 0
    for slot, offset in enumerate(layout.HEADER_OFFSETS):
        whole = replace(header, signature=layout.HEADER_SIGNATURE, sequence_number=number + 1 + slot)
        raw = layout.build_header(whole).ljust(layout.HEADER_SIZE, b"\0")
        store.pwrite(offset, sealed(raw, layout.HEADER_CHECKSUM_OFFSET))


def stamp(draft: DraftStore) -> None:
    """Give the repaired file a new FileWriteGuid, as every session that writes does; its log and other ids stay."""
    places = read_headers(draft)
    slot = current_slot(places)
    if slot is not None and places[slot].header.version == layout.HEADER_VERSION:
        write_headers(draft, replace(places[slot].header, file_write_guid=uuid.uuid4().bytes))


def is_sound(store: ReadStore) -> bool:
    """Whether the image can be read."""
    try:
        read_bat(read_metadata(store))
    except CorruptImage:
        return False
    return True


def mend_missing_log(draft: DraftStore) -> Iterator[Fix]:
    """Give a sound file without a log an empty one: in the usual place if that is free, else at the end of the file.

    Every block must have its place first: a block outside the file must not come to lie inside as the file grows.
    """
    metadata = read_metadata(draft)
    if metadata.log[1]:
        return
    usual = layout.HEADER_SECTION_SIZE
    with_log = replace(metadata.header, log_offset=usual, log_length=NEW_LOG_BYTES)
    if draft.size() < usual + NEW_LOG_BYTES or not is_sound(_with_header(draft, with_log)):
        bat = Bat.load(draft, metadata.regions.bat.file_offset, metadata.shape)
        end = round_up(max(draft.size(), end_of_structures(metadata, bat)), MIB)
        with_log = replace(with_log, log_offset=end)
    draft.reserve(with_log.log_offset, NEW_LOG_BYTES)
    write_headers(draft, with_log)
    yield Fix("log-missing", "made an empty log, without which the image can only be read")


def without_log(header: Header) -> Header:
    """The same header for a file that has no log for the moment."""
    return replace(header, log_guid=NULL_ID, log_offset=0, log_length=0)


def _new_header(data_write_guid: bytes) -> Header:
    """A header without a log."""
    return Header(
        layout.HEADER_SIGNATURE,
        0,
        0,
        uuid.uuid4().bytes,
        data_write_guid if any(data_write_guid) else uuid.uuid4().bytes,
        NULL_ID,
        layout.LOG_VERSION,
        layout.HEADER_VERSION,
        0,
        0,
    )


# -- neither header is current ----------------------------------------------------------------------------------------


def _rescue(draft: DraftStore, places: tuple[HeaderPlace, HeaderPlace], consent: Consent) -> Iterator[Fix]:
    """Neither header is current: use their content as far as the rest of the file confirms it."""
    usable = [one for one in places if _is_possible(draft, one)]
    if len(usable) == 2 and _agree(usable[0].header, usable[1].header):
        newest = max(usable, key=lambda one: one.header.sequence_number).header
        write_headers(draft, newest)
        message = "corrected the checksums of both headers, which agree otherwise"
        yield Fix("header-checksum", message)
        return
    if all(one.state is HeaderState.GOOD for one in places):
        code, fact = "header-pair", "both headers are intact and have the same number, but differ"
    else:
        code, fact = "header-checksum", f"neither header is intact ({places[0].state}, {places[1].state})"
    proven = [one for one in usable if _is_proven(draft, one.header)]
    if len(proven) == 1:
        write_headers(draft, proven[0].header)
        yield Fix(code, f"{fact}: used {proven[0].structure}, which the log and the rest of the file confirm")
        return
    sound = [one for one in usable if is_sound(_with_header(draft, one.header))]
    chosen = next(iter(sound or usable), None)
    if not consent.data_loss:
        would = f"would use {chosen.structure} as it is" if chosen is not None else "would make new ones"
        why = "the last writes may be lost with the log, and children may not recognise the image"
        yield Fix(code, f"{fact}; {would}: {why}", LOSS)
        return
    if chosen is not None:
        write_headers(draft, chosen.header)
        yield Fix(code, f"{fact}: used {chosen.structure} as it is")
        return
    known = _data_write_guid(places)
    write_headers(draft, _new_header(known))
    children = "children still recognise the image" if any(known) else "its children need `vhdkit rebase`"
    yield Fix(code, f"{fact}: made new ones; changes in the log are lost, and {children}")


def _agree(first: Header, second: Header) -> bool:
    """Whether two headers agree apart from numbers and checksums, which always differ."""
    return replace(first, sequence_number=0, checksum=0) == replace(second, sequence_number=0, checksum=0)


def _is_possible(draft: DraftStore, place: HeaderPlace) -> bool:
    """Whether the fields of a header are possible, whatever its checksum."""
    header = place.header
    if place.state not in (HeaderState.GOOD, HeaderState.CHECKSUM) or header.version != layout.HEADER_VERSION:
        return False
    try:
        log_place(draft, place)
    except CorruptImage:
        return False
    return any(header.data_write_guid) and header.log_version == layout.LOG_VERSION


def _is_proven(draft: DraftStore, header: Header) -> bool:
    """Whether the image can be read with this header without losing anything in its log."""
    trial = _with_header(draft, header)
    places = read_headers(trial)
    try:
        if not is_dirty(header):
            return is_sound(trial) and is_applied(trial, log_place(trial, places[1]))
        return read_log(trial, places[1]) is not None and is_sound(trial)
    except CorruptImage:
        return False


def _with_header(draft: DraftStore, header: Header) -> DraftStore:
    trial = DraftStore(draft)
    write_headers(trial, header)
    return trial


def _data_write_guid(places: tuple[HeaderPlace, HeaderPlace]) -> bytes:
    """The DataWriteGuid on which two damaged headers agree, or zeros."""
    first, second = (one.header.data_write_guid for one in places)
    return first if first == second else NULL_ID
