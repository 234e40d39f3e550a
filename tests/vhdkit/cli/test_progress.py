# SPDX-License-Identifier: Apache-2.0
"""When progress is shown, and in which form."""

from __future__ import annotations

import pytest

from vhdkit import OpenOptions
from vhdkit.cli import progress
from vhdkit.cli.common import Common
from vhdkit.cli.progress import progress_shown

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
    assert first.startswith("converting: 1.0 MiB of 4.0 MiB (25%), ") and first.endswith(" left")
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
