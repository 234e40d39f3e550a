# SPDX-License-Identifier: Apache-2.0
"""CRC-32C (Castagnoli), which protects a VHDX's headers, region tables and log entries.

Decides how it is computed: by `google-crc32c` where that is installed (the extra `crc`), else with numpy lookup
tables, because a flush computes it over every page that it logs, and none of the core's dependencies provides it. Must
not know what it protects.

The tables work because the CRC is linear: the value over a piece of 512 bytes is the exclusive or of one table entry
for each byte, chosen by its place and its value; appending a piece shifts the value so far by 512 bytes, which four
more tables do.

Source: RFC 3720, appendix B.4 (polynomial 0x1EDC6F41, reflected 0x82F63B78, initial value and final XOR all ones).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from vhdkit.units import SECTOR_SIZE

_POLYNOMIAL = 0x82F63B78
_PIECE = SECTOR_SIZE  # bytes taken at once; the tables for them are 512 KiB
_BATCH = 2048  # pieces looked up at once: 4 MiB of temporary memory
_ONES = 0xFFFFFFFF
_ROWS = np.arange(_PIECE, dtype=np.intp) * 256  # where the table's row for each place in a piece begins


def _byte_table() -> NDArray[np.uint32]:
    values = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        values = np.where(values & 1, values >> 1 ^ np.uint32(_POLYNOMIAL), values >> 1).astype(np.uint32)
    return values


@functools.cache
def _tables() -> tuple[NDArray[np.uint32], NDArray[np.uint32], list[list[int]]]:
    """(for one byte, by place in a piece and byte in one row, for each byte of a value the shift by one piece)."""
    one = _byte_table()

    def shifted(values: NDArray[np.uint32]) -> NDArray[np.uint32]:
        return np.asarray(values >> 8 ^ one[values & 0xFF], dtype=np.uint32)

    places = np.empty((_PIECE, 256), dtype=np.uint32)
    places[-1] = one
    for place in range(_PIECE - 2, -1, -1):
        places[place] = shifted(places[place + 1])
    bits = np.left_shift(np.uint32(1), np.arange(32, dtype=np.uint32))
    for _ in range(_PIECE):
        bits = shifted(bits)
    shifts = []
    for first in range(0, 32, 8):
        table = np.zeros(256, dtype=np.uint32)
        for bit in range(8):
            table[np.arange(256) >> bit & 1 == 1] ^= bits[first + bit]
        shifts.append(table.tolist())
    return one, places.reshape(-1), shifts


@functools.cache
def _library() -> Callable[[int, bytes], int] | None:
    """A compiled function (value, bytes) -> CRC, if the library is installed; it is imported when first needed.

    The tables are about as quick when they lie in the processor's cache. After a sync they do not: an entry of 12 KiB
    then takes 40 to 70 us, and 2 us by the library.
    """
    try:
        import google_crc32c
    except ImportError:
        return None
    return google_crc32c.extend if google_crc32c.implementation == "c" else None


def crc32c(data: bytes | bytearray | memoryview, value: int = 0) -> int:
    """The CRC-32C of `data`; `value` is the CRC of the bytes before it."""
    library = _library()
    return by_tables(data, value) if library is None else library(value, bytes(data))


def by_tables(data: bytes | bytearray | memoryview, value: int = 0) -> int:
    """The same, by the tables."""
    one, places, shifts = _tables()
    raw = np.frombuffer(data, dtype=np.uint8)
    state = value ^ _ONES
    whole = len(raw) // _PIECE
    low, second, third, high = shifts
    for first in range(0, whole, _BATCH):
        pieces = raw[first * _PIECE : min(first + _BATCH, whole) * _PIECE].reshape(-1, _PIECE)
        found = np.flatnonzero(pieces.view(np.uint64).any(axis=1))  # zeros change nothing but the place of the rest
        parts = np.zeros(len(pieces), dtype=np.uint32)
        parts[found] = np.bitwise_xor.reduce(places.take(pieces[found] + _ROWS), axis=1)
        for part in parts.tolist():
            state = (
                low[state & 0xFF] ^ second[state >> 8 & 0xFF] ^ third[state >> 16 & 0xFF] ^ high[state >> 24] ^ part
            )
    for byte in raw[whole * _PIECE :].tolist():
        state = state >> 8 ^ int(one[(state ^ byte) & 0xFF])
    return state ^ _ONES


def sealed(raw: bytes, checksum_offset: int, rest: bytes = b"") -> bytes:
    """`raw` and `rest` as one, with the correct checksum in the 4-byte field of `raw` at this offset."""
    before, after = raw[:checksum_offset], raw[checksum_offset + 4 :]
    checksum = crc32c(rest, crc32c(after, crc32c(before + bytes(4))))
    return b"".join((before, checksum.to_bytes(4, "little"), after, rest))


def is_sealed(raw: bytes, checksum_offset: int) -> bool:
    """Whether the checksum field is correct."""
    return sealed(raw, checksum_offset) == raw
