# SPDX-License-Identifier: Apache-2.0
"""Recording another parent, or other names of the same parent, in a child.

Decides where the new locator lies in the metadata region. The locator and its table entry go through the log as one
log entry, so after an interruption the image has either its old names or its new ones. The child's own content does
not change, so its DataWriteGuid stays, and its children stay valid.
"""

from __future__ import annotations

from dataclasses import replace

from vhdkit import errors
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.blocks import VhdxImage
from vhdkit.formats.vhdx.create import new_locator
from vhdkit.formats.vhdx.items import free_place
from vhdkit.formats.vhdx.locator import build_locator
from vhdkit.image import ParentRef


def relink(image: VhdxImage, parent: ParentRef) -> None:
    """Durably record another parent in an open child, and close the image; its file stays open.

    Raises InvalidArgument, NoSpace, IoFailed, SyncFailed.
    """
    try:
        items, region = image.metadata.items, image.metadata.regions.metadata
        item = items.locator
        if item is None:
            raise errors.InvalidArgument("has no parent", path=image.store.name)
        raw = build_locator(new_locator(parent))
        # The space of the old locator counts as free.
        others = ((one.entry.offset, one.entry.length) for one in items.all if one is not item and one.entry.length)
        offset = free_place(others, len(raw), region.length)
        if offset is None:
            raise errors.InvalidArgument(
                "the metadata region has no room for the names of this parent",
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
        image.finish()
