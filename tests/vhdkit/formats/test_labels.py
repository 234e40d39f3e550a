# SPDX-License-Identifier: Apache-2.0
"""Labels that are stored deeper in the disk, and what a guest may write in their place."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import require_tool, run
from vhdkit.formats.filesystems import FileSystem, identify
from vhdkit.formats.labels import exfat_label, ntfs_label
from vhdkit.units import KIB, MIB


def identified(raw: bytes) -> FileSystem | None:
    """The bytes, examined as a short disk."""
    return identify(lambda offset, size: raw[offset : offset + size])


@pytest.mark.parametrize("words", [[], ["-c", "512"], ["-c", "65536"]], ids=["usual", "small clusters", "large ones"])
@pytest.mark.parametrize("label", ["", "Daten & Fotos", "Größe 日本"])
def test_labels_of_ntfs(words: list[str], label: str, tmp_path: Path) -> None:
    """The label as the owner wrote it, whatever the cluster size; none if there is none."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(8 * MIB)
    run([require_tool("mkntfs"), "-Q", "-F", *words, *(["-L", label] if label else []), str(image)])
    assert identified(image.read_bytes()) == FileSystem("ntfs", label)


def exfat(*entries: bytes) -> bytes:
    """A short exFAT with these entries in its root folder, which is the third cluster of 4 KiB."""
    raw = bytearray(128 * KIB)
    raw[3:11] = b"EXFAT   "
    raw[88:92] = (64).to_bytes(4, "little")  # the clusters begin at sector 64
    raw[96:100] = (4).to_bytes(4, "little")  # and are numbered from 2
    raw[108:110] = bytes([9, 3])
    folder = b"".join(entry.ljust(32, b"\0") for entry in entries)
    place = 64 * 512 + 2 * 4096
    raw[place : place + len(folder)] = folder
    return bytes(raw)


@pytest.mark.parametrize(
    ("entries", "label"),
    [
        ((bytes([0x83, 6]) + "Karten".encode("utf-16-le"),), "Karten"),
        ((b"\x81\0", b"\x82\0", bytes([0x83, 4]) + "ÄÖ日本".encode("utf-16-le")), "ÄÖ日本"),
        ((bytes([0x83, 200]) + "elevencharsX".encode("utf-16-le"),), "elevenchars"),
        ((b"\x03\6" + "Karten".encode("utf-16-le"), b"\x81\0"), ""),
        ((b"", bytes([0x83, 6]) + "Karten".encode("utf-16-le")), ""),
    ],
    ids=["first", "behind others", "too long", "no longer in use", "behind the end"],
)
def test_labels_of_exfat(entries: tuple[bytes, ...], label: str) -> None:
    """The label entry of the root folder, of at most eleven characters."""
    assert identified(exfat(*entries)) == FileSystem("exfat", label)


@given(raw=st.binary(max_size=2 * KIB), seed=st.binary(min_size=16, max_size=96), place=st.integers(0, 511))
def test_arbitrary_bytes_of_a_guest(raw: bytes, seed: bytes, place: int) -> None:
    """INV-BOUNDED: any bytes give a short label or none, from small reads."""
    boot = bytearray(raw.ljust(512, b"\0"))[:512]
    boot[place : place + len(seed)] = seed

    def read(offset: int, size: int) -> bytes:
        assert offset >= 0 and 0 <= size <= 64 * KIB
        return (b"FILE" + raw).ljust(size, b"\x60")[:size]

    for label in (ntfs_label(read, bytes(boot)), exfat_label(read, bytes(boot))):
        assert len(label) <= 256


def test_a_torn_record_has_no_label(tmp_path: Path) -> None:
    """A file record that was being written, or that is something else, is not used."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(8 * MIB)
    run([require_tool("mkntfs"), "-Q", "-F", "-L", "whole", str(image)])
    raw = bytearray(image.read_bytes())
    record = raw.index("whole".encode("utf-16-le")) // KIB * KIB
    assert raw[record : record + 4] == b"FILE"
    raw[record + 510] ^= 1
    assert identified(bytes(raw)) == FileSystem("ntfs", "")
