# SPDX-License-Identifier: Apache-2.0
"""What an image has in memory only, also written down where the death of its process does not reach.

A dynamic image keeps bits and BAT entries in memory until the next flush (`commit`): a power cut loses what no flush
confirmed, as with every disk. A *process* that is killed must lose less when its clients live on: they were told that
their writes are done, and have no reason to write again. So a server may name a folder in memory (tmpfs) in which each
change of a bitmap or a BAT entry is noted before the write is answered. Who opens the image next, in the same boot,
first writes what was noted, in the order that `commit` names, and the notes go.

Decides how notes are spelled, which are believed, and when they go. Notes are no images: they are in a private folder
of the server's, and still everything in them is checked against the image. Two files take turns, so that those of a
flush under way are kept until it has ended. Must not know when an image is written.

    UNIQUE-ID-DEVICE-INODE.0, .1:   header, then (block, where its bitmap begins, bitmap or nothing) ...
"""

from __future__ import annotations

import logging
import os
import struct
import zlib

from vhdkit import errors
from vhdkit.folder import read_whole, remove_file, write_whole
from vhdkit.formats.vhd.bat import Bat
from vhdkit.store import FileStore, Store
from vhdkit.units import MIB, SECTOR_SIZE

MAX_NOTES_BYTES = 256 * MIB  # of one file: a flush comes long before
_MAGIC = b"vhdkeep1"
_HEADER = struct.Struct(">8sQ36s16sQQ")  # magic, turn, boot id, unique id, device, inode
_NOTE = struct.Struct(">IIQI")  # CRC of all that follows, block, bitmap's offset, bitmap's length
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_log = logging.getLogger(__name__)
_folder: list[str] = []  # of this process, once it was named


def use_folder(path: str | None) -> None:
    """Note changes there from now on, for images that are opened for writing; None: no more."""
    _folder[:] = [] if path is None else [path]


class Notes:
    """The notes of one open image. One writer at a time."""

    def __init__(self, store: FileStore, unique_id: bytes, folder: str) -> None:
        """Begin anew. Raises what writing raises."""
        self._header = (_boot_id(), unique_id, *store.identity)
        self._paths = _paths(store, unique_id, folder)
        self._turn = 0
        self._files: list[FileStore] = []
        for number, path in enumerate(self._paths):
            write_whole(path, self._header_of(number))
            self._files.append(FileStore.open(path, writable=True))
        self._ends = [_HEADER.size, _HEADER.size]
        self._has_failed = False
        self._flushing: int | None = None  # the file whose notes a flush is writing

    def _header_of(self, turn: int) -> bytes:
        return _HEADER.pack(_MAGIC, turn, *self._header)

    def note(self, block_index: int, start_bytes: int, bitmap: bytes | bytearray | None) -> None:
        """The block begins there and has this bitmap; None: the one that is in the image."""
        if self._has_failed:
            return
        raw = b"" if bitmap is None else bytes(bitmap)
        body = _NOTE.pack(0, block_index, start_bytes, len(raw))[4:] + raw
        now = self._turn % 2
        try:
            self._files[now].pwrite(self._ends[now], struct.pack(">I", zlib.crc32(body)) + body)
        except errors.VhdkitError as error:  # what was noted before is still right; the write itself has not failed
            self._has_failed = True
            _log.warning("changes will not outlive this process any more: %s", error)
        self._ends[now] += 4 + len(body)

    def flush_begins(self) -> None:
        """What was noted until now is being written; what comes is for the next flush."""
        if self._flushing is None and not self._has_failed:  # a flush that failed leaves notes that are still needed
            self._flushing = self._turn % 2
            self._turn += 1
            self._files[self._turn % 2].pwrite(0, self._header_of(self._turn))

    def flush_ended(self) -> None:
        """What was being written is on the device."""
        if self._flushing is not None:
            self._files[self._flushing].truncate(_HEADER.size)
            self._ends[self._flushing] = _HEADER.size
            self._flushing = None

    def close(self) -> None:
        """Everything is on the device: the notes go."""
        for file, path in zip(self._files, self._paths, strict=True):
            file.close()
            remove_file(path)


def begin(store: Store, unique_id: bytes | None) -> Notes | None:
    """Notes for an image that is being opened for writing; None where nobody wants them or none can be written."""
    if not _folder or unique_id is None or not isinstance(store, FileStore):
        return None
    try:
        return Notes(store, unique_id, _folder[0])
    except errors.VhdkitError as error:
        _log.warning("changes will not outlive this process: %s", error)
        return None


def recover(store: Store, unique_id: bytes | None, bat: Bat, bitmap_size: int, block_size: int) -> dict[int, bytes]:
    """What was noted for this image and is believed: blocks and bitmaps, whose BAT entries are set in `bat`.

    Nothing is written. Empty where there is nothing, or where anything in the notes contradicts the image.
    """
    if not _folder or unique_id is None or not isinstance(store, FileStore):
        return {}
    noted: dict[int, tuple[int, bytes]] = {}
    for block, start, raw in _read(store, unique_id, _folder[0]):
        end = start + bitmap_size + block_size
        if block >= len(bat) or start % SECTOR_SIZE or end > store.size() or len(raw) not in (0, bitmap_size):
            _log.warning("%s: what was noted does not fit and is left out", store.name)
            return {}
        before = noted.get(block, (start, b""))[1] or store.pread(start, bitmap_size)
        noted[block] = start, _union(before, raw)
    for block, (start, _) in noted.items():
        bat.set(block, start)
    return {block: raw for block, (_, raw) in noted.items()}


def forget(store: Store, unique_id: bytes | None) -> None:
    """What was noted is in the image."""
    if _folder and unique_id is not None and isinstance(store, FileStore):
        for path in _paths(store, unique_id, _folder[0]):
            remove_file(path)


def _read(store: FileStore, unique_id: bytes, folder: str) -> list[tuple[int, int, bytes]]:
    """All notes in both files, the older first, up to the first that was not written whole."""
    found: list[tuple[int, list[tuple[int, int, bytes]]]] = []
    for path in _paths(store, unique_id, folder):
        raw = read_whole(path, MAX_NOTES_BYTES)
        if raw is None or len(raw) < _HEADER.size:
            continue
        magic, turn, *about = _HEADER.unpack_from(raw)
        if magic != _MAGIC or tuple(about) != (_boot_id(), unique_id, *store.identity):
            continue
        notes, position = [], _HEADER.size
        while position + _NOTE.size <= len(raw):
            crc, block, start, length = _NOTE.unpack_from(raw, position)
            end = position + _NOTE.size + length
            if end > len(raw) or zlib.crc32(raw[position + 4 : end]) != crc:
                break
            notes.append((block, start, raw[position + _NOTE.size : end]))
            position = end
        found.append((turn, notes))
    return [note for _, notes in sorted(found, key=lambda one: one[0]) for note in notes]


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
