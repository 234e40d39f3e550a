# SPDX-License-Identifier: Apache-2.0
"""The flattened map: for every grain of the disk, which file serves it and where. Read cost is independent of depth.

Decides which layer owns a sector in a whole chain (`INV-SECTOR-RULE`) and caches that. Must not read or write data.

    layers' BATs --fold--> one 64-bit entry per grain:  DIRECT  store offset << 8 | layer's number (one file)
                                                        ZERO    no layer owns it
                                                        UNKNOWN not examined yet; settled on first use
                                                        MIXED   several layers: one owner byte per sector

A grain is the smallest block size in the chain. Folding is one vectorised pass per layer; bitmaps are read only
when a grain is first used. Owner bytes are kept in a bounded cache and can always be recomputed. In both tables a
layer's number is its index plus one, so that an entry of a grain that no layer owns is 0: the system gives memory only
for the parts of a table that are written, and a disk of 64 TiB that is empty takes next to none.

Small reads have a shortcut: the fine table, with an entry per 4 KiB page (on large disks per larger unit, so that
its size is bounded), filled in when a grain is settled. File systems write pages, so a page nearly always has one
owner even if its grain has a hundred, and a read costs the same in a deep chain.
`INV-MAP-EQUALS-WALK`: the map agrees with walking the layers sector by sector.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vhdkit.at_once import taken
from vhdkit.image import ZEROS_WITHOUT_SPACE, Layer
from vhdkit.units import MIB, PAGE_SIZE, SECTOR_SIZE, whole_sectors

LAYER_BITS = 8
LAYER_MASK = (1 << LAYER_BITS) - 1
UNOWNED = LAYER_MASK  # the owner byte of a sector that no layer owns; it reads as zeros
MAX_LAYERS = UNOWNED - 1  # a layer's number fits into a byte
LEAF_NUMBER = 1
ZERO, UNKNOWN, MIXED = 0, -1, -2  # a DIRECT entry is above 0
MAX_FINE_ENTRIES = 4 * MIB  # 32 MiB of table; disks up to 16 GiB have an entry for each page
MAX_MIXED_BYTES = 64 * MIB  # of owner bytes in the cache
_BLOCKS_AT_ONCE = 1 << 16  # examined in one vectorised step, so that little memory is needed for it
WALK_MIXED_BYTES = 4 * MIB  # the same for callers that walk the disk once, from start to end


@dataclass(frozen=True, slots=True)
class MixedGrain:
    """A grain with several owners: one owner byte per sector, and where the grain lies in each file (or -1)."""

    owners: bytearray
    offsets: tuple[int, ...]


class BlockMap:
    """The map over `layers`, leaf first. Look-ups need no lock; changes go through `own`."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        block_sizes = [layer.block_size_bytes for layer in layers if layer.block_size_bytes]
        size_bytes = layers[0].size_bytes
        grain_bytes = min(block_sizes) if block_sizes else 1 << (size_bytes - 1).bit_length()
        self.grain_bytes = max(grain_bytes, SECTOR_SIZE)
        self.grain_shift = self.grain_bytes.bit_length() - 1
        self.grain_sectors = whole_sectors(self.grain_bytes)
        self.grain_count = -(-size_bytes // self.grain_bytes)
        # The part of each layer visible through those above it: a smaller one in between hides what lies past its end.
        seen, visible = size_bytes, []
        for layer in layers:
            seen = min(seen, layer.size_bytes)
            visible.append(seen)
        self.visible_bytes = tuple(visible)
        self._table = self._fold()
        self.entries = memoryview(self._table)  # type: ignore[arg-type]  # its scalars are plain ints, and fast
        self.known: dict[int, MixedGrain] = {}  # the cache of MIXED grains
        self._known_limit = max(1, MAX_MIXED_BYTES // self.grain_sectors)
        self._lock = threading.Lock()
        fine_bytes = PAGE_SIZE if block_sizes else self.grain_bytes
        while -(-size_bytes // fine_bytes) > MAX_FINE_ENTRIES:
            fine_bytes *= 2
        self.fine_bytes = min(fine_bytes, self.grain_bytes)
        self._fine = np.zeros(self.grain_count * self.grain_bytes // self.fine_bytes, dtype=np.int64)
        self.fine = memoryview(self._fine)  # type: ignore[arg-type]
        per_grain = self.grain_bytes // self.fine_bytes
        step = self.fine_bytes << LAYER_BITS if per_grain > 1 else 0  # a lone raw file may claim exabytes
        self._fine_steps = np.arange(per_grain, dtype=np.int64) * step
        self._is_walked_once = False
        if not block_sizes:
            self._refine_whole(0, LEAF_NUMBER)

    def walked_once(self) -> None:
        """Cache few owner bytes and fill in no fine entries, because no grain will be read twice."""
        self._known_limit = max(1, WALK_MIXED_BYTES // self.grain_sectors)
        self._is_walked_once = True

    def _fold(self) -> NDArray[np.int64]:
        """UNKNOWN where a sparse layer has a block, the base's offset where it is linear, else ZERO.

        A block of zeros without space counts as one where it hides something, so everywhere but in the base.
        """
        table = np.zeros(self.grain_count, dtype=np.int64)  # all ZERO
        base, visible = self.layers[-1], self.visible_bytes[-1]
        if not base.block_size_bytes:
            whole = visible // self.grain_bytes
            if visible == self.visible_bytes[0]:  # the disk ends in the last grain: nothing past its end is read
                whole = self.grain_count
            table[:whole] = (np.arange(whole, dtype=np.int64) << (self.grain_shift + LAYER_BITS)) | len(self.layers)
            if whole * self.grain_bytes < visible:
                table[whole] = UNKNOWN
        for layer, size_bytes in zip(self.layers, self.visible_bytes, strict=True):
            if layer.block_size_bytes:
                grains = -(-size_bytes // self.grain_bytes)
                ratio = layer.block_size_bytes // self.grain_bytes
                self._mark(table[:grains], layer.allocated_blocks(), ratio)
                if layer is not base:
                    self._mark(table[:grains], layer.zero_blocks(), ratio)
        return table

    @staticmethod
    def _mark(table: NDArray[np.int64], chosen: NDArray[np.bool_], ratio: int) -> None:
        """Make the grains of the chosen blocks UNKNOWN, `ratio` grains each, without touching those of others."""
        for first in range(0, len(chosen), _BLOCKS_AT_ONCE):
            blocks = np.flatnonzero(chosen[first : first + _BLOCKS_AT_ONCE]) + first
            if not len(blocks):
                continue
            grains = blocks if ratio == 1 else (blocks[:, None] * ratio + np.arange(ratio)).reshape(-1)
            table[grains[: int(np.searchsorted(grains, len(table)))]] = UNKNOWN

    def settle(self, grain: int) -> int:
        """Determine the owners of an UNKNOWN grain; returns its new entry."""
        with taken(self._lock):
            entry = self._sole_owner(grain)
            if entry > 0:
                if not self._is_walked_once:
                    self._refine_whole(grain, entry)
            else:
                owners, offsets = self._owners_of(grain)
                entry = self._entry_for(grain, owners, offsets)
                if entry == MIXED:
                    self._remember(grain, MixedGrain(owners, offsets))
                if not self._is_walked_once:
                    self._refine(grain, owners, offsets, 0, self.grain_sectors)
            self.entries[grain] = entry
            return entry

    def _sole_owner(self, grain: int) -> int:
        """The entry if the first layer with anything in the grain owns all of it, the usual case; else UNKNOWN."""
        start_bytes = grain << self.grain_shift
        end_bytes = start_bytes + self.grain_bytes
        for index, layer in enumerate(self.layers):
            if self.visible_bytes[index] < end_bytes:
                return UNKNOWN
            owned, offset = self._owned_by(layer, start_bytes)
            if offset == ZEROS_WITHOUT_SPACE:
                return UNKNOWN
            if offset >= 0:
                whole = owned is None and layer.data_end_bytes >= offset + self.grain_bytes
                return offset << LAYER_BITS | index + 1 if whole else UNKNOWN
        return UNKNOWN

    def _refine_whole(self, grain: int, entry: int) -> None:
        """Fill in the fine entries of a grain with a single owner."""
        per_grain = len(self._fine_steps)
        self._fine[grain * per_grain : (grain + 1) * per_grain] = self._fine_steps + entry

    def _refine(self, grain: int, owners: bytearray, offsets: tuple[int, ...], first: int, count: int) -> None:
        """Fill in the fine entries over these sectors of the grain: store offset << 8 | the layer's number, or 0."""
        per_entry = whole_sectors(self.fine_bytes)
        low, high = first // per_entry, -(-(first + count) // per_entry)
        rows = np.frombuffer(owners, dtype=np.uint8).reshape(-1, per_entry)[low:high]
        owner = rows[:, 0]
        places = np.array([*offsets, *[0] * (UNOWNED + 1 - len(offsets))], dtype=np.int64)[owner]
        places += np.arange(low, high, dtype=np.int64) * self.fine_bytes
        known = (rows == rows[:, :1]).all(axis=1) & (owner != UNOWNED)
        start = grain * (self.grain_bytes // self.fine_bytes)
        self._fine[start + low : start + high] = np.where(known, places << LAYER_BITS | (owner + 1), 0)

    def mixed(self, grain: int) -> MixedGrain:
        """The owners of a MIXED grain, recomputed if the cache has dropped them."""
        known = self.known.get(grain)
        if known is not None:
            return known
        with taken(self._lock):
            owners, offsets = self._owners_of(grain)
            made = MixedGrain(owners, offsets)
            self._remember(grain, made)
            return made

    def _remember(self, grain: int, made: MixedGrain) -> None:
        while len(self.known) >= self._known_limit:
            self.known.pop(next(iter(self.known)))
        self.known[grain] = made

    def own(self, first_sector: int, sector_count: int) -> None:
        """The leaf has reported that it owns this run now: update what has changed."""
        first = first_sector // self.grain_sectors
        last = (first_sector + sector_count - 1) // self.grain_sectors
        with self._lock:
            for grain in range(first, last + 1):
                if self.entries[grain] != MIXED:
                    self._forget(grain)
                    continue
                known = self.known.get(grain)
                start = max(first_sector - grain * self.grain_sectors, 0)
                stop = min(first_sector + sector_count - grain * self.grain_sectors, self.grain_sectors)
                if known is not None and known.offsets[0] >= 0 and stop - start < self.grain_sectors:
                    known.owners[start:stop] = bytes(stop - start)
                    self._refine(grain, known.owners, known.offsets, start, stop - start)
                else:
                    self._forget(grain)

    def forget(self, first_sector: int, sector_count: int) -> None:
        """The leaf may own some of this run now: settle it again. What a linear leaf owns never changes."""
        if self.layers[0].block_size_bytes:
            last = (first_sector + sector_count - 1) // self.grain_sectors
            with self._lock:
                for grain in range(first_sector // self.grain_sectors, last + 1):
                    self._forget(grain)

    def _forget(self, grain: int) -> None:
        """Make the grain UNKNOWN, to be settled again."""
        self.entries[grain] = UNKNOWN
        self.known.pop(grain, None)
        per_grain = self.grain_bytes // self.fine_bytes
        self._fine[grain * per_grain : (grain + 1) * per_grain] = 0

    def _owners_of(self, grain: int) -> tuple[bytearray, tuple[int, ...]]:
        """Walk the layers for one grain: the owner of each sector, and the grain's offset in each file (-1: none)."""
        owners = np.full(self.grain_sectors, UNOWNED, dtype=np.uint8)
        open_sectors = np.ones(self.grain_sectors, dtype=np.bool_)
        start_bytes = grain << self.grain_shift
        offsets = [-1] * len(self.layers)
        for index, layer in enumerate(self.layers):
            seen = whole_sectors(self.visible_bytes[index] - start_bytes)
            if seen < self.grain_sectors:
                open_sectors[max(seen, 0) :] = False
            if not open_sectors.any():
                break
            owned, offset = self._owned_by(layer, start_bytes)
            if offset == ZEROS_WITHOUT_SPACE:
                break  # what lies deeper is hidden: the rest of the grain is zeros, of no layer
            if offset < 0:
                continue
            offsets[index] = offset
            taken = open_sectors if owned is None else open_sectors & owned
            stored = (layer.data_end_bytes - offset) // SECTOR_SIZE
            if stored < self.grain_sectors:  # a block cut short by the end of the file: owned, zeros from there on
                open_sectors = open_sectors & ~taken
                taken = taken.copy()
                taken[max(stored, 0) :] = False
            owners[taken] = index
            open_sectors = open_sectors & ~taken
        return bytearray(owners.tobytes()), tuple(offsets)

    def _owned_by(self, layer: Layer, start_bytes: int) -> tuple[NDArray[np.bool_] | None, int]:
        """The layer's owned sectors within the grain (None: all), and the grain's offset in its file, -1 or -2."""
        if not layer.block_size_bytes:
            return None, start_bytes
        block, within = divmod(start_bytes, layer.block_size_bytes)
        offset = layer.block_offset(block)
        if offset < 0:
            return None, offset
        owned = layer.owned_sectors(block)
        if owned is not None and layer.block_size_bytes != self.grain_bytes:
            first = whole_sectors(within)
            owned = owned[first : first + self.grain_sectors]
        return owned, offset + within

    def _entry_for(self, grain: int, owners: bytearray, offsets: tuple[int, ...]) -> int:
        """A single entry that describes the grain, if one can; sectors past the end of the disk do not matter."""
        inside = min(self.grain_sectors, whole_sectors(self.visible_bytes[0] - (grain << self.grain_shift)))
        first = owners[0]
        if owners.count(first, 0, inside) != inside:
            return MIXED
        return ZERO if first == UNOWNED else offsets[first] << LAYER_BITS | first + 1


def owner_runs(owners: bytearray, first: int, count: int) -> list[tuple[int, int, int]]:
    """Runs of sectors with one owner as (first, count, owner), in order, within `count` sectors from `first`."""
    # A copy: a writer may change the owners meanwhile, and a run must not get the owner of only a part of it.
    piece = np.frombuffer(owners[first : first + count], dtype=np.uint8)
    edges = (np.flatnonzero(piece[1:] != piece[:-1]) + 1).tolist()
    starts = [0, *edges]
    ends = [*edges, count]
    return [(first + a, b - a, int(piece[a])) for a, b in zip(starts, ends, strict=True)]
