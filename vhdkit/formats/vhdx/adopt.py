# SPDX-License-Identifier: Apache-2.0
"""Giving an image the virtual disk of another one: the metadata items that are marked as belonging to the disk.

Decides which items change, and where the new ones lie in the metadata region. They go through the log as one log
entry, so after an interruption the image has either its old items or the new ones. The size of the disk (`resize`) and
what a guest reads stay as they are, and so does the DataWriteGuid.

Source: [MS-VHDX] 2.6, on merging.
"""

from __future__ import annotations

from vhdkit import errors
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.blocks import VhdxImage
from vhdkit.formats.vhdx.items import Item, free_place, inherited
from vhdkit.formats.vhdx.layout import MetadataEntry, MetadataTableHeader
from vhdkit.units import MIB, PAGE_SIZE, round_down

MAX_ITEMS_BYTES = MIB  # of a disk's items, which are kept in memory; those in the specification take 32 bytes
_Values = dict[tuple[bytes, int], bytes]  # an item's bytes, by its id and flags


def take_over_disk(image: VhdxImage, disk: VhdxImage, *, dry_run: bool = False) -> None:
    """Durably give an open image the items of the virtual disk in `disk`. Does nothing if it has them already.

    Raises InvalidArgument, NoSpace, IoFailed, SyncFailed.
    """
    old, new = _values(image), _values(disk)
    if old == new:
        return
    writes = _writes(image, old, new)
    if not dry_run:
        image.flush()
        image.log_writes(writes)


def _is_of_disk(one: Item) -> bool:
    return bool(one.entry.flags & layout.ITEM_IS_VIRTUAL_DISK) and one.entry.item_id != layout.ITEM_VIRTUAL_DISK_SIZE


def _values(image: VhdxImage) -> _Values:
    """The items of the disk, except its size."""
    if sum(one.entry.length for one in image.metadata.items.all if _is_of_disk(one)) > MAX_ITEMS_BYTES:
        raise _no_room(image)
    found = inherited(image.metadata.view, image.metadata.items)
    return {(one, flags): raw for one, flags, raw in found if one != layout.ITEM_VIRTUAL_DISK_SIZE}


def _no_room(image: VhdxImage) -> errors.InvalidArgument:
    return errors.InvalidArgument(
        "the metadata items of the merged disk do not fit into one image",
        path=image.store.name,
        hint="merge to a new file with --to",
    )


def _writes(image: VhdxImage, old: _Values, new: _Values) -> list[tuple[int, bytes]]:
    """Writes of the whole table, and of each new item into the first free place. Raises InvalidArgument."""
    region, items = image.metadata.regions.metadata, image.metadata.items.all
    keys = {one: (one.entry.item_id, one.entry.flags) for one in items if _is_of_disk(one)}
    entries = [one.entry for one in items if one not in keys or new.get(keys[one]) == old[keys[one]]]
    taken = [(one.entry.offset, one.entry.length) for one in items if one.entry.length]
    writes = []
    for (item_id, flags), raw in new.items():
        if old.get((item_id, flags)) == raw:
            continue
        offset = free_place(taken, len(raw), region.length) if raw else 0
        if offset is None:
            raise _no_room(image)
        if raw:
            taken.append((offset, len(raw)))
            writes.append((region.file_offset + offset, raw))
        entries.append(MetadataEntry(item_id, offset, len(raw), flags, 0))
    users = sum(bool(one.flags & layout.ITEM_IS_USER) for one in entries)
    head = layout.build_metadata_table(MetadataTableHeader(layout.METADATA_SIGNATURE, 0, len(entries), bytes(20)))
    table = head + b"".join(map(layout.build_metadata_entry, entries))
    size = layout.METADATA_TABLE_HEADER_SIZE + len(items) * layout.METADATA_ENTRY_SIZE  # old entries are overwritten
    writes.append((region.file_offset, table.ljust(size, b"\0")))
    pages = {
        page for offset, raw in writes for page in range(round_down(offset, PAGE_SIZE), offset + len(raw), PAGE_SIZE)
    }
    if len(entries) > layout.MAX_ITEMS or users > layout.MAX_USER_ITEMS or len(pages) > image.max_logged_pages:
        raise _no_room(image)
    return writes
