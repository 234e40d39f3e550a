# SPDX-License-Identifier: Apache-2.0
"""Styled lines: the same as rich prints, without importing rich."""

from __future__ import annotations

import io
import sys

import pytest
from rich.text import Text

from vhdkit.cli.output import console, print_pairs, print_text
from vhdkit.cli.styled import Part

LINES: tuple[tuple[Part, ...], ...] = (
    (("a.vhd", "bold"), ": fixed disk"),
    (("error:   ", "bold red"), "x [red]y[/red] :smile:"),
    (("", "dim"), ("kind", "dim"), "  ", ("ä·│", "yellow"), ("x", "cyan"), ("y", "bold green"), ("z", "")),
    (),
    ("x" * 300, ("  ", "red")),
)
ENVIRONMENTS: tuple[dict[str, str], ...] = (
    {},
    {"TERM": "xterm-256color"},
    {"TERM": "xterm", "COLORTERM": "truecolor"},
    {"TERM": "linux", "NO_COLOR": "1"},
    {"TERM": "linux", "NO_COLOR": ""},
    {"TERM": "dumb"},
    {"TERM": "unknown", "FORCE_COLOR": "1"},
    {"TERM": "xterm", "FORCE_COLOR": "1"},
    {"TERM": "xterm", "FORCE_COLOR": ""},
    {"TERM": "xterm", "TTY_COMPATIBLE": "0", "FORCE_COLOR": "1"},
    {"TERM": "xterm", "TTY_COMPATIBLE": "1"},
    {"TERM": "xterm", "TTY_COMPATIBLE": "x"},
)
VARIABLES = ("TERM", "COLORTERM", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE")


class Output(io.StringIO):
    """A standard output that claims to be a terminal or not."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self.terminal


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("number", range(len(ENVIRONMENTS)))
def test_lines_look_as_rich_prints_them(number: int, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every kind of terminal, in a pipe, and whatever the environment requests: byte for byte the same."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in ENVIRONMENTS[number].items():
        monkeypatch.setenv(name, value)
    ours, theirs = Output(terminal), Output(terminal)
    monkeypatch.setattr(sys, "stdout", ours)
    for line in LINES:
        print_text(*line)
    print_pairs([("a", "1"), ("longer", "x\ny"), ("empty", "")])
    monkeypatch.setattr(sys, "stdout", theirs)
    for line in LINES:
        console().print(Text.assemble(*line))
    for name, value in (("a     ", "1"), ("longer", "x\\ny")):
        console().print(Text.assemble("  ", (name, "dim"), "  ", value))
    assert ours.getvalue() == theirs.getvalue()
    assert ("\x1b[" in ours.getvalue()) <= (terminal or ENVIRONMENTS[number].get("TERM") == "xterm")
