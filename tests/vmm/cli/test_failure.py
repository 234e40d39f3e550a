# SPDX-License-Identifier: Apache-2.0
"""What a Ctrl-C means once the command `vmm` is there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vmm.cli import failure

_CTRL_C_IN_VERB = """
import os, signal, sys
from vmm.cli import entry
import vmm.manager
def names(self, **options):
    os.kill(os.getpid(), signal.SIGINT)
vmm.manager.Manager.machines = names
sys.argv = ["vmm", "list"]
entry.main()
"""


def test_ctrl_c_in_a_verb() -> None:
    """In a verb a Ctrl-C is one line and exit code 130."""
    ended = subprocess.run(
        [sys.executable, "-c", _CTRL_C_IN_VERB], capture_output=True, text=True, check=False, timeout=60
    )
    assert (ended.returncode, ended.stderr.strip()) == (130, "vmm: interrupted")


def test_what_standard_error_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is dropped, and not tried again at the end of the process, whose code would be 120 then."""
    with open(os.devnull, "w") as taking, open("/dev/full", "w") as full:
        for stream in (taking, full):
            stream.write("words")
            monkeypatch.setattr(sys, "stderr", stream)
            failure.settle_standard_error()
        assert full.closed and not taking.closed
