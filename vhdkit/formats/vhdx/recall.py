# SPDX-License-Identifier: Apache-2.0
"""What the notes of a VHDX contain, and when they do not belong to an image: see `formats.remember`.

Decides how a change of the metadata is noted, and what in an image contradicts its notes (`INV-ANSWERED-SURVIVES`).
Must not know what the files of notes show (`formats.recall`), nor in which order valid notes are written (`opening`).

A note describes a change of a block: the offsets of the bytes that changed in the BAT and in sector bitmaps, with
their old and new values. It also holds the state of the file at that moment: its FileWriteGuid, which every program
that opens the image for writing replaces, the log's id, and the number of the next log entry. Notes belong to an image
if

    FileWriteGuid        is the noted one, or derived from it: see `continued`
    log                  is the noted one, and has every entry that had been written by then
    each noted byte      has a value from before or after one of its changes
    after the changes    the BAT is possible, and every noted page lies in the BAT or in a sector bitmap
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from vhdkit.formats.recall import Note, give_up, recalled
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.bat import Bat
from vhdkit.formats.vhdx.entries import faults
from vhdkit.formats.vhdx.journal import Moment
from vhdkit.formats.vhdx.log import SECTOR
from vhdkit.formats.vhdx.metadata import Metadata
from vhdkit.image import ID_BYTES, NULL_ID
from vhdkit.store import Store
from vhdkit.units import MIB, round_down

NOTES_ID = NULL_ID  # a VHDX has no `file_id`
MAX_CONTINUATIONS = 1000  # processes killed one after the other while they wrote the notes of the first
_MOMENT = struct.Struct("<16s16sQ")  # `Moment`; changes follow
_CHANGE = struct.Struct("<QH")  # offset and number of the bytes; their old and new values follow
_BYTES_PER_ENTRY = layout.BAT_ENTRY_SIZE


class NotedBytes(NamedTuple):
    """A change of metadata bytes within one page of the file: their offset, and their old and new values."""

    offset: int
    before: bytes
    after: bytes


@dataclass(slots=True)
class Noted:
    """What a killed process had only in memory: BAT entries by number, pages of sector bitmaps by offset.

    `file_write_guid` is the FileWriteGuid under which they may be written.
    """

    entries: dict[int, int] = field(default_factory=dict)
    bits: dict[int, bytes] = field(default_factory=dict)
    file_write_guid: bytes = NULL_ID


@dataclass(slots=True)
class _Page:
    """A page of metadata: `stored` in the file, `now` with the noted changes; which bytes are noted, and agree."""

    stored: bytes
    now: bytearray
    noted: np.ndarray[tuple[int], np.dtype[np.bool_]]
    agrees: np.ndarray[tuple[int], np.dtype[np.bool_]]


def note_of(moment: Moment, changes: list[NotedBytes]) -> bytes:
    """The note for changes that belong together."""
    parts = [_MOMENT.pack(*moment)]
    for one in changes:
        parts += [_CHANGE.pack(one.offset, len(one.before)), one.before, one.after]
    return b"".join(parts)


def continued(file_write_guid: bytes) -> bytes:
    """The FileWriteGuid of a process that writes the notes of a dead process, from the FileWriteGuid of that one.

    It must be a new one, as whenever a file is opened for writing, but be recognised if this process is killed, too.
    """
    return hashlib.sha256(b"vhdkit notes" + file_write_guid).digest()[:ID_BYTES]


def recover(store: Store, metadata: Metadata, bat: Bat) -> Noted | None:
    """The valid notes for this image; neither the image nor `bat` is changed.

    None without notes, or if the image is evidently in another state: the notes are then set aside permanently. Raises
    as `recalled` does.
    """
    found = recalled(store, NOTES_ID)
    if not found:
        return None
    noted = Noted()
    problem = _contradiction(found, store, metadata, bat, noted)
    if problem is not None:
        give_up(store, NOTES_ID, problem)
        return None
    return noted


def _contradiction(found: list[Note], store: Store, metadata: Metadata, bat: Bat, noted: Noted) -> str | None:
    """Why the notes are not about this image, or that it has changed since; None if nothing contradicts them.

    Fills `noted`.
    """
    changes = [change for one in found for change in _changes_in(one.body)]
    if not changes:
        return "the notes are damaged"
    problem = _other_session(metadata, Moment(*_MOMENT.unpack_from(found[-1].body)))
    if problem is not None:
        return problem
    noted.file_write_guid = continued(metadata.header.file_write_guid)
    size, room = store.size(), metadata.items.block_size + 2 * MIB
    if size > found[-1].file_bytes + room:  # more than one half-made block
        return f"the file has another size, {size} bytes instead of {found[-1].file_bytes}"
    pages = _pages(changes, metadata)
    for place, page in pages.items():
        if (page.noted & ~page.agrees).any():
            return f"another program has changed the metadata at byte {place:#x}"
    return _apply(pages, metadata, noted)


def _changes_in(body: bytes) -> Iterator[NotedBytes]:
    position = _MOMENT.size
    while position + _CHANGE.size <= len(body):
        offset, size = _CHANGE.unpack_from(body, position)
        position += _CHANGE.size
        middle, end = position + size, position + 2 * size
        if end > len(body) or offset % SECTOR + size > SECTOR:
            return
        yield NotedBytes(offset, body[position:middle], body[middle:end])
        position = end


def _other_session(metadata: Metadata, moment: Moment) -> str | None:
    """How headers or log show that another program has written to the image since; None if they do not."""
    header, guid = metadata.header, moment.file_write_guid
    if header.file_write_guid != guid:
        for _ in range(MAX_CONTINUATIONS):
            guid = continued(guid)
            if header.file_write_guid == guid:
                return None  # and so it has a new log
        return "another program has opened it for writing since"
    if moment.log_guid == NULL_ID:
        return None  # the flush in progress has begun the log
    entries = () if metadata.replay is None else metadata.replay.entries
    if header.log_guid != moment.log_guid or not entries or entries[-1].header.sequence_number < moment.sequence - 1:
        return "its log is from another moment"
    return None


def _pages(changes: list[NotedBytes], metadata: Metadata) -> dict[int, _Page]:
    pages: dict[int, _Page] = {}
    for one in changes:
        place = round_down(one.offset, SECTOR)
        page = pages.get(place)
        if page is None:
            stored = metadata.view.pread(place, SECTOR).ljust(SECTOR, b"\0")
            falses = np.zeros(SECTOR, dtype=np.bool_)
            page = pages[place] = _Page(stored, bytearray(stored), falses, falses.copy())
        part = slice(one.offset - place, one.offset - place + len(one.after))
        stored_part = np.frombuffer(page.stored[part], dtype=np.uint8)
        page.noted[part] = True
        for known in (one.before, one.after):
            page.agrees[part] |= stored_part == np.frombuffer(known, dtype=np.uint8)
        page.now[part] = one.after
    return pages


def _apply(pages: dict[int, _Page], metadata: Metadata, noted: Noted) -> str | None:
    """Fill `noted` from the pages; returns why they are impossible, or None."""
    region, entry_count = metadata.regions.bat, metadata.shape.entry_count
    bat = Bat.load(metadata.view, region.file_offset, metadata.shape)
    for place, page in pages.items():
        if not region.file_offset <= place < region.file_offset + region.length:
            noted.bits[place] = bytes(page.now)
            continue
        first = (place - region.file_offset) // _BYTES_PER_ENTRY
        for within in np.flatnonzero(page.noted.reshape(-1, _BYTES_PER_ENTRY).any(axis=1)).tolist():
            number = first + within
            raw = page.now[within * _BYTES_PER_ENTRY : (within + 1) * _BYTES_PER_ENTRY]
            if number >= entry_count:
                return f"the BAT has no entry {number}"
            noted.entries[number] = int.from_bytes(raw, "little")
            bat.set(number, noted.entries[number])
    for fault in faults(metadata, bat):
        return fault.problem
    chunks = range(metadata.shape.chunk_count if metadata.items.has_parent else 0)
    bitmaps = {bat.bitmap_offset(chunk) for chunk in chunks}
    for place in noted.bits:
        if round_down(place, layout.BITMAP_BLOCK_SIZE) not in bitmaps:
            return f"no sector bitmap lies at byte {place:#x}"
    return None
