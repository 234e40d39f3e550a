# SPDX-License-Identifier: Apache-2.0
"""The structures of a VHD file, field by field, as the specification lists them.

Decides offsets, widths and byte order, the magic numbers, and the checksum over a structure. Every number is
big-endian. Callers get frozen dataclasses, so no other module parses bytes.
Must not judge: which footer to use is decided in `footers`.

Source: "Virtual Hard Disk Image Format Specification", version 1.0 (2006), except where a field says otherwise.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass

from vhdkit.formats.fields import Field, Packed

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

_FOOTER = Packed(
    ">",
    cookie="8s",
    features="I",
    file_format_version="I",
    data_offset="Q",  # of the dynamic header; all ones in a fixed disk
    timestamp="I",  # seconds since 2000-01-01 UTC
    creator_application="4s",
    creator_version="I",
    creator_host_os="4s",
    original_size="Q",  # bytes, when created
    current_size="Q",  # bytes, now
    cylinders="H",
    heads="B",
    sectors_per_track="B",
    disk_type="I",
    checksum="I",
    unique_id=f"{UUID_SIZE}s",
    saved_state="B",
    hidden="B",  # XenServer's; reserved in the specification, but included in the checksum
    reserved=f"{FOOTER_RESERVED_SIZE}s",
)

_LOCATOR = Packed(
    ">",
    platform_code="4s",
    data_space="I",  # sectors by the specification, bytes by Virtual PC and Hyper-V
    data_length="I",  # bytes
    reserved="I",
    data_offset="Q",  # bytes from the start of the file
)

_HEADER = Packed(
    ">",
    cookie="8s",
    data_offset="Q",  # unused: all ones
    table_offset="Q",  # bytes, of the BAT
    header_version="I",
    max_table_entries="I",
    block_size="I",  # bytes of data in a block, without its sector bitmap
    checksum="I",
    parent_unique_id=f"{UUID_SIZE}s",
    parent_timestamp="I",
    reserved1="I",
    parent_unicode_name=f"{PARENT_NAME_SIZE}s",  # UTF-16 big-endian
    parent_locators=f"{LOCATOR_COUNT * _LOCATOR.size}s",
    reserved2=f"{HEADER_RESERVED_SIZE}s",
)

# Source: XenServer's vhd-util (libvhd.h); not in the specification.
_BATMAP_HEADER = Packed(
    ">",
    cookie="8s",
    batmap_offset="Q",  # bytes
    batmap_size="I",  # sectors
    batmap_version="I",
    checksum="I",
    marker="B",
    reserved="483s",
)

assert _FOOTER.size == FOOTER_SIZE
assert _HEADER.size == HEADER_SIZE
assert _BATMAP_HEADER.size == BATMAP_HEADER_SIZE


STRUCTURES: dict[str, tuple[Field, ...]] = {
    "footer": _FOOTER.fields,
    "dynamic header": _HEADER.fields,
    "parent locator entry": _LOCATOR.fields,
    "batmap header": _BATMAP_HEADER.fields,
}
_OFFSET = {name: {f.name: f.offset_bytes for f in fields} for name, fields in STRUCTURES.items()}
FOOTER_CHECKSUM_OFFSET = _OFFSET["footer"]["checksum"]
HEADER_CHECKSUM_OFFSET = _OFFSET["dynamic header"]["checksum"]
HEADER_LOCATORS_OFFSET = _OFFSET["dynamic header"]["parent_locators"]
LOCATOR_SIZE = _LOCATOR.size
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


# Opening a chain reads the same few footers and headers several times.
@functools.lru_cache(maxsize=256)
def parse_footer(raw: bytes) -> Footer:
    """Parse a footer; one of 511 bytes lacks its last reserved byte. Checks nothing."""
    return Footer(**_FOOTER.parse(raw.ljust(FOOTER_SIZE, b"\0")))


@functools.lru_cache(maxsize=256)
def parse_header(raw: bytes) -> DynamicHeader:
    """Parse a dynamic header of 1024 bytes. Checks nothing."""
    values = _HEADER.parse(raw)
    entries = values["parent_locators"]
    values["parent_locators"] = tuple(
        LocatorEntry(**_LOCATOR.parse(entries[start : start + LOCATOR_SIZE]))
        for start in range(0, len(entries), LOCATOR_SIZE)
    )
    return DynamicHeader(**values)


def parse_batmap_header(raw: bytes) -> BatmapHeader:
    """Parse a batmap header of 512 bytes. Checks nothing."""
    return BatmapHeader(**_BATMAP_HEADER.parse(raw))


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
    raw = _FOOTER.build({name: getattr(footer, name) for name in _OFFSET["footer"]})
    return sealed(raw, FOOTER_CHECKSUM_OFFSET)


def build_header(header: DynamicHeader) -> bytes:
    """The 1024 bytes of `header`, with the right checksum instead of the one in the field."""
    values = {name: getattr(header, name) for name in _OFFSET["dynamic header"]}
    names = _OFFSET["parent locator entry"]
    values["parent_locators"] = b"".join(
        _LOCATOR.build({name: getattr(entry, name) for name in names}) for entry in header.parent_locators
    )
    return sealed(_HEADER.build(values), HEADER_CHECKSUM_OFFSET)


def build_batmap_header(header: BatmapHeader) -> bytes:
    """The 512 bytes of a batmap header; its checksum is over the map, so the field is used as it is."""
    return _BATMAP_HEADER.build({name: getattr(header, name) for name in _OFFSET["batmap header"]})
