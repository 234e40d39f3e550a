# SPDX-License-Identifier: Apache-2.0
"""The recovery action `revert`: a guest whose QEMU is killed continues from its snapshot, memory and disk, by
itself."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.vmm.small_guests import processes, wait_state
from tests.vmm.worker.test_capture import count, folder, guest
from tests.waiting import wait_until
from vmm.api import revert
from vmm.api.manager import Manager
from vmm.model.events import add_event
from vmm.store import registry
from vmm.store.state import MachineState

__all__ = ["folder"]
pytestmark = pytest.mark.kvm


def actions(manager: Manager) -> list[tuple[object, object]]:
    """The reactions to crashes: (event, action or problem)."""
    events = [one for one in manager.events("small") if one.name.startswith("recovery")]
    return [(one.name, one.details.get("action") or one.details.get("problem")) for one in events]


def kill_qemu() -> int:
    """kill -9 of QEMU; returns its process id."""
    pid = processes()["qemu"].pid
    os.kill(pid, signal.SIGKILL)
    return pid


def test_the_machine_continues_from_its_snapshot(manager: Manager, folder: Path) -> None:
    """The counter in memory is the snapshot's again and continues; later writes are gone."""
    small = guest(manager, folder, automatic={"recovery": "revert"})
    small.create("moment")
    frozen = count(manager)
    wait_until(lambda: count(manager) > frozen + 200, "it counts far")
    dead = kill_qemu()
    wait_until(lambda: "qemu" in processes() and processes()["qemu"].pid != dead, "another QEMU runs")
    wait_state(manager, MachineState.RUNNING)
    assert count(manager) < frozen + 200
    assert actions(manager) == [("recovery", "revert")]


def test_without_a_snapshot_it_is_off(manager: Manager, folder: Path) -> None:
    """If there is no snapshot to return to, that is reported, and the machine is off."""
    guest(manager, folder, automatic={"recovery": "revert"})
    kill_qemu()
    wait_until(lambda: actions(manager), "the event")
    assert actions(manager) == [("recovery-given-up", "the machine has no snapshot to go back to")]
    wait_state(manager, MachineState.OFF)


def test_repeated_crashes_end_the_recovery(manager: Manager, folder: Path) -> None:
    """A machine that crashed a few times in a row stays off."""
    small = guest(manager, folder, start=False, automatic={"recovery": "revert"})
    small.create("moment")
    machine = registry.load("small").paths
    for _ in range(revert.MAX_REVERTS):
        add_event(machine.events, "recovery", action="revert")
    revert.revert(machine)
    assert actions(manager)[-1][0] == "recovery-given-up" and "within" in str(actions(manager)[-1][1])
    assert manager.state("small") is MachineState.OFF
