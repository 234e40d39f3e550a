# SPDX-License-Identifier: Apache-2.0
"""A VHDX's facts in the terms that all formats share. Decides nothing: it is given the `Metadata` of a file."""

from __future__ import annotations

import uuid

from vhdkit.formats.format import ImageDetails
from vhdkit.formats.vhdx.bat import Bat, BlockState
from vhdkit.formats.vhdx.identify import FORMAT_NAME
from vhdkit.formats.vhdx.locator import PATH_KEYS
from vhdkit.formats.vhdx.metadata import Metadata
from vhdkit.image import ImageFacts


def facts_of(metadata: Metadata) -> ImageFacts:
    """What the image says about itself. A VHDX does not record its original size."""
    items, header = metadata.items, metadata.header
    return ImageFacts(
        path=metadata.path,
        format_name=FORMAT_NAME,
        kind=metadata.kind,
        title=f"{metadata.kind} VHDX",
        size_bytes=items.size_bytes,
        made_size_bytes=items.size_bytes,
        block_size_bytes=items.block_size,
        sector_bytes=items.logical_sector_bytes,
        physical_sector_bytes=items.physical_sector_bytes,
        linkage_id=header.data_write_guid,
        parent=metadata.parent,
        findings=metadata.findings,
    )


def details_of(metadata: Metadata) -> ImageDetails:
    """The further details that `info` shows; reads the BAT. Raises IoFailed."""
    bat = Bat.load(metadata.view, metadata.regions.bat.file_offset, metadata.shape)
    allocated = bat.in_states(BlockState.FULLY_PRESENT, BlockState.PARTIALLY_PRESENT)
    paths = [metadata.locator[key] for key in PATH_KEYS if key in metadata.locator]
    return ImageDetails(
        creator=metadata.creator,
        block_size_bytes=metadata.items.block_size,
        block_count=metadata.shape.block_count,
        allocated_block_count=int(allocated.sum()),
        parent_name=paths[0] if paths else "",
        parent_locators=tuple(metadata.locator.items()),
        logical_sector_bytes=metadata.items.logical_sector_bytes,
        physical_sector_bytes=metadata.items.physical_sector_bytes,
        virtual_disk_id=str(uuid.UUID(bytes=metadata.items.virtual_disk_id)),
        log_entries=0 if metadata.replay is None else len(metadata.replay.entries),
    )
