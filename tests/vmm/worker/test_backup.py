# SPDX-License-Identifier: Apache-2.0
"""Copies of all disks at one moment; nothing of the snapshot is left behind."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import vhdkit
from tests.vmm.cli.running import run
from tests.vmm.guests.boot_sector import SECTOR, WRITE_LBA, WRITTEN_TEXT, BootOptions
from tests.vmm.small_guests import (
    MIB,
    console,
    make_disk,
    make_machine,
    press,
    processes,
    wait_counting,
    wait_whole,
)
from tests.waiting import wait_until
from vmm.api.manager import DiskRequest, Manager
from vmm.model.errors import AlreadyExists, NotFound, Refused, StoreFailed
from vmm.model.spec import make_spec
from vmm.processes import disk_copies
from vmm.processes.rpc import ControlClient
from vmm.processes.worker_connection import MachineRef
from vmm.store.backup_note import note_path, read_note

pytestmark = pytest.mark.kvm


def events(manager: Manager, kind: str) -> list[dict[str, Any]]:
    """The texts of the machine's events of that kind, the oldest first."""
    return [dict(one.details) for one in manager.events("small") if one.name == kind]


def files_of(folder: Path) -> list[str]:
    """The images in that folder."""
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".vhd", ".avhd"))


def test_backup_of_a_running_machine(manager: Manager, tmp_path: Path) -> None:
    """The copy boots by itself and has everything that the guest wrote before; the machine keeps running, with only
    its own image."""
    leaf = make_machine(manager, tmp_path)
    second = make_disk(tmp_path, "second")
    manager.add_disk("small", DiskRequest(str(second), controller="virtio"))
    manager.start("small")
    wait_counting(manager)
    before = files_of(tmp_path)
    result = manager.backup("small", str(tmp_path / "copy"))
    assert sorted(result.disks) == ["disk-0", "disk-1"] and result.consistent is False
    assert files_of(tmp_path) == before
    assert not os.path.exists(note_path(MachineRef.of("small").machine))
    press(manager, "w")
    wait_until(lambda: "written " in console(manager), "the guest writes on")
    copy = tmp_path / "copy" / "disk-0.vhd"
    with vhdkit.open_disk(copy) as disk:
        assert disk.read(WRITE_LBA * SECTOR, len(WRITTEN_TEXT)) == WRITTEN_TEXT
    assert json.loads((tmp_path / "copy" / "machine.json").read_text())["name"] == "small"
    manager.stop("small")
    assert vhdkit.check(leaf) == [] and vhdkit.check(copy) == []
    manager.create("twin", disks=[DiskRequest(str(copy))], memory_bytes=16 * MIB, accelerator="tcg")
    manager.start("twin")
    wait_counting(manager, "twin")


def test_backup_of_a_machine_that_is_off(manager: Manager, tmp_path: Path) -> None:
    """The copy reads like the chain, and is marked as having consistent file systems."""
    leaf = make_machine(manager, tmp_path)
    assert manager.backup("small", str(tmp_path / "copy")).consistent is True
    assert vhdkit.compare(leaf, tmp_path / "copy" / "disk-0.vhd").same_content


def test_backups_that_are_refused(manager: Manager, tmp_path: Path) -> None:
    """An existing folder, one whose parent is missing, and devices are refused before anything is done."""
    make_machine(manager, tmp_path)
    with pytest.raises(AlreadyExists, match="name a new folder"):
        manager.backup("small", str(tmp_path))
    assert "name a new folder" in events(manager, "backup-failed")[0]["problem"]
    with pytest.raises(NotFound):
        manager.backup("small", str(tmp_path / "a" / "b"))
    device = make_spec(name="x", kernel="/k", disks=[{"id": "disk-0", "kind": "pass-through", "path": "/dev/x"}])
    with pytest.raises(Refused, match="inside the guest"):
        disk_copies.disks_to_copy(device)


def test_a_backup_includes_uefi_variables(manager: Manager, tmp_path: Path) -> None:
    """A UEFI machine's boot entries are in its variables, so they are copied; a machine that has never run has
    none."""
    make_machine(manager, tmp_path, firmware="uefi")
    assert not os.path.exists(manager.backup("small", str(tmp_path / "none")).folder + "/uefi-vars.fd")
    variables = Path(MachineRef.of("small").machine.uefi_variables)
    variables.write_bytes(b"boot this")
    manager.backup("small", str(tmp_path / "copy"))
    copy = tmp_path / "copy" / "uefi-vars.fd"
    assert copy.read_bytes() == b"boot this" and copy.stat().st_mode & 0o777 == 0o600


def test_interrupting_the_backup_of_a_machine_that_is_off(
    manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends the copying: the message and an event say so, and nothing is left."""
    make_machine(manager, tmp_path)

    async def interrupted(*words: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(disk_copies, "_convert", interrupted)
    result = run("backup", "small", tmp_path / "copy")
    assert result.exit_code == 130
    assert "vmm: interrupted: the backup was given up, and nothing of it is left" in result.stderr
    assert [one["problem"] for one in events(manager, "backup-failed")] == ["it was interrupted"]
    assert not list(tmp_path.glob("copy*"))


def test_interrupting_the_backup_of_a_running_machine(
    manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends the command but not the backup: the message says so, and an event reports the end."""
    make_machine(manager, tmp_path)
    manager.start("small")
    listen = ControlClient._next_message

    def interrupted(self: ControlClient, method: str, timeout_seconds: float | None) -> Any:
        if method == "backup":
            raise KeyboardInterrupt
        return listen(self, method, timeout_seconds)

    monkeypatch.setattr(ControlClient, "_next_message", interrupted)
    result = run("backup", "small", tmp_path / "copy")
    assert result.exit_code == 130
    assert "vmm: interrupted: the backup goes on; vmm events small tells how it ends" in result.stderr
    wait_until(lambda: events(manager, "backed-up"), "it ends")
    assert (tmp_path / "copy" / "disk-0.vhd").exists()
    manager.stop("small")


def test_a_folder_with_the_name_of_the_unfinished_backup_is_kept(manager: Manager, tmp_path: Path) -> None:
    """A folder with that name may belong to another program: the error names it, and it is not touched."""
    make_machine(manager, tmp_path)
    precious = tmp_path / "copy.part" / "precious"
    precious.parent.mkdir()
    precious.write_text("x")
    with pytest.raises(AlreadyExists, match=r"copy.part: is in the way .*remove it"):
        manager.backup("small", str(tmp_path / "copy"))
    assert precious.read_text() == "x" and not (tmp_path / "copy").exists()


def test_a_failed_copy_leaves_nothing(manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If copying fails, the snapshot is merged all the same, and no partial copy is left."""
    make_machine(manager, tmp_path)
    manager.start("small")
    wait_counting(manager)
    before = files_of(tmp_path)
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "copy.part").mkdir()  # in its way
    with pytest.raises(AlreadyExists):
        manager.backup("small", str(tmp_path / "closed" / "copy"))
    (event,) = events(manager, "backup-failed")
    assert "is in the way" in event["problem"] and event["folder"] == str(tmp_path / "closed" / "copy")
    assert files_of(tmp_path) == before
    wait_counting(manager)


@pytest.mark.parametrize("victims", [("worker",), ("keeper", "worker", "server", "qemu")], ids="+".join)
def test_a_backup_that_is_killed_while_it_copies(manager: Manager, tmp_path: Path, victims: tuple[str, ...]) -> None:
    """The next command merges the snapshot; what was written to it in the meantime is in the machine's own image."""
    leaf = make_disk(tmp_path, "small", BootOptions(print_every=4, write_every=4))
    manager.create("small", disks=[DiskRequest(str(leaf))], memory_bytes=16 * MIB, accelerator="tcg")
    manager.start("small")
    wait_counting(manager)
    before = files_of(tmp_path)
    note = note_path(MachineRef.of("small").machine)
    child = os.fork()
    if child == 0:
        try:
            manager.backup("small", str(tmp_path / "copy"))
        finally:
            os._exit(0)
    wait_until(lambda: os.path.exists(note) and files_of(tmp_path) != before, "the snapshot is there")
    living = processes()
    for part in victims:
        os.kill(living[part].pid, 9)
    os.waitpid(child, 0)
    if "qemu" in victims:
        manager.state("small")
        manager.start("small")
    wait_whole(but={part: living[part] for part in victims})
    wait_counting(manager)
    wait_until(lambda: files_of(tmp_path) == before and not os.path.exists(note), "the snapshot is merged away")
    wait_counting(manager)
    manager.stop("small")
    assert vhdkit.check(leaf) == []


def test_a_damaged_note_of_a_backup(manager: Manager, tmp_path: Path) -> None:
    """A note with unusable content is an error that names it."""
    make_machine(manager, tmp_path)
    place = MachineRef.of("small").machine
    Path(note_path(place)).write_text("[")
    with pytest.raises(StoreFailed, match=r"damaged"):
        read_note(place)
