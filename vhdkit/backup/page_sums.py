# SPDX-License-Identifier: Apache-2.0
"""What the sum of 64 KiB of a file covers (pure).

Decides how a sum is computed, and how zeros are found. Must not know files, nor how sums are stored (`sums`).

    sum      SHA-256 of the range's mask and of its pages that are not all zeros, in order. The mask has 16 bits,
             little endian; bit 0 is the first page. A range that is all zeros has 32 zero bytes as its sum
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from vhdkit.units import KIB

RANGE_BYTES = 64 * KIB
PAGE_BYTES = 4 * KIB
PAGES = RANGE_BYTES // PAGE_BYTES
SUM_BYTES = 32
ZERO_SUM = bytes(SUM_BYTES)
_WORDS = PAGE_BYTES // 8
_ZERO_PAGE = bytes(PAGE_BYTES)
_ALL_PAGES = b"\xff\xff"


def sums_of_data(data: memoryview) -> bytes:
    """The sums of whole ranges."""
    size = len(data)
    has_data = _pages_with_data(data)
    if has_data.all():
        return b"".join(_sum(_ALL_PAGES, [data[at : at + RANGE_BYTES]]) for at in range(0, size, RANGE_BYTES))
    found = bytearray(size // RANGE_BYTES * SUM_BYTES)
    for index, one in _sums_of_pages(data, np.arange(size // PAGE_BYTES), has_data):
        found[index * SUM_BYTES : (index + 1) * SUM_BYTES] = one
    return bytes(found)


def sum_of_range(content: bytearray, pages: int) -> bytes:
    """The sum of a range. Only the pages whose bits are set can have data; the others are zeros."""
    mask, end = 0, 0
    parts: list[tuple[int, int]] = []
    while pages:
        bit = pages & -pages
        pages ^= bit
        at = (bit.bit_length() - 1) * PAGE_BYTES
        if content.startswith(_ZERO_PAGE, at):
            continue
        mask |= bit
        if parts and at == end:  # pages that lie side by side are one part
            parts[-1] = (parts[-1][0], at + PAGE_BYTES)
        else:
            parts.append((at, at + PAGE_BYTES))
        end = at + PAGE_BYTES
    if not mask:
        return ZERO_SUM
    with memoryview(content) as view:
        pieces = [view[begin:end] for begin, end in parts]
        whole = pieces[0] if len(pieces) == 1 else b"".join(pieces)  # so that `update` is called once
        found = hashlib.sha256(mask.to_bytes(2, "little"))
        found.update(whole)
        del pieces, whole
    return found.digest()


def sums_of_pages(data: memoryview, numbers: NDArray[np.int64]) -> Iterator[tuple[int, bytes]]:
    """(range, sum) of ranges that are not all zeros, from all of their pages that may not be; `numbers` says which
    page of the file each of them is, ascending.
    """
    return _sums_of_pages(data, numbers, _pages_with_data(data))


def _sums_of_pages(
    data: memoryview, numbers: NDArray[np.int64], has_data: NDArray[np.bool_]
) -> Iterator[tuple[int, bytes]]:
    """The same; `has_data` says which pages have any."""
    owners = numbers // PAGES
    starts = np.flatnonzero(np.diff(owners, prepend=-1))
    masks = np.add.reduceat(has_data.astype(np.uint16) << (numbers % PAGES).astype(np.uint16), starts)
    kept = np.add.reduceat(has_data.astype(np.int64), starts).tolist()
    raw, ranges, firsts = masks.astype("<u2").tobytes(), owners[starts].tolist(), starts.tolist()
    for number, (index, first, end) in enumerate(zip(ranges, firsts, [*firsts[1:], len(numbers)], strict=True)):
        if not kept[number]:
            continue
        mask = raw[2 * number : 2 * number + 2]
        if kept[number] == end - first:
            parts = [data[first * PAGE_BYTES : end * PAGE_BYTES]]
        else:
            pages = (first + np.flatnonzero(has_data[first:end])).tolist()
            parts = [data[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] for page in pages]
        yield index, _sum(mask, parts)


def _sum(mask: bytes, parts: Iterable[memoryview]) -> bytes:
    """The sum of a range with this mask, whose pages with data are these."""
    found = hashlib.sha256(mask)
    for part in parts:
        found.update(part)
    return found.digest()


def _pages_with_data(pages: memoryview) -> NDArray[np.bool_]:
    """One boolean per page. A few words of each are looked at first, as most pages that have data show it there."""
    words = np.frombuffer(pages, dtype=np.uint64).reshape(-1, _WORDS)
    found: NDArray[np.bool_] = np.any(words[:, :: _WORDS // 8], axis=1)
    rest = np.flatnonzero(~found)
    if len(rest):
        found[rest] = words[rest].any(axis=1)
    return found
