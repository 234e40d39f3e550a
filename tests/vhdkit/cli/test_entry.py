# SPDX-License-Identifier: Apache-2.0
"""How the commands begin: a Ctrl-C while Python imports."""

from __future__ import annotations

import signal
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

# A Ctrl-C at the moment in which the command line's library is looked for.
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
    """Run a command that gets a Ctrl-C while it imports."""
    module, name = COMMANDS[command]
    program = _CTRL_C_AT_IMPORT.format(before=before, module=module, name=name)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_while_python_imports(command: str) -> None:
    """A Ctrl-C before the command is there ends it by that signal, without a word."""
    ended = begin(command)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize("command", ["vhdkit", "vmm"])
def test_an_ignored_ctrl_c_stays_ignored(command: str) -> None:
    """Who was started with Ctrl-C ignored, as in a script's background, goes on."""
    ended = begin(command, "signal.signal(signal.SIGINT, signal.SIG_IGN)")
    assert ended.returncode == 0 and ended.stdout.startswith(command) and not ended.stderr


def test_the_installed_commands_begin_there() -> None:
    """What is installed as a command is what the other tests here begin with."""
    installed = {one.name: (one.module, one.attr) for one in entry_points(group="console_scripts")}
    assert {name: installed[name] for name in COMMANDS} == COMMANDS
