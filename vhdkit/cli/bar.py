# SPDX-License-Identifier: Apache-2.0
"""The bar on a terminal.

Decides what is left out on a narrow terminal, so that it stays on one line. Must not know what is done, nor when a bar
is shown (`progress`).
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from vhdkit.units import format_size

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


class FittingBar(Progress):
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
