# SPDX-License-Identifier: Apache-2.0
"""A machine of which all processes were killed in the middle of an operation: every verb finds its newest images."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

import vhdkit
import vmm
from tests.vmm.snapshots.machines import DISK_BYTES, Machines
from tests.vmm.snapshots.old_notes import child_name, write_note
from tests.vmm.snapshots.test_recovery import after_each_kill
from vhdkit import backups
from vmm.api.export_import.exporting import export
from vmm.model.errors import Refused, VmmError
from vmm.snapshots.steps import child_path, options_of_all, pivoted
from vmm.store import registry
from vmm.store.backup_note import Stacked, has_note
from vmm.store.registry import Machine
from vmm.store.snapshots.journal import Apply, Backup, CreateLive, CreateOff, Pivot
from vmm.store.snapshots.store import holding, load_tree
from vmm.store.state import note_running, note_unclean

Left = Callable[[Machine, str], str]


def by_old_backup(machine: Machine, frozen: str) -> str:
    """A backup by vmm 0.1.0 whose children take the writes."""
    child = child_name(frozen)
    write_note(machine.paths, {"disk-0": Stacked(frozen, child)})
    vhdkit.create_child(child, frozen, options=options_of_all(machine.spec))
    return child


def by_backup(machine: Machine, frozen: str, *, pivoted: bool = True) -> str:
    """A backup whose new leaves take the writes, cut short before the definition named them."""
    child = child_path(frozen)
    with holding(machine.paths, machine.name) as held:
        held.begin(Backup((Pivot("disk-0", frozen, child, "vhd"),), pivoted=pivoted))
    vhdkit.create_child(child, frozen, options=options_of_all(machine.spec))
    return child


def by_merging_backup(machine: Machine, frozen: str) -> str:
    """A backup whose copies are made, and whose leaves are being merged into the frozen images."""
    pivot = Pivot("disk-0", frozen, child_path(frozen), "vhd")
    vhdkit.create_child(pivot.child, frozen, options=options_of_all(machine.spec))
    with holding(machine.paths, machine.name) as held:
        held.begin(Backup((pivot,), pivoted=True))
        held.tree.grow(frozen, pivot.child, "vhd", child_id=vhdkit.image_id(pivot.child))
        registry.update(held, lambda spec: pivoted(spec, [pivot]), check_images=False)
        held.go_on(Backup((pivot,), pivoted=True, merging=True))
    return pivot.child


def by_unfollowed_backup(machine: Machine, frozen: str) -> str:
    """A backup that was cut short after the disks got their new leaves, before anything said so."""
    return by_backup(machine, frozen, pivoted=False)


BACKUPS = [by_backup, by_unfollowed_backup, by_merging_backup, by_old_backup]


def by_create(machine: Machine, frozen: str) -> str:
    """A live snapshot whose disks had their new leaves, and half of its memory."""
    child, snapshot_id = child_path(frozen), str(uuid.uuid4())
    folder = machine.paths.folder + f"/snaps/{snapshot_id}"
    with holding(machine.paths, machine.name) as held:
        held.begin(CreateLive(folder, (Pivot("disk-0", frozen, child, "vhd"),), pivoted=True))
    vhdkit.create_child(child, frozen, options=options_of_all(machine.spec))
    os.makedirs(f"{folder}.part")
    Path(f"{folder}.part", f"{snapshot_id}.bin").write_bytes(b"half")
    return child


def cut(machines: Machines, left: Left) -> tuple[str, str, str]:
    """Such a machine, with the guest's last writes: (frozen image, newest image, the hash of the disk)."""
    machines.create()
    machine = registry.load("web")
    frozen = str(machine.spec.disks[0].path)
    note_unclean(machine.paths)
    note_running(machine.paths, True)
    newest = left(machine, frozen)
    with vhdkit.open_disk(newest, writable=True) as disk:
        disk.write(8192, b"flushed last" * 100)
    return frozen, newest, content(newest)


def content(path: str | Path) -> str:
    """The hash of a disk's content."""
    with vhdkit.open_disk(path, options=vhdkit.OpenOptions(lock=False)) as disk:
        return hashlib.sha256(disk.read(0, DISK_BYTES)).hexdigest()


manager = vmm.Manager()
VERBS: dict[str, Callable[[Path], object]] = {
    "show": lambda here: manager.show("web"),
    "list": lambda here: manager.machines(),
    "disk list": lambda here: manager.disks("web"),
    "set": lambda here: manager.set("web", notes="x"),
    "disk add": lambda here: manager.add_disk("web", vmm.DiskRequest(str(new_image(here)))),
    "disk resize": lambda here: manager.resize_disk("web", "disk-0", 2 * DISK_BYTES),
    "delete": lambda here: manager.plan_delete("web", with_disks=True),
    "nic add": lambda here: manager.add_adapter("web"),
    "backup": lambda here: manager.save_night("web", str(here / "copy")),
    "export": lambda here: export("web", str(here / "out")),
    "snapshot create": lambda here: manager.snapshots("web").create("s"),
    "snapshot tree": lambda here: manager.snapshots("web").tree(),
    "snapshot limit": lambda here: manager.snapshots("web").set_limit(3),
    "snapshot merges": lambda here: manager.snapshots("web").merges_due(),
    "snapshot size": lambda here: manager.snapshots("web").size_of_now(),
}


def new_image(here: Path) -> Path:
    """An image that no machine has."""
    path = here / "new.vhd"
    vhdkit.create_image(path, DISK_BYTES)
    return path


@pytest.mark.parametrize("left", [*BACKUPS, by_create])
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_finishes_the_interrupted_operation_first(machines: Machines, verb: str, left: Left) -> None:
    """Whichever verb comes next finds the image with the guest's last writes, and no operation is left unfinished."""
    _, newest, expected = cut(machines, left)
    VERBS[verb](machines.folder)
    machine = registry.load("web")
    tree = load_tree(machine.paths)
    assert tree.journal is None and not has_note(machine.paths)
    assert newest in vhdkit.chain_paths(str(machine.spec.disks[0].path))
    assert tree.images[newest].ours and tree.images[newest].id == vhdkit.image_id(newest)
    with vhdkit.open_disk(str(machine.spec.disks[0].path)) as disk:
        assert hashlib.sha256(disk.read(0, DISK_BYTES)).hexdigest() == expected
    assert not list(Path(machine.paths.folder).rglob("*.part")), "memory of a snapshot that does not exist is left"


def by_create_off(machine: Machine, frozen: str) -> str:
    """A snapshot of a machine that is off, whose new leaf has just been made."""
    child, folder = child_path(frozen), f"{machine.paths.folder}/snaps/{uuid.uuid4()}"
    with holding(machine.paths, machine.name) as held:
        held.begin(CreateOff(folder, (Pivot("disk-0", frozen, child, "vhd"),)))
    vhdkit.create_child(child, frozen, options=options_of_all(machine.spec))
    return child


@pytest.mark.parametrize("left", [*BACKUPS, by_create, by_create_off])
def test_a_golden_image_in_another_folder(machines: Machines, left: Left) -> None:
    """Operations are finished or undone even if the disk's base lies in a folder that the disk allows: new leaves with
    content are the machine's disks, unused ones are removed, and merges continue."""
    golden, own = machines.folder / "golden", machines.folder / "own"
    golden.mkdir()
    own.mkdir()
    vhdkit.create_image(golden / "base.vhd", DISK_BYTES)
    vhdkit.clone(golden / "base.vhd", [own / "web.avhd"])
    manager.create("web", disks=[vmm.DiskRequest(str(own / "web.avhd"), parent_dirs=(str(golden),))])
    newest = left(registry.load("web"), str(own / "web.avhd"))
    is_used = left is not by_create_off
    if is_used:
        options = options_of_all(registry.load("web").spec)
        with vhdkit.open_disk(newest, writable=True, options=options) as disk:
            disk.write(8192, b"flushed last" * 100)
    info = manager.show("web")
    assert info.spec is not None and info.spec.disks[0].path == (newest if is_used else str(own / "web.avhd"))
    assert os.path.exists(newest) == is_used
    now = machines.now("web")
    machines.merge("web")
    assert machines.now("web") == now and os.listdir(own) == ["web.avhd"]


@pytest.mark.parametrize("left", [by_merging_backup, by_old_backup])
def test_a_backups_merge_is_finished_before_its_disk_is_opened(machines: Machines, left: Left) -> None:
    """After everything was killed while a backup's image was being merged, the definition names an image that still
    exists after it was opened for writing, and the disk reads as before."""
    frozen, newest, expected = cut(machines, left)
    ends = set()
    for _ in after_each_kill(machines, lambda: vhdkit.merge(newest, into=frozen)):
        leaf = str(manager.show("web").spec.disks[0].path)  # type: ignore[union-attr]
        with vhdkit.open_disk(leaf, writable=True):
            pass
        assert content(leaf) == expected
        assert all(os.path.exists(path) for path in load_tree(registry.load("web").paths).images)
        ends.add(leaf)
    assert ends == {frozen, newest}


@pytest.mark.parametrize("left", [*BACKUPS, by_create])
def test_copies_are_made_from_the_newest_image(machines: Machines, left: Left) -> None:
    """Backup and export copy what was flushed last; a machine that died is not reported as shut down."""
    _, _, expected = cut(machines, left)
    result = manager.save_night("web", str(machines.folder / "repo"))
    backups.restore(machines.folder / "repo", "web", machines.folder / "copy.vhd", disks=["disk-0"])
    assert content(machines.folder / "copy.vhd") == expected and result.consistency == "off-unclean"
    export("web", str(machines.folder / "flat"), flat=True)
    assert content(machines.folder / "flat" / "disks" / "disk-0.vhd") == expected


@pytest.mark.parametrize("left", [*BACKUPS, by_create])
def test_the_next_merge_leaves_one_image(machines: Machines, left: Left) -> None:
    """The next merge puts the last writes into the machine's own image, and only that is left."""
    frozen, newest, expected = cut(machines, left)
    assert manager.snapshots("web").merge() == 1
    assert registry.load("web").spec.disks[0].path == frozen and content(frozen) == expected
    assert not os.path.exists(newest) and machines.images() == {os.path.basename(frozen)}


@pytest.mark.parametrize("left", [*BACKUPS, by_create])
def test_the_newest_image_is_removed_and_the_frozen_one_not_added(machines: Machines, left: Left) -> None:
    """`disk remove` names the newest image; adding the one below it is refused with the reason."""
    frozen, newest, _ = cut(machines, left)
    assert manager.remove_disk("web", "disk-0").path == newest
    for name in ("web", "other"):
        with pytest.raises(Refused, match="not the newest image"):
            if name == "web":
                manager.add_disk("web", vmm.DiskRequest(frozen))
            else:
                manager.create("other", disks=[vmm.DiskRequest(frozen)], memory_bytes=16 << 20)
    manager.add_disk("web", vmm.DiskRequest(newest))


def test_what_counts_as_consistent(machines: Machines) -> None:
    """A machine that never ran is consistent, one that ran is not until its guest has shut down; a snapshot records
    that."""
    small = machines.create()
    repo = str(machines.folder / "repo")
    assert manager.save_night("web", repo).consistency == "off-clean"
    assert small.create("clean").consistent is True
    note_unclean(registry.load("web").paths)
    assert manager.save_night("web", repo).consistency == "off-unclean"
    assert small.create("unclean").consistent is False
    small.apply("clean", discard_current=True)
    assert manager.save_night("web", repo).consistency == "off-clean"
    small.apply("unclean", discard_current=True)
    assert manager.save_night("web", repo).consistency == "off-unclean"


@pytest.mark.parametrize("left", [by_create, by_backup])
def test_a_missing_newest_image_is_reported(machines: Machines, left: Left) -> None:
    """If the image with the guest's last writes is gone, no verb silently uses the one below it."""
    _, newest, _ = cut(machines, left)
    os.rename(newest, f"{newest}.elsewhere")
    for verb in ("show", "set", "backup", "snapshot create"):
        with pytest.raises(Refused, match=r"is missing.*put it back; vmm repair web"):
            VERBS[verb](machines.folder)
    os.rename(f"{newest}.elsewhere", newest)
    assert manager.show("web").spec.disks[0].path == newest  # type: ignore[union-attr]


@pytest.mark.parametrize("make", [lambda folder, one: CreateOff(folder, (one,)), lambda folder, one: Apply((one,))])
def test_images_with_data_are_never_removed(
    machines: Machines, make: Callable[[str, Pivot], CreateOff | Apply]
) -> None:
    """INV-PROVEN-OURS: an image that a journal calls new and unused is removed only if it is."""
    machines.create()
    machine = registry.load("web")
    frozen = str(machine.spec.disks[0].path)
    precious, unused, foreign = (child_path(frozen) for _ in range(3))
    vhdkit.create_child(precious, frozen)
    with vhdkit.open_disk(precious, writable=True) as disk:
        disk.write(0, b"x" * 512)
    vhdkit.create_image(foreign, DISK_BYTES)
    Path(f"{machine.paths.folder}/kept").mkdir()
    folder = f"{machine.paths.folder}/kept/{uuid.uuid4()}"
    for child, stays in ((precious, True), (foreign, True), (unused, False)):
        if child == unused:
            os.rename(precious, f"{precious}.kept")  # otherwise the other one would be its sibling
            vhdkit.create_child(unused, frozen)
        with holding(machine.paths, "web") as held:
            held.begin(make(folder, Pivot("disk-0", frozen, child, "vhd")))
        manager.set("web", notes=child)
        assert os.path.exists(child) is stays and load_tree(machine.paths).journal is None


@pytest.mark.parametrize("kind", ["other id", "elsewhere", "link", "no child"])
def test_foreign_images_stay(machines: Machines, kind: str) -> None:
    """INV-PROVEN-OURS: a foreign image that a tree calls ours is neither removed nor merged."""
    small = machines.create()
    small.create("a")
    machine = registry.load("web")
    document = json.loads(Path(machine.paths.folder, "snapshots.json").read_text())
    base = str(next(path for path, one in document["images"].items() if not one["ours"]))
    name = child_path(base)
    victim = Path(name)
    image = {"parent": base, "ours": True, "format": "vhd", "id": None}
    if kind == "other id":
        vhdkit.create_child(victim, base)
        image["id"] = str(uuid.uuid4())
    elif kind == "elsewhere":
        (machines.folder / "far").mkdir()
        victim = machines.folder / "far" / victim.name
        vhdkit.create_image(victim, DISK_BYTES)
        image["id"] = vhdkit.image_id(victim)
    elif kind == "link":
        target = machines.folder / "precious.vhd"
        vhdkit.create_image(target, DISK_BYTES)
        victim.symlink_to(target)
        image["id"] = vhdkit.image_id(target)
    else:
        vhdkit.create_image(victim, DISK_BYTES)
    document["images"][str(victim)] = image
    Path(machine.paths.folder, "snapshots.json").write_text(json.dumps(document))
    assert str(victim) in small.hidden()
    small.delete("a")
    small.merge()
    manager.delete("web", with_disks=True, with_snapshots=True)
    assert os.path.lexists(victim)


def test_foreign_folders_stay(machines: Machines) -> None:
    """INV-PROVEN-OURS: only a snapshot's own files are removed from its folder; other files stay, and so does the
    folder."""
    small = machines.create()
    snapshot = small.create("a")
    Path(snapshot.folder, "precious").write_text("x")
    Path(snapshot.folder, f"{snapshot.id}.bin").mkdir()
    small.delete("a")
    assert sorted(os.listdir(snapshot.folder)) == sorted(["precious", f"{snapshot.id}.bin"])
    away = machines.folder / "away" / snapshot.id
    away.mkdir(parents=True)
    (away / f"{snapshot.id}.json").write_text("{}")
    other = small.create("b")
    document = json.loads(Path(registry.load("web").paths.folder, "snapshots.json").read_text())
    os.rename(other.folder, f"{other.folder}.real")
    os.symlink(away, other.folder)
    small.delete("b")
    assert (away / f"{snapshot.id}.json").exists() and os.path.islink(other.folder)
    assert document["snapshots"]


def test_damaged_note_of_a_backup(machines: Machines) -> None:
    """A note that names foreign images, or nothing, stops every verb with its name; it never leads to a merge."""
    machines.create()
    machine = registry.load("web")
    path = Path(machine.paths.folder, "backup.json")
    for content_ in ('{"disk-0": {"frozen": "/etc/x.vhd", "child": "/home/y.backup-1.avhd"}}', "[", '{"disk-0": 7}'):
        path.write_text(content_)
        with pytest.raises(VmmError, match="note of an interrupted backup is damaged"):
            manager.show("web")
