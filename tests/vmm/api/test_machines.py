# SPDX-License-Identifier: Apache-2.0
"""The port of a machine: read after its lock was taken, one answer for every state, and workers are not trusted."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest

from tests.vmm.snapshots.machines import Machines
from vmm.api import machines as api
from vmm.api.machine import Copies, FrozenMachine, Guest, Hardware, Life, OpenMachine
from vmm.api.running_machine import RunningMachine
from vmm.api.stopped_machine import StoppedMachine
from vmm.model.errors import VmmError, WrongState
from vmm.model.guest import GuestInfo, GuestInterface, Heartbeat, OsInfo
from vmm.processes import worker_connection
from vmm.processes.rpc import ControlClient
from vmm.processes.worker_connection import MachineRef
from vmm.snapshots.freeze import NightToCome
from vmm.store import registry
from vmm.store.state import MachineState

IMPLEMENTATIONS: tuple[type[OpenMachine], ...] = (StoppedMachine, RunningMachine)  # which a type checker compares
LIFE: dict[str, Callable[[OpenMachine], object]] = {
    "shut it down": lambda one: one.shutdown(1),
    "stop it": lambda one: one.stop(),
    "save it": lambda one: one.save(),
    "leave it": lambda one: one.stop_with_host(),
    "reset it": lambda one: one.reset(),
    "pause it": lambda one: one.pause(),
    "resume it": lambda one: one.resume(),
}
INSIDE: dict[str, Callable[[OpenMachine], object]] = {
    "need_guest": lambda one: one.need_guest(),
    "screen": lambda one: one.screen(),
    "picture": lambda one: one.picture(),
    "ping": lambda one: one.ping(),
    "guest_info": lambda one: one.guest_info(),
    "freeze": lambda one: one.freeze(1),
    "thaw": lambda one: one.thaw(),
    "set_time": lambda one: one.set_time(),
}


class Worker:
    """A worker that gives the same answer to everything, and records its requests."""

    def __init__(self, answer: object) -> None:
        self.answer = answer
        self.asked: list[tuple[str, dict[str, object]]] = []

    def call(self, method: str, *, timeout_seconds: float | None, progress: object, **params: object) -> Any:
        self.asked.append((method, params))
        return self.answer


def running(place: MachineRef, answer: object) -> tuple[RunningMachine, Worker]:
    """A machine whose worker gives this answer."""
    worker = Worker(answer)
    return RunningMachine(place, cast(ControlClient, worker), None), worker


def test_the_definition_is_read_under_the_lock(machines: Machines) -> None:
    """A change that another command made while the lock was waited for is seen."""
    machines.create()
    seen: list[str] = []

    def wait_for_it() -> None:
        with api.open("web") as machine:
            seen.append(machine.spec.notes)

    with registry.changing("web") as held:
        waiting = threading.Thread(target=wait_for_it)
        waiting.start()
        registry.save(held, held.spec.changed(notes="changed meanwhile"))
    waiting.join()
    assert seen == ["changed meanwhile"]


@pytest.mark.parametrize("doing", LIFE)
def test_refusals_name_the_state_of_a_machine_that_is_off(machines: Machines, doing: str) -> None:
    """Verbs that need a running machine name the state that it is in."""
    machines.create()
    with api.reach("web") as machine:
        assert not machine.is_running and machine.status().state is MachineState.OFF
        with pytest.raises(WrongState, match=f"web: is off: cannot {doing} now"):
            LIFE[doing](machine)


@pytest.mark.parametrize("verb", INSIDE)
def test_verbs_for_guests_of_a_machine_that_is_off(machines: Machines, verb: str) -> None:
    """The error says how to start it."""
    machines.create()
    with api.reach("web") as machine:
        assert machine.guest_summary() is None
        with pytest.raises(WrongState, match=r"is off: no guest is running \(start it: vmm start web\)"):
            INSIDE[verb](machine)


def test_items_of_a_machine_that_is_off(machines: Machines) -> None:
    """They are read without the lock and set under it, in the file that the next worker reads."""
    machines.create()
    with api.open("web") as machine:
        assert machine.set_item("role", "front end") is False
    with api.reach("web") as machine:
        assert machine.items() == {"host": {"role": "front end"}, "guest": {}}
        assert machine.get_item("role").pool == "host"
        with pytest.raises(AssertionError, match="must be opened to be changed"):
            machine.delete_item("role")


def test_a_machine_opened_without_its_lock_cannot_be_changed(machines: Machines) -> None:
    """Every change requires the lock."""
    machines.create()
    with api.reach("web") as machine:
        for change in (
            lambda: machine.change_settings({"notes": "x"}),
            lambda: machine.remove_disk("disk-0"),
            lambda: machine.limit_snapshots(3),
            lambda: machine.delete_snapshot("a"),
            machine.discard_saved,
        ):
            with pytest.raises(AssertionError, match="must be opened to be changed"):
                change()


def test_only_a_stopped_machine_is_opened_as_stopped(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """A running one is refused with its state and what helps."""
    machines.create()
    with api.open_stopped("web", "do that") as machine:
        assert machine.name == "web"
    monkeypatch.setattr(worker_connection, "contact", lambda *words, **named: Connected())
    refused = pytest.raises(WrongState, match=r"web: is paused: cannot do that now \(shut it down: vmm shutdown web\)")
    with refused, api.open_stopped("web", "do that"):
        raise AssertionError("it was opened")


class Connected(Worker):
    """A connection to a worker whose machine is paused."""

    def __init__(self) -> None:
        super().__init__({"state": "paused"})

    def call(self, method: str, **named: Any) -> Any:
        return self.answer

    def __enter__(self) -> Connected:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass


def test_answers_become_typed_values(machines: Machines) -> None:
    """A worker's answer is a value of a known type."""
    machines.create()
    place = MachineRef.of("web")
    assert running(place, {"state": "ok", "seen_seconds_ago": 0.5})[0].ping() == Heartbeat("ok", 0.5)
    system = {"name": "Debian", "version": "13", "kernel": "6.12", "machine": "x86_64", "host_name": "web"}
    card = {"name": "eth0", "mac": "00:15:5d:00:00:01", "addresses": ["10.0.0.5/24"]}
    document = {"heartbeat": "ok", "seen_seconds_ago": None, "os": system, "interfaces": [card]}
    info = GuestInfo("ok", None, OsInfo(**system), (GuestInterface("eth0", "00:15:5d:00:00:01", ("10.0.0.5/24",)),))
    assert running(place, document)[0].guest_info() == info
    assert running(place, {"state": "running", "guest": document})[0].guest_summary() == info
    assert running(place, {"state": "running"})[0].guest_summary() is None
    machine, worker = running(place, {"count": 2})
    assert machine.freeze(3.0) == 2 and worker.asked == [("agent-freeze", {"max_seconds": 3.0})]
    night = NightToCome("1" * 32, "/b", "2" * 32, "maker")
    frozen = running(place, {"agent": True, "pause_seconds": 0.25})[0].freeze_disks(night, consistent=True)
    assert frozen == FrozenMachine("agent", 0.25)


@pytest.mark.parametrize(
    "answer", [None, {}, [], "text", {"os": 7, "interfaces": 7}, {"interfaces": [{}], "os": None}]
)
def test_malformed_answers_of_a_worker(machines: Machines, answer: object) -> None:
    """The answer of a worker of another version is an error with a hint, never a traceback."""
    machines.create()
    place = MachineRef.of("web")
    for ask in (RunningMachine.guest_info, RunningMachine.ping, RunningMachine.thaw, RunningMachine.items):
        with pytest.raises(VmmError, match="cannot understand the answer"):
            ask(running(place, answer)[0])


def test_the_port_uses_only_plain_values() -> None:
    """Parameters and results of every method could be sent over a network: none depends on this host."""
    local = (
        "Changing",
        "Held",
        "Lock",
        "MachineRef",
        "Paths",
        "ControlClient",
        "socket",
        "Machine,",
        "tuple[str",
        "[Any]",
    )
    for part in (Life, Hardware, Copies, Guest):
        for name, method in inspect.getmembers(part, inspect.isfunction):
            if not name.startswith("_"):
                types = inspect.signature(method).return_annotation, *inspect.get_annotations(method).values()
                assert not any(word in str(one) for word in local for one in types), name
