# SPDX-License-Identifier: Apache-2.0
"""Machines whose processes get signals to end, as when a login session ends or a host stops without systemd.

The guest prints its counter: a saved one continues where it was, one that was cut off would begin again.
"""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import vhdkit
from tests.vmm.small_guests import (
    console,
    last_tick,
    make_machine,
    processes,
    wait_counting,
    wait_state,
    wait_whole,
)
from tests.waiting import wait_until
from vmm.api.automatic import starts_with_host, stop_machines
from vmm.api.manager import Manager
from vmm.host import autostart, systemd
from vmm.host.proc import python_command, python_environment
from vmm.processes.worker_connection import MachineRef
from vmm.store.registry import load
from vmm.store.state import MachineState

pytestmark = pytest.mark.kvm
HEARING = ("keeper", "worker")
SETS = [(part,) for part in HEARING] + [("keeper", "worker", "server", "qemu")]


def tell(parts: tuple[str, ...], *numbers: int) -> None:
    """Send these signals to these processes, to all of them before any can react."""
    living = processes()
    for part, number in itertools.product(parts, numbers):
        os.kill(living[part].pid, number)


def wait_gone() -> None:
    """Wait until no process of the machine is left."""
    wait_until(
        lambda: not os.path.exists(MachineRef.of("small").runtime.folder), "the machine is off and cleaned up", 90
    )
    assert processes() == {}


def happened(manager: Manager) -> list[str]:
    """The names of the machine's events."""
    return [event.name for event in manager.events("small")]


@pytest.mark.parametrize("parts", SETS, ids="+".join)
def test_sigterm_saves_the_guest(manager: Manager, tmp_path: Path, parts: tuple[str, ...]) -> None:
    """INV-STOP-ACTION: SIGTERM to supervisor, worker, disk server and QEMU together, or to one of them first,
    saves."""
    leaf = make_machine(manager, tmp_path)
    manager.start("small")
    wait_counting(manager)
    tell(parts, signal.SIGTERM)
    wait_gone()
    assert manager.state("small") is MachineState.SAVED
    assert starts_with_host(load("small"))  # it ran when the host stopped
    events = manager.events("small")
    (stopping,) = [event for event in events if event.name == "host-stopping"]
    assert (stopping.details["action"], stopping.details["by"]) == ("save", "SIGTERM")
    assert "stop-action-failed" not in happened(manager) and "disk-server-died" not in happened(manager)
    assert vhdkit.check(leaf) == []
    before = last_tick(manager)
    manager.start("small")
    assert wait_counting(manager) > before and console(manager).count("BOOT-OK") == 1


def test_signals_to_qemu_and_disk_server_are_ignored(manager: Manager, tmp_path: Path) -> None:
    """INV-STOP-ACTION: SIGTERM and SIGHUP to QEMU and the disk server alone change nothing."""
    make_machine(manager, tmp_path)
    manager.start("small")
    wait_counting(manager)
    before = processes()
    tell(("server", "qemu"), signal.SIGTERM, signal.SIGHUP)
    for _ in range(3):
        wait_counting(manager)
    assert processes() == before and manager.state("small") is MachineState.RUNNING
    manager.stop("small")


def test_the_stop_action_turn_off(manager: Manager, tmp_path: Path) -> None:
    """INV-STOP-ACTION: the machine is powered off by us, its disks flushed; SIGHUP counts as SIGTERM."""
    leaf = make_machine(manager, tmp_path, automatic={"stop": "turn-off"})
    manager.start("small")
    wait_counting(manager)
    tell(("keeper", "worker", "server", "qemu"), signal.SIGTERM, signal.SIGHUP)
    wait_gone()
    assert manager.state("small") is MachineState.OFF
    assert happened(manager).count("host-stopping") == 1
    assert [event.details["by"] for event in manager.events("small") if event.name == "stopped"] == ["vmm"]
    assert vhdkit.check(leaf) == []


def test_a_worker_killed_while_it_stops_the_machine(manager: Manager, tmp_path: Path) -> None:
    """INV-STOP-ACTION: if the worker is killed after the signal, the next one carries out the stop action."""
    make_machine(manager, tmp_path)
    manager.start("small")
    wait_counting(manager)
    old = processes()["worker"]
    os.kill(old.pid, signal.SIGSTOP)  # it cannot act before it is killed
    os.kill(processes()["keeper"].pid, signal.SIGTERM)
    wait_until(
        lambda: os.path.exists(MachineRef.of("small").runtime.leaving), "the supervisor has received the signal"
    )
    os.kill(old.pid, signal.SIGKILL)
    wait_gone()
    assert manager.state("small") is MachineState.SAVED
    assert [event.details["by"] for event in manager.events("small") if event.name == "host-stopping"]


def test_the_hosts_command_and_the_signal_at_once(manager: Manager, tmp_path: Path) -> None:
    """INV-STOP-ACTION: ExecStop joins the signals: the machine is saved once, and the guest is not cut off."""
    make_machine(manager, tmp_path)
    manager.start("small")
    wait_counting(manager)
    tell(("keeper", "worker", "server", "qemu"), signal.SIGTERM)
    outcomes = {one.machine: one.done for one in stop_machines(manager)}
    assert outcomes in ({"small": "saved"}, {})  # (nothing was left to do)
    wait_gone()
    assert manager.state("small") is MachineState.SAVED
    assert happened(manager).count("host-stopping") == 1 and happened(manager).count("saved") == 1


def test_the_commands_of_the_systemd_unit(manager: Manager, tmp_path: Path) -> None:
    """INV-STOP-ACTION: what the systemd unit calls starts and saves machines, alongside systemd's signals."""
    make_machine(manager, tmp_path, automatic={"start": "always"})
    text = autostart.unit_text("system", [sys.executable, "-P", "-m", "vmm"], systemd.kept_environment())
    lines = dict(line.split("=", 1) for line in text.splitlines() if line.startswith(("ExecStart", "ExecStop")))
    start, stop = (shlex.split(lines[word].removeprefix(":")) for word in ("ExecStart", "ExecStop"))
    environment = python_environment()
    subprocess.run(start, env=environment, check=True, capture_output=True)
    wait_counting(manager)
    with subprocess.Popen(stop, env=environment, stdout=subprocess.DEVNULL) as stopping:
        tell(("keeper", "worker", "server", "qemu"), signal.SIGTERM)
        assert stopping.wait(90) == 0
    wait_gone()
    assert manager.state("small") is MachineState.SAVED and happened(manager).count("saved") == 1
    before = last_tick(manager)
    subprocess.run(start, env=environment, check=True, capture_output=True)
    assert wait_counting(manager) > before and console(manager).count("BOOT-OK") == 1


def test_a_paused_machine_is_saved_paused(manager: Manager, tmp_path: Path) -> None:
    """INV-STOP-ACTION: a paused machine is saved as paused."""
    make_machine(manager, tmp_path)
    manager.start("small")
    wait_counting(manager)
    manager.pause("small")
    tell(("keeper", "worker", "server", "qemu"), signal.SIGTERM)
    wait_gone()
    assert manager.state("small") is MachineState.SAVED
    manager.start("small")
    wait_whole()
    wait_state(manager, MachineState.PAUSED)


def test_a_live_merge_is_stopped_to_save_the_machine(manager: Manager, tmp_path: Path) -> None:
    """INV-STOP-ACTION: a live merge that would take an hour is stopped, the machine is saved, and nothing is lost."""
    make_machine(manager, tmp_path)
    snapshots = manager.snapshots("small")
    snapshots.create("a")
    leaf = manager.disks("small")[0].disk.path
    assert leaf is not None
    content = os.urandom(4 << 20)
    with vhdkit.open_disk(leaf, writable=True) as disk:
        disk.write(2 << 20, content)
    manager.start("small")
    wait_counting(manager)
    snapshots.create("b")
    snapshots.delete("a")
    merge = python_command("vmm", "snapshot", "merge", "small", "--live", "--max-rate", "1K")
    with subprocess.Popen(merge, env=python_environment(), stderr=subprocess.PIPE) as merging:
        wait_until(lambda: manager.show("small").operation == "snapshot-merge", "it merges")
        tell(("keeper", "worker", "server", "qemu"), signal.SIGTERM)
        assert merging.wait(30) != 0
    wait_gone()
    assert manager.state("small") is MachineState.SAVED
    assert "stop-action-failed" not in happened(manager)
    before = last_tick(manager)
    manager.start("small")
    assert wait_counting(manager) > before and console(manager).count("BOOT-OK") == 1
    manager.stop("small")
    path = manager.disks("small")[0].disk.path
    assert path is not None
    with vhdkit.open_disk(path) as disk:
        assert disk.read(2 << 20, len(content)) == content
