# SPDX-License-Identifier: Apache-2.0
"""The bits of sector bitmaps, against a model that handles one bit at a time."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vhdkit.formats.vhdx.bitmap import bytes_per_block, owned, set_run
from vhdkit.units import MIB


def test_the_lowest_bit_is_first() -> None:
    """The lowest bit is the first sector; with sectors of 4096 bytes, it stands for eight truth values."""
    assert owned(b"\x01\x80", 512).tolist() == [True] + [False] * 14 + [True]
    assert np.flatnonzero(owned(b"\x02", 4096)).tolist() == list(range(8, 16))
    assert (bytes_per_block(MIB, 512), bytes_per_block(MIB, 4096)) == (256, 32)


@given(raw=st.binary(min_size=1, max_size=40))
def test_packing_is_the_reverse(raw: bytes) -> None:
    """Bytes and truth values convert to each other, for both sector sizes."""
    for sector_bytes in (512, 4096):
        bits = owned(raw, sector_bytes)[:: sector_bytes // 512]
        assert np.packbits(bits, bitorder="little").tobytes() == raw


@given(raw=st.binary(min_size=6, max_size=6), first=st.integers(0, 47), data=st.data())
def test_a_run_sets_its_bits_only(raw: bytes, first: int, data: st.DataObject) -> None:
    """A run of bits is set, and the result is True if any of them was clear."""
    count = data.draw(st.integers(1, 48 - first))
    run, after = range(first, first + count), bytearray(raw)
    grew = set_run(after, first, count)
    before = [raw[bit // 8] >> bit % 8 & 1 for bit in range(48)]
    assert [after[bit // 8] >> bit % 8 & 1 for bit in range(48)] == [bit in run or before[bit] for bit in range(48)]
    assert grew == (not all(before[bit] for bit in run))
