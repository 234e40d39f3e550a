# SPDX-License-Identifier: Apache-2.0
"""Which way follows one that fails when a host stops, and how much time each may take; with a played machine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from vmm.model.errors import InUse, NoSpace, TimedOut, WrongState
from vmm.model.paths import MachinePaths, RuntimePaths
from vmm.model.spec import make_spec
from vmm.store.state import WorkerNote, WorkerPhase
from vmm.worker.leaving import Leaving
from vmm.worker.running import Running
from vmm.worker.saving import Saving
from vmm.worker.states import End


class Played:
    """A machine that only says what is done with it, and fails where it is told to."""

    def __init__(self, folder: Path, action: str, failing: dict[str, Any]) -> None:
        (folder / "run").mkdir()
        self.machine, self.runtime = MachinePaths(str(folder / "m")), RuntimePaths(str(folder / "run"))
        self.spec = make_spec(name="web", automatic={"stop": action})
        self.note = WorkerNote(phase=WorkerPhase.RUNNING)
        self.is_reachable, self.is_leaving, self.gives_way = True, False, False
        self.server = self
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

    async def call(self, method: str) -> None:
        assert method == "cancel" and self.gives_way
        self.note.operation = None

    async def stop(self) -> None:
        self._do("turn-off")

    async def quit(self, end: End) -> None:
        self._do(f"quit {end}")

    async def kill(self) -> None:
        self._do("kill")


def leave(
    folder: Path, action: str, failing: dict[str, Any], before: Callable[[Played], None] = lambda played: None
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
def test_ways(tmp_path: Path, action: str, failing: dict[str, Any], word: str, did: list[str]) -> None:
    """INV-STOP-ACTION: what cannot be saved is shut down, what does not shut down is turned off, all in the time."""
    done, played = leave(tmp_path, action, failing)
    assert (done, played.did) == (word, did)
    assert played.given.get("save", 0) <= 8.4 and played.given.get("shut-down", 0) <= 4.0
    assert [event for event, _ in played.events] == ["host-stopping"] + ["stop-action-failed"] * len(failing)
    assert played.is_leaving


def test_another_operation_is_waited_for_and_then_not(tmp_path: Path) -> None:
    """INV-STOP-ACTION: a snapshot that does not end in time does not keep the machine from stopping."""

    def busy(played: Played) -> None:
        played.note.operation = "snapshot"

    began = time.monotonic()
    done, played = leave(tmp_path, "save", {"save": WrongState("busy")}, busy)
    assert (done, played.did) == ("shut down", ["save", "shut-down"])
    assert 1.9 < time.monotonic() - began < 9.0


@pytest.mark.parametrize("operation", ["snapshot-merge", "backup"])
def test_what_can_be_done_another_time_gives_way(tmp_path: Path, operation: str) -> None:
    """INV-STOP-ACTION: a merge or a backup that takes hours is given up, and the machine is saved at once."""

    def busy(played: Played) -> None:
        played.note.operation = operation

    began = time.monotonic()
    done, played = leave(tmp_path, "save", {}, busy)
    assert (done, played.did) == ("saved", ["save"]) and time.monotonic() - began < 2


def test_an_operation_that_takes_longer_is_waited_for(tmp_path: Path) -> None:
    """INV-STOP-ACTION: as long as there is time to save, the end of another operation is waited for."""

    def busy(played: Played) -> None:
        asyncio.get_running_loop().call_later(0.3, played.failing.clear)

    done, played = leave(tmp_path, "save", {"save": InUse("is busy with another operation: snapshot")}, busy)
    assert done == "saved" and set(played.did) == {"save"} and len(played.did) > 1


def test_an_error_that_is_none_of_ours(tmp_path: Path) -> None:
    """INV-STOP-ACTION: whatever goes wrong on one way, the next one is tried."""
    done, played = leave(tmp_path, "save", {"save": OSError(5, "broken")}, lambda played: None)
    assert (done, played.did) == ("shut down", ["save", "shut-down"])


def test_a_machine_that_has_ended_by_itself(tmp_path: Path) -> None:
    """INV-STOP-ACTION: nothing is done to a machine whose QEMU has ended meanwhile."""
    done, played = leave(tmp_path, "save", {}, lambda played: played.exited.set())
    assert (done, played.did) == ("shut down", [])
