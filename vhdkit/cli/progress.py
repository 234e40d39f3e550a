# SPDX-License-Identifier: Apache-2.0
"""How far long work is: a bar with speed and time left on a terminal's standard error, plain lines elsewhere.

Decides when anything is shown at all. The library calls back with (bytes done, bytes in all).
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import click
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from vhdkit import Progress
from vhdkit.cli.common import Common
from vhdkit.cli.output import console
from vhdkit.units import format_size

_SHOW_EVERY_SECONDS = 0.1
_LINE_EVERY_SECONDS = 2.0


class _Amount(ProgressColumn):
    """How much of how much, and how fast."""

    def render(self, task: Task) -> Text:
        text = format_size(int(task.completed))
        if task.total is not None:
            text += f" of {format_size(int(task.total))}"
        if task.speed:
            text += f", {format_size(int(task.speed))}/s"
        return Text(text)


@contextlib.contextmanager
def progress_shown(
    common: Common, wanted: bool | None, doing: str, *, endless: bool = False
) -> Iterator[Progress | None]:
    """Show progress while the block runs; gives the function to call, or None when nothing is to be shown.

    `wanted` is the user's word, None when there was none. `endless` work does not know its end (a pipe).
    """
    terminal = sys.stderr is not None and sys.stderr.isatty()
    if wanted is None:
        wanted = terminal and not common.quiet and not common.json
    if not wanted:
        yield None
    elif not terminal:
        yield _by_lines(doing, endless)
    else:
        bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("" if endless else "{task.percentage:>3.0f}%"),
            _Amount(),
            *(() if endless else (TimeRemainingColumn(), TextColumn("left"))),
            console=console(stderr=True),
            transient=True,
        )
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
            click.echo(f"{doing}: {format_size(done_bytes)}{part}, {format_size(speed)}/s", err=True)

    return progress


def _now_and_then(seconds: float) -> Callable[[int, int], bool]:
    """True once in a while, so that showing costs nothing."""
    last = time.monotonic()

    def due(done_bytes: int, total_bytes: int) -> bool:
        nonlocal last
        now = time.monotonic()
        if now - last < seconds:
            return False
        last = now
        return True

    return due
