# SPDX-License-Identifier: Apache-2.0
"""What is on a disk or in a partition: which file system, its label, and where it ends. Only reads.

Decides by the signatures that each format has at fixed places; whether the file system is intact is left to its own
tools. Pure: gets a function that reads bytes. A guest wrote these bytes, so whatever they are, the answer is
a kind, a label of bounded length, or None.

Sources: the on-disk format documents of ext4 and XFS (Linux, Documentation/filesystems), btrfs (its wiki, On-disk
Format), NTFS, FAT and exFAT (Microsoft), ISO 9660, and the headers that identify LVM, LUKS, BitLocker and swap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from vhdkit.formats.labels import exfat_label, ntfs_label
from vhdkit.units import KIB, SECTOR_SIZE, round_up

ReadBytes: TypeAlias = Callable[[int, int], bytes]  # (offset, size): fewer bytes only at the end

_EXT_OFFSET, _EXT_MAGIC = 1024, b"\x53\xef"
_EXT_HAS_JOURNAL = 0x4  # of the compatible features
_EXT_NEEDS_RECOVERY = 0x4  # of the incompatible ones
_EXT_64_BIT = 0x80  # of the incompatible ones
_EXT_MAX_SHIFT, _EXFAT_MAX_SHIFT = 6, 12  # 64 KiB blocks, 4 KiB sectors: the formats have no larger ones
_EXT4_ONLY = sum(1 << bit for bit in (6, 7, 9))  # extents, 64 bit, flexible groups
_BTRFS_OFFSET, _BTRFS_MAGIC, _BTRFS_LABEL = 64 << 10, b"_BHRfS_M", 0x12B
_ISO_OFFSET = 32 << 10
_SWAP_PAGES = tuple(
    size * KIB for size in (4, 8, 16, 32, 64)
)  # page sizes of machines; the mark is at the end of the first page
_SWAP_MARKS = (
    b"SWAPSPACE2",
    b"S1SUSPEND\0",
    b"S2SUSPEND\0",
    b"ULSUSPEND\0",
    b"LINHIB0001",
)  # the last four: a hibernated system
_MD_MARK = b"\xfc\x4e\x2b\xa9\1\0\0\0"
_SQUASHFS_PADDING = 4 * KIB
_LABEL_BYTES = 256  # no format has more
# (offset, mark, kind): recognised by one mark near the start.
_MARKS = (
    (0, b"XFSB", "xfs"),
    (0, b"hsqs", "squashfs"),
    (0, b"LUKS\xba\xbe", "luks"),
    (3, b"-FVE-FS-", "bitlocker"),
    (3, b"NTFS    ", "ntfs"),
    (3, b"EXFAT   ", "exfat"),
    (3, b"ReFS", "refs"),
    (82, b"FAT32   ", "vfat"),
    (54, b"FAT1", "vfat"),
    *((sector * SECTOR_SIZE, b"LABELONE", "lvm") for sector in range(4)),
    (_SWAP_PAGES[0] - len(_SWAP_MARKS[0]), _SWAP_MARKS[0], "swap"),
)
# Checked after all others: programs that make those may leave these marks in place.
_LATE_MARKS = (
    *((size - len(mark), mark, "swap") for size in _SWAP_PAGES for mark in _SWAP_MARKS),
    (0, _MD_MARK, "md"),
    (4 * KIB, _MD_MARK, "md"),
    (32, b"NXSB", "apfs"),
    (KIB, b"\x10\x20\xf5\xf2", "f2fs"),
    (KIB, b"H+\0\4", "hfsplus"),
    (KIB, b"HX\0\5", "hfsplus"),
    (32 * KIB, b"JFS1", "jfs"),
    (32 * KIB + 1, b"BEA01", "udf"),
    (64 * KIB + 52, b"ReIsEr", "reiserfs"),
)
# Kinds that hold no files themselves, with the way to get at their content.
CONTAINERS = {
    "luks": "it is encrypted with LUKS: open it with `cryptsetup open`",
    "bitlocker": "it is encrypted with BitLocker: open it with `dislocker` or `cryptsetup bitlkOpen`",
    "lvm": "it is a physical volume of LVM: activate the volumes on it with `vgchange`",
    "md": "it is a member of a Linux RAID: assemble all members with `mdadm --assemble`",
    "swap": "it is swap space",
}
_IN_FIRST_SECTOR = {kind for offset, _, kind in _MARKS if offset < SECTOR_SIZE}
# What shrinks a file system, by kind; the content of the others must be copied to a new, smaller disk.
_SHRINKERS = {
    "ext2": "resize2fs",
    "ext3": "resize2fs",
    "ext4": "resize2fs",
    "btrfs": "btrfs filesystem resize",
    "ntfs": "ntfsresize (or Windows' Disk Management)",
    "vfat": "fatresize",
    "swap": "mkswap, with swap turned off,",
    "lvm": "pvresize --setphysicalvolumesize",
}


@dataclass(frozen=True, slots=True)
class FileSystem:
    """`kind` as Linux names it (ext4, xfs, ntfs, vfat...); `label` is empty if there is none.

    `needs_recovery`: it was not unmounted, and its journal holds changes (detected for ext3 and ext4 only).
    """

    kind: str
    label: str = ""
    needs_recovery: bool = False

    @property
    def in_first_sector(self) -> bool:
        """Its mark is in the sector of a partition table: if both seem to be present, either may be a leftover."""
        return self.kind in _IN_FIRST_SECTOR


def identify(read: ReadBytes) -> FileSystem | None:
    """The file system that begins at offset 0 of what `read` reads, or None. Raises what `read` raises."""
    head = read(0, _SWAP_PAGES[0])
    for offset, mark, kind in _MARKS:
        if head.startswith(mark, offset):
            return FileSystem(kind, _label(kind, head, read))
    superblock = head[_EXT_OFFSET:]
    if superblock[56:58] == _EXT_MAGIC:
        return _ext(superblock)
    far = read(_BTRFS_OFFSET, _BTRFS_LABEL + _LABEL_BYTES)
    if far.startswith(_BTRFS_MAGIC, 64):
        return FileSystem("btrfs", _text(far[_BTRFS_LABEL:]))
    volume = read(_ISO_OFFSET, 72)
    if volume.startswith(b"CD001", 1):
        return FileSystem("iso9660", _text(volume[40:72]))
    head = read(0, max(offset + len(mark) for offset, mark, _ in _LATE_MARKS))
    for offset, mark, kind in _LATE_MARKS:
        if head.startswith(mark, offset):
            return FileSystem(kind)
    return None


def _ext(superblock: bytes) -> FileSystem:
    compatible, incompatible = (int.from_bytes(superblock[place : place + 4], "little") for place in (92, 96))
    kind = "ext4" if incompatible & _EXT4_ONLY else "ext3" if compatible & _EXT_HAS_JOURNAL else "ext2"
    return FileSystem(kind, _text(superblock[120:136]), bool(incompatible & _EXT_NEEDS_RECOVERY))


def _label(kind: str, head: bytes, read: ReadBytes) -> str:
    if kind == "ntfs":
        return ntfs_label(read, head[:SECTOR_SIZE].ljust(SECTOR_SIZE, b"\0"))
    if kind == "exfat":
        return exfat_label(read, head[:SECTOR_SIZE].ljust(SECTOR_SIZE, b"\0"))
    if kind == "xfs":
        return _text(head[108:120])
    if kind == "vfat":
        place = 71 if head.startswith(b"FAT32   ", 82) else 43
        label = _text(head[place : place + 11])
        return "" if label == "NO NAME" else label
    return ""


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace").strip()


def end_of(read: ReadBytes, kind: str) -> int | None:
    """The first byte after a file system of `kind` that begins at offset 0, by its own superblock.

    None if the superblock does not give one, or an impossible one: it may then reach the end. Raises what `read`
    raises.
    """
    finder = _ENDS.get(kind)
    raw = read(0, _BTRFS_OFFSET + _BTRFS_LABEL)
    end = 0 if finder is None else finder(raw.ljust(_BTRFS_OFFSET + _BTRFS_LABEL, b"\0"))
    return end if end > 0 else None


def shrink_hint(kind: str) -> str:
    """A hint how to make room after a file system of `kind`."""
    tool = _SHRINKERS.get(kind)
    if tool is None:
        return f"{kind} cannot be shrunk in place: make a smaller disk and copy the files there"
    return f"first shrink it with its own tools, where they can see the disk: {tool}"


def _little(raw: bytes, place: int, size: int) -> int:
    return int.from_bytes(raw[place : place + size], "little")


def _big(raw: bytes, place: int, size: int) -> int:
    return int.from_bytes(raw[place : place + size], "big")


def _end_of_ext(raw: bytes) -> int:
    block = _EXT_OFFSET
    count = _little(raw, block + 4, 4)
    if _little(raw, block + 96, 4) & _EXT_64_BIT:
        count |= _little(raw, block + 0x150, 4) << 32
    shift = _little(raw, block + 24, 4)
    return count << (10 + shift) if shift <= _EXT_MAX_SHIFT else 0


def _end_of_fat(raw: bytes) -> int:
    return (_little(raw, 0x13, 2) or _little(raw, 0x20, 4)) * _little(raw, 0x0B, 2)


def _end_of_ntfs(raw: bytes) -> int:
    sectors = _little(raw, 0x28, 8)  # without the last one, which holds a second boot sector
    return (sectors + 1) * _little(raw, 0x0B, 2) if sectors else 0


def _end_of_exfat(raw: bytes) -> int:
    shift = raw[108]
    return _little(raw, 72, 8) << shift if shift <= _EXFAT_MAX_SHIFT else 0


def _end_of_swap(raw: bytes) -> int:
    page = next((size for size in _SWAP_PAGES if raw[:size].endswith(_SWAP_MARKS)), 0)
    pages = [int.from_bytes(raw[1028:1032], order) for order in ("little", "big")]
    return (min(pages) + 1) * page if min(pages) else 0


def _end_of_lvm(raw: bytes) -> int:
    label = max(0, raw.find(b"LABELONE", 0, 4 * SECTOR_SIZE))
    header = label + _little(raw, label + 20, 4)
    return _little(raw, header + 32, 8) if header < _BTRFS_OFFSET else 0


def _end_of_iso(raw: bytes) -> int:
    return _little(raw, _ISO_OFFSET + 80, 4) * _little(raw, _ISO_OFFSET + 128, 2)


_ENDS: dict[str, Callable[[bytes], int]] = {
    "ext2": _end_of_ext,
    "ext3": _end_of_ext,
    "ext4": _end_of_ext,
    "xfs": lambda raw: _big(raw, 4, 4) * _big(raw, 8, 8),
    "btrfs": lambda raw: _little(raw, _BTRFS_OFFSET + 0xC9 + 8, 8),  # of this device, not of all of them
    "vfat": _end_of_fat,
    "ntfs": _end_of_ntfs,
    "exfat": _end_of_exfat,
    "swap": _end_of_swap,
    "lvm": _end_of_lvm,
    "iso9660": _end_of_iso,
    "squashfs": lambda raw: round_up(_little(raw, 40, 8), _SQUASHFS_PADDING),
}
