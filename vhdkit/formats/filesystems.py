# SPDX-License-Identifier: Apache-2.0
"""What lies on a disk or in a partition: which file system, and what it is called. Read, never written.

Decides by the marks that each format puts at fixed places, nothing else: whether the file system is whole is its own
tools' business. Pure: gets a function that reads bytes. A guest wrote these bytes, so whatever they are the answer is
a kind, a label of bounded length, or None.

Sources: the on-disk format documents of ext4 and XFS (Linux, Documentation/filesystems), btrfs (its wiki, On-disk
Format), NTFS, FAT and exFAT (Microsoft), ISO 9660, and the headers that LVM, LUKS, BitLocker and swap are known by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from vhdkit.units import SECTOR_SIZE

ReadBytes: TypeAlias = Callable[[int, int], bytes]  # (offset, size): fewer bytes only at the end

_EXT_OFFSET, _EXT_MAGIC = 1024, b"\x53\xef"
_EXT_HAS_JOURNAL = 0x4  # of the compatible features
_EXT_NEEDS_RECOVERY = 0x4  # of the incompatible ones
_EXT4_ONLY = sum(1 << bit for bit in (6, 7, 9))  # extents, 64 bit, flexible groups
_BTRFS_OFFSET, _BTRFS_MAGIC, _BTRFS_LABEL = 64 << 10, b"_BHRfS_M", 0x12B
_ISO_OFFSET = 32 << 10
_SWAP_OFFSET = 4086
_LABEL_BYTES = 256  # no format has more
# (offset, mark, kind): what one look settles.
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
    (SECTOR_SIZE, b"LABELONE", "lvm"),
    (_SWAP_OFFSET, b"SWAPSPACE2", "swap"),
)
# What holds other things than files; with what it takes to get at them.
CONTAINERS = {
    "luks": "it is encrypted with LUKS: `cryptsetup open` reads it",
    "bitlocker": "it is encrypted with BitLocker: `dislocker` or `cryptsetup bitlkOpen` read it",
    "lvm": "it is a physical volume of LVM: `vgchange` finds the volumes on it",
    "swap": "it is swap space",
}


@dataclass(frozen=True, slots=True)
class FileSystem:
    """`kind` as Linux names it (ext4, xfs, ntfs, vfat...), `label` as its owner did, empty where there is none.

    `needs_recovery`: it was not unmounted, and its journal holds changes (told for ext3 and ext4 only).
    """

    kind: str
    label: str = ""
    needs_recovery: bool = False


def identify(read: ReadBytes) -> FileSystem | None:
    """The file system that begins at offset 0 of what `read` reads, or None. Raises what `read` raises."""
    head = read(0, _SWAP_OFFSET + len(b"SWAPSPACE2"))
    for offset, mark, kind in _MARKS:
        if head.startswith(mark, offset):
            return FileSystem(kind, _label(kind, head))
    superblock = head[_EXT_OFFSET:]
    if superblock[56:58] == _EXT_MAGIC:
        return _ext(superblock)
    far = read(_BTRFS_OFFSET, _BTRFS_LABEL + _LABEL_BYTES)
    if far.startswith(_BTRFS_MAGIC, 64):
        return FileSystem("btrfs", _text(far[_BTRFS_LABEL:]))
    volume = read(_ISO_OFFSET, 72)
    if volume.startswith(b"CD001", 1):
        return FileSystem("iso9660", _text(volume[40:72]))
    return None


def _ext(superblock: bytes) -> FileSystem:
    compatible, incompatible = (int.from_bytes(superblock[place : place + 4], "little") for place in (92, 96))
    kind = "ext4" if incompatible & _EXT4_ONLY else "ext3" if compatible & _EXT_HAS_JOURNAL else "ext2"
    return FileSystem(kind, _text(superblock[120:136]), bool(incompatible & _EXT_NEEDS_RECOVERY))


def _label(kind: str, head: bytes) -> str:
    if kind == "xfs":
        return _text(head[108:120])
    if kind == "vfat":
        place = 71 if head.startswith(b"FAT32   ", 82) else 43
        label = _text(head[place : place + 11])
        return "" if label == "NO NAME" else label
    return ""


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace").strip()
