# SPDX-License-Identifier: Apache-2.0
"""Changing the parent's names in a dynamic header, safe at any power cut.

Decides the order. The header takes two sectors and has no second copy, so it is never overwritten while a footer
points at it: a second header is written behind everything first, and the footers, one sector each, switch over.

    1  locators and second header behind the file's end      sync   both footers: old header
    2  trailing footer behind those -> second header         sync   copy: old, tail: new names
    3  footer copy -> second header                          sync   both: new names
    4  the header in its old place, with the new names       sync   nobody points there
    5  footer copy, then trailing footer -> the old place    sync each

At each point both headers that a footer points at are whole. The second header's sectors are left behind, unused.
"""

from __future__ import annotations

from dataclasses import replace

from vhdkit.formats.vhd import layout
from vhdkit.formats.vhd.create import ParentLink, linked_header
from vhdkit.formats.vhd.dynamic import DynamicImage, nominal_end
from vhdkit.units import SECTOR_SIZE, round_up


def relink(image: DynamicImage, link: ParentLink) -> None:
    """Write `link` into a differencing image that was opened for writing, so both its footers are good.

    Raises InvalidArgument for names that cannot be stored, NoSpace, IoFailed, SyncFailed; the image then has its old
    names or its new ones. The open image still knows the old ones: close it.
    """
    store, metadata = image.store, image.metadata
    assert metadata.header is not None and image.writable
    second = max(nominal_end(metadata, image.bat), round_up(metadata.file_size_bytes, SECTOR_SIZE))
    header, texts, end = linked_header(metadata.header, link, second + layout.HEADER_SIZE)
    raw_header = layout.build_header(header)
    # The chosen footer is built anew only in its data offset; its other fields, reserved ones too, are kept.
    there = layout.build_footer(replace(metadata.footer, data_offset=second))
    back = layout.build_footer(metadata.footer)
    try:
        store.reserve(second, end + layout.FOOTER_SIZE - second)  # a full disk is found here or not at all
        store.pwrite(second, raw_header)
        for offset, raw in texts:
            store.pwrite(offset, raw)
        store.sync()
    except BaseException:  # nothing points there yet: give the room back, and the trailing footer its place
        store.truncate(metadata.file_size_bytes)
        raise
    for footer, places in ((there, (end, 0)), (back, (0, end))):
        for place in places:
            store.pwrite(place, footer)
            store.sync()
        if footer is there:
            store.pwrite(metadata.footer.data_offset, raw_header)
            store.sync()
