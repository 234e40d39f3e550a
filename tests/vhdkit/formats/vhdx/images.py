# SPDX-License-Identifier: Apache-2.0
"""VHDX images in memory, and changes to their structures for tests."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace

from tests.harness.stores import MemStore
from vhdkit.formats.vhdx import items, layout, log
from vhdkit.formats.vhdx.bat import BlockState
from vhdkit.formats.vhdx.crc import sealed
from vhdkit.formats.vhdx.create import create, new_disk
from vhdkit.formats.vhdx.header import read_headers
from vhdkit.formats.vhdx.layout import Header, RegionEntry
from vhdkit.formats.vhdx.log import LogChange
from vhdkit.formats.vhdx.regions import build_table
from vhdkit.image import NULL_ID, ParentRef
from vhdkit.store import Store
from vhdkit.units import MIB, SECTOR_SIZE

SIZE = 4 * MIB
LOG, METADATA, BAT, FIRST_BLOCK = MIB, 2 * MIB, 3 * MIB, 4 * MIB
PARENT = ParentRef.of_paths(b"p" * 16, 0, relative=".\\base.vhdx", absolute="\\srv\\base.vhdx", name="base.vhdx")
LOG_GUID = uuid.UUID(int=7).bytes


def image(*, fixed: bool = False, parent: ParentRef | None = None, sector_bytes: int = SECTOR_SIZE) -> MemStore:
    """An empty image of four blocks of 1 MiB."""
    store = MemStore("leaf.avhdx" if parent is not None else "disk.vhdx")
    create(store, new_disk(SIZE, sector_bytes), MIB, fixed=fixed, parent=parent)
    return store


def set_header(store: Store, slots: Sequence[int] = (0, 1), **fields: object) -> None:
    """Change fields of headers, with correct checksums."""
    for slot in slots:
        offset = layout.HEADER_OFFSETS[slot]
        header: Header = replace(layout.parse_header(store.pread(offset, layout.HEADER_SIZE)), **fields)  # type: ignore[arg-type]
        raw = layout.build_header(header).ljust(layout.HEADER_SIZE, b"\0")
        store.pwrite(offset, sealed(raw, layout.HEADER_CHECKSUM_OFFSET))


def set_regions(store: Store, change: Callable[[list[RegionEntry]], object]) -> None:
    """Change the entries of both region tables, with correct checksums."""
    entries = [
        RegionEntry(layout.REGION_BAT, BAT, MIB, 1),
        RegionEntry(layout.REGION_METADATA, METADATA, MIB, 1),
    ]
    change(entries)
    for offset in layout.REGION_TABLE_OFFSETS:
        store.pwrite(offset, build_table(entries))


def set_items(store: Store, change: Callable[[dict[bytes, tuple[int, bytes]]], object]) -> None:
    """Change the metadata items: a dict of ids to (flags, bytes)."""
    region = RegionEntry(layout.REGION_METADATA, METADATA, MIB, 1)
    known = {
        one.entry.item_id: (one.entry.flags, store.pread(one.offset_bytes, one.entry.length))
        for one in items.read_table(store, region)
    }
    change(known)
    store.pwrite(METADATA, bytes(MIB))
    store.pwrite(METADATA, items.build_items([(key, flags, raw) for key, (flags, raw) in known.items()]))


def set_entry(store: Store, number: int, state: int, offset_bytes: int = 0) -> None:
    """Change an entry of the BAT."""
    entry = offset_bytes | state
    store.pwrite(BAT + number * layout.BAT_ENTRY_SIZE, entry.to_bytes(8, "little"))


def place_block(store: Store, number: int, data: bytes = b"", state: int = BlockState.FULLY_PRESENT) -> int:
    """Place a block at the end of the file; returns its offset."""
    offset = store.size()
    store.truncate(offset + MIB)
    store.pwrite(offset, data)
    set_entry(store, number, state, offset)
    return offset


def assert_equal_headers(store: MemStore) -> None:
    """The headers are equal except for number and checksum, and name no log."""
    first, second = (replace(one.header, sequence_number=0, checksum=0) for one in read_headers(store))
    assert first == second and first.log_guid == NULL_ID


def add_log(
    store: Store, entries: Sequence[Sequence[LogChange]], *, flushed: int = 0, last: int | None = None
) -> None:
    """Put entries, numbered from 1, into the log, and its id into the headers, as if they had not been replayed."""
    position = 0
    for number, changes in enumerate(entries, 1):
        raw = log.build_entry(
            LOG_GUID,
            number,
            0,
            list(changes),
            flushed_file_offset=flushed,
            last_file_offset=store.size() if last is None else last,
        )
        store.pwrite(LOG + position, raw)
        position += len(raw)
    set_header(store, log_guid=LOG_GUID)


def page(fill: bytes) -> bytes:
    """A page filled with one byte."""
    return fill * layout.LOG_PAGE_SIZE
