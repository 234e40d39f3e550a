# SPDX-License-Identifier: Apache-2.0
"""A new file whose sums are made while it is written: what passes through memory is not read again.

Decides which of the written bytes belong to one sum, and which sums are made at the end from the file. Must not know
formats, nor how a sum is computed (`page_sums`) or a table stored (`sums`).

    a range written whole                  its sum, while the file system takes the bytes
    a range written in parts, one by one   collected in memory, at most `_OPEN_RANGES` of them; then its sum
    written again after that, or cut off   read from the file at the end

`INV-SUMS-OF-FILE`: the table that `finish` leaves is the one that reading the file makes (`sums.make_table`). A range
that was never written is zeros, because the file is new. Where it is not known cheaply what has changed, all of the
file is read.

One thread at a time writes. Memory use does not depend on the file.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Self, TypeAlias

from vhdkit import errors
from vhdkit.backup import page_sums, sums
from vhdkit.backup.page_sums import PAGE_BYTES, RANGE_BYTES, SUM_BYTES, ZERO_SUM
from vhdkit.backup.sums import HEADER_BYTES, Progress
from vhdkit.store import Buffer, ReadStore, Store
from vhdkit.units import KIB, MIB

_OPEN_RANGES = 64  # a block of a VHD has 33
_MOST_AGAIN = 65_536  # ranges that are read at the end, unless all are
_COPY_BYTES, _BUFFERS = MIB // 2, 3  # stay in a core's cache
_APART_BYTES = 128 * KIB  # less is hashed before another thread is awake
_PART_BYTES = 256 * KIB  # hashed at once
_WINDOW_BYTES = 64 * KIB  # of the table
_WINDOWS = 4
_Hashing: TypeAlias = tuple[int, int, Future[bytes], memoryview]  # the ranges (first, end), and a buffer of ours


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
        self._buffers = [memoryview(bytearray(_COPY_BYTES)) for _ in range(_BUFFERS)]
        self._hashing: deque[_Hashing] = deque()

    def finish(self, progress: Progress | None = None) -> str:
        """Complete the table; returns its root. Raises IoFailed, NoSpace."""
        while self._hashing:
            self._settle_oldest()
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
        found = self._written(offset_bytes, view, view[begin:stop])
        self._forget(first, end)
        self._sums.put(first, found)
        self._collect(offset_bytes, view[:begin])
        self._collect(end * RANGE_BYTES, view[stop:])

    def _written(self, offset_bytes: int, data: memoryview, whole: memoryview) -> bytes:
        """Write the data; the sums of its whole ranges.

        Another thread makes them meanwhile, and this one helps it afterwards, from the other end.
        """
        parts = [whole[at : at + _PART_BYTES] for at in range(0, len(whole), _PART_BYTES)]
        apart: list[Future[bytes]] = []
        try:
            if len(whole) >= _APART_BYTES:
                with contextlib.suppress(RuntimeError):  # the system allows no more threads
                    apart.extend(self._pool.submit(page_sums.sums_of_data, part) for part in parts)
            self._file.pwrite(offset_bytes, data)
            own: list[bytes] = []
            for part in reversed(parts):
                if len(apart) + len(own) == len(parts):
                    if not apart[-1].cancel():
                        break  # it was begun, and so was all before it
                    apart.pop()
                own.append(page_sums.sums_of_data(part))
            return b"".join([*(one.result() for one in apart), *reversed(own)])
        except BaseException:  # Ctrl-C, too
            for one in apart:
                one.cancel()
            wait(apart)  # the buffer is the caller's
            raise

    def copy_from(self, source: ReadStore, source_offset_bytes: int, offset_bytes: int, size_bytes: int) -> None:
        """See `Store.copy_from`. The bytes pass through memory."""
        done = 0
        while done < size_bytes:
            buffer = self._free_buffer()
            piece = min(size_bytes - done, len(buffer) - (offset_bytes + done) % RANGE_BYTES)
            source.pread_into(source_offset_bytes + done, buffer[:piece])
            self._take_over(offset_bytes + done, buffer, piece)
            done += piece
        if source.size() < source_offset_bytes + size_bytes:
            raise errors.IoFailed("the file became shorter while it was copied", path=source.name)

    def _take_over(self, offset_bytes: int, buffer: memoryview, size_bytes: int) -> None:
        """Write what is in a buffer of ours; another thread may read it afterwards, to make sums."""
        view = buffer[:size_bytes]
        first, end = -(-offset_bytes // RANGE_BYTES), (offset_bytes + size_bytes) // RANGE_BYTES
        begin, stop = first * RANGE_BYTES - offset_bytes, end * RANGE_BYTES - offset_bytes
        hashing = None
        if stop - begin >= _APART_BYTES:
            with contextlib.suppress(RuntimeError):  # the system allows no more threads
                hashing = self._pool.submit(page_sums.sums_of_data, view[begin:stop])
        if hashing is None:
            self.pwrite(offset_bytes, view)
            self._buffers.append(buffer)
            return
        self._file.pwrite(offset_bytes, view)
        self._forget(first, end)
        self._collect(offset_bytes, view[:begin])
        self._collect(end * RANGE_BYTES, view[stop:])
        self._hashing.append((first, end, hashing, buffer))

    def _free_buffer(self) -> memoryview:
        if not self._buffers:
            self._settle_oldest()
        return self._buffers.pop()

    def _settle_oldest(self) -> None:
        """Wait for the sums that have been in the making for the longest time."""
        first, _, hashing, buffer = self._hashing.popleft()
        self._sums.put(first, hashing.result())
        self._buffers.append(buffer)

    def punch(self, offset_bytes: int, size_bytes: int) -> None:
        """See `Store.punch`."""
        self._file.punch(offset_bytes, size_bytes)
        self._changed(offset_bytes, offset_bytes + size_bytes)

    def reserve(self, offset_bytes: int, size_bytes: int) -> None:
        """See `Store.reserve`. A little space is not worth the call: a file that becomes too large is never named."""
        if size_bytes <= PAGE_BYTES and offset_bytes + size_bytes > self._file.size():
            self._file.truncate(offset_bytes + size_bytes)
        else:
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
            if self._hashing:
                self._settle(index, index + 1)
            if self._sums.get(index) != ZERO_SUM:
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

    def _forget(self, first: int, end: int) -> None:
        """Whatever was known of ranges is no longer true: they were written whole."""
        self._settle(first, end)
        for index in range(first, end) if self._open or self._again else ():
            self._open.pop(index, None)
            if self._again is not None:
                self._again.discard(index)

    def _settle(self, first: int, end: int) -> None:
        """No sums of these ranges are in the making."""
        while any(one[0] < end and first < one[1] for one in self._hashing):
            self._settle_oldest()

    def _changed(self, begin: int, end: int) -> None:
        """What a part of the file holds must be read."""
        indexes = range(begin // RANGE_BYTES, -(-end // RANGE_BYTES))
        self._settle(indexes.start, indexes.stop)
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
        found = page_sums.sum_of_range(self.content, self.pages)
        first = (self.pages & -self.pages).bit_length() - 1
        begin, end = first * PAGE_BYTES, self.pages.bit_length() * PAGE_BYTES
        self.content[begin:end] = bytes(end - begin)
        self.pages = 0
        return found


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
