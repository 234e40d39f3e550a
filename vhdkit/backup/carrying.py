# SPDX-License-Identifier: Apache-2.0
"""Makes a file have the content that a table of sums describes, from another file that has it.

Decides what is read and written for that, and that it is compared afterwards. Must not know what the files are.

Only the 64 KiB ranges whose sums differ are copied, so it can be repeated after any interruption, and goes on where it
was. Pages of zeros become holes. When `bring` returns, the content is on the device, and has been read again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from vhdkit import errors
from vhdkit.backup import sums
from vhdkit.backup.documents import DamagedRepository
from vhdkit.chain.engine.chain import Progress
from vhdkit.rate import RateLimit
from vhdkit.store import ReadStore, Store, copy_bytes
from vhdkit.units import MIB

Ranges = Sequence[tuple[int, int]]  # (offset, size) in bytes, ascending, apart from each other
_BATCH_BYTES = MIB  # of two tables, compared at once


def bring(
    source: ReadStore,
    target: Store,
    table: ReadStore,
    within: Ranges | None = None,
    *,
    limit: RateLimit | None = None,
    progress: Progress | None = None,
) -> int:
    """Make `target` have the content, or the parts of it in these ranges, that the table describes.

    The table is the source's; its size becomes that of the target. Returns how many bytes were copied. Raises
    DamagedRepository if the source, or what was written, has other content than the table; NoSpace, IoFailed.
    """
    size = source.size()
    is_empty = target.size() == 0
    if target.size() != size:
        target.truncate(size)
    copied = 0
    for part in sums.differing(target, table, within):
        end = part.offset_bytes + part.size_bytes
        for at in range(part.offset_bytes, end, MIB):
            copied += _copy(source, target, at, min(MIB, end - at), is_empty=is_empty, limit=limit)
            if progress is not None:
                progress(min(at + MIB, end), size)
    target.sync()
    _require_sums(source, target, table, within)
    if progress is not None:
        progress(size, size)
    return copied


def _copy(source: ReadStore, target: Store, begin: int, size: int, *, is_empty: bool, limit: RateLimit | None) -> int:
    """Copy a part of a file; returns how many bytes of data it had."""
    copied = 0
    for offset, length, is_data in source.data_runs(begin, size):
        if not is_data:
            if not is_empty:
                target.punch(offset, length)
            continue
        if limit is not None:
            limit.take(length)
        data = source.pread(offset, length)
        if len(data) < length:
            raise errors.IoFailed("the file became shorter while it was copied", path=source.name)
        for at, end, has_data in _page_runs(data):
            if has_data:
                target.pwrite(offset + at, memoryview(data)[at:end])
                copied += end - at
            elif not is_empty:
                target.punch(offset + at, end - at)
    return copied


def _page_runs(data: bytes) -> Iterator[tuple[int, int, bool]]:
    """(begin, end, whether it has any data) of runs of pages."""
    whole = data.ljust(-(-len(data) // sums.PAGE_BYTES) * sums.PAGE_BYTES, b"\0")
    has_data = np.asarray(np.any(np.frombuffer(whole, np.uint64).reshape(-1, sums.PAGE_BYTES // 8), axis=1))
    edges = (np.flatnonzero(has_data[1:] != has_data[:-1]) + 1).tolist()
    for begin, end in zip([0, *edges], [*edges, len(has_data)], strict=True):
        yield begin * sums.PAGE_BYTES, min(end * sums.PAGE_BYTES, len(data)), bool(has_data[begin])


def _require_sums(source: ReadStore, target: ReadStore, table: ReadStore, within: Ranges | None) -> None:
    for wrong in sums.differing(target, table, within):
        ranges = [(wrong.offset_bytes, wrong.size_bytes)]
        damaged = next(iter(sums.differing(source, table, ranges)), None)
        if damaged is not None:
            raise DamagedRepository(
                "was changed or damaged since it was written: its sums differ",
                path=source.name,
                offset_bytes=damaged.offset_bytes,
                hint="`vhdkit backup verify` names the nights that are whole",
            )
        raise DamagedRepository(
            "reads other bytes than were written to it", path=target.name, offset_bytes=wrong.offset_bytes,
            hint="check the device, and run the command again",
        )  # fmt: skip


def changed_between(old: ReadStore, new: ReadStore) -> list[tuple[int, int]]:
    """The ranges of the newer file whose sums are others than the older one's, from the tables of both.

    What the older file does not have counts as zeros.
    """
    found: list[tuple[int, int]] = []
    end = new.size()
    for at in range(sums.HEADER_BYTES, end, _BATCH_BYTES):
        count = min(_BATCH_BYTES, end - at) // sums.SUM_BYTES
        rows = [_rows(table.pread(at, count * sums.SUM_BYTES), count) for table in (old, new)]
        first = (at - sums.HEADER_BYTES) // sums.SUM_BYTES
        for index in np.flatnonzero((rows[0] != rows[1]).any(axis=1)).tolist():
            begin = (first + index) * sums.RANGE_BYTES
            if found and found[-1][0] + found[-1][1] == begin:
                found[-1] = (found[-1][0], found[-1][1] + sums.RANGE_BYTES)
            else:
                found.append((begin, sums.RANGE_BYTES))
    return found


def _rows(raw: bytes, count: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
    return np.frombuffer(raw.ljust(count * sums.SUM_BYTES, b"\0"), dtype=np.uint64).reshape(count, -1)


def copy_data(source: ReadStore, target: Store) -> None:
    """Copy a small file, such as a table, into an empty one, with its holes. Raises NoSpace, IoFailed."""
    size = source.size()
    for offset, length, is_data in source.data_runs(0, size):
        if is_data:
            copy_bytes(source, offset, target, offset, length)
    if target.size() < size:
        target.truncate(size)


def digest_of_file(store: ReadStore) -> str:
    """The SHA-256 of a whole file, as hexadecimal digits. Raises IoFailed."""
    found = hashlib.sha256()
    for at in range(0, store.size(), MIB):
        found.update(store.pread(at, MIB))
    return found.hexdigest()


class DataBefore:
    """How many bytes of data a file has before an offset that only grows: what work that skips holes has read."""

    def __init__(self, store: ReadStore) -> None:
        self._store = store
        self._offset = self._bytes = 0

    def __call__(self, offset_bytes: int) -> int:
        """The number of bytes. Raises IoFailed."""
        if offset_bytes > self._offset:
            runs = self._store.data_runs(self._offset, offset_bytes - self._offset)
            self._bytes += sum(size for _, size, is_data in runs if is_data)
            self._offset = offset_bytes
        return self._bytes
