# SPDX-License-Identifier: Apache-2.0
"""XenServer's batmap: one bit per block that marks it as wholly owned, a hint that must never be set wrongly.

Decides how its bits and its checksum are written. A clear bit is always right, so bits are cleared before
the block to which they belong is dropped or changed, and a new map begins with the bits that are still valid.

Source: XenServer's vhd-util (libvhd); version 1.1 sums signed bytes, later ones unsigned.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vhdkit.formats.vhd import layout
from vhdkit.formats.vhd.layout import BatmapHeader
from vhdkit.formats.vhd.metadata import Metadata, batmap_header_offset
from vhdkit.store import ReadStore, Store
from vhdkit.units import MIB, SECTOR_SIZE, covering_sectors, sectors_to_bytes

MAX_MAP_BYTES = MIB  # twice what the smallest blocks of the largest disk need; a checksum reads it all
_BITS = 8
_SIGNED_VERSION = 0x00010001
_WORD = 0xFFFFFFFF


def map_size(block_count: int) -> int:
    """Bytes the map of so many blocks takes in the file: whole sectors."""
    return sectors_to_bytes(covering_sectors(-(-block_count // _BITS)))


def ranges(metadata: Metadata) -> list[tuple[int, int]]:
    """(offset, end) of header and map; empty without a batmap, or if its size is impossible."""
    if metadata.batmap is None or sectors_to_bytes(metadata.batmap.batmap_size) > MAX_MAP_BYTES:
        return []
    assert metadata.header is not None
    header, place = batmap_header_offset(metadata.header), metadata.batmap.batmap_offset
    size = sectors_to_bytes(metadata.batmap.batmap_size)
    return [(header, header + layout.BATMAP_HEADER_SIZE), (place, place + size)]


def read_map(store: ReadStore, metadata: Metadata) -> bytes:
    """The map's bytes for the blocks of the disk; empty without a batmap. Raises IoFailed."""
    if metadata.batmap is None:
        return b""
    size = min(sectors_to_bytes(metadata.batmap.batmap_size), map_size(metadata.block_count))
    return store.pread(metadata.batmap.batmap_offset, size)


def clear_bits(store: Store, metadata: Metadata, blocks: NDArray[np.int64]) -> bool:
    """Clear the bits of `blocks`; True when something was written, which the caller syncs.

    Raises IoFailed, NoSpace.
    """
    raw = bytearray(read_map(store, metadata))
    bits = np.frombuffer(raw, dtype=np.uint8)
    known = blocks[blocks < len(raw) * _BITS]
    masks = (0x80 >> (known % _BITS)).astype(np.uint8)
    if metadata.batmap is None or not np.any(bits[known // _BITS] & masks):
        return False
    np.bitwise_and.at(bits, known // _BITS, ~masks)
    # The checksum is over the whole map, including what follows the blocks of the disk.
    whole = sectors_to_bytes(metadata.batmap.batmap_size)
    rest = store.pread(metadata.batmap.batmap_offset + len(raw), whole - len(raw))
    store.pwrite(metadata.batmap.batmap_offset, raw)
    assert metadata.header is not None
    store.pwrite(batmap_header_offset(metadata.header), build(metadata.batmap, bytes(raw) + rest))
    return True


def build(header: BatmapHeader, raw: bytes) -> bytes:
    """The header's bytes for the map `raw`."""
    return layout.build_batmap_header(replace(header, checksum=_checksum(raw, header.batmap_version)))


def moved(header: BatmapHeader, raw: bytes, header_offset: int, block_count: int) -> tuple[bytes, bytes]:
    """Header and map, one after the other from `header_offset`, for a disk that now has `block_count` blocks."""
    raw = raw.ljust(map_size(block_count), b"\0")
    place = replace(header, batmap_offset=header_offset + SECTOR_SIZE, batmap_size=len(raw) // SECTOR_SIZE)
    return build(place, raw), raw


def _checksum(raw: bytes, version: int) -> int:
    kind = np.int8 if version <= _SIGNED_VERSION else np.uint8
    return ~int(np.frombuffer(raw, dtype=kind).sum(dtype=np.int64)) & _WORD
