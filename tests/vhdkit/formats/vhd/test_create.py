# SPDX-License-Identifier: Apache-2.0
"""New images, parsed independently: footers, headers, tables and locators as other programs expect them."""

from __future__ import annotations

import struct
import time

import pytest

from tests.harness.stores import MemStore
from tests.harness.vhd_builder import GIB, KIB, MIB, PARENT_ID, checksum
from vhdkit.errors import InvalidArgument
from vhdkit.formats.vhd import create
from vhdkit.formats.vhd.create import ParentLink
from vhdkit.formats.vhd.fixed import open_fixed
from vhdkit.formats.vhd.opening import open_dynamic
from vhdkit.units import SECTOR_SIZE

LINK = ParentLink(PARENT_ID, 0x12345678, "päre nt.vhd", ".\\päre nt.vhd", "\\srv\\päre nt.vhd")


def _check_footer(raw: bytes, disk_type: int, size: int, data_offset: int) -> None:
    assert len(raw) == 512 and raw[:8] == b"conectix"
    assert struct.unpack_from(">IIQ", raw, 8) == (2, 0x00010000, data_offset)
    stamp = struct.unpack_from(">I", raw, 24)[0]
    assert abs(stamp + 946684800 - time.time()) < 60
    assert struct.unpack_from(">QQ", raw, 40) == (size, size)
    assert struct.unpack_from(">I", raw, 60)[0] == disk_type
    assert struct.unpack_from(">I", raw, 64)[0] == checksum(raw, 64)
    assert any(raw[68:84]) and raw[84:] == bytes(428)


@pytest.mark.parametrize("preallocate", [False, True])
def test_a_fixed_image_is_zeros_and_a_footer(preallocate: bool) -> None:
    """The file is the disk and 512 bytes more, sparse unless its space is reserved."""
    store = MemStore()
    create.create_fixed(store, 5 * MIB, preallocate=preallocate)
    assert store.size() == 5 * MIB + 512
    _check_footer(store.pread(5 * MIB, 512), 2, 5 * MIB, 2**64 - 1)
    layer = open_fixed(store)
    assert layer.size_bytes == 5 * MIB and layer.metadata.findings == ()


@pytest.mark.parametrize("block_size", [512 * KIB << shift for shift in range(10)])
def test_a_dynamic_image_has_two_footers_and_an_empty_table(block_size: int) -> None:
    """Copy and header in the first page, a table of ones on its own pages, the footer behind."""
    size = 3 * block_size + 512
    store = MemStore()
    create.create_dynamic(store, size, block_size_bytes=block_size)
    assert store.size() == 8192 + 512
    raw = store.pread(0, 512)
    _check_footer(raw, 3, size, 512)
    assert store.pread(8192, 512) == raw
    header = store.pread(512, 1024)
    assert struct.unpack_from(">8sQQIII", header) == (b"cxsparse", 2**64 - 1, 4096, 0x00010000, 4, block_size)
    assert struct.unpack_from(">I", header, 36)[0] == checksum(header, 36)
    assert header[40:] == bytes(1024 - 40)
    assert store.pread(4096, 4096) == b"\xff" * 4096
    assert open_dynamic(store).metadata.findings == ()


@pytest.mark.parametrize("block_size", [512 * KIB, 2 * MIB, 256 * MIB])
def test_new_blocks_have_their_data_on_4_kib(block_size: int) -> None:
    """Data starts on a page, the bitmap just before it, whatever the block size."""
    store = MemStore()
    create.create_dynamic(store, 3 * block_size, block_size_bytes=block_size)
    layer = open_dynamic(store, writable=True)
    for block in (2, 0, 1):
        layer.write(block * block_size // SECTOR_SIZE + 5, memoryview(b"x" * 512))
    layer.close()
    again = open_dynamic(store)
    offsets = [again.block_offset(block) for block in (2, 0, 1)]
    assert all(offset % 4096 == 0 for offset in offsets) and offsets == sorted(offsets)
    for block in range(3):
        assert again.bat.block_start(block) + max(block_size // 4096, 512) == again.block_offset(block)


def test_a_differencing_image_names_its_parent_three_times() -> None:
    """W2ru and W2ku in UTF-16 little-endian, the header's name in big-endian, id and timestamp beside them."""
    store = MemStore()
    create.create_differencing(store, 4 * MIB, LINK)
    _check_footer(store.pread(0, 512), 4, 4 * MIB, 512)
    header = store.pread(512, 1024)
    assert header[40:56] == PARENT_ID
    assert struct.unpack_from(">I", header, 56)[0] == 0x12345678
    assert header[64:576] == "päre nt.vhd".encode("utf-16-be").ljust(512, b"\0")
    for slot, code, text in ((0, b"W2ru", LINK.relative), (1, b"W2ku", LINK.absolute)):
        entry = struct.unpack_from(">4sIIIQ", header, 576 + 24 * slot)
        raw = text.encode("utf-16-le")
        assert entry[:4] == (code, 512, len(raw), 0)
        assert store.pread(entry[4], 512) == raw.ljust(512, b"\0")
    assert header[576 + 48 : 768] == bytes(144)
    layer = open_dynamic(store)
    assert layer.metadata.parent_name == "päre nt.vhd" and not layer.allocated_blocks().any()


@pytest.mark.parametrize(
    ("size", "fixed", "good"),
    [
        (512, False, True),
        (512, True, True),
        (0, False, False),
        (-512, True, False),
        (513, False, False),
        (2040 * GIB, False, True),
        (2040 * GIB + 512, False, False),
        (2040 * GIB, True, True),
        (2040 * GIB + 512, True, False),
    ],
)
def test_sizes_at_their_limits(size: int, fixed: bool, good: bool) -> None:
    """From one sector to 2040 GiB; one sector more or half a sector less is refused before a byte is written."""
    store = MemStore()
    make = create.create_fixed if fixed else create.create_dynamic
    if good:
        make(store, size)
        assert (open_fixed(store) if fixed else open_dynamic(store)).size_bytes == size
        return
    store.frozen = True
    with pytest.raises(InvalidArgument):
        make(store, size)


@pytest.mark.parametrize("block_size", [256 * KIB, 512 * MIB, 0, 2 * MIB + 512, -(2 * MIB), 3 * MIB])
def test_block_sizes_outside_the_limits_are_refused(block_size: int) -> None:
    """The next powers of two outside 512 KiB to 256 MiB, and numbers that are not powers of two."""
    store = MemStore(frozen=True)
    with pytest.raises(InvalidArgument, match="power of two"):
        create.create_dynamic(store, 4 * MIB, block_size_bytes=block_size)


@pytest.mark.parametrize(
    ("relative", "good"), [("x" * (32 * KIB), True), ("x" * (32 * KIB + 1), False), ("a\udcff.vhd", False)]
)
def test_a_parents_path_must_fit_and_be_text(relative: str, good: bool) -> None:
    """64 KiB of UTF-16 are written; one more character is refused, and so is a name that is not valid text."""
    store = MemStore()
    link = ParentLink(PARENT_ID, 0, "p.vhd", relative, "\\p.vhd")
    if good:
        create.create_differencing(store, MIB, link)
        assert open_dynamic(store).metadata.locators[0].text == relative
        return
    with pytest.raises(InvalidArgument):
        create.create_differencing(store, MIB, link)


def test_every_image_has_its_own_id() -> None:
    """Two new images have different ids."""
    stores = [MemStore(), MemStore()]
    for store in stores:
        create.create_dynamic(store, MIB)
    assert open_dynamic(stores[0]).metadata.footer.unique_id != open_dynamic(stores[1]).metadata.footer.unique_id


def test_the_largest_table_is_written_completely() -> None:
    """A disk of 2040 GiB in the smallest blocks has a table of 16 MiB, all of it ones."""
    store = MemStore()
    create.create_dynamic(store, 2040 * GIB, block_size_bytes=512 * KIB)
    layer = open_dynamic(store)
    assert len(layer.bat) == 2040 * 2048 and not layer.allocated_blocks().any()
