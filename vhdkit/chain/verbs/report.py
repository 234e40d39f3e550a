# SPDX-License-Identifier: Apache-2.0
"""Progress of long work whose total becomes known only on the way.

Decides how the parts add up for a caller's progress function.
"""

from __future__ import annotations

from vhdkit.chain.engine.chain import Progress


class Report:
    """Adds up the bytes examined and moved, for the caller's progress function."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._done = self._total = 0

    def expect(self, size_bytes: int) -> None:
        """Add to the work expected."""
        self._total += size_bytes

    def did(self, size_bytes: int) -> None:
        """Add to the work done."""
        self._done += size_bytes
        if self._progress is not None:
            self._progress(self._done, max(self._total, self._done))

    def finish(self) -> None:
        """Report completion."""
        if self._progress is not None:
            self._progress(self._total, self._total)
