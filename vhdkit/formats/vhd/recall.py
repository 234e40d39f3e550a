# SPDX-License-Identifier: Apache-2.0
"""Which notes of a killed process are valid, and what they contain: the counterpart of `remember`.

Decides whether an image is in the state in which the process that took the notes left it
(`INV-ANSWERED-SURVIVES`). Notes are not images: they lie in a private folder of the server. Still, everything in
them is checked against the image.

    another boot, no whole header        no notes: they were lost with the machine's memory, or never begun
    another label                        vhdkit has written to the image since
    another time than the witness's      another program has, or a backup was restored in place
    blocks, bits, the file's end         are not those that the notes presume, whatever the times say

Invalid notes are refused permanently, with a warning: the files are renamed, so that nothing is destroyed, and the
image gets a label that `check` reports. Notes of 0.1.0 have neither label nor witness; for those the last row
decides. Must not know the order in which valid notes are written; that is decided in `opening`.
"""

from __future__ import annotations

import logging
import struct
import time
import zlib
from typing import NamedTuple

from vhdkit import errors
from vhdkit.folder import is_regular, read_whole, remove_file, rename_aside
from vhdkit.formats import remember
from vhdkit.formats.remember import HEADER, LABELLED, MAGIC, NOTE, SLACK_NS, WITNESS_WORDS, WITNESSED
from vhdkit.formats.vhd.bat import Bat
from vhdkit.formats.vhd.layout import FOOTER_SIZE
from vhdkit.store import FileStore, Store
from vhdkit.units import KIB, PAGE_SIZE, SECTOR_SIZE, sectors_to_bytes

_OLD_MAGIC = b"vhdkeep2"
_OLD_HEADER = struct.Struct(">8sQ36s16sQQ")  # of 0.1.0
_WORDS = struct.Struct(f"={WITNESS_WORDS}Q")
_log = logging.getLogger(__name__)


class _Note(NamedTuple):
    block: int
    start: int
    before: int
    free_bytes: int
    file_bytes: int
    bitmap: bytes


class _File(NamedTuple):
    """One of the two files of notes."""

    turn: int
    flags: int
    token: bytes
    notes: list[_Note]


def recover(store: Store, unique_id: bytes | None, bat: Bat, bitmap_size: int, block_size: int) -> dict[int, bytes]:
    """The valid notes of this image: blocks and bitmaps, whose BAT entries are set in `bat`.

    Nothing is written to the image. Empty without notes, or if anything shows that the image is in another state: then
    the notes are set aside permanently. The caller holds the image's writer's lock, if locks are used. Raises
    AccessDenied, IoFailed.
    """
    if unique_id is None or not isinstance(store, FileStore) or (folder := store.notes_folder) is None:
        return {}
    files = _read(store, unique_id, folder)
    notes = [note for one in files for note in one.notes]
    label = store.label(remember.LABEL)
    if not notes:
        _forget_empty(store, unique_id, folder, label, files)
        return {}
    problem = _another_state(store, unique_id, folder, files[-1], label)
    problem = problem or _contradiction(notes, store, bat, bitmap_size, block_size)
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


def _forget_empty(store: FileStore, unique_id: bytes, folder: str, label: bytes | None, files: list[_File]) -> None:
    """Nothing has to be written: remove what is left of notes, and warn of notes in the folder of another label.

    Of notes in this folder nothing was lost: their process died while it began or removed them.
    """
    is_elsewhere = label is not None and remember.place_in(label) != folder and remember.is_of_this_boot(label)
    if label is not None and is_elsewhere and remember.token_in(label) not in [one.token for one in files]:
        _log.warning("%s: %s: they will not be used", errors.printable(store.name), remember.described(label))
    for path in remember.note_paths(store, unique_id, folder):
        if is_regular(path):
            remove_file(path)
    store.set_label(remember.LABEL, None)


def give_up(store: Store, unique_id: bytes | None, problem: str) -> None:
    """Set the notes aside, with a warning: acknowledged writes that were not flushed are lost, as in a power cut."""
    if unique_id is None or not isinstance(store, FileStore) or (folder := store.notes_folder) is None:
        return
    kept = rename_aside(remember.note_paths(store, unique_id, folder))
    place = kept[0] if kept else folder
    store.set_label(remember.LABEL, None)
    store.set_label(remember.KEPT_LABEL, remember.label_of(b"", place))
    _log.warning(
        "%s: changes that a killed server had noted are left out: %s; the notes are kept as %s",
        errors.printable(store.name),
        problem,
        errors.printable(place),
    )


def writing_begins(store: Store, unique_id: bytes | None) -> None:
    """The noted changes are about to be written: if that is interrupted, the notes are still valid.

    Raises AccessDenied, IoFailed.
    """
    assert unique_id is not None and isinstance(store, FileStore) and store.notes_folder is not None
    path = remember.note_paths(store, unique_id, store.notes_folder)[2]
    if is_regular(path):
        with FileStore.open(path, writable=True, follow_links=False) as words:
            words.pwrite(0, struct.pack("=Q", time.monotonic_ns()))


def written(store: Store, unique_id: bytes | None) -> None:
    """The noted changes are on the device: remove the notes. Raises AccessDenied, IoFailed."""
    assert unique_id is not None and isinstance(store, FileStore) and store.notes_folder is not None
    remember.forget(store, unique_id, store.notes_folder)


def _another_state(store: FileStore, unique_id: bytes, folder: str, last: _File, label: bytes | None) -> str | None:
    """Why the image is not as the process that took the notes left it; None if nothing shows that."""
    if last.flags & LABELLED and (label is None or remember.token_in(label) != last.token):
        return "another vhdkit program has since opened it for writing"
    if not last.flags & WITNESSED:
        return None
    raw = read_whole(remember.note_paths(store, unique_id, folder)[2], KIB)
    if raw is None or len(raw) != _WORDS.size:
        return "the state in which it was left was not recorded"
    words = _WORDS.unpack(raw)
    begun, (left_ns, read_ns) = [words[0], words[3]], max(zip(words[1::3], words[2::3], strict=True))
    now = store.modified_ns()
    if now == left_ns:
        return None
    last_ns = left_ns + max(max(begun) - read_ns, 0) + SLACK_NS
    if any(begun) and left_ns < now <= last_ns:
        return None  # it died in the middle of a change
    return "it has since been written to, or replaced by another version"


def _contradiction(notes: list[_Note], store: FileStore, bat: Bat, bitmap_size: int, block_size: int) -> str | None:
    """Why the image is not the one of the notes, or has been changed since; None if nothing shows that.

    The process that took the notes was the only writer of the image. Its entry of a noted block is one of those that
    the block had; it has no bit that was not noted; and no other program put a block after all of them, truncated the
    file, or extended it by more than the one block that may have been under construction. The caller checks that
    blocks do not overlap.
    """
    free, then, size = notes[-1].free_bytes, notes[-1].file_bytes, store.size()
    room = bitmap_size + block_size + PAGE_SIZE + FOOTER_SIZE
    if not then <= size <= then + room:
        return f"the file has another size, {size} bytes instead of {then}"
    used = bat.entries[bat.allocated()]
    if len(used) and sectors_to_bytes(int(used.max())) >= free:
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
    last = {one.block: one for one in notes if one.bitmap}
    used_bytes = -(-block_size // SECTOR_SIZE // 8)
    for one in last.values():
        stored = int.from_bytes(store.pread(one.start, bitmap_size)[:used_bytes], "big")
        if stored & ~int.from_bytes(one.bitmap[:used_bytes], "big"):
            return f"another program has written to block {one.block}"
    return None


def _read(store: FileStore, unique_id: bytes, folder: str) -> list[_File]:
    """Both files of notes, the older first, each up to the first incomplete note."""
    found = []
    for path in remember.note_paths(store, unique_id, folder)[:2]:
        raw = read_whole(path, remember.MAX_NOTES_BYTES)
        if raw is None or len(raw) < _OLD_HEADER.size:
            continue
        magic, turn, *about = _OLD_HEADER.unpack_from(raw)
        flags, token, position = 0, b"", _OLD_HEADER.size
        if magic == MAGIC and len(raw) >= HEADER.size:
            *_, flags, token = HEADER.unpack_from(raw)
            position = HEADER.size
        elif magic != _OLD_MAGIC:
            continue
        if tuple(about) == (remember.boot_id(), unique_id, *store.identity):
            found.append(_File(turn, flags, token, _notes_in(raw, position)))
    return sorted(found, key=lambda one: one.turn)


def _notes_in(raw: bytes, position: int) -> list[_Note]:
    notes = []
    while position + NOTE.size <= len(raw):
        crc, *places, length = NOTE.unpack_from(raw, position)
        end = position + NOTE.size + length
        if end > len(raw) or zlib.crc32(raw[position + 4 : end]) != crc:
            break
        notes.append(_Note._make((*places, raw[position + NOTE.size : end])))
        position = end
    return notes


def _union(one: bytes, other: bytes) -> bytes:
    """The bits of both: a sector that is owned stays owned."""
    if not other:
        return one
    size = len(other)
    return (int.from_bytes(one.ljust(size, b"\0"), "big") | int.from_bytes(other, "big")).to_bytes(size, "big")
