# SPDX-License-Identifier: Apache-2.0
"""What is recognised by its marks: what real tools make, and anything else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import require_tool, run
from vhdkit.formats.filesystems import FileSystem, identify
from vhdkit.units import KIB, MIB

MAKERS = {
    "ext2": (["mke2fs", "-q", "-F", "-t", "ext2", "-L", "A label"], 8),
    "ext3": (["mke2fs", "-q", "-F", "-t", "ext3", "-L", "A label"], 8),
    "ext4": (["mke2fs", "-q", "-F", "-t", "ext4", "-L", "A label"], 8),
    "xfs": (["mkfs.xfs", "-q", "-L", "A_label"], 320),
    "vfat": (["mkfs.fat", "-n", "A LABEL"], 8),
    "ntfs": (["mkntfs", "-Q", "-F", "-L", "A label"], 8),
}


def identified(raw: bytes) -> FileSystem | None:
    """As a short disk."""
    return identify(lambda offset, size: raw[offset : offset + size])


@pytest.mark.parametrize("kind", MAKERS)
def test_what_real_tools_make(kind: str, tmp_path: Path) -> None:
    """Each maker's file system is known, with its label where its place is a fixed one."""
    (tool, *words), size = MAKERS[kind]
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(size * MIB)
    run([require_tool(tool), *words, str(image)])
    with image.open("rb") as file:
        found = identified(file.read(2 * MIB))
    assert found is not None and found.kind == kind and not found.needs_recovery
    assert found.label.upper().replace("_", " ") == ("" if kind == "ntfs" else "A LABEL")


def test_fat32_has_its_label_elsewhere(tmp_path: Path) -> None:
    """The two kinds of FAT keep it at different places, and the word for none is none."""
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
        (3, b"EXFAT   ", "exfat"), (0, b"hsqs", "squashfs"),
    ],
)  # fmt: skip
def test_marks(place: int, mark: bytes, kind: str) -> None:
    """What has no small maker is known by its mark."""
    raw = bytearray(128 * KIB)
    raw[place : place + len(mark)] = mark
    found = identified(bytes(raw))
    assert found is not None and found.kind == kind


def test_a_journal_to_replay_is_told() -> None:
    """An ext4 that was not unmounted says so in its superblock."""
    raw = bytearray(4 * KIB)
    raw[1024 + 56 : 1024 + 58] = b"\x53\xef"
    raw[1024 + 96] = 0x40 | 0x4
    assert identified(bytes(raw)) == FileSystem("ext4", "", True)


@pytest.mark.parametrize("size", [0, 1, 511, 1025, 5000])
def test_short_and_empty_disks(size: int) -> None:
    """Nothing is found on nothing, however short it is."""
    assert identified(bytes(size)) is None


@given(st.binary(max_size=8 * KIB))
def test_any_bytes_are_an_answer(raw: bytes) -> None:
    """INV-BOUNDED: whatever a guest wrote, the answer is a kind or None, the label short."""
    found = identified(raw)
    assert found is None or len(found.label) <= 256
