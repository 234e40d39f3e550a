# SPDX-License-Identifier: Apache-2.0
"""The structures of a VHDX file, field by field, as the specification lists them.

Decides offsets, widths, magic numbers, GUIDs and limits. Every number is little-endian, and GUIDs are stored in
Microsoft's mixed order; here and in all other modules an id has the bytes in the order in which it is written as text
(`uuid.UUID.bytes`). Callers get frozen dataclasses, so no other module parses these bytes.
Must not judge: which header to believe is decided in `header`, which region table in `regions`.

Source: [MS-VHDX] "Virtual Hard Disk v2 (VHDX) File Format", v20240423, except where a comment says otherwise.
"""

from __future__ import annotations

import functools
import uuid
from dataclasses import dataclass
from typing import Any

from vhdkit.formats.fields import Field, Packed
from vhdkit.units import KIB, MIB, TIB

ALIGNMENT = MIB  # of the log, regions and blocks
HEADER_SECTION_SIZE = MIB  # identifier, headers, region tables; nothing else lies there
LOG_PAGE_SIZE = 4 * KIB  # the unit of the log and of everything that goes through it

CREATOR_OFFSET = 8
CREATOR_SIZE = 512  # UTF-16, ended by NUL or full

HEADER_OFFSETS = (64 * KIB, 128 * KIB)
HEADER_SIZE = 4 * KIB
HEADER_SIGNATURE = b"head"
HEADER_VERSION = 1
MAX_HEADER_NUMBER = (1 << 64) - (1 << 32)  # headers with larger ones are only read; a session writes far fewer
LOG_VERSION = 0
MAX_LOG_BYTES = 1024 * MIB  # the format sets no limit; larger ones are refused, so that a hostile log is bounded

REGION_TABLE_OFFSETS = (192 * KIB, 256 * KIB)
REGION_TABLE_SIZE = 64 * KIB
REGION_SIGNATURE = b"regi"
MAX_REGIONS = 2047
REGION_REQUIRED = 1

METADATA_TABLE_SIZE = 64 * KIB
METADATA_SIGNATURE = b"metadata"
MAX_ITEMS = 2047
MAX_USER_ITEMS = 1024
MAX_ITEM_BYTES = MIB
ITEM_IS_USER, ITEM_IS_VIRTUAL_DISK, ITEM_IS_REQUIRED = 1, 2, 4

MIN_BLOCK_SIZE, MAX_BLOCK_SIZE = MIB, 256 * MIB
MAX_VIRTUAL_SIZE = 64 * TIB
MAX_FILE_BYTES = 66 * TIB  # no file is larger: a full disk of the largest size, and its tables
SECTOR_SIZES = (512, 4096)
SECTORS_PER_CHUNK = 1 << 23  # whose bits one sector bitmap block holds
BITMAP_BLOCK_SIZE = MIB
LEAVE_BLOCKS_ALLOCATED, HAS_PARENT = 1, 2

BAT_ENTRY_SIZE = 8
BAT_STATE_MASK = 0x7
BAT_RESERVED_MASK = 0xFFFF8
BAT_OFFSET_MASK = ~0xFFFFF & 0xFFFFFFFFFFFFFFFF

LOG_ENTRY_SIGNATURE = b"loge"
LOG_ENTRY_HEADER_SIZE = 64
DESCRIPTOR_SIZE = 32
DATA_SIGNATURE, ZERO_SIGNATURE, DATA_SECTOR_SIGNATURE = b"desc", b"zero", b"data"
LEADING_BYTES, TRAILING_BYTES = 8, 4  # of a logged page, kept in its descriptor


def guid(text: str) -> bytes:
    """An id from its text."""
    return uuid.UUID(text).bytes


@functools.lru_cache(16)
def stored_guid(value: bytes) -> bytes:
    """The 16 bytes by which the file stores an id."""
    return uuid.UUID(bytes=value).bytes_le


def read_guid(raw: bytes) -> bytes:
    """The id that these 16 bytes of a file stand for."""
    return uuid.UUID(bytes_le=bytes(raw)).bytes


REGION_BAT = guid("2DC27766-F623-4200-9D64-115E9BFD4A08")
REGION_METADATA = guid("8B7CA206-4790-4B9A-B8FE-575F050F886E")

ITEM_FILE_PARAMETERS = guid("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
ITEM_VIRTUAL_DISK_SIZE = guid("2FA54224-CD1B-4876-B211-5DBED83BF4B8")
ITEM_LOGICAL_SECTOR_SIZE = guid("8141BF1D-A96F-4709-BA47-F233A8FAAB5F")
ITEM_PHYSICAL_SECTOR_SIZE = guid("CDA348C7-445D-4471-9CC9-E9885251C556")
ITEM_VIRTUAL_DISK_ID = guid("BECA12AB-B2E6-4523-93EF-C309E000C746")
ITEM_PARENT_LOCATOR = guid("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")
ITEM_INCOMPLETE_FILE = guid("71CC85F0-1B69-4E28-9558-C3BF83AE75D3")  # not in the specification: seen in OpenVMM
LOCATOR_TYPE_VHDX = guid("B04AEFB7-D19E-4A81-B789-25B8E9445913")

_HEADER = Packed(
    "<",
    signature="4s",
    checksum="I",  # CRC-32C over the 4096 bytes, with zeros here
    sequence_number="Q",
    file_write_guid="16s",  # new whenever the file is opened for writing
    data_write_guid="16s",  # new before the first change that a guest could see; children record it
    log_guid="16s",  # zeros: there is nothing to replay
    log_version="H",
    version="H",
    log_length="I",
    log_offset="Q",
)
_REGION_TABLE = Packed(
    "<",
    signature="4s",
    checksum="I",  # CRC-32C over the 64 KiB, with zeros here
    entry_count="I",
    reserved="I",
)
_REGION_ENTRY = Packed("<", guid="16s", file_offset="Q", length="I", required="I")
_METADATA_TABLE = Packed("<", signature="8s", reserved="H", entry_count="H", reserved2="20s")
_METADATA_ENTRY = Packed(
    "<",
    item_id="16s",
    offset="I",  # from the start of the metadata region
    length="I",
    flags="I",
    reserved="I",
)
_LOCATOR_HEADER = Packed("<", locator_type="16s", reserved="H", key_value_count="H")
_LOCATOR_ENTRY = Packed(
    "<",
    key_offset="I",  # from the start of the item
    value_offset="I",
    key_length="H",  # bytes
    value_length="H",
)
_LOG_ENTRY_HEADER = Packed(
    "<",
    signature="4s",
    checksum="I",  # CRC-32C over the whole entry, with zeros here
    entry_length="I",
    tail="I",  # offset in the log of the oldest entry that is still needed
    sequence_number="Q",
    descriptor_count="I",
    reserved="I",
    log_guid="16s",
    flushed_file_offset="Q",  # a size that the file has for certain
    last_file_offset="Q",  # a size that everything fits into
)
_DATA_DESCRIPTOR = Packed(
    "<",
    signature="4s",
    trailing_bytes="4s",
    leading_bytes="8s",
    file_offset="Q",
    sequence_number="Q",
)
_ZERO_DESCRIPTOR = Packed(
    "<",
    signature="4s",
    reserved="I",
    zero_length="Q",
    file_offset="Q",
    sequence_number="Q",
)

HEADER_CHECKSUM_OFFSET = 4  # in every structure that has one
REGION_ENTRY_SIZE = _REGION_ENTRY.size
REGION_TABLE_HEADER_SIZE = _REGION_TABLE.size
METADATA_ENTRY_SIZE = _METADATA_ENTRY.size
METADATA_TABLE_HEADER_SIZE = _METADATA_TABLE.size
LOCATOR_HEADER_SIZE = _LOCATOR_HEADER.size
LOCATOR_ENTRY_SIZE = _LOCATOR_ENTRY.size
assert (_HEADER.size, REGION_ENTRY_SIZE, REGION_TABLE_HEADER_SIZE) == (80, 32, 16)
assert (METADATA_ENTRY_SIZE, METADATA_TABLE_HEADER_SIZE, LOCATOR_HEADER_SIZE, LOCATOR_ENTRY_SIZE) == (32, 32, 20, 12)
assert _LOG_ENTRY_HEADER.size == LOG_ENTRY_HEADER_SIZE
assert _DATA_DESCRIPTOR.size == _ZERO_DESCRIPTOR.size == DESCRIPTOR_SIZE


STRUCTURES: dict[str, tuple[Field, ...]] = {
    "header": _HEADER.fields,
    "region table": _REGION_TABLE.fields,
    "region table entry": _REGION_ENTRY.fields,
    "metadata table": _METADATA_TABLE.fields,
    "metadata table entry": _METADATA_ENTRY.fields,
    "parent locator": _LOCATOR_HEADER.fields,
    "parent locator entry": _LOCATOR_ENTRY.fields,
    "log entry": _LOG_ENTRY_HEADER.fields,
    "data descriptor": _DATA_DESCRIPTOR.fields,
    "zero descriptor": _ZERO_DESCRIPTOR.fields,
}


@dataclass(frozen=True, slots=True)
class Header:
    """A header: the ids of the file's present state, and where its log lies. Ids are in text order."""

    signature: bytes
    checksum: int
    sequence_number: int
    file_write_guid: bytes
    data_write_guid: bytes
    log_guid: bytes
    log_version: int
    version: int
    log_length: int
    log_offset: int


@dataclass(frozen=True, slots=True)
class RegionTableHeader:
    """The fields before the entries of a region table."""

    signature: bytes
    checksum: int
    entry_count: int
    reserved: int


@dataclass(frozen=True, slots=True)
class RegionEntry:
    """A region of the file."""

    guid: bytes
    file_offset: int
    length: int
    required: int


@dataclass(frozen=True, slots=True)
class MetadataTableHeader:
    """The fields before the entries of the metadata table."""

    signature: bytes
    reserved: int
    entry_count: int
    reserved2: bytes


@dataclass(frozen=True, slots=True)
class MetadataEntry:
    """Where an item of metadata lies in its region."""

    item_id: bytes
    offset: int
    length: int
    flags: int
    reserved: int


@dataclass(frozen=True, slots=True)
class LocatorHeader:
    """The fields before the entries of a parent locator."""

    locator_type: bytes
    reserved: int
    key_value_count: int


@dataclass(frozen=True, slots=True)
class LocatorEntry:
    """Where a key and its value lie in the locator."""

    key_offset: int
    value_offset: int
    key_length: int
    value_length: int


@dataclass(frozen=True, slots=True)
class LogEntryHeader:
    """The fields before the descriptors of a log entry."""

    signature: bytes
    checksum: int
    entry_length: int
    tail: int
    sequence_number: int
    descriptor_count: int
    reserved: int
    log_guid: bytes
    flushed_file_offset: int
    last_file_offset: int


def _values(structure: Packed, raw: bytes, guids: tuple[str, ...] = ()) -> dict[str, Any]:
    values = structure.parse(raw)
    return values | {name: read_guid(values[name]) for name in guids}


def _built(structure: Packed, value: Any, guids: tuple[str, ...] = ()) -> bytes:
    fields = {name: getattr(value, name) for name in structure.names}
    return structure.build(fields | {name: stored_guid(fields[name]) for name in guids})


_HEADER_GUIDS = ("file_write_guid", "data_write_guid", "log_guid")


def parse_header(raw: bytes) -> Header:
    """Cut a header of 4096 bytes. Checks nothing."""
    return Header(**_values(_HEADER, raw, _HEADER_GUIDS))


def build_header(header: Header) -> bytes:
    """The 80 bytes of `header` that mean something, with the checksum field as it is."""
    return _built(_HEADER, header, _HEADER_GUIDS)


def parse_region_table(raw: bytes) -> RegionTableHeader:
    """Cut the head of a region table. Checks nothing."""
    return RegionTableHeader(**_values(_REGION_TABLE, raw))


def build_region_table(table: RegionTableHeader) -> bytes:
    """The head of a region table, with the checksum field as it is."""
    return _built(_REGION_TABLE, table)


def parse_region_entry(raw: bytes) -> RegionEntry:
    """Cut an entry of a region table. Checks nothing."""
    return RegionEntry(**_values(_REGION_ENTRY, raw, ("guid",)))


def build_region_entry(entry: RegionEntry) -> bytes:
    """The 32 bytes of a region table entry."""
    return _built(_REGION_ENTRY, entry, ("guid",))


def parse_metadata_table(raw: bytes) -> MetadataTableHeader:
    """Cut the head of the metadata table. Checks nothing."""
    return MetadataTableHeader(**_values(_METADATA_TABLE, raw))


def build_metadata_table(table: MetadataTableHeader) -> bytes:
    """The 32 bytes of the head of a metadata table."""
    return _built(_METADATA_TABLE, table)


def parse_metadata_entry(raw: bytes) -> MetadataEntry:
    """Cut an entry of the metadata table. Checks nothing."""
    return MetadataEntry(**_values(_METADATA_ENTRY, raw, ("item_id",)))


def build_metadata_entry(entry: MetadataEntry) -> bytes:
    """The 32 bytes of a metadata table entry."""
    return _built(_METADATA_ENTRY, entry, ("item_id",))


def parse_locator_header(raw: bytes) -> LocatorHeader:
    """Cut the head of a parent locator. Checks nothing."""
    return LocatorHeader(**_values(_LOCATOR_HEADER, raw, ("locator_type",)))


def build_locator_header(header: LocatorHeader) -> bytes:
    """The 20 bytes of the head of a parent locator."""
    return _built(_LOCATOR_HEADER, header, ("locator_type",))


def parse_locator_entry(raw: bytes) -> LocatorEntry:
    """Cut an entry of a parent locator. Checks nothing."""
    return LocatorEntry(**_values(_LOCATOR_ENTRY, raw))


def build_locator_entry(entry: LocatorEntry) -> bytes:
    """The 12 bytes of a parent locator entry."""
    return _built(_LOCATOR_ENTRY, entry)


def parse_log_entry_header(raw: bytes) -> LogEntryHeader:
    """Cut the head of a log entry. Checks nothing. A hostile log may have one in each of its sectors."""
    values: list[Any] = list(_LOG_ENTRY_HEADER.packing.unpack(raw))
    values[7] = read_guid(values[7])
    return LogEntryHeader(*values)


def build_log_entry_header(header: LogEntryHeader) -> bytes:
    """The 64 bytes of the head of a log entry, with the checksum field as it is. Every flush builds one."""
    return _LOG_ENTRY_HEADER.packing.pack(
        header.signature,
        header.checksum,
        header.entry_length,
        header.tail,
        header.sequence_number,
        header.descriptor_count,
        header.reserved,
        stored_guid(header.log_guid),
        header.flushed_file_offset,
        header.last_file_offset,
    )
