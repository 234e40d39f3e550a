# SPDX-License-Identifier: Apache-2.0
"""The repair of a VHDX's log: it is replayed or, with consent, discarded.

Decides whether a log can be replayed, and which parts of the disk may be out of date without it. Must not know how
headers are restored (`repair_headers`): there is a current one when this step begins.

- A complete log is replayed, as by any opening for writing.
- A log that cannot be replayed, or that would change a guest's data, is discarded with consent. The blocks whose BAT
  entries or bits differ in the log are doubtful.
- In a truncated file the log is replayed as far as the file goes; `repair_blocks` then reports what is missing.
- A log in an impossible place is removed from the headers; the file gets another one when everything else is repaired
  (`repair_headers`).

Source: [MS-VHDX] 2.3.3.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vhdkit.errors import CorruptImage, CorruptReason
from vhdkit.formats.draft import DraftStore
from vhdkit.formats.format import ByteRange, Consent, Fix
from vhdkit.formats.spans import of_blocks
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.bat import Bat
from vhdkit.formats.vhdx.bitmap import bytes_per_block
from vhdkit.formats.vhdx.entries import changes_data
from vhdkit.formats.vhdx.header import HeaderPlace, current_slot, is_dirty, read_headers
from vhdkit.formats.vhdx.log import LogChange
from vhdkit.formats.vhdx.metadata import Metadata, read_metadata
from vhdkit.formats.vhdx.repair_headers import LOSS, without_log, write_headers
from vhdkit.formats.vhdx.replay import (
    Replay,
    apply_replay,
    differs,
    log_entries,
    log_place,
    read_log,
    ring_of,
)
from vhdkit.image import NULL_ID
from vhdkit.units import MIB

_MAX_REPLAYED_BYTES = 16 * MIB  # an undo log must hold these bytes, and those that they replace
_WHY = {
    CorruptReason.LOG_SEQUENCE: "the log has no complete sequence of entries",
    CorruptReason.LOG_OFFSET: "the log changes places that programs never log",
    CorruptReason.LOG_ENTRY: "the log has too many changes",
}
_OPENING = "a program that opens it for writing"  # such a program replays the log without an undo log


def mend_log(draft: DraftStore, consent: Consent) -> Iterator[Fix]:
    """Empty the log, and remove one in an impossible place."""
    places = read_headers(draft)
    slot = current_slot(places)
    if slot is None:
        return
    place = places[slot]
    try:
        replay = read_log(draft, place)
    except CorruptImage as error:
        if error.reason is CorruptReason.LOG_VERSION or place.header.version != layout.HEADER_VERSION:
            return
        yield from _mend_broken(draft, place, error, consent)
        return
    if replay is not None:
        yield from _replay(draft, place, replay, consent)


def _replay(draft: DraftStore, place: HeaderPlace, replay: Replay, consent: Consent) -> Iterator[Fix]:
    """Replay a complete log, unless it is too large for a repair or changes a guest's data."""
    if _over_data(draft):
        yield from _discard(draft, place, "the log would change a guest's data", replay.changes, consent)
        return
    pending = [one for one in replay.changes if differs(draft, one)]
    if sum(_held(draft, one) for one in pending) > _MAX_REPLAYED_BYTES:
        yield Fix("log-not-replayed", "the log holds more changes than one repair can undo", _OPENING)
        return
    apply_replay(draft, replay)
    write_headers(draft, replace(place.header, log_guid=NULL_ID))
    entries = f"{len(replay.entries)} entries" if len(replay.entries) > 1 else "one entry"
    yield Fix("log-not-replayed", f"replayed the log ({entries})")


def _held(draft: DraftStore, change: LogChange) -> int:
    if change.data is not None:
        return change.size_bytes
    size = max(min(change.end_bytes, draft.size()) - change.file_offset_bytes, 0)
    return sum(count for _, count, may_hold in draft.data_runs(change.file_offset_bytes, size) if may_hold)


def _over_data(draft: DraftStore) -> bool:
    """Whether the log changes a guest's data; blocks that overlap structures do not count."""
    try:
        metadata = read_metadata(draft)
    except CorruptImage:
        return False  # what is missing may be in the log
    bat = Bat.load(metadata.view, metadata.regions.bat.file_offset, metadata.shape)
    return changes_data(metadata, bat)


# -- logs that cannot be replayed -------------------------------------------------------------------------------------


def _mend_broken(draft: DraftStore, place: HeaderPlace, error: CorruptImage, consent: Consent) -> Iterator[Fix]:
    if error.reason is CorruptReason.LOG_PLACE:
        yield from _move(draft, place, consent)
        return
    if error.reason is not CorruptReason.LOG_TRUNCATED:
        changes = _known_changes(draft, place)
        yield from _discard(draft, place, _WHY.get(error.reason, "the log cannot be replayed"), changes, consent)
        return
    if not consent.data_loss:
        yield Fix("log-truncated", f"{error.problem}; the data at its end is lost", LOSS)
        return
    try:
        replay = read_log(draft, place, cut=True)
    except CorruptImage as other:
        yield from _discard(draft, place, _WHY.get(other.reason, "the log cannot be replayed"), (), consent)
        return
    assert replay is not None
    if sum(one.size_bytes for one in replay.changes if one.data) > _MAX_REPLAYED_BYTES:
        yield Fix("log-truncated", "the log holds more changes than one repair can undo", "a copy by hand")
        return
    apply_replay(draft, replay)
    write_headers(draft, replace(place.header, log_guid=NULL_ID))
    yield Fix("log-truncated", f"{error.problem}: replayed its log as far as the file goes")


def _move(draft: DraftStore, place: HeaderPlace, consent: Consent) -> Iterator[Fix]:
    """The header names an impossible place for the log."""
    dirty = is_dirty(place.header)
    if dirty and not consent.data_loss:
        yield Fix("log-place", "the log has an impossible place, and the changes in it would be lost", LOSS)
        return
    write_headers(draft, without_log(place.header))
    lost = "; the changes in it are lost" if dirty else ""
    yield Fix("log-place", f"the log had an impossible place: removed it from the headers{lost}")


def _known_changes(draft: DraftStore, place: HeaderPlace) -> list[LogChange]:
    """The changes in the valid entries of the log, although these form no complete sequence."""
    log_range = log_place(draft, place)
    ring = ring_of(draft, log_range)
    entries = log_entries(draft, log_range, place.header.log_guid)
    return [change for entry in entries.values() for change in entry.changes(ring)]


def _discard(
    draft: DraftStore, place: HeaderPlace, why: str, changes: Iterable[LogChange], consent: Consent
) -> Iterator[Fix]:
    """Discard the log. Where the file differs from it, the disk is doubtful."""
    doubtful, is_known = _affected(draft, place, [one for one in changes if differs(draft, one)])
    what = "the blocks below may be out of date" if doubtful else "no block is known to be out of date"
    if not is_known:
        what = "any part of the disk may be out of date"
    if not consent.data_loss:
        yield Fix("log-discarded", f"{why}; without it {what}", LOSS, (), doubtful)
        return
    write_headers(draft, replace(place.header, log_guid=NULL_ID))
    yield Fix("log-discarded", f"{why}: discarded it; {what}", None, (), doubtful)


def _affected(draft: DraftStore, place: HeaderPlace, changes: list[LogChange]) -> tuple[tuple[ByteRange, ...], bool]:
    """(the ranges of the disk that the changes concern, whether these are known)"""
    trial = DraftStore(draft)
    write_headers(trial, replace(place.header, log_guid=NULL_ID))
    try:
        metadata = read_metadata(trial)
    except CorruptImage:
        return (), False
    bat = Bat.load(trial, metadata.regions.bat.file_offset, metadata.shape)
    bitmaps = sorted((offset, chunk) for chunk, offset in bat.bitmaps())
    blocks = np.zeros(metadata.shape.block_count, dtype=np.bool_)
    for one in changes:
        _mark(trial, metadata, bitmaps, one, blocks)
    return tuple(of_blocks(blocks, metadata.items.block_size, metadata.items.size_bytes)), True


def _mark(
    draft: DraftStore,
    metadata: Metadata,
    bitmaps: list[tuple[int, int]],
    change: LogChange,
    blocks: NDArray[np.bool_],
) -> None:
    """Mark the blocks whose entries or bits a change sets; all blocks if it concerns other structures."""
    region = metadata.regions.bat
    start, stop = change.file_offset_bytes, change.end_bytes
    if start >= region.file_offset and stop <= region.file_offset + region.length:
        _mark_entries(draft, metadata, change, blocks)
        return
    if any(start < offset + size and offset < stop for _, offset, size in metadata.structures()):
        blocks[:] = True
        return
    ratio = metadata.shape.ratio
    per_block = bytes_per_block(metadata.items.block_size, metadata.items.logical_sector_bytes)
    for place in range(bisect_right(bitmaps, (start - layout.BITMAP_BLOCK_SIZE, ratio)), len(bitmaps)):
        offset, chunk = bitmaps[place]
        if offset >= stop:
            break
        first = max(start - offset, 0) // per_block
        last = (min(stop - offset, layout.BITMAP_BLOCK_SIZE) - 1) // per_block
        blocks[chunk * ratio + first : chunk * ratio + last + 1] = True


def _mark_entries(draft: DraftStore, metadata: Metadata, change: LogChange, blocks: NDArray[np.bool_]) -> None:
    """Mark the blocks whose entries the change alters; for the entry of a bitmap, all blocks of its chunk."""
    shape, entry_size, table = metadata.shape, layout.BAT_ENTRY_SIZE, metadata.regions.bat.file_offset
    # The log is damaged, so a change need not begin or end between two entries.
    first = (change.file_offset_bytes - table) // entry_size
    last = min(-(-(change.end_bytes - table) // entry_size), shape.entry_count)
    if last <= first:
        return
    start, size = table + first * entry_size, (last - first) * entry_size
    old = draft.pread(start, size).ljust(size, b"\0")
    before = change.file_offset_bytes - start
    inside = min(change.size_bytes, size - before)
    set_to = bytes(inside) if change.data is None else change.data[:inside]
    new = old[:before] + set_to + old[before + inside :]
    numbers = np.flatnonzero(np.frombuffer(old, dtype="<u8") != np.frombuffer(new, dtype="<u8")) + first
    chunks, within = np.divmod(numbers, shape.ratio + 1)
    found = (chunks * shape.ratio + within)[within < shape.ratio]
    blocks[found[found < shape.block_count]] = True
    for chunk in chunks[within == shape.ratio].tolist():
        blocks[chunk * shape.ratio : (chunk + 1) * shape.ratio] = True
