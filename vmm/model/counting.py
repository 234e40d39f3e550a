# SPDX-License-Identifier: Apache-2.0
"""Progress of a copy in bytes: sums the bytes to copy and the bytes copied.

Decides how often progress is reported. A file counts as the space that it occupies, because holes are not copied.
Must not know what is being copied.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

TELL_SECONDS: Final = 0.1


class Counter:
    """Sums up for a progress function, which receives {"step", "done", "total"}; "done" and "total" are in bytes."""

    def __init__(self, progress: Callable[[dict[str, Any]], None], *, clock: Callable[[], float] = time.monotonic):
        self._progress = progress
        self._clock = clock
        self._done = self._total = 0
        self._step = ""
        self._told = float("-inf")

    def expect(self, size_bytes: int) -> None:
        """Add to the number of bytes to copy."""
        self._total += size_bytes

    def expect_files(self, paths: Iterable[str]) -> None:
        """Add these files to what is to be copied; missing files count as nothing."""
        for path in paths:
            try:
                self.expect(os.stat(path).st_blocks * 512)
            except FileNotFoundError:
                continue

    def begin(self, step: str) -> None:
        """Start the next step of the copy."""
        self._step = step
        self._tell()

    def did(self, size_bytes: int) -> None:
        """Add to the number of bytes copied."""
        self._done += size_bytes
        if self._clock() - self._told >= TELL_SECONDS:
            self._tell()

    def _tell(self) -> None:
        self._told = self._clock()
        # A file may have grown, or the copy may need more space than the file occupies.
        self._progress({"step": self._step, "done": self._done, "total": max(self._total, self._done)})
