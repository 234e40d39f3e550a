# SPDX-License-Identifier: Apache-2.0
"""Making a child an image without a parent: a dynamic VHDX.

Decides which entries and items change, and the order:

    blocks whose bits are all set -> fully present           | log
    sector bitmaps -> not present                            | log
    no parent locator, no flag for a parent                  | one entry of the log

What is done before the last step is right with a parent as well: a block that is fully present needs no bits, and
without partially present blocks there need be no sector bitmaps. The space of the bitmaps is free from then on;
`compact` gives it back. The disk reads the same, so the DataWriteGuid stays, and children stay valid.

Source: [MS-VHDX] 2.5.1, 2.6.2.1, 2.6.2.6.
"""

from __future__ import annotations

import numpy as np

from vhdkit import errors
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.bat import BlockState
from vhdkit.formats.vhdx.blocks import VhdxImage
from vhdkit.formats.vhdx.layout import MetadataTableHeader


def prepare_detach(image: VhdxImage) -> None:
    """Durably make every block of an open, writable child whole, and let it do without sector bitmaps.

    A program that opened the image earlier can go on reading it: nothing moves, and the bitmaps keep their bits.
    Raises InvalidArgument if a block is owned in part, NoSpace, IoFailed, SyncFailed.
    """
    assert image.is_differencing
    _make_present(image)
    _drop_bitmaps(image)


def detach(image: VhdxImage) -> None:
    """Durably make an open child that was prepared an image without a parent, and close it; its file stays open.

    Raises NoSpace, IoFailed, SyncFailed; the image then has its parent, or none.
    """
    try:
        assert image.is_differencing and not image.bat.in_states(BlockState.PARTIALLY_PRESENT).any()
        image.log_writes([_parameters(image), _table(image)])
    finally:
        image.finish()


def _make_present(image: VhdxImage) -> None:
    """Every partially present block becomes fully present."""
    commit, shape = image.commit, image.bat.shape
    for block in np.flatnonzero(image.bat.in_states(BlockState.PARTIALLY_PRESENT)).tolist():
        if image.owned_sectors(block) is not None:
            raise errors.InvalidArgument(
                f"block {block} is owned in part: the rest is read through the parent", path=image.store.name
            )
        commit.prepare_entry(shape.block_entry(block))
        with commit.changing:
            commit.point(block, BlockState.FULLY_PRESENT, image.block_offset(block))
        commit.limit()
    commit.flush()


def _drop_bitmaps(image: VhdxImage) -> None:
    """No block needs a sector bitmap any more."""
    commit, shape = image.commit, image.bat.shape
    for number in range(shape.chunk_count):
        if image.bat.bitmap_offset(number) >= 0:
            commit.prepare_entry(shape.bitmap_entry(number))
            with commit.changing:
                commit.set_entry(shape.bitmap_entry(number), BlockState.NOT_PRESENT)
            commit.limit()
    commit.flush()


def _parameters(image: VhdxImage) -> tuple[int, bytes]:
    """(offset, bytes) of the file parameters without the flag for a parent."""
    wanted = layout.ITEM_FILE_PARAMETERS
    item = next(one for one in image.metadata.items.all if one.entry.item_id == wanted and not one.is_user)
    flags = int.from_bytes(item.raw[4:], "little") & ~layout.HAS_PARENT
    return item.offset_bytes, item.raw[:4] + flags.to_bytes(4, "little")


def _table(image: VhdxImage) -> tuple[int, bytes]:
    """(offset, bytes) of the metadata table without the parent locator."""
    items, locator = image.metadata.items.all, image.metadata.items.locator
    entries = [one.entry for one in items if one is not locator]
    head = layout.build_metadata_table(MetadataTableHeader(layout.METADATA_SIGNATURE, 0, len(entries), bytes(20)))
    table = head + b"".join(map(layout.build_metadata_entry, entries))
    size = layout.METADATA_TABLE_HEADER_SIZE + len(items) * layout.METADATA_ENTRY_SIZE  # the last entry is overwritten
    return image.metadata.regions.metadata.file_offset, table.ljust(size, b"\0")
