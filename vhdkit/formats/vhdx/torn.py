# SPDX-License-Identifier: Apache-2.0
"""Sectors that a power cut tore while a header or a region table was written.

Decides which sectors are certainly torn: a first sector of a structure with a wrong checksum. In all known files the
rest of these structures is zeros, so the checksum can be computed from the first sector alone.
"""

from __future__ import annotations

from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.crc import is_sealed
from vhdkit.units import SECTOR_SIZE

_SIZES = {layout.HEADER_SIGNATURE: layout.HEADER_SIZE, layout.REGION_SIGNATURE: layout.REGION_TABLE_SIZE}


def is_torn(sector: bytes, before: bytes, after: bytes) -> bool:
    """See `Format.is_torn`."""
    if len(sector) != SECTOR_SIZE:
        return False
    signatures = tuple(_SIZES)
    if not before.startswith(signatures) and not after.startswith(signatures):
        return False
    return not any(is_whole(sector, one, size) for one, size in _SIZES.items())


def is_whole(sector: bytes, signature: bytes, size: int) -> bool:
    """Whether this is the first sector of an intact structure of this kind, the rest of which is zeros."""
    return sector.startswith(signature) and is_sealed(sector.ljust(size, b"\0"), layout.HEADER_CHECKSUM_OFFSET)
