# SPDX-License-Identifier: Apache-2.0
"""Log entries: how they are stored, which are valid, and which are replayed."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vhdkit.formats.vhdx.images import LOG_GUID, page
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.log import SECTOR, Entry, LogChange, active_sequence, build_entry, entry_size, find_entries

SIZE = 32 * SECTOR


class Log:
    """A ring in memory."""

    def __init__(self) -> None:
        self.raw = bytearray(SIZE)

    def put(self, at: int, number: int, tail: int, changes: int | list[LogChange] = 0, guid: bytes = LOG_GUID) -> int:
        """Store an entry at this sector; returns the sector after it."""
        if isinstance(changes, int):
            changes = [LogChange((8 + one) * SECTOR, SECTOR, page(b"d")) for one in range(changes)]
        raw = build_entry(guid, number, tail * SECTOR, changes, flushed_file_offset=0, last_file_offset=0)
        for start in range(0, len(raw), SECTOR):
            place = (at * SECTOR + start) % SIZE
            self.raw[place : place + SECTOR] = raw[start : start + SECTOR]
        return at + len(raw) // SECTOR

    def ring(self, start: int, count: int) -> bytes:
        """The bytes there; the ring wraps around at its end."""
        return bytes((self.raw + self.raw)[start : start + count])

    def found(self) -> dict[int, Entry]:
        """The valid entries."""
        heads = [one for one in range(0, SIZE, SECTOR) if self.raw.startswith(layout.LOG_ENTRY_SIGNATURE, one)]
        return find_entries(self.ring, SIZE, LOG_GUID, heads)

    def replayed(self) -> list[int]:
        """The numbers of the entries to replay."""
        return [one.header.sequence_number for one in active_sequence(self.found(), SIZE)]


@st.composite
def changes(draw: st.DrawFn) -> list[LogChange]:
    """Some pages and ranges of zeros."""
    found = []
    for _ in range(draw(st.integers(0, 6))):
        offset = draw(st.integers(0, 1 << 40)) * SECTOR
        if draw(st.booleans()):
            found.append(LogChange(offset, SECTOR, random.Random(draw(st.integers(0, 99))).randbytes(SECTOR)))
        else:
            found.append(LogChange(offset, draw(st.integers(0, 1 << 30)) * SECTOR, None))
    return found


@settings(max_examples=60)
@given(wanted=changes(), number=st.integers(1, (1 << 64) - 1), at=st.integers(0, 31))
def test_an_entry_is_read_as_it_was_built(wanted: list[LogChange], number: int, at: int) -> None:
    """An entry is read back wherever in the ring it begins, and whatever its number."""
    log = Log()
    log.put(at, number, at, wanted)
    (entry,) = log.found().values()
    assert (entry.offset_bytes, entry.header.sequence_number) == (at * SECTOR, number)
    assert entry.changes(log.ring) == wanted


@settings(max_examples=60)
@given(place=st.integers(0, 3 * SECTOR - 1), bit=st.integers(0, 7))
def test_a_torn_entry_is_not_valid(place: int, bit: int) -> None:
    """Any changed bit makes an entry invalid."""
    log = Log()
    log.put(0, 1, 0, 2)
    log.raw[place] ^= 1 << bit
    assert log.found() == {}


def test_entries_are_replayed_from_the_tail_of_the_newest() -> None:
    """A valid entry before the tail is not replayed."""
    log = Log()
    second = log.put(0, 1, 0, 1)
    third = log.put(second, 2, second, 1)
    log.put(third, 3, second, 1)
    assert len(log.found()) == 3 and log.replayed() == [2, 3]


def test_a_torn_newest_entry_leaves_those_before_it() -> None:
    """A torn newest entry, as after a power cut, is ignored."""
    log = Log()
    second = log.put(0, 1, 0, 1)
    third = log.put(second, 2, 0, 1)
    end = log.put(third, 3, second, 1)
    log.raw[end * SECTOR - 1] ^= 1
    assert log.replayed() == [1, 2]


def test_a_gap_ends_a_sequence() -> None:
    """An entry after a gap in numbers or offsets is ignored if its tail lies before the gap."""
    log = Log()
    second = log.put(0, 1, 0, 1)
    log.put(second, 3, 0, 1)
    assert log.replayed() == [1]
    log = Log()
    second = log.put(0, 1, 0, 1)
    log.put(second + 1, 2, 0, 1)
    assert log.replayed() == [1]


def test_entries_of_an_older_session_do_not_count() -> None:
    """Entries with another log id are ignored."""
    log = Log()
    second = log.put(0, 1, 0, 1)
    log.put(second, 2, 0, 1, guid=b"o" * 16)
    assert log.replayed() == [1]
    assert Log().replayed() == []


def test_a_sequence_wraps_around() -> None:
    """An entry may wrap around at the end of the ring, and the next one follows it there."""
    log = Log()
    following = log.put(30, 7, 30, 3)
    log.put(following - 32, 8, 30, 1)
    assert log.replayed() == [7, 8]


def test_an_entry_that_holds_the_head_of_another_is_not_valid() -> None:
    """Of overlapping entries only the inner one is valid, so that the work stays linear."""
    log = Log()
    inner = Log()
    inner.put(0, 9, 2, 0)
    raw = build_entry(LOG_GUID, 1, 0, [LogChange(0, SECTOR, page(b"d"))], flushed_file_offset=0, last_file_offset=0)
    log.raw[: len(raw)] = raw
    log.raw[SECTOR : 2 * SECTOR] = inner.raw[:SECTOR]
    assert list(log.found()) == [SECTOR]


def test_sizes() -> None:
    """126 descriptors fit into the first sector, 128 into each further one."""
    assert [entry_size(count) // SECTOR for count in (0, 1, 126, 127, 254, 255)] == [1, 2, 127, 129, 256, 258]
