# SPDX-License-Identifier: Apache-2.0
"""A fixed VHD that was extended as if it were raw still has its footer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import vhdkit
from tests.harness.stores import MemStore
from tests.harness.vhd_builder import DYNAMIC, FIXED, Vhd, pattern, put
from vhdkit import DiskFormat, errors
from vhdkit.chain.verbs.describe import describe_image
from vhdkit.formats.probe import FormatName, identify
from vhdkit.formats.vhd.padding import MAX_PADDING_BYTES
from vhdkit.units import MIB

FOOTER = Vhd(disk_type=FIXED, size=MIB, chs=(30, 4, 17)).footer()


def padded(tail: bytes, name: str = "disk.vhd") -> MemStore:
    """A fixed disk of 1 MiB that ends in `tail` instead of its footer."""
    store = MemStore(name)
    store.pwrite(0, pattern(MIB) + tail)
    return store


@pytest.mark.parametrize("size", [1, 511, 512, 4096, 1000_001, MAX_PADDING_BYTES])
@pytest.mark.parametrize("name", ["disk.vhd", "disk.img"])
def test_the_footer_is_found_before_zeros(size: int, name: str) -> None:
    """Up to 2 MiB before the end of the file and under any name it is used as the footer of a fixed VHD."""
    assert identify(padded(FOOTER + bytes(size), name)).name == FormatName.VHD


@pytest.mark.parametrize(
    "tail",
    [
        FOOTER + bytes(MAX_PADDING_BYTES + 1),
        FOOTER + bytes(512) + b"x" + bytes(511),
        put(FOOTER, 64, b"\0\0\0\0") + bytes(512),
        Vhd(disk_type=FIXED, size=MIB // 2, chs=(15, 4, 17)).footer() + bytes(512),
        Vhd(disk_type=DYNAMIC, size=MIB, chs=(30, 4, 17)).footer() + bytes(512),
        bytes(MAX_PADDING_BYTES + MIB),
    ],
    ids=["too far", "data behind it", "bad checksum", "of another size", "dynamic", "nothing"],
)
def test_other_bytes_are_not_a_footer(tail: bytes) -> None:
    """A footer further away, before data, or unfit for its place belongs to the disk."""
    assert identify(padded(tail, "disk.img")).name == FormatName.RAW
    with pytest.raises(errors.CorruptImage):
        identify(padded(tail))


def test_check_and_repair_of_a_disk_that_was_grown_as_raw(tmp_path: Path) -> None:
    """It opens with its own size and can be read and written; check warns, and repair cuts the zeros off."""
    path = tmp_path / "disk.vhd"
    vhdkit.create_image(path, 3 * MIB, disk_format=DiskFormat.FIXED)
    sound = path.stat().st_size
    os.truncate(path, 4 * MIB)
    assert describe_image(path).virtual_size_bytes == 3 * MIB
    with vhdkit.open_disk(path, writable=True) as disk:
        disk.write(3 * MIB - 9, b"the end!!")
    found = [one for one in vhdkit.check(path) if one.severity > vhdkit.Severity.NOTE]
    assert [(one.code, one.offset_bytes) for one in found] == [("padding", 3 * MIB)]
    vhdkit.repair(path)
    assert path.stat().st_size == sound
    assert not [one for one in vhdkit.check(path) if one.severity > vhdkit.Severity.NOTE]
    with vhdkit.open_disk(path) as disk:
        assert disk.size_bytes == 3 * MIB and disk.read(3 * MIB - 9, 9) == b"the end!!"


@pytest.mark.parametrize("size", [2 * MIB, 3 * MIB + 512, 6 * MIB])
def test_a_padded_disk_is_resized(tmp_path: Path, size: int) -> None:
    """INV-RESIZE-WHOLE: whether it ends before, inside or behind the zeros, the disk ends in them, with one footer."""
    path = tmp_path / "disk.vhd"
    vhdkit.create_image(path, 3 * MIB, disk_format=DiskFormat.FIXED)
    with vhdkit.open_disk(path, writable=True) as disk:
        disk.write(MIB, b"data")
    os.truncate(path, 4 * MIB)
    vhdkit.resize(path, size, shrink=True)
    assert path.stat().st_size == size + 512
    assert not [one for one in vhdkit.check(path) if one.severity > vhdkit.Severity.NOTE]
    with vhdkit.open_disk(path) as disk:
        expected = put(bytes(size), MIB, b"data")
        assert disk.read(0, size) == expected
