# SPDX-License-Identifier: Apache-2.0
"""Giving a dynamic or differencing image another header and other footers, safe at any power cut.

Decides the order. The header takes two sectors and has no second copy, so it is never overwritten while a footer
points at it: a second header is written behind everything first, and the footers, one sector each, switch over.

    1  second header, and what goes with it, behind the file's end   sync   both footers: old header
    2  trailing footer behind those -> second header                 sync   copy: old, tail: new
    3  footer copy -> second header                                  sync   both: new
    4  the new header in the old one's place                         sync   nobody points there
    5  footer copy, then trailing footer -> the old place            sync each

At each point both headers that a footer points at are whole, and so the image opens as it was or as it is to be.
Whatever the new header points at (a longer BAT, say) is ready and synced before, and what only the old one points at
stays until the end. The second header's sectors are left behind, unused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vhdkit.formats.vhd import layout
from vhdkit.formats.vhd.dynamic import DynamicImage, nominal_end
from vhdkit.formats.vhd.layout import DynamicHeader, Footer
from vhdkit.units import SECTOR_SIZE, round_up


def second_header_offset(image: DynamicImage) -> int:
    """Where a second header goes: behind everything, the trailing footer too."""
    metadata = image.metadata
    return max(nominal_end(metadata, image.bat), round_up(image.store.size(), SECTOR_SIZE))


def switch_header(
    image: DynamicImage,
    header: DynamicHeader,
    *,
    footer: Footer | None = None,
    texts: Sequence[tuple[int, bytes]] = (),
) -> None:
    """Make `header`, and the fields of `footer` where it is given, those of an image opened for writing.

    `texts` are (offset, bytes) that lie behind `second_header_offset` + HEADER_SIZE and belong to the header.
    Raises NoSpace, IoFailed, SyncFailed; the image then has its old header and footers or the new ones. The open
    image still knows the old ones: close it.
    """
    store, metadata = image.store, image.metadata
    assert image.writable
    second, size_before = second_header_offset(image), store.size()
    end = max((offset + len(raw) for offset, raw in texts), default=second + layout.HEADER_SIZE)
    end = round_up(end, SECTOR_SIZE)
    raw_header = layout.build_header(header)
    # The chosen footer is built anew; its fields that nobody names, reserved ones too, are kept.
    wanted = replace(footer or metadata.footer, data_offset=metadata.footer.data_offset)
    there = layout.build_footer(replace(wanted, data_offset=second))
    back = layout.build_footer(wanted)
    try:
        store.reserve(second, end + layout.FOOTER_SIZE - second)  # a full disk is found here or not at all
        store.pwrite(second, raw_header)
        for offset, raw in texts:
            assert offset >= second + layout.HEADER_SIZE
            store.pwrite(offset, raw)
        store.sync()
    except BaseException:  # nothing points there yet: give the room back, and the trailing footer its place
        store.truncate(size_before)
        raise
    for raw, places in ((there, (end, 0)), (back, (0, end))):
        for place in places:
            store.pwrite(place, raw)
            store.sync()
        if raw is there:
            store.pwrite(metadata.footer.data_offset, raw_header)
            store.sync()
