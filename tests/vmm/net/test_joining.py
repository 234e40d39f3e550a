# SPDX-License-Identifier: Apache-2.0
"""Adapters whose switch is deleted and made again: disconnected in between, connected afterwards, and never two with
one address."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support import require_root_and_namespaces, require_tool
from tests.vmm.cli.running import document, good
from tests.vmm.net.machines import Namespaces
from tests.vmm.small_guests import make_machine
from tests.waiting import wait_until
from tests.warm_commands import warm
from vmm.api import adapters
from vmm.api.manager import Manager
from vmm.model import errors
from vmm.model.spec import AdapterSpec, make_adapter
from vmm.net import switches
from vmm.net.adapter import Owner, plug, setup_of
from vmm.net.host_side import HostSide
from vmm.net.joining import Joined, is_plugged, join
from vmm.net.switch_spec import make_switch
from vmm.store import registry

MACHINE_ID = "01234567-89ab-cdef-0123-456789abcdef"


def lives(port: Mapping[str, Any]) -> bool:
    """Every guest of these tests is alive."""
    return True


class Guest:
    """What a switch sees of QEMU: a bound socket."""

    def __init__(self, folder: Path, machine_id: str, mac: str) -> None:
        self.owner = Owner(machine_id, str(folder / machine_id[:8]))
        self.adapter: AdapterSpec = make_adapter(id="nic-0", switch="lab", mac=mac)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def start(self) -> None:
        """Plug in, as a starting machine does."""
        plug(self.adapter, self.owner, lambda ours: ours, lives=lives)
        self.socket.bind(setup_of(self.adapter, self.owner).peer)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home and a runtime folder for this test."""
    folder = Path(tempfile.mkdtemp(prefix="vmm-join-"))
    monkeypatch.setenv("VMM_HOME", str(folder / "home"))
    monkeypatch.setenv("VMM_RUNTIME", str(folder / "run"))
    try:
        yield folder
    finally:
        for spec in switches.load_all():
            switches.delete(spec.name, force=True)
        shutil.rmtree(folder)


@pytest.fixture
def guest(folder: Path) -> Iterator[Guest]:
    """A guest that is plugged into the switch `lab`."""
    switches.create(make_switch(name="lab"))
    one = Guest(folder, MACHINE_ID, "02:00:00:00:00:01")
    with one.socket:
        one.start()
        yield one


def test_an_adapter_joins_a_new_switch_of_the_same_name(guest: Guest) -> None:
    """Without its switch an adapter is disconnected, with the reason; it joins another one of that name."""
    first = switches.load("lab")
    assert join(guest.adapter, guest.owner, None) == Joined(first.id)
    assert join(guest.adapter, guest.owner, first.id) == Joined(first.id)
    switches.delete("lab", force=True)
    gone = join(guest.adapter, guest.owner, first.id)
    assert gone.switch_id is None and "switch 'lab' does not exist" in str(gone.problem)
    assert not HostSide(first).user.is_running(), "a deleted switch was made again"
    switches.create(make_switch(name="lab"))
    second = switches.load("lab")
    assert second.id != first.id and not is_plugged(guest.adapter, MACHINE_ID, HostSide(second))
    assert join(guest.adapter, guest.owner, None) == Joined(second.id, has_come=True)
    assert is_plugged(guest.adapter, MACHINE_ID, HostSide(second))


def test_a_switch_that_died(guest: Guest) -> None:
    """A switch whose process ended is started again, with its guest connected."""
    spec = switches.load("lab")
    HostSide(spec).user.stop()
    assert join(guest.adapter, guest.owner, spec.id) == Joined(spec.id, was_restarted=True)
    assert is_plugged(guest.adapter, MACHINE_ID, HostSide(spec))


def test_a_switch_of_the_other_back_end(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with sockets cannot join a bridge before its next start, and the reason says so."""
    switches.delete("lab", force=True)
    monkeypatch.setattr(HostSide, "ensure", lambda self: None)
    monkeypatch.setattr(HostSide, "remove", lambda self, **given: [])
    switches.create(make_switch(name="lab", backend="bridge"))
    assert "another back end" in str(join(guest.adapter, guest.owner, None).problem)


def test_a_second_guest_with_the_same_address_is_refused(guest: Guest, folder: Path) -> None:
    """A second guest with an address that is in use on the switch is refused, both when it starts and when it
    joins."""
    other = Guest(folder, "11111111-89ab-cdef-0123-456789abcdef", str(guest.adapter.mac))
    with other.socket:
        with pytest.raises(errors.InUse, match="also has the MAC address 02:00:00:00:00:01"):
            other.start()
        switches.delete("lab", force=True)
        switches.create(make_switch(name="lab"))
        other.start()
        refused = join(guest.adapter, guest.owner, None, lives)
        assert refused.switch_id is None and "MAC address" in str(refused.problem)


@pytest.mark.kvm
def test_machines_on_a_switch(manager: Manager, tmp_path: Path) -> None:
    """Deleting a switch names the machines on it; if forced, a running one is disconnected, and joins the next switch.

    A second machine with the same address does not start.
    """

    def events(name: str) -> int:
        return sum(one.name == name for one in manager.events("small"))

    switches.create(make_switch(name="lab"))
    try:
        make_machine(manager, tmp_path, adapters=[{"switch": "lab"}])
        with pytest.raises(errors.InUse, match="machines are plugged into switch 'lab': small/nic-0"):
            adapters.delete_switch("lab")
        small = registry.load("small")
        (nic,) = small.spec.adapters
        assert adapters.connection(small, nic) == adapters.AdapterConnection(None, "machine is off")
        manager.start("small")
        assert adapters.connection(small, nic) == adapters.AdapterConnection(True, "connected")
        assert adapters.delete_switch("lab", force=True).disconnected == ["small/nic-0"]
        wait_until(lambda: events("adapter-disconnected"), "the machine is notified")
        found = adapters.connection(small, nic)
        assert found.is_connected is False and "switch 'lab' does not exist" in found.words
        switches.create(make_switch(name="lab"))
        wait_until(lambda: events("adapter-connected"), "the machine joins")
        assert adapters.connection(small, nic) == adapters.AdapterConnection(True, "connected")
        make_machine(manager, tmp_path, "other")
        with registry.changing("other") as machine:
            registry.save(machine, machine.spec.changed(adapters=[nic]))
        words = r"nic-0 has the MAC address .*, which small/nic-0, already on switch 'lab', also has"
        with pytest.raises(errors.InUse, match=words):
            manager.start("other")
        manager.stop("small")
    finally:
        for spec in switches.load_all():
            switches.delete(spec.name, force=True)


@pytest.mark.kvm
def test_a_machine_can_start_without_its_switch(manager: Manager, tmp_path: Path) -> None:
    """It starts disconnected and reports that once, also with restored memory; it joins the switch that is made
    later."""

    def reports() -> list[str]:
        found = [str(one.name) for one in manager.events("small")]
        return [one for one in found if one in ("adapter-disconnected", "adapter-connected")]

    problem = "switch 'lab' does not exist; existing switches: none"
    try:
        make_machine(manager, tmp_path, adapters=[{"switch": None}])
        switches.create(make_switch(name="lab"))
        good("nic", "set", "small", "nic-0", "--switch", "lab")
        switches.delete("lab", force=True)
        assert good("start", "small") == f"small is running\nnic-0 is disconnected: {problem}\n"
        assert reports() == ["adapter-disconnected"]
        (nic,) = document("nic", "list", "small")
        assert nic["connected"] is False
        assert problem in document("nic", "show", "small", "nic-0")["connection"]
        good("save", "small")
        disconnected = [{"adapter": "nic-0", "switch": "lab", "problem": problem}]
        assert document("start", "small") == {"name": "small", "state": "running", "disconnected": disconnected}
        switches.create(make_switch(name="lab"))
        wait_until(lambda: reports() == ["adapter-disconnected"] * 2 + ["adapter-connected"], "the machine joins")
        assert document("nic", "show", "small", "nic-0")["connected"] is True
        good("save", "small")
        assert good("start", "small") == "small is running\n"
        manager.stop("small")
    finally:
        for spec in switches.load_all():
            switches.delete(spec.name, force=True)


@pytest.mark.kvm
@pytest.mark.netns
@pytest.mark.nightly
def test_a_machine_saved_on_a_deleted_bridge_is_restored(manager: Manager, tmp_path: Path) -> None:
    """It is restored with its tap, which its memory requires, and joins the next bridge of that name."""
    require_root_and_namespaces()
    require_tool("nft")
    with contextlib.closing(Namespaces()) as spaces:
        here = spaces.add("host")

        def vmm(*words: str) -> str:
            done = subprocess.run(
                ["ip", "netns", "exec", here, *warm("vmm"), *words],
                capture_output=True, text=True, timeout=600, check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"vmm {' '.join(words)}: {done.stdout}{done.stderr}"
            return done.stdout

        make_machine(manager, tmp_path)
        vmm("switch", "create", "lab", "--type", "private", "--backend", "bridge")
        vmm("nic", "add", "small", "lab,queues=2")
        vmm("start", "small")
        vmm("save", "small")
        vmm("switch", "delete", "lab", "--force")
        assert "nic-0 is disconnected: switch 'lab' does not exist" in vmm("start", "small")
        vmm("switch", "create", "lab", "--type", "private", "--backend", "bridge")
        wait_until(lambda: "adapter-connected" in [one.name for one in manager.events("small")], "it joins", 120)
        assert "master" in spaces.run(here, "ip link show type tun")
        vmm("stop", "small")
        vmm("switch", "delete", "lab", "--force")
