# SPDX-License-Identifier: Apache-2.0
"""What a writable open repairs before anything is written: a lost footer, a truncated last block.

Decides what may be repaired silently and in which order. A footer with the mark of another program
(0xC7, `v_poison`) is never repaired here. Read-only opens change nothing and do not use this module.
"""

from __future__ import annotations

from typing import Any

from vhdkit.errors import CorruptImage, CorruptReason, ImageInUse, NoSpace
from vhdkit.formats.vhd.footers import FooterState
from vhdkit.formats.vhd.layout import FOOTER_SIZE
from vhdkit.formats.vhd.metadata import Metadata
from vhdkit.formats.vhd.room import end_of_room
from vhdkit.store import Store
from vhdkit.units import SECTOR_SIZE, round_down, round_up

_MAX_FOOTER_OFFSET = 1 << 62  # file offsets have 63 bits
_READ_ONLY_HINT = "it can be read; to write to it, convert it to a new image"


def mend(store: Store, metadata: Metadata, nominal_end: int, *, cut_end: int | None) -> bool:
    """Repair `store`; returns True when it changed. Its BAT must be valid.

    `nominal_end` is the first byte after all structures and whole blocks; `cut_end` is where the disk's part of a
    block would end that the end of the file (or the trailing footer) truncates, else None.
    Raises CorruptImage or ImageInUse for what must not be repaired.
    """
    assert metadata.copy is not None
    for place in (metadata.tail, metadata.copy):
        where: dict[str, Any] = {"path": metadata.path, "structure": place.structure}
        if place.state is FooterState.POISONED:
            raise CorruptImage(CorruptReason.FOOTER_POISONED, str(place.state), hint=_READ_ONLY_HINT, **where)
        if place.state is FooterState.KILLED:
            raise ImageInUse(str(place.state), hint=_READ_ONLY_HINT, **where)
    for locator in metadata.stray_locators():
        # The file will grow to where the locator points: a block there would be read as its text.
        raise CorruptImage(
            CorruptReason.LOCATOR_OUTSIDE_FILE,
            "lies outside the file",
            path=metadata.path,
            structure=locator.structure,
            offset_bytes=locator.data_offset_bytes,
            hint=_READ_ONLY_HINT,
        )
    changed = False
    if not metadata.copy.state.usable:
        store.pwrite(0, metadata.footer_raw)
        store.sync()
        changed = True
    room_end = end_of_room(store)
    if room_end is not None:
        return _mend_on_device(store, metadata, max(nominal_end, cut_end or 0), room_end) or changed
    if cut_end is not None and metadata.tail.state.usable:
        # The footer is inside the block, and is cleared first: if the new one were written before, a power cut would
        # leave the old one's bytes to be read as data. Until then the copy at offset 0 serves the image.
        store.punch(metadata.tail.offset_bytes, metadata.file_size_bytes - metadata.tail.offset_bytes)
        store.sync()
    elif metadata.tail.state.usable:
        return changed
    elif cut_end is not None and store.size() % SECTOR_SIZE:
        store.punch(round_down(store.size(), SECTOR_SIZE), SECTOR_SIZE)  # a partial sector reads as zeros
        store.sync()
    end = max(nominal_end, round_up(store.size(), SECTOR_SIZE))
    if end > _MAX_FOOTER_OFFSET:
        raise NoSpace("the file is too long for the missing footer", path=metadata.path, hint=_READ_ONLY_HINT)
    store.pwrite(end, metadata.footer_raw)
    store.sync()
    assert store.size() == end + FOOTER_SIZE
    return True


def _mend_on_device(store: Store, metadata: Metadata, end: int, room_end: int) -> bool:
    """Put the trailing footer at the end of the device if it is missing; True when it was."""
    if end > room_end:
        raise NoSpace(
            f"the device ends before the image's last block and its footer: it has {room_end + FOOTER_SIZE} bytes, but"
            f" {end + FOOTER_SIZE} are needed",
            path=metadata.path,
            hint=_READ_ONLY_HINT,
        )
    if metadata.tail.state.usable:
        return False
    store.pwrite(room_end, metadata.footer_raw)
    store.sync()
    return True
