# SPDX-License-Identifier: Apache-2.0
"""The progress of long work: a bar with speed and remaining time on a terminal, plain lines elsewhere.

Decides when anything is shown at all, and what is left out on a narrow terminal to stay on one line. The
library calls back with (bytes done, bytes in all).
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console, RenderableType
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from vhdkit import Progress
from vhdkit.cli.common import Common, print_aside
from vhdkit.cli.output import console
from vhdkit.units import format_size

_SHOW_EVERY_SECONDS = 0.1  # for the eye
_LINE_EVERY_SECONDS = 2.0  # for a log, which keeps each line


_WIDE, _USUAL, _NARROW = 104, 72, 40  # columns that a terminal needs to show the bar, the total, and the speed


class _Amount(ProgressColumn):
    """How much of how much, and how fast."""

    def __init__(self, *, of_total: bool = True) -> None:
        super().__init__()
        self._of_total = of_total

    def render(self, task: Task) -> Text:
        text = format_size(int(task.completed))
        if self._of_total and task.total is not None:
            text += f" of {format_size(int(task.total))}"
        if task.speed:
            text += f", {format_size(int(task.speed))}/s"
        return Text(text)


class _Speed(ProgressColumn):
    """How fast."""

    def render(self, task: Task) -> Text:
        return Text(f"{format_size(int(task.speed))}/s" if task.speed else "")


class FittingBar(Bar):
    """What fits on one line of the terminal, even if the terminal is resized."""

    def __init__(self, screen: Console, *, endless: bool) -> None:
        what, left = TextColumn("{task.description}", markup=False), TimeRemainingColumn()
        share = TextColumn("{task.percentage:>3.0f}%")
        end: tuple[ProgressColumn, ...] = () if endless else (left, TextColumn("left"))
        shares: tuple[ProgressColumn, ...] = () if endless else (share,)
        self._by_width: tuple[tuple[int, tuple[ProgressColumn, ...]], ...] = (
            (_WIDE, (what, BarColumn(bar_width=30), *shares, _Amount(), *end)),
            (_USUAL, (what, *shares, _Amount(), *end)),
            (_NARROW, (what, _Amount(of_total=False)) if endless else (what, share, _Speed(), left)),
            (0, (what, *shares)),
        )
        self._screen = screen
        super().__init__(console=screen, transient=True)

    def get_renderables(self) -> Iterator[RenderableType]:
        """The one line."""
        self.columns = next(columns for width, columns in self._by_width if self._screen.width >= width)
        yield self.make_tasks_table(self.tasks)


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
        bar = FittingBar(console(stderr=True), endless=endless)
        with bar:
            yield _by_bar(bar, bar.add_task(doing, total=None), endless)


def _by_bar(bar: Bar, task: TaskID, endless: bool) -> Progress:
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
            print_aside(f"{doing}: {format_size(done_bytes)}{part}, {format_size(speed)}/s")

    return progress


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
