# SPDX-License-Identifier: Apache-2.0
"""Adapters: their places on QEMU's bus and in the boot order, and their links."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import pytest

from tests.waiting import until
from vmm.model.paths import MachinePaths
from vmm.model.spec import MachineSpec, make_adapter, make_spec
from vmm.net import joining, switches
from vmm.net.adapter import Plugged
from vmm.net.host_side import HostSide
from vmm.net.joining import Joined
from vmm.net.switch_spec import make_switch
from vmm.net.watching import Fault
from vmm.store.back_ends import last_back_ends
from vmm.store.state import MachineState
from vmm.worker import adapter_hotplug as wiring
from vmm.worker.running import Running
from vmm.worker.states import Verb, refuse


def test_places_on_the_bus_are_derived_from_ids() -> None:
    """An adapter keeps its place when others are added and removed; one with a custom name has the place of its
    number."""
    spec = make_spec(name="x", adapters=[make_adapter(id=name) for name in ("nic-0", "nic-7", "mine")])
    slots = [wiring.slot_of(adapter, spec) for adapter in spec.adapters]
    assert slots == [20, 27, 22]
    fewer = spec.changed(adapters=spec.adapters[1:])
    assert wiring.slot_of(fewer.adapters[0], fewer) == 27


def test_only_legacy_adapters_are_booted_from() -> None:
    """They get their number in the boot order; a synthetic adapter cannot boot."""
    spec = make_spec(
        name="x", boot_order=["network"], adapters=[make_adapter(id="nic-0"), make_adapter(id="nic-1", kind="legacy")]
    )
    plugged = Plugged({"id": "w"}, {"driver": "d"}, "")
    devices = [wiring.described(adapter, spec, plugged).device for adapter in spec.adapters]
    assert "bootindex" not in devices[0]
    assert devices[1] == {"driver": "d", "bus": "pci.0", "addr": "0x15", "bootindex": 2}


@dataclass
class Folder:
    """The folder of a running machine."""

    folder: str


class FakeRunning:
    """As much of a running machine as adapter hot plugging uses; records events and monitor commands."""

    state: MachineState
    identity: None
    runtime: Folder
    machine: MachinePaths

    def __init__(self, spec: MachineSpec) -> None:
        self.spec, self.qmp = spec, self
        self.plug_adapters: object = None
        self.links: dict[str, bool] = {}
        self.events: list[dict[str, object]] = []

    async def execute(self, command: str, *, name: str, up: bool) -> None:
        """A command of the monitor."""
        assert command == "set_link"
        self.links[name] = up

    @contextlib.contextmanager
    def busy(self, operation: str) -> Iterator[None]:
        """One operation at a time."""
        yield

    def need(self, verb: Verb) -> None:
        """What its state allows."""
        refuse(verb, self.state)

    def tell(self, event: str, **details: object) -> None:
        """Record an event."""
        self.events.append({"event": event, **details})


def test_every_link_is_set_after_a_start() -> None:
    """Also to up: memory that was saved while an adapter was disconnected has its link down."""
    adapters = [make_adapter(id="nic-0", switch="lab"), make_adapter(id="nic-1", link_up=False, switch="lab")]
    adapters.append(make_adapter(id="nic-2", switch="gone"))
    running = FakeRunning(make_spec(name="x", adapters=adapters))
    wires = wiring.Wiring(cast(Running, running))
    wires._joined["nic-2"] = Joined(None, "switch 'gone' does not exist")
    asyncio.run(wires.set_links())
    assert running.links == {"nic-0": True, "nic-1": False, "nic-2": False}
    found = {"adapter": "nic-2", "switch": "gone", "problem": "switch 'gone' does not exist"}
    assert wires.disconnected() == [found]
    assert running.events == [{"event": "adapter-disconnected", **found}]


def test_repairs_of_a_switch_are_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repair is an event, and so is a failed one, with the reason."""
    adapter = make_adapter(id="nic-0", switch="lab")
    found = Joined("1", mended=("rules",), failed=(Fault("dhcp", "it does not start"),))
    monkeypatch.setattr(joining, "join", lambda *settings: found)
    monkeypatch.setattr(joining, "end_descriptor", lambda adapter: None)
    running = FakeRunning(make_spec(name="x", adapters=[adapter]))
    running.identity, running.runtime = None, Folder("/nowhere")
    wires = wiring.Wiring(cast(Running, running))
    wires._joined["nic-0"] = Joined("1")
    asyncio.run(wires._look_at(adapter))
    assert running.events == [
        {"event": "switch-mended", "switch": "lab", "what": "rules"},
        {"event": "switch-impaired", "switch": "lab", "what": "dhcp", "problem": "it does not start"},
    ]


def test_a_gateway_that_does_not_run_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One event when it ends and one when it is back, however often two adapters of the machine are checked in
    between."""
    adapters = [make_adapter(id=f"nic-{n}", switch="nat") for n in range(2)]
    problem: list[str | None] = [None]
    monkeypatch.setattr(joining, "join", lambda *settings: Joined("1", gateway_problem=problem[0]))
    monkeypatch.setattr(joining, "end_descriptor", lambda adapter: None)
    running = FakeRunning(make_spec(name="x", adapters=adapters))
    running.identity, running.runtime = None, Folder("/nowhere")
    wires = wiring.Wiring(cast(Running, running))
    wires._joined = {one.id: Joined("1") for one in adapters}
    for problem[0] in (None, "the port is taken", "the port is taken", "it ended again", None, None):
        for one in adapters:
            asyncio.run(wires._look_at(one))
    assert running.events == [
        {"event": "switch-impaired", "switch": "nat", "what": "gateway", "problem": "the port is taken"},
        {"event": "switch-mended", "switch": "nat", "what": "gateway"},
    ]


@pytest.mark.parametrize("is_known", [True, False])
def test_a_disconnected_adapter_can_be_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_known: bool
) -> None:
    """Its link and its rules are kept for the next switch; the link stays down while there is no switch."""
    monkeypatch.setenv("VMM_HOME", str(tmp_path / "home"))
    adapter = make_adapter(id="nic-0", switch="gone", link_up=False)
    running = FakeRunning(make_spec(name="x", adapters=[adapter]))
    running.state, running.identity, running.runtime = MachineState.RUNNING, None, Folder(str(tmp_path))
    wires = wiring.Wiring(cast(Running, running))
    wires._joined["nic-0"] = Joined(None, "switch 'gone' does not exist") if is_known else Joined("1")
    monkeypatch.setattr(wires, "_write_down", lambda spec: setattr(running, "spec", spec))
    wanted = adapter.model_copy(update={"link_up": True, "vlan": 7}).model_dump(mode="json")
    asyncio.run(wires._set({"adapter": wanted}, lambda document: None))
    changed = running.spec.adapters[0]
    assert (changed.link_up, changed.vlan) == (True, 7)
    assert running.links == ({} if is_known else {"nic-0": True})
    assert running.events == [{"event": "adapter-changed", "adapter": "nic-0"}]


def test_the_back_end_of_an_added_adapter_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a machine that is saved with it can be restored on the same data path if its switch is gone by then."""
    running = FakeRunning(make_spec(name="x"))
    running.state, running.identity, running.runtime = MachineState.RUNNING, None, Folder(str(tmp_path))
    running.machine = MachinePaths(str(tmp_path))
    wires = wiring.Wiring(cast(Running, running))

    async def instructed(*args: object) -> None:
        return None

    monkeypatch.setattr(wiring, "plugged_in", lambda *args: Plugged({"id": "w"}, {"driver": "d"}, "", "bridge"))
    monkeypatch.setattr(wires, "_tell_qemu", instructed)
    monkeypatch.setattr(wires, "_write_down", lambda spec: None)
    adapter = make_adapter(id="nic-3", switch="lab").model_dump(mode="json")
    asyncio.run(wires._add({"adapter": adapter}, lambda document: None))
    assert last_back_ends(running.machine) == {"nic-3": "bridge"}


def test_a_switch_that_dies_is_started_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """`INV-SWITCH-NOTICED`: its end wakes the machine's worker, whose next regular check is a day away."""
    folder = Path(tempfile.mkdtemp(prefix="vmm-wires-"))
    monkeypatch.setenv("VMM_HOME", str(folder / "home"))
    monkeypatch.setenv("VMM_RUNTIME", str(folder / "run"))
    monkeypatch.setattr(wiring, "WATCH_SECONDS", 86400.0)
    running = FakeRunning(
        make_spec(name="x", adapters=[make_adapter(id="nic-0", switch="lab", mac="02:00:00:00:00:01")])
    )
    running.state, running.identity, running.runtime = MachineState.RUNNING, None, Folder(str(folder / "m"))
    (folder / "m" / "nic-0").mkdir(parents=True)
    switches.create(make_switch(name="lab"))
    host = HostSide(switches.load("lab"))

    def is_restarted(seen: int) -> bool:
        return any(one["event"] == "switch-restarted" for one in running.events[seen:])

    async def go_through() -> None:
        wires = wiring.Wiring(cast(Running, running))

        def is_watched() -> bool:
            wires._woken.set()  # its process may not have reported its number yet
            return bool(wires._ends)

        wires._woken.set()  # the first check
        watching = asyncio.create_task(wires.watch())
        for _ in range(2):
            await until(is_watched, "the switch's process is watched")
            status = host.user.status()
            assert status is not None
            seen = len(running.events)
            wires._woken.clear()
            os.kill(status["pid"], signal.SIGKILL)
            await until(partial(is_restarted, seen), "the switch is started again")
        watching.cancel()
        await wires.put_away()
        assert not wires._ends

    try:
        asyncio.run(asyncio.wait_for(go_through(), 60))
    finally:
        switches.delete("lab", force=True)
        shutil.rmtree(folder)
