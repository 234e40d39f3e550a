# SPDX-License-Identifier: Apache-2.0
"""Media that are changed in a machine: off, running, saved, in snapshots, under a guest that has locked its drive."""

from __future__ import annotations

import os
import signal
import struct
from pathlib import Path

import pytest

from tests.support import require_linux_guest
from tests.vmm.cli.running import document, failure, good
from tests.vmm.discs import make_iso
from tests.vmm.guests import linux
from tests.vmm.guests.shell import GuestShell
from tests.vmm.small_guests import console, make_machine, press, processes, wait_counting, wait_whole
from tests.waiting import wait_until
from vmm.api.manager import DiskRequest, Manager
from vmm.model.errors import InvalidSpec, NotFound, Refused, WrongState
from vmm.processes.worker_connection import MachineRef
from vmm.store.state import MachineState, WorkerNote

pytestmark = pytest.mark.kvm
MIB = 1 << 20
# What the guest reads from its drive, without what it has cached of an older medium.
CACHED = "dd if=/dev/sr0 bs=2048 count=1 2>/dev/null | tr -d '\\0'"
READ = "blockdev --flushbufs /dev/sr0; dd if=/dev/sr0 bs=2048 count=1 iflag=direct 2>/dev/null | tr -d '\\0'"


def medium_of(manager: Manager, name: str, drive: str) -> str | None:
    """The medium in the definition."""
    disk = manager.show(name).spec.disk(drive)  # type: ignore[union-attr]
    assert disk is not None
    return disk.path


def events(manager: Manager, name: str, event: str) -> list[str | None]:
    """The media in events of that kind, the oldest first."""
    return [one.details.get("path") for one in manager.events(name) if one.name == event]


def test_media_are_changed_while_the_machine_is_off(manager: Manager, tmp_path: Path) -> None:
    """A drive gets a medium and loses it, and stays the same drive; disks and files that are not media are refused."""
    leaf = make_machine(manager, tmp_path)
    one = make_iso(tmp_path / "one.iso", "first")
    before = document("disk", "add", "small", "--cdrom")
    assert (before["path"], before["id"]) == (None, "disk-1")
    assert "one.iso" in good("disk", "change", "small", "disk-1", one)
    assert document("disk", "list", "small")[1]["path"] == str(one)
    after = document("disk", "change", "small", one, "--eject")
    assert after == before
    assert "empty" in good("disk", "list", "small")
    with pytest.raises(WrongState, match="is a hard disk, not a drive"):
        manager.change_medium("small", "disk-0", str(leaf))
    with pytest.raises(NotFound):
        manager.change_medium("small", "disk-1", str(tmp_path / "absent.iso"))
    with pytest.raises(InvalidSpec, match="is neither a file"):
        manager.change_medium("small", "disk-1", str(tmp_path))
    good("disk", "add", "small", one, "--cdrom")
    good("disk", "add", "small", one, "--cdrom")
    assert "is used by disk-2 and disk-3 (use the id of one" in failure(
        "disk", "change", "small", one, "--eject", code=2
    )
    assert "is used by disk-2 and disk-3 (use the id of one" in failure("disk", "remove", "small", one, code=2)
    assert document("disk", "change", "small", "disk-3", "--eject")["path"] is None
    assert document("disk", "change", "small", one, "--eject")["id"] == "disk-2"
    for drive in ("disk-2", "disk-3"):
        good("disk", "remove", "small", drive)
    assert "or use --eject" in failure("disk", "change", "small", "disk-1", code=2)
    assert "or use --eject" in failure("disk", "change", "small", "disk-1", one, "--eject", code=2)
    assert events(manager, "small", "medium-changed")[:2] == [str(one), None]


def test_a_worker_killed_while_it_changes_a_medium(manager: Manager, tmp_path: Path) -> None:
    """If the worker had recorded the new medium, its successor inserts it, and QEMU and the definition agree."""
    make_machine(manager, tmp_path)
    manager.add_disk("small", DiskRequest(str(make_iso(tmp_path / "one.iso", "first")), kind="iso"))
    manager.start("small")
    wait_counting(manager)
    place = MachineRef.of("small")
    make_iso(tmp_path / "two.iso", "second")
    whole = processes()
    for number in (signal.SIGSTOP, signal.SIGKILL):  # both at once: each of them would start the other again
        for name in ("keeper", "worker"):
            os.kill(whole[name].pid, number)
    stored = Path(place.machine.definition)  # recorded first, before QEMU is asked
    stored.write_text(stored.read_text().replace("one.iso", "two.iso"))
    note = WorkerNote.read(place.runtime)
    assert note is not None
    note.operation = "disk-change"
    note.details |= {"drive": "disk-1", "drive_had": str(tmp_path / "one.iso")}
    note.write(place.runtime)
    manager.state("small")
    wait_whole()
    wait_until(lambda: "two.iso" in media_of_qemu(), "QEMU has the new medium")
    wait_until(lambda: "two.iso" in Path(place.runtime.running).read_text(), "the running definition has changed")
    manager.stop("small")


def media_of_qemu() -> str:
    """The files that QEMU has open."""
    pid = processes()["qemu"].pid
    return " ".join(os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd"))


def start_linux(manager: Manager, folder: Path, medium: Path) -> GuestShell:
    """A running Linux with a medium in its drive `disk-0`; its kernel and initrd are files of this folder."""
    guest = require_linux_guest()
    for name, source in (("kernel", guest.kernel), ("initrd", guest.initrd)):
        (folder / name).write_bytes(source.read_bytes())
    manager.create(
        "linux", memory_bytes=int(linux.MEMORY) * MIB, accelerator="tcg", kernel=str(folder / "kernel"),
        initrd=str(folder / "initrd"), append=guest.append, disks=[DiskRequest(str(medium), kind="iso")],
    )  # fmt: skip
    manager.start("linux")
    return shell_of(manager)


def shell_of(manager: Manager) -> GuestShell:
    """The guest's shell, ready."""
    shell = GuestShell(manager.guest("linux").open_console().link)
    shell.wait_ready()
    return shell


def test_media_are_changed_under_linux(manager: Manager, tmp_path: Path) -> None:
    """Linux reads each medium that is inserted, and none after --eject; one that it has locked is removed only by
    force.

    A snapshot records the medium, and applying it restores that medium. Saved, it continues without its files.
    """
    one = make_iso(tmp_path / "one.iso", "first", size_bytes=256 << 10)
    two = make_iso(tmp_path / "two.iso", "second", size_bytes=512 << 10)
    with start_linux(manager, tmp_path, one) as shell:
        assert shell.check(READ) == "first"
        before = manager.snapshots("linux").create("before")
        assert "two.iso" in good("disk", "change", "linux", "disk-0", two)
        assert shell.check(READ) == "second"
        assert shell.check("cat /sys/block/sr0/size") == str((512 << 10) // 512)
        assert medium_of(manager, "linux", "disk-0") == str(two)

        assert "empty" in good("disk", "change", "linux", "disk-0", "--eject")
        assert shell.run("dd if=/dev/sr0 bs=2048 count=1 of=/dev/null").exit_code != 0
        manager.change_medium("linux", "disk-0", str(one))
        assert shell.check(READ) == "first"

        shell.check("exec 9</dev/sr0; (sleep 1000 <&9) >/dev/null 2>&1 & sleep 0.1; true")
        with pytest.raises(Refused, match="locked the drive disk-0") as refused:
            manager.change_medium("linux", "disk-0", str(two))
        assert "--force" in str(refused.value)
        assert medium_of(manager, "linux", "disk-0") == str(one)
        assert shell.check(READ) == "first"
        good("disk", "change", "linux", "disk-0", two, "--force")
        shell.check("kill $(pidof sleep)")
        assert shell.check(READ) == "second"
    manager.stop("linux")
    manager.snapshots("linux").apply(before.id, discard_current=True)
    assert medium_of(manager, "linux", "disk-0") == str(one)
    manager.start("linux")
    with shell_of(manager) as shell:
        assert shell.check(READ) == "first"
    check_continues_without_its_files(manager, tmp_path, one, two)


def check_continues_without_its_files(manager: Manager, folder: Path, one: Path, two: Path) -> None:
    """A saved guest continues without the kernel and initrd that it was started with, and with another medium.

    Until that is requested, the start is refused with a hint, and the memory stays. The guest notices the new medium.
    """
    with shell_of(manager) as shell:
        assert shell.check(CACHED) == "first"
        shell.check("echo kept >/tmp/here")
    manager.save("linux")
    one.unlink()
    (folder / "kernel").unlink()
    (folder / "initrd").unlink()

    assert "vmm disk change linux disk-0" in failure("start", "linux", code=6)
    with pytest.raises(NotFound):
        manager.start("linux", discard_saved=True)  # a fresh start would be refused as well
    assert manager.state("linux") is MachineState.SAVED
    good("disk", "change", "linux", "disk-0", two)
    assert "--kernel ''" in failure("start", "linux", code=6)
    assert "restarts" in good("set", "linux", "--kernel", "")
    assert manager.state("linux") is MachineState.SAVED
    manager.start("linux")
    with shell_of(manager) as shell:
        assert shell.check("cat /tmp/here") == "kept"
        # As with a real drive, the first read finds that the old medium is gone, the next one finds the new one.
        shell.run("dd if=/dev/sr0 of=/dev/null bs=2048 count=1")
        assert shell.check(CACHED) == "second"
    assert events(manager, "linux", "medium-changed")[-2:] == [str(two), str(two)]
    manager.stop("linux")


def pvh_kernel() -> bytes:
    """A kernel that QEMU enters by its PVH note (an ELF of 32 bits): it answers a key with the next letter."""
    start, code_at = 1 << 20, 52 + 2 * 32
    code = bytes.fromhex(
        "66baf803 b050 ee"  # "P" to the serial port
        "66bafd03 ec a801 74f7"  # until a byte is there
        "66baf803 ec fec0 ee ebed".replace(" ", "")
    )
    code = code.ljust(-(-len(code) // 4) * 4, b"\xf4")
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", start)
    head = struct.pack("<16sHHIIIIIHHHHHH", b"\x7fELF\1\1\1", 2, 3, 1, start, 52, 0, 0, 52, 32, 2, 40, 0, 0)
    head += struct.pack("<IIIIIIII", 1, code_at, start, start, len(code), len(code), 5, 4)
    head += struct.pack("<IIIIIIII", 4, code_at + len(code), 0, 0, len(note), len(note), 4, 4)
    return (head + code + note).ljust(8192, b"\0")


def test_saved_memory_whose_pvh_kernel_is_missing(manager: Manager, tmp_path: Path) -> None:
    """The guest continues without it; a fresh start is refused."""
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel())
    manager.create("small", memory_bytes=32 * MIB, accelerator="tcg", kernel=str(kernel), screen=False)
    manager.start("small")
    wait_until(lambda: "P" in console(manager), "the kernel runs")
    press(manager, "a")
    wait_until(lambda: "b" in console(manager).rpartition("P")[2], "it answers")
    manager.save("small")
    kernel.unlink()
    assert "--kernel ''" in failure("start", "small", code=6)
    manager.set("small", kernel=None)
    manager.start("small")
    press(manager, "x")
    wait_until(lambda: console(manager).rpartition("P")[2].endswith("by"), "it answers still")
    manager.stop("small")


def test_a_snapshot_with_memory_whose_medium_is_missing(manager: Manager, tmp_path: Path) -> None:
    """Applied, the machine stays saved while the medium is missing, and continues with an empty drive on request."""
    make_machine(manager, tmp_path)
    one = make_iso(tmp_path / "one.iso", "first")
    manager.add_disk("small", DiskRequest(str(one), kind="iso"))
    manager.start("small")
    wait_counting(manager)
    snapshot = manager.snapshots("small").create("with memory")
    manager.stop("small")
    moved = one.rename(tmp_path / "moved.iso")
    assert manager.snapshots("small").apply(snapshot.id, discard_current=True).state == "saved"
    with pytest.raises(Refused, match="the saved memory is kept"):
        manager.start("small")
    manager.change_medium("small", "disk-1", str(moved))  # the same medium under another name: no notification
    manager.start("small")
    wait_counting(manager)
    changed = events(manager, "small", "medium-changed")
    assert changed == [str(moved)]
    manager.save("small")
    make_iso(moved, "another one under that name")
    with pytest.raises(Refused, match="the guest had another medium in disk-1"):
        manager.start("small")
    manager.change_medium("small", "disk-1", None)
    manager.start("small")
    wait_counting(manager)
    assert events(manager, "small", "medium-changed") == [*changed, None, None]
    assert console(manager).count("BOOT-OK") == 1
    manager.stop("small")
