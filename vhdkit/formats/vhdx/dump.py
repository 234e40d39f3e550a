# SPDX-License-Identifier: Apache-2.0
"""The raw structures of a VHDX, field by field with their offsets, whether they are valid or not.

Decides how a field is shown. For people and tools that examine damaged files: no value is refused here. Structures of
which the log holds a newer version are shown as they are in the file.
"""

from __future__ import annotations

import uuid
from typing import Any

from vhdkit.errors import CorruptImage
from vhdkit.formats.format import FieldValue, StructureDump
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.header import HeaderPlace, HeaderState, current_slot, read_headers
from vhdkit.formats.vhdx.identify import FILE_IDENTIFIER
from vhdkit.formats.vhdx.items import Item, read_table
from vhdkit.formats.vhdx.layout import RegionEntry
from vhdkit.formats.vhdx.locator import parse_locator
from vhdkit.formats.vhdx.log import Entry
from vhdkit.formats.vhdx.regions import name_of, parse_entries, table_name, table_state
from vhdkit.formats.vhdx.regions import read_table as read_region_table
from vhdkit.formats.vhdx.replay import log_entries, log_place, read_log
from vhdkit.store import ReadStore

_SHOWN_BYTES = 32
_MAX_ENTRIES = 64  # of a log that cannot be replayed
_GUIDS = ("guid", "item_id", "file_write_guid", "data_write_guid", "log_guid", "locator_type")


def dump_vhdx(store: ReadStore) -> list[StructureDump]:
    """Every structure that is found, intact or not. Raises IoFailed."""
    raw = store.pread(0, layout.CREATOR_OFFSET + layout.CREATOR_SIZE)
    creator = raw[layout.CREATOR_OFFSET :].decode("utf-16-le", "replace").split("\0", 1)[0]
    identifier = (
        FieldValue("signature", 0, layout.CREATOR_OFFSET, repr(raw[: layout.CREATOR_OFFSET])[1:]),
        FieldValue("creator", layout.CREATOR_OFFSET, layout.CREATOR_SIZE, repr(creator)),
    )
    good = "good" if raw.startswith(FILE_IDENTIFIER) else "no identifier here"
    dumps = [StructureDump("file type identifier", 0, good, identifier)]
    places = read_headers(store)
    current = current_slot(places)
    for place in places:
        state = "current" if place.slot == current else str(place.state)
        fields = _fields("header", place.offset_bytes, place.header) if place.state is not HeaderState.OUTSIDE else ()
        dumps.append(StructureDump(place.structure, place.offset_bytes, state, fields))
    if current is not None:
        dumps += _dump_log(store, current)
    return dumps + _dump_regions(store)


def _dump_log(store: ReadStore, current: int) -> list[StructureDump]:
    """The entries that must be replayed, or why they cannot be."""
    place = read_headers(store)[current]
    offset = place.header.log_offset
    try:
        replay = read_log(store, place)
    except CorruptImage as error:
        return [StructureDump("log", offset, error.problem, ()), *_dump_rest_of_log(store, place)]
    return [] if replay is None else [_dump_entry(offset, one, "not replayed") for one in replay.entries]


def _dump_rest_of_log(store: ReadStore, place: HeaderPlace) -> list[StructureDump]:
    """The entries that are intact in a log that cannot be replayed."""
    try:
        log_range = log_place(store, place)
    except CorruptImage:
        return []
    entries = log_entries(store, log_range, place.header.log_guid)
    return [_dump_entry(log_range[0], entries[at], "intact") for at in sorted(entries)[:_MAX_ENTRIES]]


def _dump_entry(log_offset: int, entry: Entry, state: str) -> StructureDump:
    offset = log_offset + entry.offset_bytes
    fields = _fields("log entry", offset, entry.header)
    return StructureDump(f"log entry {entry.header.sequence_number}", offset, state, fields)


def _dump_regions(store: ReadStore) -> list[StructureDump]:
    dumps: list[StructureDump] = []
    found: list[tuple[bool, RegionEntry]] = []  # (whether the table is intact, where it says that the metadata lie)
    for copy, start in enumerate(layout.REGION_TABLE_OFFSETS):
        raw = read_region_table(store, copy)
        state = table_state(raw)
        if len(raw) < layout.REGION_TABLE_SIZE:
            dumps.append(StructureDump(table_name(copy), start, state, ()))
            continue
        fields = _fields("region table", start, layout.parse_region_table(raw[: layout.REGION_TABLE_HEADER_SIZE]))
        dumps.append(StructureDump(table_name(copy), start, state, fields))
        try:
            entries = parse_entries(store.name, raw, copy) if raw.startswith(layout.REGION_SIGNATURE) else []
        except CorruptImage:
            continue
        for number, one in enumerate(entries):
            place = start + layout.REGION_TABLE_HEADER_SIZE + number * layout.REGION_ENTRY_SIZE
            name = f"{table_name(copy)}, entry {number + 1} ({name_of(one)})"
            dumps.append(StructureDump(name, place, state, _fields("region table entry", place, one)))
            if one.guid == layout.REGION_METADATA:
                found.append((state == "good", one))
    found.sort(key=lambda one: not one[0])
    return dumps + _dump_metadata(store, found[0][1]) if found else dumps


def _dump_metadata(store: ReadStore, region: RegionEntry) -> list[StructureDump]:
    start = region.file_offset
    if start + layout.METADATA_TABLE_SIZE > store.size():
        return [StructureDump("metadata table", start, "outside the file", ())]
    raw = store.pread(start, layout.METADATA_TABLE_HEADER_SIZE)
    state, items = "good", []
    try:
        items = read_table(store, region)
    except CorruptImage as error:
        state = error.problem
    fields = _fields("metadata table", start, layout.parse_metadata_table(raw))
    dumps = [StructureDump("metadata table", start, state, fields)]
    for number, item in enumerate(items):
        place = start + layout.METADATA_TABLE_HEADER_SIZE + number * layout.METADATA_ENTRY_SIZE
        entry = _fields("metadata table entry", place, item.entry)
        value = FieldValue("value", item.offset_bytes, item.entry.length, _value(item))
        dumps.append(StructureDump(item.structure, place, "good", (*entry, value)))
        if item.entry.item_id == layout.ITEM_PARENT_LOCATOR and not item.is_user:
            dumps.append(_dump_locator(store, item))
    return dumps


def _value(item: Item) -> str:
    numbers = (
        layout.ITEM_VIRTUAL_DISK_SIZE,
        layout.ITEM_LOGICAL_SECTOR_SIZE,
        layout.ITEM_PHYSICAL_SECTOR_SIZE,
    )
    if not item.is_user and item.entry.item_id in numbers:
        return _shown("value", int.from_bytes(item.raw, "little"))
    if not item.is_user and item.entry.item_id == layout.ITEM_FILE_PARAMETERS:
        block_size, flags = int.from_bytes(item.raw[:4], "little"), int.from_bytes(item.raw[4:8], "little")
        return f"block size {_shown('value', block_size)}, flags {flags:#x}"
    if not item.is_user and item.entry.item_id == layout.ITEM_VIRTUAL_DISK_ID and len(item.raw) == 16:
        return str(uuid.UUID(bytes=layout.read_guid(item.raw)))
    return f"{item.entry.length} bytes"


def _dump_locator(store: ReadStore, item: Item) -> StructureDump:
    start = item.offset_bytes
    try:
        pairs = parse_locator(item.raw, store.name, start)
    except CorruptImage as error:
        return StructureDump("parent locator", start, error.problem, ())
    fields = _fields("parent locator", start, layout.parse_locator_header(item.raw[: layout.LOCATOR_HEADER_SIZE]))
    texts = tuple(FieldValue(key, start, len(item.raw), repr(value)) for key, value in pairs.items())
    return StructureDump("parent locator", start, "good", (*fields, *texts))


def _fields(structure: str, offset: int, values: object) -> tuple[FieldValue, ...]:
    return tuple(
        FieldValue(one.name, offset + one.offset_bytes, one.size_bytes, _shown(one.name, getattr(values, one.name)))
        for one in layout.STRUCTURES[structure]
    )


def _shown(name: str, value: Any) -> str:
    if name in _GUIDS:
        return str(uuid.UUID(bytes=value))
    if isinstance(value, int):
        return f"{value} ({value:#x})"
    assert isinstance(value, bytes)
    if not any(value):
        return f"{len(value)} zero bytes"
    return repr(value[:_SHOWN_BYTES])[1:] + ("..." if len(value) > _SHOWN_BYTES else "")
