# SPDX-License-Identifier: Apache-2.0
"""What a running machine does on request, and when its disks fail. The guest counts in its memory and prints the
counter."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import vhdkit
from tests.support import not_available
from tests.vmm.guests.boot_sector import BootOptions
from tests.vmm.small_guests import (
    MIB,
    console,
    last_tick,
    make_disk,
    make_machine,
    press,
    processes,
    wait_counting,
    wait_state,
)
from tests.waiting import becomes, wait_until
from vmm.api.manager import DiskRequest, Manager
from vmm.model.errors import InUse, NoSpace, Refused, TimedOut, WrongState
from vmm.processes.worker_connection import MachineRef
from vmm.store.state import MachineState

pytestmark = pytest.mark.kvm


def event_names(manager: Manager, name: str = "small") -> list[str]:
    """The names of all events."""
    return [event.name for event in manager.events(name)]


@contextlib.contextmanager
def small_file_system(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A file system of that size in memory, so that a disk can fill up."""
    if os.geteuid() != 0:
        not_available("needs root, to mount a small file system")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "vmm-test", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path) -> Path:
    """A file that takes all the space that is left."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


def test_pause_and_resume(manager: Manager, tmp_path: Path) -> None:
    """A paused guest does not count; resumed, it continues. Each is refused in the wrong state."""
    make_machine(manager, tmp_path)
    with pytest.raises(WrongState, match="is off: cannot pause"):
        manager.pause("small")
    manager.start("small")
    wait_counting(manager)
    manager.pause("small")
    assert manager.state("small") is MachineState.PAUSED
    with pytest.raises(WrongState, match="is paused: cannot pause"):
        manager.pause("small")
    before = last_tick(manager)
    with pytest.raises(WrongState, match="already"):
        manager.start("small")
    assert last_tick(manager) == before
    manager.resume("small")
    wait_counting(manager)
    with pytest.raises(WrongState, match="is running: cannot resume"):
        manager.resume("small")


def test_reset(manager: Manager, tmp_path: Path) -> None:
    """After a reset the guest boots again, in the same QEMU."""
    make_machine(manager, tmp_path)
    manager.start("small")
    wait_counting(manager)
    qemu = processes()["qemu"]
    manager.reset("small")
    wait_until(lambda: console(manager).count("BOOT-OK") == 2, "it boots again")
    assert processes()["qemu"] == qemu


def test_shutdown_by_the_power_button(manager: Manager, tmp_path: Path) -> None:
    """A guest without an agent is asked through the power button, and everything is free when the verb returns."""
    leaf = make_machine(manager, tmp_path)
    manager.start("small")
    wait_counting(manager)
    manager.shutdown("small")
    assert manager.state("small") is MachineState.OFF and processes() == {}
    assert "power button" in console(manager)
    vhdkit.open_disk(leaf, writable=True).close()


def test_a_guest_that_does_not_shut_down(manager: Manager, tmp_path: Path) -> None:
    """The time-out says what to do; the machine keeps running, and can be stopped."""
    leaf = make_disk(tmp_path, "deaf", BootOptions(print_every=4, power_button=False))
    manager.create("deaf", disks=[DiskRequest(str(leaf))], memory_bytes=16 * MIB, accelerator="tcg")
    manager.start("deaf")
    wait_counting(manager, "deaf")
    with pytest.raises(TimedOut, match=r"did not shut down within 0\.3 s .*vmm stop deaf"):
        manager.shutdown("deaf", timeout_seconds=0.3)
    assert manager.state("deaf") is MachineState.RUNNING
    wait_counting(manager, "deaf")
    manager.stop("deaf")
    assert manager.state("deaf") is MachineState.OFF


def test_a_guest_that_powers_itself_off(manager: Manager, tmp_path: Path) -> None:
    """The machine is off then, without any command and without automatic recovery."""
    make_machine(manager, tmp_path, automatic={"recovery": "restart"})
    manager.start("small")
    wait_counting(manager)
    press(manager, "p")
    wait_until(lambda: not os.path.exists(MachineRef.of("small").runtime.folder), "the machine is off and cleaned up")
    assert manager.state("small") is MachineState.OFF
    assert "powered-off" in event_names(manager) and "qemu-died" not in event_names(manager)


def test_save_and_start(manager: Manager, tmp_path: Path) -> None:
    """The counter continues where it was saved; no process runs in between, and the state is used only once."""
    make_machine(manager, tmp_path)
    manager.start("small")
    wait_counting(manager)
    steps: list[dict[str, object]] = []
    manager.save("small", progress=steps.append)
    saved = last_tick(manager)
    assert manager.state("small") is MachineState.SAVED and processes() == {}
    with pytest.raises(WrongState, match="is saved"):
        manager.set("small", memory_bytes=32 * MIB)
    manager.set("small", notes="this does not matter to its memory")
    manager.start("small")
    assert wait_counting(manager) > saved > 0
    assert console(manager).count("BOOT-OK") == 1
    assert not os.path.exists(MachineRef.of("small").machine.saved)
    manager.stop("small")
    assert manager.state("small") is MachineState.OFF


def test_saved_while_paused(manager: Manager, tmp_path: Path) -> None:
    """A machine that was paused when it was saved is paused after its start."""
    make_machine(manager, tmp_path)
    manager.start("small")
    wait_counting(manager)
    manager.pause("small")
    manager.save("small")
    manager.start("small")
    assert manager.state("small") is MachineState.PAUSED
    manager.resume("small")
    wait_counting(manager)
    assert console(manager).count("BOOT-OK") == 1


@pytest.mark.parametrize("spoil", ["cut", "byte", "description", "disk"])
def test_a_saved_state_that_does_not_match(manager: Manager, tmp_path: Path, spoil: str) -> None:
    """Damaged memory, a damaged description, a disk that was written to: refused and kept, with what to do about
    it."""
    leaf = make_machine(manager, tmp_path)
    manager.start("small")
    wait_counting(manager)
    manager.save("small")
    folder = Path(MachineRef.of("small").machine.saved)
    memory, description = folder / "memory.bin", folder / "state.json"
    if spoil == "cut":
        os.truncate(memory, memory.stat().st_size // 2)
    elif spoil == "byte":
        raw = bytearray(memory.read_bytes())
        raw[: 1 << 12] = bytes(1 << 12)
        memory.write_bytes(raw)
    elif spoil == "description":
        description.write_text("{}")
    else:
        with vhdkit.open_disk(leaf, writable=True) as disk:
            disk.write(5 * MIB, b"x" * 512)
    with pytest.raises(Exception, match=r"saved state|saved memory|damaged") as caught:
        manager.start("small")
    if spoil in ("cut", "disk"):
        assert isinstance(caught.value, Refused)
    assert "--discard-saved" in str(caught.value)
    assert manager.state("small") is MachineState.SAVED and processes() == {}
    manager.start("small", discard_saved=True)
    wait_until(lambda: console(manager).count("BOOT-OK") == 2, "it boots anew")


def test_no_space_to_save(manager: Manager, tmp_path: Path) -> None:
    """If the memory does not fit, the machine continues at once, as if it had not been asked."""
    with small_file_system(tmp_path / "full", 24 * MIB) as folder:
        leaf = make_disk(tmp_path, "small", BootOptions(print_every=4))
        manager.create(
            "small", disks=[DiskRequest(str(leaf))], memory_bytes=16 * MIB, accelerator="tcg", folder=str(folder)
        )
        manager.start("small")
        wait_counting(manager)
        with pytest.raises(NoSpace):
            manager.save("small")
        wait_counting(manager)
        assert manager.state("small") is MachineState.RUNNING
        assert not list((folder / "small").glob("saved*"))
        manager.stop("small")


def test_a_full_file_system(manager: Manager, tmp_path: Path) -> None:
    """A full disk pauses the machine, is reported, and lets it continue by itself when there is space again."""
    with small_file_system(tmp_path / "full", 10 * MIB) as folder:
        base = make_disk(tmp_path).with_suffix(".vhd")
        leaf = folder / "leaf.avhd"
        vhdkit.create_child(leaf, base)
        wish = DiskRequest(str(leaf), parent_dirs=(str(tmp_path),))
        manager.create("small", disks=[wish], memory_bytes=16 * MIB, accelerator="tcg")
        filler = fill(folder)
        manager.start("small")
        wait_state(manager, MachineState.CRITICAL)
        assert "WRITE-OK" not in console(manager)
        wait_until(lambda: "full" in (manager.show("small").reason or ""), "the reason is reported")
        with pytest.raises(WrongState, match="is paused-critical: cannot save"):
            manager.save("small")
        filler.unlink()
        wait_state(manager, MachineState.RUNNING)
        wait_counting(manager)
        assert "WRITE-OK" in console(manager) and "DISK-ERROR" not in console(manager)
        assert event_names(manager).count("paused-critical") >= 1
        manager.stop("small")


def test_a_dead_disk_server(manager: Manager, tmp_path: Path) -> None:
    """While the disk server is down the machine is paused-critical, and continues when the server is back."""
    make_machine(manager, tmp_path)
    manager.start("small")
    wait_counting(manager)
    living = processes()
    living["keeper"].send(signal.SIGSTOP)  # otherwise it would be back at once
    living["server"].kill()
    press(manager, "w")
    wait_state(manager, MachineState.CRITICAL)
    assert "written " not in console(manager)
    living["keeper"].send(signal.SIGCONT)
    wait_until(lambda: "written " in console(manager), "the write succeeds")
    wait_state(manager, MachineState.RUNNING)
    assert "DISK-ERROR" not in console(manager)


def test_paused_critical_machines_can_be_paused_and_stopped(manager: Manager, tmp_path: Path) -> None:
    """A machine whose disks do not work can be paused by the user, and be stopped."""
    make_machine(manager, tmp_path)
    manager.start("small")
    wait_counting(manager)
    living = processes()
    living["keeper"].send(signal.SIGSTOP)
    living["server"].kill()
    press(manager, "w")
    wait_state(manager, MachineState.CRITICAL)
    manager.pause("small")
    assert manager.state("small") is MachineState.PAUSED
    living["keeper"].send(signal.SIGCONT)
    manager.stop("small")
    assert manager.state("small") is MachineState.OFF


def test_privileges(manager: Manager, tmp_path: Path) -> None:
    """QEMU has no capabilities, cannot gain any, is filtered, and under root runs as the machine's own user."""
    make_machine(manager, tmp_path)
    manager.start("small")
    status = Path(f"/proc/{processes()['qemu'].pid}/status").read_text()
    facts = {key: value.split() for key, _, value in (line.partition(":") for line in status.splitlines())}
    for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(facts[kind][0], 16) == 0, kind
    assert facts["NoNewPrivs"] == ["1"] and facts["Seccomp"] == ["2"]
    assert int(facts["Seccomp_filters"][0]) >= 2  # QEMU's own filter and ours (INV-CONFINED)
    assert int(facts["SigBlk"][0], 16) >> (signal.SIGTERM - 1) & 1  # INV-STOP-ACTION
    if os.geteuid() == 0:
        assert int(facts["CapBnd"][0], 16) == 0
        assert len(set(facts["Uid"] + facts["Gid"])) == 1 and int(facts["Uid"][0]) >= 61184
        assert facts["Groups"] == []


def test_sockets_and_files_are_private(manager: Manager, tmp_path: Path) -> None:
    """Only the owner, and QEMU's user where necessary, can use a socket, read a file or enter a folder."""
    make_machine(manager, tmp_path)
    manager.start("small")
    place = MachineRef.of("small")
    found = [*Path(place.runtime.folder).rglob("*"), *Path(place.machine.folder).rglob("*")]
    assert any(path.is_socket() for path in found)
    for path in (Path(place.runtime.folder), Path(place.machine.folder), *found):
        assert path.lstat().st_mode & 0o007 == 0, path
    for path in found:
        if path.is_socket() and path.name not in ("nbd.sock", "vnc.sock"):
            assert path.stat().st_uid == os.geteuid(), path


def test_one_command_at_a_time(manager: Manager, tmp_path: Path) -> None:
    """Of two commands that start a machine at once one succeeds, and the other one is refused; it leaves nothing
    behind."""
    make_machine(manager, tmp_path)
    command = [sys.executable, "-m", "vmm", "start", "small"]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [one.communicate(timeout=60) for one in started]
    codes = sorted(one.returncode for one in started)
    assert codes == [0, 5, 5], said
    for out, error in said:
        assert out == "small is running\n" or "another vmm command" in error or "already" in error
    wait_counting(manager)


def save_when_idle(manager: Manager, name: str) -> None:
    """Save as soon as no other operation is in progress."""

    def is_saved() -> bool:
        try:
            manager.save(name)
        except InUse:
            return False
        return True

    becomes(is_saved)


def test_other_operations_are_refused_while_saving(manager: Manager, tmp_path: Path) -> None:
    """While the machine is being saved, another operation is refused, except for a stop."""
    make_machine(manager, tmp_path)
    manager.start("small")
    wait_counting(manager)
    child = os.fork()
    if child == 0:
        try:
            save_when_idle(manager, "small")
        finally:
            os._exit(0)
    while manager.state("small") not in (MachineState.SAVED, MachineState.OFF):
        try:
            manager.reset("small")
        except (InUse, WrongState):
            pass
        except Exception:
            break  # it ended in the meantime
        time.sleep(0.05)  # a moment for the child to begin
    os.waitpid(child, 0)
    assert manager.state("small") is MachineState.SAVED


def test_eight_machines(manager: Manager, tmp_path: Path) -> None:
    """Eight machines started at once run and stop, and nothing is left."""
    names = [f"m{number}" for number in range(8)]
    for name in names:
        make_machine(manager, tmp_path, name)
    for name in names:
        manager.start(name)
    assert {one.state for one in manager.machines()} == {MachineState.RUNNING}
    for name in names:
        wait_counting(manager, name)
    for name in names:
        manager.stop(name)
    assert {one.state for one in manager.machines()} == {MachineState.OFF}
    assert all(processes(name) == {} for name in names)
