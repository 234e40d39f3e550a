# SPDX-License-Identifier: Apache-2.0
"""The structures of a VHD file, field by field, as the specification lists them.

Decides offsets, widths and byte order, the magic numbers, and the checksum over a structure. Every number is
big-endian. `construct` stays in here; callers get frozen dataclasses, so no other module parses bytes.
Must not judge: which footer to use is decided in `footers`.

Source: "Virtual Hard Disk Image Format Specification", version 1.0 (2006), except where a field says otherwise.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass

from construct import Bytes, Int8ub, Int16ub, Int32ub, Int64ub, Struct

from vhdkit.formats.fields import Field, Packed, fields_of

FOOTER_SIZE = 512
SHORT_FOOTER_SIZE = 511  # written by Virtual PC before 2004
HEADER_SIZE = 1024
LOCATOR_COUNT = 8
PARENT_NAME_SIZE = 512
FOOTER_RESERVED_SIZE = 426
HEADER_RESERVED_SIZE = 256
UUID_SIZE = 16
BATMAP_HEADER_SIZE = 512

FOOTER_COOKIE = b"conectix"
POISONED_COOKIE = b"v_poison"  # XenServer: a journaled resize is under way
HEADER_COOKIE = b"cxsparse"
BATMAP_COOKIE = b"tdbatmap"
FORMAT_VERSION = 0x00010000
FORMAT_MAJOR_MASK = 0xFFFF0000
FEATURES_RESERVED = 0x00000002  # the specification requires this bit to be set
NO_DATA_OFFSET = 0xFFFFFFFFFFFFFFFF  # Microsoft's tools expect 64 ones where the text says 32
EPOCH_UNIX_SECONDS = 946684800  # 2000-01-01 00:00 UTC, where VHD timestamps count from

DISK_TYPE_FIXED = 2
DISK_TYPE_DYNAMIC = 3
DISK_TYPE_DIFFERENCING = 4

BAT_ENTRY_SIZE = 4
BAT_UNALLOCATED = 0xFFFFFFFF

_FOOTER = Struct(
    "cookie" / Bytes(8),
    "features" / Int32ub,
    "file_format_version" / Int32ub,
    "data_offset" / Int64ub,  # of the dynamic header; all ones in a fixed disk
    "timestamp" / Int32ub,  # seconds since 2000-01-01 UTC
    "creator_application" / Bytes(4),
    "creator_version" / Int32ub,
    "creator_host_os" / Bytes(4),
    "original_size" / Int64ub,  # bytes, when created
    "current_size" / Int64ub,  # bytes, now
    "cylinders" / Int16ub,
    "heads" / Int8ub,
    "sectors_per_track" / Int8ub,
    "disk_type" / Int32ub,
    "checksum" / Int32ub,
    "unique_id" / Bytes(UUID_SIZE),
    "saved_state" / Int8ub,
    "hidden" / Int8ub,  # XenServer's; reserved in the specification, but included in the checksum
    "reserved" / Bytes(FOOTER_RESERVED_SIZE),
)

_LOCATOR = Struct(
    "platform_code" / Bytes(4),
    "data_space" / Int32ub,  # sectors by the specification, bytes by Virtual PC and Hyper-V
    "data_length" / Int32ub,  # bytes
    "reserved" / Int32ub,
    "data_offset" / Int64ub,  # bytes from the start of the file
)

_HEADER = Struct(
    "cookie" / Bytes(8),
    "data_offset" / Int64ub,  # unused: all ones
    "table_offset" / Int64ub,  # bytes, of the BAT
    "header_version" / Int32ub,
    "max_table_entries" / Int32ub,
    "block_size" / Int32ub,  # bytes of data in a block, without its sector bitmap
    "checksum" / Int32ub,
    "parent_unique_id" / Bytes(UUID_SIZE),
    "parent_timestamp" / Int32ub,
    "reserved1" / Int32ub,
    "parent_unicode_name" / Bytes(PARENT_NAME_SIZE),  # UTF-16 big-endian
    "parent_locators" / _LOCATOR[LOCATOR_COUNT],
    "reserved2" / Bytes(HEADER_RESERVED_SIZE),
)

# Source: XenServer's vhd-util (libvhd.h); not in the specification.
_BATMAP_HEADER = Struct(
    "cookie" / Bytes(8),
    "batmap_offset" / Int64ub,  # bytes
    "batmap_size" / Int32ub,  # sectors
    "batmap_version" / Int32ub,
    "checksum" / Int32ub,
    "marker" / Int8ub,
    "reserved" / Bytes(483),
)

assert _FOOTER.sizeof() == FOOTER_SIZE
assert _HEADER.sizeof() == HEADER_SIZE
assert _BATMAP_HEADER.sizeof() == BATMAP_HEADER_SIZE


STRUCTURES: dict[str, tuple[Field, ...]] = {
    "footer": fields_of(_FOOTER),
    "dynamic header": fields_of(_HEADER),
    "parent locator entry": fields_of(_LOCATOR),
    "batmap header": fields_of(_BATMAP_HEADER),
}
_OFFSET = {name: {f.name: f.offset_bytes for f in fields} for name, fields in STRUCTURES.items()}
FOOTER_CHECKSUM_OFFSET = _OFFSET["footer"]["checksum"]
HEADER_CHECKSUM_OFFSET = _OFFSET["dynamic header"]["checksum"]
HEADER_LOCATORS_OFFSET = _OFFSET["dynamic header"]["parent_locators"]
LOCATOR_SIZE = _LOCATOR.sizeof()
assert (FOOTER_CHECKSUM_OFFSET, HEADER_CHECKSUM_OFFSET, HEADER_LOCATORS_OFFSET) == (64, 36, 576)


@dataclass(frozen=True, slots=True)
class Footer:
    """The hard disk footer, 512 bytes; its copy is at offset 0 of dynamic and differencing images."""

    cookie: bytes
    features: int
    file_format_version: int
    data_offset: int
    timestamp: int
    creator_application: bytes
    creator_version: int
    creator_host_os: bytes
    original_size: int
    current_size: int
    cylinders: int
    heads: int
    sectors_per_track: int
    disk_type: int
    checksum: int
    unique_id: bytes
    saved_state: int
    hidden: int
    reserved: bytes


@dataclass(frozen=True, slots=True)
class LocatorEntry:
    """One of the eight parent locator entries of a dynamic header."""

    platform_code: bytes
    data_space: int
    data_length: int
    reserved: int
    data_offset: int


@dataclass(frozen=True, slots=True)
class DynamicHeader:
    """The dynamic disk header, 1024 bytes."""

    cookie: bytes
    data_offset: int
    table_offset: int
    header_version: int
    max_table_entries: int
    block_size: int
    checksum: int
    parent_unique_id: bytes
    parent_timestamp: int
    reserved1: int
    parent_unicode_name: bytes
    parent_locators: tuple[LocatorEntry, ...]
    reserved2: bytes


@dataclass(frozen=True, slots=True)
class BatmapHeader:
    """XenServer's batmap header: which blocks are wholly owned. A hint; the sector bitmaps decide."""

    cookie: bytes
    batmap_offset: int
    batmap_size: int
    batmap_version: int
    checksum: int
    marker: int
    reserved: bytes


_PACKED_FOOTER, _PACKED_HEADER, _PACKED_LOCATOR = Packed(_FOOTER), Packed(_HEADER), Packed(_LOCATOR)
_PACKED_BATMAP_HEADER = Packed(_BATMAP_HEADER)


# Opening a chain reads the same few footers and headers several times.
@functools.lru_cache(maxsize=256)
def parse_footer(raw: bytes) -> Footer:
    """Parse a footer; one of 511 bytes lacks its last reserved byte. Checks nothing."""
    return Footer(**_PACKED_FOOTER.parse(raw.ljust(FOOTER_SIZE, b"\0")))


@functools.lru_cache(maxsize=256)
def parse_header(raw: bytes) -> DynamicHeader:
    """Parse a dynamic header of 1024 bytes. Checks nothing."""
    values = _PACKED_HEADER.parse(raw)
    entries = values["parent_locators"]
    values["parent_locators"] = tuple(
        LocatorEntry(**_PACKED_LOCATOR.parse(entries[start : start + LOCATOR_SIZE]))
        for start in range(0, len(entries), LOCATOR_SIZE)
    )
    return DynamicHeader(**values)


def parse_batmap_header(raw: bytes) -> BatmapHeader:
    """Parse a batmap header of 512 bytes. Checks nothing."""
    return BatmapHeader(**_PACKED_BATMAP_HEADER.parse(raw))


def checksum(raw: bytes, checksum_offset: int) -> int:
    """One's complement of the sum of all bytes, the checksum field itself taken as zero."""
    return ~(sum(raw) - sum(raw[checksum_offset : checksum_offset + 4])) & 0xFFFFFFFF


def stored_checksum(raw: bytes, checksum_offset: int) -> int:
    """The number in the checksum field."""
    return int(struct.unpack_from(">I", raw, checksum_offset)[0])


def sealed(raw: bytes, checksum_offset: int) -> bytes:
    """`raw` with the right checksum in its checksum field."""
    number = struct.pack(">I", checksum(raw, checksum_offset))
    return raw[:checksum_offset] + number + raw[checksum_offset + len(number) :]


def build_footer(footer: Footer) -> bytes:
    """The 512 bytes of `footer`, with the right checksum instead of the one in the field."""
    raw = _PACKED_FOOTER.build({name: getattr(footer, name) for name in _OFFSET["footer"]})
    return sealed(raw, FOOTER_CHECKSUM_OFFSET)


def build_header(header: DynamicHeader) -> bytes:
    """The 1024 bytes of `header`, with the right checksum instead of the one in the field."""
    values = {name: getattr(header, name) for name in _OFFSET["dynamic header"]}
    names = _OFFSET["parent locator entry"]
    values["parent_locators"] = b"".join(
        _PACKED_LOCATOR.build({name: getattr(entry, name) for name in names}) for entry in header.parent_locators
    )
    return sealed(_PACKED_HEADER.build(values), HEADER_CHECKSUM_OFFSET)


def build_batmap_header(header: BatmapHeader) -> bytes:
    """The 512 bytes of a batmap header; its checksum is over the map, so the field is used as it is."""
    return _PACKED_BATMAP_HEADER.build({name: getattr(header, name) for name in _OFFSET["batmap header"]})
