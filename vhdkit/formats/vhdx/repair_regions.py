# SPDX-License-Identifier: Apache-2.0
"""The repair of a VHDX's region tables and of its metadata table.

Decides which region table is right, and what can be found without one. Must not know blocks, except to ask whether a
BAT is possible (`entries`). A repair is made to a draft (`repair`); headers and log are repaired before this.

- A damaged table is written anew from the other one.
- Tables with wrong checksums are used if they agree, or if the rest of the file confirms one of them.
- Without a table, the metadata are searched for at every MiB, by their signature or the ids of their items, and then a
  BAT that accounts for the data in the file. The result is used with consent, and only if it is unambiguous.
- The metadata are stored once and without a checksum: only the signature and count of their table can be restored.

Source: [MS-VHDX] 2.2.3, 2.6.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from vhdkit.errors import CorruptImage, CorruptReason
from vhdkit.formats.draft import DraftStore
from vhdkit.formats.format import Consent, Fix
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.bat import ENTRIES_PER_PAGE, Shape
from vhdkit.formats.vhdx.crc import sealed
from vhdkit.formats.vhdx.entries import is_possible_page, read_bat, unused_data
from vhdkit.formats.vhdx.header import current_slot, read_headers
from vhdkit.formats.vhdx.items import read_items
from vhdkit.formats.vhdx.layout import MetadataTableHeader, RegionEntry
from vhdkit.formats.vhdx.metadata import read_metadata
from vhdkit.formats.vhdx.regions import build_table, read_table, table_name, table_state
from vhdkit.formats.vhdx.repair_headers import LOSS
from vhdkit.units import GIB, MIB, format_size, round_up

BY_HAND = "a copy by hand"
_LOOK = "vhdkit dump shows what is left of every structure"
_MAX_PLACES = 1 << 20  # mebibytes with data that are examined: 1 TiB in all
_MAX_FOUND = 16  # metadata regions that are tried; a guest may hold files that look like one
_MAX_ZERO_PAGES = 256  # 1 MiB of zeros, which a file system may store as data
_MAX_READ_BYTES = GIB  # of what may be a BAT
_MIN_UNUSED_BYTES = MIB  # of data outside all structures; more show that the table is wrong


def mend_regions(draft: DraftStore, consent: Consent) -> Iterator[Fix]:
    """Leave two equal tables that lead to the metadata, if that is possible."""
    tables = [read_table(draft, copy) for copy in range(2)]
    states = [table_state(raw) for raw in tables]
    good = [copy for copy in range(2) if states[copy] == "good"]
    reasons = {copy: _fault(_with_table(draft, tables[copy])) for copy in good}
    if CorruptReason.REGION_REQUIRED in reasons.values():
        return  # made by a newer program
    leading = [copy for copy in good if reasons[copy] is None] or good[:1]
    if good and (reasons[leading[0]] is None or not _is_of_regions(reasons[leading[0]])):
        copy = leading[0]
        if tables[0] == tables[1]:
            return
        _write_tables(draft, tables[copy])
        other = 1 - copy
        if states[other] == "good":
            why = "with which the image can be read" if copy or reasons.get(other) else "which is the one that is used"
            message = f"{table_name(other)} differed: made it equal to the other one, {why}"
            yield Fix("region-tables-differ", message)
        else:
            message = f"{table_name(other)} was damaged ({states[other]}): written anew from the other one"
            yield Fix("region-table-damaged", message)
        return
    if not good:
        done = list(_use_unsealed(draft, tables, consent))
        if done:
            yield from done
            return
    lost = "no region table leads to the metadata and the BAT" if good else "no region table is intact"
    yield from _search(draft, lost, consent)


def _is_of_regions(reason: CorruptReason | None) -> bool:
    """Whether the fault is in the table itself, and not in what it leads to."""
    return reason in (
        CorruptReason.REGION_TABLE,
        CorruptReason.REGION_ENTRY,
        CorruptReason.REGION_OUTSIDE_FILE,
        CorruptReason.STRUCTURES_OVERLAP,
    )


def _fault(store: DraftStore) -> CorruptReason | None:
    try:
        read_metadata(store)
    except CorruptImage as error:
        return error.reason
    return None


def _with_table(draft: DraftStore, raw: bytes) -> DraftStore:
    trial = DraftStore(draft)
    _write_tables(trial, raw)
    return trial


def _write_tables(draft: DraftStore, raw: bytes) -> None:
    for offset in layout.REGION_TABLE_OFFSETS:
        draft.pwrite(offset, raw)


def _use_unsealed(draft: DraftStore, tables: list[bytes], consent: Consent) -> Iterator[Fix]:
    """Use tables in which only the checksum, or little more, is wrong."""
    whole = []
    for raw in tables:
        named = layout.REGION_SIGNATURE + raw.ljust(layout.REGION_TABLE_SIZE, b"\0")[len(layout.REGION_SIGNATURE) :]
        whole.append(sealed(named, layout.HEADER_CHECKSUM_OFFSET))
    readable = [raw for raw in dict.fromkeys(whole) if _fault(_with_table(draft, raw)) is None]
    if not readable:
        return
    message = "corrected the checksums of the region tables"
    if whole[0] == whole[1]:
        _write_tables(draft, whole[0])
        yield Fix("region-table", f"{message}, which agree otherwise")
        return
    sure = [raw for raw in readable if _accounts_for_all(_with_table(draft, raw))]
    if len(sure) == 1 or consent.data_loss:
        chosen = (sure or readable)[0]
        _write_tables(draft, chosen)
        reason = "the rest of the file confirms them" if len(sure) == 1 else "used as they are, with your consent"
        yield Fix("region-table", f"{message}: {reason}")
        return
    yield Fix(
        "region-table", "neither region table is intact; with one used as it is, the disk may show wrong data", LOSS
    )


def _accounts_for_all(store: DraftStore) -> bool:
    """Whether the image can be read, and no data lie outside its structures."""
    try:
        metadata = read_metadata(store)
        bat = read_bat(metadata)
    except CorruptImage:
        return False
    return any(True for _ in bat.used()) and unused_data(metadata, bat, _MIN_UNUSED_BYTES) < _MIN_UNUSED_BYTES


# -- without a table --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Metadata:
    """A metadata region whose items can be read; `draft` has a corrected header of their table if it needs one."""

    draft: DraftStore
    region: RegionEntry


@dataclass(frozen=True, slots=True)
class _Found:
    """Regions that may be the image's; `unused_bytes` of data belong to nothing that they lead to."""

    bat: RegionEntry
    metadata: RegionEntry
    unused_bytes: int
    block_count: int


def _search(draft: DraftStore, lost: str, consent: Consent) -> Iterator[Fix]:
    """Find the metadata and the BAT by their content. `lost` is what is wrong with the region tables."""
    places = _places(draft)
    if places is None:
        yield Fix(
            "region-table", f"{lost}, and more than 1 TiB of data would have to be searched for regions", BY_HAND
        )
        return
    tables = _metadata_tables(draft, places)
    if not tables:
        message = (
            f"{lost}, and no metadata were found: without the sizes of disk, blocks and sectors, nothing says which"
        )
        yield Fix("region-table", f"{message} part of the disk a block is ({_LOOK})", BY_HAND)
        return
    found = _candidates(draft, places, tables)
    found.sort(key=lambda one: (one.unused_bytes, -one.block_count))
    if not found:
        items, place = read_items(tables[0].draft, tables[0].region), tables[0].region.file_offset
        disk = f"a disk of {items.size_bytes} bytes in blocks of {format_size(items.block_size)}"
        message = (
            f"{lost}; the metadata at byte {place:#x} ({disk}) can be read, but no BAT was found that fits the file"
        )
        yield Fix("region-table", f"{message} ({_LOOK})", BY_HAND)
        return
    best = found[0]
    if len(found) > 1 and found[1].unused_bytes - best.unused_bytes < _MIN_UNUSED_BYTES:
        yield Fix("region-table", f"{lost}, and several places may hold the BAT ({_LOOK})", BY_HAND)
        return
    where = f"metadata at byte {best.metadata.file_offset:#x}, BAT at byte {best.bat.file_offset:#x}"
    if not consent.data_loss:
        message = f"{lost}; with the regions that were found ({where}) the disk may show wrong data"
        yield Fix("region-table", message, LOSS)
        return
    _write_tables(draft, build_table([best.bat, best.metadata]))
    draft.reserve(best.bat.file_offset + best.bat.length - 1, 1)
    yield Fix("region-table", f"made new region tables for the regions that were found: {where}")


def _places(draft: DraftStore) -> list[int] | None:
    """The offsets, on whole MiB, at which the file may hold data; None for more than are examined."""
    places: list[int] = []
    start = layout.HEADER_SECTION_SIZE
    for offset, size, may_hold_data in draft.data_runs(start, max(draft.size() - start, 0)):
        if not may_hold_data:
            continue
        first = offset - offset % MIB
        more = range(first + MIB if places and places[-1] == first else first, offset + size, MIB)
        if len(places) + len(more) > _MAX_PLACES:  # before they are listed: some file systems know no holes
            return None
        places += more
    return places


def _candidates(file: DraftStore, places: list[int], tables: list[_Metadata]) -> list[_Found]:
    """Every pair of regions with which the image could be read; `places` and `tables` are those found in the file."""
    budget = _MAX_READ_BYTES
    found = []
    for table in tables:
        draft, region = table.draft, table.region
        items = read_items(draft, region)
        shape = Shape(items.size_bytes, items.block_size, items.logical_sector_bytes, has_parent=items.has_parent)
        length = round_up(shape.entry_count * layout.BAT_ENTRY_SIZE, MIB)
        for start in places:
            if start + length > file.size() or not _may_be_table(draft, start, shape):
                continue
            budget -= length
            if budget < 0:
                return []
            bat = RegionEntry(layout.REGION_BAT, start, length, layout.REGION_REQUIRED)
            one = _judge(draft, bat, region)
            if one is None:
                continue
            if one.block_count and one.unused_bytes < _MIN_UNUSED_BYTES:
                return [one]  # it accounts for everything in the file, so it is unambiguous
            found.append(one)
        if not found:
            found += _empty(draft, region, length)
    return found


def _empty(draft: DraftStore, metadata: RegionEntry, length: int) -> list[_Found]:
    """The regions of a disk without blocks, whose BAT of zeros may lie anywhere, if the file holds no other data."""
    taken = [(metadata.file_offset, metadata.length)]
    places = read_headers(draft)
    slot = current_slot(places)
    if slot is not None:
        taken.append((places[slot].header.log_offset, places[slot].header.log_length))
    start = layout.HEADER_SECTION_SIZE
    for offset, size in sorted(taken):
        if offset < start + length:
            start = max(start, offset + size)
    one = _judge(draft, RegionEntry(layout.REGION_BAT, start, length, layout.REGION_REQUIRED), metadata)
    return [one] if one is not None and not one.unused_bytes and not one.block_count else []


def has_metadata(draft: DraftStore) -> bool:
    """Whether the file has a readable metadata region, whatever its first MiB holds."""
    return bool(_metadata_tables(draft, _places(draft) or []))


def _metadata_tables(draft: DraftStore, places: list[int]) -> list[_Metadata]:
    """The readable metadata regions at these places, those with the signature of a metadata table first."""
    signed, unsigned, stored = [], [], layout.stored_guid(layout.ITEM_VIRTUAL_DISK_SIZE)
    for place in places:
        raw = draft.pread(place, layout.LOG_PAGE_SIZE)
        if raw.startswith(layout.METADATA_SIGNATURE):
            signed.append(place)
        elif stored in raw:
            unsigned.append(place)
    tables = (_metadata_at(draft, place) for place in (*signed[:_MAX_FOUND], *unsigned[:_MAX_FOUND]))
    return [one for one in tables if one is not None]


def _metadata_at(draft: DraftStore, place: int) -> _Metadata | None:
    """The metadata region at this offset, as long as its items need, or None.

    If the items cannot be read with the header of their table as it is, a corrected one is tried.
    """
    mended = DraftStore(draft)
    mended.pwrite(place, _table_header(draft, place))
    entry = RegionEntry(layout.REGION_METADATA, place, MIB, layout.REGION_REQUIRED)
    for trial in (draft, mended):
        for length in (MIB, 2 * MIB, 4 * MIB):
            region = replace(entry, length=length)
            try:
                read_items(trial, region)
            except CorruptImage:
                continue
            return _Metadata(trial, region)
    return None


def _may_be_table(draft: DraftStore, start: int, shape: Shape) -> bool:
    """Whether the first page that is not all zeros may belong to a BAT. After many pages of zeros it is assumed."""
    size = shape.entry_count * layout.BAT_ENTRY_SIZE
    pages = 0
    for offset, length, may_hold_data in draft.data_runs(start, size):
        position = offset - (offset - start) % layout.LOG_PAGE_SIZE
        while may_hold_data and position < offset + length:
            raw = draft.pread(position, min(layout.LOG_PAGE_SIZE, start + size - position))
            if raw.strip(b"\0"):
                first = (position - start) // layout.BAT_ENTRY_SIZE
                assert first % ENTRIES_PER_PAGE == 0
                return is_possible_page(shape, first, raw, draft.size())
            position += layout.LOG_PAGE_SIZE
            pages += 1
            if pages == _MAX_ZERO_PAGES:
                return True
    return False


def _judge(draft: DraftStore, bat: RegionEntry, metadata: RegionEntry) -> _Found | None:
    """What these regions lead to; None if the image cannot be read with them."""
    trial = _with_table(draft, build_table([bat, metadata]))
    trial.reserve(bat.file_offset + bat.length - 1, 1)
    try:
        picture = read_metadata(trial)
        table = read_bat(picture)
    except CorruptImage:
        return None
    blocks = sum(len(numbers) for numbers, _ in table.used())
    return _Found(bat, metadata, unused_data(picture, table, None), blocks)


# -- the metadata table -----------------------------------------------------------------------------------------------


def mend_table(draft: DraftStore) -> Iterator[Fix]:
    """Correct a wrong signature or count of the metadata table, if all items are then found."""
    try:
        read_metadata(draft)
        return
    except CorruptImage as error:
        reasons = (CorruptReason.METADATA_TABLE, CorruptReason.ITEM_MISSING, CorruptReason.ITEM_PLACE)
        if error.reason not in reasons:
            return
    entry = _metadata_entry(draft)
    if entry is None:
        return
    header = _table_header(draft, entry.file_offset)
    trial = DraftStore(draft)
    trial.pwrite(entry.file_offset, header)
    if _fault(trial) is None:
        draft.pwrite(entry.file_offset, header)
        yield Fix("metadata-table", "corrected the header of the metadata table; all items are intact")


def _metadata_entry(draft: DraftStore) -> RegionEntry | None:
    """The metadata region in region table 1, if its table lies inside the file."""
    raw = read_table(draft, 0)
    for start in range(layout.REGION_TABLE_HEADER_SIZE, layout.REGION_TABLE_SIZE, layout.REGION_ENTRY_SIZE):
        entry = layout.parse_region_entry(raw[start : start + layout.REGION_ENTRY_SIZE].ljust(32, b"\0"))
        if entry.guid == layout.REGION_METADATA and entry.file_offset + layout.METADATA_TABLE_SIZE <= draft.size():
            return entry
    return None


def _table_header(draft: DraftStore, place: int) -> bytes:
    """What the header of the metadata table at this offset must be, judged by the entries that follow it."""
    count = _count(draft.pread(place, layout.METADATA_TABLE_SIZE))
    return layout.build_metadata_table(MetadataTableHeader(layout.METADATA_SIGNATURE, 0, count, bytes(20)))


def _count(raw: bytes) -> int:
    """The number of entries before the first one that is all zeros."""
    count = 0
    for start in range(layout.METADATA_TABLE_HEADER_SIZE, len(raw), layout.METADATA_ENTRY_SIZE):
        if not any(raw[start : start + layout.METADATA_ENTRY_SIZE]):
            break
        count += 1
    return min(count, layout.MAX_ITEMS)
