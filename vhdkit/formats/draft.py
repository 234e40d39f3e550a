# SPDX-License-Identifier: Apache-2.0
"""A file with changes that have not been written yet: what a repair would write.

Decides nothing about images. Code that repairs a store repairs a draft instead. The result is examined, and then
written into the file as one change, or discarded. See `store.Store`.
"""

from __future__ import annotations

from collections.abc import Iterator

from vhdkit import errors
from vhdkit.store import Buffer, Store, copy_bytes
from vhdkit.units import MIB, SECTOR_SIZE, covering_sectors, round_down, round_up

MAX_DRAFT_BYTES = 48 * MIB  # of changed sectors in memory: the largest BAT is 16 MiB
_MAX_SIZE = 1 << 62


class DraftStore:
    """`store` as it would be. Changed sectors are held in memory; the file is only read."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._below = store.size()  # how much of the file below still shows
        self._size = self._below
        self._sectors: dict[int, bytes] = {}

    @property
    def name(self) -> str:
        """See `Store.name`: that of the file."""
        return self._store.name

    def size(self) -> int:
        """See `Store.size`."""
        return self._size

    def pread(self, offset_bytes: int, size_bytes: int) -> bytes:
        """See `Store.pread`."""
        buffer = bytearray(max(0, min(size_bytes, self._size - offset_bytes)))
        self.pread_into(offset_bytes, memoryview(buffer))
        return bytes(buffer)

    def pread_into(self, offset_bytes: int, buffer: memoryview) -> None:
        """See `Store.pread_into`."""
        inside = max(0, min(len(buffer), self._below - offset_bytes))
        buffer[inside:] = bytes(len(buffer) - inside)
        if inside:
            self._store.pread_into(offset_bytes, buffer[:inside])
        end = offset_bytes + len(buffer)
        for index in self._touched(offset_bytes, end):
            place = index * SECTOR_SIZE
            low, high = max(place, offset_bytes), min(place + SECTOR_SIZE, end)
            buffer[low - offset_bytes : high - offset_bytes] = self._sectors[index][low - place : high - place]

    def try_pread_into(self, offset_bytes: int, buffer: memoryview) -> bool:
        """See `Store.try_pread_into`: never tried, a draft is not served."""
        return False

    def punches(self) -> bool:
        """See `Store.punches`."""
        return False

    def _touched(self, start: int, stop: int) -> list[int]:
        """The changed sectors that share bytes with a range."""
        if stop <= start:
            return []
        wanted = range(start // SECTOR_SIZE, covering_sectors(stop))
        if len(wanted) < len(self._sectors):
            return [index for index in wanted if index in self._sectors]
        return [index for index in self._sectors if index in wanted]

    def pwrite(self, offset_bytes: int, data: Buffer) -> None:
        """See `Store.pwrite`. Raises InvalidArgument when the draft becomes too large."""
        if not len(data):
            return
        start = round_down(offset_bytes, SECTOR_SIZE)
        end = offset_bytes + len(data)
        self._refuse_size(end)
        fresh = len(range(start // SECTOR_SIZE, covering_sectors(end))) - len(self._touched(start, end))
        if (len(self._sectors) + fresh) * SECTOR_SIZE > MAX_DRAFT_BYTES:
            raise errors.InvalidArgument("too much would have to change at once", path=self.name)
        raw = bytearray(round_up(end, SECTOR_SIZE) - start)
        self.pread_into(start, memoryview(raw))
        raw[offset_bytes - start : end - start] = bytes(data)
        for position in range(0, len(raw), SECTOR_SIZE):
            self._sectors[(start + position) // SECTOR_SIZE] = bytes(raw[position : position + SECTOR_SIZE])
        self._size = max(self._size, end)

    def _refuse_size(self, size_bytes: int) -> None:
        if size_bytes > _MAX_SIZE:
            raise errors.NoSpace("the file would become too long", path=self.name)

    def punch(self, offset_bytes: int, size_bytes: int) -> None:
        """See `Store.punch`: zeros, where there are none yet."""
        size_bytes = min(size_bytes, self._size - offset_bytes)
        for offset, size, is_data in list(self.data_runs(offset_bytes, max(size_bytes, 0))):
            for position in range(offset, offset + size, MIB) if is_data else ():
                piece = self.pread(position, min(MIB, offset + size - position))
                if piece.count(0) != len(piece):
                    self.pwrite(position, bytes(len(piece)))

    def reserve(self, offset_bytes: int, size_bytes: int) -> None:
        """See `Store.reserve`: nothing is set aside yet."""
        if size_bytes > 0:
            self._refuse_size(offset_bytes + size_bytes)
            self._size = max(self._size, offset_bytes + size_bytes)

    def copy_from(self, source: Store, source_offset_bytes: int, offset_bytes: int, size_bytes: int) -> None:
        """See `Store.copy_from`."""
        copy_bytes(source, source_offset_bytes, self, offset_bytes, size_bytes)

    def truncate(self, size_bytes: int) -> None:
        """See `Store.truncate`."""
        self._refuse_size(size_bytes)
        if size_bytes < self._size:
            if size_bytes % SECTOR_SIZE and size_bytes // SECTOR_SIZE in self._sectors:
                last = self._sectors[size_bytes // SECTOR_SIZE]
                self._sectors[size_bytes // SECTOR_SIZE] = last[: size_bytes % SECTOR_SIZE].ljust(SECTOR_SIZE, b"\0")
            for index in [index for index in self._sectors if index * SECTOR_SIZE >= size_bytes]:
                del self._sectors[index]
            self._below = min(self._below, size_bytes)
        self._size = size_bytes

    def sync(self) -> None:
        """See `Store.sync`: there is nothing to wait for."""

    def data_runs(self, offset_bytes: int, size_bytes: int) -> Iterator[tuple[int, int, bool]]:
        """See `Store.data_runs`: changed sectors may hold data."""
        position, end = offset_bytes, offset_bytes + size_bytes
        for index in sorted(self._touched(position, end)):
            start, stop = max(index * SECTOR_SIZE, position), min((index + 1) * SECTOR_SIZE, end)
            if start > position:
                yield from self._runs_below(position, start)
            yield start, stop - start, True
            position = stop
        if position < end:
            yield from self._runs_below(position, end)

    def _runs_below(self, start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        inside = max(start, min(stop, self._below))
        if inside > start:
            yield from self._store.data_runs(start, inside - start)
        if stop > inside:
            yield inside, stop - inside, False

    def close(self) -> None:
        """See `Store.close`: the file stays open, it is not the draft's."""

    def writes(self) -> list[tuple[int, bytes]]:
        """(offset, bytes) of everything to write, apart from each other, in order: base + writes = view.

        What a truncation cut off reads as zeros wherever the file below still holds it, also where the draft has
        grown over it again. Behind a smaller size it is among the writes too, so that an undo log holds it.
        """
        pieces = [(offset, raw) for offset, raw in self._changed() if raw]
        pieces += self._cut_off()
        runs: list[tuple[int, bytearray]] = []
        for offset, raw in sorted(pieces, key=lambda piece: piece[0]):
            _append(runs, offset, raw)
        return [(offset, bytes(raw)) for offset, raw in runs]

    def _changed(self) -> Iterator[tuple[int, bytes]]:
        """The changed sectors, up to the end, that differ from the file below; behind its own end that is zeros."""
        for index, sector in self._sectors.items():
            offset = index * SECTOR_SIZE
            raw = sector[: max(self._size - offset, 0)]
            if raw != self._store.pread(offset, len(raw)).ljust(len(raw), b"\0"):
                yield offset, raw

    def _cut_off(self) -> Iterator[tuple[int, bytes]]:
        """Zeros over whatever the file below holds behind the place where it was cut, changed sectors left out."""
        position, end = self._below, self._store.size()
        for index in sorted(self._touched(position, end)):
            start = index * SECTOR_SIZE
            if start > position:
                yield from self._zeros_over(position, start)
            position = min(start + SECTOR_SIZE, max(self._size, start))
        if position < end:
            yield from self._zeros_over(position, end)

    def _zeros_over(self, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
        for offset, size, is_data in self._store.data_runs(start, stop - start):
            for position in range(offset, offset + size, MIB) if is_data else ():
                piece = self._store.pread(position, min(MIB, offset + size - position))
                if piece.count(0) != len(piece):
                    yield position, bytes(len(piece))


def _append(runs: list[tuple[int, bytearray]], offset: int, raw: bytes) -> None:
    if runs and runs[-1][0] + len(runs[-1][1]) == offset:
        runs[-1][1].extend(raw)
    else:
        runs.append((offset, bytearray(raw)))
