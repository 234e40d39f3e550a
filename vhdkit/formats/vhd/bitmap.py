# SPDX-License-Identifier: Apache-2.0
"""The sector bitmap in front of a block's data: bit 7 of byte 0 is sector 0.

Decides the bit order and the stored size. Pure: converts bytes to truth values, and back.

The disk may end inside its last block. The bits of sectors after that end are always written clear: XenServer's
coalesce copies each set bit into the parent, and fails at the first one after the end of the disk.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vhdkit.units import SECTOR_SIZE, round_up

_BITS = 8


def bitmap_size(block_size_bytes: int) -> int:
    """Bytes that a block's bitmap takes in the file: one bit per sector, rounded up to whole sectors."""
    return round_up(block_size_bytes // SECTOR_SIZE // _BITS, SECTOR_SIZE)


def owned(raw: bytes | bytearray, sector_count: int) -> NDArray[np.bool_]:
    """One truth value per sector of the block."""
    bits = np.unpackbits(np.frombuffer(raw, dtype=np.uint8), count=sector_count, bitorder="big")
    return bits.view(np.bool_)


def packed(owned_sectors: NDArray[np.bool_], stored_size: int) -> bytearray:
    """The bitmap at its stored size for one truth value per sector; the reverse of `owned`."""
    padding = b"\xff" if owned_sectors.all() else b"\0"
    return bytearray(np.packbits(owned_sectors, bitorder="big").tobytes().ljust(stored_size, padding))


def is_full(raw: bytes | bytearray, sector_count: int) -> bool:
    """True when each of the first `sector_count` sectors, the part of the block inside the disk, is set."""
    whole, rest = divmod(sector_count, _BITS)
    return raw.startswith(b"\xff" * whole) and (rest == 0 or raw[whole] | 0xFF >> rest == 0xFF)


def full(block_size_bytes: int, sector_count: int | None = None) -> bytearray:
    """A bitmap, at its stored size, with the first `sector_count` sectors set, or all of them.

    If all are set, the padding is set as well, as Hyper-V writes it.
    """
    raw = bytearray(b"\xff" * bitmap_size(block_size_bytes))
    if sector_count is not None and sector_count < block_size_bytes // SECTOR_SIZE:
        clear_from(raw, sector_count)
    return raw


def clear_from(raw: bytearray, sector_count: int) -> bool:
    """Clear every bit but the first `sector_count`; True when one of the others was set."""
    whole, rest = divmod(sector_count, _BITS)
    before = bytes(raw[whole:])
    raw[whole:] = bytes(len(before))
    if rest:
        raw[whole] = before[0] & ~(0xFF >> rest) & 0xFF
    return bytes(raw[whole:]) != before


def set_run(raw: bytearray, first: int, count: int) -> bool:
    """Set `count` sectors from `first`; True when one of them was clear."""
    end = first + count
    byte, last = first // _BITS, (end - 1) // _BITS
    head = 0xFF >> (first % _BITS)
    tail = 0xFF << (_BITS - 1 - (end - 1) % _BITS) & 0xFF
    if byte == last:
        mask = head & tail
        grew = raw[byte] & mask != mask
        raw[byte] |= mask
        return grew
    middle = b"\xff" * (last - byte - 1)
    grew = raw[byte] & head != head or raw[last] & tail != tail or raw[byte + 1 : last] != middle
    if grew:
        raw[byte] |= head
        raw[byte + 1 : last] = middle
        raw[last] |= tail
    return grew
