# SPDX-License-Identifier: Apache-2.0
"""A new file whose sums are made while it is written: what passes through memory is not read again.

Decides which of the written bytes belong to one sum, and which sums are made at the end from the file. Must not know
formats, nor how a sum is computed or a table stored (`sums`).

    a range written whole                  its sum, while the file system takes the bytes
    a range written in parts, one by one   collected in memory, at most `_OPEN_RANGES` of them; then its sum
    written again after that, or cut off   read from the file at the end

`INV-SUMS-OF-FILE`: the table that `finish` leaves is the one that reading the file makes (`sums.make_table`). A range
that was never written is zeros, because the file is new. Where it is not known cheaply what has changed, all of the
file is read.

One thread at a time writes. Memory use does not depend on the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Self

from vhdkit import errors
from vhdkit.backup import sums
from vhdkit.backup.sums import HEADER_BYTES, PAGE_BYTES, RANGE_BYTES, SUM_BYTES, Progress
from vhdkit.store import Buffer, ReadStore, Store
from vhdkit.units import KIB

_OPEN_RANGES = 64  # a block of a VHD, whose bitmap is written last, has 33
_MOST_AGAIN = 65_536  # ranges that are read at the end, unless all are
_COPY_BYTES = 256 * KIB  # stays in a core's cache
_APART_BYTES = 128 * KIB  # less is hashed before another thread is awake
_WINDOW_BYTES = 64 * KIB  # of the table
_WINDOWS = 4
_ZERO_SUM = bytes(SUM_BYTES)
_ZERO_PAGE = bytes(PAGE_BYTES)


class SummedFile:
    """A `Store` over `file`, which is new and empty; the sums go to `table`, which is empty, too.

    Call `finish` when the file is complete, and `close`, which leaves both open.
    """

    def __init__(self, file: Store, table: Store) -> None:
        self._file = file
        self._table = table
        self._sums = _Windows(table)
        self._open: dict[int, _Collected] = {}  # by range, the oldest first
        self._spare: list[_Collected] = []
        self._again: set[int] | None = set()  # ranges that are read at the end; None for all
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="vhdkit-summing")
        self._buffer = memoryview(bytearray(_COPY_BYTES))

    def finish(self, progress: Progress | None = None) -> str:
        """Complete the table; returns its root. Raises IoFailed, NoSpace."""
        while self._open:
            self._sum_oldest()
        if self._again is None:
            self._sums.forget()
            self._table.truncate(0)
            return sums.make_table(self._file, self._table, progress)
        size = self._file.size()
        for first, found in sums.sums_of_ranges(self._file, self._again, progress):
            self._sums.put(first, found)
        self._sums.write_all()
        return sums.completed(self._table, size)

    def close(self) -> None:
        """End the thread. Closing twice is fine."""
        self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # -- writing --------------------------------------------------------------------------------------------------

    def pwrite(self, offset_bytes: int, data: Buffer) -> None:
        """See `Store.pwrite`."""
        size = len(data)
        first, end = -(-offset_bytes // RANGE_BYTES), (offset_bytes + size) // RANGE_BYTES
        if first >= end:
            self._file.pwrite(offset_bytes, data)
            self._collect(offset_bytes, data)
            return
        view = memoryview(data).cast("B")
        begin, stop = first * RANGE_BYTES - offset_bytes, end * RANGE_BYTES - offset_bytes
        self._replace(first, self._written(offset_bytes, view, view[begin:stop]))
        self._collect(offset_bytes, view[:begin])
        self._collect(end * RANGE_BYTES, view[stop:])

    def _written(self, offset_bytes: int, data: memoryview, whole: memoryview) -> bytes:
        """Write the data; the sums of its whole ranges."""
        if len(whole) >= _APART_BYTES:
            try:
                hashing = self._pool.submit(sums.sums_of_data, whole)
            except RuntimeError:  # the system allows no more threads
                pass
            else:
                try:
                    self._file.pwrite(offset_bytes, data)
                finally:
                    found = hashing.result()  # the caller's buffer is no longer used when this returns
                return found
        self._file.pwrite(offset_bytes, data)
        return sums.sums_of_data(whole)

    def copy_from(self, source: ReadStore, source_offset_bytes: int, offset_bytes: int, size_bytes: int) -> None:
        """See `Store.copy_from`. The bytes pass through memory."""
        done = 0
        while done < size_bytes:
            piece = min(size_bytes - done, _COPY_BYTES - (offset_bytes + done) % RANGE_BYTES)
            view = self._buffer[:piece]
            source.pread_into(source_offset_bytes + done, view)
            self.pwrite(offset_bytes + done, view)
            done += piece
        if source.size() < source_offset_bytes + size_bytes:
            raise errors.IoFailed("the file became shorter while it was copied", path=source.name)

    def punch(self, offset_bytes: int, size_bytes: int) -> None:
        """See `Store.punch`."""
        self._file.punch(offset_bytes, size_bytes)
        self._changed(offset_bytes, offset_bytes + size_bytes)

    def reserve(self, offset_bytes: int, size_bytes: int) -> None:
        """See `Store.reserve`."""
        self._file.reserve(offset_bytes, size_bytes)

    def truncate(self, size_bytes: int) -> None:
        """See `Store.truncate`."""
        before = self._file.size()
        self._file.truncate(size_bytes)
        self._changed(size_bytes, before)

    def sync(self) -> None:
        """See `Store.sync`."""
        self._file.sync()

    # -- sums -----------------------------------------------------------------------------------------------------

    def _collect(self, offset_bytes: int, data: Buffer) -> None:
        """Take in data that does not cover a range."""
        size = len(data)
        index, within = divmod(offset_bytes, RANGE_BYTES)
        if within + size > RANGE_BYTES:  # it lies in two
            rest = RANGE_BYTES - within
            self._collect(offset_bytes, memoryview(data)[:rest])
            self._collect(offset_bytes + rest, memoryview(data)[rest:])
            return
        if not size or self._again is None or index in self._again:
            return
        found = self._open.get(index)
        if found is None:
            if self._sums.get(index) != _ZERO_SUM:
                self._changed(offset_bytes, offset_bytes + size)
                return
            if len(self._open) >= _OPEN_RANGES:
                self._sum_oldest()
            found = self._open[index] = self._spare.pop() if self._spare else _Collected()
        found.content[within : within + size] = data
        found.pages |= (2 << (within + size - 1) // PAGE_BYTES) - (1 << within // PAGE_BYTES)

    def _sum_oldest(self) -> None:
        index = next(iter(self._open))
        collected = self._open.pop(index)
        self._sums.put(index, collected.taken())
        self._spare.append(collected)

    def _replace(self, first: int, found: bytes) -> None:
        """These are the sums of whole ranges now."""
        for index in range(first, first + len(found) // SUM_BYTES) if self._open or self._again else ():
            self._open.pop(index, None)
            if self._again is not None:
                self._again.discard(index)
        self._sums.put(first, found)

    def _changed(self, begin: int, end: int) -> None:
        """What a part of the file holds must be read."""
        indexes = range(begin // RANGE_BYTES, -(-end // RANGE_BYTES))
        if self._again is None or len(indexes) + len(self._again) > _MOST_AGAIN:
            self._again = None
            self._open.clear()
            return
        self._again.update(indexes)
        for index in indexes:
            self._open.pop(index, None)

    # -- reading --------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """See `ReadStore.name`."""
        return self._file.name

    @property
    def identity(self) -> Hashable:
        """See `ReadStore.identity`."""
        return self._file.identity

    def size(self) -> int:
        """See `ReadStore.size`."""
        return self._file.size()

    def pread(self, offset_bytes: int, size_bytes: int) -> bytes:
        """See `ReadStore.pread`."""
        return self._file.pread(offset_bytes, size_bytes)

    def pread_into(self, offset_bytes: int, buffer: memoryview) -> None:
        """See `ReadStore.pread_into`."""
        self._file.pread_into(offset_bytes, buffer)

    def try_pread_into(self, offset_bytes: int, buffer: memoryview) -> bool:
        """See `ReadStore.try_pread_into`."""
        return self._file.try_pread_into(offset_bytes, buffer)

    def prefetch(self, offset_bytes: int, size_bytes: int) -> None:
        """See `ReadStore.prefetch`."""
        self._file.prefetch(offset_bytes, size_bytes)

    def data_runs(self, offset_bytes: int, size_bytes: int) -> Iterator[tuple[int, int, bool]]:
        """See `ReadStore.data_runs`."""
        return self._file.data_runs(offset_bytes, size_bytes)

    def punches(self) -> bool:
        """See `Store.punches`."""
        return self._file.punches()


@dataclass(slots=True)
class _Collected:
    """The content of a range as it is written; `pages` has a bit for each page of which anything was written."""

    content: bytearray = field(default_factory=lambda: bytearray(RANGE_BYTES))
    pages: int = 0

    def taken(self) -> bytes:
        """The sum; all is zeros again."""
        mask, parts = 0, []
        while self.pages:
            bit = self.pages & -self.pages
            self.pages ^= bit
            at = (bit.bit_length() - 1) * PAGE_BYTES
            page = self.content[at : at + PAGE_BYTES]
            if page != _ZERO_PAGE:
                mask |= bit
                parts.append(page)
                self.content[at : at + PAGE_BYTES] = _ZERO_PAGE
        if not mask:
            return _ZERO_SUM
        return hashlib.sha256(b"".join((mask.to_bytes(2, "little"), *parts))).digest()


class _Windows:
    """The sums in a table that is not complete, by the index of their range: the parts used last are in memory."""

    def __init__(self, table: Store) -> None:
        self._table = table
        self._windows: dict[int, bytearray] = {}  # the one loaded first is written first
        self._changed: set[int] = set()

    def get(self, index: int) -> bytes:
        """The sum of a range; zeros if there is none."""
        window, at = divmod(index * SUM_BYTES, _WINDOW_BYTES)
        return bytes(self._loaded(window)[at : at + SUM_BYTES])

    def put(self, first: int, found: bytes) -> None:
        """Set the sums of some ranges, one after the other."""
        done = 0
        while done < len(found):
            window, at = divmod(first * SUM_BYTES + done, _WINDOW_BYTES)
            part = found[done : done + _WINDOW_BYTES - at]
            self._loaded(window)[at : at + len(part)] = part
            self._changed.add(window)
            done += len(part)

    def _loaded(self, window: int) -> bytearray:
        found = self._windows.get(window)
        if found is None:
            if len(self._windows) >= _WINDOWS:
                self._write(next(iter(self._windows)))
            raw = self._table.pread(HEADER_BYTES + window * _WINDOW_BYTES, _WINDOW_BYTES)
            found = self._windows[window] = bytearray(raw.ljust(_WINDOW_BYTES, b"\0"))
        return found

    def _write(self, window: int) -> None:
        content = self._windows.pop(window)
        if window in self._changed:
            self._changed.discard(window)
            self._table.pwrite(HEADER_BYTES + window * _WINDOW_BYTES, content)

    def write_all(self) -> None:
        """Everything is in the table."""
        for window in list(self._windows):
            self._write(window)

    def forget(self) -> None:
        """What was not written to the table never is."""
        self._windows.clear()
        self._changed.clear()
