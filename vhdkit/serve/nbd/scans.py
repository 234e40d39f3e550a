# SPDX-License-Identifier: Apache-2.0
"""Scans: clients whose large reads bring data into memory, beside clients with small requests.

Decides which clients scan, and when one of them has to rest because others are being served. Must not know how
requests arrive, how they are read, or how they are answered.

Turns alone are not fair: to read, copy and send a quarter of a MiB that a device has just delivered takes the loop as
long as a hundred small requests, while the other client gets one batch between two of them. So while ordinary clients
are served, scans take at most one part in `REST + 1` of the loop's time, all together (`share`). The client that
waits longest goes on first. Scans do not make each other rest, and ordinary clients that pause for `RECENT_NS` let
them go on.

A client is ordinary when `_STREAMING_REQUESTS` of its requests have followed its last large read. A client with large
reads scans if a device was read for them (`_blocks_read`), on the loop or by a job, within the last `_COLD_BYTES`:
the kernel reads far ahead, so only a few reads do that. Large reads of what is in memory never rest.

`INV-SCAN-GOES-ON`: a client that rests goes on, also beside others that never pause: its turn comes, and the rest
after the turn before it has a limit (`share.MOST_REST_NS`).
"""

from __future__ import annotations

import resource
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from vhdkit.serve.nbd.share import Share
from vhdkit.units import KIB, MIB

LARGE_BYTES = 64 * KIB  # of a read: from this size on it may belong to a scan
RECENT_NS = 5_000_000  # ordinary clients count as being served this long after their last request
_STREAMING_REQUESTS = 64
_COLD_BYTES = 16 * MIB  # twice the usual limit of what the kernel reads ahead at once
_BYTES_A_NANOSECOND = 6  # that a client copies from the socket: on the same processors, often for the first time
_NEVER = -(1 << 63)

T = TypeVar("T")
CallLater = Callable[[float, Callable[[], None]], None]


def _blocks_read() -> int:
    """How many blocks this thread has made devices read. Always 0 where the kernel does not count them."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_inblock


class Scans:
    """Those of one server. All methods run on the loop's thread."""

    def __init__(
        self,
        call_later: CallLater,
        *,
        clock: Callable[[], int] = time.perf_counter_ns,
        blocks_read: Callable[[], int] = _blocks_read,
    ) -> None:
        """`call_later` and `clock`: of the loop, in seconds and nanoseconds."""
        self.clock = clock
        self.blocks_read = blocks_read
        self.ordinary_ns = _NEVER  # when an ordinary client was last served; set by its `Scan`
        self._share = Share()
        self._call_later = call_later
        self._resting: deque[tuple[Scan, Callable[[], None]]] = deque()  # the first has waited longest
        self._opens_later = False  # a timer runs

    def has_others(self, now_ns: int) -> bool:
        """Whether ordinary clients are being served."""
        return self.ordinary_ns > now_ns - RECENT_NS

    def must_rest(self, now_ns: int) -> bool:
        """Whether a scan whose turn it is not has to rest now."""
        return self.has_others(now_ns) and (self._share.left_ns(now_ns) > 0 or bool(self._resting))

    def rest(self, scan: Scan, go_on: Callable[[], None]) -> None:
        """Call `go_on` when it is the client's turn."""
        self._resting.append((scan, go_on))
        self._open_later()

    def took(self, nanoseconds: int) -> None:
        """A client with large reads took that long, beside ordinary ones: they did not pause, but had to wait."""
        self.ordinary_ns += nanoseconds

    def charge(self, now_ns: int, cost_ns: int) -> None:
        """A scan has taken that much of the loop's time."""
        self._share.charge(now_ns, cost_ns)

    def _open_later(self) -> None:
        if not self._opens_later and self._resting:
            self._opens_later = True
            left = self._share.left_ns(self.clock())
            self._call_later(min(left, RECENT_NS) / 1e9, self._open)

    def _open(self) -> None:
        """Let those go on that may. One that goes on and scans is charged, so that the next one rests."""
        self._opens_later = False
        for _ in range(len(self._resting)):
            now = self.clock()
            if self.has_others(now) and self._share.left_ns(now):
                break
            scan, go_on = self._resting.popleft()
            scan.has_turn = True
            go_on()
            scan.has_turn = False  # also if its client has gone
        self._open_later()


class Scan:
    """One client's part in them."""

    def __init__(self, scans: Scans) -> None:
        self.has_turn = False  # it has rested, and may make large reads once
        self._scans = scans
        self._streaming = 0  # requests until it is ordinary
        self._cold_bytes = 0  # that its reads may still bring without another read of the device
        self._blocks = 0
        self._is_watched = False

    def must_rest(self, now_ns: int) -> bool:
        """Whether its next large read has to wait (`Scans.rest`)."""
        return self._cold_bytes > 0 and not self.has_turn and self._scans.must_rest(now_ns)

    def begin(self, now_ns: int) -> None:
        """Large reads are about to be made."""
        self.has_turn = False
        self._streaming = _STREAMING_REQUESTS
        self._is_watched = self._scans.has_others(now_ns)
        if self._is_watched:
            self._blocks = self._scans.blocks_read()

    def end(self, began_ns: int, size_bytes: int) -> None:
        """They have taken the loop's time since then, and had that size."""
        if not self._is_watched:
            return
        scans = self._scans
        if scans.blocks_read() != self._blocks:
            self._cold_bytes = _COLD_BYTES
        now = scans.clock()
        scans.took(now - began_ns)
        if self._cold_bytes > 0:
            self._cold_bytes -= size_bytes
            scans.charge(now, now - began_ns + size_bytes // _BYTES_A_NANOSECOND)

    def noting(self, work: Callable[[], T]) -> Callable[[], T]:
        """`work`, which a job does for this client: it may read the device for its large reads."""
        if self._streaming <= 0:
            return work
        blocks_read = self._scans.blocks_read

        def noted() -> T:
            before = blocks_read()
            try:
                return work()
            finally:
                if blocks_read() != before:
                    self._cold_bytes = _COLD_BYTES

        return noted

    def served(self, count: int, began_ns: int) -> None:
        """Other requests of this client were served."""
        if self._streaming > 0:
            self._streaming -= count
        else:
            self._scans.ordinary_ns = began_ns

    def answered_late(self, count: int, began_ns: int) -> None:
        """Reads that had waited for a device were answered, which began at that time."""
        scans = self._scans
        if self._streaming > 0 and scans.has_others(began_ns):
            now = scans.clock()
            scans.took(now - began_ns)
            scans.charge(now, now - began_ns)
        else:
            self.served(count, began_ns)
