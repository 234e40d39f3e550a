# SPDX-License-Identifier: Apache-2.0
"""How a dynamic or differencing image is opened.

Decides what is done before the image is read or written: notes of a killed process are written into it, a lost footer
is restored, and an image with overlapping blocks is refused for writing. Must not know what is in the blocks
(`dynamic`), which notes are valid (both `recall`s), nor how a footer is restored (`mend`).
"""

from __future__ import annotations

import numpy as np

from vhdkit.errors import CorruptImage
from vhdkit.finding import finding_of
from vhdkit.formats import recall, remember
from vhdkit.formats.vhd import bitmap
from vhdkit.formats.vhd.bat import Bat
from vhdkit.formats.vhd.dynamic import DynamicImage
from vhdkit.formats.vhd.entries import check_blocks, used_sizes
from vhdkit.formats.vhd.mend import mend
from vhdkit.formats.vhd.metadata import Metadata, read_metadata
from vhdkit.formats.vhd.places import block_data_end, nominal_end
from vhdkit.formats.vhd.recall import recover
from vhdkit.formats.vhd.room import end_of_room
from vhdkit.store import Store
from vhdkit.units import SECTOR_SIZE


def open_dynamic(store: Store, *, writable: bool = False, ignore_bitmaps: bool = False) -> DynamicImage:
    """Open a dynamic or differencing image.

    Raises CorruptImage, also for impossible BAT entries. A writable open first restores a lost footer. An image with
    overlapping blocks opens for reading only, with an entry in `findings` (`INV-BLOCKS-DISJOINT`).
    """
    metadata = read_metadata(store)
    assert metadata.header is not None
    if writable and _write_what_was_noted(store, metadata):
        metadata = read_metadata(store)
    assert metadata.header is not None
    bat = Bat.load(store, metadata.header.table_offset, metadata.block_count)
    overlap = check_blocks(metadata, bat)
    if overlap is not None and writable:
        raise overlap
    if writable and mend(store, metadata, nominal_end(metadata, bat), cut_end=_cut_end(metadata, bat)):
        metadata = read_metadata(store)
    if writable:
        remember.disown(store)
    image = DynamicImage(
        store,
        metadata,
        bat,
        writable=writable,
        ignore_bitmaps=ignore_bitmaps,
        notes=remember.begin(store, metadata.footer.unique_id) if writable else None,
        room_end_bytes=end_of_room(store) if writable else None,
    )
    if overlap is not None:
        image.damage = overlap
        image.findings.append(finding_of(overlap, store.name))
    return image


def _write_what_was_noted(store: Store, metadata: Metadata) -> bool:
    """Write what a killed process had only in memory, in the order of `commit`; True when there was any."""
    assert metadata.header is not None
    bat = Bat.load(store, metadata.header.table_offset, metadata.block_count)
    block_size, unique_id = metadata.header.block_size, metadata.footer.unique_id
    bitmaps = recover(store, unique_id, bat, bitmap.bitmap_size(block_size), block_size)
    if bitmaps:
        try:
            overlap = check_blocks(metadata, bat)
            if overlap is not None:
                raise overlap
        except CorruptImage as error:  # in the notes or in the image itself, which the caller checks
            recall.give_up(store, unique_id, error.problem)
            return False
        store.sync()
        recall.writing_begins(store, unique_id)
        for block, raw in bitmaps.items():
            store.pwrite(bat.block_start(block), raw)
        for number, raw in bat.take_dirty().items():
            store.pwrite(bat.sector_offset(number), raw)
        store.sync()
        recall.written(store, unique_id)
    return bool(bitmaps)


def _cut_end(metadata: Metadata, bat: Bat) -> int | None:
    """End of the used part of a block that reaches past the data of the file, or None when there is none."""
    whole, last = used_sizes(metadata)
    starts = np.where(bat.allocated(), bat.entries.astype(np.int64) * SECTOR_SIZE, -whole)
    ends = starts + whole
    ends[-1] = starts[-1] + last
    end = int(ends.max())
    return end if end > block_data_end(metadata) else None
