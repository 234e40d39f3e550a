# SPDX-License-Identifier: Apache-2.0
"""A line that shows progress: bytes, rate, and the remaining time.

Decides what is shown and what is left out on a narrow terminal. Pure, apart from the clock that it is given.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

_SETTLED_SECONDS = 1.0  # in the first second a rate is meaningless


class ProgressText:
    """The text for each document {"step", "done", "total"} of a long operation; sizes are in bytes."""

    def __init__(self, format_size: Callable[[int], str], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._format_size = format_size
        self._clock = clock
        self._since: tuple[int, float, int] | None = None  # the total, and when how much of it was done

    def text(self, document: dict[str, Any], columns: int) -> str:
        """The text for a line of that many columns."""
        step, done, total = str(document.get("step", "")), document.get("done"), document.get("total")
        if not (isinstance(done, int) and isinstance(total, int) and total > 0):
            self._since = None
            return step[:columns]
        if self._since is None or self._since[0] != total or done < self._since[2]:
            self._since = (total, self._clock(), done)
        share = f"{step} {min(100, done * 100 // total)} %"
        amount = f"{self._format_size(done)} of {self._format_size(total)}"
        rate = self._rate(done)
        wordings = [f"{share}, {amount}", share]
        if rate:
            left = _duration((total - done) / rate)
            per_second = f"{self._format_size(int(rate))}/s"
            wordings = [f"{share}, {amount}, {per_second}, {left} left", f"{share}, {per_second}, {left} left",
                        f"{share}, {left} left", share]  # fmt: skip
        ending = share.removeprefix(step)
        return next(
            (one for one in wordings if len(one) <= columns), f"{step[: max(columns - len(ending), 0)]}{ending}"
        )

    def _rate(self, done: int) -> float:
        """Bytes a second since the beginning; 0 while it is not known yet."""
        assert self._since is not None
        _, began, first = self._since
        seconds = self._clock() - began
        return (done - first) / seconds if seconds >= _SETTLED_SECONDS else 0.0


def bytes_shown(show: Callable[[dict[str, Any]], None], step: str) -> Callable[[int, int], None]:
    """The progress of vhdkit's verbs, (bytes done, bytes in all), as documents for `show`."""
    return lambda done, total: show({"step": step, "done": done, "total": total})


def stages_shown(show: Callable[[dict[str, Any]], None]) -> Callable[[str], Callable[[int, int], None]]:
    """The same for work in several stages: a function that gives the progress of the stage with a name."""
    return lambda step: bytes_shown(show, step)


def _duration(seconds: float) -> str:
    """ "0:42", "1:02:03"."""
    whole = int(seconds + 0.5)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
