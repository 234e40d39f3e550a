# SPDX-License-Identifier: Apache-2.0
"""A process that continues in the background: when it is ready, how it fails, and that it is detached."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from vhdkit.cli.background import start


def test_ready_is_reported_by_the_process_itself(tmp_path: Path) -> None:
    """Not earlier; then it runs without our terminal, session and working folder, and survives stray signals."""
    facts, go_on = tmp_path / "facts", tmp_path / "go-on"

    def body(ready: Callable[[], None]) -> int:
        os.write(1, b"not read by anyone")
        facts.write_text(json.dumps({"session": os.getsid(0), "folder": os.getcwd(), "input": os.read(0, 1).decode()}))
        ready()
        while not go_on.exists():
            time.sleep(0.01)  # this is the program under test, which ends when it is asked to
        return 7

    child = start(body, talks=False)
    assert child.is_ready and child.output == ""
    facts_found = json.loads(facts.read_text())
    assert facts_found == {"session": child.pid, "folder": "/", "input": ""}
    os.kill(child.pid, signal.SIGUSR1)  # asks for progress, which must not end it
    go_on.touch()
    assert child.wait() == 7


def test_output_before_ready_is_the_reason_of_the_failure() -> None:
    """The reason is what the process wrote, or the message of an exception; never a traceback."""

    def writes(ready: Callable[[], None]) -> int:
        os.write(2, b"no such thing")
        return 3

    def raises(ready: Callable[[], None]) -> int:
        raise ValueError("broken")

    first, second = start(writes, talks=False), start(raises, talks=False)
    assert (first.is_ready, first.output, first.wait()) == (False, "no such thing", 3)
    assert (second.is_ready, second.output, second.wait()) == (False, "ValueError: broken\n", 1)
