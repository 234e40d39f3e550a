# SPDX-License-Identifier: Apache-2.0
"""VHDX images with every structure and block where a test wants it; no code of the library decides what lies where."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field, replace

from tests.harness.stores import MemStore
from vhdkit.formats.vhdx import items, layout
from vhdkit.formats.vhdx.bat import BlockState
from vhdkit.formats.vhdx.crc import sealed
from vhdkit.formats.vhdx.identify import FILE_IDENTIFIER
from vhdkit.formats.vhdx.layout import Header, RegionEntry
from vhdkit.formats.vhdx.locator import build_locator
from vhdkit.formats.vhdx.regions import build_table
from vhdkit.image import NULL_ID
from vhdkit.units import MIB, SECTOR_SIZE, round_up

LINKAGE = uuid.UUID(int=5).bytes
DISK_ID = uuid.UUID(int=6).bytes
OTHER_REGION = uuid.UUID(int=99).bytes
_FULL, _PARTIAL = BlockState.FULLY_PRESENT, BlockState.PARTIALLY_PRESENT


@dataclass(slots=True)
class VhdxBlock:
    """A payload block: its state, its place, bytes at offsets in it, and the logical sectors whose bits are set."""

    state: int = _FULL
    place: int = 0
    data: dict[int, bytes] = field(default_factory=dict)
    bits: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Vhdx:
    """An image; places are bytes, on mebibytes. `bitmaps` are places by number, `parent` is the linkage id or None.

    `entries` are raw entries of the BAT by number, `file_size` is as long as needed when it is 0.
    """

    size: int
    block_size: int = MIB
    sector_bytes: int = SECTOR_SIZE
    fixed: bool = False
    parent: bytes | None = None
    log: int = MIB
    metadata: int = 2 * MIB
    table: int = 3 * MIB
    table_size: int = MIB
    other: int | None = None  # a region that no program knows, of 1 MiB
    blocks: dict[int, VhdxBlock] = field(default_factory=dict)
    bitmaps: dict[int, int] = field(default_factory=dict)
    entries: dict[int, int] = field(default_factory=dict)
    file_size: int = 0
    linkage: bytes = LINKAGE

    def store(self, name: str = "built.vhdx", *, frozen: bool = False) -> MemStore:
        """The file."""
        store = MemStore(name)
        store.pwrite(0, FILE_IDENTIFIER)
        header = Header(
            layout.HEADER_SIGNATURE, 0, 7, uuid.UUID(int=8).bytes, self.linkage, NULL_ID, 0, 1, MIB, self.log
        )
        for number, offset in enumerate(layout.HEADER_OFFSETS):
            raw = layout.build_header(replace(header, sequence_number=number)).ljust(layout.HEADER_SIZE, b"\0")
            store.pwrite(offset, sealed(raw, layout.HEADER_CHECKSUM_OFFSET))
        regions = [
            RegionEntry(layout.REGION_METADATA, self.metadata, MIB, 1),
            RegionEntry(layout.REGION_BAT, self.table, self.table_size, 1),
        ]
        if self.other is not None:
            regions.append(RegionEntry(OTHER_REGION, self.other, MIB, 0))
            store.pwrite(self.other, b"other region" * 100)
        for offset in layout.REGION_TABLE_OFFSETS:
            store.pwrite(offset, build_table(regions))
        store.pwrite(self.metadata, items.build_items(self._items()))
        self._put_blocks(store)
        ends = [self.log, self.metadata, self.other or 0, *self.bitmaps.values(), self.table + self.table_size - MIB]
        ends += [one.place + self.block_size - MIB for one in self.blocks.values() if one.state >= _FULL]
        store.truncate(self.file_size or round_up(max(ends) + MIB, MIB))
        store.frozen = frozen
        return store

    def _items(self) -> list[tuple[bytes, int, bytes]]:
        flags = layout.HAS_PARENT if self.parent is not None else layout.LEAVE_BLOCKS_ALLOCATED if self.fixed else 0
        disk, required = layout.ITEM_IS_VIRTUAL_DISK | layout.ITEM_IS_REQUIRED, layout.ITEM_IS_REQUIRED
        parameters = self.block_size.to_bytes(4, "little") + flags.to_bytes(4, "little")
        found = [
            (layout.ITEM_FILE_PARAMETERS, required, parameters),
            (layout.ITEM_VIRTUAL_DISK_SIZE, disk, self.size.to_bytes(8, "little")),
            (layout.ITEM_LOGICAL_SECTOR_SIZE, disk, self.sector_bytes.to_bytes(4, "little")),
            (layout.ITEM_PHYSICAL_SECTOR_SIZE, disk, (4096).to_bytes(4, "little")),
            (layout.ITEM_VIRTUAL_DISK_ID, disk, DISK_ID),
        ]
        if self.parent is not None:
            pairs = {"parent_linkage": f"{{{uuid.UUID(bytes=self.parent)}}}", "relative_path": ".\\base.vhdx"}
            found.append((layout.ITEM_PARENT_LOCATOR, required, build_locator(pairs)))
        return found

    def _put_blocks(self, store: MemStore) -> None:
        ratio = (1 << 23) * self.sector_bytes // self.block_size
        entries = dict(self.entries)
        for number, place in self.bitmaps.items():
            entries[number * (ratio + 1) + ratio] = place | _FULL
        for number, block in self.blocks.items():
            entries[number + number // ratio] = block.place | block.state
            for offset, raw in block.data.items():
                store.pwrite(block.place + offset, raw)
            if block.bits:
                base = self.bitmaps[number // ratio] * 8 + number % ratio * (self.block_size // self.sector_bytes)
                for bit in block.bits:
                    at = (base + bit) // 8
                    old = store.pread(at, 1) or b"\0"
                    store.pwrite(at, bytes([old[0] | 1 << (base + bit) % 8]))
        for number, entry in entries.items():
            store.pwrite(self.table + number * 8, entry.to_bytes(8, "little"))
