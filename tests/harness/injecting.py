# SPDX-License-Identifier: Apache-2.0
"""Commands that end early: killed or interrupted before a change of a file, or beside an entry of a journal.

Where `killing` tries every point in turn, an `Injection` names one, so that a caller can draw it at random and repeat
it. Meant for a process of its own, since a kill ends that process with exit code `KILLED`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

from tests.harness.killing import CHANGING

KILLED = 42
_CALLS = (*CHANGING, "mkdir", "rmdir", "replace", "symlink")


@dataclass(frozen=True, slots=True)
class Injection:
    """How a command ends early: before its n-th changing call, or around the n-th journal entry."""

    how: str  # "", "kill" or "interrupt"
    where: str = ""  # "call", "before journal" or "after journal"
    number: int = 0

    def __str__(self) -> str:
        return f"{self.how} {self.where} {self.number}".strip() or "whole"


@dataclass(frozen=True, slots=True)
class Journal:
    """The writer of a journal: `module.function(path, content, ...)`, where the file at `path` has this `name`."""

    module: ModuleType
    function: str
    name: str


@contextlib.contextmanager
def injected(injection: Injection, journal: Journal) -> Iterator[list[int]]:
    """End the process, or raise KeyboardInterrupt once, where `injection` says; the list counts the changing calls."""
    calls, entries = [0], [0]

    def strike() -> None:
        if injection.how == "kill":
            os._exit(KILLED)
        raise KeyboardInterrupt

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            calls[0] += 1
            if injection.where == "call" and calls[0] == injection.number:
                strike()
            return call(*args, **options)

        return wrapped

    write = getattr(journal.module, journal.function)

    def written(path: str, *args: Any, **options: Any) -> None:
        is_entry = os.path.basename(path) == journal.name
        entries[0] += is_entry
        here = is_entry and entries[0] == injection.number
        if here and injection.where == "before journal":
            strike()
        write(path, *args, **options)
        if here and injection.where == "after journal":
            strike()

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(journal.module, journal.function, written))
        for name in _CALLS:
            patches.enter_context(mock.patch.object(os, name, counted(getattr(os, name))))
        yield calls
