# SPDX-License-Identifier: Apache-2.0
"""Finds zeros in a disk, a file or a buffer.

Decides how zeros are found: holes are never read, the rest is read in pieces until the first nonzero byte; and which
zeros in memory are worth a hole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from vhdkit.chain.engine.chain import Chain
from vhdkit.image import ExtentKind
from vhdkit.store import ReadStore
from vhdkit.units import KIB, PAGE_SIZE, sectors_to_bytes, whole_sectors

_PIECE_BYTES = 256 * KIB  # stays in the cache
_ZEROS = bytes(_PIECE_BYTES)
_MIN_HOLE_PAGES = 4  # a shorter run of zero pages counts as data: such a small hole costs more than it saves
_WORDS_PER_PAGE = PAGE_SIZE // 8


def first_data_in_store(store: ReadStore, offset_bytes: int, size_bytes: int) -> int | None:
    """Offset of the first nonzero byte of a range of the file, or None. Raises IoFailed."""
    for offset, size, may_hold_data in store.data_runs(offset_bytes, size_bytes):
        if may_hold_data:
            found = _first_data(store.pread, offset, size)
            if found is not None:
                return found
    return None


def _first_data(read: Callable[[int, int], bytes], offset: int, size: int) -> int | None:
    """The first nonzero byte; the first page is checked separately, since most data shows there."""
    end, step = offset + size, PAGE_SIZE
    while offset < end:
        raw = read(offset, min(step, end - offset))
        if not raw:
            return None
        if raw != (_ZEROS if len(raw) == len(_ZEROS) else _ZEROS[: len(raw)]):
            return offset + len(raw) - len(raw.lstrip(b"\0"))
        offset, step = offset + len(raw), _PIECE_BYTES
    return None


def data_of_disk(
    chain: Chain, offset_bytes: int, size_bytes: int, looked: Callable[[int], None] | None = None
) -> Iterator[tuple[int, int]]:
    """(offset, size) of the nonzero parts of a range of the disk, in pieces of at most 256 KiB.

    The range is whole sectors. `looked` is called with the number of bytes examined. Raises IoFailed.
    """
    buffer = memoryview(bytearray(_PIECE_BYTES))
    for extent in chain.extents(whole_sectors(offset_bytes), whole_sectors(size_bytes), find_holes=True):
        if extent.kind is not ExtentKind.DATA:
            if looked is not None:
                looked(extent.size_bytes)
            continue
        step = whole_sectors(_PIECE_BYTES)
        for sector in range(extent.sector_index, extent.end_sector, step):
            piece = buffer[: sectors_to_bytes(min(step, extent.end_sector - sector))]
            chain.read_into(sector, piece)
            raw = bytes(piece)
            if raw != _ZEROS[: len(raw)]:
                start = len(raw) - len(raw.lstrip(b"\0"))
                yield sectors_to_bytes(sector) + start, len(raw.rstrip(b"\0")) - start
            if looked is not None:
                looked(len(raw))


def is_zero_in_disk(chain: Chain, offset_bytes: int, size_bytes: int) -> bool:
    """True if the disk holds only zeros there; space past its end counts as zeros. Raises IoFailed."""
    inside = max(0, min(size_bytes, chain.size_bytes - offset_bytes))
    return inside == 0 or next(data_of_disk(chain, offset_bytes, inside), None) is None


def data_ranges(view: memoryview) -> list[tuple[int, int]]:
    """The byte ranges of `view` (whole sectors) that are not zeros, on pages from its start."""
    size = len(view)
    page_count = size // PAGE_SIZE
    words = np.frombuffer(view, dtype=np.uint64, count=page_count * _WORDS_PER_PAGE).reshape(
        page_count, _WORDS_PER_PAGE
    )
    # Most pages with data have some in their first word; only if some have not, all are examined completely.
    has_data = words[:, 0] != 0
    known = np.count_nonzero(has_data)
    if known < page_count and (known or words.max()):  # else all data, or all zeros
        has_data = np.bitwise_or.reduce(words, axis=1) != 0
    pages = np.flatnonzero(has_data)
    ranges: list[tuple[int, int]] = []
    if len(pages):
        breaks = np.flatnonzero(pages[1:] - pages[:-1] > _MIN_HOLE_PAGES)
        starts = [pages[0], *pages[breaks + 1]]
        stops = [*pages[breaks], pages[-1]]
        ranges = [(int(a) * PAGE_SIZE, (int(b) + 1) * PAGE_SIZE) for a, b in zip(starts, stops, strict=True)]
    tail = page_count * PAGE_SIZE
    if tail < size and any(view[tail:]):
        if ranges and ranges[-1][1] == tail:
            ranges[-1] = (ranges[-1][0], size)
        else:
            ranges.append((tail, size))
    return ranges
