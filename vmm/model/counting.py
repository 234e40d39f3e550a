# SPDX-License-Identifier: Apache-2.0
"""The progress of copying, in bytes: adds up what is to be copied and what has been copied.

Decides how often progress is reported. A file counts as much as the space that it takes up, because holes are not
copied. Must not know what is copied.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

TELL_SECONDS: Final = 0.1


class Counter:
    """Adds up for a progress function, which gets {"step", "done", "total"}, both in bytes."""

    def __init__(self, progress: Callable[[dict[str, Any]], None], *, clock: Callable[[], float] = time.monotonic):
        self._progress = progress
        self._clock = clock
        self._done = self._total = 0
        self._step = ""
        self._told = float("-inf")

    def expect(self, size_bytes: int) -> None:
        """So much more is to be copied."""
        self._total += size_bytes

    def expect_files(self, paths: Iterable[str]) -> None:
        """These files, too; those that are not there count for nothing."""
        for path in paths:
            try:
                self.expect(os.stat(path).st_blocks * 512)
            except FileNotFoundError:
                continue

    def begin(self, step: str) -> None:
        """Something else is copied from here on."""
        self._step = step
        self._tell()

    def did(self, size_bytes: int) -> None:
        """So much more is copied."""
        self._done += size_bytes
        if self._clock() - self._told >= TELL_SECONDS:
            self._tell()

    def _tell(self) -> None:
        self._told = self._clock()
        # A file may have been given more room than it takes up, or have grown.
        self._progress({"step": self._step, "done": self._done, "total": max(self._total, self._done)})
