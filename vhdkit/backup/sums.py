# SPDX-License-Identifier: Apache-2.0
"""Sums of an image's file: one for every 64 KiB, in a table beside it.

Decides what a sum covers, how the table is stored, and how a file is read through the hash on all cores. Must not know
formats of images, nor which file belongs to which night.

    table    64 bytes   "vhdkit sums 1\\n", zeros; at byte 32 the size of the file in bytes (unsigned, 64 bits, little
                        endian), at 40 the size of a range (65536), at 48 that of a page (4096); zeros
             32 bytes   for each range of the file, in order
    sum      SHA-256 of the range's mask and of its pages that are not all zeros, in order. The mask has 16 bits,
             little endian; bit 0 is the first page. A range that is all zeros has 32 zero bytes as its sum
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from vhdkit import errors
from vhdkit.backup.documents import DamagedRepository
from vhdkit.store import ReadStore, Store
from vhdkit.units import KIB, MIB

RANGE_BYTES = 64 * KIB
PAGE_BYTES = 4 * KIB
SUM_BYTES = 32
HEADER_BYTES = 64
_HEADER = struct.Struct("<32sQQQ8x")
_MAGIC = b"vhdkit sums 1\n"
_PAGES = RANGE_BYTES // PAGE_BYTES
_WORDS = PAGE_BYTES // 8
_ZERO_SUM = bytes(SUM_BYTES)
_PIECE_BYTES = MIB // 2  # read and hashed by one thread at a time: it fits into a core's cache
_AHEAD = 4  # pieces for each thread, so that none waits for the order of the table
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


def sum_of(data: memoryview, nonzero: Sequence[bool] | NDArray[np.bool_]) -> bytes:
    """The sum of one range, whose length is a whole number of pages; `nonzero` says which of them have any data."""
    mask = sum(1 << page for page, has_data in enumerate(nonzero) if has_data)
    if not mask:
        return _ZERO_SUM
    found = hashlib.sha256(mask.to_bytes(2, "little"))
    if mask == (1 << len(nonzero)) - 1:
        found.update(data)
    else:
        for page, has_data in enumerate(nonzero):
            if has_data:
                found.update(data[page * PAGE_BYTES : (page + 1) * PAGE_BYTES])
    return found.digest()


def make_table(store: ReadStore, table: Store, progress: Progress | None = None) -> str:
    """Write the table of the file in `store` to `table`, which is empty, and return the root.

    Raises IoFailed, NoSpace.
    """
    size = store.size()
    header = _HEADER.pack(_MAGIC, size, RANGE_BYTES, PAGE_BYTES)
    table.pwrite(0, header)
    root = hashlib.sha256(header)
    at = HEADER_BYTES
    pending = bytearray()

    def out(last: bool = False) -> None:
        nonlocal at
        if pending and (last or len(pending) >= _BATCH_BYTES):
            root.update(pending)
            if any(pending):
                table.pwrite(at, bytes(pending))
            at += len(pending)
            pending.clear()

    for first, sums in _sums(store, [(0, size)], size, progress):
        missing = first * SUM_BYTES + HEADER_BYTES - at - len(pending)
        while missing > 0:  # ranges in holes
            zeros = min(missing, _BATCH_BYTES)
            pending += bytes(zeros)
            missing -= zeros
            out()
        pending += sums
        out()
    missing = table_bytes(size) - at - len(pending)
    while missing > 0:
        zeros = min(missing, _BATCH_BYTES)
        pending += bytes(zeros)
        missing -= zeros
        out()
    out(last=True)
    if table.size() < table_bytes(size):
        table.truncate(table_bytes(size))
    return root.hexdigest()


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
    todo = deque((begin // RANGE_BYTES, range_count(begin + length)) for begin, length in wanted)
    for first, sums in _sums(store, wanted, size, progress):
        for hole, end in _up_to(first, todo):
            yield from _not_zero(table, hole, end)
        count = len(sums) // SUM_BYTES
        expected = table.pread(HEADER_BYTES + first * SUM_BYTES, len(sums))
        if expected != sums:
            for index in range(count):
                part = slice(index * SUM_BYTES, (index + 1) * SUM_BYTES)
                if expected[part] != sums[part]:
                    yield first + index, 1
        for _ in _up_to(first + count, todo):
            pass
    for hole, end in _up_to(range_count(size), todo):
        yield from _not_zero(table, hole, end)


def _up_to(limit: int, todo: deque[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Take from `todo`, (first, end) in ascending order, what lies before the limit."""
    while todo and todo[0][0] < limit:
        first, end = todo.popleft()
        if end > limit:
            todo.appendleft((limit, end))
        yield first, min(end, limit)


def _not_zero(table: ReadStore, first: int, end: int) -> Iterator[tuple[int, int]]:
    """The ranges from `first` up to `end` that should have data."""
    step = _BATCH_BYTES // SUM_BYTES
    for at in range(first, end, step):
        count = min(step, end - at)
        raw = table.pread(HEADER_BYTES + at * SUM_BYTES, count * SUM_BYTES)
        if any(raw):
            for index in range(count):
                if any(raw[index * SUM_BYTES : (index + 1) * SUM_BYTES]):
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
    table.pwrite(0, _HEADER.pack(_MAGIC, size, RANGE_BYTES, PAGE_BYTES))
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
    for index, sums in _sums(store, whole, size, progress):
        table.pwrite(HEADER_BYTES + index * SUM_BYTES, sums)
    root = hashlib.sha256()
    for at in range(0, end, MIB):
        root.update(table.pread(at, min(MIB, end - at)))
    return root.hexdigest()


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


def _sums(
    store: ReadStore, wanted: Iterable[tuple[int, int]], size: int, progress: Progress | None
) -> Iterator[tuple[int, bytes]]:
    """(index of the first range, sums) of the parts of the file that may hold data, in order, hashed by all cores."""
    total, done = size, 0
    buffers = threading.local()
    threads = min(os.cpu_count() or 1, _MAX_THREADS)
    waiting: deque[Future[tuple[int, bytes, int]]] = deque()

    def hashed(begin: int, end: int) -> tuple[int, bytes, int]:
        buffer = getattr(buffers, "buffer", None)
        if buffer is None:
            buffer = buffers.buffer = memoryview(bytearray(_PIECE_BYTES))
        return begin // RANGE_BYTES, _piece_sums(store, begin, end, buffer), end

    pool = ThreadPoolExecutor(threads, thread_name_prefix="vhdkit-sums")
    try:
        for begin, end in _pieces(store, wanted):
            waiting.append(pool.submit(hashed, begin, end))
            if len(waiting) > threads * _AHEAD:
                first, sums, done = waiting.popleft().result()
                yield first, sums
                if progress is not None:
                    progress(done, total)
        while waiting:
            first, sums, done = waiting.popleft().result()
            yield first, sums
            if progress is not None:
                progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)


def _pieces(store: ReadStore, wanted: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(begin, end) of pieces of whole ranges that may hold data, ascending and apart from each other."""
    for begin, length in wanted:
        at, stop = begin, begin + length
        for offset, size, is_data in store.data_runs(begin, length):
            if not is_data or offset + size <= at:
                continue
            first = max(offset // RANGE_BYTES * RANGE_BYTES, at)
            end = min(range_count(offset + size) * RANGE_BYTES, stop)
            for piece in range(first, end, _PIECE_BYTES):
                yield piece, min(piece + _PIECE_BYTES, end)
            at = end


def _piece_sums(store: ReadStore, begin: int, end: int, buffer: memoryview) -> bytes:
    """The sums of the ranges from `begin` to `end`, the last of which may end with the file."""
    size = end - begin
    whole = -(-size // PAGE_BYTES) * PAGE_BYTES
    store.pread_into(begin, buffer[:size])
    if whole > size:
        buffer[size:whole] = bytes(whole - size)
    pages = _pages_with_data(np.frombuffer(buffer[:whole], dtype=np.uint64).reshape(-1, _WORDS))
    sums = bytearray()
    full = hashlib.sha256(b"\xff\xff")
    for at in range(0, whole, RANGE_BYTES):
        data = buffer[at : min(at + RANGE_BYTES, whole)]
        of_range = pages[at // PAGE_BYTES : at // PAGE_BYTES + _PAGES]
        if len(of_range) == _PAGES and of_range.all():
            found = full.copy()
            found.update(data)
            sums += found.digest()
        else:
            sums += sum_of(data, of_range.tolist())
    return bytes(sums)


def _pages_with_data(words: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """One boolean per page. A few words of each are looked at first, as most pages that have data show it there."""
    found: NDArray[np.bool_] = np.any(words[:, :: _WORDS // 8], axis=1)
    rest = np.flatnonzero(~found)
    if len(rest):
        found[rest] = words[rest].any(axis=1)
    return found


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
