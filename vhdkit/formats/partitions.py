# SPDX-License-Identifier: Apache-2.0
"""The partitions of a disk: MBR with its extended partitions, and GPT. Only reads.

Decides which table a disk has and what its entries say. Both tables count in the disk's own sectors, of 512 or 4096
bytes. Pure: gets a function that reads bytes of the disk, knows no images. A guest wrote these bytes, so everything is
bounded: entries, logical partitions, the size of an array. Entries that make no sense are left out, and a damaged
table counts as none.

Sources: UEFI specification, section 5 (GPT); for MBR and extended partitions, the practice of PCs since DOS 3.3.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from vhdkit.units import SECTOR_SIZE, round_up

ReadBytes: TypeAlias = Callable[[int, int], bytes]  # (offset, size): fewer bytes only at the end of the disk

MAX_LOGICAL_PARTITIONS = 128  # of an extended partition; Linux stops at 256, Windows and DOS far earlier
MAX_GPT_ENTRIES = 1024  # everyone writes 128
MAX_GPT_ENTRY_BYTES = 4096  # everyone writes 128
_SIGNATURE_OFFSET, _SIGNATURE = 510, b"\x55\xaa"
_DISK_SIGNATURE_OFFSET = 440
_TABLE_OFFSET = 446
_MBR_ENTRY = struct.Struct("<B3sB3sII")  # status, first CHS, type, last CHS, first sector, sector count
_EXTENDED = (0x05, 0x0F, 0x85)
_EXTENDED_KINDS = tuple(f"{kind:#04x}" for kind in _EXTENDED)
# The types that disks of today have: MBR's numbers as `kind` spells them, GPT's GUIDs.
KIND_NAMES = {
    "0x01": "FAT",
    "0x04": "FAT",
    "0x05": "Extended",
    "0x06": "FAT",
    "0x07": "NTFS or exFAT",
    "0x0b": "FAT32",
    "0x0c": "FAT32",
    "0x0e": "FAT",
    "0x0f": "Extended",
    "0x27": "Windows recovery",
    "0x82": "Linux swap",
    "0x83": "Linux",
    "0x85": "Extended",
    "0x8e": "Linux LVM",
    "0xa5": "FreeBSD",
    "0xef": "EFI system",
    "0xfd": "Linux RAID",
    "C12A7328-F81F-11D2-BA4B-00A0C93EC93B": "EFI system",
    "21686148-6449-6E6F-744E-656564454649": "BIOS boot",
    "E3C9E316-0B5C-4DB8-817D-F92DF00215AE": "Microsoft reserved",
    "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7": "Microsoft basic data",
    "DE94BBA4-06D1-4D40-A16A-BFD50179D6AC": "Windows recovery",
    "0FC63DAF-8483-4772-8E79-3D69D8477DE4": "Linux filesystem",
    "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709": "Linux root (x86-64)",
    "B921B045-1DF0-41C3-AF44-4C6F280D3FAE": "Linux root (ARM64)",
    "933AC7E1-2EB4-4F13-B844-0E14E2AEF915": "Linux home",
    "BC13C2FF-59E6-4262-A352-B275FD6F7172": "Linux extended boot",
    "0657FD6D-A4AB-43C4-84E5-0933C84B4F4F": "Linux swap",
    "E6D6D379-F507-44C2-A23C-238F2A3DF928": "Linux LVM",
    "A19D880F-05FC-4D3B-A006-743F0F84911E": "Linux RAID",
}
_PROTECTIVE = 0xEE
_GPT_HEADER = struct.Struct("<8s4sII4xQQQQ16sQIII")
_GPT_MAGIC = b"EFI PART"
_GPT_CRC_OFFSET = 16
_GPT_ENTRY = struct.Struct("<16s16sQQQ72s")
_MIN_GPT_ENTRY_BYTES = _GPT_ENTRY.size


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition. `number` is what Linux calls it (5 and up for logical ones); sizes in bytes.

    `kind` is "0x83" in an MBR, a GUID in a GPT; `name` is the GPT's, empty elsewhere. `unique_id` is what Linux calls
    the PARTUUID: a GUID, or the disk's signature and the number; empty where there is none.
    """

    number: int
    offset_bytes: int
    size_bytes: int
    kind: str
    name: str = ""
    unique_id: str = ""

    @property
    def kind_name(self) -> str:
        """The common name of the type; the bare `kind` for a rare one."""
        return KIND_NAMES.get(self.kind, self.kind)

    @property
    def is_extended(self) -> bool:
        """True for the partition that only holds the logical partitions."""
        return self.kind in _EXTENDED_KINDS

    @property
    def end_bytes(self) -> int:
        """The first byte after it."""
        return self.offset_bytes + self.size_bytes


@dataclass(frozen=True, slots=True)
class PartitionTable:
    """The content of a disk's table. `backup_ranges` are (offset, size) of a GPT's second header and its entries.

    They are given only if the first header and its entries are whole, so that the second is not needed.
    """

    scheme: str  # "mbr" or "gpt"
    partitions: tuple[Partition, ...]
    backup_ranges: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class _Disk:
    """What is read of the disk, in its sectors; of each, a table uses the first 512 bytes."""

    read_bytes: ReadBytes
    size_bytes: int
    sector_bytes: int

    @property
    def end(self) -> int:
        """A sector that no disk reaches."""
        return (1 << 63) // self.sector_bytes

    def read(self, sector_index: int, size_bytes: int = SECTOR_SIZE) -> bytes:
        """Bytes from the beginning of a sector on."""
        return self.read_bytes(sector_index * self.sector_bytes, size_bytes)


def read_partitions(read: ReadBytes, size_bytes: int, sector_bytes: int = SECTOR_SIZE) -> PartitionTable | None:
    """The partition table of a disk with sectors of that size, or None without one. Raises what `read` raises."""
    disk = _Disk(read, size_bytes, sector_bytes)
    sector = disk.read(0)
    if len(sector) < SECTOR_SIZE or sector[_SIGNATURE_OFFSET:] != _SIGNATURE:
        return _read_gpt(disk)  # the protective MBR may be lost
    entries = list(_mbr_entries(sector))
    if any(kind == _PROTECTIVE for _, kind, _, _ in entries):
        gpt = _read_gpt(disk)
        if gpt is not None:
            return gpt
    if not entries or _is_boot_sector(sector):
        return None
    found = []
    for number, kind, first, count in entries:
        found.append(_partition(disk, number, kind, first, count))
        if kind in _EXTENDED:
            found += _logical(disk, first)
    signature = int.from_bytes(sector[_DISK_SIGNATURE_OFFSET : _DISK_SIGNATURE_OFFSET + 4], "little")
    if signature:
        found = [replace(one, unique_id=f"{signature:08x}-{one.number:02x}") for one in found]
    return PartitionTable("mbr", tuple(found))


def _mbr_entries(sector: bytes) -> Iterator[tuple[int, int, int, int]]:
    """(number, type, first sector, sector count) of the entries in use."""
    for index in range(4):
        values = _MBR_ENTRY.unpack_from(sector, _TABLE_OFFSET + index * _MBR_ENTRY.size)
        _, _, kind, _, first, count = values
        if kind and count:
            yield index + 1, kind, first, count


def _is_boot_sector(sector: bytes) -> bool:
    """True for a file system without a table: its boot code is in the place of the entries, with impossible marks."""
    marks = [sector[_TABLE_OFFSET + index * _MBR_ENTRY.size] for index in range(4)]
    return any(mark not in (0x00, 0x80) for mark in marks)


def _partition(disk: _Disk, number: int, kind: int, first: int, count: int) -> Partition:
    return Partition(number, first * disk.sector_bytes, count * disk.sector_bytes, f"{kind:#04x}")


def _logical(disk: _Disk, extended_first: int) -> Iterator[Partition]:
    """The logical partitions: each has a table of its own, which points at the next one."""
    position = extended_first
    seen: set[int] = set()
    for number in range(5, 5 + MAX_LOGICAL_PARTITIONS):
        sector = disk.read(position)
        if position in seen or len(sector) < SECTOR_SIZE or sector[_SIGNATURE_OFFSET:] != _SIGNATURE:
            return
        seen.add(position)
        entries = list(_mbr_entries(sector))
        for _, kind, first, count in entries:
            if kind not in _EXTENDED:
                yield _partition(disk, number, kind, position + first, count)
                break
        following = [first for _, kind, first, _ in entries if kind in _EXTENDED]
        if not following:
            return
        position = extended_first + following[0]


def _read_gpt(disk: _Disk) -> PartitionTable | None:
    """The GPT by its first header, or else by the one in the last sector."""
    last = disk.size_bytes // disk.sector_bytes - 1
    for sector_index in (1, last):
        header = _gpt_header(disk, sector_index)
        if header is None:
            continue
        entries, other, raw = header
        backup: tuple[tuple[int, int], ...] = ()
        if sector_index == 1:
            backup = _backup_ranges(disk, other, raw)
        return PartitionTable("gpt", tuple(_gpt_partitions(disk, entries)), backup)
    return None


def _gpt_header(disk: _Disk, sector_index: int) -> tuple[list[bytes], int, bytes] | None:
    """The entries of a whole header with whole entries, where the other header is, and the raw array; else None."""
    if sector_index < 1:
        return None
    sector = disk.read(sector_index)
    if len(sector) < SECTOR_SIZE or not sector.startswith(_GPT_MAGIC):
        return None
    _, _, size, stored, own, other, _, _, _, place, count, entry_size, array_sum = _GPT_HEADER.unpack_from(sector)
    if not _GPT_HEADER.size <= size <= SECTOR_SIZE or own != sector_index:
        return None
    blank = sector[:_GPT_CRC_OFFSET] + bytes(4) + sector[_GPT_CRC_OFFSET + 4 : size]
    possible = count <= MAX_GPT_ENTRIES and _MIN_GPT_ENTRY_BYTES <= entry_size <= MAX_GPT_ENTRY_BYTES
    if zlib.crc32(blank) != stored or not possible or place >= disk.end:
        return None
    raw = disk.read(place, count * entry_size)
    if len(raw) != count * entry_size or zlib.crc32(raw) != array_sum:
        return None
    return [raw[start : start + entry_size] for start in range(0, len(raw), entry_size)], other, raw


def _backup_ranges(disk: _Disk, sector_index: int, raw: bytes) -> tuple[tuple[int, int], ...]:
    """Where the second header and its entries lie, if they are whole and match the first ones."""
    header = _gpt_header(disk, sector_index) if sector_index < disk.end else None
    if header is None or header[2] != raw:
        return ()
    place, unit = _GPT_HEADER.unpack_from(disk.read(sector_index))[9], disk.sector_bytes
    return (place * unit, round_up(len(raw), unit)), (sector_index * unit, unit)


def _gpt_partitions(disk: _Disk, entries: list[bytes]) -> Iterator[Partition]:
    for number, entry in enumerate(entries, 1):
        kind, unique, first, last, _, name = _GPT_ENTRY.unpack_from(entry)
        if any(kind) and first <= last < disk.end:
            text = name.decode("utf-16-le", "replace").split("\0", 1)[0]
            size = (last - first + 1) * disk.sector_bytes
            yield Partition(
                number, first * disk.sector_bytes, size, str(uuid.UUID(bytes_le=kind)).upper(), text,
                str(uuid.UUID(bytes_le=unique)),
            )  # fmt: skip
