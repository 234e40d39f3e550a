# SPDX-License-Identifier: Apache-2.0
"""How the commands start: a Ctrl-C while Python imports."""

from __future__ import annotations

import signal
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

# A Ctrl-C at the moment when Python looks for the library of the command line.
_CTRL_C_AT_IMPORT = """
import os, signal, sys
{before}
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "click":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv = ["command", "--version"]
from {module} import {name}
{name}()
"""
COMMANDS = {
    "vhdkit": ("vhdkit.cli.entry", "main"),
    "vhdkit-mount": ("vhdkit.cli.entry", "mount_program"),
    "vmm": ("vmm.cli.entry", "main"),
}


def begin(command: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command that receives a Ctrl-C while it imports."""
    module, name = COMMANDS[command]
    program = _CTRL_C_AT_IMPORT.format(before=before, module=module, name=name)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_while_python_imports(command: str) -> None:
    """A Ctrl-C before the command is loaded ends it by that signal, silently."""
    ended = begin(command)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize("command", ["vhdkit", "vmm"])
def test_an_ignored_ctrl_c_stays_ignored(command: str) -> None:
    """A command that was started with Ctrl-C ignored, as in a script's background, continues."""
    ended = begin(command, "signal.signal(signal.SIGINT, signal.SIG_IGN)")
    assert ended.returncode == 0 and ended.stdout.startswith(command) and not ended.stderr


def test_the_installed_commands_start_the_same_way() -> None:
    """The installed commands have the entry points that the other tests here start."""
    installed = {one.name: (one.module, one.attr) for one in entry_points(group="console_scripts")}
    assert {name: installed[name] for name in COMMANDS} == COMMANDS
