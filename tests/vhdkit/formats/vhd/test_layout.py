# SPDX-License-Identifier: Apache-2.0
"""Field offsets compared with structures packed independently, checksums, and parsing and building as inverses."""

from __future__ import annotations

import dataclasses
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.vhd_builder import Vhd, checksum, child
from vhdkit.formats.vhd import layout


def test_footer_fields_are_where_the_specification_says() -> None:
    """A footer packed from the specification is parsed into the values it was made of."""
    image = Vhd(
        size=0x1122334455667788 & ~511,
        original_size=0x0102030405060708,
        chs=(0x1234, 0x56, 0x78),
        disk_type=4,
        creator=b"abcd",
        creator_version=0x00090008,
        host_os=b"Mac ",
        features=0x11,
        footer_version=0x00010002,
        timestamp=0xDEADBEEF,
        saved_state=1,
        hidden=0x42,
        header_offset=0x600,
    )
    footer = layout.parse_footer(image.footer())
    assert (footer.cookie, footer.features, footer.file_format_version) == (b"conectix", 0x11, 0x00010002)
    assert (footer.data_offset, footer.timestamp) == (0x600, 0xDEADBEEF)
    assert (footer.creator_application, footer.creator_version) == (b"abcd", 0x00090008)
    assert footer.creator_host_os == b"Mac "
    assert (footer.original_size, footer.current_size) == (0x0102030405060708, image.size)
    assert (footer.cylinders, footer.heads, footer.sectors_per_track) == (0x1234, 0x56, 0x78)
    assert (footer.disk_type, footer.unique_id) == (4, image.unique_id)
    assert (footer.saved_state, footer.hidden) == (1, 0x42)
    assert layout.build_footer(footer) == image.footer()


def test_header_fields_are_where_the_specification_says() -> None:
    """A dynamic header packed from the specification is parsed into its values, with its eight locator entries."""
    image = child(
        table_offset=0x2000,
        header_version=0x00010003,
        entry_count=0x12345678,
        block_size=0x80000,
        parent_timestamp=0xCAFE,
    )
    entries = [struct.pack(">4sIIIQ", b"W2ru", slot + 1, slot + 2, 0, slot << 33) for slot in range(8)]
    raw = image.header(entries)
    header = layout.parse_header(raw)
    assert (header.cookie, header.data_offset, header.table_offset) == (b"cxsparse", 2**64 - 1, 0x2000)
    assert (header.header_version, header.max_table_entries) == (0x00010003, 0x12345678)
    assert (header.block_size, header.parent_unique_id) == (0x80000, image.parent_id)
    assert header.parent_timestamp == 0xCAFE
    assert header.parent_unicode_name.startswith("parent.vhd".encode("utf-16-be"))
    assert [one.data_offset for one in header.parent_locators] == [slot << 33 for slot in range(8)]
    assert [(one.data_space, one.data_length) for one in header.parent_locators] == [
        (slot + 1, slot + 2) for slot in range(8)
    ]
    assert layout.build_header(header) == raw


def test_batmap_header_fields() -> None:
    """XenServer's batmap header: cookie, offset, size in sectors, version, checksum, marker."""
    raw = struct.pack(">8sQIIIB", b"tdbatmap", 0x2200, 1, 0x00010002, 0xFFFFFF00, 7).ljust(512, b"\0")
    batmap = layout.parse_batmap_header(raw)
    assert (batmap.cookie, batmap.batmap_offset, batmap.batmap_size) == (b"tdbatmap", 0x2200, 1)
    assert (batmap.batmap_version, batmap.checksum, batmap.marker) == (0x00010002, 0xFFFFFF00, 7)


@pytest.mark.parametrize(
    ("structure", "kind", "size"),
    [
        ("footer", layout.Footer, 512),
        ("dynamic header", layout.DynamicHeader, 1024),
        ("parent locator entry", layout.LocatorEntry, 24),
        ("batmap header", layout.BatmapHeader, 512),
    ],
)
def test_the_field_table_is_gapless_and_names_the_dataclass(structure: str, kind: type, size: int) -> None:
    """`STRUCTURES` covers every byte once, in order, under the names of the dataclass."""
    fields = layout.STRUCTURES[structure]
    assert [one.name for one in fields] == [one.name for one in dataclasses.fields(kind)]
    end = 0
    for one in fields:
        assert one.offset_bytes == end
        end += one.size_bytes
    assert end == size


@given(st.binary(min_size=512, max_size=1024), st.integers(min_value=0, max_value=508))
def test_checksum_is_the_complement_of_the_sum(raw: bytes, at: int) -> None:
    """The checksum agrees with a byte-by-byte sum, whatever its own field holds."""
    assert layout.checksum(raw, at) == checksum(raw, at)
    sealed = layout.sealed(raw, at)
    assert layout.stored_checksum(sealed, at) == layout.checksum(sealed, at) == layout.checksum(raw, at)
    assert sealed[:at] == raw[:at] and sealed[at + 4 :] == raw[at + 4 :]


def test_the_checksum_wraps_at_32_bits() -> None:
    """The smallest and the largest sums stay 32-bit numbers."""
    assert layout.checksum(bytes(512), 64) == 0xFFFFFFFF
    assert layout.checksum(b"\xff" * 1024, 36) == 0xFFFFFFFF - 1020 * 255


def test_quirk_hidden_byte_counts_in_the_checksum() -> None:
    """Quirk: XenServer's `hidden` byte at 85 is part of the checksum (DiscUtils assumes zero)."""
    plain, hidden = Vhd().footer(), Vhd(hidden=1).footer()
    assert layout.checksum(plain, 64) - layout.checksum(hidden, 64) == 1
    assert layout.parse_footer(hidden).hidden == 1


def test_quirk_511_byte_footer_lacks_its_last_reserved_byte() -> None:
    """Quirk: a footer of 511 bytes has the same fields, and the same checksum, as one of 512."""
    raw = Vhd(hidden=1).footer()
    assert layout.parse_footer(raw[:511]) == layout.parse_footer(raw)
    assert layout.checksum(raw[:511], 64) == layout.checksum(raw, 64)


def test_unused_data_offset_is_64_ones() -> None:
    """Quirk: Microsoft's tools expect 64 ones where the specification's text says 32."""
    assert layout.NO_DATA_OFFSET == 2**64 - 1
