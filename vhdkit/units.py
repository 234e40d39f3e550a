# SPDX-License-Identifier: Apache-2.0
"""Sector size, rounding, and conversions between an index, a count and a size.

Decides how bytes become sectors and back, and how people write sizes. Pure arithmetic: knows no files, no formats
and no error classes. Apart from the layout of structures, the only place where the sector size is a number.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fractions import Fraction

SECTOR_SHIFT = 9
SECTOR_SIZE = 1 << SECTOR_SHIFT  # bytes; every VHD structure and every request inside the engine counts in these
SECTOR_MASK = SECTOR_SIZE - 1
PAGE_SIZE = 4096  # bytes; physical sector of current disks and page of the page cache: data blocks start on one
KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB

_SIZE_PATTERN = re.compile(r"(?i)\s*(\d{1,40})(?:\.(\d{1,40}))?\s*([kmgtp]?)(i?b)?\s*")
_SIZE_SHIFT = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50}


def round_up(size_bytes: int, unit_bytes: int) -> int:
    """The smallest multiple of `unit_bytes` that is not below `size_bytes`."""
    return -(-size_bytes // unit_bytes) * unit_bytes


def round_down(size_bytes: int, unit_bytes: int) -> int:
    """The largest multiple of `unit_bytes` that is not above `size_bytes`."""
    return size_bytes // unit_bytes * unit_bytes


def sectors_to_bytes(sectors: int) -> int:
    """A sector index or count as a byte offset or size."""
    return sectors << SECTOR_SHIFT


def whole_sectors(size_bytes: int) -> int:
    """How many sectors `size_bytes` is; it must be a whole number of them."""
    assert size_bytes & SECTOR_MASK == 0, size_bytes
    return size_bytes >> SECTOR_SHIFT


def covering_sectors(size_bytes: int) -> int:
    """How many sectors are needed to hold `size_bytes`."""
    return (size_bytes + SECTOR_MASK) >> SECTOR_SHIFT


def is_power_of_two(value: int) -> bool:
    """True for 1, 2, 4, 8, ..."""
    return value > 0 and value & (value - 1) == 0


class DiskSize(int):
    """The size of a disk in bytes, whole sectors. `asked` is the text given for it if that was rounded, else empty."""

    asked: str = ""


def parse_size(text: str) -> int:
    """Bytes from text: "512", "64K", "1.5G", "2 TiB" (powers of 1024); fractions of a byte are dropped.

    Raises ValueError, with a message for users, if the text is not a size.
    """
    return math.floor(_exact_size(text))


def parse_disk_size(text: str) -> DiskSize:
    """Like `parse_size`, for the size of a disk: "1.8T" and "1000" are rounded up to whole sectors."""
    exact = _exact_size(text)
    size = DiskSize(round_up(math.ceil(exact), SECTOR_SIZE))
    if size != exact:
        size.asked = text.strip()
    return size


def _exact_size(text: str) -> Fraction:
    match = _SIZE_PATTERN.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write a number with K, M, G or T, such as 10G")
    whole, fraction, unit, _ = match.groups()
    from fractions import Fraction  # a slow import, needed only for sizes given as text

    return Fraction(f"{whole}.{fraction or 0}") * (1 << _SIZE_SHIFT[unit.lower()])


def format_size(size_bytes: int) -> str:
    """A size for display: "512 B", "4.0 KiB", "2.0 TiB"."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < KIB or unit == "TiB":
            break
        value /= KIB
    return f"{size_bytes} B" if unit == "B" else f"{value:.1f} {unit}"


def edges(offset: int, end: int, unit: int) -> list[tuple[int, int]]:
    """The parts of a range that do not fill their unit, as byte ranges: at most one at each end."""
    inner_start, inner_end = round_up(offset, unit), round_down(end, unit)
    if inner_end < inner_start:  # inside one unit
        return [(offset, end)] if end > offset else []
    parts = [(offset, inner_start), (inner_end, end)]
    return [(first, last) for first, last in parts if last > first]
