# SPDX-License-Identifier: Apache-2.0
"""CRC-32C, against a bitwise one."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import require_module
from vhdkit.formats.vhdx.crc import by_tables, crc32c, is_sealed, sealed

WAYS = (crc32c, by_tables)


def naive(data: bytes) -> int:
    """CRC-32C bit by bit, as RFC 3720 defines it."""
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


@pytest.mark.parametrize("way", WAYS)
def test_known_values(way: Callable[[bytes], int]) -> None:
    """The examples of RFC 3720, and the usual check value."""
    assert way(b"123456789") == 0xE3069283
    assert way(bytes(32)) == 0x8A9136AA
    assert way(b"\xff" * 32) == 0x62A8AB43
    assert way(b"") == 0


@settings(max_examples=40)
@given(size=st.integers(0, 1600), seed=st.integers(0, 1 << 32), cut=st.integers(0, 1600))
def test_it_agrees_with_a_bitwise_one(size: int, seed: int, cut: int) -> None:
    """The value is correct for any length, and when computed in two parts."""
    data = random.Random(seed).randbytes(size)
    if seed % 3 == 0:  # zeros are skipped
        data = data[: size // 3].ljust(size - 1, b"\0") + data[-1:] if size else b""
    for way in WAYS:
        assert way(data) == naive(data) == way(data[cut:], way(data[:cut]))


@pytest.mark.parametrize("way", WAYS)
def test_it_takes_every_kind_of_buffer(way: Callable[[bytes | bytearray | memoryview], int]) -> None:
    """The bytes count, not how they are held."""
    raw = random.Random(1).randbytes(700)
    assert way(raw) == way(bytearray(raw)) == way(memoryview(raw))


def test_the_library_is_used_where_it_is_installed() -> None:
    """The compiled library computes the checksums, so a flush does not wait for the tables."""
    require_module("google_crc32c")
    program = "import sys; from vhdkit.formats.vhdx import crc; crc.by_tables = None; print(crc.crc32c(b'123456789'))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == f"{0xE3069283}\n"


@pytest.mark.parametrize("broken", ["None", "types.SimpleNamespace(implementation='python')"])
def test_without_the_library_the_tables_are_used(broken: str) -> None:
    """If the library is missing, or has only its slow form in Python, the tables compute the same value."""
    program = (
        f"import sys, types; sys.modules['google_crc32c'] = {broken}\n"
        "from vhdkit.formats.vhdx.crc import crc32c; print(crc32c(b'123456789'))"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == f"{0xE3069283}\n"


@given(raw=st.binary(min_size=8, max_size=64), place=st.integers(0, 63), bit=st.integers(0, 7))
def test_a_seal_is_broken_by_any_bit(raw: bytes, place: int, bit: int) -> None:
    """A sealed structure is valid, and invalid once any bit has changed."""
    good = bytearray(sealed(raw, 4))
    assert all(sealed(raw[:cut], 4, raw[cut:]) == good for cut in (8, len(raw)))
    assert is_sealed(bytes(good), 4)
    good[place % len(good)] ^= 1 << bit
    assert not is_sealed(bytes(good), 4)
