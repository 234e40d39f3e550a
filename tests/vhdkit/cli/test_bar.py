# SPDX-License-Identifier: Apache-2.0
"""The bar on a terminal fits on one line."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from vhdkit.cli.bar import FittingBar


@pytest.mark.parametrize("endless", [False, True])
@pytest.mark.parametrize("width", [20, 39, 40, 41, 71, 72, 80, 103, 104, 200])
def test_one_line_however_narrow_the_terminal_is(width: int, endless: bool) -> None:
    """Even the largest numbers fit into 40 columns with share, speed and remaining time."""
    now = 0.0
    screen = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    bar = FittingBar(screen, endless=endless)
    bar.get_time = lambda: now
    task = bar.add_task("converting", total=None)
    for second in range(3):
        now = float(second)
        bar.update(task, completed=second * 1023 << 20, total=None if endless else 1023 << 30)
    with screen.capture() as captured:
        for one in bar.get_renderables():
            screen.print(one)
    (line,) = captured.get().splitlines()
    assert len(line) <= width and line.startswith("converting") and "…" not in line
    assert endless or "0%" in line
    if width >= 40:
        assert "1023.0 MiB/s" in line and (endless or "0:17:" in line)
