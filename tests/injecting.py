# SPDX-License-Identifier: Apache-2.0
"""Commands of vmm that are cut short: killed or interrupted before a change of a file, or beside a journal.

For a process of its own, since a kill ends it. `soak_snapshots` draws where.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.killing import CHANGING
from vmm.model import paths
from vmm.store.snapshots import store

KILLED = 42
_CALLS = (*CHANGING, "mkdir", "rmdir", "replace", "symlink")


@dataclass(frozen=True, slots=True)
class Injection:
    """How a command ends early: before its n-th changing call, or beside the n-th journal."""

    how: str  # "", "kill" or "interrupt"
    where: str = ""  # "call", "before journal" or "after journal"
    number: int = 0

    def __str__(self) -> str:
        return f"{self.how} {self.where} {self.number}".strip() or "whole"


@contextlib.contextmanager
def injected(injection: Injection) -> Iterator[list[int]]:
    """End the process, or raise KeyboardInterrupt once, where it says; counts the changing calls."""
    calls, journals = [0], [0]

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

    write = paths.write_whole

    def write_whole(path: str, content: bytes, **options: Any) -> None:
        journals[0] += os.path.basename(path) == "snapshots.json"
        here = os.path.basename(path) == "snapshots.json" and journals[0] == injection.number
        if here and injection.where == "before journal":
            strike()
        write(path, content, **options)
        if here and injection.where == "after journal":
            strike()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "write_whole", write_whole)
        for name in _CALLS:
            patch.setattr(os, name, counted(getattr(os, name)))
        yield calls
