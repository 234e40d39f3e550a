# SPDX-License-Identifier: Apache-2.0
"""Sectors that a power cut tore while a header or a region table was written.

Decides which sector is certainly no image's: the first one of a structure whose checksum it does not pass. The rest of
such a structure is zeros, in all files that are known, so its checksum can be computed from the first sector.
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
    """True for the first sector of an intact structure of this kind, whose other sectors are zeros."""
    return sector.startswith(signature) and is_sealed(sector.ljust(size, b"\0"), layout.HEADER_CHECKSUM_OFFSET)
