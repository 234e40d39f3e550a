# SPDX-License-Identifier: Apache-2.0
"""The bits of sector bitmaps: bit 0 of byte 0 is the first sector of the chunk.

Decides the bit order and which bits are a block's. Pure: converts bytes to truth values, and back. One bit stands for
one *logical* sector; outside the format a truth value stands for `units.SECTOR_SIZE` bytes, so with sectors of 4096
bytes eight of them share a bit.

Source: [MS-VHDX] 2.4.1; the order of bits is that of files written by Windows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vhdkit.units import SECTOR_SIZE

_BITS = 8


def bytes_per_block(block_size: int, sector_bytes: int) -> int:
    """The bytes of a chunk's bitmap that belong to one block: a block has at least 256 sectors."""
    return block_size // sector_bytes // _BITS


def owned(raw: bytes | bytearray, sector_bytes: int) -> NDArray[np.bool_]:
    """One truth value per `SECTOR_SIZE` bytes of the block whose bits these are."""
    bits = np.unpackbits(np.frombuffer(raw, dtype=np.uint8), bitorder="little").view(np.bool_)
    return bits if sector_bytes == SECTOR_SIZE else np.repeat(bits, sector_bytes // SECTOR_SIZE)


def packed(bits: NDArray[np.bool_]) -> bytes:
    """The bytes of a bitmap with one truth value per logical sector, a multiple of 8 of them."""
    return np.packbits(bits, bitorder="little").tobytes()


def set_run(raw: bytearray, first: int, count: int) -> bool:
    """Set `count` bits from `first`; returns True if any of them was clear."""
    end = first + count
    byte, last = first // _BITS, (end - 1) // _BITS
    head = 0xFF << (first % _BITS) & 0xFF
    tail = 0xFF >> (_BITS - 1 - (end - 1) % _BITS)
    if byte == last:
        mask = head & tail
        grew = raw[byte] & mask != mask
        raw[byte] |= mask
        return grew
    middle = b"\xff" * (last - byte - 1)
    grew = raw[byte] & head != head or raw[last] & tail != tail or raw[byte + 1 : last] != middle
    raw[byte] |= head
    raw[byte + 1 : last] = middle
    raw[last] |= tail
    return grew
