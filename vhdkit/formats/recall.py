# SPDX-License-Identifier: Apache-2.0
"""Which notes of a killed process are valid, as far as the files tell: the counterpart of `remember`.

Decides whether an image is still the file that the process which took the notes left (`INV-ANSWERED-SURVIVES`). Notes
are not images: they lie in a private folder of the server. Still, everything in them is checked.

    another boot, no whole header        no notes: they were lost with the machine's memory, or never begun
    another label                        vhdkit has written to the image since
    another time than the witness's      another program has, or a backup was restored in place
    the file has become shorter          likewise
    what the image itself shows          the `recall` of its format decides, whatever the times say

Invalid notes are refused permanently, with a warning: the files are renamed, so that nothing is destroyed, and the
image gets a label that `check` reports. Notes of 0.1.0 have neither label nor witness; for those the last rows decide.
Must not know what a note says, nor the order in which valid notes are written.
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
from vhdkit.store import FileStore, Store
from vhdkit.units import KIB

_WORDS = struct.Struct(f"={WITNESS_WORDS}Q")
_log = logging.getLogger(__name__)


class Note(NamedTuple):
    """A note, and the size that the image's file had when it was taken."""

    body: bytes
    file_bytes: int


class _Kind(NamedTuple):
    """How a version of vhdkit framed notes: the last two fields of `note` are as in `NOTE`, the note follows them.

    In earlier versions its beginning precedes them.
    """

    header: struct.Struct
    note: struct.Struct


class _File(NamedTuple):
    """One of the two files of notes."""

    turn: int
    flags: int
    token: bytes
    notes: list[Note]


_OLD_NOTE = struct.Struct(">I28sQI")
_KINDS = {
    MAGIC: _Kind(HEADER, NOTE),
    b"vhdkeep3": _Kind(HEADER, _OLD_NOTE),
    b"vhdkeep2": _Kind(struct.Struct(">8sQ36s16sQQ"), _OLD_NOTE),  # of 0.1.0
}


def _folder_of(store: Store) -> tuple[FileStore, str] | None:
    if not isinstance(store, FileStore) or store.notes_folder is None:
        return None
    return store, store.notes_folder


def recalled(store: Store, unique_id: bytes | None) -> list[Note]:
    """The notes of this image, oldest first, unless anything about the files shows that it is in another state.

    Then they are set aside permanently and the result is empty, as it is without notes. The caller holds the image's
    writer's lock, if locks are used. Raises NotesUnwritten if a later process took notes in another folder,
    AccessDenied, IoFailed.
    """
    place = _folder_of(store)
    if place is None or unique_id is None:
        return []
    file, folder = place
    files = _read(file, unique_id, folder)
    notes = [note for one in files for note in one.notes]
    label = file.label(remember.LABEL)
    is_of_others = label is not None and remember.token_in(label) not in [one.token for one in files]
    if is_of_others:
        remember.refuse_unwritten(file)
    if not notes:
        _forget_empty(file, unique_id, folder, is_of_others)
        return []
    problem = _another_state(file, unique_id, folder, files[-1], label)
    size = file.size()
    if problem is None and size < notes[-1].file_bytes:
        problem = f"the file has another size, {size} bytes instead of {notes[-1].file_bytes}"
    if problem is not None:
        give_up(store, unique_id, problem)
        return []
    return notes


def _forget_empty(store: FileStore, unique_id: bytes, folder: str, is_of_others: bool) -> None:
    """Nothing has to be written: remove what is left of notes, and warn of notes that another folder no longer has.

    Of notes in this folder nothing was lost: their process died while it began or removed them.
    """
    for path in remember.note_paths(store, unique_id, folder):
        if is_regular(path):
            remove_file(path)
    label = store.label(remember.LABEL)
    if label is not None and is_of_others and remember.place_in(label) != folder:
        remember.renounce(store, "nothing is there any more")
    store.set_label(remember.LABEL, None)


def give_up(store: Store, unique_id: bytes | None, problem: str) -> None:
    """Set the notes aside, with a warning: acknowledged writes that were not flushed are lost, as in a power cut."""
    place = _folder_of(store)
    if place is None or unique_id is None:
        return
    file, folder = place
    kept = rename_aside(remember.note_paths(file, unique_id, folder))
    where = kept[0] if kept else folder
    file.set_label(remember.LABEL, None)
    file.set_label(remember.KEPT_LABEL, remember.label_of(b"", where))
    _log.warning(
        "%s: changes that a killed server had noted are left out: %s; the notes are kept as %s",
        errors.printable(store.name),
        problem,
        errors.printable(where),
    )


def writing_begins(store: Store, unique_id: bytes) -> None:
    """The noted changes are about to be written: if that is interrupted, the notes are still valid.

    Raises AccessDenied, IoFailed.
    """
    place = _folder_of(store)
    assert place is not None
    path = remember.note_paths(place[0], unique_id, place[1])[2]
    if is_regular(path):
        with FileStore.open(path, writable=True, follow_links=False) as words:
            words.pwrite(0, struct.pack("=Q", time.monotonic_ns()))


def written(store: Store, unique_id: bytes) -> None:
    """The noted changes are on the device: remove the notes. Raises AccessDenied, IoFailed."""
    place = _folder_of(store)
    assert place is not None
    remember.forget(place[0], unique_id, place[1])


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


def _read(store: FileStore, unique_id: bytes, folder: str) -> list[_File]:
    """Both files of notes, the older first, each up to the first incomplete note."""
    found = []
    for path in remember.note_paths(store, unique_id, folder)[:2]:
        raw = read_whole(path, remember.MAX_NOTES_BYTES)
        kind = _KINDS.get(raw[: len(MAGIC)]) if raw is not None else None
        if raw is None or kind is None or len(raw) < kind.header.size:
            continue
        _, turn, *fields = kind.header.unpack_from(raw)
        flags, token = fields[4:] or (0, b"")
        if tuple(fields[:4]) == (remember.boot_id(), unique_id, *store.identity):
            found.append(_File(turn, flags, token, _notes_in(raw, kind)))
    return sorted(found, key=lambda one: one.turn)


def _notes_in(raw: bytes, kind: _Kind) -> list[Note]:
    notes = []
    position = kind.header.size
    while position + kind.note.size <= len(raw):
        crc, *fields = kind.note.unpack_from(raw, position)
        start = position + kind.note.size
        *beginning, file_bytes, length = fields
        end = start + length
        if end > len(raw) or zlib.crc32(raw[position + 4 : end]) != crc:
            break
        notes.append(Note(b"".join(beginning) + raw[start:end], file_bytes))
        position = end
    return notes
