# SPDX-License-Identifier: Apache-2.0
"""Machines that start and stop with their host: who does, in which order, and what follows a way that fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from vmm import automatic, registry
from vmm.errors import NoSpace, QemuFailed, TimedOut, VmmError
from vmm.manager import Manager
from vmm.spec import make_spec
from vmm.state import MachineState, note_running


class Played(Manager):
    """A manager whose machines only say what is done with them."""

    def __init__(self) -> None:
        self.states: dict[str, MachineState] = {}
        self.did: list[str] = []
        self.failing: dict[str, VmmError] = {}

    def _do(self, verb: str, name: str, after: MachineState) -> None:
        self.did.append(f"{verb} {name}")
        if error := self.failing.get(f"{verb} {name}"):
            raise error
        self.states[name] = after
        if after is not MachineState.RUNNING:
            note_running(registry.load(name).paths, False)

    def state(self, name: str) -> MachineState:
        """What it was put into, or off."""
        return self.states.get(name, MachineState.OFF)

    def start(self, name: str, **more: Any) -> MachineState:
        """Only noted."""
        self._do("start", name, MachineState.RUNNING)
        return MachineState.RUNNING

    def save(self, name: str, **more: Any) -> None:
        """Only noted."""
        self._do("save", name, MachineState.SAVED)

    def shutdown(self, name: str, **more: Any) -> None:
        """Only noted."""
        self._do("shutdown", name, MachineState.OFF)

    def stop(self, name: str, **more: Any) -> None:
        """Only noted."""
        self._do("stop", name, MachineState.OFF)


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Played:
    """A home without machines, and a manager who plays."""
    monkeypatch.setenv("VMM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VMM_RUNTIME", str(tmp_path / "run"))
    return Played()


def add(name: str, **actions: object) -> registry.Machine:
    """A machine with these automatic actions."""
    return registry.add(make_spec(name=name, automatic=actions))


def test_who_starts_with_the_host(manager: Played) -> None:
    """Always, never, or only when it ran when the host stopped; one that runs already is left alone."""
    add("always", start="always")
    add("never", start="nothing")
    add("was-off")
    note_running(add("ran").paths, True)
    note_running(add("never-but-ran", start="nothing").paths, True)
    add("runs-already", start="always")
    manager.states["runs-already"] = MachineState.RUNNING
    outcomes = automatic.start_machines(cast("Manager", manager))
    assert sorted(manager.did) == ["start always", "start ran"]
    assert {one.machine: one.done for one in outcomes} == {"always": "started", "ran": "started"}


def test_delays_count_from_the_beginning(manager: Played) -> None:
    """The shortest delay comes first, equal ones by name, and each waits only for what is left of its own."""
    add("c", start="always", start_delay_seconds=20)
    add("b", start="always")
    add("a", start="always", start_delay_seconds=10)
    waits: list[float] = []
    automatic.start_machines(manager, sleep=waits.append)
    assert manager.did == ["start b", "start a", "start c"]
    assert waits[0] == 0 and 9 < waits[1] <= 10 and 19 < waits[2] <= 20


def test_one_failure_is_no_others(manager: Played, tmp_path: Path) -> None:
    """A machine that does not start, or cannot be read, is told and keeps no other from starting."""
    add("bad", start="always")
    add("good", start="always")
    broken = add("broken", start="always")
    Path(broken.paths.definition).write_text("{")
    manager.failing["start bad"] = QemuFailed("no")
    outcomes = {one.machine: one for one in automatic.start_machines(manager)}
    assert outcomes["good"].problem is None and manager.states == {"good": MachineState.RUNNING}
    assert outcomes["bad"].done == outcomes["broken"].done == "failed"


def test_how_machines_stop(manager: Played) -> None:
    """Each as its action says; those that do not run are not touched."""
    for name, action in (("a", "save"), ("b", "shut-down"), ("c", "turn-off")):
        add(name, stop=action)
        manager.states[name] = MachineState.RUNNING
    add("off")
    done = {one.machine: one.done for one in automatic.stop_machines(manager)}
    assert done == {"a": "saved", "b": "shut down", "c": "turned off"}
    assert sorted(manager.did) == ["save a", "shutdown b", "stop c"]


def test_ways_that_fail(manager: Played) -> None:
    """What cannot be saved is shut down, what does not shut down is turned off, and what does neither is told."""
    add("full")
    add("deaf")
    add("stuck", stop="turn-off")
    for name in ("full", "deaf", "stuck"):
        manager.states[name] = MachineState.RUNNING
    manager.failing = {
        "save full": NoSpace("full"),
        "save deaf": NoSpace("full"),
        "shutdown deaf": TimedOut("no answer"),
        "stop stuck": QemuFailed("no"),
    }
    outcomes = {one.machine: one for one in automatic.stop_machines(manager)}
    assert outcomes["full"].done == "shut down" and outcomes["deaf"].done == "turned off"
    assert outcomes["stuck"].done == "failed" and isinstance(outcomes["stuck"].problem, QemuFailed)


def test_stopped_by_the_host_starts_again(manager: Played) -> None:
    """What ran when the host stopped runs again when it starts; what its user stopped does not."""
    for name in ("by-host", "by-user"):
        add(name)
        manager.start(name)
        note_running(registry.load(name).paths, True)
    manager.stop("by-user")
    automatic.stop_machines(manager)
    manager.did.clear()
    automatic.start_machines(manager)
    assert manager.did == ["start by-host"]
