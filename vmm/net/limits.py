# SPDX-License-Identifier: Apache-2.0
"""Token buckets: how many frames or bytes may pass now, and how long to wait for more. Pure.

`INV-BUCKET`: over any period, at most burst + rate × time is taken (an `overdraw` is paid back first).
"""

from __future__ import annotations


class Bucket:
    """Fills at `rate_per_second` up to `burst`. It is full before its first use."""

    __slots__ = ("_level", "_then", "burst", "rate_per_second")

    def __init__(self, rate_per_second: float, burst: float) -> None:
        self.rate_per_second = rate_per_second
        self.burst = burst
        self._level = burst
        self._then: float | None = None

    def _fill(self, now: float) -> None:
        if self._then is not None:
            gained = max(0.0, now - self._then) * self.rate_per_second
            self._level = min(self.burst, self._level + gained)
        self._then = now

    def take(self, count: int, now: float) -> int:
        """Take up to `count` whole tokens; returns how many were available."""
        self._fill(now)
        taken = min(count, max(0, int(self._level)))
        self._level -= taken
        return taken

    def overdraw(self, count: float, now: float) -> None:
        """Take `count` tokens even if they are not available: later callers wait for them."""
        self._fill(now)
        self._level -= count

    def wait_seconds(self, now: float) -> float:
        """The time until the bucket is no longer overdrawn."""
        self._fill(now)
        return max(0.0, -self._level / self.rate_per_second)
