# SPDX-License-Identifier: Apache-2.0
"""The block allocation table: what state each block is in, and where it lies.

Decides which entry belongs to which block, and what an entry means. Must not know the bits in sector bitmaps, nor when
anything is written.

    entries   | 0 | 1 | ... | R - 1 | bitmap of chunk 0 | R | ...        R: the chunk ratio, payload blocks in a chunk
    entry     bits 0-2 state, 3-19 reserved, 20-63 offset in the file in MiB

The table of a 64 TiB disk takes up to 513 MiB, most of it usually a hole: only the parts that may hold data are read,
and the rest of the array is never touched.

Source: [MS-VHDX] 2.5. Its formula for the number of entries of a differencing disk is wrong; this one follows files
that Windows wrote.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from vhdkit.formats.vhdx import layout
from vhdkit.store import ReadStore
from vhdkit.units import KIB, MIB

ENTRIES_PER_PAGE = layout.LOG_PAGE_SIZE // layout.BAT_ENTRY_SIZE
_READ_BYTES = 256 * KIB  # of the table at once: examined while they are in the processor's cache
_TAKEN_BYTES = 4 * MIB  # of the table at once, of those that are taken apart
_ENTRIES_AT_ONCE = 1 << 15  # of 8 bytes: examined while they are in the processor's cache
_MAX_PAGES = 8  # of a table that stays in its file


class BlockState(IntEnum):
    """The states of a payload block. Those of a sector bitmap block are NOT_PRESENT and FULLY_PRESENT."""

    NOT_PRESENT = 0
    UNDEFINED = 1
    ZERO = 2
    UNMAPPED = 3
    FULLY_PRESENT = 6
    PARTIALLY_PRESENT = 7


class Shape:
    """How the table of one image is laid out: its blocks, and which entry is which block's."""

    def __init__(self, size_bytes: int, block_size: int, sector_bytes: int, *, has_parent: bool) -> None:
        self.block_count = -(-size_bytes // block_size)
        self.ratio = layout.SECTORS_PER_CHUNK * sector_bytes // block_size
        self.ratio_shift = self.ratio.bit_length() - 1
        self.chunk_count = -(-self.block_count // self.ratio)
        if has_parent:
            self.entry_count = self.chunk_count * (self.ratio + 1)
        else:
            self.entry_count = self.block_count + (self.block_count - 1) // self.ratio

    def block_entry(self, block_index: int) -> int:
        """The number of a payload block's entry."""
        return block_index + (block_index >> self.ratio_shift)

    def bitmap_entry(self, chunk_index: int) -> int:
        """The number of the entry of a chunk's sector bitmap."""
        return chunk_index * (self.ratio + 1) + self.ratio

    def block_of(self, entry_index: int) -> int | None:
        """The block whose entry this is, None for the entry of a bitmap."""
        chunk, within = divmod(entry_index, self.ratio + 1)
        return None if within == self.ratio else chunk * self.ratio + within

    def is_behind(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these entries lie past the end of the disk, and so belong to none of its blocks and bitmaps."""
        groups, within = np.divmod(numbers, self.ratio + 1)
        is_block = within < self.ratio
        behind = is_block & (groups * self.ratio + within >= self.block_count)
        return np.asarray(behind | (numbers >= self.entry_count))

    def structure(self, entry_index: int) -> str:
        """The name of an entry in messages."""
        block = self.block_of(entry_index)
        if block is None:
            return f"BAT entry {entry_index} (sector bitmap of chunk {entry_index // (self.ratio + 1)})"
        return f"BAT entry {entry_index} (block {block})"


class Bat:
    """The table of one image in memory. `runs` are the ranges of entries outside which every entry is 0."""

    def __init__(self, shape: Shape, offset_bytes: int, entries: NDArray[np.uint64], runs: list[tuple[int, int]]):
        self.shape = shape
        self.offset_bytes = offset_bytes
        self._entries = entries
        self._view = memoryview(entries)  # type: ignore[arg-type]  # a scalar from here is a plain int, and quick
        self.runs = runs

    @classmethod
    def load(cls, store: ReadStore, offset_bytes: int, shape: Shape) -> Bat:
        """Read the table; the caller has checked that the file holds it."""
        entries = np.zeros(shape.entry_count, dtype=np.uint64)  # the system gives memory only for what is written
        raw = entries.view(np.uint8).data
        buffer, zeros = bytearray(min(_READ_BYTES, raw.nbytes)), memoryview(bytes(_READ_BYTES))
        size = shape.entry_count * layout.BAT_ENTRY_SIZE
        runs: list[tuple[int, int]] = []
        for start, length, may_hold_data in store.data_runs(offset_bytes, size):
            if not may_hold_data:
                continue
            for position in range(start, start + length, _READ_BYTES):
                count = min(_READ_BYTES, start + length - position)
                within = position - offset_bytes
                piece = memoryview(buffer)[:count]
                store.pread_into(position, piece)
                if piece == zeros[:count]:
                    continue  # zeros that take space in the file take none in memory
                raw[within : within + count] = piece
                first = within // layout.BAT_ENTRY_SIZE
                stop = -(-(within + count) // layout.BAT_ENTRY_SIZE)
                if runs and runs[-1][1] >= first:
                    runs[-1] = (runs[-1][0], stop)
                else:
                    runs.append((first, stop))
        if entries.dtype.byteorder == ">" or not np.little_endian:
            entries.byteswap(inplace=True)
        return cls(shape, offset_bytes, entries, runs)

    @property
    def memory_bytes(self) -> int:
        """The memory that the table takes, at most."""
        return sum(stop - first for first, stop in self.runs) * layout.BAT_ENTRY_SIZE

    def entry(self, entry_index: int) -> int:
        """An entry as it stands in the table."""
        return self._view[entry_index]

    def known_entry(self, entry_index: int) -> int | None:
        """As `entry`, but None if it would have to be read first; then it is prefetched."""
        return self._view[entry_index]

    def block(self, block_index: int) -> int:
        """The entry of a payload block."""
        return self._view[block_index + (block_index >> self.shape.ratio_shift)]

    def bitmap_offset(self, chunk_index: int) -> int:
        """Where the sector bitmap of a chunk lies, or -1."""
        entry = self.entry(self.shape.bitmap_entry(chunk_index))
        return entry & layout.BAT_OFFSET_MASK if entry & layout.BAT_STATE_MASK == BlockState.FULLY_PRESENT else -1

    def bitmaps(self) -> Iterator[tuple[int, int]]:
        """(chunk, offset) of every sector bitmap that is there."""
        for numbers, entries in self.used():
            chunks, within = np.divmod(numbers, self.shape.ratio + 1)
            states = entries & np.uint64(layout.BAT_STATE_MASK)
            is_there = (within == self.shape.ratio) & (states == BlockState.FULLY_PRESENT)
            offsets = (entries & np.uint64(layout.BAT_OFFSET_MASK))[is_there]
            yield from zip(chunks[is_there].tolist(), offsets.tolist(), strict=True)

    def set(self, entry_index: int, entry: int) -> None:
        """Change an entry in memory."""
        self._view[entry_index] = entry
        place = bisect_right(self.runs, (entry_index, len(self._view)))
        if place and self.runs[place - 1][1] >= entry_index:
            first, stop = self.runs[place - 1]
            self.runs[place - 1] = first, max(stop, entry_index + 1)
        else:
            self.runs.insert(place, (entry_index, entry_index + 1))

    def entries_of(self, numbers: NDArray[np.int64]) -> NDArray[np.uint64]:
        """The entries with these numbers, as they are in memory."""
        return self._entries[numbers]

    def put(self, numbers: NDArray[np.int64], entries: NDArray[np.uint64]) -> None:
        """Change entries in memory that were not 0 when the table was read."""
        self._entries[numbers] = entries

    def page(self, number: int) -> bytes:
        """The bytes of a page of the table as stored in the file; after the last entry they are zeros."""
        first = number * ENTRIES_PER_PAGE
        raw = self._entries[first : first + ENTRIES_PER_PAGE].astype("<u8", copy=False).tobytes()
        return raw.ljust(layout.LOG_PAGE_SIZE, b"\0")

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        """(first entry, bytes as they are to be stored) of everything that may not be 0, in order."""
        step = _TAKEN_BYTES // layout.BAT_ENTRY_SIZE
        for first, stop in self.runs:
            for start in range(first, stop, step):
                yield start, self._entries[start : min(start + step, stop)].astype("<u8").tobytes()

    def used(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint64]]]:
        """(numbers, entries) of everything that is not 0, in order, piece by piece."""
        step = _TAKEN_BYTES // layout.BAT_ENTRY_SIZE
        for first, stop in self.runs:
            for start in range(first, stop, step):
                piece = self._entries[start : min(start + step, stop)]
                numbers = np.flatnonzero(piece)
                if len(numbers):
                    yield numbers + start, piece[numbers]

    def used_blocks(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint64]]]:
        """(blocks, entries) of the payload blocks whose entry is not 0."""
        for numbers, entries in self.used():
            chunks, within = np.divmod(numbers, self.shape.ratio + 1)
            is_block = within < self.shape.ratio
            blocks = chunks * self.shape.ratio + within
            is_block &= blocks < self.shape.block_count
            yield blocks[is_block], entries[is_block]

    def parts(self) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        """(number of the first one, entries) of everything that may not be 0, in order; not to be changed."""
        for first, stop in self.runs:
            for start in range(first, stop, _ENTRIES_AT_ONCE):
                yield start, self._entries[start : min(start + _ENTRIES_AT_ONCE, stop)]

    def has_bits(self, mask: int) -> bool:
        """Whether any entry has one of these bits."""
        wanted = np.uint64(mask)
        return any(np.bitwise_or.reduce(entries) & wanted for _, entries in self.parts())

    def in_states(self, *states: BlockState) -> NDArray[np.bool_]:
        """One truth value per block: whether it is in one of these states, which are not NOT_PRESENT."""
        found = np.zeros(self.shape.block_count, dtype=np.bool_)
        for start, entries in self.parts():
            here = states_of(entries)
            chosen = here == states[0]
            for state in states[1:]:
                chosen |= here == state
            if chosen.any():
                self._put_by_block(found, start, chosen)
        return found

    def _put_by_block(self, found: NDArray[np.bool_], start: int, chosen: NDArray[np.bool_]) -> None:
        """Put truth values of entries from `start` on where those of their blocks are; bitmaps have none."""
        ratio, stop = self.shape.ratio, start + len(chosen)
        chunk, within = divmod(start, ratio + 1)
        last = min(stop // (ratio + 1), self.shape.block_count // ratio)  # the chunks before it end in this part
        whole = chunk + (within > 0)
        if whole < last:
            rows = chosen[whole * (ratio + 1) - start : last * (ratio + 1) - start].reshape(-1, ratio + 1)
            found[whole * ratio : last * ratio].reshape(-1, ratio)[:] = rows[:, :ratio]
        for one in {chunk, *range(max(last, chunk), -(-stop // (ratio + 1)))} - set(range(whole, last)):
            low, high = max(one * (ratio + 1), start), min((one + 1) * (ratio + 1) - 1, stop)
            first = low - one  # the block: before it stand the entries of so many bitmaps
            part = chosen[low - start : high - start][: max(self.shape.block_count - first, 0)]
            found[first : first + len(part)] = part


class BatInFile(Bat):
    """The table of an image that is only read, left in its file; the pages that are asked for are kept for a while."""

    def __init__(self, store: ReadStore, bat: Bat) -> None:
        super().__init__(bat.shape, bat.offset_bytes, np.zeros(0, dtype=np.uint64), [])
        self._store = store
        self._pages: dict[int, memoryview] = {}

    def entry(self, entry_index: int) -> int:
        """See `Bat.entry`."""
        number, within = divmod(entry_index, ENTRIES_PER_PAGE)
        page = self._pages.get(number)
        if page is None:
            buffer = bytearray(layout.LOG_PAGE_SIZE)  # a file that was cut since reads as zeros
            self._store.pread_into(self.offset_bytes + number * layout.LOG_PAGE_SIZE, memoryview(buffer))
            page = memoryview(np.frombuffer(buffer, dtype="<u8").astype(np.uint64))  # type: ignore[arg-type]
            if len(self._pages) >= _MAX_PAGES:
                self._pages.clear()
            self._pages[number] = page
        return page[within]

    def known_entry(self, entry_index: int) -> int | None:
        """See `Bat.known_entry`."""
        number, within = divmod(entry_index, ENTRIES_PER_PAGE)
        page = self._pages.get(number)
        if page is not None:
            return page[within]
        self._store.prefetch(self.offset_bytes + number * layout.LOG_PAGE_SIZE, layout.LOG_PAGE_SIZE)
        return None

    def block(self, block_index: int) -> int:
        """See `Bat.block`."""
        return self.entry(self.shape.block_entry(block_index))

    def used(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint64]]]:
        """See `Bat.used`: reads the whole table."""
        yield from Bat.load(self._store, self.offset_bytes, self.shape).used()

    def parts(self) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        """See `Bat.parts`: reads the whole table."""
        yield from Bat.load(self._store, self.offset_bytes, self.shape).parts()


def full_entries(
    shape: Shape, numbers: range, block_size: int, *, first_block: int, offset_bytes: int
) -> NDArray[np.uint64]:
    """The entries with these numbers where all blocks from `first_block` on lie one after the other, from an offset.

    They are fully present; the entries of blocks before and of bitmaps are 0.
    """
    indices = np.arange(numbers.start, numbers.stop, dtype=np.int64)
    blocks, within = np.divmod(indices, shape.ratio + 1)
    blocks = blocks * shape.ratio + within
    entries = (offset_bytes + (blocks - first_block) * block_size) | BlockState.FULLY_PRESENT
    entries[(within == shape.ratio) | (blocks < first_block) | (blocks >= shape.block_count)] = 0
    return entries.astype(np.uint64)


def offset_of(entry: int) -> int:
    """The place in the file that an entry names, in bytes."""
    return entry & layout.BAT_OFFSET_MASK


def state_of(entry: int) -> int:
    """The state that an entry names, one of `BlockState` or a reserved number."""
    return entry & layout.BAT_STATE_MASK


def states_of(entries: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """The states that entries name, in an array of their own."""
    return (entries & np.uint64(layout.BAT_STATE_MASK)).astype(np.uint8)
