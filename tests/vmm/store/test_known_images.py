# SPDX-License-Identifier: Apache-2.0
"""vmm knows the images of all machines: the parent of another machine's image is not changed, wherever that lies."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

import vhdkit
import vmm
from tests.support import require_tool
from tests.vmm.snapshots.machines import Machines
from vhdkit.serve.opening import open_exports, requests_of_file
from vmm.kvm import program
from vmm.model.errors import InUse, Refused
from vmm.model.paths import write_whole
from vmm.processes.supervisor import exports_of
from vmm.store import known_images, registry
from vmm.store.snapshots.store import tree_path


@pytest.fixture
def gold(machines: Machines) -> Path:
    """A machine "gold" on an image that was cloned into several folders; the clone in "b" is a machine's disk."""
    for folder in ("gold", "vms/a", "vms/b"):
        (machines.folder / folder).mkdir(parents=True)
    image = machines.disk("gold/g.vhd")
    machines.create("gold", [image])
    vhdkit.clone(image, [machines.folder / "vms/a/a.avhd", machines.folder / "vms/b/b.avhd"])
    parent = (str(machines.folder / "gold"),)
    vmm.Manager().create(
        "b", disks=[vmm.DiskRequest(str(machines.folder / "vms/b/b.avhd"), parent_dirs=parent)], memory_bytes=16 << 20
    )
    # the mark beside the image may be lost, for example in a copy: vmm knows the machines all the same
    for record in image.parent.glob(".*"):
        record.unlink()
    return image


def content(path: Path) -> str:
    """The hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def refusals(machines: Machines, gold: Path) -> None:
    """Every change of the image is refused, with the name of its child, and changes nothing."""
    before = content(gold)
    manager = vmm.Manager()
    with pytest.raises(InUse, match=r"is the parent of .*b\.avhd"):
        manager.resize_disk("gold", "disk-0", 4 << 20)
    runtime = registry.load("gold").runtime
    Path(runtime.folder).mkdir(parents=True)
    write_whole(runtime.running, registry.load("gold").spec.to_json())
    exports = machines.folder / "exports.json"
    exports.write_text(json.dumps({"exports": exports_of(runtime, follow_leaf=False),
                                   "known_images": known_images.known_images()}))  # fmt: skip
    (wanted,) = requests_of_file(str(exports))
    assert wanted.open_mode is not None
    with pytest.raises(vhdkit.HasChildren, match=r"b\.avhd"):
        open_exports([wanted], wanted.open_mode)
    shutil.rmtree(runtime.folder)
    plan = manager.plan_delete("gold", with_disks=True)
    assert plan.disks == () and [one.path for one in plan.kept] == [str(gold)] and "b.avhd" in plan.kept[0].reason
    assert content(gold) == before


def test_a_clone_in_another_folder(machines: Machines, gold: Path) -> None:
    """INV-PARENT-READ-ONLY: `start`, `disk resize`, `disk add`, `create` and `delete --with-disks` know b's clone."""
    b = machines.now("b")
    refusals(machines, gold)
    manager = vmm.Manager()
    other = machines.disk("other.vhd")
    machines.create("other", [other])
    vhdkit.clone(other, [machines.folder / "vms/a/of-other.avhd"])
    manager.delete("other")
    parent = (str(machines.folder),)
    manager.create("c", disks=[vmm.DiskRequest(str(machines.folder / "vms/a/of-other.avhd"), parent_dirs=parent)])
    for record in machines.folder.glob(".*.vhdkit-*"):
        record.unlink()
    with pytest.raises(Refused, match=r"of-other\.avhd stands on it") as refusal:
        manager.add_disk("b", vmm.DiskRequest(str(other)))
    assert "vhdkit create NEW.avhd --parent" in str(refusal.value.hint)
    with pytest.raises(Refused, match="stands on it"):
        manager.create("d", disks=[vmm.DiskRequest(str(other))])
    manager.add_disk("b", vmm.DiskRequest(str(other), read_only=True))  # that changes nothing
    assert (
        manager.delete("gold", with_disks=True).disks == ()
        and gold.exists()
        and machines.now("b")["disk-0"] == b["disk-0"]
    )


def test_start_is_refused(machines: Machines, gold: Path) -> None:
    """INV-PARENT-READ-ONLY: the machine on the base does not start; with its own leaf, made by a snapshot, it does."""
    require_tool("qemu-system-x86_64")
    program.find()
    before = content(gold)
    with pytest.raises(vmm.VmmError, match=r"is the parent of .*b\.avhd"):
        vmm.Manager().start("gold")
    assert content(gold) == before and vmm.Manager().state("gold") is vmm.MachineState.OFF
    vmm.Manager().snapshots("gold").create("a")
    machine = registry.load("gold")
    Path(machine.runtime.folder).mkdir(parents=True)
    write_whole(machine.runtime.running, machine.spec.to_json())
    exports = machines.folder / "exports.json"
    exports.write_text(json.dumps({"exports": exports_of(machine.runtime, follow_leaf=False),
                                   "known_images": known_images.known_images()}))  # fmt: skip
    (wanted,) = requests_of_file(str(exports))
    assert wanted.open_mode is not None
    for export in open_exports([wanted], wanted.open_mode):
        export.disk.close()
    shutil.rmtree(machine.runtime.folder)
    assert content(gold) == before


@pytest.mark.parametrize("where", ["snapshot", "read-only in a snapshot", "backup", "unreadable"])
def test_wherever_the_clone_is_named(machines: Machines, gold: Path, where: str) -> None:
    """INV-PARENT-READ-ONLY: in a snapshot, only in its definition, or in the note of a backup; an unreadable file may
    name any image."""
    b = registry.load("b")
    clone = machines.folder / "vms/b/b.avhd"
    if where == "snapshot":
        vmm.Manager().snapshots("b").create("a")
        assert json.loads(Path(tree_path(b.paths)).read_text())["images"]
        refusals(machines, gold)
        return
    if where == "read-only in a snapshot":
        vmm.Manager().remove_disk("b", "disk-0")
        parent = (str(machines.folder / "gold"),)
        vmm.Manager().add_disk("b", vmm.DiskRequest(str(clone), read_only=True, parent_dirs=parent))
        vmm.Manager().snapshots("b").create("a")
        vmm.Manager().remove_disk("b", "disk-0")
        assert str(clone) not in Path(b.paths.definition).read_text()
        refusals(machines, gold)
        return
    vmm.Manager().remove_disk("b", "disk-0")
    if where == "backup":
        note = {"disk-0": {"frozen": str(machines.folder / "x.vhd"), "child": str(clone)}}
        (Path(b.paths.folder) / "backup.json").write_text(json.dumps(note))
        refusals(machines, gold)
        return
    Path(b.paths.definition).write_text("{")
    assert known_images.look().unread == ("b",)
    plan = vmm.Manager().plan_delete("gold", with_disks=True)
    assert plan.disks == () and "cannot be read" in plan.kept[0].reason


def test_copies_of_a_chain_are_independent(machines: Machines, gold: Path) -> None:
    """A machine whose images are copies of another's, with the same ids, depends on its own copy of the base."""
    vmm.Manager().delete("b")
    folder = machines.folder / "copies"
    folder.mkdir()
    shutil.copy(gold, folder / "g.vhd")
    shutil.copy(machines.folder / "vms/b/b.avhd", folder / "b.avhd")
    vhdkit.rebase(folder / "b.avhd", folder / "g.vhd")
    shutil.rmtree(machines.folder / "vms")
    machines.create("copy", [folder / "b.avhd"])
    assert vmm.Manager().resize_disk("gold", "disk-0", 4 << 20) == 4 << 20
    assert vmm.Manager().delete("gold", with_disks=True).disks == (str(gold),) and not gold.exists()


def test_a_clone_made_after_the_plan(machines: Machines, gold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that got a child after the deletion was planned stays, and that is reported."""
    vmm.Manager().delete("b")
    shutil.rmtree(machines.folder / "vms")
    remove = registry.remove

    def cloned_first(machine: registry.Changing) -> None:
        vhdkit.clone(gold, [machines.folder / "late.avhd"])
        vmm.Manager().create("late", disks=[
            vmm.DiskRequest(str(machines.folder / "late.avhd"), parent_dirs=(str(gold.parent),))
        ])  # fmt: skip
        remove(machine)

    monkeypatch.setattr(registry, "remove", cloned_first)
    done = vmm.Manager().delete("gold", with_disks=True)
    assert done.disks == () and "late.avhd" in done.kept[0].reason and gold.exists()


def test_marks_are_left(machines: Machines, gold: Path) -> None:
    """A clone gets a mark at its parent when a machine gets it, so that vhdkit alone protects the parent, too."""
    parent = (str(gold.parent),)
    clone = machines.folder / "vms/a/a.avhd"
    manager = vmm.Manager()
    options = vhdkit.OpenOptions(parent_dirs=parent)
    assert vhdkit.find_children([gold], everywhere=True)[str(gold)] == []
    manager.create("a", disks=[vmm.DiskRequest(str(clone), parent_dirs=parent)])
    assert vhdkit.find_children([gold], everywhere=True)[str(gold)] == [str(clone)]
    with pytest.raises(vhdkit.HasChildren):
        vhdkit.merge(machines.folder / "vms/b/b.avhd", options=options)
    for record in gold.parent.glob(".*"):
        record.unlink()
    manager.remove_disk("a", "disk-0")
    manager.add_disk("a", vmm.DiskRequest(str(clone), parent_dirs=parent, read_only=True))
    assert vhdkit.find_children([gold], everywhere=True)[str(gold)] == [str(clone)]
    for record in gold.parent.glob(".*"):
        record.unlink()
    (gold.parent / f".{gold.name}.vhdkit-children").mkdir()  # it cannot be written
    manager.remove_disk("a", "disk-0")
    manager.add_disk("a", vmm.DiskRequest(str(clone), parent_dirs=parent, read_only=True))
    assert manager.events("a")[-1].name == "parent-not-marked"
