# SPDX-License-Identifier: Apache-2.0
"""What an image has in memory only, also written down where the death of its process does not reach.

A dynamic image keeps bits and BAT entries in memory until the next flush (`commit`): a power cut loses what no flush
confirmed, as with every disk. A *process* that is killed must lose less when its clients live on: they were told that
their writes are done, and have no reason to write again. So a server may name a folder in memory (tmpfs) in which each
change of a bitmap or a BAT entry is noted before the write is answered. Who opens the image next, in the same boot,
first writes what was noted, in the order that `commit` names, and the notes go.

Decides how notes are spelled, which are believed, and when they go. Notes are no images: they are in a private folder
of the server's, and still everything in them is checked against the image. Another program may have written to it
meanwhile, which knew nothing of them: then they are left out for good, with a warning, and the image is opened as it
is (`INV-ANSWERED-SURVIVES`). What tells is what such a program cannot help changing (`_contradiction`); one that wrote
only over sectors that were owned already leaves no trace, and no harm. Two files take turns, so that those of a flush
under way are kept until it has ended; they are there only as long as there is something in them. Must not know when an
image is written.

    UNIQUE-ID-DEVICE-INODE.0, .1:   header, then (block, where its bitmap begins, where it began before, where new
                                    blocks go, bitmap or nothing) ...
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from vhdkit import errors
from vhdkit.folder import read_whole, remove_file, write_whole
from vhdkit.formats.vhd.bat import Bat
from vhdkit.formats.vhd.layout import FOOTER_SIZE
from vhdkit.store import FileStore, Store
from vhdkit.units import MIB, PAGE_SIZE, SECTOR_SIZE, sectors_to_bytes

FLUSH_NOTES_BYTES = 32 * MIB  # of one file: a flush is due then, or small writes would fill the folder
_MAX_NOTES_BYTES = 8 * FLUSH_NOTES_BYTES
_MAGIC = b"vhdkeep2"
_HEADER = struct.Struct(">8sQ36s16sQQ")  # magic, turn, boot id, unique id, device, inode
# CRC of all that follows, block, bitmap's offset, bitmap's offset before or -1, where new blocks go, size of the file,
# bitmap's length
_NOTE = struct.Struct(">IIQqQQI")
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_log = logging.getLogger(__name__)
_folder: list[str] = []  # of this process, once it was named


def use_folder(path: str | None) -> None:
    """Note changes there from now on, for images that are opened for writing; None: no more."""
    _folder[:] = [] if path is None else [path]


class Notes:
    """The notes of one open image. One writer at a time. Nothing here raises: no write or flush fails for it."""

    def __init__(self, store: FileStore, unique_id: bytes, folder: str) -> None:
        self._store = store
        self._header = (_boot_id(), unique_id, *store.identity)
        self._paths = _paths(store, unique_id, folder)
        self._turn = 0
        self._files: list[FileStore] = []  # none while there is nothing to note
        self._ends = [_HEADER.size, _HEADER.size]
        self._has_failed = False
        self._flushing: int | None = None  # the file whose notes a flush is writing

    def prepare(self) -> None:
        """There will be something to note soon: what takes long about it is done now."""
        if not self._files and not self._has_failed:
            with self._trying():
                self._begin()

    def note(
        self,
        block_index: int,
        start_bytes: int,
        bitmap: bytes | bytearray | None,
        *,
        before_bytes: int,
        free_bytes: int,
    ) -> None:
        """The block begins there and has this bitmap; None: the one that is in the image.

        It began at `before_bytes`, negative for nowhere; the next new block goes behind `free_bytes`.
        """
        raw = b"" if bitmap is None else bytes(bitmap)
        self.prepare()
        if self._has_failed:
            return
        now = self._turn % 2
        with self._trying():  # what was noted before is still right
            places = (start_bytes, before_bytes, free_bytes, self._store.size())
            body = _NOTE.pack(0, block_index, *places, len(raw))[4:] + raw
            self._files[now].pwrite(self._ends[now], struct.pack(">I", zlib.crc32(body)) + body)
            self._ends[now] += 4 + len(body)

    def is_long(self) -> bool:
        """True when a flush is due for the notes' sake."""
        return self._ends[self._turn % 2] >= FLUSH_NOTES_BYTES

    def flush_begins(self) -> None:
        """What was noted until now is being written; what comes is for the next flush."""
        if self._flushing is None and self._files:  # a flush that failed leaves notes that are still needed
            with self._trying():
                self._files[(self._turn + 1) % 2].pwrite(0, self._header_of(self._turn + 1))
                self._flushing = self._turn % 2
                self._turn += 1

    def flush_ended(self) -> None:
        """What was being written is on the device."""
        if self._has_failed or self._ends[self._turn % 2] == _HEADER.size:
            self.close()
        elif self._flushing is not None:
            with self._trying():
                self._files[self._flushing].truncate(_HEADER.size)
                self._ends[self._flushing] = _HEADER.size
                self._flushing = None

    def close(self) -> None:
        """Everything is on the device: the notes go. What is noted later begins anew."""
        files, self._files = self._files, []
        self._ends, self._flushing, self._has_failed = [_HEADER.size, _HEADER.size], None, False
        for file in files:
            file.close()
        if files:
            with self._trying():
                _remove(self._paths)

    def leave(self) -> None:
        """Not everything is on the device: the notes stay for who opens the image next."""
        files, self._files, self._has_failed = self._files, [], True
        for file in files:
            file.close()

    def _begin(self) -> None:
        for number, path in enumerate(self._paths):
            write_whole(path, self._header_of(self._turn + number - self._turn % 2))
        self._files = [FileStore.open(path, writable=True) for path in self._paths]

    def _header_of(self, turn: int) -> bytes:
        return _HEADER.pack(_MAGIC, turn, *self._header)

    @contextlib.contextmanager
    def _trying(self) -> Iterator[None]:
        try:
            yield
        except errors.VhdkitError as error:
            self._has_failed = True
            _log.warning("changes will not outlive this process until they are flushed: %s", error)


def begin(store: Store, unique_id: bytes | None) -> Notes | None:
    """Notes for an image that is being opened for writing; None where nobody wants them or none can be written."""
    if not _folder or unique_id is None or not isinstance(store, FileStore):
        return None
    return Notes(store, unique_id, _folder[0])


def recover(store: Store, unique_id: bytes | None, bat: Bat, bitmap_size: int, block_size: int) -> dict[int, bytes]:
    """What was noted for this image and is believed: blocks and bitmaps, whose BAT entries are set in `bat`.

    Nothing is written to the image. Empty where there is nothing, or where anything in the notes contradicts the
    image: then they are thrown away, since what they say becomes no truer.
    """
    if not _folder or unique_id is None or not isinstance(store, FileStore):
        return {}
    notes = _read(store, unique_id, _folder[0])
    problem = _contradiction(notes, store, bat, bitmap_size, block_size)
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


def give_up(store: Store, unique_id: bytes | None, problem: str) -> None:
    """Throw the notes away, and say so: writes that were not flushed are lost, as in a power cut."""
    _log.warning("%s: what was noted of it is left out: %s", store.name, problem)
    forget(store, unique_id)


def forget(store: Store, unique_id: bytes | None) -> None:
    """What was noted is in the image, or never will be. Raises AccessDenied, IoFailed."""
    if _folder and unique_id is not None and isinstance(store, FileStore):
        _remove(_paths(store, unique_id, _folder[0]))


def _contradiction(notes: list[_Note], store: FileStore, bat: Bat, bitmap_size: int, block_size: int) -> str | None:
    """Why the image is not the one that the notes are of, or has been changed since; None where nothing shows it.

    Whoever noted these changes was the only one to write to the image. Its entry of a noted block is one of those that
    the block had; it has no bit that was not noted; and nobody else put a block behind all of them, cut the file, or
    made it longer than by the one block that may have been under construction. That blocks do not overlap is for the
    caller to see.
    """
    if not notes:
        return None
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
            return f"there is no room for block {one.block}"
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


class _Note(NamedTuple):
    block: int
    start: int
    before: int
    free_bytes: int
    file_bytes: int
    bitmap: bytes


def _read(store: FileStore, unique_id: bytes, folder: str) -> list[_Note]:
    """All notes in both files, the older first, up to the first that was not written whole."""
    found: list[tuple[int, list[_Note]]] = []
    for path in _paths(store, unique_id, folder):
        raw = read_whole(path, _MAX_NOTES_BYTES)
        if raw is None or len(raw) < _HEADER.size:
            continue
        magic, turn, *about = _HEADER.unpack_from(raw)
        if magic != _MAGIC or tuple(about) != (_boot_id(), unique_id, *store.identity):
            continue
        notes, position = [], _HEADER.size
        while position + _NOTE.size <= len(raw):
            crc, *places, length = _NOTE.unpack_from(raw, position)
            end = position + _NOTE.size + length
            if end > len(raw) or zlib.crc32(raw[position + 4 : end]) != crc:
                break
            notes.append(_Note._make((*places, raw[position + _NOTE.size : end])))
            position = end
        found.append((turn, notes))
    return [note for _, notes in sorted(found, key=lambda one: one[0]) for note in notes]


def _remove(paths: list[str]) -> None:
    for path in paths:
        remove_file(path)


def _union(one: bytes, other: bytes) -> bytes:
    """The bits of both: a sector that is owned stays owned."""
    if not other:
        return one
    size = len(other)
    return (int.from_bytes(one.ljust(size, b"\0"), "big") | int.from_bytes(other, "big")).to_bytes(size, "big")


def _paths(store: FileStore, unique_id: bytes, folder: str) -> list[str]:
    device, inode = store.identity
    return [os.path.join(folder, f"{unique_id.hex()}-{device:x}-{inode:x}.{number}") for number in (0, 1)]


def _boot_id() -> bytes:
    return (read_whole(_BOOT_ID, MIB) or b"").strip()[:36].ljust(36, b"-")
