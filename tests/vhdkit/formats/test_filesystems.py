# SPDX-License-Identifier: Apache-2.0
"""What is recognised by its magic bytes: what real tools make, and everything else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import require_tool, run
from vhdkit.formats.filesystems import FileSystem, end_of, identify, shrink_hint
from vhdkit.units import GIB, KIB, MIB

MAKERS = {
    "ext2": (["mke2fs", "-q", "-F", "-t", "ext2", "-L", "A label"], 8),
    "ext3": (["mke2fs", "-q", "-F", "-t", "ext3", "-L", "A label"], 8),
    "ext4": (["mke2fs", "-q", "-F", "-t", "ext4", "-L", "A label"], 8),
    "xfs": (["mkfs.xfs", "-q", "-L", "A_label"], 320),
    "vfat": (["mkfs.fat", "-n", "A LABEL"], 8),
    "ntfs": (["mkntfs", "-Q", "-F", "-L", "A label"], 8),
}


def identified(raw: bytes) -> FileSystem | None:
    """The bytes, examined as a short disk."""
    return identify(lambda offset, size: raw[offset : offset + size])


def end(raw: bytes, kind: str) -> int | None:
    """Where a file system at the start of a short disk ends."""
    return end_of(lambda offset, size: raw[offset : offset + size], kind)


@pytest.mark.parametrize("kind", MAKERS)
def test_file_systems_of_real_tools(kind: str, tmp_path: Path) -> None:
    """The file system of each tool is recognised, with its label."""
    (tool, *words), size = MAKERS[kind]
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(size * MIB)
    run([require_tool(tool), *words, str(image)])
    with image.open("rb") as file:
        head = file.read(2 * MIB)
    found = identified(head)
    assert end(head, kind) == size * MIB
    assert found is not None and found.kind == kind and not found.needs_recovery
    assert found.label.upper().replace("_", " ") == "A LABEL"


def test_labels_of_fat(tmp_path: Path) -> None:
    """The kinds of FAT keep the label at different places; the placeholder for no label counts as none."""
    image = tmp_path / "image"
    for words, label in ((["-n", "BIG"], "BIG"), ([], "")):
        with image.open("wb") as file:
            file.truncate(64 * MIB)
        run([require_tool("mkfs.fat"), "-F", "32", *words, str(image)])
        assert identified(image.read_bytes()[:MIB]) == FileSystem("vfat", label)


@pytest.mark.parametrize(
    ("place", "mark", "kind"),
    [
        (0, b"LUKS\xba\xbe", "luks"), (3, b"-FVE-FS-", "bitlocker"), (512, b"LABELONE", "lvm"),
        (4086, b"SWAPSPACE2", "swap"), (64 * KIB + 64, b"_BHRfS_M", "btrfs"), (32 * KIB + 1, b"CD001", "iso9660"),
        (3, b"EXFAT   ", "exfat"), (0, b"hsqs", "squashfs"), (1536, b"LABELONE", "lvm"),
        (4086, b"S1SUSPEND\0", "swap"), (64 * KIB - 10, b"SWAPSPACE2", "swap"), (1024, b"\x10\x20\xf5\xf2", "f2fs"),
        (4096, b"\xfc\x4e\x2b\xa9\1\0\0\0", "md"), (64 * KIB + 52, b"ReIsEr2Fs", "reiserfs"),
    ],
)  # fmt: skip
def test_magic_bytes(place: int, mark: bytes, kind: str) -> None:
    """Formats without a small tool are recognised by their magic bytes."""
    raw = bytearray(128 * KIB)
    raw[place : place + len(mark)] = mark
    found = identified(bytes(raw))
    assert found is not None and found.kind == kind


def little(value: int, size: int) -> bytes:
    """A number as these formats write it."""
    return value.to_bytes(size, "little")


def raw_with(*pieces: tuple[int, bytes]) -> bytes:
    """A short disk with these bytes on it."""
    raw = bytearray(128 * KIB)
    for place, piece in pieces:
        raw[place : place + len(piece)] = piece
    return bytes(raw)


def test_ends_of_formats_without_a_small_tool(tmp_path: Path) -> None:
    """As each format's documentation says; a container that records no size may extend to the end."""
    size = 5 * GIB
    known = {
        "btrfs": raw_with((64 * KIB + 0x70, little(2 * size, 8)), (64 * KIB + 0xD1, little(size, 8))),
        "exfat": raw_with((72, little(size // 512, 8)), (108, b"\x09")),
        "iso9660": raw_with((32 * KIB + 80, little(size // 2048, 4)), (32 * KIB + 128, little(2048, 2))),
        "lvm": raw_with((1024, b"LABELONE"), (1024 + 20, little(32, 4)), (1024 + 32 + 32, little(size, 8))),
        "squashfs": raw_with((40, little(size - 100, 8))),
        "ext4": raw_with((1024 + 4, little(0x140000, 4)), (1024 + 24, little(2, 4))),
    }
    for kind, raw in known.items():
        assert end(raw, kind) == size, kind
    large = raw_with((1024 + 24, little(2, 4)), (1024 + 96, b"\x80"), (1024 + 0x150, little(1, 4)))
    assert end(large, "ext4") == 1 << 44
    for kind in ("luks", "bitlocker", "refs", "ext4", "xfs", "vfat", "ntfs", "swap", "btrfs"):
        assert end(bytes(128 * KIB), kind) is None
    assert "resize2fs" in shrink_hint("ext4") and "cannot be shrunk in place" in shrink_hint("xfs")
    image = tmp_path / "swap"
    image.write_bytes(bytes(MIB))
    for words in ([], ["-p", "65536"]):
        run([require_tool("mkswap"), *words, str(image)])
        assert end(image.read_bytes(), "swap") == MIB


def test_a_journal_to_replay_is_reported() -> None:
    """The superblock of an ext4 that was not unmounted says so."""
    raw = bytearray(4 * KIB)
    raw[1024 + 56 : 1024 + 58] = b"\x53\xef"
    raw[1024 + 96] = 0x40 | 0x4
    assert identified(bytes(raw)) == FileSystem("ext4", "", True)


@pytest.mark.parametrize("size", [0, 1, 511, 1025, 5000])
def test_short_and_empty_disks(size: int) -> None:
    """Nothing is recognised on an empty disk, however short it is."""
    assert identified(bytes(size)) is None


@given(st.binary(max_size=8 * KIB))
def test_arbitrary_bytes_give_an_answer(raw: bytes) -> None:
    """INV-BOUNDED: whatever a guest wrote, the answer is a kind or None, and the label is short."""
    found = identified(raw)
    assert found is None or len(found.label) <= 256
    for kind in (*MAKERS, "btrfs", "exfat", "swap", "lvm", "iso9660", "squashfs", "nothing"):
        ends = end(raw, kind)
        assert ends is None or ends > 0
