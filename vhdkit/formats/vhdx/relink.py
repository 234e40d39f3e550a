# SPDX-License-Identifier: Apache-2.0
"""A child gets another parent, or other names for it.

Decides where the new locator lies in the metadata region. It and its entry in the table go through the log as one
entry, so after an interruption the image has its old names or its new ones. The disk reads as before, so its
DataWriteGuid stays, and its own children stay valid.
"""

from __future__ import annotations

from dataclasses import replace

from vhdkit import errors
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.blocks import VhdxImage
from vhdkit.formats.vhdx.create import new_locator
from vhdkit.formats.vhdx.items import Item, Items
from vhdkit.formats.vhdx.locator import build_locator
from vhdkit.image import ParentRef
from vhdkit.units import round_up

_ALIGNMENT = 8


def relink(image: VhdxImage, parent: ParentRef) -> None:
    """Let an open child record another parent, durable, and close it.

    Raises InvalidArgument, NoSpace, IoFailed, SyncFailed.
    """
    try:
        items, region = image.metadata.items, image.metadata.regions.metadata
        item = items.locator
        if item is None:
            raise errors.InvalidArgument("has no parent", path=image.store.name)
        raw = build_locator(new_locator(parent))
        offset = _place(items, item, len(raw), region.length)
        if offset is None:
            raise errors.InvalidArgument(
                "the metadata have no room for the names of this parent",
                path=image.store.name,
                hint="use a shorter path",
            )
        entry = replace(item.entry, offset=offset, length=len(raw))
        number = items.all.index(item)
        place = layout.METADATA_TABLE_HEADER_SIZE + number * layout.METADATA_ENTRY_SIZE
        image.log_writes(
            [
                (region.file_offset + place, layout.build_metadata_entry(entry)),
                (region.file_offset + offset, raw),
            ]
        )
    finally:
        image.close()


def _place(items: Items, item: Item, size: int, region_size: int) -> int | None:
    """The first offset in the region with room for the locator; its old place counts as free."""
    others = sorted((one.entry.offset, one.entry.length) for one in items.all if one is not item and one.entry.length)
    position = layout.METADATA_TABLE_SIZE
    for start, length in [*others, (region_size, 0)]:
        if position + size <= start:
            return position
        position = max(position, round_up(start + length, _ALIGNMENT))
    return None
