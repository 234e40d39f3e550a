# SPDX-License-Identifier: Apache-2.0
"""At most so many bytes a second: a bucket of tokens, in which a short burst fits.

Decides how long work that has moved some bytes waits before it goes on. Must not know what moves. The wait is made of
short looks (`waiting`), so Ctrl-C and a cancellation end it at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from vhdkit import errors
from vhdkit.waiting import becomes

_BURST_SECONDS: Final = 0.1  # what may be moved at once after a pause
MIN_RATE: Final = 1024  # bytes a second: at less, a piece of 1 MiB takes a quarter of an hour


class RateLimit:
    """One limit, which several threads may share. `is_cancelled` is asked while a thread waits."""

    def __init__(self, bytes_per_second: int, is_cancelled: Callable[[], bool] | None = None) -> None:
        """Raises InvalidArgument for a rate that is too low to be meant."""
        if bytes_per_second < MIN_RATE:
            raise errors.InvalidArgument(f"a rate of {bytes_per_second} bytes a second is less than {MIN_RATE}")
        self.bytes_per_second = bytes_per_second
        self._is_cancelled = is_cancelled or (lambda: False)
        self._lock = threading.Lock()
        self._due = 0.0  # when all that was taken so far may have been moved

    def take(self, size_bytes: int) -> None:
        """Return when so many bytes may be moved, or at once if the work is cancelled."""
        with self._lock:
            now = time.monotonic()
            self._due = max(self._due, now - _BURST_SECONDS) + size_bytes / self.bytes_per_second
            wait = self._due - now
        if wait > 0:
            becomes(self._is_cancelled, wait)

    def follow(
        self, progress: Callable[[int, int], None] | None, moved: Callable[[int], int]
    ) -> Callable[[int, int], None]:
        """A progress callback that calls `progress`, then waits for what was moved since the last call.

        `moved` says how many bytes have been moved by now, from how much work is done, which may count holes.
        """
        last = moved(0)

        def limited(done: int, total: int) -> None:
            nonlocal last
            if progress is not None:
                progress(done, total)
            now = moved(done)
            if now > last:
                self.take(now - last)
            last = now

        return limited
