# SPDX-License-Identifier: Apache-2.0
"""What the notes of a VHD say, and which images they cannot be about: see `formats.remember`.

Decides how a change of a bitmap or a BAT entry is noted, and what in an image contradicts its notes
(`INV-ANSWERED-SURVIVES`): blocks, bits or an end of the file that are not those that the notes presume. Must not know
what the files of notes show (`formats.recall`), nor the order in which valid notes are written (`opening`).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from vhdkit.formats.recall import Note, give_up, recalled
from vhdkit.formats.vhd.bat import Bat
from vhdkit.formats.vhd.layout import FOOTER_SIZE
from vhdkit.store import Store
from vhdkit.units import PAGE_SIZE, SECTOR_SIZE, sectors_to_bytes

_FIELDS = struct.Struct(">IQqQ")  # as in `_Note`; the bitmap follows, or nothing if it is the one in the image


class _Note(NamedTuple):
    """Where a block's bitmap begins and began before (negative: nowhere), and where the next new block goes."""

    block: int
    start: int
    before: int
    free_bytes: int
    bitmap: bytes


def note_of(
    block_index: int, start_bytes: int, before_bytes: int, free_bytes: int, bitmap: bytes | bytearray
) -> bytes:
    """The note of a change: see `_Note`. The bitmap may be empty: then it is the one in the image."""
    return _FIELDS.pack(block_index, start_bytes, before_bytes, free_bytes) + bitmap


def recover(store: Store, unique_id: bytes, bat: Bat, bitmap_size: int, block_size: int) -> dict[int, bytes]:
    """The valid notes of this image: blocks and bitmaps, whose BAT entries are set in `bat`.

    Nothing is written to the image. Empty without notes, or if anything shows that the image is in another state: then
    the notes are set aside permanently. Raises as `recalled` does.
    """
    found = recalled(store, unique_id)
    if not found:
        return {}
    problem = "a note is damaged" if any(len(one.body) < _FIELDS.size for one in found) else None
    notes = [_Note._make((*_FIELDS.unpack_from(body), body[_FIELDS.size :])) for body, _ in found if problem is None]
    problem = problem or _contradiction(notes, found[-1], store, bat, bitmap_size, block_size)
    if problem is not None:
        give_up(store, unique_id, problem)
        return {}
    noted: dict[int, tuple[int, bytes]] = {}
    for one in notes:
        before = noted.get(one.block, (one.start, b""))[1] or store.pread(one.start, bitmap_size)
        noted[one.block] = one.start, _union(before, one.bitmap)
    for block, (start, _) in noted.items():
        bat.set(block, start)
    return {block: raw for block, (_, raw) in noted.items()}


def _contradiction(
    notes: list[_Note], last: Note, store: Store, bat: Bat, bitmap_size: int, block_size: int
) -> str | None:
    """Why the image is not the one of the notes, or has been changed since; None if nothing shows that.

    The process that took the notes was the only writer of the image. Its entry of a noted block is one of those that
    the block had; it has no bit that was not noted; and no other program put a block after all of them, truncated the
    file, or extended it by more than the one block that may have been under construction. The caller checks that
    blocks do not overlap.
    """
    size, room = store.size(), bitmap_size + block_size + PAGE_SIZE + FOOTER_SIZE
    if size > last.file_bytes + room:
        return f"the file has another size, {size} bytes instead of {last.file_bytes}"
    used = bat.entries[bat.allocated()]
    if len(used) and sectors_to_bytes(int(used.max())) >= notes[-1].free_bytes:
        return "another program has added blocks"
    places: dict[int, set[int]] = {}
    for one in notes:
        end = one.start + bitmap_size + block_size
        if one.block >= len(bat) or one.start % SECTOR_SIZE or end > size or len(one.bitmap) not in (0, bitmap_size):
            return f"block {one.block} does not fit into the file"
        places.setdefault(one.block, set()).update((one.start, one.before))
    for block, known in places.items():
        if bat.block_start(block) not in known:
            return f"another program has moved or added block {block}"
    latest = {one.block: one for one in notes if one.bitmap}
    used_bytes = -(-block_size // SECTOR_SIZE // 8)
    for one in latest.values():
        stored = int.from_bytes(store.pread(one.start, bitmap_size)[:used_bytes], "big")
        if stored & ~int.from_bytes(one.bitmap[:used_bytes], "big"):
            return f"another program has written to block {one.block}"
    return None


def _union(one: bytes, other: bytes) -> bytes:
    """The bits of both: a sector that is owned stays owned."""
    if not other:
        return one
    size = len(other)
    return (int.from_bytes(one.ljust(size, b"\0"), "big") | int.from_bytes(other, "big")).to_bytes(size, "big")
