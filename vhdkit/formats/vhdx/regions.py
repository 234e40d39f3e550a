# SPDX-License-Identifier: Apache-2.0
"""The region tables of a VHDX: where the BAT, the metadata and other regions are.

Decides which of the two tables is used, and refuses unknown required regions and impossible places. Must not know what
is in a region.

Unknown regions that are not required stay where they are; nothing may be written over them.

Source: [MS-VHDX] 2.2.3.
"""

from __future__ import annotations

import itertools
import uuid
from dataclasses import dataclass
from typing import Any

from vhdkit.errors import CUT_SHORT_HINT, CorruptImage, CorruptReason
from vhdkit.finding import Finding, Severity
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.crc import is_sealed, sealed
from vhdkit.formats.vhdx.layout import RegionEntry, RegionTableHeader
from vhdkit.store import ReadStore

_KNOWN = {layout.REGION_BAT: "BAT region", layout.REGION_METADATA: "metadata region"}


@dataclass(frozen=True, slots=True)
class Regions:
    """The regions of a file; `findings` are about the table that was not used."""

    bat: RegionEntry
    metadata: RegionEntry
    others: tuple[RegionEntry, ...]
    findings: tuple[Finding, ...] = ()

    def places(self) -> list[tuple[str, int, int]]:
        """(name, offset, size) of every region, in bytes."""
        return [(name_of(one), one.file_offset, one.length) for one in (self.bat, self.metadata, *self.others)]


def name_of(region: RegionEntry) -> str:
    """The name of a region in messages."""
    return _KNOWN.get(region.guid, f"region {uuid.UUID(bytes=region.guid)}")


def table_name(copy: int) -> str:
    """The name of a region table in messages."""
    return f"region table {copy + 1}"


def table_state(raw: bytes) -> str:
    """The state of a region table as a whole: "good", or what is wrong with it."""
    if len(raw) < layout.REGION_TABLE_SIZE:
        return "outside the file"
    if not raw.startswith(layout.REGION_SIGNATURE):
        return "no region table here"
    if not is_sealed(raw, layout.HEADER_CHECKSUM_OFFSET):
        return "checksum wrong"
    return "good"


def read_table(store: ReadStore, copy: int) -> bytes:
    """The bytes of one copy of the table; fewer if the file ends inside it."""
    return store.pread(layout.REGION_TABLE_OFFSETS[copy], layout.REGION_TABLE_SIZE)


def read_regions(store: ReadStore, log: tuple[int, int]) -> Regions:
    """The regions in the first intact table; `log` is (offset, size) of the log. Raises CorruptImage."""
    tables = [read_table(store, copy) for copy in range(2)]
    states = [table_state(raw) for raw in tables]
    if "good" not in states:
        raise CorruptImage(
            CorruptReason.REGION_TABLE,
            f"neither region table is intact (table 1: {states[0]}, table 2: {states[1]})",
            path=store.name,
            structure=table_name(0),
            offset_bytes=layout.REGION_TABLE_OFFSETS[0],
        )
    copy = states.index("good")
    findings = [
        Finding(
            Severity.WARNING,
            "region-table-damaged",
            f"{states[other]}; the other table is used",
            store.name,
            table_name(other),
            layout.REGION_TABLE_OFFSETS[other],
        )
        for other in range(2)
        if states[other] != "good"
    ]
    entries = parse_entries(store.name, tables[copy], copy)
    return _examined(store, entries, copy, log, tuple(findings))


def parse_entries(path: str, raw: bytes, copy: int) -> list[RegionEntry]:
    """The entries of an intact table. Raises CorruptImage if there are too many."""
    count = layout.parse_region_table(raw[: layout.REGION_TABLE_HEADER_SIZE]).entry_count
    if count > layout.MAX_REGIONS:
        raise CorruptImage(
            CorruptReason.REGION_TABLE,
            "too many entries",
            expected=f"at most {layout.MAX_REGIONS}",
            found=count,
            **_where(path, copy, None),
        )
    starts = (layout.REGION_TABLE_HEADER_SIZE + number * layout.REGION_ENTRY_SIZE for number in range(count))
    return [layout.parse_region_entry(raw[start : start + layout.REGION_ENTRY_SIZE]) for start in starts]


def _where(path: str, copy: int, number: int | None) -> dict[str, Any]:
    offset = layout.REGION_TABLE_OFFSETS[copy]
    if number is None:
        return {"path": path, "structure": table_name(copy), "offset_bytes": offset}
    entry = offset + layout.REGION_TABLE_HEADER_SIZE + number * layout.REGION_ENTRY_SIZE
    return {"path": path, "structure": f"{table_name(copy)}, entry {number + 1}", "offset_bytes": entry}


def _examined(
    store: ReadStore, entries: list[RegionEntry], copy: int, log: tuple[int, int], findings: tuple[Finding, ...]
) -> Regions:
    seen: dict[bytes, RegionEntry] = {}
    for number, one in enumerate(entries):
        where = _where(store.name, copy, number)
        if one.guid in seen:
            raise CorruptImage(CorruptReason.REGION_ENTRY, f"a second {name_of(one)}", **where)
        if one.guid not in _KNOWN and one.required & layout.REGION_REQUIRED:
            raise CorruptImage(
                CorruptReason.REGION_REQUIRED,
                f"{name_of(one)} is unknown, but required to read the image",
                hint="the file needs a newer program than this one",
                **where,
            )
        _check_place(store, one, where)
        seen[one.guid] = one
    for wanted, name in _KNOWN.items():
        if wanted not in seen:
            raise CorruptImage(CorruptReason.REGION_ENTRY, f"no {name}", **_where(store.name, copy, None))
    _check_apart(store.name, entries, copy, log)
    others = tuple(one for one in entries if one.guid not in _KNOWN)
    return Regions(seen[layout.REGION_BAT], seen[layout.REGION_METADATA], others, findings)


def _check_place(store: ReadStore, one: RegionEntry, where: dict[str, Any]) -> None:
    aligned = one.file_offset % layout.ALIGNMENT == 0 and one.length % layout.ALIGNMENT == 0
    if not aligned or one.length == 0 or one.file_offset < layout.HEADER_SECTION_SIZE:
        raise CorruptImage(
            CorruptReason.REGION_ENTRY,
            f"{name_of(one)} has an impossible place",
            expected="whole mebibytes after the first",
            found=f"{one.length} bytes at byte {one.file_offset:#x}",
            **where,
        )
    if one.guid in _KNOWN and one.file_offset + one.length > store.size():
        raise CorruptImage(
            CorruptReason.REGION_OUTSIDE_FILE,
            f"{name_of(one)} reaches past the end of the file",
            found=f"{one.length} bytes at byte {one.file_offset:#x} of a file of {store.size()} bytes",
            hint=CUT_SHORT_HINT,
            **where,
        )


def _check_apart(path: str, entries: list[RegionEntry], copy: int, log: tuple[int, int]) -> None:
    places = sorted([("log", *log), *((name_of(one), one.file_offset, one.length) for one in entries)], key=_start)
    for (lower, start, size), (upper, offset, _) in itertools.pairwise(places):
        if offset < start + size:
            raise CorruptImage(
                CorruptReason.STRUCTURES_OVERLAP,
                f"begins inside the {lower}",
                path=path,
                structure=upper,
                offset_bytes=offset,
            )


def _start(place: tuple[str, int, int]) -> int:
    return place[1]


def build_table(entries: list[RegionEntry]) -> bytes:
    """The 64 KiB of a region table."""
    head = layout.build_region_table(RegionTableHeader(layout.REGION_SIGNATURE, 0, len(entries), 0))
    raw = head + b"".join(layout.build_region_entry(one) for one in entries)
    return sealed(raw.ljust(layout.REGION_TABLE_SIZE, b"\0"), layout.HEADER_CHECKSUM_OFFSET)


def table_writes(regions: Regions) -> list[tuple[int, bytes]]:
    """(offset, bytes) of both copies of a table with these regions."""
    raw = build_table([regions.bat, regions.metadata, *regions.others])
    return [(offset, raw) for offset in layout.REGION_TABLE_OFFSETS]
