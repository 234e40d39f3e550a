# SPDX-License-Identifier: Apache-2.0
"""CRC-32C, against a bitwise one."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from vhdkit.formats.vhdx.crc import crc32c, is_sealed, sealed


def naive(data: bytes) -> int:
    """CRC-32C bit by bit, as RFC 3720 defines it."""
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


def test_known_values() -> None:
    """The examples of RFC 3720, and the usual check value."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(b"") == 0


@settings(max_examples=40)
@given(size=st.integers(0, 1600), seed=st.integers(0, 1 << 32), cut=st.integers(0, 1600))
def test_it_agrees_with_a_bitwise_one(size: int, seed: int, cut: int) -> None:
    """The value is correct for any length, and when computed in two parts."""
    data = random.Random(seed).randbytes(size)
    if seed % 3 == 0:  # zeros are skipped
        data = data[: size // 3].ljust(size - 1, b"\0") + data[-1:] if size else b""
    assert crc32c(data) == naive(data) == crc32c(data[cut:], crc32c(data[:cut]))


@given(raw=st.binary(min_size=8, max_size=64), place=st.integers(0, 63), bit=st.integers(0, 7))
def test_a_seal_is_broken_by_any_bit(raw: bytes, place: int, bit: int) -> None:
    """A sealed structure is valid, and invalid once any bit has changed."""
    good = bytearray(sealed(raw, 4))
    assert is_sealed(bytes(good), 4)
    good[place % len(good)] ^= 1 << bit
    assert not is_sealed(bytes(good), 4)
