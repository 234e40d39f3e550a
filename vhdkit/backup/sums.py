# SPDX-License-Identifier: Apache-2.0
"""Sums of an image's file: one for every 64 KiB, in a table beside it.

Decides how the table is stored, and how a file is read through the hash on all cores. Must not know formats of images,
nor which file belongs to which night.

    table    64 bytes   "vhdkit sums 1\\n", zeros; at byte 32 the size of the file in bytes (unsigned, 64 bits, little
                        endian), at 40 the size of a range (65536), at 48 that of a page (4096); zeros
             32 bytes   for each range of the file, in order
    sum      as `page_sums` says; of a range that is all zeros, 32 zero bytes
    root     SHA-256 of the whole table: the manifest has it

The last range ends with the file; its last page is filled up with zeros. Holes and zeros have the same sums, as copies
of a file gain and lose holes; and only data is hashed, so a sparse file takes the time of its data.

A table is written and read from front to end, so memory use does not depend on the file.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from vhdkit import errors
from vhdkit.backup.documents import DamagedRepository
from vhdkit.backup.page_sums import PAGE_BYTES as PAGE_BYTES
from vhdkit.backup.page_sums import PAGES, sums_of_pages
from vhdkit.backup.page_sums import RANGE_BYTES as RANGE_BYTES
from vhdkit.backup.page_sums import SUM_BYTES as SUM_BYTES
from vhdkit.store import ReadStore, Store
from vhdkit.units import KIB, MIB

HEADER_BYTES = 64
_HEADER = struct.Struct("<32sQQQ8x")
_MAGIC = b"vhdkit sums 1\n"
_JOB_PAGES = 128  # read and hashed by one thread at a time: they fit into a core's cache
_JOB_RUNS = 128  # where data is scattered
_JOB_RANGES = 2048  # with the holes between
_AHEAD = 4  # jobs for each thread, so that none waits for the order of the table
_MAX_THREADS = 8
_BATCH_BYTES = 64 * KIB  # of the table, read or written at once

Progress: TypeAlias = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Differing:
    """A part of a file whose sums differ from the table's."""

    offset_bytes: int
    size_bytes: int


def range_count(size_bytes: int) -> int:
    """How many sums a file of this size has."""
    return -(-size_bytes // RANGE_BYTES)


def table_bytes(size_bytes: int) -> int:
    """The length of the table for a file of this size."""
    return HEADER_BYTES + range_count(size_bytes) * SUM_BYTES


def make_table(store: ReadStore, table: Store, progress: Progress | None = None) -> str:
    """Write the table of the file in `store` to `table`, which is empty, and return the root.

    Raises IoFailed, NoSpace.
    """
    size = store.size()
    for first, _, found, _ in _sums(store, [(0, size)], size, progress):
        if found is not None and any(found):
            table.pwrite(HEADER_BYTES + first * SUM_BYTES, found)
    return completed(table, size)


def completed(table: Store, size_bytes: int) -> str:
    """Make the sums in `table`, of a file of this size, a table: it gets its header and its length. Returns the root.

    Raises IoFailed, NoSpace.
    """
    table.pwrite(0, _HEADER.pack(_MAGIC, size_bytes, RANGE_BYTES, PAGE_BYTES))
    end = table_bytes(size_bytes)
    if table.size() != end:
        table.truncate(end)
    root = hashlib.sha256()
    for at in range(0, end, MIB):
        root.update(table.pread(at, min(MIB, end - at)))
    return root.hexdigest()


def sums_of_ranges(
    store: ReadStore, indexes: Iterable[int], progress: Progress | None = None
) -> Iterator[tuple[int, bytes]]:
    """(first range, sums) of these ranges of the file, ascending; those past its end are left out. Raises IoFailed."""
    size = store.size()
    wanted = joined((one * RANGE_BYTES, min(RANGE_BYTES, size - one * RANGE_BYTES)) for one in indexes)
    for first, count, found, is_wanted in _sums(store, wanted, size, progress):
        if found is None or is_wanted is None:
            yield first, found or bytes(count * SUM_BYTES)
            continue
        for at in np.flatnonzero(is_wanted).tolist():
            yield first + at, found[at * SUM_BYTES : (at + 1) * SUM_BYTES]


def check_table(table: ReadStore, root: str, size_bytes: int) -> None:
    """Raise DamagedRepository unless this is the table with that root, of a file of that size."""
    if table.size() != table_bytes(size_bytes):
        raise DamagedRepository(
            "the table of sums has the wrong length",
            path=table.name,
            expected=f"{table_bytes(size_bytes)} bytes",
            found=f"{table.size()} bytes",
        )
    found = hashlib.sha256()
    for at in range(0, table_bytes(size_bytes), MIB):
        found.update(table.pread(at, MIB))
    header = table.pread(0, HEADER_BYTES)
    if found.hexdigest() != root or header != _HEADER.pack(_MAGIC, size_bytes, RANGE_BYTES, PAGE_BYTES):
        raise DamagedRepository("the table of sums is not the one that the manifest names", path=table.name)


def differing(
    store: ReadStore,
    table: ReadStore,
    ranges: Iterable[tuple[int, int]] | None = None,
    progress: Progress | None = None,
) -> Iterator[Differing]:
    """The parts of the file that differ from a table which `check_table` accepted, adjacent ones joined.

    With `ranges` (offset and size in bytes, ascending, apart from each other), only the 64 KiB that these touch are
    read. The file has the size that the table says; `progress` counts the bytes of the ranges. Raises IoFailed.
    """
    size = store.size()
    wanted = list(_whole(ranges, size)) if ranges is not None else [(0, size)]
    last: tuple[int, int] | None = None
    for first, count in _wrong(store, table, wanted, size, progress):
        begin, end = first * RANGE_BYTES, min((first + count) * RANGE_BYTES, size)
        if last is not None and last[1] == begin:
            last = (last[0], end)
            continue
        if last is not None:
            yield Differing(last[0], last[1] - last[0])
        last = (begin, end)
    if last is not None:
        yield Differing(last[0], last[1] - last[0])


def _wrong(
    store: ReadStore, table: ReadStore, wanted: list[tuple[int, int]], size: int, progress: Progress | None
) -> Iterator[tuple[int, int]]:
    """(first range, count) of the wrong sums; ranges in holes must have the sum of zeros."""
    for first, count, found, is_wanted in _sums(store, wanted, size, progress):
        if found is None:
            yield from _not_zero(table, first, first + count)
            continue
        expected = table.pread(HEADER_BYTES + first * SUM_BYTES, len(found))
        if expected != found:
            wrong = (_rows(expected) != _rows(found)).any(axis=1)
            for index in np.flatnonzero(wrong if is_wanted is None else wrong & is_wanted).tolist():
                yield first + index, 1


def _rows(found: bytes) -> NDArray[np.uint64]:
    """A row of words for each sum."""
    return np.frombuffer(found, dtype=np.uint64).reshape(-1, SUM_BYTES // 8)


def _not_zero(table: ReadStore, first: int, end: int) -> Iterator[tuple[int, int]]:
    """The ranges from `first` up to `end` that should have data."""
    step = _BATCH_BYTES // SUM_BYTES
    for at in range(first, end, step):
        raw = table.pread(HEADER_BYTES + at * SUM_BYTES, min(step, end - at) * SUM_BYTES)
        if any(raw):
            for index in np.flatnonzero(_rows(raw).any(axis=1)).tolist():
                yield at + index, 1


def renewed_table(
    store: ReadStore,
    old: ReadStore,
    table: Store,
    ranges: Iterable[tuple[int, int]],
    progress: Progress | None = None,
) -> str:
    """Write to `table`, which is empty, the old table with new sums for the ranges that changed; return the root.

    `ranges` are as for `differing`. The old table is trusted for every other range that the file had before; it
    may have been made for another size. Raises IoFailed, NoSpace.
    """
    size = store.size()
    known = (old.size() - HEADER_BYTES) // SUM_BYTES * RANGE_BYTES
    old_size = _HEADER.unpack(old.pread(0, HEADER_BYTES))[1]
    wanted = [*ranges]
    if size != old_size:  # the last range before the end ends elsewhere, or is new
        shorter = min(size, old_size)
        wanted = joined([*wanted, (shorter // RANGE_BYTES * RANGE_BYTES, size - shorter // RANGE_BYTES * RANGE_BYTES)])
    end = table_bytes(size)
    table.truncate(end)
    for at in range(HEADER_BYTES, min(end, HEADER_BYTES + known // RANGE_BYTES * SUM_BYTES), _BATCH_BYTES):
        piece = old.pread(at, min(_BATCH_BYTES, end - at))
        if any(piece):
            table.pwrite(at, piece)
    whole = _whole(wanted, size)
    for begin, length in whole:
        first, last = begin // RANGE_BYTES, range_count(begin + length)
        table.punch(HEADER_BYTES + first * SUM_BYTES, (last - first) * SUM_BYTES)
    for index, count, found, is_wanted in _sums(store, whole, size, progress):
        if found is not None and is_wanted is None:
            table.pwrite(HEADER_BYTES + index * SUM_BYTES, found)
        elif found is not None:
            rows = _rows(table.pread(HEADER_BYTES + index * SUM_BYTES, count * SUM_BYTES)).copy()
            rows[is_wanted] = _rows(found)[is_wanted]
            table.pwrite(HEADER_BYTES + index * SUM_BYTES, rows.tobytes())
    return completed(table, size)


def joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same bytes as ranges in order, apart from each other."""
    found: list[tuple[int, int]] = []
    for begin, length in sorted(one for one in ranges if one[1] > 0):
        if found and begin <= found[-1][0] + found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], begin + length - found[-1][0]))
        else:
            found.append((begin, length))
    return found


def _whole(ranges: Iterable[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """The ranges widened to whole 64 KiB, inside the file."""
    wide = []
    for begin, length in ranges:
        first = begin // RANGE_BYTES * RANGE_BYTES
        wide.append((first, min(range_count(begin + length) * RANGE_BYTES, size) - first))
    return joined(wide)


# -- reading through the hash --------------------------------------------------------------------------------------


class _Job:
    """Ranges whose sums are made together: from `first` up to `end`, of which those in `wanted` (first, end) count.

    `runs` are the pages to read, as (first, count), ascending; the others are in holes.
    """

    __slots__ = ("end", "first", "page_count", "runs", "wanted")

    def __init__(self, first: int) -> None:
        self.first = self.end = first
        self.wanted: list[tuple[int, int]] = []
        self.runs: list[tuple[int, int]] = []
        self.page_count = 0

    def cover(self, first: int, end: int) -> None:
        """Add ranges after those that it has."""
        if self.wanted and self.wanted[-1][1] == first:
            self.wanted[-1] = (self.wanted[-1][0], end)
        else:
            self.wanted.append((first, end))
        self.end = end

    def read(self, page: int, end: int) -> None:
        """Add pages of ranges that it covers, as far as it does not have them."""
        if self.runs:
            page = max(page, sum(self.runs[-1]))
        if page < end:
            self.runs.append((page, end - page))
            self.page_count += end - page

    def is_full_with(self, end: int) -> bool:
        """Whether it is time for another job, where this one would reach `end`."""
        return self.page_count > _JOB_PAGES - PAGES or len(self.runs) >= _JOB_RUNS or end - self.first > _JOB_RANGES

    def is_wanted(self) -> NDArray[np.bool_] | None:
        """One boolean per range: does it count? None if all of them do."""
        if len(self.wanted) == 1:
            return None
        found = np.zeros(self.end - self.first, dtype=np.bool_)
        for first, end in self.wanted:
            found[first - self.first : end - self.first] = True
        return found


def _sums(
    store: ReadStore, wanted: Iterable[tuple[int, int]], size: int, progress: Progress | None
) -> Iterator[tuple[int, int, bytes | None, NDArray[np.bool_] | None]]:
    """(first range, count, their sums, which of them are wanted or None for all), in order, hashed by all cores.

    `wanted` are whole ranges. Instead of the sums of many ranges that lie in one hole there is None.
    """
    buffers = threading.local()
    threads = min(os.cpu_count() or 1, _MAX_THREADS)
    waiting: deque[tuple[_Job, Future[bytes] | None]] = deque()

    def hashed(job: _Job) -> bytes:
        if not hasattr(buffers, "buffer"):
            buffers.buffer = memoryview(bytearray((_JOB_PAGES + PAGES) * PAGE_BYTES))
        return _job_sums(store, job, buffers.buffer)

    def oldest() -> tuple[int, int, bytes | None, NDArray[np.bool_] | None]:
        job, hashing = waiting.popleft()
        found = None if hashing is None else hashing.result()
        if progress is not None:
            progress(min(job.end * RANGE_BYTES, size), size)
        return job.first, job.end - job.first, found, job.is_wanted()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="vhdkit-sums")
    try:
        for job in _jobs(store, wanted):
            waiting.append((job, pool.submit(hashed, job) if job.runs or len(job.wanted) > 1 else None))
            if len(waiting) > threads * _AHEAD:
                yield oldest()
        while waiting:
            yield oldest()
    finally:
        pool.shutdown(cancel_futures=True)


def _jobs(store: ReadStore, wanted: Iterable[tuple[int, int]]) -> Iterator[_Job]:
    """The wanted ranges, ascending, as jobs; without data to read if they lie in a hole."""
    job: _Job | None = None

    def covering(first: int, end: int) -> Iterator[_Job]:
        """Have the present job cover these ranges; the jobs that are complete."""
        nonlocal job
        if job is not None and job.is_full_with(end):
            yield job
            job = None
        job = job or _Job(first)
        job.cover(first, end)

    for begin, length in wanted:
        at, stop = begin // RANGE_BYTES, range_count(begin + length)
        for offset, size, is_data in store.data_runs(begin, length):
            page, last = offset // PAGE_BYTES, -(-(offset + size) // PAGE_BYTES)
            if not is_data:
                continue
            if page // PAGES > at:  # ranges in a hole
                yield from covering(at, page // PAGES)
                at = page // PAGES
            if page < at * PAGES:  # the last range has more data
                assert job is not None
                job.read(page, min(last, at * PAGES))
                page = min(last, at * PAGES)
            while page < last:
                room = _JOB_PAGES if job is None or job.is_full_with(at + 1) else _JOB_PAGES - job.page_count
                end = min(last, (page // PAGES + room // PAGES) * PAGES)
                yield from covering(at, -(-end // PAGES))
                assert job is not None
                job.read(page, end)
                page, at = end, -(-end // PAGES)
        if at < stop:
            yield from covering(at, stop)
    if job is not None:
        yield job


def _job_sums(store: ReadStore, job: _Job, buffer: memoryview) -> bytes:
    """The sums of a job's ranges."""
    at = 0
    for page, count in job.runs:
        store.pread_into(page * PAGE_BYTES, buffer[at : at + count * PAGE_BYTES])
        at += count * PAGE_BYTES
    found = bytearray((job.end - job.first) * SUM_BYTES)
    if at:
        runs = np.array(job.runs, dtype=np.int64)
        before = np.cumsum(runs[:, 1]) - runs[:, 1]
        numbers = np.arange(job.page_count) + np.repeat(runs[:, 0] - before, runs[:, 1])
        for index, one in sums_of_pages(buffer[:at], numbers):
            found[(index - job.first) * SUM_BYTES : (index - job.first + 1) * SUM_BYTES] = one
    return bytes(found)


def require_same_size(store: ReadStore, size_bytes: int) -> None:
    """Raise DamagedRepository if the file has another length than its record says."""
    if store.size() != size_bytes:
        problem = "is cut short" if store.size() < size_bytes else "is longer than it should be"
        raise DamagedRepository(
            problem,
            path=store.name,
            expected=f"{size_bytes} bytes",
            found=f"{store.size()} bytes",
            hint=errors.CUT_SHORT_HINT if store.size() < size_bytes else None,
        )
