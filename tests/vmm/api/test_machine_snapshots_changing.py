# SPDX-License-Identifier: Apache-2.0
"""Every verb that changes a machine, while another process changes it first: the verb acts on the newer state.

The other process stands for the worker of a running machine whose `snapshot create` was interrupted:
while the next command waits for a lock, the disk gets a new leaf, and the definition and the tree record that.
INV-READ-UNDER-LOCK.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import vhdkit
import vmm
from tests.vmm.snapshots.machines import Machines
from vmm.api.export_import.exporting import export
from vmm.api.guest_access import GuestAccess
from vmm.api.machine_snapshots import MachineSnapshots
from vmm.host.proc import Lock
from vmm.model.errors import InUse, QemuFailed
from vmm.processes import worker_connection as contact
from vmm.processes.worker_connection import MachineRef
from vmm.snapshots import steps
from vmm.snapshots.background_merge import Fold
from vmm.store import registry
from vmm.store.snapshots.store import load_tree, tree_path

NOTES = "written by another process"
Verb = Callable[[Path], object]


def manager() -> vmm.Manager:
    """The manager of all machines."""
    return vmm.Manager()


def snapshots() -> MachineSnapshots:
    """The snapshots of the machine."""
    return manager().snapshots("web")


def fold(folder: Path) -> None:
    """Do the due merges."""
    machine = registry.load("web")
    Fold(machine.paths, machine.runtime).run()


# The verbs that change a machine or copy its disks, by their names, each with a call.
CHANGING: dict[str, Verb] = {
    "Manager.set": lambda folder: manager().set("web", cpu_count=2),
    "Manager.add_disk": lambda folder: manager().add_disk("web", vmm.DiskRequest(str(folder / "more.vhd"))),
    "Manager.remove_disk": lambda folder: manager().remove_disk("web", "disk-1"),
    "Manager.change_medium": lambda folder: manager().change_medium("web", "disk-2", None),
    "Manager.resize_disk": lambda folder: manager().resize_disk("web", "disk-0", 2 << 20),
    "Manager.discard_saved": lambda folder: manager().discard_saved("web"),
    "Manager.add_adapter": lambda folder: manager().add_adapter("web"),
    "Manager.remove_adapter": lambda folder: manager().remove_adapter("web", "nic-0"),
    "Manager.change_adapter": lambda folder: manager().change_adapter("web", "nic-0", link_up=False),
    "Manager.save_night": lambda folder: manager().save_night("web", str(folder / "copies")),
    "Manager.forget_nights": lambda folder: manager().forget_nights("web"),
    "Manager.repair": lambda folder: manager().repair("web"),
    "Manager.start": lambda folder: manager().start("web"),
    "Manager.delete": lambda folder: manager().delete("web", with_disks=True, with_snapshots=True),
    "MachineSnapshots.create": lambda folder: snapshots().create("new"),
    "MachineSnapshots.apply": lambda folder: snapshots().apply("one", snapshot_current="kept"),
    "MachineSnapshots.delete": lambda folder: snapshots().delete("two"),
    "MachineSnapshots.forget_memory": lambda folder: snapshots().forget_memory("two"),
    "MachineSnapshots.merge": lambda folder: snapshots().merge(),
    "MachineSnapshots.rename": lambda folder: snapshots().rename("two", "second"),
    "MachineSnapshots.annotate": lambda folder: snapshots().annotate("two", "text"),
    "MachineSnapshots.set_limit": lambda folder: snapshots().set_limit(7),
    "GuestAccess.set_item": lambda folder: manager().guest("web").set_item("key", "value"),
    "GuestAccess.delete_item": lambda folder: manager().guest("web").delete_item("key"),
    "export": lambda folder: export("web", str(folder / "exported")),
    "Fold.run": fold,
}
# The verbs that only read or make another machine, and those that a running machine's worker carries out.
LOOKING = (
    "Manager.names machines show state events follow_events log_path snapshots create plan_delete disks guest restore",
    "MachineSnapshots.tree find merging merges_due hidden kept_for_backups sizes size_of_now",
    "GuestAccess.open_console has_console console_log screen picture vnc_socket ping info items get_item",
)
ASKING = (
    "Manager.shutdown stop stop_with_host save reset pause resume",
    "MachineSnapshots.merge_live cancel_merge",
    "GuestAccess.freeze thaw set_time",
)
ELSEWHERE = ("Manager.new_id",)  # of a copy: `test_new_id`
TREE_LOCK, MACHINE_LOCK = ".snapshots.lock", ".lock"
TAKES_NO_MACHINE_LOCK = {"MachineSnapshots.merge", "Fold.run"}
TAKES_NO_TREE_LOCK = {
    "Manager.set", "Manager.add_disk", "Manager.remove_disk", "Manager.resize_disk", "Manager.discard_saved",
    "Manager.change_medium",
    "Manager.add_adapter", "Manager.remove_adapter", "Manager.change_adapter",
    "GuestAccess.set_item", "GuestAccess.delete_item",
}  # fmt: skip


def listed(lines: tuple[str, ...]) -> set[str]:
    """The names in a list like those above."""
    found = set()
    for line in lines:
        owner, _, names = line.partition(".")
        found |= {f"{owner}.{name}" for name in names.split()}
    return found


def test_every_verb_is_listed() -> None:
    """A new verb must be put into one of the lists above: into that of the verbs tried here, if it changes
    anything."""
    verbs = {
        f"{one.__name__}.{name}"
        for one in (vmm.Manager, MachineSnapshots, GuestAccess)
        for name, member in vars(one).items()
        if not name.startswith("_") and callable(member)
    }
    known = {name for name in CHANGING if "." in name and not name.startswith("Fold")}
    assert verbs == known | listed(LOOKING) | listed(ASKING) | set(ELSEWHERE)


def test_only_the_registry_writes_definitions() -> None:
    """A machine's definition is written only by the registry, which reads it again first. INV-READ-UNDER-LOCK."""
    writing = re.compile(r"write_whole\([^()]*(paths|machine|where)\.definition")
    assert writing.search("write_whole(machine.paths.definition, x)")
    root = Path(vmm.__file__).parent
    found = [path.name for path in root.rglob("*.py") if writing.search(path.read_text())]
    assert found == ["registry.py"]


@pytest.fixture
def web(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> Machines:
    """A machine with two disks, a drive, an adapter, an item for its guest and two snapshots, one with memory."""
    machines.disk("more.vhd")
    one = machines.create(disks=2)
    manager().add_disk("web", vmm.DiskRequest(None, kind="iso"))
    manager().add_adapter("web")
    one.create("one")
    two = one.create("two")
    machine = registry.load("web")
    tree = load_tree(machine.paths)
    Path(two.folder, f"{two.id}.bin").write_bytes(bytes(512))
    Path(two.folder, f"{two.id}.vsv").write_bytes(b"{}")
    tree.snapshots[two.id] = replace(two, memory_bytes=512)
    Path(tree_path(machine.paths)).write_bytes(tree.to_json())
    manager().guest("web").set_item("key", "before")
    monkeypatch.setattr(contact, "_spawn_supervisor", no_supervisor)
    return machines


def no_supervisor(place: MachineRef, ready: int | None = None) -> None:
    """A start ends where a supervisor would begin, with the definition that the machine would run with."""
    disk, *_ = json.loads(Path(place.runtime.running).read_text())["disks"]
    raise QemuFailed(f"would run with {os.path.basename(disk['path'])}")


def moved_by_another_process() -> str:
    """Finish a snapshot: the first disk gets a new leaf with the guest's writes. Returns its path."""
    machine = registry.load("web")
    tree = load_tree(machine.paths)
    frozen = str(machine.spec.disks[0].path)
    leaf = frozen.replace(".avhd", "-moved.avhd")
    vhdkit.create_child(leaf, frozen)
    with vhdkit.open_disk(leaf, writable=True) as disk:
        disk.write(8192, b"since".ljust(512))
    tree.grow(frozen, leaf, "vhd")
    Path(tree_path(machine.paths)).write_bytes(tree.to_json())
    spec = steps.relocated(machine.spec, {"disk-0": (leaf, "vhd")}).changed(notes=NOTES)
    Path(machine.paths.definition).write_bytes(spec.to_json())
    return leaf


def is_there(path: str) -> bool:
    """True if an image has the guest's writes."""
    with vhdkit.open_disk(path) as disk:
        return disk.read(8192, 5) == b"since"


@pytest.mark.parametrize("name", CHANGING)
def test_verbs_act_on_the_state_under_the_lock(web: Machines, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verb loses neither what was written while it waited, nor the new image. INV-READ-UNDER-LOCK."""
    awaited = MACHINE_LOCK if name in TAKES_NO_TREE_LOCK else TREE_LOCK
    leaves: list[str] = []
    take = Lock.try_take

    def take_late(self: Lock) -> bool:
        taken = take(self)
        if taken and os.path.basename(self.path) == awaited and not leaves:
            leaves.append(moved_by_another_process())
        return taken

    if name == "Manager.discard_saved":
        os.mkdir(registry.load("web").paths.saved)
    monkeypatch.setattr(Lock, "try_take", take_late)
    said = ""
    try:
        CHANGING[name](web.folder)
    except QemuFailed as error:
        said = str(error)
    (leaf,) = leaves
    if name == "Manager.delete":
        assert web.images() == {"more.vhd"} and registry.names() == []
        return
    machine, tree = registry.load("web"), load_tree(registry.load("web").paths)
    disk = str(machine.spec.disks[0].path)
    if name == "MachineSnapshots.apply":
        assert is_there(tree.find("kept").disks["disk-0"])
        return
    assert machine.spec.notes == NOTES and is_there(disk)
    if name in ("MachineSnapshots.merge", "Fold.run"):
        assert not os.path.exists(leaf)  # it was merged into its parent, which no snapshot froze
    elif name == "MachineSnapshots.create":
        assert tree.find("new").disks["disk-0"] == leaf and is_there(leaf)
    elif name == "Manager.save_night":
        assert leaf in {one.image for one in tree.kept} and is_there(leaf)
    else:
        assert disk == leaf
    for copy in (f"exported/disks/{os.path.basename(leaf)}",):
        assert not (web.folder / copy).exists() or is_there(str(web.folder / copy))
    assert (name in ("Manager.save_night", "export")) == any(
        (web.folder / one).exists() for one in ("copies", "exported")
    )
    assert os.path.basename(leaf) in said or name != "Manager.start"
    with vhdkit.open_disk(disk) as opened:
        assert opened.size_bytes == (2 << 20 if name == "Manager.resize_disk" else 1 << 20)


def test_a_definition_that_was_read_too_early_is_not_saved(web: Machines) -> None:
    """Saving a decision made from another definition is refused; a change of one setting keeps all others."""
    with registry.changing("web") as machine:
        leaf = moved_by_another_process()
        with pytest.raises(InUse, match="changed by another command"):
            registry.save(machine, machine.spec.changed(cpu_count=3))
        registry.update(machine.lock, lambda spec: spec.changed(cpu_count=4))
    spec = registry.load("web").spec
    assert (spec.notes, spec.cpu_count, spec.disks[0].path) == (NOTES, 4, leaf)


def test_a_released_lock_loads_nothing(web: Machines) -> None:
    """The proof that a lock is held is valid only while it is held."""
    with registry.changing("web") as machine:
        registry.load_for_change(machine.lock)
    with pytest.raises(AssertionError, match="while its lock is held"):
        registry.load_for_change(machine.lock)
