# SPDX-License-Identifier: Apache-2.0
"""`vhdkit serve` as a separate process, for tests: started, waited for, and always ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import ROOT

SECONDS = 30


@dataclass
class Server:
    """A running server and its report of being ready."""

    process: subprocess.Popen[str]
    ready: dict[str, Any]

    @property
    def uri(self) -> str:
        """The URI of the first export."""
        return str(self.ready["uris"][0])

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal; returns (exit code, standard error)."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> tuple[int, str]:
        """Wait for the end: (exit code, standard error)."""
        _, errors = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, errors


@contextlib.contextmanager
def serving(*words: str | Path, **options: Any) -> Iterator[Server]:
    """A server that is ready, with these words on its command line; killed at the end if it still runs."""
    process = start_server(*words, **options)
    try:
        yield Server(process, read_ready(process))
    finally:
        process.kill()
        process.communicate(timeout=SECONDS)


def start_server(*words: str | Path, **options: Any) -> subprocess.Popen[str]:
    """Start `vhdkit serve --json`, or another command that serves: `verb`."""
    verb: tuple[str, ...] = options.pop("verb", ("serve",))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, "-m", "vhdkit", *verb, *map(str, words), "--json"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        **{"stderr": subprocess.PIPE, **options},
    )


def read_ready(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What it prints when it is ready; fails with its messages if it ends instead."""
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if line == "}\n":
            document: dict[str, Any] = json.loads(text)
            return document
    said = process.stderr.read() if process.stderr is not None else ""
    raise AssertionError(f"the server ended: {said}")
