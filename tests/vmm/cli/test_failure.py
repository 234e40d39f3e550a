# SPDX-License-Identifier: Apache-2.0
"""What Ctrl-C and broken output streams do once the command `vmm` is running."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmm.cli import failure
from vmm.cli.common import print_aside, progress_line
from vmm.cli.failure import settle_standard_error
from vmm.cli.main import main

_CTRL_C_IN_VERB = """
import os, signal, sys
from vmm.cli import entry
import vmm.api.manager
def names(self, **options):
    os.kill(os.getpid(), signal.SIGINT)
vmm.api.manager.Manager.machines = names
sys.argv = ["vmm", "list"]
entry.main()
"""


def test_ctrl_c_ends_a_verb() -> None:
    """In a verb, Ctrl-C leads to one line and exit code 130."""
    ended = subprocess.run(
        [sys.executable, "-c", _CTRL_C_IN_VERB], capture_output=True, text=True, check=False, timeout=60
    )
    assert (ended.returncode, ended.stderr.strip()) == (130, "vmm: interrupted")


def test_output_that_standard_error_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is dropped, and not tried again at the end of the process, whose exit code would be 120 then."""
    with open(os.devnull, "w") as taking, open("/dev/full", "w") as full:
        for stream in (taking, full):
            stream.write("words")
            monkeypatch.setattr(sys, "stderr", stream)
            failure.settle_standard_error()
        assert full.closed and not taking.closed


@pytest.mark.parametrize("is_full", [False, True])
def test_messages_that_cannot_be_written(is_full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verb that did its work has succeeded, even if standard error is broken or full."""
    monkeypatch.setenv("VMM_HOME", str(tmp_path))
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as broken, open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full if is_full else broken)
        with pytest.raises(SystemExit) as ended:
            main.main(["list"])
        for stream in (broken, full):
            with contextlib.suppress(OSError):  # what it could not write
                stream.close()
    assert ended.value.code == 0


def test_a_verb_continues_without_its_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its progress is not shown any more, and the verb continues."""
    controller, terminal = os.openpty()
    with open(terminal, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_line(shown=True) as progress:
            progress({"step": "saving memory", "done": 1, "total": 2})
            os.close(controller)
            progress({"step": "saving memory", "done": 2, "total": 2})
        print_aside("not read by anyone")
        settle_standard_error()
