# SPDX-License-Identifier: Apache-2.0
"""A chain of open layers as one disk of sectors.

Decides by the map which file serves a request, and passes writes to the leaf, the only layer that is written to
(`INV-LEAF-ONLY-WRITES`). Never sees partial sectors (`disk` splits them off) and must not know any format.

A read within one grain that lies in one file is one look-up and one `preadv` into the caller's buffer, at any
depth of the chain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Self, TypeAlias

import numpy as np

from vhdkit.arguments import AnyPath
from vhdkit.arrival import Arrivals
from vhdkit.chain.engine.blockmap import (
    LAYER_BITS,
    LAYER_MASK,
    LEAF_NUMBER,
    MAX_LAYERS,
    MIXED,
    UNKNOWN,
    UNOWNED,
    ZERO,
    BlockMap,
    owner_runs,
)
from vhdkit.chain.engine.hiding import zeros_to_write
from vhdkit.chain.names.opening import limit_tables, open_layers
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.records.pending import file_of
from vhdkit.image import Extent, ExtentKind, Layer, merged_extents
from vhdkit.local_volume import LOCAL
from vhdkit.store import FileStore
from vhdkit.units import SECTOR_SIZE, covering_sectors, sectors_to_bytes, whole_sectors
from vhdkit.volume import Volume

Progress: TypeAlias = Callable[[int, int], None]  # called with (bytes done, bytes in all) during long work

_GRAINS_AT_ONCE = 1 << 16  # of the map, examined in one vectorised step when listing extents


class Chain:
    """Open layers, leaf first. One writer at a time; readers need no lock. `close` closes every layer."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        assert 0 < len(layers) <= MAX_LAYERS and all(not layer.writable for layer in layers[1:])
        self.layers = tuple(layers)
        limit_tables(layers)
        self.leaf = layers[0]
        self.size_bytes = self.leaf.size_bytes
        self.writable = self.leaf.writable
        self.map = BlockMap(layers)
        self._readers = tuple(layer.store.pread_into for layer in layers)
        self._entries = self.map.entries
        self._grain_shift = self.map.grain_shift
        self._grain_bytes = self.map.grain_bytes
        self._grain_mask = self.map.grain_bytes - 1
        self._readers_by_number = (self._readers[0], *self._readers)  # the map numbers layers from 1
        tries = tuple(layer.store.try_pread_into for layer in layers)
        self._tries_by_number = (tries[0], *tries)
        files = tuple(layer.store if type(layer.store) is FileStore else None for layer in layers)  # else it is a view
        self._files_by_number = (files[0], *files)
        self.is_of_files = None not in files
        self._fine = self.map.fine
        self._fine_bytes = self.map.fine_bytes
        self._fine_mask = self.map.fine_bytes - 1
        self._fine_shift = self._fine_mask.bit_length()

    @classmethod
    def open(
        cls, path: AnyPath, *, writable: bool = False, options: OpenOptions | None = None, volume: Volume = LOCAL
    ) -> Chain:
        """Open a leaf and its parents. Raises what `opening.open_layers` raises."""
        return cls(open_layers(path, writable=writable, options=options, volume=volume))

    # -- reading ------------------------------------------------------------------------------------------------

    def read_into(self, sector_index: int, buffer: memoryview) -> None:
        """Fill `buffer`, whole sectors, from `sector_index` on; the range lies inside the disk. Raises IoFailed."""
        offset = sectors_to_bytes(sector_index)
        size = len(buffer)
        within = offset & self._fine_mask
        if within + size <= self._fine_bytes:
            entry = self._fine[offset >> self._fine_shift]
            if entry:
                self._readers_by_number[entry & LAYER_MASK]((entry >> LAYER_BITS) + within, buffer)
                return
        within = offset & self._grain_mask
        if within + size <= self._grain_bytes:
            entry = self._entries[offset >> self._grain_shift]
            if entry > 0:
                self._readers_by_number[entry & LAYER_MASK]((entry >> LAYER_BITS) + within, buffer)
                return
        self._read_slowly(offset, buffer)

    def try_read_into(self, sector_index: int, buffer: memoryview) -> bool:
        """Like `read_into` if no waiting for a device is needed; else returns False and leaves `buffer` undefined.

        For grains not yet settled, bitmaps may have to be read, so those are not tried.
        """
        offset = sectors_to_bytes(sector_index)
        size = len(buffer)
        within = offset & self._fine_mask
        if within + size <= self._fine_bytes:
            entry = self._fine[offset >> self._fine_shift]
            if entry:
                return self._tries_by_number[entry & LAYER_MASK]((entry >> LAYER_BITS) + within, buffer)
        return self._try_slowly(offset, buffer)

    def _try_slowly(self, offset: int, buffer: memoryview) -> bool:
        """Grain by grain, only over settled grains that have one owner or none."""
        position, size = 0, len(buffer)
        while position < size:
            within = (offset + position) & self._grain_mask
            count = min(size - position, self._grain_bytes - within)
            entry = self._entries[(offset + position) >> self._grain_shift]
            piece = buffer if count == size else buffer[position : position + count]
            if entry > 0:
                if not self._tries_by_number[entry & LAYER_MASK]((entry >> LAYER_BITS) + within, piece):
                    return False
            elif entry == ZERO:
                piece[:] = bytes(count)
            elif entry == UNKNOWN or not self._try_mixed((offset + position) >> self._grain_shift, within, piece):
                return False
            position += count
        return True

    def _try_mixed(self, grain: int, within: int, buffer: memoryview) -> bool:
        """A grain with several owners, if they are known and the range has few of them."""
        known = self.map.known.get(grain)
        if known is None:
            return False
        first = within // SECTOR_SIZE
        for run_first, run_count, owner in owner_runs(known.owners, first, len(buffer) // SECTOR_SIZE):
            start = sectors_to_bytes(run_first - first)
            piece = buffer[start : start + sectors_to_bytes(run_count)]
            if owner == UNOWNED:
                piece[:] = bytes(len(piece))
            elif not self._tries_by_number[owner + 1](known.offsets[owner] + sectors_to_bytes(run_first), piece):
                return False
        return True

    def file_run(self, sector_index: int, sector_count: int) -> tuple[FileStore, int, int] | None:
        """(file, offset, size) of what lies together at the beginning of a range; None if that is not known."""
        offset, size = sectors_to_bytes(sector_index), sectors_to_bytes(sector_count)
        within = offset & self._grain_mask
        entry, room = self._entries[offset >> self._grain_shift], self._grain_bytes - within
        file = self._files_by_number[entry & LAYER_MASK] if entry > 0 else None
        if file is None or file.uncached is not None:  # what is not to be cached must not be held by sockets, either
            return None
        return file, (entry >> LAYER_BITS) + within, min(room, size)

    # -- reading ahead ------------------------------------------------------------------------------------------

    def prefetch(self, sector_index: int, sector_count: int) -> bool:
        """Ask for the range, inside the disk, to be read ahead. False if it is not yet known where all of it lies.

        In that case what tells where is prefetched in place of the data: call `settle`, then this again. Never waits
        for a device. Raises IoFailed.
        """
        offset, size = sectors_to_bytes(sector_index), sectors_to_bytes(sector_count)
        is_known, run_layer, run_place, run_size = True, -1, 0, 0
        for layer, place, count in self._places(offset, size):
            if layer < 0:
                is_known = False
                self._prefetch_ownership(place)
            elif layer == run_layer and place == run_place + run_size:
                run_size += count
            else:
                if run_size:
                    self.layers[run_layer].store.prefetch(run_place, run_size)
                run_layer, run_place, run_size = layer, place, count
        if run_size:
            self.layers[run_layer].store.prefetch(run_place, run_size)
        return is_known

    def _places(self, offset: int, size: int) -> Iterator[tuple[int, int, int]]:
        """Where the range lies, in order, as (layer, offset in its file, size) of what is not zeros.

        A grain not settled yet is (-1, its number, 0).
        """
        end = offset + size
        while offset < end:
            within, grain = offset & self._grain_mask, offset >> self._grain_shift
            count = min(self._grain_bytes - within, end - offset)
            entry = self._entries[grain]
            known = self.map.known.get(grain) if entry == MIXED else None
            if entry < 0 and (known is None or count <= self._fine_bytes):  # less work for a small range
                fine_within = offset & self._fine_mask
                if fine := self._fine[offset >> self._fine_shift]:
                    entry, within = fine, fine_within
                    count = min(self._fine_bytes - fine_within, count)
                elif known is None:
                    yield -1, grain, 0
            if entry > 0:
                yield (entry & LAYER_MASK) - 1, (entry >> LAYER_BITS) + within, count
            elif known is not None:
                first = within // SECTOR_SIZE
                for start, sectors, owner in owner_runs(known.owners, first, count // SECTOR_SIZE):
                    if owner != UNOWNED:
                        yield owner, known.offsets[owner] + sectors_to_bytes(start), sectors_to_bytes(sectors)
            offset += count

    def _prefetch_ownership(self, grain: int) -> None:
        start = grain << self._grain_shift
        for layer, visible_bytes in zip(self.layers, self.map.visible_bytes, strict=True):
            if layer.block_size_bytes and start < visible_bytes:
                layer.prefetch_ownership(start // layer.block_size_bytes)

    def is_settled(self, sector_index: int, sector_count: int) -> bool:
        """True if it is known where the range lies, so that `prefetch` would return True."""
        offset, size = sectors_to_bytes(sector_index), sectors_to_bytes(sector_count)
        if (offset & self._fine_mask) + size <= self._fine_bytes and self._fine[offset >> self._fine_shift]:
            return True
        for grain in range(offset >> self._grain_shift, -(-(offset + size) >> self._grain_shift)):
            entry = self._entries[grain]
            if entry == UNKNOWN or (entry == MIXED and grain not in self.map.known):
                return False
        return True

    def settle(self, sector_index: int, sector_count: int) -> None:
        """Find out where the range lies, so that `prefetch` can ask for it. May wait. Raises IoFailed."""
        first, end = sectors_to_bytes(sector_index), sectors_to_bytes(sector_index + sector_count)
        for grain in range(first >> self._grain_shift, -(-end >> self._grain_shift)):
            entry = self._entries[grain]
            if entry == UNKNOWN:
                self.map.settle(grain)
            elif entry == MIXED:
                self.map.mixed(grain)

    def ask(self, sector_index: int, arrivals: Arrivals) -> int | None:
        """Ask for word when a sector can be read without waiting; None where there is none. Raises DiskClosed."""
        for layer, place, _ in self._places(sectors_to_bytes(sector_index), SECTOR_SIZE):
            file = file_of(self.layers[layer].store) if layer >= 0 else None
            return None if file is None else file.ask(place, arrivals)
        return None

    # -- what is known ------------------------------------------------------------------------------------------

    def known_holes(self, sector_index: int, sector_count: int) -> list[tuple[int, int, bool]]:
        """The range as (first sector, count, True if no layer owns it), from whole settled grains; reads nothing."""
        first = sectors_to_bytes(sector_index) >> self._grain_shift
        last = (sectors_to_bytes(sector_index + sector_count) - 1) >> self._grain_shift
        holes = np.asarray(self._entries[first : last + 1]) == ZERO
        edges = (np.flatnonzero(holes[1:] != holes[:-1]) + 1).tolist()
        runs, end, grain_sectors = [], sector_index + sector_count, self.map.grain_sectors
        for start, stop in zip((0, *edges), (*edges, len(holes)), strict=True):
            begin = max((first + start) * grain_sectors, sector_index)
            runs.append((begin, min((first + stop) * grain_sectors, end) - begin, bool(holes[start])))
        return runs

    def has_known_holes(self, sector_index: int, sector_count: int) -> bool:
        """True if `known_holes` would find one."""
        first = sectors_to_bytes(sector_index) >> self._grain_shift
        last = (sectors_to_bytes(sector_index + sector_count) - 1) >> self._grain_shift
        return ZERO in self._entries[first : last + 1].tolist()

    def _read_slowly(self, offset: int, buffer: memoryview) -> None:
        """Grain by grain; adjacent grains that are contiguous in one file are read together."""
        position, size = 0, len(buffer)
        run_layer, run_offset, run_start = -1, 0, 0  # a run of DIRECT grains not yet read
        while position < size:
            grain, within = (offset + position) >> self._grain_shift, (offset + position) & self._grain_mask
            count = min(size - position, self._grain_bytes - within)
            entry = self._entries[grain]
            if entry == UNKNOWN:
                entry = self.map.settle(grain)
            if entry > 0:
                layer, place = (entry & LAYER_MASK) - 1, (entry >> LAYER_BITS) + within
                if layer != run_layer or place != run_offset + position - run_start:
                    if run_layer >= 0:
                        self._readers[run_layer](run_offset, buffer[run_start:position])
                    run_layer, run_offset, run_start = layer, place, position
            else:
                if run_layer >= 0:
                    self._readers[run_layer](run_offset, buffer[run_start:position])
                    run_layer = -1
                if entry == ZERO:
                    buffer[position : position + count] = bytes(count)
                else:
                    self._read_mixed(grain, within, buffer[position : position + count])
            position += count
        if run_layer >= 0:
            self._readers[run_layer](run_offset, buffer[run_start:position])

    def _read_mixed(self, grain: int, within: int, buffer: memoryview) -> None:
        """A grain with several owners: one read for each run with one owner."""
        known = self.map.mixed(grain)
        first, count = within // SECTOR_SIZE, len(buffer) // SECTOR_SIZE
        owner = known.owners[first]
        if known.owners.count(owner, first, first + count) == count:
            runs = [(first, count, owner)]
        else:
            runs = owner_runs(known.owners, first, count)
        for run_first, run_count, owner in runs:
            start = sectors_to_bytes(run_first - first)
            piece = buffer[start : start + sectors_to_bytes(run_count)]
            if owner == UNOWNED:
                piece[:] = bytes(len(piece))
            else:
                self._readers[owner](known.offsets[owner] + sectors_to_bytes(run_first), piece)

    # -- what lies where ----------------------------------------------------------------------------------------

    def extents(self, sector_index: int, sector_count: int, *, find_holes: bool = False) -> Iterator[Extent]:
        """The range as runs, in order, without gaps, none ABSENT.

        `layer_index` is the owner, -1 if no layer owns the run. With `find_holes` an owned run that is a hole
        in its file is reported as ZERO of that layer.
        """
        runs = self._extents(sector_index, sector_count)
        if find_holes:
            seen: dict[int, tuple[int, int, bool]] = {}
            runs = (part for run in merged_extents(runs) for part in self._holes(run, seen))
        return merged_extents(runs)

    def _extents(self, sector_index: int, sector_count: int) -> Iterator[Extent]:
        end = sector_index + sector_count
        grain_sectors = self.map.grain_sectors
        position = sector_index
        last_grain = -(-end // grain_sectors)
        for first in range(sector_index // grain_sectors, last_grain, _GRAINS_AT_ONCE):
            piece = np.asarray(self._entries[first : min(first + _GRAINS_AT_ONCE, last_grain)])
            for grain in (np.flatnonzero(piece != ZERO) + first).tolist():
                start, stop = max(grain * grain_sectors, sector_index), min((grain + 1) * grain_sectors, end)
                if start > position:
                    yield Extent(position, start - position, ExtentKind.ZERO, -1)
                yield from self._grain_extents(grain, start, stop)
                position = stop
        if position < end:
            yield Extent(position, end - position, ExtentKind.ZERO, -1)

    def _grain_extents(self, grain: int, start: int, stop: int) -> Iterator[Extent]:
        entry = self._entries[grain]
        if entry == UNKNOWN:
            entry = self.map.settle(grain)
        grain_first = grain * self.map.grain_sectors
        if entry == ZERO:
            yield Extent(start, stop - start, ExtentKind.ZERO, -1)
        elif entry == MIXED:
            known = self.map.mixed(grain)
            for first, count, owner in owner_runs(known.owners, start - grain_first, stop - start):
                if owner == UNOWNED:
                    yield Extent(grain_first + first, count, ExtentKind.ZERO, -1)
                else:
                    place = known.offsets[owner] + sectors_to_bytes(first)
                    yield Extent(grain_first + first, count, ExtentKind.DATA, owner, place)
        else:
            place = (entry >> LAYER_BITS) + sectors_to_bytes(start - grain_first)
            yield Extent(start, stop - start, ExtentKind.DATA, (entry & LAYER_MASK) - 1, place)

    def _holes(self, extent: Extent, seen: dict[int, tuple[int, int, bool]]) -> Iterator[Extent]:
        """Split a DATA run at the holes of its file; a sector with any data in it is data.

        `seen` holds, for each layer, the run of its file that was looked up last: finding the end of a long one
        takes the file system a while, and all of a chain's runs may lie in it.
        """
        if extent.store_offset_bytes is None:
            yield extent
            return
        index, base, position = extent.layer_index, extent.store_offset_bytes, 0
        while position < extent.sector_count:
            at = base + sectors_to_bytes(position)
            start, end, is_data = seen.get(index, (0, 0, False))
            if not start <= at < end:
                start, end, is_data = seen[index] = self._file_run(index, at)
            stop = min(covering_sectors(end - base) if is_data else (end - base) // SECTOR_SIZE, extent.sector_count)
            if stop == position:  # a hole that ends inside this sector
                stop, is_data = position + 1, True
            kind = ExtentKind.DATA if is_data else ExtentKind.ZERO
            yield Extent(extent.sector_index + position, stop - position, kind, index, at if is_data else None)
            position = stop

    def _file_run(self, layer_index: int, offset_bytes: int) -> tuple[int, int, bool]:
        """(start, end, may hold data) of the run of the layer's file at that offset; past its end, a hole."""
        store = self.layers[layer_index].store
        size_bytes = max(store.size() - offset_bytes, SECTOR_SIZE)
        offset, size, is_data = next(iter(store.data_runs(offset_bytes, size_bytes)))
        return offset, offset + size, is_data

    # -- writing ------------------------------------------------------------------------------------------------

    def write(self, sector_index: int, data: memoryview) -> None:
        """Write whole sectors to the leaf. Raises NoSpace, IoFailed, SyncFailed."""
        try:
            if self.leaf.write(sector_index, data):
                self.map.own(sector_index, whole_sectors(len(data)))
            else:  # the leaf owned all of it already: settle the grain, for `write_in_place`
                grain = sectors_to_bytes(sector_index) >> self._grain_shift
                if self._entries[grain] == UNKNOWN:
                    self.map.settle(grain)
        except BaseException:  # the leaf may own part of the run now, and a retry would not report that again
            self.map.forget(sector_index, whole_sectors(len(data)))
            raise

    def write_in_place(self, sector_index: int, data: memoryview) -> bool:
        """Overwrite whole sectors known to be contiguous in the leaf; otherwise return False, having done nothing.

        Only data changes: no bit, no BAT entry, no map. Raises IoFailed, SyncFailed.
        """
        offset = sectors_to_bytes(sector_index)
        within = offset & self._fine_mask
        if within + len(data) > self._fine_bytes:
            within = offset & self._grain_mask
            if within + len(data) > self._grain_bytes:
                return False
            entry = self._entries[offset >> self._grain_shift]
        else:
            entry = self._fine[offset >> self._fine_shift]
        if entry & LAYER_MASK != LEAF_NUMBER:  # only a DIRECT entry can have this number
            return False
        self.leaf.write_in_place((entry >> LAYER_BITS) + within, data)
        return True

    def write_zeroes(self, sector_index: int, sector_count: int) -> None:
        """Make a run read as zeros, hiding the parents' data. Raises NoSpace, IoFailed, SyncFailed."""
        try:
            for first, count in zeros_to_write(self.layers, sector_index, sector_count):
                if self.leaf.write_zeroes(first, count):
                    self.map.own(first, count)
        except BaseException:
            self.map.forget(sector_index, sector_count)
            raise

    def trim(self, sector_index: int, sector_count: int) -> None:
        """Release the leaf's space: what it owns of the run reads as zeros, the rest is left as it is."""
        self.leaf.trim(sector_index, sector_count)

    def flush(self) -> None:
        """Return when every completed write is on the device. Raises SyncFailed, NoSpace, IoFailed."""
        self.leaf.flush()

    def close(self) -> None:
        """Flush and close every layer, the leaf first. All are closed even when the flush fails."""
        try:
            self.leaf.close()
        finally:
            for layer in self.layers[1:]:
                layer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
