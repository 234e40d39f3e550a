# SPDX-License-Identifier: Apache-2.0
"""A VHDX with a log that was not replayed, as it will be after the replay.

Decides where the log may lie, what a sequence of entries does to the file, and which parts it must not change. Must
not know which structures it changes: `entries` examines whether a page lies over a guest's data.

Reading never changes the file: metadata are read through a `PatchedStore`, and a guest's data, which the log never
holds, from the file itself.

Source: [MS-VHDX] 2.3.3.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

from vhdkit.errors import CUT_SHORT_HINT, CorruptImage, CorruptReason
from vhdkit.formats.patched import PatchedStore, Patches
from vhdkit.formats.vhdx import layout, log
from vhdkit.formats.vhdx.header import HeaderPlace, is_dirty
from vhdkit.formats.vhdx.log import Entry, LogChange
from vhdkit.store import ReadStore, Store
from vhdkit.units import MIB, format_size

_MAX_SESSIONS = 64  # that left entries in a log; each costs one pass over the log
_MAX_CHANGES = 1 << 19  # in one sequence; the largest log holds half as many pages


@dataclass(frozen=True, slots=True)
class Replay:
    """What the log holds: `view` is the file after the replay; `changes` do not overlap and are in file order."""

    view: PatchedStore
    entries: tuple[Entry, ...]
    changes: tuple[LogChange, ...]


def log_place(store: ReadStore, place: HeaderPlace) -> tuple[int, int]:
    """(offset, size) of the log. Raises CorruptImage for an impossible one."""
    header = place.header
    where: dict[str, Any] = {"path": store.name, "structure": place.structure, "offset_bytes": place.offset_bytes}
    if header.log_version != layout.LOG_VERSION and is_dirty(header):
        raise CorruptImage(
            CorruptReason.LOG_VERSION,
            "the log has an unknown version, and holds changes that were not applied yet",
            expected=layout.LOG_VERSION,
            found=header.log_version,
            **where,
        )
    offset, size = header.log_offset, header.log_length
    if size == 0 and not is_dirty(header):
        return layout.HEADER_SECTION_SIZE, 0
    possible = offset % MIB == 0 and offset >= layout.HEADER_SECTION_SIZE and size % MIB == 0
    possible = possible and 0 < size <= layout.MAX_LOG_BYTES
    if possible and offset + size > store.size():
        raise CorruptImage(
            CorruptReason.LOG_PLACE,
            "the file ends before its log does",
            expected=f"at least {offset + size} bytes",
            found=f"{store.size()} bytes",
            hint=CUT_SHORT_HINT,
            **where,
        )
    if not possible:
        raise CorruptImage(
            CorruptReason.LOG_PLACE,
            "the log has an impossible place",
            expected=f"whole mebibytes after the first, inside the file, at most {format_size(layout.MAX_LOG_BYTES)}",
            found=f"{size} bytes at byte {offset:#x} of a file of {store.size()} bytes",
            **where,
        )
    return offset, size


def read_log(store: ReadStore, place: HeaderPlace, *, cut: bool = False) -> Replay | None:
    """What the current header's log changes; None if the log is empty. Raises CorruptImage, IoFailed.

    With `cut`, a file that is shorter than its log says is accepted, and does not grow.
    """
    offset, size = log_place(store, place)
    if not is_dirty(place.header):
        return None
    where: dict[str, Any] = {"path": store.name, "structure": "log", "offset_bytes": offset}
    ring = ring_of(store, (offset, size))
    sequence = log.active_sequence(log_entries(store, (offset, size), place.header.log_guid), size)
    if not sequence:
        raise CorruptImage(
            CorruptReason.LOG_SEQUENCE,
            "the header refers to a log with pending changes, but the log has no complete sequence of entries: the"
            " file is damaged, or was copied while a program was writing to it",
            hint="copy the image again while no program has it open; if this is the only copy, see"
            " `vhdkit check --repair`",
            **where,
        )
    newest = sequence[-1].header
    if store.size() < newest.flushed_file_offset and not cut:
        raise CorruptImage(
            CorruptReason.LOG_TRUNCATED,
            "the file is shorter than its log says: it was cut short",
            expected=f"at least {newest.flushed_file_offset} bytes",
            found=f"{store.size()} bytes",
            hint=CUT_SHORT_HINT,
            **where,
        )
    end = newest.last_file_offset
    if end > layout.MAX_FILE_BYTES:
        raise _misplaced("says that the file ends", end, where, offset + sequence[-1].offset_bytes)
    changes = _changes(sequence, ring, (offset, size), where)
    patches = Patches()
    for one in changes:
        patches.lay(one.file_offset_bytes, one.end_bytes, one.data)
    view_size = store.size() if cut else max([store.size(), end, *(one.end_bytes for one in changes[-1:])])
    return Replay(PatchedStore(store, view_size, patches), tuple(sequence), tuple(changes))


def ring_of(store: ReadStore, log_range: tuple[int, int]) -> log.Ring:
    """A function that reads the log at this (offset, size) of the file, which wraps around at its end."""
    offset, size = log_range

    def ring(start: int, count: int) -> bytes:
        raw = store.pread(offset + start, min(count, size - start))
        return raw if start + count <= size else raw + store.pread(offset, start + count - size)

    return ring


def log_entries(store: ReadStore, log_range: tuple[int, int], log_guid: bytes) -> dict[int, Entry]:
    """The valid entries of this id in the log, whether they form a sequence or not. Raises IoFailed."""
    return log.find_entries(ring_of(store, log_range), log_range[1], log_guid, _heads(store, *log_range))


def is_applied(store: ReadStore, log_range: tuple[int, int]) -> bool:
    """Whether the file has every change that the log holds, whatever id the entries have. Raises IoFailed."""
    ring, heads = ring_of(store, log_range), _heads(store, *log_range)
    ids = {layout.parse_log_entry_header(ring(head, layout.LOG_ENTRY_HEADER_SIZE)).log_guid for head in heads}
    if len(ids) > _MAX_SESSIONS:
        return False
    for log_guid in ids:
        sequence = log.active_sequence(log.find_entries(ring, log_range[1], log_guid, heads), log_range[1])
        try:
            changes = _changes(sequence, ring, log_range, {"path": store.name})
        except CorruptImage:
            return False
        if any(differs(store, one) for one in changes):
            return False
    return True


def differs(store: ReadStore, change: LogChange) -> bool:
    """Whether applying the change would alter the file; past its end, a file counts as zeros."""
    if change.data is not None:
        return store.pread(change.file_offset_bytes, change.size_bytes).ljust(change.size_bytes, b"\0") != change.data
    inside = max(min(change.end_bytes, store.size()) - change.file_offset_bytes, 0)
    for start, size, may_hold_data in store.data_runs(change.file_offset_bytes, inside):
        for position in range(start, start + size, MIB) if may_hold_data else ():
            if store.pread(position, min(MIB, start + size - position)).strip(b"\0"):
                return True
    return False


def apply_replay(store: Store, replay: Replay) -> None:
    """Apply the log's changes to the file, which grows if needed. Repeating it is harmless. Does not sync."""
    size = replay.view.size()
    if store.size() < size:
        store.truncate(size)
    for one in replay.changes:
        if one.data is None:
            store.punch(one.file_offset_bytes, one.size_bytes)
        elif one.file_offset_bytes < size:
            store.pwrite(one.file_offset_bytes, one.data[: size - one.file_offset_bytes])


def _heads(store: ReadStore, offset: int, size: int) -> list[int]:
    """The offsets in the log of all sectors that begin with an entry's signature. Holes are not read."""
    heads = []
    for start, length, may_hold_data in store.data_runs(offset, size):
        if not may_hold_data:
            continue
        first = start - (start - offset) % log.SECTOR
        for position in range(first, start + length, MIB):
            raw = store.pread(position, min(MIB, start + length - position))
            heads += [
                position - offset + place
                for place in range(0, len(raw), log.SECTOR)
                if raw.startswith(layout.LOG_ENTRY_SIGNATURE, place)
            ]
    return sorted(set(heads))


def _changes(
    sequence: list[Entry], ring: log.Ring, log_range: tuple[int, int], where: dict[str, Any]
) -> list[LogChange]:
    """The changes of the whole sequence in file order, where later ones have replaced earlier ones."""
    count = sum(one.header.descriptor_count for one in sequence)
    if count > _MAX_CHANGES:
        raise CorruptImage(
            CorruptReason.LOG_ENTRY, "too many changes", expected=f"at most {_MAX_CHANGES}", found=count, **where
        )
    changes: list[LogChange] = []
    for entry in sequence:
        for one in entry.changes(ring):
            _check_target(one, log_range, where, log_range[0] + entry.offset_bytes)
            if one.size_bytes:
                changes.append(one)
    return _last_ones(changes)


def _check_target(one: LogChange, log_range: tuple[int, int], where: dict[str, Any], entry_offset: int) -> None:
    """Refuse ranges that a log never changes: the identifier, headers, the log itself, and past the largest file."""
    start, stop = one.file_offset_bytes, one.end_bytes
    if start % log.SECTOR or stop % log.SECTOR:
        raise _misplaced("changes a part of a page", start, where, entry_offset)
    if start < layout.REGION_TABLE_OFFSETS[0]:
        raise _misplaced("changes the headers", start, where, entry_offset)
    if stop > layout.MAX_FILE_BYTES:
        raise _misplaced("changes a place", stop, where, entry_offset)
    if start < sum(log_range) and stop > log_range[0]:
        raise _misplaced("changes the log itself", start, where, entry_offset)


def _misplaced(what: str, place: int, where: dict[str, Any], entry_offset: int) -> CorruptImage:
    where = where | {"structure": "log entry", "offset_bytes": entry_offset}
    return CorruptImage(CorruptReason.LOG_OFFSET, f"{what}, at byte {place:#x}, which programs never log", **where)


def _last_ones(changes: list[LogChange]) -> list[LogChange]:
    """The ranges in which each byte is set by the last change to it, in file order.

    Goes through the changes backwards and paints what is not painted yet, skipping painted ranges in one step.
    """
    edges = sorted({edge for one in changes for edge in (one.file_offset_bytes, one.end_bytes)})
    painter: list[LogChange | None] = [None] * len(edges)
    following = list(range(len(edges) + 1))  # the next unpainted place, or a step towards it

    def unpainted(place: int) -> int:
        root = place
        while following[root] != root:
            root = following[root]
        while following[place] != root:
            following[place], place = root, following[place]
        return root

    for one in reversed(changes):
        stop = bisect_left(edges, one.end_bytes)
        place = unpainted(bisect_left(edges, one.file_offset_bytes))
        while place < stop:
            painter[place] = one
            following[place] = place + 1
            place = unpainted(place)
    left: list[LogChange] = []
    for place, top in enumerate(painter):
        if top is None:
            continue
        start, stop = edges[place], edges[place + 1]
        data = top.data
        if data is not None:
            data = data[start - top.file_offset_bytes : stop - top.file_offset_bytes]
        elif left and left[-1].data is None and left[-1].end_bytes == start:
            start = left.pop().file_offset_bytes
        left.append(LogChange(start, stop - start, data))
    return left
