# SPDX-License-Identifier: Apache-2.0
"""Replacing the header and footers of a dynamic or differencing image, safe at any power cut.

Decides the order. The header takes two sectors, and neither it nor the parent's names have a second copy, so they are
not overwritten while a footer leads to them. If the new ones take the place of the old ones, a second header with its
own names is first written after everything else, and the footers, one sector each, switch over to it:

    1  second header, and names, after the file's end                sync   both footers: old header
    2  trailing footer after those -> second header                  sync   copy: old, tail: second
    3  footer copy -> second header                                  sync   both: second
    4  the new header and its names in their places                  sync   nothing points there
    5  footer copy, then trailing footer -> the new header           sync each
    6  a trailing footer in its old place, the file truncated there  sync each

If they overwrite nothing that is in use, steps 4 and 5 are enough. At each point the headers to which the footers
point are whole and describe the same disk, or one of them is the old one: the image opens as it was or as it will be,
and at the end the file is as long as before. Whatever the new header points at (a longer BAT, say) is written and
synced beforehand, and what only the old one points at stays until the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vhdkit.formats.vhd import layout
from vhdkit.formats.vhd.dynamic import NO_END, DynamicImage
from vhdkit.formats.vhd.layout import DynamicHeader, Footer
from vhdkit.formats.vhd.places import nominal_end
from vhdkit.store import Store
from vhdkit.units import SECTOR_SIZE, round_up

Texts = Sequence[tuple[int, bytes]]


def switch_header(
    image: DynamicImage,
    header: DynamicHeader,
    *,
    footer: Footer | None = None,
    texts: Texts = (),
    home_bytes: int | None = None,
) -> None:
    """Give an image opened for writing this `header`, and the fields of `footer` if given.

    `texts` are the (offset, bytes) of the names at the places stated in `header`, whole sectors; `home_bytes` is where
    the header goes, by default its old place. Nothing but the old header, its names and the trailing footer may lie in
    these places. Raises NoSpace, IoFailed, SyncFailed; the image then has its old header and footers or the new ones.
    The open image still has the old ones: close it.
    """
    assert image.writable
    store, old = image.store, image.metadata.footer.data_offset
    home = old if home_bytes is None else home_bytes
    places = [(home, home + layout.HEADER_SIZE), *((offset, offset + len(raw)) for offset, raw in texts)]
    # While the image is open for writing, the footer is the file's end.
    tail = round_up(store.size() - layout.FOOTER_SIZE, SECTOR_SIZE)
    tail_after = max(tail, *(end for _, end in places))
    # The chosen footer is rebuilt; fields that are not named here, reserved ones too, are kept.
    wanted = replace(footer or image.metadata.footer, data_offset=home)
    if _touches(places, [*in_use(image), (tail, NO_END)]):
        _write_second(image, header, wanted, texts, tail_after)
    raw_footer = layout.build_footer(wanted)
    for offset, raw in [*texts, (home, layout.build_header(header))]:
        store.pwrite(offset, raw)
    store.sync()
    tail_now = round_up(store.size() - layout.FOOTER_SIZE, SECTOR_SIZE)
    for place in dict.fromkeys((0, tail_now, tail_after)):
        _write_synced(store, place, raw_footer)
    if tail_now > tail_after:
        store.truncate(tail_after + layout.FOOTER_SIZE)
        store.sync()


def in_use(image: DynamicImage) -> list[tuple[int, int]]:
    """(offset, end) of the header that the footers point at, and of the names that belong to it."""
    at = image.metadata.footer.data_offset
    names = ((one.data_offset_bytes, one.data_offset_bytes + one.data_length_bytes) for one in image.metadata.locators)
    return [(at, at + layout.HEADER_SIZE), *names]


def _touches(places: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]]) -> bool:
    return any(low < end and start < high for low, high in places for start, end in others)


def _write_second(image: DynamicImage, header: DynamicHeader, footer: Footer, texts: Texts, free_bytes: int) -> None:
    """Steps 1 to 3: the header and its names after everything, and both footers pointing there."""
    store, size_before = image.store, image.store.size()
    second = max(nominal_end(image.metadata, image.bat), round_up(max(size_before, free_bytes), SECTOR_SIZE))
    writes, end, places = [], second + layout.HEADER_SIZE, {}
    for offset, raw in texts:
        writes.append((end, raw))
        places[offset] = end
        end = round_up(end + len(raw), SECTOR_SIZE)
    entries = tuple(
        replace(entry, data_offset=places.get(entry.data_offset, entry.data_offset)) if entry.data_length else entry
        for entry in header.parent_locators
    )
    try:
        store.reserve(second, end + layout.FOOTER_SIZE - second)  # a full disk is found here or not at all
        for place, raw in [(second, layout.build_header(replace(header, parent_locators=entries))), *writes]:
            store.pwrite(place, raw)
        store.sync()
    except BaseException:  # nothing points there yet: free the space, and restore the place of the trailing footer
        store.truncate(size_before)
        raise
    raw_footer = layout.build_footer(replace(footer, data_offset=second))
    _write_synced(store, end, raw_footer)
    _write_synced(store, 0, raw_footer)


def _write_synced(store: Store, offset_bytes: int, raw: bytes) -> None:
    store.pwrite(offset_bytes, raw)
    store.sync()
