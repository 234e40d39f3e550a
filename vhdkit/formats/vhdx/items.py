# SPDX-License-Identifier: Apache-2.0
"""The metadata items of a VHDX: sizes, sector sizes, the disk's id, the parent locator.

Decides which items must exist, what their values may be, what is refused, and which items a child takes over from
its parent. Must not know where a parent lies, nor blocks.

An unknown item is refused if it is marked as required, and kept otherwise.

Source: [MS-VHDX] 2.6.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vhdkit.errors import CorruptImage, CorruptReason
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.layout import MetadataEntry, MetadataTableHeader, RegionEntry
from vhdkit.store import ReadStore
from vhdkit.units import SECTOR_SIZE, format_size, is_power_of_two, round_up

_NAMES = {
    layout.ITEM_FILE_PARAMETERS: "file parameters",
    layout.ITEM_VIRTUAL_DISK_SIZE: "virtual disk size",
    layout.ITEM_LOGICAL_SECTOR_SIZE: "logical sector size",
    layout.ITEM_PHYSICAL_SECTOR_SIZE: "physical sector size",
    layout.ITEM_VIRTUAL_DISK_ID: "virtual disk id",
    layout.ITEM_PARENT_LOCATOR: "parent locator",
}
_SIZES = {
    layout.ITEM_FILE_PARAMETERS: 8,
    layout.ITEM_VIRTUAL_DISK_SIZE: 8,
    layout.ITEM_LOGICAL_SECTOR_SIZE: 4,
    layout.ITEM_PHYSICAL_SECTOR_SIZE: 4,
    layout.ITEM_VIRTUAL_DISK_ID: 16,
}
_REQUIRED_FLAGS = {
    layout.ITEM_FILE_PARAMETERS: layout.ITEM_IS_REQUIRED,
    layout.ITEM_PARENT_LOCATOR: layout.ITEM_IS_REQUIRED,
}
_FIRST_ITEM_OFFSET = layout.METADATA_TABLE_SIZE
_ALIGNMENT = 8  # of an item


@dataclass(frozen=True, slots=True)
class Item:
    """One item: its entry in the table, and where its bytes lie in the file. Those of known items are in `raw`."""

    entry: MetadataEntry
    offset_bytes: int
    raw: bytes

    @property
    def is_user(self) -> bool:
        """Whether it belongs to a user of the file, not to the format."""
        return bool(self.entry.flags & layout.ITEM_IS_USER)

    @property
    def structure(self) -> str:
        """Its name in messages."""
        known = None if self.is_user else _NAMES.get(self.entry.item_id)
        return known or f"metadata item {uuid.UUID(bytes=self.entry.item_id)}"


@dataclass(frozen=True, slots=True)
class Items:
    """What the metadata say about the disk; sizes in bytes. `locator` is the parent locator; None without a parent."""

    block_size: int
    leaves_blocks_allocated: bool
    has_parent: bool
    size_bytes: int
    logical_sector_bytes: int
    physical_sector_bytes: int
    virtual_disk_id: bytes
    locator: Item | None
    all: tuple[Item, ...]


def read_items(store: ReadStore, region: RegionEntry) -> Items:
    """Read and examine the items in the metadata region, which lies inside the file. Raises CorruptImage."""
    found = read_table(store, region)
    _refuse_unknown(store.name, found)
    known = {one.entry.item_id: one for one in found if not one.is_user}
    for wanted in _SIZES:
        if wanted not in known:
            raise CorruptImage(
                CorruptReason.ITEM_MISSING, f"no {_NAMES[wanted]}", **_of_table(store.name, region.file_offset)
            )
    parameters, block_size, flags = known[layout.ITEM_FILE_PARAMETERS], *_parameters(store.name, known)
    sector_bytes = _sector_size(store.name, known[layout.ITEM_LOGICAL_SECTOR_SIZE])
    has_parent = bool(flags & layout.HAS_PARENT)
    locator = known.get(layout.ITEM_PARENT_LOCATOR)
    if has_parent and locator is None:
        raise CorruptImage(
            CorruptReason.ITEM_MISSING,
            "the image is marked as having a parent, but has no parent locator",
            **_of(store.name, parameters),
        )
    if locator is not None and not has_parent:
        raise CorruptImage(
            CorruptReason.ITEM_VALUE,
            "names a parent, but the image is not marked as having one",
            **_of(store.name, locator),
        )
    return Items(
        block_size=block_size,
        leaves_blocks_allocated=bool(flags & layout.LEAVE_BLOCKS_ALLOCATED) and not has_parent,
        has_parent=has_parent,
        size_bytes=_virtual_size(store.name, known[layout.ITEM_VIRTUAL_DISK_SIZE], sector_bytes),
        logical_sector_bytes=sector_bytes,
        physical_sector_bytes=_sector_size(store.name, known[layout.ITEM_PHYSICAL_SECTOR_SIZE]),
        virtual_disk_id=layout.read_guid(known[layout.ITEM_VIRTUAL_DISK_ID].raw),
        locator=locator,
        all=tuple(found),
    )


def _of(path: str, item: Item) -> dict[str, Any]:
    return {"path": path, "structure": item.structure, "offset_bytes": item.offset_bytes}


def _of_table(path: str, offset: int) -> dict[str, Any]:
    return {"path": path, "structure": "metadata table", "offset_bytes": offset}


def read_table(store: ReadStore, region: RegionEntry) -> list[Item]:
    """Every item, in the order of the table, each in a possible place. Raises CorruptImage."""
    raw = store.pread(region.file_offset, layout.METADATA_TABLE_SIZE)
    where = _of_table(store.name, region.file_offset)
    if not raw.startswith(layout.METADATA_SIGNATURE):
        raise CorruptImage(
            CorruptReason.METADATA_TABLE,
            "no metadata table here",
            expected=layout.METADATA_SIGNATURE,
            found=raw[: len(layout.METADATA_SIGNATURE)],
            **where,
        )
    count = layout.parse_metadata_table(raw[: layout.METADATA_TABLE_HEADER_SIZE]).entry_count
    if count > layout.MAX_ITEMS:
        raise CorruptImage(
            CorruptReason.METADATA_TABLE,
            "too many entries",
            expected=f"at most {layout.MAX_ITEMS}",
            found=count,
            **where,
        )
    starts = (layout.METADATA_TABLE_HEADER_SIZE + number * layout.METADATA_ENTRY_SIZE for number in range(count))
    entries = [layout.parse_metadata_entry(raw[start : start + layout.METADATA_ENTRY_SIZE]) for start in starts]
    return _read_items(store, region, entries)


def _read_items(store: ReadStore, region: RegionEntry, entries: list[MetadataEntry]) -> list[Item]:
    items: list[Item] = []
    seen: set[tuple[bytes, int]] = set()
    for one in entries:
        offset = region.file_offset + one.offset
        item = Item(one, offset, b"")
        where = _of(store.name, item)
        if (key := (one.item_id, one.flags & layout.ITEM_IS_USER)) in seen:
            raise CorruptImage(CorruptReason.ITEM_PLACE, "occurs twice", **where)
        seen.add(key)
        stays = one.offset >= _FIRST_ITEM_OFFSET and one.offset + one.length <= region.length
        if not (stays and 0 < one.length <= layout.MAX_ITEM_BYTES) and (one.offset, one.length) != (0, 0):
            raise CorruptImage(
                CorruptReason.ITEM_PLACE,
                "has an impossible place",
                expected=f"up to 1 MiB, from byte {_FIRST_ITEM_OFFSET:#x} of the metadata region to its end",
                found=f"{one.length} bytes at byte {one.offset:#x}",
                **where,
            )
        known = not item.is_user and one.item_id in _NAMES
        items.append(Item(one, offset, store.pread(offset, one.length) if known else b""))
    _check_apart(store.name, items)
    if sum(one.is_user for one in items) > layout.MAX_USER_ITEMS:
        raise CorruptImage(
            CorruptReason.METADATA_TABLE,
            "too many user items",
            expected=f"at most {layout.MAX_USER_ITEMS}",
            **_of_table(store.name, region.file_offset),
        )
    return items


def _check_apart(path: str, items: list[Item]) -> None:
    placed = sorted((one for one in items if one.entry.length), key=lambda one: one.offset_bytes)
    for lower, upper in itertools.pairwise(placed):
        if upper.offset_bytes < lower.offset_bytes + lower.entry.length:
            raise CorruptImage(CorruptReason.ITEM_PLACE, f"begins inside the {lower.structure}", **_of(path, upper))


def _refuse_unknown(path: str, items: list[Item]) -> None:
    for one in items:
        if one.entry.item_id == layout.ITEM_INCOMPLETE_FILE and not one.is_user:
            raise CorruptImage(
                CorruptReason.INCOMPLETE_FILE,
                "the program that made this image did not finish it",
                hint="create it again: it never was complete",
                **_of(path, one),
            )
        is_known = not one.is_user and one.entry.item_id in _NAMES
        if one.entry.flags & layout.ITEM_IS_REQUIRED and not is_known:
            raise CorruptImage(
                CorruptReason.ITEM_REQUIRED,
                "is unknown, but required to read the image",
                hint="the file needs a newer program than this one",
                **_of(path, one),
            )
        size = None if one.is_user else _SIZES.get(one.entry.item_id)
        if size is not None and one.entry.length != size:
            raise CorruptImage(
                CorruptReason.ITEM_VALUE,
                "has the wrong length",
                expected=size,
                found=one.entry.length,
                **_of(path, one),
            )


def _parameters(path: str, known: dict[bytes, Item]) -> tuple[int, int]:
    """(block size, flags)"""
    item = known[layout.ITEM_FILE_PARAMETERS]
    block_size, flags = int.from_bytes(item.raw[:4], "little"), int.from_bytes(item.raw[4:], "little")
    low, high = layout.MIN_BLOCK_SIZE, layout.MAX_BLOCK_SIZE
    if not (is_power_of_two(block_size) and low <= block_size <= high):
        raise CorruptImage(
            CorruptReason.BLOCK_SIZE,
            "impossible block size",
            expected=f"a power of two from {format_size(low)} to {format_size(high)}",
            found=block_size,
            **_of(path, item),
        )
    if flags & ~(layout.LEAVE_BLOCKS_ALLOCATED | layout.HAS_PARENT):
        raise CorruptImage(CorruptReason.ITEM_VALUE, "unknown flags", found=f"{flags:#x}", **_of(path, item))
    return block_size, flags


def _sector_size(path: str, item: Item) -> int:
    size = int.from_bytes(item.raw, "little")
    if size not in layout.SECTOR_SIZES:
        raise CorruptImage(
            CorruptReason.SECTOR_SIZE, "impossible sector size", expected="512 or 4096", found=size, **_of(path, item)
        )
    return size


def _virtual_size(path: str, item: Item, sector_bytes: int) -> int:
    size = int.from_bytes(item.raw, "little")
    if not 0 < size <= layout.MAX_VIRTUAL_SIZE or size % sector_bytes:
        raise CorruptImage(
            CorruptReason.VIRTUAL_SIZE,
            "impossible size of the disk",
            expected=f"whole sectors of {sector_bytes} bytes, up to {format_size(layout.MAX_VIRTUAL_SIZE)}",
            found=size,
            **_of(path, item),
        )
    return size


def inherited(store: ReadStore, items: Items) -> list[tuple[bytes, int, bytes]]:
    """(item id, flags, bytes) of what belongs to the virtual disk, which a child takes over from this image."""
    return [
        (one.entry.item_id, one.entry.flags, store.pread(one.offset_bytes, one.entry.length))
        for one in items.all
        if one.entry.flags & layout.ITEM_IS_VIRTUAL_DISK
    ]


def inherited_bytes(items: Items) -> int:
    """The bytes that `inherited` reads."""
    return sum(one.entry.length for one in items.all if one.entry.flags & layout.ITEM_IS_VIRTUAL_DISK)


def free_place(taken: Iterable[tuple[int, int]], size: int, region_size: int) -> int | None:
    """The first offset in a metadata region with enough free space for an item of this size, or None.

    `taken` are the (offset, size) of the items that stay.
    """
    position = _FIRST_ITEM_OFFSET
    for start, length in [*sorted(taken), (region_size, 0)]:
        if position + size <= start:
            return position
        position = max(position, round_up(start + length, _ALIGNMENT))
    return None


def build_items(items: list[tuple[bytes, int, bytes]]) -> bytes:
    """The start of a metadata region with these items, (id, flags, bytes): the table, then their bytes.

    The items follow each other from 64 KiB on, each on a sector boundary.
    """
    entries, data, offset = [], [], _FIRST_ITEM_OFFSET
    for item_id, flags, raw in items:
        entries.append(layout.build_metadata_entry(MetadataEntry(item_id, offset if raw else 0, len(raw), flags, 0)))
        space = round_up(len(raw), SECTOR_SIZE)
        data.append(raw.ljust(space, b"\0"))
        offset += space
    head = layout.build_metadata_table(MetadataTableHeader(layout.METADATA_SIGNATURE, 0, len(items), bytes(20)))
    return (head + b"".join(entries)).ljust(_FIRST_ITEM_OFFSET, b"\0") + b"".join(data)
