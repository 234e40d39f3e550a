# SPDX-License-Identifier: Apache-2.0
"""The undo log: what a file held before a change that no order of writes can make safe.

Decides the format of the log, when it belongs to an image, and how a change is made and undone. Where the log
lies and when it is used is decided in `chain.records.pending`.

    1  the log, whole, under its name              sync    nothing has changed yet
    2  the change, in any order                    sync    a cut from here on is undone with the log
    3  the log is removed                          sync    the change is made

`INV-UNDO-LOG`: with the log beside it, a file reads as before the change, whatever part of the change was written.

A log is untrusted input, and the image beside it may have been replaced since. It is trusted only if it is whole
(it has a digest), of bounded size, made for an image with this id, and if every byte of the file where it would write
is the one from before the change or the one the change writes. A torn sector is accepted as one of the two only if
a format says that its checksum reveals that (`Format.is_torn`).

    magic 8 | version 4 | count 4 | id 16 | size before 8 | size after 8 | count x (offset 8, size 8)
    | per change: bytes before, bytes after | SHA-256 over all of it 32
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vhdkit import errors, formats
from vhdkit.formats.patched import Patches, ReadOnlyView
from vhdkit.store import Buffer, ReadStore, Store
from vhdkit.units import MIB, SECTOR_SIZE, TIB

MAX_LOG_BYTES = 64 * MIB  # the largest BAT, before and after, is 32 MiB; a log is held in memory
MAX_CHANGES = 1 << 16  # a table of the largest BAT changed in every page takes 4096
_MAX_TORN = 8  # a VHD's footers that a change writes: at the beginning, at the old end and at the new one
MAX_FILE_BYTES = 66 * TIB  # the largest disk of any format, and its structures; offsets stay far inside 63 bits
_MAGIC = b"vhdkUNDO"
_VERSION = 1
_HEAD = struct.Struct(">8sII16sQQ")
_PLACE = struct.Struct(">QQ")
_DIGEST_SIZE = hashlib.sha256().digest_size


@dataclass(frozen=True, slots=True)
class Change:
    """One range of the file: what it held, and what the change puts there. Both are equally long."""

    offset_bytes: int
    before: bytes
    after: bytes

    @property
    def end_bytes(self) -> int:
        """The first byte after it."""
        return self.offset_bytes + len(self.before)


@dataclass(frozen=True, slots=True)
class UndoLog:
    """A change to an image. `changes` are in order and do not overlap; sizes are the file's.

    A range past the end of the file, before or after, counts as zeros.
    """

    unique_id: bytes
    size_before_bytes: int
    size_after_bytes: int
    changes: tuple[Change, ...]


def plan_change(
    store: ReadStore, unique_id: bytes, writes: Sequence[tuple[int, Buffer]], size_after_bytes: int | None = None
) -> UndoLog:
    """The log for putting `writes`, (offset, bytes) without overlap, into the file and giving it a size.

    What a smaller size cuts off must be zeros, or be among the writes. Raises InvalidArgument when the log
    would be too large.
    """
    size_before = store.size()
    end = max((offset + len(data) for offset, data in writes), default=0)
    size_after = max(size_before, end) if size_after_bytes is None else size_after_bytes
    changes = []
    for offset, data in sorted(writes, key=lambda write: write[0]):
        before = store.pread(offset, len(data)) if offset < size_before else b""
        after = bytes(data)[: max(size_after - offset, 0)]
        changes.append(Change(offset, before.ljust(len(data), b"\0"), after.ljust(len(data), b"\0")))
    log = UndoLog(unique_id, size_before, size_after, tuple(changes))
    if _size_of(log) > MAX_LOG_BYTES or len(changes) > MAX_CHANGES:
        raise errors.InvalidArgument("the change is too large to be undone after a power cut", path=store.name)
    if not _is_possible(log):
        raise errors.InvalidArgument("the file is too large for a change that can be undone", path=store.name)
    return log


def _size_of(log: UndoLog) -> int:
    ranges = sum(_PLACE.size + 2 * len(change.before) for change in log.changes)
    return _HEAD.size + ranges + _DIGEST_SIZE


def _is_possible(log: UndoLog) -> bool:
    """True for sizes and ranges that this code writes."""
    end = 0
    for change in log.changes:
        if change.offset_bytes < end or not change.before:
            return False
        end = change.end_bytes
    return 0 < max(log.size_before_bytes, log.size_after_bytes, end) <= MAX_FILE_BYTES


def encode(log: UndoLog) -> bytes:
    """The bytes of the log's file."""
    parts = [
        _HEAD.pack(_MAGIC, _VERSION, len(log.changes), log.unique_id, log.size_before_bytes, log.size_after_bytes)
    ]
    parts += [_PLACE.pack(change.offset_bytes, len(change.before)) for change in log.changes]
    for change in log.changes:
        parts += [change.before, change.after]
    raw = b"".join(parts)
    return raw + hashlib.sha256(raw).digest()


def read_log(store: ReadStore, image: ReadStore | None = None) -> UndoLog | None:
    """The log in `store`, or None for anything but a whole log: torn, of an unknown version, or another file.

    With `image` also None for a log that cannot belong to this image as it is now. Cheap tests come first, the digest
    last. Takes memory in proportion to the file, and never more than twice MAX_LOG_BYTES. Raises IoFailed.
    """
    size = store.size()
    if not _HEAD.size + _DIGEST_SIZE <= size <= MAX_LOG_BYTES:
        return None
    head = _read_head(store)
    if head is None or (image is not None and not _may_belong(image, *head[1:])):
        return None
    places = _read_places(store, head[0], size)
    if places is None:
        return None
    raw = store.pread(0, size)
    body = memoryview(raw)[:-_DIGEST_SIZE]
    if len(raw) != size or hashlib.sha256(body).digest() != raw[-_DIGEST_SIZE:]:
        return None
    position = _HEAD.size + head[0] * _PLACE.size
    changes = []
    for offset, length in places:
        end = position + 2 * length
        changes.append(Change(offset, bytes(body[position : position + length]), bytes(body[position + length : end])))
        position = end
    log = UndoLog(*head[1:], tuple(changes))
    # The file may have changed while it was read: only what the digest covers counts.
    return log if encode(log) == raw and _is_possible(log) else None


def _read_head(store: ReadStore) -> tuple[int, bytes, int, int] | None:
    """(number of changes, image's id, its size before, its size after), None if this is not a log."""
    raw = store.pread(0, _HEAD.size)
    if len(raw) < _HEAD.size:
        return None
    magic, version, count, unique_id, size_before, size_after = _HEAD.unpack(raw)
    if magic != _MAGIC or version != _VERSION or count > MAX_CHANGES:
        return None
    return count, unique_id, size_before, size_after


def _read_places(store: ReadStore, count: int, size_bytes: int) -> list[tuple[int, int]] | None:
    """(offset, length) of each change, None if the list is cut short or the lengths do not add up to the file."""
    raw = store.pread(_HEAD.size, count * _PLACE.size)
    if len(raw) != count * _PLACE.size:
        return None
    places = [(int(offset), int(length)) for offset, length in _PLACE.iter_unpack(raw)]
    if _HEAD.size + len(raw) + 2 * sum(length for _, length in places) + _DIGEST_SIZE != size_bytes:
        return None
    return places


def _may_belong(image: ReadStore, unique_id: bytes, size_before: int, size_after: int) -> bool:
    """False when a change between these sizes of the image with this id cannot have left this file."""
    size, sizes = image.size(), (size_before, size_after)
    if not min(sizes) <= size <= max(sizes):
        return False
    return formats.probed(image).may_be_changing(image, unique_id, sizes)


def mentions(store: ReadStore, ids: Collection[bytes]) -> bool:
    """True when the store begins like a log and holds one of these ids anywhere; it need not be a whole log."""
    size = store.size()
    if not _HEAD.size + _DIGEST_SIZE <= size <= MAX_LOG_BYTES or store.pread(0, len(_MAGIC)) != _MAGIC:
        return False
    longest = max(map(len, ids), default=0)
    for position in range(0, size, MIB):
        piece = store.pread(position, MIB + longest)
        if any(one in piece for one in ids):
            return True
    return False


def belongs(store: ReadStore, log: UndoLog) -> bool:
    """True when this change, at any point of it, can have left the file; otherwise nothing may be undone.

    Raises IoFailed.
    """
    if not _may_belong(store, log.unique_id, log.size_before_bytes, log.size_after_bytes):
        return False
    size = store.size()
    return all(_is_either(store, size, change) for change in log.changes) and not _has_new_data(store, log)


def _has_new_data(store: ReadStore, log: UndoLog) -> bool:
    """True when a program has since written past the file's old end, where the change itself wrote nothing.

    That happens when the image had another name for a while, under which the log was not found.
    """
    position = log.size_before_bytes
    ends = [(change.offset_bytes, change.end_bytes) for change in log.changes]
    for start, stop in [*ends, (store.size(), store.size())]:
        if start > position and _has_data(store, position, start):
            return True
        position = max(position, stop)
    return False


def _has_data(store: ReadStore, start: int, stop: int) -> bool:
    """True when a byte of this part of the file, cut at its end, is not zero."""
    for offset, size, may_hold_data in store.data_runs(start, min(stop, store.size()) - start):
        for position in range(offset, offset + size, MIB) if may_hold_data else ():
            if store.pread(position, min(MIB, offset + size - position)).strip(b"\0"):
                return True
    return False


def _is_either(store: ReadStore, size_bytes: int, change: Change) -> bool:
    """True when the file has there what it held before the change, or what the change writes."""
    found = store.pread(change.offset_bytes, len(change.before)) if change.offset_bytes < size_bytes else b""
    if found in (change.before, change.after):
        return True
    found = found + change.before[len(found) :]  # cut off by the file's end: nothing to compare
    for torn, (start, stop) in enumerate(_sectors_of_neither(found, change)):
        piece, before, after = found[start:stop], change.before[start:stop], change.after[start:stop]
        if torn >= _MAX_TORN or not formats.is_torn(piece, before, after):
            return False
    return True


def _sectors_of_neither(found: bytes, change: Change) -> Iterator[tuple[int, int]]:
    """The sectors of the file, as ranges of the change's bytes, with a byte of neither side of the change."""
    first = -change.offset_bytes % SECTOR_SIZE  # where the first whole sector begins
    ours = [np.frombuffer(raw, dtype=np.uint8) for raw in (found, change.before, change.after)]
    for start in range(0, len(found), MIB):
        piece, before, after = (one[start : start + MIB] for one in ours)
        wrong = (piece != before) & (piece != after)
        if wrong.any():
            for sector in np.unique((np.flatnonzero(wrong) + start - first) // SECTOR_SIZE).tolist():
                begin = first + sector * SECTOR_SIZE
                yield max(begin, 0), min(begin + SECTOR_SIZE, len(found))


def apply_change(store: Store, log: UndoLog) -> None:
    """Make the change and sync it. The log must be on the device. Raises NoSpace, IoFailed, SyncFailed."""
    _put(store, log.size_after_bytes, [(change.offset_bytes, change.after) for change in log.changes])


def roll_back(store: Store, log: UndoLog) -> None:
    """Restore what the file held, and sync it. Only afterwards may the log be removed.

    After a cut during this, the change is rolled back again. Raises NoSpace, IoFailed, SyncFailed.
    """
    _put(store, log.size_before_bytes, [(change.offset_bytes, change.before) for change in log.changes])


def _put(store: Store, size_bytes: int, writes: list[tuple[int, bytes]]) -> None:
    for offset, data in writes:
        inside = data[: max(size_bytes - offset, 0)]
        if inside:
            store.pwrite(offset, inside)
    if store.size() != size_bytes:
        store.truncate(size_bytes)
    store.sync()


class UndoneStore(ReadOnlyView):
    """A file as it was before an unfinished change, for reading only: nothing is changed. See `store.Store`."""

    def __init__(self, store: Store, log: UndoLog) -> None:
        before = Patches()
        for change in log.changes:
            before.lay(change.offset_bytes, change.end_bytes, change.before)
        why = "is read-only: an unfinished change is hidden"
        super().__init__(store, log.size_before_bytes, before, why)
        self.store = store
