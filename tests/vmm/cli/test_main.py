# SPDX-License-Identifier: Apache-2.0
"""`vmm` alone, its version, and a wrong word."""

from __future__ import annotations

from importlib.metadata import version

from click.testing import CliRunner

from vmm.cli.main import main


def test_alone_prints_help() -> None:
    """Without a command it explains itself, lists every verb, and succeeds."""
    result = CliRunner().invoke(main, [])
    assert result.exit_code == 0
    assert "  start " in result.output and "  disk " in result.output


def test_version() -> None:
    """--version names the command and the version of the installed project."""
    result = CliRunner().invoke(main, ["--version"])
    assert result.exit_code == 0
    assert result.output.strip() == f"vmm, version {version('vhdkit')}"


def test_unknown_command_is_a_usage_error() -> None:
    """An unknown command ends with exit code 2 and names the command."""
    result = CliRunner().invoke(main, ["fly"])
    assert result.exit_code == 2
    assert "fly" in result.output
