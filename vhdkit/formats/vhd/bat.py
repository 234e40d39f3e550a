# SPDX-License-Identifier: Apache-2.0
"""The block allocation table: for each block, the sector of the file where its bitmap begins.

Decides what an entry means and which part of the table must be written after a change. Entries are a numpy
array in the machine's byte order; 0xFFFFFFFF means unallocated. Only the entries that the virtual size needs are
kept: other programs leave spare entries, or junk, after them.

The largest table takes 16 MiB, and a chain has up to 254: an image that is only read may leave its table in the file
(`BatInFile`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vhdkit.formats.vhd.layout import BAT_ENTRY_SIZE, BAT_UNALLOCATED
from vhdkit.store import ReadStore, Store
from vhdkit.units import SECTOR_SIZE, sectors_to_bytes, whole_sectors

ENTRIES_PER_SECTOR = SECTOR_SIZE // BAT_ENTRY_SIZE
ENTRIES_PER_PART = 4096 // BAT_ENTRY_SIZE  # of a table that stays in its file: a page is read at once
MAX_FLAGS = 1024  # of one image whose table stays in its file
MAX_PARTS = 8  # of one image: 32 KiB


class Bat:
    """The table of one image, in memory. Changed entries are remembered by the sector of the table they are in."""

    def __init__(self, entries: NDArray[np.uint32], table_offset_bytes: int) -> None:
        self._entries = entries
        self.table_offset_bytes = table_offset_bytes
        self._view = memoryview(entries)  # type: ignore[arg-type]  # a scalar from here is a plain int, and quick
        self._dirty: set[int] = set()

    @classmethod
    def load(cls, store: ReadStore, table_offset_bytes: int, block_count: int) -> Bat:
        """Read the first `block_count` entries; the caller has checked that the file holds them."""
        raw = store.pread(table_offset_bytes, block_count * BAT_ENTRY_SIZE)
        return cls(np.frombuffer(raw, dtype=">u4").astype(np.uint32), table_offset_bytes)

    @property
    def entries(self) -> NDArray[np.uint32]:
        """The whole table, for reading and changing."""
        return self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def block_start(self, block_index: int) -> int:
        """Byte offset of the block's bitmap, or -1."""
        entry = self._view[block_index]
        return -1 if entry == BAT_UNALLOCATED else sectors_to_bytes(entry)

    def known_start(self, block_index: int) -> int | None:
        """As `block_start`, but None if the entry would have to be read first; then it is prefetched."""
        return self.block_start(block_index)

    def allocated(self) -> NDArray[np.bool_]:
        """One truth value per block."""
        return np.not_equal(self.entries, BAT_UNALLOCATED)

    def set(self, block_index: int, start_bytes: int) -> None:
        """Point the block at its bitmap; the entry is written with the next flush."""
        self._view[block_index] = whole_sectors(start_bytes)
        self._dirty.add(block_index // ENTRIES_PER_SECTOR)

    def clear(self, block_index: int) -> None:
        """Mark the block unallocated; the entry is written with the next flush."""
        self._view[block_index] = BAT_UNALLOCATED
        self._dirty.add(block_index // ENTRIES_PER_SECTOR)

    @property
    def is_dirty(self) -> bool:
        """True when an entry waits for a flush."""
        return bool(self._dirty)

    def take_dirty(self) -> dict[int, bytes]:
        """Copies of the changed sectors of the table, by number; from now on they count as clean."""
        taken: dict[int, bytes] = {}
        clean: set[int] = set()
        for number in sorted(self._dirty):
            first = number * ENTRIES_PER_SECTOR
            taken[number] = self.entries[first : first + ENTRIES_PER_SECTOR].astype(">u4").tobytes()
        self._dirty = clean  # last, and no call: an exception of a signal handler comes before it or after the return
        return taken

    def mark_dirty(self, numbers: dict[int, bytes]) -> None:
        """Mark the sectors from `take_dirty` as dirty again: they could not be written."""
        self._dirty.update(numbers)

    def sector_offset(self, number: int) -> int:
        """Byte offset in the file of sector `number` of the table."""
        return self.table_offset_bytes + sectors_to_bytes(number)


class BatInFile(Bat):
    """The table of an image that is only read, left in its file; recently used parts are cached.

    `entries` and `allocated` read all of it, for a caller that turns it into something else.
    """

    def __init__(self, store: Store, table_offset_bytes: int, block_count: int) -> None:
        super().__init__(np.zeros(0, dtype=np.uint32), table_offset_bytes)
        self._store = store
        self._count = block_count
        self._parts: dict[int, memoryview] = {}

    @property
    def entries(self) -> NDArray[np.uint32]:
        """A copy of the whole table."""
        return Bat.load(self._store, self.table_offset_bytes, self._count).entries

    def __len__(self) -> int:
        return self._count

    def block_start(self, block_index: int) -> int:
        """See `Bat.block_start`."""
        number, within = divmod(block_index, ENTRIES_PER_PART)
        part = self._parts.get(number)
        if part is None:
            part = self._read(number)
        entry = part[within]
        return -1 if entry == BAT_UNALLOCATED else sectors_to_bytes(entry)

    def known_start(self, block_index: int) -> int | None:
        """See `Bat.known_start`."""
        number, within = divmod(block_index, ENTRIES_PER_PART)
        part = self._parts.get(number)
        if part is not None:
            return -1 if part[within] == BAT_UNALLOCATED else sectors_to_bytes(part[within])
        place = self.table_offset_bytes + number * ENTRIES_PER_PART * BAT_ENTRY_SIZE
        self._store.prefetch(place, ENTRIES_PER_PART * BAT_ENTRY_SIZE)
        return None

    def _read(self, number: int) -> memoryview:
        first = number * ENTRIES_PER_PART
        count = min(ENTRIES_PER_PART, self._count - first)
        loaded = Bat.load(self._store, self.table_offset_bytes + first * BAT_ENTRY_SIZE, count)
        part = np.full(count, BAT_UNALLOCATED, dtype=np.uint32)  # a file that was truncated since has fewer
        part[: len(loaded)] = loaded.entries
        if len(self._parts) >= MAX_PARTS:
            self._parts.clear()
        view: memoryview = memoryview(part)  # type: ignore[arg-type]
        self._parts[number] = view
        return view


class FewFlags:
    """A cache of truth values by number; a value that is not cached reads as false."""

    def __init__(self) -> None:
        self._set: set[int] = set()

    def __getitem__(self, number: int) -> bool:
        """True when it is cached as true."""
        return number in self._set

    def __setitem__(self, number: int, value: int) -> None:
        """Cache it."""
        if len(self._set) >= MAX_FLAGS:
            self._set.clear()
        (self._set.add if value else self._set.discard)(number)
