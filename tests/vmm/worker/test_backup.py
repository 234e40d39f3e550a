# SPDX-License-Identifier: Apache-2.0
"""Copies of all disks at one moment; nothing of the snapshot is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

import vhdkit
from tests.vmm.cli.running import run
from tests.vmm.guests.boot_sector import SECTOR, WRITE_LBA, WRITTEN_TEXT, BootOptions
from tests.vmm.small_guests import (
    MIB,
    both_kinds_nightly,
    console,
    kill_together,
    make_disk,
    make_machine,
    press,
    processes,
    wait_counting,
    wait_whole,
)
from tests.vmm.snapshots.machines import SUFFIXES
from tests.waiting import wait_until
from vmm.api.manager import DiskRequest, Manager
from vmm.model.errors import AlreadyExists, InUse, NotFound, Refused, StoreFailed, VmmError
from vmm.model.spec import make_spec
from vmm.processes import disk_copies
from vmm.processes.rpc import ControlClient
from vmm.processes.worker_connection import MachineRef
from vmm.store.backup_note import note_path, read_note
from vmm.store.snapshots.journal import Backup, Journal, Pivot
from vmm.store.snapshots.store import load_tree, tree_path
from vmm.store.snapshots.tree import Tree
from vmm.worker import backup

pytestmark = pytest.mark.kvm


def events(manager: Manager, kind: str) -> list[dict[str, Any]]:
    """The texts of the machine's events of that kind, the oldest first."""
    return [dict(one.details) for one in manager.events("small") if one.name == kind]


def files_of(folder: Path) -> list[str]:
    """The images in that folder."""
    return sorted(path.name for path in folder.iterdir() if path.suffix in SUFFIXES)


@both_kinds_nightly
def test_backup_of_a_running_machine(manager: Manager, tmp_path: Path, kind: str) -> None:
    """The copy boots by itself and has everything that the guest wrote before; the machine keeps running, with only
    its own image."""
    leaf = make_machine(manager, tmp_path, kind=kind)
    second = make_disk(tmp_path, "second", kind=kind)
    manager.add_disk("small", DiskRequest(str(second), controller="virtio"))
    manager.start("small")
    wait_counting(manager)
    before = files_of(tmp_path)
    result = manager.backup("small", str(tmp_path / "copy"))
    assert sorted(result.disks) == ["disk-0", "disk-1"] and result.consistent is False
    assert files_of(tmp_path) == before
    assert not os.path.exists(tree_path(MachineRef.of("small").machine)), "as before the first backup"
    press(manager, "w")
    wait_until(lambda: "written " in console(manager), "the guest continues writing")
    copy = tmp_path / "copy" / f"disk-0.{kind}"
    with vhdkit.open_disk(copy) as disk:
        assert disk.read(WRITE_LBA * SECTOR, len(WRITTEN_TEXT)) == WRITTEN_TEXT
    assert json.loads((tmp_path / "copy" / "machine.json").read_text())["name"] == "small"
    manager.stop("small")
    assert vhdkit.check(leaf) == [] and vhdkit.check(copy) == []
    manager.create("twin", disks=[DiskRequest(str(copy))], memory_bytes=16 * MIB, accelerator="tcg")
    manager.start("twin")
    wait_counting(manager, "twin")


@pytest.mark.parametrize("kind", ["vhd", "vhdx"])
def test_backup_of_a_machine_that_is_off(manager: Manager, tmp_path: Path, kind: str) -> None:
    """The copy reads like the chain, has its format, and is marked as having consistent file systems."""
    leaf = make_machine(manager, tmp_path, kind=kind)
    assert manager.backup("small", str(tmp_path / "copy")).consistent is True
    assert vhdkit.compare(leaf, tmp_path / "copy" / f"disk-0.{kind}").same_content


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
    result = run("backup", "run", "small", tmp_path / "copy")
    assert result.exit_code == 130
    assert "vmm: interrupted: the backup was abandoned and left nothing behind" in result.stderr
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
    result = run("backup", "run", "small", tmp_path / "copy")
    assert result.exit_code == 130
    assert "vmm: interrupted: the backup continues; vmm events small shows how it ends" in result.stderr
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


def journal() -> Journal | None:
    """What the machine's journal says now."""
    return load_tree(MachineRef.of("small").machine).journal


def backup_elsewhere(manager: Manager, target: Path) -> int:
    """A backup in a process of its own, whose number is returned; it ends with the backup, however that ends."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            manager.backup("small", str(target))
        os._exit(0)
    return child


@pytest.fixture
def writing(manager: Manager, tmp_path: Path) -> Path:
    """A running machine whose guest writes to its disk all the time; its image."""
    leaf = make_disk(tmp_path, "small", BootOptions(print_every=4, write_every=4))
    manager.create("small", disks=[DiskRequest(str(leaf))], memory_bytes=16 * MIB, accelerator="tcg")
    manager.start("small")
    wait_counting(manager)
    return leaf


def check_merged_away(manager: Manager, leaf: Path, before: list[str]) -> None:
    """The guest runs on its own image alone, which is sound; nothing of the backup is left."""
    wait_until(lambda: files_of(leaf.parent) == before and journal() is None, "the new leaf is merged", 120)
    wait_counting(manager)
    shown = manager.show("small").spec
    assert shown is not None and shown.disks[0].path == str(leaf)
    manager.stop("small")
    assert files_of(leaf.parent) == before and vhdkit.check(leaf) == []
    assert load_tree(MachineRef.of("small").machine) == Tree(), "as before the first backup"


@pytest.mark.parametrize("victims", [("worker",), ("server",), ("keeper", "worker", "server", "qemu")], ids="+".join)
def test_a_backup_that_is_killed_while_it_copies(manager: Manager, writing: Path, victims: tuple[str, ...]) -> None:
    """The next command merges the new leaf; what was written to it in the meantime is in the machine's own image."""
    before = files_of(writing.parent)
    child = backup_elsewhere(manager, writing.parent / "copy")
    wait_until(lambda: isinstance(now := journal(), Backup) and now.pivoted, "the disks have their new leaves")
    assert files_of(writing.parent) != before
    living = processes()
    kill_together(living[part] for part in victims)
    os.waitpid(child, 0)
    if "qemu" in victims:
        manager.state("small")
        manager.start("small")
    wait_whole(but={part: living[part] for part in victims})
    wait_counting(manager)
    check_merged_away(manager, writing, before)


# A worker that kills itself before or after it writes its journal the nth time: sitecustomize for its interpreter.
KILLER = """
import os, sys
if "vmm.worker.worker" in sys.orig_argv and os.path.exists({plan!r}):
    from vmm.store.snapshots.store import Held
    when, number = open({plan!r}).read().split()
    save, saved = Held.save, 0

    def killing(held):
        global saved
        saved += 1
        if saved == int(number) and when == "before":
            end()
        save(held)
        if saved == int(number):
            end()

    def end():
        os.unlink({plan!r})
        os.kill(os.getpid(), 9)

    Held.save = killing
"""
STEPS = {"begun": 1, "new leaves": 2, "followed": 3, "merging": 4, "merged": 5, "done": 6}
EVERY_DAY = {("after", "begun"), ("before", "new leaves"), ("after", "merging")}
MOMENTS = [
    pytest.param(when, step, marks=[] if (when, step) in EVERY_DAY else [pytest.mark.nightly])
    for step in STEPS for when in ("before", "after")
]  # fmt: skip


@both_kinds_nightly
@pytest.mark.parametrize(("when", "step"), MOMENTS)
def test_a_worker_killed_at_each_step(
    manager: Manager, tmp_path: Path, when: str, step: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever step of its journal the worker dies at, its successor merges the new leaf away under the guest."""
    leaf = make_disk(tmp_path, "small", BootOptions(print_every=4, write_every=4), kind=kind)
    plan, code = tmp_path / "plan", tmp_path / "code"
    code.mkdir()
    (code / "sitecustomize.py").write_text(KILLER.format(plan=str(plan)))
    plan.write_text(f"{when} {STEPS[step]}")
    monkeypatch.setenv("PYTHONPATH", str(code))
    manager.create("small", disks=[DiskRequest(str(leaf))], memory_bytes=16 * MIB, accelerator="tcg")
    manager.start("small")
    wait_counting(manager)
    before, worker = files_of(tmp_path), processes()["worker"]
    child = backup_elsewhere(manager, tmp_path / "copy")
    wait_until(lambda: not worker.is_alive(), "the worker has killed itself")
    assert not plan.exists()
    os.waitpid(child, 0)
    wait_whole(but={"worker": worker})
    check_merged_away(manager, leaf, before)


# A worker whose disks' server refuses to put new leaves on the disks.
REFUSER = """
import sys
if "vmm.worker.worker" in sys.orig_argv:
    from vmm.kvm.drives import DiskServer
    from vmm.model.errors import StoreFailed
    call = DiskServer.call

    async def refusing(self, method, **params):
        if method == "snapshot":
            raise StoreFailed("there is no room for new leaves")
        return await call(self, method, **params)

    DiskServer.call = refusing
"""


def test_disks_that_cannot_be_frozen(manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the disks do not get their new leaves, the backup fails, an event says why, and nothing of it is left."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "sitecustomize.py").write_text(REFUSER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "code"))
    leaf = make_machine(manager, tmp_path)
    manager.start("small")
    before = files_of(tmp_path)
    with pytest.raises(StoreFailed, match="no room for new leaves"):
        manager.backup("small", str(tmp_path / "copy"))
    assert "no room for new leaves" in events(manager, "backup-failed")[0]["problem"]
    assert not list(tmp_path.glob("copy*"))
    check_merged_away(manager, leaf, before)


def test_a_merge_that_is_refused_is_made_later(manager: Manager, writing: Path) -> None:
    """While an image of others stands on the frozen one, nothing is merged into it; the next verb after that does."""
    before = files_of(writing.parent)
    stranger = writing.parent / "child.avhd"
    notes = MachineRef.of("small").runtime.notes
    vhdkit.create_child(stranger, writing, options=vhdkit.OpenOptions(lock=False, notes_folder=notes))
    with pytest.raises(VmmError, match=r"child\.avhd"):
        manager.backup("small", str(writing.parent / "copy"))
    assert isinstance(journal(), Backup) and r"child.avhd" in events(manager, "backup-failed")[0]["problem"]
    wait_counting(manager)
    stranger.unlink()
    manager.backup("small", str(writing.parent / "again"))
    check_merged_away(manager, writing, before)


# A worker that copies disks when it is allowed to, and not before.
WAITER = """
import os, sys, time
if "vmm.worker.worker" in sys.orig_argv:
    from vmm.processes import disk_copies
    convert = disk_copies._convert

    async def waiting(*words):
        import asyncio
        while not os.path.exists({gate!r}):
            await asyncio.sleep(0.05)
        await convert(*words)

    disk_copies._convert = waiting
"""


def test_one_at_a_time(manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-ONE-JOURNAL: while a backup copies, no snapshot, merge or other backup begins, and its journal stays."""
    gate = tmp_path / "gate"
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "sitecustomize.py").write_text(WAITER.format(gate=str(gate)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "code"))
    leaf = make_machine(manager, tmp_path)
    manager.start("small")
    before = files_of(tmp_path)
    child = backup_elsewhere(manager, tmp_path / "copy")
    wait_until(lambda: isinstance(now := journal(), Backup) and now.pivoted, "the disks have their new leaves")
    begun = journal()
    verbs: tuple[Callable[[], object], ...] = (
        lambda: manager.snapshots("small").create("a"),
        lambda: manager.snapshots("small").set_limit(3),
        lambda: manager.backup("small", str(tmp_path / "other")),
    )
    for verb in verbs:
        with pytest.raises(InUse):
            verb()
        assert journal() == begun
    (merge,) = manager.snapshots("small").merge_live()
    assert "busy with another operation: backup" in str(merge.problem) and journal() == begun
    gate.touch()
    os.waitpid(child, 0)
    assert (tmp_path / "copy" / "disk-0.vhd").exists()
    check_merged_away(manager, leaf, before)


def test_a_merge_during_which_qemu_ends_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal is not ended before the definition names the merged image, even if QEMU ended in the meantime."""
    pivot = Pivot("disk-0", "/disks/web.vhd", "/disks/web_0123abcd.avhd", "vhd")
    done: list[str] = []

    class Played:
        """A running machine, and the tree that its worker holds."""

        name, tree, exited = "web", Tree(), asyncio.Event()
        go_on = staticmethod(lambda journal: done.append("went on"))
        done = staticmethod(lambda: done.append("done"))
        remove_empty = staticmethod(lambda: None)

    async def merge(running: object, journal: object, progress: object) -> None:
        Played.exited.set()

    async def follow(running: object, held: object, journal: object) -> None:
        done.append("followed")

    async def layers(running: object) -> dict[str, list[str]]:
        return {"disk-0": [pivot.child, pivot.frozen]}

    async def merged(running: object, disk: str) -> None: ...

    monkeypatch.setattr(backup, "merge_served", merge)
    monkeypatch.setattr(backup, "follow_merge", follow)
    monkeypatch.setattr(backup, "served_layers", layers)
    monkeypatch.setattr(backup, "wait_merged", merged)
    played = cast(Any, Played())
    asyncio.run(backup.merge_away(played, played, Backup((pivot,), True, True), lambda document: None))
    assert done == ["followed", "went on", "done"]


def test_a_damaged_note_of_a_backup(manager: Manager, tmp_path: Path) -> None:
    """A note with unusable content is an error that names it."""
    make_machine(manager, tmp_path)
    place = MachineRef.of("small").machine
    Path(note_path(place)).write_text("[")
    with pytest.raises(StoreFailed, match=r"damaged"):
        read_note(place)
