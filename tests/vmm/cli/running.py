# SPDX-License-Identifier: Apache-2.0
"""Run `vmm` in the test's own process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from vmm.cli.main import main


def run(*words: str | Path, stdin: str | None = None) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(main, [str(word) for word in words], input=stdin)


def good(*words: str | Path, stdin: str | None = None) -> str:
    """Run a command that must succeed, and return what it printed."""
    result = run(*words, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout


def document(*words: str | Path) -> Any:
    """Run a command that must succeed with --json, and return the document."""
    return json.loads(good(*words, "--json"))


def failure(*words: str | Path, code: int) -> str:
    """Run a command that must fail with this exit code and one line, with --json too; return the line without its
    prefix."""
    result = run(*words)
    assert result.exit_code == code, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("vmm: "), result.stderr
    again = run(*words, "--json")
    error = json.loads(again.stderr)["error"]
    assert (again.exit_code, error["exit_code"], again.stdout) == (code, code, "")
    return lines[0].removeprefix("vmm: ")
