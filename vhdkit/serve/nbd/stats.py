# SPDX-License-Identifier: Apache-2.0
"""A server's counters, cheap enough for the hot path.

Decides what is counted. Knows nothing about sockets or disks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_BUCKETS = 40  # of the histogram: bucket n holds times of less than 2**n nanoseconds


@dataclass(slots=True)
class Stats:
    """Counters since the server began, and how long requests took inside it."""

    requests: int = 0
    errors: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0
    latency: list[int] = field(default_factory=lambda: [0] * _BUCKETS)

    def batch(self, count: int, nanoseconds: int) -> None:
        """Count `count` requests served together in that time: each of them waited for all of it."""
        self.requests += count
        self.latency[min(nanoseconds.bit_length(), _BUCKETS - 1)] += count

    def histogram_us(self) -> dict[float, int]:
        """Requests by upper bound of their duration in microseconds; only non-empty buckets."""
        return {(1 << bit) / 1000: count for bit, count in enumerate(self.latency) if count}
