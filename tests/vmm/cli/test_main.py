# SPDX-License-Identifier: Apache-2.0
"""`vmm` without arguments, its version, and an unknown command."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest
from click.testing import CliRunner

from vmm.cli.main import main


def test_without_a_command_it_prints_help() -> None:
    """Without a command it lists every verb, and succeeds."""
    result = CliRunner().invoke(main, [])
    assert result.exit_code == 0
    assert "  start " in result.output and "  disk " in result.output


def test_version() -> None:
    """--version names the command and the version of the installed project."""
    result = CliRunner().invoke(main, ["--version"])
    assert result.exit_code == 0
    assert result.output.strip() == f"vmm, version {version('vhdkit')}"


def test_an_unknown_command_is_a_usage_error() -> None:
    """It exits with code 2 and names the command."""
    result = CliRunner().invoke(main, ["fly"])
    assert result.exit_code == 2
    assert "fly" in result.output


@pytest.mark.parametrize("verb", ["list", "start"])
def test_without_its_packages_it_says_what_to_install(verb: str) -> None:
    """If vhdkit was installed without the extra, every verb says so in one line, with the command that helps."""
    program = f"""
import sys
sys.modules["pydantic"] = sys.modules["qemu"] = None  # as if they were not there
sys.argv = ["vmm", "{verb}", "web"]
from vmm.cli.entry import main
main()
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 8 and ended.stdout == ""
    assert ended.stderr.startswith("vmm: vmm needs pydantic, qemu.qmp, which this Python lacks (pip install ")
    assert ended.stderr.count("\n") == 1
