# SPDX-License-Identifier: Apache-2.0
"""Machines that start and stop with their host: which ones, in which order, and what follows a failure."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from vmm.api import automatic
from vmm.api.manager import Manager
from vmm.model.errors import QemuFailed, VmmError
from vmm.model.spec import make_spec
from vmm.store import registry
from vmm.store.state import MachineState, note_running


class Played(Manager):
    """A manager whose machines only record what is done with them."""

    def __init__(self) -> None:
        super().__init__()
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
        """The state that the test has set, or off."""
        return self.states.get(name, MachineState.OFF)

    def start(self, name: str, **more: Any) -> MachineState:
        """Record it."""
        self._do("start", name, MachineState.RUNNING)
        return MachineState.RUNNING

    def stop_with_host(self, name: str, **more: Any) -> str:
        """Record it; the machine runs again with the host."""
        self._do("leave", name, MachineState.SAVED)
        note_running(registry.load(name).paths, True)
        return "saved"

    def stop(self, name: str, **more: Any) -> None:
        """Record it."""
        self._do("stop", name, MachineState.OFF)


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Played:
    """A home without machines, and a scripted manager."""
    monkeypatch.setenv("VMM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VMM_RUNTIME", str(tmp_path / "run"))
    return Played()


def add(name: str, **actions: object) -> registry.Machine:
    """A machine with these automatic actions."""
    return registry.add(make_spec(name=name, automatic=actions))


def test_which_machines_start_with_the_host(manager: Played) -> None:
    """Always, never, or only if it ran when the host stopped; a machine that runs already is left alone."""
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
    """The shortest delay comes first, equal ones by name, and each waits only for the rest of its own delay."""
    add("c", start="always", start_delay_seconds=20)
    add("b", start="always")
    add("a", start="always", start_delay_seconds=10)
    waits: list[float] = []
    automatic.start_machines(manager, sleep=waits.append)
    assert manager.did == ["start b", "start a", "start c"]
    assert waits[0] == 0 and 9 < waits[1] <= 10 and 19 < waits[2] <= 20


def test_one_failure_does_not_affect_others(manager: Played, tmp_path: Path) -> None:
    """A machine that does not start, or cannot be read, is reported, and the others are started."""
    add("bad", start="always")
    add("good", start="always")
    broken = add("broken", start="always")
    Path(broken.paths.definition).write_text("{")
    manager.failing["start bad"] = QemuFailed("no")
    outcomes = {one.machine: one for one in automatic.start_machines(manager)}
    assert outcomes["good"].problem is None and manager.states == {"good": MachineState.RUNNING}
    assert outcomes["bad"].done == outcomes["broken"].done == "failed"


def test_running_machines_are_stopped(manager: Played) -> None:
    """Each is stopped by its worker; machines that are off are not touched, and a failure is reported."""
    for name in ("a", "b", "stuck"):
        add(name)
        manager.states[name] = MachineState.RUNNING
    add("off")
    manager.failing = {"leave stuck": QemuFailed("no")}
    outcomes = {one.machine: one for one in automatic.stop_machines(manager)}
    assert {name: one.done for name, one in outcomes.items()} == {"a": "saved", "b": "saved", "stuck": "failed"}
    assert isinstance(outcomes["stuck"].problem, QemuFailed)
    assert sorted(manager.did) == ["leave a", "leave b", "leave stuck", "leave stuck"]


def test_machines_stopped_by_the_host_start_again(manager: Played) -> None:
    """A machine that ran when the host stopped runs again when it starts; one that its user stopped does not."""
    for name in ("by-host", "by-user"):
        add(name)
        manager.start(name)
        note_running(registry.load(name).paths, True)
    manager.stop("by-user")
    automatic.stop_machines(manager)
    manager.did.clear()
    automatic.start_machines(manager)
    assert manager.did == ["start by-host"]


def test_changes_during_the_delay_take_effect(manager: Played) -> None:
    """A machine that waits for its delay is started with the definition that it has at the end of the delay."""
    add("late", start="always", start_delay_seconds=30)

    def sleep(seconds: float) -> None:
        with registry.changing("late") as machine:
            registry.save(machine, machine.spec.changed(automatic={"start": "nothing"}))

    assert automatic.start_machines(manager, sleep=sleep) == [] and manager.did == []
