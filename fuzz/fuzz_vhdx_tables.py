# SPDX-License-Identifier: Apache-2.0
"""INV-BOUNDED: any bytes as a VHDX's region tables, items or locator end in success or a `VhdkitError`.

Fed: a byte that chooses the structure, and its bytes. Tried: reading it. Also watched:

- regions that are accepted lie on mebibytes inside the file, apart from each other and from the log;
- items that are accepted lie inside their region and apart, and the values of the known ones can be true;
- pairs that are read from a locator are written as one that is read as the same pairs.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Sequence

from fuzz.loop import main
from fuzz.mutate import mutate_bytes
from fuzz.mutate_vhdx import REGION_TABLE_SIZE, REGION_TABLES, little, locator
from tests.harness.stores import MemStore
from vhdkit.errors import VhdkitError
from vhdkit.formats.vhdx.crc import sealed
from vhdkit.formats.vhdx.items import read_items
from vhdkit.formats.vhdx.layout import REGION_METADATA, RegionEntry
from vhdkit.formats.vhdx.locator import build_locator, parent_ref, parse_locator
from vhdkit.formats.vhdx.regions import read_regions
from vhdkit.units import KIB, MIB

REGIONS, ITEMS, LOCATOR = range(3)
_FILE_BYTES = 64 * MIB
_LOG = (MIB, MIB)


def target(data: bytes) -> None:
    """Read the structure."""
    kind, raw = (data[0] % 3 if data else 0), data[1:]
    try:
        (_regions, _items, _locator)[kind](raw)
    except VhdkitError as error:
        assert str(error).isprintable(), repr(str(error))


def _regions(raw: bytes) -> None:
    """Two tables; the second begins where the first one's 16 KiB would end."""
    store = MemStore("image.vhdx", size_bytes=_FILE_BYTES)
    half = REGION_TABLE_SIZE // 4
    for offset, part in zip(REGION_TABLES, (raw[:half], raw[half:] or raw[:half]), strict=True):
        whole = part.ljust(REGION_TABLE_SIZE, b"\0")[:REGION_TABLE_SIZE]
        store.pwrite(offset, sealed(whole, 4))
    store.frozen = True
    found = read_regions(store, _LOG)
    assert all(str(one).isprintable() for one in found.findings)
    placed = sorted([_LOG, *((start, size) for _, start, size in found.places())])
    assert all(low + size <= high for (low, size), (high, _) in itertools.pairwise(placed)), placed
    assert all(start % MIB == size % MIB == 0 and start >= MIB and size for start, size in placed), placed
    for one in (found.bat, found.metadata):
        assert one.file_offset + one.length <= _FILE_BYTES, one


def _items(raw: bytes) -> None:
    """The table and 4 KiB behind it hold the bytes."""
    store = MemStore("image.vhdx", size_bytes=2 * MIB)
    store.pwrite(MIB, raw[: 64 * KIB])
    store.pwrite(MIB + 64 * KIB, raw[-4 * KIB :])
    store.frozen = True
    found = read_items(store, RegionEntry(REGION_METADATA, MIB, MIB, 1))
    placed = sorted((one.entry.offset, one.entry.length) for one in found.all if one.entry.length)
    assert all(low + size <= high for (low, size), (high, _) in itertools.pairwise(placed)), placed
    assert all(start >= 64 * KIB and start + size <= MIB for start, size in placed), placed
    assert found.block_size in [MIB << shift for shift in range(9)], found
    assert {found.logical_sector_bytes, found.physical_sector_bytes} <= {512, 4096}, found
    assert 0 < found.size_bytes <= 64 * MIB * MIB and found.size_bytes % found.logical_sector_bytes == 0, found
    assert (found.locator is not None) == found.has_parent, found
    if found.locator is not None:
        _locator(found.locator.raw)


def _locator(raw: bytes) -> None:
    pairs = parse_locator(raw, "image.vhdx", MIB)
    assert parse_locator(build_locator(pairs), "image.vhdx", MIB) == pairs
    parent = parent_ref(pairs, "image.vhdx", MIB)
    assert parent.names and parent.linkage_ids and all(any(one) for one in parent.linkage_ids), parent


def mutate(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Another structure, near `data`: fields are changed as a whole, and locators are made anew."""
    if rng.random() < 0.2 or len(data) < 64:
        return mutate_bytes(data, rng, others)
    raw = bytearray(data)
    if raw[0] % 3 == LOCATOR and rng.random() < 0.6:
        raw[1:] = locator(rng)
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        size = rng.choice((2, 4, 4, 8))
        at = 1 + 4 * rng.randrange(max(min(len(raw), 400) // 4 - 2, 1))
        if rng.random() < 0.3:
            at = 1 + rng.randrange(len(raw))
        raw[at : at + size] = little(rng, size)
        if rng.random() < 0.2:
            other = 1 + 32 * rng.randrange(8)
            raw[other : other + 16] = raw[at // 32 * 32 + 1 : at // 32 * 32 + 17]
    return bytes(raw[: 1 << 17])


if __name__ == "__main__":
    sys.exit(main(target, "fuzz_vhdx_tables", mutate))
