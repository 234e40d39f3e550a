# SPDX-License-Identifier: Apache-2.0
"""Cylinders, heads and sectors as Windows, QEMU and XenServer wrote them, and for which creators CHS is the size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.vhd_builder import FIXED, GIB, MIB, TIB, Vhd
from vhdkit.formats.vhd import geometry
from vhdkit.formats.vhd.layout import Footer, parse_footer


def _naive(sectors: int) -> tuple[int, int, int]:
    """The specification's "CHS Calculation", transcribed from its C code."""
    total = min(sectors, 65535 * 16 * 255)
    if total >= 65535 * 16 * 63:
        per_track, heads = 255, 16
        cylinder_heads = total // per_track
    else:
        per_track = 17
        cylinder_heads = total // per_track
        heads = (cylinder_heads + 1023) // 1024
        if heads < 4:
            heads = 4
        if cylinder_heads >= heads * 1024 or heads > 16:
            per_track, heads = 31, 16
            cylinder_heads = total // per_track
        if cylinder_heads >= heads * 1024:
            per_track, heads = 63, 16
            cylinder_heads = total // per_track
    return cylinder_heads // heads, heads, per_track


@pytest.mark.parametrize(
    ("size_bytes", "chs"),
    [
        (4 * MIB, (120, 4, 17)),  # Windows 10: samples dfvfs/fat-differential.vhd
        (512 * MIB, (1040, 16, 63)),  # Windows 10: samples node-vhd/dynamic.vhd
        (64 * MIB, (963, 8, 17)),  # vhd-util: samples peer-vhdutil/base.vhd
        (96 * MIB, (963, 12, 17)),  # vhd-util: samples peer-vhdutil/resized.vhd
        (8 * MIB, (240, 4, 17)),  # vhd-util: samples peer-vhdutil/fixed.vhd
        (4212736, (121, 4, 17)),  # QEMU 5.3: samples dfvfs/ext2.vhd
        (127 * GIB, (65278, 16, 255)),  # Hyper-V's default size, just below what CHS can say
        (2040 * GIB, (65535, 16, 255)),
        (512, (0, 4, 17)),
    ],
)
def test_geometry_is_what_others_write(size_bytes: int, chs: tuple[int, int, int]) -> None:
    """The same size gives the same geometry as in files of Windows, XenServer and QEMU."""
    assert geometry.geometry_for(size_bytes) == chs


@given(st.integers(min_value=1, max_value=4 * TIB // 512))
def test_geometry_follows_the_specification(sectors: int) -> None:
    """For any size, the specification's algorithm; never more than the size."""
    shape = geometry.geometry_for(sectors * 512)
    assert shape == _naive(sectors)
    assert shape.size_bytes <= sectors * 512


@pytest.mark.parametrize("edge", [17 * 1024 * 4, 17 * 1024 * 16, 31 * 1024 * 16, 65535 * 16 * 63, 65535 * 16 * 255])
def test_geometry_at_the_edges_of_its_cases(edge: int) -> None:
    """One sector below, at, and one above each place where the algorithm changes."""
    for sectors in (edge - 1, edge, edge + 1):
        assert geometry.geometry_for(sectors * 512) == _naive(sectors)


def _footer(creator: bytes, chs: tuple[int, int, int], size: int, disk_type: int = 3) -> Footer:
    return parse_footer(Vhd(creator=creator, chs=chs, size=size, disk_type=disk_type).footer())


@pytest.mark.parametrize(
    ("creator", "means_chs"),
    [(b"vpc ", True), (b"qemu", True)]
    + [(one, False) for one in (b"qem2", b"win ", b"vs  ", b"d2v\0", b"d2v ", b"tap\0", b"CTXS", b"wa\0\0")]
    + [(one, False) for one in (b"xo  ", b"dutl", b"vbox", b"imgo", b"\0\0\0\0")],
)
def test_quirk_current_size_or_chs_by_creator(creator: bytes, means_chs: bool) -> None:
    """Quirk: for `vpc ` and `qemu` the CHS product is the virtual size; for all other creators the current size."""
    footer = _footer(creator, (120, 4, 17), 4 * MIB)
    assert geometry.size_is_chs(footer) is means_chs
    assert geometry.virtual_size(footer, 0) == (120 * 4 * 17 * 512 if means_chs else 4 * MIB)


@pytest.mark.parametrize(("chs"), [(65535, 16, 255), (0, 4, 17), (0, 0, 0)])
def test_quirk_largest_or_empty_chs_means_current_size(chs: tuple[int, int, int]) -> None:
    """Quirk: the maximum geometry means "larger than CHS can express", an empty one is unset."""
    assert geometry.virtual_size(_footer(b"qemu", chs, 8 * MIB), 0) == 8 * MIB


def test_chs_beyond_a_fixed_file_is_ignored() -> None:
    """A fixed image whose file holds less than the CHS product has its current size."""
    footer = _footer(b"vpc ", (121, 4, 17), 4 * MIB, FIXED)
    product = 121 * 4 * 17 * 512
    assert geometry.virtual_size(footer, product) == product
    assert geometry.virtual_size(footer, product - 512) == 4 * MIB


def test_original_size_is_not_the_size() -> None:
    """Quirk: after a resize the field at 40 is the old size; the one at 48 counts."""
    footer = parse_footer(Vhd(size=8 * MIB, original_size=4 * MIB).footer())
    assert geometry.virtual_size(footer, 0) == 8 * MIB


def test_current_size_is_cut_to_whole_sectors() -> None:
    """Half a sector at the end cannot be addressed."""
    assert geometry.virtual_size(_footer(b"win ", (0, 0, 0), 4 * MIB + 511), 0) == 4 * MIB
