# SPDX-License-Identifier: Apache-2.0
"""New VHDX images, written completely into an empty store.

Decides the layout of our own files, which is that of Windows: a log of 1 MiB, the metadata, the BAT, then blocks.

    0                  1 MiB   2 MiB        3 MiB   3 MiB + BAT
    | header section   | log   | metadata   | BAT   | blocks ...

Source: [MS-VHDX], and the files that Windows writes.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from vhdkit import errors
from vhdkit.formats.vhdx import items, layout
from vhdkit.formats.vhdx.bat import Shape, full_entries
from vhdkit.formats.vhdx.crc import sealed
from vhdkit.formats.vhdx.identify import FILE_IDENTIFIER
from vhdkit.formats.vhdx.layout import Header, RegionEntry
from vhdkit.formats.vhdx.locator import (
    ABSOLUTE,
    LINKAGE,
    LINKAGE_2,
    MAX_TEXT_BYTES,
    RELATIVE,
    VOLUME,
    build_locator,
    linkage_text,
)
from vhdkit.formats.vhdx.regions import build_table
from vhdkit.image import NULL_ID, ParentRef
from vhdkit.store import Store
from vhdkit.units import MIB, PAGE_SIZE, SECTOR_SIZE, format_size, is_power_of_two, round_up

CREATOR = "vhdkit"
LOG_BYTES = MIB
METADATA_BYTES = MIB
PHYSICAL_SECTOR_BYTES = PAGE_SIZE
_LOG_OFFSET = MIB
_METADATA_OFFSET = _LOG_OFFSET + LOG_BYTES
_BAT_OFFSET = _METADATA_OFFSET + METADATA_BYTES
FILL_ENTRIES = MIB // layout.BAT_ENTRY_SIZE  # of a BAT that are written at once

_PATHS = ((ABSOLUTE, "absolute path"), (RELATIVE, "relative path"))  # as `ParentRef.of_paths` calls them

DiskItem = tuple[bytes, int, bytes]  # an item of metadata: its id, flags and bytes


def check_size(size_bytes: int, sector_bytes: int = SECTOR_SIZE) -> None:
    """Raise InvalidArgument for a virtual size that a VHDX with sectors of this size cannot have."""
    if size_bytes <= 0 or size_bytes % sector_bytes:
        raise errors.InvalidArgument(
            f"a disk of {size_bytes} bytes is not one or more whole {sector_bytes}-byte sectors"
        )
    if size_bytes > layout.MAX_VIRTUAL_SIZE:
        raise errors.InvalidArgument(
            f"a VHDX holds at most {format_size(layout.MAX_VIRTUAL_SIZE)}, not {format_size(size_bytes)}"
        )


def check_sector_size(sector_bytes: int) -> None:
    """Raise InvalidArgument for a logical sector size that a VHDX cannot have."""
    if sector_bytes not in layout.SECTOR_SIZES:
        raise errors.InvalidArgument(f"a VHDX has sectors of 512 or 4096 bytes, not {sector_bytes}")


def check_block_size(block_size_bytes: int) -> None:
    """Raise InvalidArgument for a block size that a VHDX cannot have."""
    low, high = layout.MIN_BLOCK_SIZE, layout.MAX_BLOCK_SIZE
    if not (is_power_of_two(block_size_bytes) and low <= block_size_bytes <= high):
        raise errors.InvalidArgument(
            f"the block size of a VHDX is a power of two from {format_size(low)} to {format_size(high)},"
            f" not {block_size_bytes} bytes"
        )


def new_disk(size_bytes: int, sector_bytes: int = SECTOR_SIZE) -> list[DiskItem]:
    """The items of a new virtual disk, with an id of its own."""
    flags = layout.ITEM_IS_VIRTUAL_DISK | layout.ITEM_IS_REQUIRED
    return [
        (layout.ITEM_VIRTUAL_DISK_SIZE, flags, size_bytes.to_bytes(8, "little")),
        (layout.ITEM_LOGICAL_SECTOR_SIZE, flags, sector_bytes.to_bytes(4, "little")),
        (layout.ITEM_PHYSICAL_SECTOR_SIZE, flags, PHYSICAL_SECTOR_BYTES.to_bytes(4, "little")),
        (layout.ITEM_VIRTUAL_DISK_ID, flags, layout.stored_guid(uuid.uuid4().bytes)),
    ]


def resized(disk: Sequence[DiskItem], size_bytes: int) -> list[DiskItem]:
    """The items of the same virtual disk with another size."""
    size = size_bytes.to_bytes(8, "little")
    return [(one, flags, size if one == layout.ITEM_VIRTUAL_DISK_SIZE else raw) for one, flags, raw in disk]


def check_room(items_bytes: int) -> None:
    """Raise InvalidArgument for items of metadata that take more space than a new image has for them."""
    if items_bytes > METADATA_BYTES:
        raise errors.InvalidArgument(
            f"the metadata items of the parent's disk do not fit into a child: there is room for"
            f" {format_size(METADATA_BYTES)}",
            hint="convert the parent to a new image, and make the child of that one",
        )


def create(
    store: Store,
    disk: Sequence[DiskItem],
    block_size_bytes: int,
    *,
    fixed: bool = False,
    preallocate: bool = False,
    parent: ParentRef | None = None,
) -> None:
    """Make the empty `store` an image of this virtual disk: all zeros, or a child that owns no sectors.

    Raises InvalidArgument, also for a parent whose name cannot be written in UTF-16, and NoSpace.
    """
    values = {one: raw for one, _, raw in disk}
    size_bytes = int.from_bytes(values[layout.ITEM_VIRTUAL_DISK_SIZE], "little")
    sector_bytes = int.from_bytes(values[layout.ITEM_LOGICAL_SECTOR_SIZE], "little")
    check_size(size_bytes, sector_bytes)
    check_block_size(block_size_bytes)
    shape = Shape(size_bytes, block_size_bytes, sector_bytes, has_parent=parent is not None)
    flags = layout.HAS_PARENT if parent is not None else layout.LEAVE_BLOCKS_ALLOCATED if fixed else 0
    parameters = block_size_bytes.to_bytes(4, "little") + flags.to_bytes(4, "little")
    all_items = [(layout.ITEM_FILE_PARAMETERS, layout.ITEM_IS_REQUIRED, parameters), *disk]
    if parent is not None:
        all_items.append((layout.ITEM_PARENT_LOCATOR, layout.ITEM_IS_REQUIRED, build_locator(new_locator(parent))))
    region = items.build_items(all_items)
    check_room(len(region))
    table_bytes = round_up(shape.entry_count * layout.BAT_ENTRY_SIZE, MIB)
    first_block = _BAT_OFFSET + table_bytes
    store.truncate(first_block + (shape.block_count * block_size_bytes if fixed else 0))
    store.reserve(_LOG_OFFSET, LOG_BYTES)
    if preallocate:
        store.reserve(first_block, shape.block_count * block_size_bytes)
    store.pwrite(_METADATA_OFFSET, region)
    if fixed:
        _fill_table(store, shape, first_block, block_size_bytes)
    regions = [
        RegionEntry(layout.REGION_BAT, _BAT_OFFSET, table_bytes, layout.REGION_REQUIRED),
        RegionEntry(layout.REGION_METADATA, _METADATA_OFFSET, METADATA_BYTES, layout.REGION_REQUIRED),
    ]
    for offset in layout.REGION_TABLE_OFFSETS:
        store.pwrite(offset, build_table(regions))
    _write_headers(store)
    creator = CREATOR.encode("utf-16-le")
    store.pwrite(0, (FILE_IDENTIFIER + creator).ljust(PAGE_SIZE, b"\0"))


def _write_headers(store: Store) -> None:
    file_write_guid, data_write_guid = uuid.uuid4().bytes, uuid.uuid4().bytes
    for number, offset in enumerate(layout.HEADER_OFFSETS):
        header = Header(
            layout.HEADER_SIGNATURE,
            0,
            number,
            file_write_guid,
            data_write_guid,
            NULL_ID,
            layout.LOG_VERSION,
            layout.HEADER_VERSION,
            LOG_BYTES,
            _LOG_OFFSET,
        )
        raw = layout.build_header(header).ljust(layout.HEADER_SIZE, b"\0")
        store.pwrite(offset, sealed(raw, layout.HEADER_CHECKSUM_OFFSET))


def _fill_table(store: Store, shape: Shape, first_block: int, block_size_bytes: int) -> None:
    """The BAT of a fixed image: all blocks are present, one after the other."""
    for first in range(0, shape.entry_count, FILL_ENTRIES):
        numbers = range(first, min(first + FILL_ENTRIES, shape.entry_count))
        entries = full_entries(shape, numbers, block_size_bytes, first_block=0, offset_bytes=first_block)
        store.pwrite(_BAT_OFFSET + first * layout.BAT_ENTRY_SIZE, entries.astype("<u8").tobytes())


def new_locator(parent: ParentRef) -> dict[str, str]:
    """The locator pairs for a parent, from `ParentRef.of_paths` or from another child's locator.

    Raises InvalidArgument for a path that cannot be stored.
    """
    texts = {one.structure: one.text for one in parent.names}
    pairs = {LINKAGE: linkage_text(parent.linkage_id)}
    pairs |= {key: texts[name] for key, name in _PATHS if name in texts}
    pairs |= {key: texts[key] for key in (ABSOLUTE, RELATIVE, VOLUME) if key in texts}
    if len(parent.linkage_ids) > 1:
        pairs[LINKAGE_2] = linkage_text(parent.linkage_ids[1])
    for text in list(pairs.values()):
        try:
            size = len(text.encode("utf-16-le"))
        except UnicodeEncodeError as error:
            raise errors.InvalidArgument(
                "the parent's path is not valid text and cannot be stored in a VHDX; rename it", path=text
            ) from error
        if size > MAX_TEXT_BYTES:
            raise errors.InvalidArgument("the parent's path is too long to be stored in a VHDX", path=text)
    return pairs
