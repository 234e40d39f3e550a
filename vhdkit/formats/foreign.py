# SPDX-License-Identifier: Apache-2.0
"""Files that are no disks in a format that vhdkit reads, and are not meant as raw disks either.

Decides by signatures at fixed places what a file is and what to do with it: images of other programs, compressed
files, and archives in which disks are distributed. Opened as raw, each would be a disk of nonsense, and a write would
destroy it. A file system without a partition table is not among them: it is a common raw disk.

Sources: RFC 1952 (gzip), RFC 8878 (zstd), the format documents of bzip2, xz, lz4, lzop, 7z and RAR, PKWARE's APPNOTE
(zip), POSIX pax (tar), QEMU's and Proxmox VE's format documents (QCOW2, QED, Parallels, bochs, cloop, VMA), VMware's
and VirtualBox's (VMDK, VDI), Microsoft's (VHDX, WIM), the libewf documents (EWF), Android's (sparse images).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vhdkit.units import SECTOR_SIZE

_TAR_OFFSET, _TAR_MAGIC = 257, b"ustar"
HEAD_BYTES = SECTOR_SIZE  # what `identify_foreign` needs of a file
_ZSTD_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")  # a frame that some compressors put first
_BZIP2 = re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")

_CONVERT = "convert it first: qemu-img convert -O raw {path} disk.raw"
_UNPACK = "unpack it first: {tool} {path}"
_IN_ARCHIVE = "the disks are files in it: unpack it first, {tool} {path}"


@dataclass(frozen=True, slots=True)
class Foreign:
    """`name` completes "is ...", `hint` is what to do with the file, with `{path}` for its path."""

    name: str
    hint: str


def _image(name: str) -> Foreign:
    return Foreign(f"a {name} image", _CONVERT)


def _packed(name: str, tool: str) -> Foreign:
    return Foreign(f"compressed ({name})", _UNPACK.replace("{tool}", tool))


def _archive(name: str, tool: str) -> Foreign:
    return Foreign(f"a {name} archive", _IN_ARCHIVE.replace("{tool}", tool))


_MARKS: tuple[tuple[bytes, Foreign], ...] = (
    (b"QFI\xfb", _image("QCOW2")),
    (b"KDMV", _image("VMDK")),
    (b"# Disk DescriptorFile", _image("VMDK")),
    (b"COWD", _image("VMDK")),
    (b"<<< ", _image("VDI")),
    (b"QED\0", _image("QED")),
    (b"WithoutFreeSpace", _image("Parallels")),
    (b"WithouFreSpacExt", _image("Parallels")),
    (b"Bochs Virtual HD Image", _image("bochs")),
    (b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", _image("cloop")),
    (b"\x3a\xff\x26\xed", Foreign("an Android sparse image", "convert it first: simg2img {path} disk.raw")),
    (b"EVF\x09\x0d\x0a\xff\0", Foreign("an EWF (E01) image", "convert it first: ewfexport -f raw -t disk {path}")),
    (b"VMA\0", Foreign("a backup of Proxmox VE (VMA)", "unpack it first, on such a host: vma extract {path} FOLDER")),
    (b"\x1f\x8b\x08", _packed("gzip", "gunzip -k")),
    (b"\xfd7zXZ\0", _packed("xz", "xz -dk")),
    (b"\x28\xb5\x2f\xfd", _packed("zstd", "zstd -d")),
    (b"\x04\x22\x4d\x18", _packed("lz4", "lz4 -d")),
    (b"\x89LZO\0\r\n\x1a\n", _packed("lzop", "lzop -d")),
    (b"LZIP\x01", _packed("lzip", "lzip -dk")),
    (b"PK\x03\x04", _archive("zip", "unzip")),
    (b"PK\x05\x06", _archive("zip", "unzip")),
    (b"PK\x07\x08", _archive("zip", "unzip")),
    (b"7z\xbc\xaf\x27\x1c", _archive("7z", "7z x")),
    (b"Rar!\x1a\x07", _archive("RAR", "unrar x")),
    (b"MSWIM\0\0\0", _archive("WIM", "wimapply")),
)


def identify_foreign(head: bytes) -> Foreign | None:
    """What the file that begins with `head` (its first 512 bytes) is, or None if it may be opened as a raw disk."""
    for mark, found in _MARKS:
        if head.startswith(mark):
            return found
    if _BZIP2.match(head):
        return _packed("bzip2", "bunzip2 -k")
    if _ZSTD_SKIPPABLE.match(head):
        return _packed("zstd", "zstd -d")
    if head.startswith(_TAR_MAGIC, _TAR_OFFSET):
        return _archive("tar (also OVA and XVA)", "tar -xf")
    return None
