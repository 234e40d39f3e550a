# SPDX-License-Identifier: Apache-2.0
"""What a disk must hold: a model of its sectors, and two naive ways to find out who owns one.

`SectorModel` knows for each sector its content now and every content a power cut may bring back: the last flushed
one and whatever was written since. `walk_sector` asks the layers one by one, `ParsedVhd` reads the bytes of the
file by offsets of its own, so neither shares code with the map, the bitmaps or the layout they are to judge.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.harness.stores import ZERO_SECTOR
from vhdkit.image import ZEROS_WITHOUT_SPACE, Layer
from vhdkit.store import Buffer, Store
from vhdkit.units import SECTOR_SIZE, covering_sectors, sectors_to_bytes


class SectorModel:
    """A disk as a bytearray, with a memory of what is not yet flushed. Report a change to it before it is made."""

    def __init__(self, content: Buffer) -> None:
        assert len(content) % SECTOR_SIZE == 0
        self.current = bytearray(content)
        self._older: dict[int, set[bytes]] = {}  # by sector: older contents that a cut may bring back
        self._flushing: dict[int, set[bytes]] = {}  # the same, from before the flush that is under way

    @property
    def size_bytes(self) -> int:
        """The size of the disk."""
        return len(self.current)

    def sector(self, sector_index: int) -> bytes:
        """The content of one sector now."""
        return bytes(self.current[sectors_to_bytes(sector_index) : sectors_to_bytes(sector_index + 1)])

    def write(self, offset_bytes: int, data: Buffer) -> None:
        """A write begins: old and new content are both possible until it is flushed."""
        if not len(data):
            return
        for index in range(offset_bytes // SECTOR_SIZE, covering_sectors(offset_bytes + len(data))):
            self._older.setdefault(index, set()).add(self.sector(index))
        self.current[offset_bytes : offset_bytes + len(data)] = data

    def begin_trim(self, offset_bytes: int, size_bytes: int) -> None:
        """A trim begins: its whole sectors may become zeros. When it is over, `adopt` what is read."""
        for index in range(covering_sectors(offset_bytes), (offset_bytes + size_bytes) // SECTOR_SIZE):
            self._older.setdefault(index, set()).add(ZERO_SECTOR)

    def flush_begins(self) -> None:
        """A flush begins: it covers the current content, not what is written while it runs."""
        for index, contents in self._older.items():
            self._flushing.setdefault(index, set()).update(contents)
        self._older.clear()

    def flush_ends(self) -> None:
        """The flush has returned: what a sector held before it began cannot come back."""
        self._flushing.clear()

    def flushed(self) -> None:
        """A flush without concurrent writes has returned: only the current content is left."""
        self.flush_begins()
        self.flush_ends()

    def flushed_range(self, offset_bytes: int, size_bytes: int) -> None:
        """A FUA write has returned: in its own sectors only the current content is left."""
        for index in range(offset_bytes // SECTOR_SIZE, covering_sectors(offset_bytes + size_bytes)):
            self._older.pop(index, None)
            self._flushing.pop(index, None)

    def violations(self, observed: Buffer, offset_bytes: int = 0) -> list[int]:
        """The sectors of `observed` that hold neither their current nor a possible older content."""
        expected = self.current[offset_bytes : offset_bytes + len(observed)]
        assert offset_bytes % SECTOR_SIZE == 0 and len(expected) == len(observed)
        if observed == expected:
            return []
        words = SECTOR_SIZE // 8
        found = np.frombuffer(observed, np.uint64).reshape(-1, words)
        differs = (found != np.frombuffer(expected, np.uint64).reshape(-1, words)).any(axis=1)
        first = offset_bytes // SECTOR_SIZE
        return [
            first + index
            for index in np.flatnonzero(differs).tolist()
            if found[index].tobytes()
            not in self._older.get(first + index, set()) | self._flushing.get(first + index, set())
        ]

    def adopt(self, observed: Buffer, offset_bytes: int = 0) -> None:
        """After a trim or a failed write: what is read, which must be possible, is the content from now on."""
        assert not self.violations(observed, offset_bytes)
        for number in range(len(observed) // SECTOR_SIZE):
            index = offset_bytes // SECTOR_SIZE + number
            found = bytes(observed[sectors_to_bytes(number) : sectors_to_bytes(number + 1)])
            if found != self.sector(index):
                self._older.setdefault(index, set()).add(self.sector(index))
                self.current[sectors_to_bytes(index) : sectors_to_bytes(index + 1)] = found

    def recovered(self, observed: Buffer) -> None:
        """After a power cut: what is read is on the device."""
        assert not self.violations(observed)
        self.current[:] = observed
        self.flushed()


def walk_sector(layers: Sequence[Layer], sector_index: int) -> tuple[int, int]:
    """(layer, store offset) of the sector's owner by asking each layer in turn, leaf first; (-1, -1) means zeros."""
    position = sectors_to_bytes(sector_index)
    for number, layer in enumerate(layers):
        if position >= layer.size_bytes:
            return -1, -1  # deeper layers are not visible through a smaller layer
        if layer.block_size_bytes == 0:
            return number, position
        block, within = divmod(position, layer.block_size_bytes)
        start = layer.block_offset(block)
        if start == ZEROS_WITHOUT_SPACE:
            return -1, -1  # owned, as zeros
        if start < 0:
            continue
        owned = layer.owned_sectors(block)
        if owned is None or owned[within // SECTOR_SIZE]:
            return (number, start + within) if start + within < layer.data_end_bytes else (-1, -1)
    return -1, -1


def walk_read(layers: Sequence[Layer], sector_index: int) -> bytes:
    """The content of one sector by that walk."""
    number, offset = walk_sector(layers, sector_index)
    if number < 0:
        return ZERO_SECTOR
    return layers[number].store.pread(offset, SECTOR_SIZE).ljust(SECTOR_SIZE, b"\0")


@dataclass(frozen=True, slots=True)
class ParsedVhd:
    """A dynamic or differencing VHD, parsed from its bytes by the specification's offsets."""

    store: Store
    size_bytes: int
    is_differencing: bool
    block_size_bytes: int
    table_offset_bytes: int
    entries: tuple[int, ...]
    locators: tuple[tuple[int, int], ...]  # (offset, size)

    @classmethod
    def parse(cls, store: Store) -> ParsedVhd:
        """Read the copy at offset 0, or else the footer at the end; the file must have one of them."""
        footer = store.pread(0, SECTOR_SIZE)
        if not footer.startswith(b"conectix") or not _sum_is_right(footer, 64):
            footer = store.pread(store.size() - SECTOR_SIZE, SECTOR_SIZE)
        assert footer.startswith(b"conectix") and _sum_is_right(footer, 64), "no footer, no copy"
        (header_offset,) = struct.unpack_from(">Q", footer, 16)
        (size,) = struct.unpack_from(">Q", footer, 48)
        (disk_type,) = struct.unpack_from(">I", footer, 60)
        header = store.pread(header_offset, 1024)
        assert header.startswith(b"cxsparse") and _sum_is_right(header, 36), "no dynamic header"
        (table_offset,) = struct.unpack_from(">Q", header, 16)
        _, block_size = struct.unpack_from(">II", header, 28)
        count = -(-size // block_size)
        entries = struct.unpack(f">{count}I", store.pread(table_offset, 4 * count))
        locators = []
        for slot in range(8):
            _, _, length, _, offset = struct.unpack_from(">4sIIIQ", header, 576 + 24 * slot)
            if length:
                locators.append((offset, length))
        return cls(store, size, disk_type == 4, block_size, table_offset, entries, tuple(locators))

    @property
    def bitmap_bytes(self) -> int:
        """The stored size of a bitmap."""
        return sectors_to_bytes(covering_sectors(self.block_size_bytes // SECTOR_SIZE // 8))

    def owned_offset(self, sector_index: int) -> int:
        """Where the file stores the sector, or -1 if it does not own it."""
        block, within = divmod(sectors_to_bytes(sector_index), self.block_size_bytes)
        if self.entries[block] == 0xFFFFFFFF:
            return -1
        start = sectors_to_bytes(self.entries[block])
        byte, bit = divmod(within // SECTOR_SIZE, 8)
        raw = self.store.pread(start + byte, 1)
        return start + self.bitmap_bytes + within if raw and raw[0] & (0x80 >> bit) else -1

    def overlaps(self) -> list[str]:
        """Every fault of the layout: overlapping pieces of the file, blocks that end behind the file."""
        table_bytes = 4 * len(self.entries)
        pieces = [(0, 1536, "copy and header"), (self.table_offset_bytes, table_bytes, "BAT")]
        pieces += [(offset, size, "locator") for offset, size in self.locators]
        whole = self.bitmap_bytes + self.block_size_bytes
        for block, entry in enumerate(self.entries):
            if entry != 0xFFFFFFFF:
                pieces.append((sectors_to_bytes(entry), whole, f"block {block}"))
        pieces.sort()
        faults = [
            f"{name} overlaps {after}"
            for (start, size, name), (begin, _, after) in itertools.pairwise(pieces)
            if start + size > begin
        ]
        end, unused = self.store.size(), len(self.entries) * self.block_size_bytes - self.size_bytes
        for start, size, name in pieces:
            used = size - unused if name == f"block {len(self.entries) - 1}" else size
            if start + used > end:
                faults.append(f"{name} ends behind the file")
        return faults


def _sum_is_right(raw: bytes, offset: int) -> bool:
    (stored,) = struct.unpack_from(">I", raw, offset)
    return bool(~(sum(raw) - sum(raw[offset : offset + 4])) & 0xFFFFFFFF == stored)
