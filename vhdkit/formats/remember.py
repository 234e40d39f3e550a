# SPDX-License-Identifier: Apache-2.0
"""Notes of what an image has only in memory, kept where they survive the death of the process.

An image with blocks keeps bits and BAT entries in memory until the next flush (`commit` of its format): a power cut
loses what no flush confirmed, as with every disk. When only a *process* is killed, less may be lost, because its
clients live on: their writes were acknowledged, and they have no reason to write again. So a server may name a folder
in memory (tmpfs), in which each change of a bitmap or a BAT entry is noted before the write is answered. The next
server, in the same boot, first writes what was noted (`formats.recall`), and then the notes are removed.

Notes are valid for one state of one file: the one in which the dead process left it. Two things distinguish that state
from every other one.

    the label    a random token, an extended attribute of the image from the first note on until there are none, with
                 the folder of the notes. A writer of ours without that folder refuses while notes may be there, and
                 else removes the label (`disown`), so its writes are never mistaken for the dead process's.
    the witness  when the file was last written to, according to its file system, kept beside the notes in shared
                 memory after every change as long as there are notes. Programs that do not know labels, and a backup
                 that is restored in place, change that time; so does a copy that preserves times, since it brings
                 an older one.

A process that dies inside a system call leaves its last change without such a time. In this case a time is accepted
that is at most `SLACK_NS` later than the beginning of that change: a program without labels that writes so soon after
it goes unnoticed, unless the image itself shows it (the `recall` of its format). On file systems without labels
there is only the witness; for devices, and files on servers, whose clocks are not ours, only the label.

Decides how notes are framed and when they are removed. Two files are used in turn, so that the notes of a flush under
way are kept until it has ended; a file exists only as long as there is something in it. Must not know when an image is
written, what a note says (`recall` of each format), nor which notes are valid.

    FILE-ID-DEVICE-INODE.0, .1:     header, then (checksum, size of the image's file, length, note) ...
    FILE-ID-DEVICE-INODE.time:      `Witness`

The file id is `Format.file_id`, which never changes; `NULL_ID` for formats without one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import time
import zlib
from collections.abc import Iterator

from vhdkit import errors
from vhdkit.finding import Finding, Severity
from vhdkit.folder import is_file_name, is_regular, may_hold, read_whole, real_path, remove_file, write_whole
from vhdkit.shared_words import SharedWords
from vhdkit.store import FileStore, Store
from vhdkit.units import MIB

FLUSH_NOTES_BYTES = 32 * MIB  # of one file: a flush is due at this size, or small writes would fill the folder
MAX_NOTES_BYTES = 8 * FLUSH_NOTES_BYTES
SLACK_NS = 2_000_000_000  # from the beginning of a change until the file's time shows it, on a very busy machine
LABEL, KEPT_LABEL = "notes", "notes-kept"
MAGIC = b"vhdkeep4"
TOKEN_SIZE = 16
WITNESSED, LABELLED = 1, 2
HEADER = struct.Struct(">8sQ36s16sQQI16s")  # magic, turn, boot id, unique id, device, inode, flags, token
NOTE = struct.Struct(">IQI")  # CRC of all that follows, size of the file, length of the note; the note follows
WRITER, FLUSH = 0, 1  # the sources of changes; one of each at a time
WITNESS_WORDS = 6
_MAX_LABEL_BYTES = 1024
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_log = logging.getLogger(__name__)


class Witness:
    """When an image was last changed by its process, and whether it is being changed: see the module.

    For the writer and for the flush beside it: when a change began that has not ended, or 0; the file's time after the
    last one; when that was read. The first and the last by a clock of this boot.
    """

    def __init__(self, words: SharedWords, store: FileStore) -> None:
        self._store = store
        self._words = words.words

    def began(self, who: int, begun_ns: int) -> None:
        """A change is being made since `begun_ns`."""
        self._words[3 * who] = begun_ns

    def ended(self, who: int, begun_ns: int) -> None:
        """A change has ended; `begun_ns` is 0, or when a change began that is still being made."""
        words = self._words
        words[3 * who + 2] = time.monotonic_ns()
        words[3 * who + 1] = self._store.modified_ns()
        words[3 * who] = begun_ns


class Notes:
    """The notes of one open image. One writer at a time. Nothing here raises: no write or flush fails because of it.

    Every change of the file is announced by `change_begins` and `change_ended`, noted or not.
    """

    def __init__(self, store: FileStore, unique_id: bytes, folder: str, boot: bytes) -> None:
        """Use `begin`. `boot` is the present `boot_id`."""
        from secrets import token_bytes  # takes long, and only servers take notes

        self._store = store
        self._about = (boot, unique_id, *store.identity)
        self._folder = folder
        self._paths = note_paths(store, unique_id, folder)
        self._token = token_bytes(TOKEN_SIZE)
        self._flags = 0
        self._turn = 0
        self._files: list[FileStore] = []  # none while there is nothing to note
        self._ends = [HEADER.size, HEADER.size]
        self._has_failed = False
        self._flushing: int | None = None  # the file whose notes a flush is writing
        self._begun = [0, 0]  # when changes began that have not ended, for each of WRITER and FLUSH
        self.witness: Witness | None = None  # as long as there are notes

    def change_begins(self, who: int) -> None:
        """The file is about to be changed."""
        self._begun[who] = begun = time.monotonic_ns()
        witness = self.witness
        if witness is not None:
            witness.began(who, begun)

    def change_ended(self, who: int) -> None:
        """The file has been changed, or could not be."""
        self._begun[who] = 0
        witness = self.witness
        if witness is not None:
            witness.ended(who, 0)

    def prepare(self) -> None:
        """Prepare for a note that is coming soon; this is the slow part."""
        if not self._files and not self._has_failed:
            with self._trying():
                self._begin()
            if not self._files:
                self._store.set_label(LABEL, None)

    def note(self, body: bytes) -> None:
        """Note a change, in the format's own encoding. It counts from this moment on."""
        self.prepare()
        if self._has_failed:
            return
        now = self._turn % 2
        with self._trying():  # earlier notes stay valid
            framed = NOTE.pack(0, self._store.size(), len(body))[4:] + body
            self._files[now].pwrite(self._ends[now], struct.pack(">I", zlib.crc32(framed)) + framed)
            self._ends[now] += 4 + len(framed)

    def is_long(self) -> bool:
        """True when a flush is due because of the size of the notes."""
        return self._ends[self._turn % 2] >= FLUSH_NOTES_BYTES

    def flush_begins(self) -> None:
        """The flush writes what was noted until now; later notes are for the next flush."""
        if self._flushing is None and self._files:  # a flush that failed leaves notes that are still needed
            with self._trying():
                self._files[(self._turn + 1) % 2].pwrite(0, self._header_of(self._turn + 1))
                self._flushing = self._turn % 2
                self._turn += 1

    def flush_ended(self) -> None:
        """What the flush wrote is on the device."""
        if self._has_failed or self._ends[self._turn % 2] == HEADER.size:
            self.close()
        elif self._flushing is not None:
            with self._trying():
                self._files[self._flushing].truncate(HEADER.size)
                self._ends[self._flushing] = HEADER.size
                self._flushing = None

    def close(self) -> None:
        """Everything is on the device: remove the notes. Later notes start new files."""
        files, self._files, self.witness = self._files, [], None
        self._ends, self._flushing, self._has_failed = [HEADER.size, HEADER.size], None, False
        for file in files:
            file.close()
        if files:
            with self._trying():
                forget(self._store, self._about[1], self._folder)

    def leave(self) -> None:
        """Not everything is on the device: keep the notes for replay at the next open."""
        files, self._files, self._has_failed, self.witness = self._files, [], True, None
        for file in files:
            file.close()

    def _begin(self) -> None:
        self._flags = 0
        witness = None
        if not self._store.is_device and not self._store.is_remote():
            witness = Witness(SharedWords(self._paths[2], WITNESS_WORDS), self._store)
            witness.ended(WRITER, 0)
            self._flags |= WITNESSED
        if self._store.set_label(LABEL, label_of(self._token, self._folder)):
            self._flags |= LABELLED
        for number, path in enumerate(self._paths[:2]):
            write_whole(path, self._header_of(self._turn + number - self._turn % 2))
        self._files = [FileStore.open(path, writable=True) for path in self._paths[:2]]
        self.witness = witness
        for who in (WRITER, FLUSH) if witness is not None else ():  # a flush may be running concurrently
            assert witness is not None
            witness.began(who, self._begun[who])

    def _header_of(self, turn: int) -> bytes:
        return HEADER.pack(MAGIC, turn, *self._about, self._flags, self._token)

    @contextlib.contextmanager
    def _trying(self) -> Iterator[None]:
        try:
            yield
        except errors.VhdkitError as error:
            self._has_failed = True
            _log.warning("changes will not outlive this process until they are flushed: %s", error)


def begin(store: Store, unique_id: bytes | None) -> Notes | None:
    """Notes for an image that is being opened for writing; None if they are not wanted or cannot be written."""
    if unique_id is None or not isinstance(store, FileStore) or store.notes_folder is None:
        return None
    return Notes(store, unique_id, store.notes_folder, boot_id())


def refuse_unwritten(store: Store) -> None:
    """Raise NotesUnwritten if there may be notes of this image that the caller cannot write: see `are_elsewhere`.

    For a caller that is about to change the image, or to give it a child: either would make the notes void.
    """
    if not are_elsewhere(store):
        return
    assert isinstance(store, FileStore)
    place, image = errors.quoted(place_in(store.label(LABEL) or b"")), errors.quoted(store.name)
    raise errors.NotesUnwritten(
        f"writes that a killed server had acknowledged are noted in {place}, which was not given, and are not in the"
        " image yet",
        path=store.name,
        hint=f"start its server again with --remember {place}, or write them now: vhdkit check {image} --repair"
        f" --remember {place}; to give them up: vhdkit check {image} --repair --accept-data-loss",
    )


def disown(store: Store) -> None:
    """Remove the label of notes that are gone before a caller without a folder of notes changes the image.

    Raises NotesUnwritten if they may still exist. The caller holds the image's writer's lock.
    """
    if not isinstance(store, FileStore) or store.notes_folder is not None:
        return
    refuse_unwritten(store)
    if store.label(LABEL) is not None:
        renounce(store, "nothing is there any more")


def renounce(store: FileStore, why: str) -> None:
    """Make the notes void that the image's label names, wherever they are: they will never be written.

    The caller holds the image's writer's lock. A log message warns that acknowledged writes which only the notes held
    are lost, as in a power cut.
    """
    value = store.label(LABEL)
    if value is not None and is_of_this_boot(value):
        _log.warning("%s: %s: %s, so they are lost", errors.printable(store.name), described(value), why)
    if value is not None:
        store.set_label(LABEL, None)


def forget(store: FileStore, unique_id: bytes, folder: str) -> None:
    """Remove the notes, whose content is in the image or kept elsewhere. Raises AccessDenied, IoFailed."""
    for path in note_paths(store, unique_id, folder):
        remove_file(path)
    store.set_label(LABEL, None)


def label_of(token: bytes, place: str) -> bytes:
    """The value of a label: where the notes are, and in which boot they were taken."""
    return b" ".join((token.hex().encode(), boot_id(), os.fsencode(place)))[:_MAX_LABEL_BYTES]


def token_in(value: bytes) -> bytes | None:
    """The token in the value of a label, which any program may have written."""
    try:
        return bytes.fromhex(value.partition(b" ")[0].decode())
    except ValueError:
        return None


def is_of_this_boot(value: bytes) -> bool:
    """False for the label of notes of an earlier boot, whose notes are gone with the machine's memory."""
    return value.split(b" ", 2)[1:2] == [boot_id()]


def place_in(value: bytes) -> str:
    """The folder of the notes by a label, which any program may have written."""
    return os.fsdecode(b"".join(value.split(b" ", 2)[2:])[:_MAX_LABEL_BYTES])


def described(value: bytes) -> str:
    """The meaning of a label in words."""
    place = errors.printable(place_in(value)) or "an unnamed folder"
    return f"a killed server left notes of changes that are not in the image yet, in {place}"


def has_notes(store: Store, unique_id: bytes) -> bool:
    """True when there may be notes of this image in the folder that it was opened with."""
    if not isinstance(store, FileStore) or store.notes_folder is None:
        return False
    return any(is_regular(path) for path in note_paths(store, unique_id, store.notes_folder))


def are_elsewhere(store: Store) -> bool:
    """True when a label names notes in another folder than the caller's, which therefore cannot write them.

    They stay valid as long as the image is not changed. False if they are known to be gone: that folder is, or holds
    none of this file. A folder that cannot be examined may hold them.
    """
    value = store.label(LABEL) if isinstance(store, FileStore) else None
    if value is None or not is_of_this_boot(value):
        return False
    assert isinstance(store, FileStore)
    place = place_in(value)
    if not is_file_name(place) or (store.notes_folder is not None and _is_same(place, store.notes_folder)):
        return False
    return len(value) >= _MAX_LABEL_BYTES or may_hold(place, _endings_of(store)[:2])


def _is_same(one: str, other: str) -> bool:
    return one == other or real_path(one) == real_path(other)


def are_gone(store: FileStore) -> bool:
    """True when a label names notes in the caller's folder or of an earlier boot, and none are there.

    The next opening for writing removes the label.
    """
    return store.label(LABEL) is not None and not are_elsewhere(store)


def acknowledge(store: FileStore) -> None:
    """Remove the label of notes that were set aside: a caller has handled them."""
    store.set_label(KEPT_LABEL, None)


def findings(store: FileStore) -> tuple[Finding, ...]:
    """Findings about notes of this image, from its labels alone: the folder that holds them is not known."""
    found = []
    label, kept = store.label(LABEL), store.label(KEPT_LABEL)
    if label is not None and is_of_this_boot(label) and not store.in_use():
        message = (
            f"{described(label)}: serve the image again with --remember and that folder, the same way as before, to"
            " write them, or repair it with that --remember; nothing else changes the image until then, unless the"
            " notes are given up: --repair --accept-data-loss"
        )
        found.append(Finding(Severity.WARNING, "notes-unwritten", message, store.name))
    if kept is not None:
        place = errors.printable(place_in(kept))
        message = (
            "changes that a killed server had noted were left out, because the image was no longer in the state they"
            f" were noted for; the notes were kept as {place} (`vhdkit check --repair` clears this warning)"
        )
        found.append(Finding(Severity.WARNING, "notes-left-out", message, store.name))
    return tuple(found)


def note_paths(store: FileStore, unique_id: bytes, folder: str) -> list[str]:
    """The paths of an image's notes: two files that take turns, and their witness."""
    stem = os.path.join(folder, unique_id.hex())
    return [stem + ending for ending in _endings_of(store)]


def _endings_of(store: FileStore) -> tuple[str, ...]:
    """The ends of those paths, after the image's id."""
    device, inode = store.identity
    return tuple(f"-{device:x}-{inode:x}.{kind}" for kind in ("0", "1", "time"))


def boot_id() -> bytes:
    """The id of the current boot, 36 bytes."""
    return (read_whole(_BOOT_ID, MIB) or b"").strip()[:36].ljust(36, b"-")
