# SPDX-License-Identifier: Apache-2.0
"""Fixed images: data, then one footer of 512 or 511 bytes, which writes never touch."""

from __future__ import annotations

import pytest

from tests.harness.vhd_builder import FIXED, MIB, Vhd, pattern
from vhdkit.errors import CorruptImage, CorruptReason
from vhdkit.formats.vhd.fixed import FixedImage, open_fixed
from vhdkit.image import Extent, ExtentKind, read_extents


def _read(layer: FixedImage, sector: int, count: int) -> bytes:
    buffer = bytearray(count * 512)
    read_extents(layer.store, layer.extents(sector, count), memoryview(buffer))
    return bytes(buffer)


@pytest.mark.parametrize("footer_size", [512, 511], ids=["footer-512", "quirk-footer-511"])
def test_a_fixed_image_is_its_data(footer_size: int) -> None:
    """Quirk: with a footer of 512 or of 511 bytes, the disk is what precedes it."""
    image = Vhd(size=MIB, disk_type=FIXED, data=pattern(MIB), footer_size=footer_size)
    layer = open_fixed(image.build().store(frozen=True))
    assert (layer.size_bytes, layer.block_size_bytes, layer.writable) == (MIB, 0, False)
    assert _read(layer, 0, 2048) == pattern(MIB)
    assert len(layer.allocated_blocks()) == 0 and layer.block_offset(0) == 0 and layer.owned_sectors(0) is None


def test_holes_are_zeros_and_every_sector_is_owned() -> None:
    """Holes of the file are ZERO, never ABSENT: a fixed disk has no parent."""
    image = Vhd(size=MIB, disk_type=FIXED, data=pattern(512))
    extents = list(open_fixed(image.build().store()).extents(0, 2048))
    assert extents == [Extent(0, 1, ExtentKind.DATA, 0, 0), Extent(1, 2047, ExtentKind.ZERO)]


@pytest.mark.parametrize("footer_size", [512, 511])
def test_writing_leaves_the_footer_alone(footer_size: int) -> None:
    """The last sector can be written and zeroed; the footer behind it does not change."""
    image = Vhd(size=MIB, disk_type=FIXED, footer_size=footer_size)
    store = image.build().store()
    layer = open_fixed(store, writable=True)
    assert layer.write(2047, memoryview(pattern(512))) is False
    assert _read(layer, 2047, 1) == pattern(512)
    assert layer.write_zeroes(0, 2048) is False
    layer.trim(2047, 1)
    layer.flush()
    assert store.pread(MIB, 600) == image.footer()[:footer_size]
    assert _read(layer, 0, 2048) == bytes(MIB)


def test_part_of_the_file_behind_the_disk_is_not_the_disk() -> None:
    """A smaller current size leaves space before the footer that reads never reach."""
    image = Vhd(size=MIB, disk_type=FIXED, data=pattern(2 * MIB), data_size=2 * MIB)
    layer = open_fixed(image.build().store(frozen=True))
    assert layer.size_bytes == MIB
    with pytest.raises(AssertionError):
        open_fixed(image.build().store(), writable=True).write(2048, memoryview(bytes(512)))


@pytest.mark.parametrize("creator", [b"win ", b"vpc ", b"wa\0\0"])
def test_a_file_too_short_for_its_size_is_refused(creator: bytes) -> None:
    """If the footer claims more than precedes it, the file is refused, never padded with zeros."""
    image = Vhd(size=MIB + 512, disk_type=FIXED, data_size=MIB, creator=creator, chs=(30, 4, 17))
    if creator == b"vpc ":
        image.chs = (31, 4, 17)
    with pytest.raises(CorruptImage) as caught:
        open_fixed(image.build().store(frozen=True))
    assert caught.value.reason is CorruptReason.DATA_OUTSIDE_FILE


def test_quirk_fixed_size_is_chs_for_vpc() -> None:
    """Quirk: Virtual PC's fixed disks are as long as their geometry says."""
    image = Vhd(size=4 * MIB, disk_type=FIXED, creator=b"vpc ", chs=(120, 4, 17))
    assert open_fixed(image.build().store()).size_bytes == 8160 * 512
