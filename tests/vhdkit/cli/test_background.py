# SPDX-License-Identifier: Apache-2.0
"""A process that goes on alone: when it is ready, when it fails, and that it is cut off."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from vhdkit.cli.background import start


def test_it_is_ready_when_it_says_so(tmp_path: Path) -> None:
    """Not before; it then goes on without terminal, session and working folder of ours, whatever signal comes."""
    facts, go_on = tmp_path / "facts", tmp_path / "go-on"

    def body(ready: Callable[[], None]) -> int:
        os.write(1, b"nobody reads this")
        facts.write_text(json.dumps({"session": os.getsid(0), "folder": os.getcwd(), "input": os.read(0, 1).decode()}))
        ready()
        while not go_on.exists():
            time.sleep(0.01)
        return 7

    child = start(body, talks=False)
    assert child.is_ready and child.said == ""
    told = json.loads(facts.read_text())
    assert told == {"session": child.pid, "folder": "/", "input": ""}
    os.kill(child.pid, signal.SIGUSR1)  # how far are you?
    go_on.touch()
    assert child.wait() == 7


def test_what_it_says_before_it_is_ready_is_why_it_failed() -> None:
    """Its own words, or those of an exception; never a traceback."""

    def says(ready: Callable[[], None]) -> int:
        os.write(2, b"no such thing")
        return 3

    def raises(ready: Callable[[], None]) -> int:
        raise ValueError("broken")

    first, second = start(says, talks=False), start(raises, talks=False)
    assert (first.is_ready, first.said, first.wait()) == (False, "no such thing", 3)
    assert (second.is_ready, second.said, second.wait()) == (False, "ValueError: broken\n", 1)
