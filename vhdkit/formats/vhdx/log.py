# SPDX-License-Identifier: Apache-2.0
"""The log of a VHDX: how an entry is stored, which entries are valid, and which of them must be replayed.

Decides whether an entry is valid and which entries form the active sequence. Pure: it is given a function that reads
the ring. `replay` decides where the pages go in a file, and `commit` when entries are written.

    log    | entry 7 | entry 8 | entry 9 | old bytes ...            a ring of 4 KiB sectors
    entry  | header, descriptors | ... | page | page | ...          one page for each data descriptor

The log comes from an untrusted file. Only the first sector of a valid entry begins with an entry's signature, so
overlapping entries are invalid, and the work is linear in the length of the log whatever it contains.

Source: [MS-VHDX] 2.3. What the text leaves open (which entry is the newest, what lies before the tail) follows files
written by Windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.crc import is_sealed, sealed
from vhdkit.formats.vhdx.layout import LogEntryHeader

SECTOR = layout.LOG_PAGE_SIZE
_FIRST_SLOTS = (SECTOR - layout.LOG_ENTRY_HEADER_SIZE) // layout.DESCRIPTOR_SIZE
_SLOTS = SECTOR // layout.DESCRIPTOR_SIZE
_DESCRIPTOR = np.dtype(
    [("signature", "S4"), ("trailing", "S4"), ("leading", "V8"), ("file_offset", "<u8"), ("sequence_number", "<u8")]
)
_DATA_SECTOR = np.dtype([("signature", "S4"), ("high", "<u4"), ("bytes", "V4084"), ("low", "<u4")])
assert _DESCRIPTOR.itemsize == layout.DESCRIPTOR_SIZE and _DATA_SECTOR.itemsize == SECTOR


@dataclass(frozen=True, slots=True)
class LogChange:
    """One range that an entry sets: to `data`, which is one page, or to zeros if that is None."""

    file_offset_bytes: int
    size_bytes: int
    data: bytes | None

    @property
    def end_bytes(self) -> int:
        """Where the range ends."""
        return self.file_offset_bytes + self.size_bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """A valid entry at `offset_bytes` of the log."""

    offset_bytes: int
    header: LogEntryHeader

    def changes(self, ring: Ring) -> list[LogChange]:
        """What the entry sets, in the order of its descriptors."""
        whole = ring(self.offset_bytes, self.header.entry_length)
        first = descriptor_sectors(self.header.descriptor_count) * SECTOR
        changes, page = [], 0
        for number in range(self.header.descriptor_count):
            start = layout.LOG_ENTRY_HEADER_SIZE + number * layout.DESCRIPTOR_SIZE
            raw = whole[start : start + layout.DESCRIPTOR_SIZE]
            offset = int.from_bytes(raw[16:24], "little")
            if raw.startswith(layout.ZERO_SIGNATURE):
                changes.append(LogChange(offset, int.from_bytes(raw[8:16], "little"), None))
                continue
            place = first + page * SECTOR
            middle = whole[place + layout.LEADING_BYTES : place + SECTOR - layout.TRAILING_BYTES]
            changes.append(LogChange(offset, SECTOR, raw[8:16] + middle + raw[4:8]))
            page += 1
        return changes


Ring = Callable[[int, int], bytes]  # (offset, size) -> the bytes of the log, which wraps around at its end


def descriptor_sectors(count: int) -> int:
    """How many sectors the header and this number of descriptors take."""
    return 1 + max(0, -(-(count - _FIRST_SLOTS) // _SLOTS))


def entry_size(pages: int) -> int:
    """The size in bytes of an entry with this number of pages and no ranges of zeros."""
    return (descriptor_sectors(pages) + pages) * SECTOR


# -- reading ----------------------------------------------------------------------------------------------------------


def find_entries(ring: Ring, log_size: int, log_guid: bytes, candidates: Iterable[int]) -> dict[int, Entry]:
    """The valid entries of the ring that carry this id, by offset.

    `candidates` are the offsets of all sectors that begin with an entry's signature, in order.
    """
    starts = list(candidates)
    found = {}
    for number, start in enumerate(starts):
        header = layout.parse_log_entry_header(ring(start, layout.LOG_ENTRY_HEADER_SIZE))
        following = starts[number + 1] if number + 1 < len(starts) else starts[0] + log_size
        if header.log_guid != log_guid or not _is_possible(header, log_size, following - start):
            continue
        if _is_valid(header, ring(start, header.entry_length)):
            found[start] = Entry(start, header)
    return found


def _is_possible(header: LogEntryHeader, log_size: int, room: int) -> bool:
    """False for impossible lengths and offsets; `room` ends at the next sector with an entry's signature."""
    length, tail = header.entry_length, header.tail
    return (
        0 < length <= min(log_size, room)
        and length % SECTOR == 0
        and tail < log_size
        and tail % SECTOR == 0
        and header.sequence_number > 0
        and descriptor_sectors(header.descriptor_count) * SECTOR <= length
    )


def _descriptors(header: LogEntryHeader, raw: bytes) -> NDArray[np.void]:
    start = layout.LOG_ENTRY_HEADER_SIZE
    return np.frombuffer(raw, dtype=_DESCRIPTOR, count=header.descriptor_count, offset=start)


def _is_valid(header: LogEntryHeader, raw: bytes) -> bool:
    """Whether checksum, descriptors and pages agree."""
    if not is_sealed(raw, layout.HEADER_CHECKSUM_OFFSET):
        return False
    table = _descriptors(header, raw)
    is_data = table["signature"] == layout.DATA_SIGNATURE
    pages = int(np.count_nonzero(is_data))
    first = descriptor_sectors(header.descriptor_count)
    if header.entry_length != (first + pages) * SECTOR:
        return False
    if not (is_data | (table["signature"] == layout.ZERO_SIGNATURE)).all():
        return False
    if (table["sequence_number"] != header.sequence_number).any():
        return False
    sectors = np.frombuffer(raw, dtype=_DATA_SECTOR, count=pages, offset=first * SECTOR)
    return bool(
        (sectors["signature"] == layout.DATA_SECTOR_SIGNATURE).all()
        and (sectors["high"] == header.sequence_number >> 32).all()
        and (sectors["low"] == header.sequence_number & 0xFFFFFFFF).all()
    )


def active_sequence(entries: dict[int, Entry], log_size: int) -> list[Entry]:
    """The entries to replay, oldest first: from the tail of the newest entry for which none is missing.

    Empty if there is none. Valid entries before the tail are not replayed: the places that they change may have been
    reused for a guest's data since.
    """
    run_of: dict[int, tuple[int, int]] = {}  # offset: (which run of entries without a gap, the number in it)
    follows = {_next_offset(one, log_size): one for one in entries.values()}
    runs: list[list[Entry]] = []
    for entry in sorted(entries.values(), key=lambda one: one.header.sequence_number):
        before = follows.get(entry.offset_bytes)
        if before is not None and before.header.sequence_number + 1 == entry.header.sequence_number:
            number = run_of[before.offset_bytes][0]
        else:
            number = len(runs)
            runs.append([])
        run_of[entry.offset_bytes] = number, len(runs[number])
        runs[number].append(entry)
    for entry in sorted(entries.values(), key=lambda one: one.header.sequence_number, reverse=True):
        number, last = run_of[entry.offset_bytes]
        tail = run_of.get(entry.header.tail)
        if tail is not None and tail[0] == number and tail[1] <= last:
            return runs[number][tail[1] : last + 1]
    return []


def _next_offset(entry: Entry, log_size: int) -> int:
    return (entry.offset_bytes + entry.header.entry_length) % log_size


# -- writing ----------------------------------------------------------------------------------------------------------


def build_entry(
    log_guid: bytes,
    sequence_number: int,
    tail: int,
    changes: list[LogChange],
    *,
    flushed_file_offset: int,
    last_file_offset: int,
) -> bytes:
    """The bytes of an entry. A change with data is one page."""
    pages = [one for one in changes if one.data is not None]
    sectors = descriptor_sectors(len(changes))
    length = (sectors + len(pages)) * SECTOR
    head = layout.build_log_entry_header(
        LogEntryHeader(
            layout.LOG_ENTRY_SIGNATURE,
            0,
            length,
            tail,
            sequence_number,
            len(changes),
            0,
            log_guid,
            flushed_file_offset,
            last_file_offset,
        )
    )
    number = sequence_number.to_bytes(8, "little")
    # A flush waits for this with a cold cache, so each page is copied only twice.
    descriptors: list[bytes] = [head]
    data: list[bytes | memoryview] = []
    for one in changes:
        place = one.file_offset_bytes.to_bytes(8, "little")
        if one.data is None:
            size = one.size_bytes.to_bytes(8, "little")
            descriptors.append(layout.ZERO_SIGNATURE + bytes(4) + size + place + number)
            continue
        leading, trailing = one.data[: layout.LEADING_BYTES], one.data[-layout.TRAILING_BYTES :]
        descriptors.append(layout.DATA_SIGNATURE + trailing + leading + place + number)
        middle = memoryview(one.data)[layout.LEADING_BYTES : -layout.TRAILING_BYTES]
        data += [layout.DATA_SECTOR_SIGNATURE + number[4:], middle, number[:4]]
    first = b"".join(descriptors).ljust(sectors * SECTOR, b"\0")
    return sealed(first, layout.HEADER_CHECKSUM_OFFSET, b"".join(data))
