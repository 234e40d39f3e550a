# SPDX-License-Identifier: Apache-2.0
"""Disk sizes: cylinders, heads and sectors, and which of a footer's sizes is the virtual size.

Decides the geometry written for a size, the virtual size read from a footer, and the size limits. Pure.
Sources: specification, "CHS Calculation"; for the creators whose size is CHS, QEMU's reader.
"""

from __future__ import annotations

from typing import NamedTuple

from vhdkit.formats.vhd.layout import DISK_TYPE_FIXED, Footer
from vhdkit.units import GIB, SECTOR_SIZE, TIB, round_down, sectors_to_bytes

MAX_CYLINDERS = 65535
MAX_CHS_SECTORS = MAX_CYLINDERS * 16 * 255
MAX_CREATE_BYTES = 2040 * GIB  # Windows refuses larger VHDs
MAX_DYNAMIC_BYTES = 2 * TIB  # a BAT entry is a 32-bit sector number, so a file cannot hold more
MAX_FIXED_BYTES = 64 * TIB  # no producer writes more; keeps every byte offset far inside 63 bits

# Virtual PC and old QEMU show the guest the CHS product; all others the current size.
_CREATORS_MEANING_CHS = (b"vpc ", b"qemu")


class Geometry(NamedTuple):
    """Cylinders, heads, sectors per track."""

    cylinders: int
    heads: int
    sectors_per_track: int

    @property
    def size_bytes(self) -> int:
        """The size that the three describe together."""
        return sectors_to_bytes(self.cylinders * self.heads * self.sectors_per_track)


# The largest geometry. `qemu-img -o force_size` writes it for any size: it means that the current size counts.
NO_GEOMETRY = Geometry(MAX_CYLINDERS, 16, 255)


def geometry_for(size_bytes: int) -> Geometry:
    """The geometry by the specification's algorithm; it may describe less than `size_bytes`, never more."""
    sector_count = min(size_bytes // SECTOR_SIZE, MAX_CHS_SECTORS)
    if sector_count >= MAX_CYLINDERS * 16 * 63:
        sectors_per_track, heads = 255, 16
        tracks = sector_count // sectors_per_track
    else:
        sectors_per_track = 17
        tracks = sector_count // sectors_per_track
        heads = max(4, (tracks + 1023) // 1024)
        if tracks >= heads * 1024 or heads > 16:
            sectors_per_track, heads = 31, 16
            tracks = sector_count // sectors_per_track
        if tracks >= heads * 1024:
            sectors_per_track, heads = 63, 16
            tracks = sector_count // sectors_per_track
    return Geometry(tracks // heads, heads, sectors_per_track)


def footer_geometry(footer: Footer) -> Geometry:
    """The geometry in a footer."""
    return Geometry(footer.cylinders, footer.heads, footer.sectors_per_track)


def size_is_chs(footer: Footer) -> bool:
    """True when the virtual size of this footer is its CHS product rather than its current size."""
    geometry = footer_geometry(footer)
    return (
        footer.creator_application in _CREATORS_MEANING_CHS
        and geometry.size_bytes > 0
        and geometry.size_bytes < sectors_to_bytes(MAX_CHS_SECTORS)
    )


def virtual_size(footer: Footer, file_data_bytes: int) -> int:
    """The virtual size of a footer in bytes, whole sectors.

    `file_data_bytes` is what a fixed image's file can hold: a larger CHS product is ignored.
    """
    if size_is_chs(footer):
        size_bytes = footer_geometry(footer).size_bytes
        if footer.disk_type != DISK_TYPE_FIXED or size_bytes <= file_data_bytes:
            return size_bytes
    return round_down(footer.current_size, SECTOR_SIZE)
