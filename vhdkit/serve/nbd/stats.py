# SPDX-License-Identifier: Apache-2.0
"""A server's counters, cheap enough for the hot path.

Decides what is counted. Knows nothing about sockets or disks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

_BUCKETS = 40  # of the histogram: bucket n holds times of less than 2**n nanoseconds
_NEVER = -(1 << 63)


@dataclass(slots=True)
class Stats:
    """Counters since the server began, and how long requests took inside it."""

    requests: int = 0
    errors: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0
    latency: list[int] = field(default_factory=lambda: [0] * _BUCKETS)
    _latest: int = 0  # the client that was served last on the loop
    _latest_ns: int = _NEVER  # when it was
    _other_ns: int = _NEVER  # when the last one other than it was

    def served(self, client: object, count: int, began_ns: int) -> None:
        """Count requests of `client` that were served together on the loop since `began_ns` (`perf_counter_ns`).

        None, if a part of a request was served.
        """
        now = time.perf_counter_ns()
        self.requests += count
        bits = (now - began_ns).bit_length()
        self.latency[bits if bits < _BUCKETS else _BUCKETS - 1] += count
        number = id(client)
        if self._latest != number:
            self._latest, self._other_ns = number, self._latest_ns
        self._latest_ns = now

    def others_since(self, client: object, ns: int) -> bool:
        """Whether clients other than `client` were served on the loop after that time. From any thread."""
        return (self._other_ns if self._latest == id(client) else self._latest_ns) > ns

    def batch(self, count: int, nanoseconds: int) -> None:
        """Count `count` requests served together in that time: each of them waited for all of it."""
        self.requests += count
        self.latency[min(nanoseconds.bit_length(), _BUCKETS - 1)] += count

    def histogram_us(self) -> dict[float, int]:
        """Requests by upper bound of their duration in microseconds; only non-empty buckets."""
        return {(1 << bit) / 1000: count for bit, count in enumerate(self.latency) if count}
