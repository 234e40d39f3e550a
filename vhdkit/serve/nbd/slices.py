# SPDX-License-Identifier: Apache-2.0
"""Long commands in slices: listings, zeroing, trimming, reading ahead.

Decides where a command is cut and how long a slice takes. Must not know when the next slice runs (`jobs`) or
clients. A slice takes about a millisecond, unless a single block, or the device, takes longer. Between two slices
the disk may be replaced by another view of the same bytes, so nothing of a disk is kept across them.

Zeroing and trimming are cut only at boundaries of blocks: a whole block can be zeroed without giving it space in the
file, parts of it cannot.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator, Sequence

from vhdkit.disk import Disk
from vhdkit.image import Extent, ExtentKind
from vhdkit.serve.nbd import wire
from vhdkit.serve.nbd.protocol import Request, Transmission
from vhdkit.serve.nbd.wire import CommandFlag
from vhdkit.units import KIB, MIB, PAGE_SIZE, round_down

ALLOCATION = "base:allocation"
DEPTH = "qemu:allocation-depth"
DIRTY = "qemu:dirty-bitmap:"
STATUS_RUNS = 1 << 13  # descriptors of one context in an answer; the protocol allows more, and clients ask again
MAX_DESCRIPTORS = 1 << 15  # of all contexts in an answer
_STATUS_EXTENTS = 1 << 15  # examined for one answer; equal neighbours become one descriptor
_EXTENTS_AT_ONCE = 8  # between two looks at the clock
_LEAST_RANGE_BYTES = 64 * MIB  # listed at once; more where that was quick, as beginning a listing takes a while, too
_COMPACT_RUN_BYTES = (1 << 32) - PAGE_SIZE  # the longest run of whole pages that 32 bits can express
_LISTING_SECONDS = 0.0005  # the length of a slice of a listing, nearly all of it Python code
_LEAST_BYTES, _MOST_BYTES = 256 * KIB, 64 * MIB  # of a slice of the other commands
_QUICK_SECONDS, _SLOW_SECONDS = 0.0005, 0.0015  # shorter slices are followed by longer ones, and the reverse


class StatusRuns:
    """The runs of a range in one context, collected slice by slice: neighbours differ, the sum is within the range."""

    def __init__(self, context: str, offset: int, length: int, *, extended: bool, limit: int = STATUS_RUNS) -> None:
        """At most `limit` runs, each of a length that the framing can express."""
        self._context = context
        self._position = offset
        self._end = offset + length
        self._longest = length if extended else _COMPACT_RUN_BYTES
        self._limit = limit
        self._range_bytes = _LEAST_RANGE_BYTES
        self._left = _STATUS_EXTENTS
        # What was collected. Compact, as many clients may have unfinished listings.
        self.lengths, self.flags = array("Q"), array("I")

    def collect(self, disk: Disk, seconds: float = _LISTING_SECONDS) -> bool:
        """Continue for about that long; True when nothing is left. Raises as `Disk.extents` does."""
        flags_of = _flags_of(disk, self._context)
        deadline, count = time.perf_counter() + seconds, 0
        while self._position < self._end:
            size = min(self._range_bytes, self._end - self._position)
            extents = disk.extents(self._position, size, find_holes=self._context == ALLOCATION)
            for size_bytes, extent in _clipped(extents, self._position, size):
                count += 1
                if count % _EXTENTS_AT_ONCE == 0 and time.perf_counter() >= deadline:
                    self._range_bytes = max(self._range_bytes // 2, _LEAST_RANGE_BYTES)
                    return False
                if not self._left or not self._take(size_bytes, flags_of(extent)):
                    return True
            self._range_bytes *= 2
        return True

    def _take(self, size: int, flags: int) -> bool:
        """Add an extent; False if it could not be added as a whole: then nothing can follow."""
        if self.flags and self.flags[-1] == flags:
            whole = self.lengths[-1] + size
            self.lengths[-1] = min(whole, self._longest)
        elif len(self.flags) == self._limit:
            return False
        else:
            whole = size
            self.lengths.append(min(whole, self._longest))
            self.flags.append(flags)
        self._left -= 1
        self._position += size
        return whole <= self._longest


class Listing:
    """One BLOCK_STATUS: a run list for each context, one after the other."""

    def __init__(
        self, disk: Callable[[], Disk], contexts: Sequence[tuple[int, str]], request: Request, rules: Transmission,
        *, descriptors: int = MAX_DESCRIPTORS,
    ) -> None:  # fmt: skip
        """`contexts`: (id, name). `descriptors`: the most in the answer, but each context has at least one."""
        limit = 1 if request.flags & CommandFlag.REQ_ONE else min(max(descriptors // len(contexts), 1), STATUS_RUNS)
        offset, length = request.offset, request.length
        self._disk = disk
        self._request = request
        self._rules = rules
        self._left = [
            (number, StatusRuns(name, offset, length, extended=rules.extended, limit=limit))
            for number, name in reversed(contexts)
        ]
        self._chunks: list[bytes] = []

    def __call__(self) -> bytes | None:
        """The next slice."""
        number, runs = self._left[-1]
        if runs.collect(self._disk()):
            self._left.pop()
            raw = self._rules.status_runs(runs.lengths, runs.flags)
            self._chunks.append(self._rules.status(self._request, number, raw, last=not self._left))
        return None if self._left else b"".join(self._chunks)


class Ranged:
    """A command over a range: `run` is called with one part after the other. The answer is `answer`."""

    def __init__(self, run: Callable[[int, int], None], offset: int, length: int, grain: int, answer: bytes) -> None:
        """Parts end at multiples of `grain`, except the last one."""
        self._run = run
        self._position = offset
        self._end = offset + length
        self._grain = grain
        self._size = _LEAST_BYTES
        self._answer = answer

    def __call__(self) -> bytes | None:
        """The next slice."""
        stop = round_down(self._position + self._size, self._grain)
        if stop <= self._position:
            stop = round_down(self._position, self._grain) + self._grain
        stop = min(stop, self._end)
        began = time.perf_counter()
        self._run(self._position, stop - self._position)
        seconds = time.perf_counter() - began
        if seconds < _QUICK_SECONDS:
            self._size = min(2 * self._size, _MOST_BYTES)
        elif seconds > _SLOW_SECONDS:
            self._size = max(self._size // 2, _LEAST_BYTES)
        self._position = stop
        return None if stop < self._end else self._answer


def _flags_of(disk: Disk, context: str) -> Callable[[Extent], int]:
    """The flags of an extent in a context (rows 38 and 40)."""
    if context == ALLOCATION:
        return lambda extent: wire.STATE_HOLE | wire.STATE_ZERO if extent.kind is ExtentKind.ZERO else 0
    if context == DEPTH:  # 0: no layer owns it, 1: the leaf, n: the n-th layer
        return lambda extent: extent.layer_index + 1
    ids = disk.layer_ids
    wanted = context.removeprefix(DIRTY)
    # After a snapshot the layer is one lower in the chain, but its id is still its name.
    depth = ids.index(wanted) if wanted in ids else len(ids)
    return lambda extent: int(0 <= extent.layer_index <= depth)


def _clipped(extents: Iterator[Extent], offset: int, length: int) -> Iterator[tuple[int, Extent]]:
    """(size in bytes, extent), clipped to the requested range."""
    end = offset + length
    for extent in extents:
        start = max(extent.offset_bytes, offset)
        stop = min(extent.offset_bytes + extent.size_bytes, end)
        if stop > start:
            yield stop - start, extent
