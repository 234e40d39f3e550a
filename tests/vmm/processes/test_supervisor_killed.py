# SPDX-License-Identifier: Apache-2.0
"""kill -9 of every process of a running machine and of every set of them: the guest keeps running, or the machine is
off.

The guest prints its counter, which shows that it continues; its writes are looked for in the chain afterwards.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import vhdkit
from tests.vmm.guests import boot_sector
from tests.vmm.small_guests import (
    console,
    make_machine,
    press,
    processes,
    wait_counting,
    wait_state,
    wait_whole,
)
from tests.vmm.stage import pids_naming
from tests.waiting import wait_until
from vmm.api.manager import Manager
from vmm.host.proc import ProcessRef
from vmm.model.errors import QemuFailed, StoreFailed, VmmError
from vmm.processes.worker_connection import MachineRef
from vmm.store.state import MachineState

pytestmark = pytest.mark.kvm
LOOKING_AFTER = ("keeper", "worker", "server")
PAIRS = [(("keeper", "worker"), False), (("worker", "server"), False)]  # of two processes: those of an everyday run
SETS = [part for size in (1, 2, 3) for part in itertools.combinations(LOOKING_AFTER, size)]


def kill(parts: tuple[str, ...], name: str = "small") -> dict[str, ProcessRef]:
    """kill -9 of these processes at once."""
    living = processes(name)
    victims = {part: living[part] for part in parts}
    for victim in victims.values():
        os.kill(victim.pid, 9)
    return victims


def has_written(leaf: Path) -> bool:
    """True if the guest's text is in the chain, but not in the parent."""
    at = boot_sector.WRITE_LBA * boot_sector.SECTOR
    with vhdkit.open_disk(leaf) as disk, vhdkit.open_disk(leaf.with_suffix(".vhd")) as base:
        text = boot_sector.WRITTEN_TEXT
        return disk.read(at, len(text)) == text and base.read(at, len(text)) != text


@pytest.mark.parametrize(
    ("parts", "paused"),
    [
        pytest.param(parts, paused, marks=[] if len(parts) != 2 or (parts, paused) in PAIRS else [pytest.mark.nightly])
        for parts, paused in itertools.product(SETS, (False, True))
    ],
    ids=lambda one: "+".join(one) if isinstance(one, tuple) else ("paused" if one else "running"),
)
def test_the_guest_keeps_running(manager: Manager, tmp_path: Path, parts: tuple[str, ...], paused: bool) -> None:
    """Processes that look after it are started again by each other or by the next command; QEMU stays the same
    process."""
    leaf = make_machine(manager, tmp_path)
    manager.start("small")
    wait_counting(manager)
    if paused:
        manager.pause("small")
    qemu = processes()["qemu"]
    victims = kill(parts)
    if {"keeper", "worker"} <= set(parts):
        manager.state("small")  # the next command starts them again
    now = wait_whole(but=victims)
    assert now["qemu"] == qemu
    if paused:
        wait_state(manager, MachineState.PAUSED)
        manager.resume("small")
    wait_state(manager, MachineState.RUNNING)
    wait_counting(manager)
    press(manager, "w")
    wait_until(lambda: "written " in console(manager), "the guest writes")
    manager.stop("small")
    assert processes() == {} and not os.path.exists(MachineRef.of("small").runtime.folder)
    assert has_written(leaf)
    assert vhdkit.check(leaf) == []


def test_a_machine_with_a_killed_qemu_is_off(manager: Manager, tmp_path: Path) -> None:
    """Without a recovery action the machine is off, its disks are free, nothing is left, and it can be started
    again."""
    leaf = make_machine(manager, tmp_path)
    manager.start("small")
    wait_counting(manager)
    kill(("qemu",))
    wait_until(lambda: not os.path.exists(MachineRef.of("small").runtime.folder), "the machine is off and cleaned up")
    assert manager.state("small") is MachineState.OFF and processes() == {}
    assert "qemu-died" in [event.name for event in manager.events("small")]
    assert has_written(leaf)
    vhdkit.open_disk(leaf, writable=True).close()
    manager.start("small")
    wait_counting(manager)


def test_a_killed_qemu_is_started_again(manager: Manager, tmp_path: Path) -> None:
    """With the recovery action `restart` another QEMU boots the guest; not for ever if it dies at once."""
    make_machine(manager, tmp_path, automatic={"recovery": "restart"})
    manager.start("small")
    wait_counting(manager)
    for _ in range(3):
        now = wait_whole(but=kill(("qemu",)))
        assert set(now) == {"keeper", "worker", "server", "qemu"}
        wait_state(manager, MachineState.RUNNING)
    kill(("qemu",))
    wait_state(manager, MachineState.OFF)
    assert "recovery-given-up" in [event.name for event in manager.events("small")]


@pytest.mark.parametrize("parts", [("worker", "qemu"), ("keeper", "worker", "qemu")], ids="+".join)
def test_a_qemu_that_dies_with_its_worker(manager: Manager, tmp_path: Path, parts: tuple[str, ...]) -> None:
    """Its death is noticed by the next worker, or by the next command."""
    make_machine(manager, tmp_path)
    manager.start("small")
    wait_counting(manager)
    kill(parts)
    wait_state(manager, MachineState.OFF)
    wait_until(
        lambda: not processes() and not os.path.exists(MachineRef.of("small").runtime.folder),
        "the machine is off and cleaned up",
    )
    manager.start("small")


@pytest.mark.parametrize("folder_gone", [False, True], ids=["folder stays", "folder gone"])
def test_all_processes_are_killed(manager: Manager, tmp_path: Path, folder_gone: bool) -> None:
    """As by a power cut, also with the runtime folder gone: the machine is off, and can be started."""
    leaf = make_machine(manager, tmp_path)
    manager.start("small")
    wait_counting(manager)
    runtime = MachineRef.of("small").runtime.folder
    kill(("keeper", "worker", "server", "qemu"))
    wait_until(lambda: not processes(), "all processes are dead")
    if folder_gone:
        shutil.rmtree(runtime)
    assert [(one.name, one.state) for one in manager.machines()] == [("small", MachineState.OFF)]
    assert not os.path.exists(runtime)
    manager.start("small")
    wait_counting(manager)
    manager.stop("small")
    assert has_written(leaf)


def test_a_change_after_all_processes_were_killed(manager: Manager, tmp_path: Path) -> None:
    """The first command after that may be one that changes the machine: it does not wait in vain."""
    make_machine(manager, tmp_path)
    manager.start("small")
    runtime = MachineRef.of("small").runtime.folder
    kill(("keeper", "worker", "server", "qemu"))
    wait_until(lambda: not processes(), "all processes are dead")
    assert os.path.exists(runtime)
    manager.set("small", name="other", notes="renamed after a power cut")
    assert not os.path.exists(runtime)
    assert [(one.name, one.state) for one in manager.machines()] == [("other", MachineState.OFF)]


def test_the_runtime_folder_is_removed(manager: Manager, tmp_path: Path) -> None:
    """A supervisor whose runtime folder is gone stops starting workers that cannot work."""
    make_machine(manager, tmp_path)
    manager.start("small")
    wait_counting(manager)
    living = processes()
    shutil.rmtree(MachineRef.of("small").runtime.folder)
    kill_these = [living[part] for part in ("qemu", "worker")]
    for victim in kill_these:
        os.kill(victim.pid, 9)
    wait_until(lambda: not living["keeper"].is_alive() and not living["server"].is_alive(), "both end")
    assert manager.state("small") in (MachineState.OFF, MachineState.SAVED)  # whichever was faster
    manager.start("small")
    wait_counting(manager)


def test_a_machine_without_its_runtime_folder_is_saved(manager: Manager, tmp_path: Path) -> None:
    """It could no longer be reached or stopped: it is saved, nothing of it is left, and it continues after a start."""
    make_machine(manager, tmp_path)
    manager.start("small")
    count, living = wait_counting(manager), processes()
    shutil.rmtree(MachineRef.of("small").runtime.folder)
    wait_until(lambda: not any(one.is_alive() for one in living.values()), "the machine is off and cleaned up")
    assert manager.state("small") is MachineState.SAVED
    manager.start("small")
    assert wait_counting(manager) > count
    manager.stop("small")


def test_a_worker_killed_while_starting(manager: Manager, tmp_path: Path) -> None:
    """A worker that is killed as soon as it exists is replaced by one that starts the machine."""
    make_machine(manager, tmp_path)
    place = MachineRef.of("small")
    child = os.fork()
    if child == 0:
        try:
            manager.start("small")
        finally:
            os._exit(0)
    wait_until(lambda: "worker" in processes(), "there is a worker")
    kill(("worker",))
    os.waitpid(child, 0)
    wait_state(manager, MachineState.RUNNING)
    wait_counting(manager)
    assert os.path.exists(place.runtime.control)


def test_all_processes_killed_while_starting(manager: Manager, tmp_path: Path) -> None:
    """The command that waits for the start fails at once, and nothing is left."""
    make_machine(manager, tmp_path)

    def kill_all() -> None:
        wait_until(lambda: {"keeper", "worker"} <= set(processes()), "there is a worker")
        for part in ("keeper", "worker"):  # so that neither starts the other in the meantime
            os.kill(processes()[part].pid, signal.SIGSTOP)
        server = processes().get("server")
        for pid in pids_naming(Path(MachineRef.of("small").runtime.folder).parent):  # a QEMU may not be recorded yet
            if server is None or pid != server.pid:
                os.kill(pid, signal.SIGKILL)

    with ThreadPoolExecutor(1) as threads:
        killing = threads.submit(kill_all)
        with pytest.raises(QemuFailed, match="before the machine was running"):
            manager.start("small")
        killing.result()
    assert not os.path.exists(MachineRef.of("small").runtime.folder) and manager.state("small") is MachineState.OFF


def test_the_command_killed_while_starting(manager: Manager, tmp_path: Path) -> None:
    """kill -9 of the command that starts a machine does not affect the machine."""
    make_machine(manager, tmp_path)
    child = os.fork()
    if child == 0:
        try:
            manager.start("small")
        finally:
            os._exit(0)
    wait_until(lambda: "keeper" in processes(), "there is a supervisor")
    os.kill(child, 9)
    os.waitpid(child, 0)
    wait_state(manager, MachineState.RUNNING)
    wait_counting(manager)


def test_a_damaged_disk_is_reported_at_once(manager: Manager, tmp_path: Path) -> None:
    """The disk server's message is the error of `start`, and nothing is left of the machine."""
    leaf = make_machine(manager, tmp_path)
    leaf.with_suffix(".vhd").rename(tmp_path / "elsewhere.vhd")
    with pytest.raises(StoreFailed, match="parent") as caught:
        manager.start("small")
    assert [one.name for one in manager.events("small")] == ["created", "start-failed", "off"]
    assert caught.value.machine == "small" and caught.value.exit_code == 6
    assert manager.state("small") is MachineState.OFF and processes() == {}


def test_a_disk_in_use_is_reported_at_once(manager: Manager, tmp_path: Path) -> None:
    """A disk that another program writes to is refused, by the lock of the image itself."""
    leaf = make_machine(manager, tmp_path)
    with vhdkit.open_disk(leaf, writable=True), pytest.raises(VmmError, match="another program is writing") as caught:
        manager.start("small")
    assert caught.value.exit_code == 5
    manager.start("small")
