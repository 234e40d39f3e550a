# SPDX-License-Identifier: Apache-2.0
"""The repair of damaged footers, on which the rest of a repair depends.

Decides which footer is restored from which place, and when the mark of another program may be removed. A repair is
made to a draft (`repair`); this part comes first.
"""

from __future__ import annotations

from collections.abc import Iterator

from vhdkit.errors import CorruptImage, CorruptReason
from vhdkit.formats.draft import DraftStore
from vhdkit.formats.format import Consent, Fix
from vhdkit.formats.vhd import geometry, layout
from vhdkit.formats.vhd.bat import Bat
from vhdkit.formats.vhd.check import MAX_FREED_BYTES, held_bytes
from vhdkit.formats.vhd.entries import bad_entries
from vhdkit.formats.vhd.footers import FooterPlace, FooterState, footer_state, read_footers
from vhdkit.formats.vhd.layout import FOOTER_SIZE
from vhdkit.formats.vhd.metadata import read_metadata
from vhdkit.formats.vhd.padding import SEARCH_BYTES
from vhdkit.store import ReadStore
from vhdkit.units import SECTOR_SIZE, format_size, round_down

DEAD = "--writer-is-dead"


def mend_footers(draft: DraftStore, consent: Consent) -> Iterator[Fix]:
    """Leave two good, equal footers if there is a good one. A lost trailing footer gets its place in `_settle_end`."""
    tail, copy = read_footers(draft)
    marked = [one for one in (tail, copy) if one.state in (FooterState.KILLED, FooterState.POISONED)]
    if marked and not _is_guests(tail, copy):
        fact = f"the {marked[0].structure} is {marked[0].state}"
        if not consent.writer_is_dead:
            yield Fix("footer-mark", f"{fact}; remove this mark only if that program has died", DEAD)
            return
        if not (tail.state.usable or copy.state.usable):
            yield from _take_off_poison(draft, tail, copy)
            return
    if not tail.state.usable and not (copy.state.usable and copy.footer.disk_type != layout.DISK_TYPE_FIXED):
        yield from _rescue_footer(draft, tail, copy)
    elif tail.state.usable and tail.footer.disk_type != layout.DISK_TYPE_FIXED:
        yield from _align_copy(draft, tail, copy)


def _is_guests(tail: FooterPlace, copy: FooterPlace) -> bool:
    """True for a fixed disk with a good footer: everything at offset 0 is data."""
    return tail.state.usable and tail.footer.disk_type == layout.DISK_TYPE_FIXED


def _align_copy(draft: DraftStore, tail: FooterPlace, copy: FooterPlace) -> Iterator[Fix]:
    """Make the copy equal to the footer, or the footer equal to its copy if only that leads to a sound image."""
    whole = tail.raw.ljust(FOOTER_SIZE, b"\0")
    if copy.raw == whole:
        return
    if copy.state.usable and copy.footer.unique_id == tail.footer.unique_id and not _is_readable(draft):
        trial = DraftStore(draft)
        trial.pwrite(tail.offset_bytes, copy.raw[: len(tail.raw)])
        if is_sound(trial):
            draft.pwrite(tail.offset_bytes, copy.raw[: len(tail.raw)])
            yield Fix("footer", "the footer does not lead to a sound image, but its copy does: restored from the copy")
            return
    draft.pwrite(0, sealed_footer(whole))
    yield Fix(
        "footer-copy", f"the copy was {'different' if copy.state.usable else copy.state}: restored from the footer"
    )


def is_sound(store: ReadStore) -> bool:
    """True when the image can be read: its header, and a table without contradictions."""
    return not _faults(store)


def _is_readable(store: ReadStore) -> bool:
    """True when the image can be read; one whose blocks overlap can be, and what it reads as must stay."""
    return _faults(store) <= {CorruptReason.BLOCKS_OVERLAP}


def _faults(store: ReadStore) -> set[CorruptReason]:
    """What is wrong with the header or with entries of the table."""
    try:
        metadata = read_metadata(store)
    except CorruptImage as error:
        return {error.reason}
    if metadata.header is None:
        return set()
    bat = Bat.load(store, metadata.header.table_offset, metadata.block_count)
    return {reason for reason, blocks in bad_entries(metadata, bat) if len(blocks)}


def _take_off_poison(draft: DraftStore, tail: FooterPlace, copy: FooterPlace) -> Iterator[Fix]:
    """Both footers are marked: restore the cookie of a poisoned one if that makes a sound image."""
    for place in (tail, copy):
        if place.state is not FooterState.POISONED:
            continue
        raw = sealed_footer(layout.FOOTER_COOKIE + place.raw.ljust(FOOTER_SIZE, b"\0")[len(layout.FOOTER_COOKIE) :])
        trial = DraftStore(draft)
        _put_both(trial, tail, raw)
        if is_sound(trial):
            _put_both(draft, tail, raw)
            yield Fix("footer-mark", f"removed the mark of an unfinished resize from the {place.structure}")
            return


def _put_both(draft: DraftStore, tail: FooterPlace, raw: bytes) -> None:
    draft.pwrite(tail.offset_bytes, raw)
    if layout.parse_footer(raw).disk_type != layout.DISK_TYPE_FIXED:
        draft.pwrite(0, raw)


def _rescue_footer(draft: DraftStore, tail: FooterPlace, copy: FooterPlace) -> Iterator[Fix]:
    """No footer is good: look for one before trailing garbage, then for one of which only the checksum is wrong."""
    found = _stray_footer(draft)
    if found is not None:
        offset, raw = found
        garbage = draft.size() - offset - FOOTER_SIZE
        if held_bytes(draft, offset + FOOTER_SIZE, garbage) > MAX_FREED_BYTES:
            yield Fix(
                "trailing-garbage", f"a footer is followed by {format_size(garbage)} of other data", "a copy by hand"
            )
            return
        draft.truncate(offset + FOOTER_SIZE)
        if layout.parse_footer(raw).disk_type != layout.DISK_TYPE_FIXED:
            draft.pwrite(0, raw)
        yield Fix("trailing-garbage", f"cut off {garbage} bytes of garbage after the footer")
        return
    for place in (tail, copy):
        if place.state is not FooterState.CHECKSUM or not place.raw.startswith(layout.FOOTER_COOKIE):
            continue
        fixed = place.footer.disk_type == layout.DISK_TYPE_FIXED
        twice = tail.raw.ljust(FOOTER_SIZE, b"\0") == copy.raw
        agrees = place is tail and place.footer.current_size == place.offset_bytes if fixed else twice
        raw = sealed_footer(place.raw.ljust(FOOTER_SIZE, b"\0"))
        trial = DraftStore(draft)
        _put_both(trial, tail, raw)
        if agrees and footer_state(raw).usable and is_sound(trial):
            _put_both(draft, tail, raw)
            witness = "the file's size" if fixed else "its copy"
            yield Fix("footer-checksum", f"only the checksum of the footer was wrong: the rest agrees with {witness}")
            return


def _stray_footer(store: ReadStore) -> tuple[int, bytes] | None:
    """(offset, footer) of the last good footer that other bytes follow, if it fits the file up to there."""
    end = store.size()
    for offset in range(round_down(end, SECTOR_SIZE), max(end - SEARCH_BYTES - 1, 0), -SECTOR_SIZE):
        raw = store.pread(offset, FOOTER_SIZE)
        if not raw.startswith(layout.FOOTER_COOKIE) or not footer_state(raw).usable:
            continue
        footer = layout.parse_footer(raw)
        if footer.disk_type != layout.DISK_TYPE_FIXED:
            trial = DraftStore(store)
            trial.truncate(offset + FOOTER_SIZE)
            if is_sound(trial):
                return offset, raw
        elif geometry.virtual_size(footer, offset) == offset:
            return offset, raw
    return None


def sealed_footer(raw: bytes) -> bytes:
    return layout.sealed(raw, layout.FOOTER_CHECKSUM_OFFSET)
