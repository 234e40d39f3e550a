# SPDX-License-Identifier: Apache-2.0
"""The progress of long work: a bar with speed and remaining time on a terminal, plain lines elsewhere.

Decides when anything is shown at all; how the bar looks is decided in `bar`. The library calls back with (bytes done,
bytes in all).
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from vhdkit import Progress
from vhdkit.cli.common import Common, print_aside
from vhdkit.cli.output import console
from vhdkit.units import format_size

if TYPE_CHECKING:
    from rich.progress import TaskID

    from vhdkit.cli.bar import FittingBar

_SHOW_EVERY_SECONDS = 0.1  # for the eye
_LINE_EVERY_SECONDS = 2.0  # for a log, which keeps each line


@contextlib.contextmanager
def progress_shown(
    common: Common, wanted: bool | None, doing: str, *, endless: bool = False
) -> Iterator[Progress | None]:
    """Show progress while the block runs; gives the function to call, or None when nothing is to be shown.

    `wanted` is the user's choice, None without one. `endless` work does not know its end (a pipe).
    """
    terminal = sys.stderr is not None and sys.stderr.isatty()
    if wanted is None:
        wanted = terminal and not common.quiet and not common.json
    if not wanted:
        yield None
    elif not terminal:
        yield _by_lines(doing, endless)
    else:
        from vhdkit.cli.bar import FittingBar  # its library takes a fifth of the start-up time, and scripts see no bar

        bar = FittingBar(console(stderr=True), endless=endless)
        with bar:
            yield _by_bar(bar, bar.add_task(doing, total=None), endless)


@contextlib.contextmanager
def stages_shown(common: Common, wanted: bool | None) -> Iterator[Callable[[str], Progress | None]]:
    """The same for work in several pieces, one after the other: gives the function to call when one begins."""
    with contextlib.ExitStack() as shown:

        def stage(doing: str) -> Progress | None:
            shown.close()
            return shown.enter_context(progress_shown(common, wanted, doing))

        yield stage


def _by_bar(bar: FittingBar, task: TaskID, endless: bool) -> Progress:
    show = _now_and_then(_SHOW_EVERY_SECONDS)

    def progress(done_bytes: int, total_bytes: int) -> None:
        if show(done_bytes, total_bytes):
            bar.update(task, completed=done_bytes, total=None if endless else total_bytes)

    return progress


def _by_lines(doing: str, endless: bool) -> Progress:
    show = _now_and_then(_LINE_EVERY_SECONDS)
    begin = time.monotonic()

    def progress(done_bytes: int, total_bytes: int) -> None:
        if show(done_bytes, total_bytes):
            part = "" if endless else f" of {format_size(total_bytes)} ({done_bytes * 100 // max(total_bytes, 1)}%)"
            speed = int(done_bytes / max(time.monotonic() - begin, 0.001))
            left = "" if endless or not speed else f", {_seconds_left((total_bytes - done_bytes) // speed)} left"
            print_aside(f"{doing}: {format_size(done_bytes)}{part}, {format_size(speed)}/s{left}")

    return progress


def _seconds_left(seconds: int) -> str:
    """A time as 1:02:03, 2:03 or 0:03."""
    minutes, hours = seconds // 60 % 60, seconds // 3600
    return f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"


def _now_and_then(seconds: float) -> Callable[[int, int], bool]:
    """A function that is true at most once in this time, so that showing costs little."""
    last = time.monotonic()

    def due(done_bytes: int, total_bytes: int) -> bool:
        nonlocal last
        now = time.monotonic()
        if now - last < seconds:
            return False
        last = now
        return True

    return due
