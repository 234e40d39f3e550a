# SPDX-License-Identifier: Apache-2.0
"""The structures of a container of keys (VMCX, VMRS), field by field.

Decides nothing. All numbers are little-endian, without gaps. A checksum is zlib's CRC-32 of its structure with zero in
its own place. Nothing about this format is published: the facts were found out from files of Windows Server 2019, and
what could not be seen in one is marked so below.
"""

from __future__ import annotations

import struct
from typing import NamedTuple
from zlib import crc32

HEADER_SIGNATURE = 0x0128_2014
HEADER_OFFSETS = (0, 0x1000)
VERSION = 0x400
OBJECT_TABLE_SIGNATURE = 0x0111_0001
OBJECT_TABLE_OFFSET = 0x2000
FURTHER_TABLE, KEY_TABLE, VALUE = 1, 2, 3  # kinds of objects; others are 4 free, 6 log, 7 change tracking
KEY_TABLE_SIGNATURE = 2
FREE, SIGNED, UNSIGNED, DOUBLE, STRING, BYTES, BOOLEAN, NODE = 1, 3, 4, 5, 6, 7, 8, 9  # kinds of entries
IN_OBJECT = 1  # flag of an entry: its value is in an object of its own; not seen in a real file
LOG_SIGNATURE = 0x0111_0003

_HEADER = struct.Struct("<IIHIQIQQI")
_OBJECT_TABLE = struct.Struct("<II")
_OBJECT = struct.Struct("<BIQIB")
_KEY_TABLE = struct.Struct("<HHHI")
_ENTRY = struct.Struct("<BBIHIIIB")
_VALUE_PLACE = struct.Struct("<IQ")
_LOG = struct.Struct("<IIIBI17s")
_LOG_ENTRY = struct.Struct("<QIIIII")
HEADER_BYTES = _HEADER.size
OBJECT_TABLE_BYTES = _OBJECT_TABLE.size
OBJECT_BYTES = _OBJECT.size
KEY_TABLE_BYTES = _KEY_TABLE.size
ENTRY_BYTES = _ENTRY.size
VALUE_PLACE_BYTES = _VALUE_PLACE.size
LOG_BYTES = _LOG.size
LOG_ENTRY_BYTES = _LOG_ENTRY.size
# Where the checksums lie in their structures.
_HEADER_SUM, _OBJECT_SUM, _KEY_TABLE_SUM, _ENTRY_SUM, _LOG_SUM, _LOG_ENTRY_SUM = 4, 1, 6, 12, 4, 20


class ContainerHeader(NamedTuple):
    """Of a container; there are two."""

    signature: int
    checksum: int
    sequence: int
    version: int
    zero: int
    alignment_bytes: int
    log_offset_bytes: int
    log_size_bytes: int
    header_size_bytes: int


class Object(NamedTuple):
    """A line of the table of objects."""

    kind: int
    checksum: int
    offset_bytes: int
    size_bytes: int
    in_use: int


class KeyTable(NamedTuple):
    """The head of a table of keys. Of two with one number, the higher sequence counts."""

    signature: int
    number: int  # its index, from 1
    sequence: int
    checksum: int


class KeyEntry(NamedTuple):
    """A key. Its name follows, with a zero byte, then its value, then slack, which no checksum covers."""

    kind: int
    flags: int
    size_bytes: int
    parent_table: int  # its number; 0 for a key without a parent
    parent_offset_bytes: int
    checksum: int
    insertion: int
    name_bytes: int


class Log(NamedTuple):
    """The head of the log, whose entries follow."""

    signature: int
    checksum: int
    active: int
    byte: int
    number: int
    zeros: bytes


class LogEntry(NamedTuple):
    """Data that belong elsewhere in the file. Active ones were not seen in a real file."""

    target_bytes: int
    size_bytes: int
    position_bytes: int  # of the data, from the start of the log
    zero: int
    checksum: int
    data_checksum: int


def header(raw: bytes) -> ContainerHeader | None:
    """A header, if it is one and intact."""
    if len(raw) < HEADER_BYTES:
        return None
    found = ContainerHeader(*_HEADER.unpack_from(raw))
    is_intact = found.signature == HEADER_SIGNATURE and found.checksum == sum_of(raw[:HEADER_BYTES], _HEADER_SUM)
    return found if is_intact else None


def object_count(raw: bytes) -> int | None:
    """How many lines a table of objects has; None if it has no signature."""
    signature, count = _OBJECT_TABLE.unpack_from(raw)
    return count if signature == OBJECT_TABLE_SIGNATURE else None


def object_line(raw: bytes) -> Object | None:
    """A line of the table of objects, if it is intact."""
    found = Object(*_OBJECT.unpack(raw))
    return found if found.checksum == sum_of(raw, _OBJECT_SUM) else None


def key_table(raw: bytes) -> KeyTable | None:
    """The head of a table of keys, if it is one and intact."""
    found = KeyTable(*_KEY_TABLE.unpack_from(raw))
    is_intact = found.checksum == sum_of(raw[:KEY_TABLE_BYTES], _KEY_TABLE_SUM)
    return found if is_intact and found.signature == KEY_TABLE_SIGNATURE else None


def entry(raw: bytes, offset_bytes: int) -> KeyEntry:
    """The head of a key. `is_entry_intact` says whether to believe it."""
    return KeyEntry(*_ENTRY.unpack_from(raw, offset_bytes))


def is_entry_intact(raw: bytes, found: KeyEntry) -> bool:
    """Whether head, name and value of a key, which `raw` is, are what was written."""
    return found.checksum == sum_of(raw, _ENTRY_SUM)


def value_place(raw: bytes) -> tuple[int, int]:
    """Size and offset, in bytes, of an object that holds a value."""
    size, offset = _VALUE_PLACE.unpack(raw)
    return size, offset


def log(raw: bytes) -> Log | None:
    """The head of the log, if it is one and intact."""
    if len(raw) < LOG_BYTES:
        return None
    found = Log(*_LOG.unpack_from(raw))
    is_intact = found.checksum == sum_of(raw[:LOG_BYTES], _LOG_SUM)
    return found if is_intact and found.signature == LOG_SIGNATURE else None


def log_entry(raw: bytes) -> LogEntry | None:
    """An entry of the log, if it is intact."""
    if len(raw) < LOG_ENTRY_BYTES:
        return None
    found = LogEntry(*_LOG_ENTRY.unpack(raw))
    return found if found.checksum == sum_of(raw, _LOG_ENTRY_SUM) else None


def checksum(raw: bytes) -> int:
    """Of data without structure."""
    return crc32(raw)


def sum_of(raw: bytes, place: int) -> int:
    """The checksum of a structure whose own four bytes lie at `place`."""
    return crc32(raw[place + 4 :], crc32(bytes(4), crc32(raw[:place])))
