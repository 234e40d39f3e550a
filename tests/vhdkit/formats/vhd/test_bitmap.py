# SPDX-License-Identifier: Apache-2.0
"""Sector bitmaps compared with a list of booleans."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.vhd_builder import KIB, MIB
from vhdkit.formats.vhd import bitmap


def _bits(raw: bytes | bytearray) -> list[bool]:
    return [bool(byte & 0x80 >> bit) for byte in raw for bit in range(8)]


@pytest.mark.parametrize(
    ("block_size", "stored"),
    [(512 * KIB, 512), (MIB, 512), (2 * MIB, 512), (4 * MIB, 1024), (8 * MIB, 2048), (256 * MIB, 65536)],
)
def test_quirk_bitmap_is_rounded_up_to_a_sector(block_size: int, stored: int) -> None:
    """Quirk: a 512 KiB block uses 128 bytes of bitmap and stores 512."""
    assert bitmap.bitmap_size(block_size) == stored
    assert len(bitmap.full(block_size)) == stored


def test_quirk_most_significant_bit_comes_first() -> None:
    """Quirk: bit 7 of byte 0 is sector 0 (VHDX has it the other way round)."""
    assert bitmap.owned(b"\x80\x01", 16).tolist() == [True] + [False] * 14 + [True]
    raw = bytearray(2)
    assert bitmap.set_run(raw, 0, 1) and raw == b"\x80\x00"
    assert bitmap.set_run(raw, 15, 1) and raw == b"\x80\x01"


def test_partial_bytes_of_a_windows_child() -> None:
    """The bytes 02 01 ff cb a8, found in a child that Windows wrote, as sectors."""
    owned = bitmap.owned(bytes.fromhex("0201ffcba8"), 40)
    assert np.flatnonzero(owned).tolist() == [6, 15, *range(16, 24), 24, 25, 28, 30, 31, 32, 34, 36]


@given(st.binary(min_size=1, max_size=64), st.data())
def test_owned_agrees_with_the_bits(raw: bytes, data: st.DataObject) -> None:
    """For any bytes and any count, sector n is bit n."""
    count = data.draw(st.integers(min_value=0, max_value=len(raw) * 8))
    assert bitmap.owned(raw, count).tolist() == _bits(raw)[:count]


@given(st.binary(min_size=1, max_size=64), st.data())
def test_set_run_sets_just_the_run(raw: bytes, data: st.DataObject) -> None:
    """A run is set and nothing else changes; the result says whether a bit of it was clear."""
    first = data.draw(st.integers(min_value=0, max_value=len(raw) * 8 - 1))
    count = data.draw(st.integers(min_value=1, max_value=len(raw) * 8 - first))
    before, changed = _bits(raw), bytearray(raw)
    grew = bitmap.set_run(changed, first, count)
    after = _bits(changed)
    assert after == before[:first] + [True] * count + before[first + count :]
    assert grew == (False in before[first : first + count])


@pytest.mark.parametrize("holes", ["ff00ff", "feffff", "ffff7f", "ff7fff"])
def test_a_clear_bit_anywhere_in_the_run_is_noticed(holes: str) -> None:
    """A clear bit in its first byte, its last, or between them means that ownership grew."""
    raw = bytearray.fromhex(holes)
    assert bitmap.set_run(raw, 0, 24) and raw == b"\xff\xff\xff"
    assert not bitmap.set_run(raw, 0, 24)


@given(st.binary(min_size=1, max_size=64), st.booleans(), st.integers(min_value=1, max_value=64))
def test_is_full_looks_at_the_blocks_sectors_only(raw: bytes, whole: bool, count: int) -> None:
    """Full means every sector of the block; padding bits behind are ignored."""
    count = min(count, len(raw))
    raw = b"\xff" * count + raw if whole else raw
    assert bitmap.is_full(raw, count * 8) == all(_bits(raw)[: count * 8])
