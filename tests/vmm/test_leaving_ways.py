# SPDX-License-Identifier: Apache-2.0
"""Which way follows one that fails when a host stops, and how much time each may take; with a played machine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from vmm.errors import NoSpace, TimedOut, VmmError, WrongState
from vmm.leaving import Leaving
from vmm.paths import MachinePaths, RuntimePaths
from vmm.running import End, Running
from vmm.saving import Saving
from vmm.spec import make_spec
from vmm.state import Phase, WorkerNote


class Played:
    """A machine that only says what is done with it, and fails where it is told to."""

    def __init__(self, folder: Path, action: str, failing: dict[str, VmmError]) -> None:
        (folder / "run").mkdir()
        self.machine, self.runtime = MachinePaths(str(folder / "m")), RuntimePaths(str(folder / "run"))
        self.spec = make_spec(name="web", automatic={"stop": action})
        self.note = WorkerNote(phase=Phase.RUNNING)
        self.is_reachable, self.is_leaving = True, False
        self.exited = asyncio.Event()
        self.failing = failing
        self.did: list[str] = []
        self.given: dict[str, float] = {}
        self.events: list[tuple[str, dict[str, Any]]] = []

    def tell(self, event: str, **details: object) -> None:
        self.events.append((event, details))

    def _do(self, verb: str) -> None:
        self.did.append(verb)
        if error := self.failing.get(verb):
            raise error
        self.exited.set()

    async def save(self, progress: object, *, give_up_at: float) -> None:
        self.given["save"] = give_up_at - time.monotonic()
        self._do("save")

    async def shutdown(self, seconds: float, *, beside_others: bool) -> None:
        assert beside_others
        self.given["shut-down"] = seconds
        self._do("shut-down")

    async def stop(self) -> None:
        self._do("turn-off")

    async def quit(self, end: End) -> None:
        self._do(f"quit {end}")

    async def kill(self) -> None:
        self._do("kill")


def leave(
    folder: Path, action: str, failing: dict[str, VmmError], before: Callable[[Played], None] = lambda played: None
) -> tuple[str, Played]:
    """(what was said to be done, the machine)."""

    async def scene() -> tuple[str, Played]:
        played = Played(folder, action, failing)
        before(played)
        leaving = Leaving(cast(Running, played), cast(Saving, played))
        first = leaving.begin("SIGTERM", 14.0)
        assert leaving.begin("vmm", 600.0) is first  # whoever asks next joins
        return await first, played

    return asyncio.run(scene())


@pytest.mark.parametrize(
    ("action", "failing", "word", "did"),
    [
        ("save", {}, "saved", ["save"]),
        ("shut-down", {}, "shut down", ["shut-down"]),
        ("turn-off", {}, "turned off", ["turn-off"]),
        ("save", {"save": NoSpace("full")}, "shut down", ["save", "shut-down"]),
        ("save", {"save": NoSpace("full"), "shut-down": TimedOut("deaf")}, "turned off",
         ["save", "shut-down", "turn-off"]),
        ("shut-down", {"shut-down": WrongState("is paused")}, "turned off", ["shut-down", "turn-off"]),
    ],
)  # fmt: skip
def test_ways(tmp_path: Path, action: str, failing: dict[str, VmmError], word: str, did: list[str]) -> None:
    """INV-STOP-ACTION: what cannot be saved is shut down, what does not shut down is turned off, all in the time."""
    done, played = leave(tmp_path, action, failing)
    assert (done, played.did) == (word, did)
    assert played.given.get("save", 0) <= 8.4 and played.given.get("shut-down", 0) <= 4.0
    assert [event for event, _ in played.events] == ["host-stopping"] + ["stop-action-failed"] * len(failing)
    assert played.is_leaving


def test_another_operation_is_waited_for_and_then_not(tmp_path: Path) -> None:
    """INV-STOP-ACTION: a backup that does not end in time does not keep the machine from stopping."""

    def busy(played: Played) -> None:
        played.note.operation = "backup"

    began = time.monotonic()
    done, played = leave(tmp_path, "save", {"save": WrongState("busy")}, busy)
    assert (done, played.did) == ("shut down", ["save", "shut-down"])
    assert 1.9 < time.monotonic() - began < 9.0


def test_a_machine_that_has_ended_by_itself(tmp_path: Path) -> None:
    """INV-STOP-ACTION: nothing is done to a machine whose QEMU has ended meanwhile."""
    done, played = leave(tmp_path, "save", {}, lambda played: played.exited.set())
    assert (done, played.did) == ("shut down", [])
