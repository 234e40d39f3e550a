# SPDX-License-Identifier: Apache-2.0
"""Verbs that destroy something check first: when they refuse, the guest keeps running, and saved memory stays."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import not_available, require_tool
from tests.vmm.small_guests import last_tick, make_machine, processes, wait_counting
from vmm.api.manager import Manager
from vmm.model.errors import AccessDenied, VmmError
from vmm.snapshots.preflight import removal_problem
from vmm.store import saved
from vmm.store.registry import load
from vmm.store.snapshots.memory import SnapshotFolder
from vmm.store.snapshots.tree import Snapshot
from vmm.store.state import MachineState


def hide_base(leaf: Path, snapshot: Snapshot) -> None:
    leaf.with_suffix(".vhd").rename(leaf.with_suffix(".hidden"))


def spoil_base(leaf: Path, snapshot: Snapshot) -> None:
    with leaf.with_suffix(".vhd").open("r+b") as file:
        file.truncate(1000)


def cut_memory(leaf: Path, snapshot: Snapshot) -> None:
    os.truncate(SnapshotFolder(snapshot.folder).memory, 1 << 20)


def blank_memory(leaf: Path, snapshot: Snapshot) -> None:
    with open(SnapshotFolder(snapshot.folder).memory, "r+b") as file:
        file.write(bytes(4096))


def lose_description(leaf: Path, snapshot: Snapshot) -> None:
    os.unlink(SnapshotFolder(snapshot.folder).description)


def newer_qemu(leaf: Path, snapshot: Snapshot) -> None:
    path = Path(SnapshotFolder(snapshot.folder).description)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"qemu_version": "99.0.0"}))


def spoil_definition(leaf: Path, snapshot: Snapshot) -> None:
    Path(SnapshotFolder(snapshot.folder).definition).write_text("{")


SPOILERS: list[Callable[[Path, Snapshot], None]] = [
    hide_base, spoil_base, cut_memory, blank_memory, lose_description, newer_qemu, spoil_definition,
]  # fmt: skip


@pytest.mark.kvm
def test_the_guest_keeps_running_if_a_snapshot_cannot_be_applied(manager: Manager, tmp_path: Path) -> None:
    """INV-LOOK-FIRST: whatever is missing or damaged, apply refuses while the guest keeps counting, and removes
    nothing."""
    leaf = make_machine(manager, tmp_path)
    manager.start("small")
    wait_counting(manager)
    snapshots = manager.snapshots("small")
    snapshot = snapshots.create("before")
    before, images = processes(), sorted(os.listdir(tmp_path))
    kept = {path: path.read_bytes() for path in [leaf.with_suffix(".vhd"), *Path(snapshot.folder).iterdir()]}
    for spoil in SPOILERS:
        spoil(leaf, snapshot)
        for keep in ({"discard_current": True}, {"snapshot_current": "now"}):
            with pytest.raises(VmmError):
                snapshots.apply("before", **keep)
        assert processes() == before, spoil.__name__
        assert list(snapshots.tree().snapshots) == [snapshot.id]
        leaf.with_suffix(".hidden").unlink(missing_ok=True)
        for path, content in kept.items():
            path.write_bytes(content)
    assert sorted(os.listdir(tmp_path)) == images
    counted = last_tick(manager)
    assert wait_counting(manager) > counted
    assert snapshots.apply("before", discard_current=True).state == "saved"
    manager.start("small")
    wait_counting(manager)


@pytest.mark.kvm
def test_saved_memory_is_kept_when_the_machine_cannot_start(manager: Manager, tmp_path: Path) -> None:
    """INV-LOOK-FIRST: `start --discard-saved` of a machine whose base is missing is refused, and the memory stays."""
    leaf = make_machine(manager, tmp_path)
    manager.start("small")
    counted = wait_counting(manager)
    manager.save("small")
    leaf.with_suffix(".vhd").rename(tmp_path / "away")
    with pytest.raises(VmmError, match="parent"):
        manager.start("small", discard_saved=True)
    assert manager.state("small") is MachineState.SAVED and saved.is_saved(load("small").paths)
    (tmp_path / "away").rename(leaf.with_suffix(".vhd"))
    manager.start("small")
    assert wait_counting(manager) > counted


def test_files_that_cannot_be_removed_are_reported_beforehand(tmp_path: Path) -> None:
    """INV-LOOK-FIRST: an immutable file or folder is named before anything is removed; removable ones are not
    named."""
    require_tool("chattr")
    image = tmp_path / "folder" / "image.vhd"
    image.parent.mkdir()
    image.touch()
    assert removal_problem(str(image)) is None
    assert removal_problem(str(tmp_path / "absent")) is None
    for fixed in (image, image.parent):
        if subprocess.run(["chattr", "+i", str(fixed)], capture_output=True, check=False).returncode != 0:
            not_available("needs a file system with immutable files, and root")
        try:
            problem = removal_problem(str(image))
        finally:
            subprocess.run(["chattr", "-i", str(fixed)], check=True)
        assert problem is not None


@pytest.mark.kvm
def test_a_machine_with_an_immutable_disk(manager: Manager, tmp_path: Path) -> None:
    """INV-LOOK-FIRST: the disk is listed as one that stays, and the machine is deleted without an error."""
    require_tool("chattr")
    leaf = make_machine(manager, tmp_path)
    if subprocess.run(["chattr", "+i", str(leaf)], capture_output=True, check=False).returncode != 0:
        not_available("needs a file system with immutable files, and root")
    try:
        plan = manager.plan_delete("small", with_disks=True)
        assert plan.disks == () and [one.path for one in plan.kept] == [str(leaf)]
        manager.delete("small", with_disks=True)
    finally:
        subprocess.run(["chattr", "-i", str(leaf)], check=True)
    assert leaf.exists() and manager.names() == []


def test_a_snapshot_in_an_immutable_folder(manager: Manager, tmp_path: Path) -> None:
    """INV-LOOK-FIRST: it is not deleted in part: it stays in the tree, with everything that it has."""
    require_tool("chattr")
    make_machine(manager, tmp_path)
    snapshots = manager.snapshots("small")
    snapshot = snapshots.create("before")
    if subprocess.run(["chattr", "+i", snapshot.folder], capture_output=True, check=False).returncode != 0:
        not_available("needs a file system with immutable files, and root")
    try:
        with pytest.raises(AccessDenied, match="cannot be removed"):
            snapshots.delete("before")
    finally:
        subprocess.run(["chattr", "-i", snapshot.folder], check=True)
    assert list(snapshots.tree().snapshots) == [snapshot.id]
    assert snapshots.delete("before").snapshots[0].id == snapshot.id
