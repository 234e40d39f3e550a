# SPDX-License-Identifier: Apache-2.0
"""How lines are formatted."""

from __future__ import annotations

import pytest

from vhdkit import Finding, Severity
from vhdkit.cli.output import columns, count, exact_size, print_finding, print_pairs


def test_columns_are_aligned() -> None:
    """Every column is as wide as its widest cell; there are no trailing spaces."""
    assert columns([["a", "bb"], ["ccc", "d"]], "lr") == ["a    bb", "ccc   d"]
    assert columns([["a", ""], ["b", "c"]]) == ["a", "b  c"]


def test_sizes_are_exact() -> None:
    """A terminal shows the rounded number, a pipe the exact one."""
    assert exact_size(512) == "512 B"
    assert exact_size(1 << 20) == "1.0 MiB (1048576 bytes)"
    assert [count(one, "sector") for one in (0, 1, 2)] == ["0 sectors", "1 sector", "2 sectors"]


def test_text_is_never_markup(capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets stay brackets, escape sequences become visible, empty values are left out."""
    print_pairs([("name", "[bold]x[/bold] \x1b[31m:smile:"), ("nothing", "")])
    print_finding(Finding(Severity.WARNING, "code", "[red]m[/red]\x07", "a\nb"))
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["  name  [bold]x[/bold] \\x1b[31m:smile:", "warning: a\\nb: [red]m[/red]\\x07"]
