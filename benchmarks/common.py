# SPDX-License-Identifier: Apache-2.0
"""What every benchmark needs: rows, medians, a table and JSON, where the files go, and how servers are started.

Decides how numbers are shown and how runs are interleaved: every round runs all contestants, so that a
machine whose speed drifts treats them alike. Also decides that nothing outlives a benchmark: SIGTERM, as `timeout`
sends it, ends the program in order, and what `start_beside` started dies with it even if it is killed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table

_PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass(slots=True)
class Row:
    """One contestant: its values round by round, and what it is compared with."""

    name: str
    values: list[float] = field(default_factory=list)
    note: str = ""

    @property
    def median(self) -> float:
        """The value to quote."""
        return statistics.median(self.values)


def arguments(description: str, *, rounds: int = 5) -> argparse.ArgumentParser:
    """The options every benchmark has. From now on SIGTERM ends the program as Ctrl-C does."""
    signal.signal(signal.SIGTERM, _end)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="counted rounds (at least 3)")
    parser.add_argument("--dir", type=Path, help="folder for the test files (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return parser


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one would end the cleaning up
    raise SystemExit(128 + number)


def start_beside(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """Start a program that runs beside the benchmark, such as a server; `options` are those of `Popen`.

    The kernel kills it if the benchmark dies. Call this from the main thread, whose death is what counts.
    """
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def die_with_parent() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the kernel knew
            os.kill(os.getpid(), signal.SIGKILL)

    return subprocess.Popen(command, preexec_fn=die_with_parent, **options)  # noqa: PLW1509  # no other threads yet


@contextmanager
def workplace(directory: Path | None) -> Iterator[Path]:
    """A fresh folder, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="vhdkit-bench-", dir=directory) as folder:
        yield Path(folder)


def interleaved(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, Row]:
    """Run every contestant once per round, after one round that does not count."""
    rows = {name: Row(name) for name in contestants}
    for number in range(max(rounds, 3) + 1):
        for name, run in contestants.items():
            value = run()
            if number:
                rows[name].values.append(value)
    return rows


def timed(run: Callable[[], object]) -> float:
    """Seconds that `run` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def timed_command(*command: str) -> float:
    """Seconds that a command takes, which must succeed."""
    return timed(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))


def has(tool: str) -> bool:
    """Whether a peer's program is installed."""
    return shutil.which(tool) is not None


def report(title: str, columns: list[str], rows: list[list[str]], data: dict[str, object], out: Path | None) -> None:
    """Print the table and the JSON."""
    console = Console(width=120)
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "kernel": platform.release()}
    text = json.dumps({"benchmark": title, "machine": machine, **data})
    print(text)
    if out is not None:
        out.write_text(text + "\n")
