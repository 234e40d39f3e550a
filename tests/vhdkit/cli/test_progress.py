# SPDX-License-Identifier: Apache-2.0
"""When progress is shown, and in which form."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from vhdkit import OpenOptions
from vhdkit.cli import progress
from vhdkit.cli.common import Common
from vhdkit.cli.progress import FittingBar, progress_shown

PLAIN = Common(OpenOptions(), json=False, quiet=False, verbose=False)


def test_no_progress_without_a_terminal() -> None:
    """If standard error is not a terminal, progress is shown only on request."""
    with progress_shown(PLAIN, None, "converting") as show:
        assert show is None
    with progress_shown(PLAIN, False, "converting") as show:
        assert show is None


def test_lines_on_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """--progress without a terminal prints plain lines with amount and speed."""
    monkeypatch.setattr(progress, "_LINE_EVERY_SECONDS", 0)
    with progress_shown(PLAIN, True, "converting") as show:
        assert show is not None
        show(1 << 20, 4 << 20)
    with progress_shown(PLAIN, True, "reading", endless=True) as show:
        assert show is not None
        show(1 << 20, 1 << 20)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("converting: 1.0 MiB of 4.0 MiB (25%), ") and first.endswith("/s")
    assert second.startswith("reading: 1.0 MiB, ")


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal a bar is drawn and erased again; --quiet and --json have none."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "_SHOW_EVERY_SECONDS", 0)
    monkeypatch.setenv("TERM", "xterm")
    with progress_shown(PLAIN, None, "converting") as show:
        assert show is not None
        show(3 << 20, 4 << 20)
    assert "converting" in capsys.readouterr().err
    for quiet, json in ((True, False), (False, True)):
        with progress_shown(Common(OpenOptions(), json, quiet, False), None, "converting") as show:
            assert show is None


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
