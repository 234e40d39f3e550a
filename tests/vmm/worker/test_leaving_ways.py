# SPDX-License-Identifier: Apache-2.0
"""What is tried next if a step of stopping fails, and how much time each step has; with a scripted machine."""

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
    """A machine that only records what is done with it, and fails where instructed."""

    def __init__(self, folder: Path, action: str, failing: dict[str, Any]) -> None:
        (folder / "run").mkdir()
        self.machine, self.runtime = MachinePaths(str(folder / "m")), RuntimePaths(str(folder / "run"))
        self.spec = make_spec(name="web", automatic={"stop": action})
        self.note = WorkerNote(phase=WorkerPhase.RUNNING)
        self.is_reachable, self.is_leaving = True, False
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
        assert method == "cancel"
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
    """(the recorded steps, the machine)."""

    async def scene() -> tuple[str, Played]:
        played = Played(folder, action, failing)
        before(played)
        leaving = Leaving(cast(Running, played), cast(Saving, played))
        first = leaving.begin("SIGTERM", 14.0)
        assert leaving.begin("vmm", 600.0) is first  # later callers join
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
def test_the_order_of_stop_actions(
    tmp_path: Path, action: str, failing: dict[str, Any], word: str, did: list[str]
) -> None:
    """INV-STOP-ACTION: if saving fails the machine is shut down, if that fails it is turned off, all within the
    time."""
    done, played = leave(tmp_path, action, failing)
    assert (done, played.did) == (word, did)
    assert played.given.get("save", 0) <= 8.4 and played.given.get("shut-down", 0) <= 4.0
    assert [event for event, _ in played.events] == ["host-stopping"] + ["stop-action-failed"] * len(failing)
    assert played.is_leaving


def test_another_operation_is_waited_for_only_for_a_while(tmp_path: Path) -> None:
    """INV-STOP-ACTION: a snapshot that does not end in time does not keep the machine from stopping."""

    def busy(played: Played) -> None:
        played.note.operation = "snapshot"

    began = time.monotonic()
    done, played = leave(tmp_path, "save", {"save": WrongState("busy")}, busy)
    assert (done, played.did) == ("shut down", ["save", "shut-down"])
    assert 1.9 < time.monotonic() - began < 9.0


def test_merges_are_stopped(tmp_path: Path) -> None:
    """INV-STOP-ACTION: a merge that takes hours is stopped, and the machine is saved at once."""

    def busy(played: Played) -> None:
        played.note.operation = "snapshot-merge"

    began = time.monotonic()
    done, played = leave(tmp_path, "save", {}, busy)
    assert (done, played.did) == ("saved", ["save"]) and time.monotonic() - began < 2


def test_an_operation_is_waited_for_while_there_is_time(tmp_path: Path) -> None:
    """INV-STOP-ACTION: as long as there is time left to save, the end of another operation is waited for."""

    def busy(played: Played) -> None:
        asyncio.get_running_loop().call_later(0.3, played.failing.clear)

    done, played = leave(tmp_path, "save", {"save": InUse("is busy with another operation: snapshot")}, busy)
    assert done == "saved" and set(played.did) == {"save"} and len(played.did) > 1


def test_an_unexpected_error(tmp_path: Path) -> None:
    """INV-STOP-ACTION: whatever goes wrong in one step, the next one is tried."""
    done, played = leave(tmp_path, "save", {"save": OSError(5, "broken")}, lambda played: None)
    assert (done, played.did) == ("shut down", ["save", "shut-down"])


def test_a_machine_whose_qemu_has_ended(tmp_path: Path) -> None:
    """INV-STOP-ACTION: nothing is done to a machine whose QEMU has ended in the meantime."""
    done, played = leave(tmp_path, "save", {}, lambda played: played.exited.set())
    assert (done, played.did) == ("shut down", [])
