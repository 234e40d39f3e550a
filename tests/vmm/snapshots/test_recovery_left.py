# SPDX-License-Identifier: Apache-2.0
"""A machine all of whose processes were killed in the middle of something: every verb sees its newest images."""

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
from tests.vmm.snapshots.test_recovery import after_each_kill
from vmm.api.export_import.exporting import export
from vmm.model.errors import Refused, VmmError
from vmm.snapshots.steps import child_path, options_of_all
from vmm.store import registry
from vmm.store.backup_note import Stacked, child_name, has_note, write_note
from vmm.store.registry import Machine
from vmm.store.snapshots.journal import Apply, CreateLive, CreateOff, Pivot
from vmm.store.snapshots.store import holding, load_tree
from vmm.store.state import note_running, note_unclean

Left = Callable[[Machine, str], str]


def by_backup(machine: Machine, frozen: str) -> str:
    """A backup whose children take the writes."""
    child = child_name(frozen)
    write_note(machine.paths, {"disk-0": Stacked(frozen, child)})
    vhdkit.create_child(child, frozen, options=options_of_all(machine.spec))
    return child


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
    """A machine left so, with what the guest wrote last: (frozen image, newest image, the hash of the disk)."""
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
    """The hash of a disk."""
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
    "backup": lambda here: manager.backup("web", str(here / "copy")),
    "export": lambda here: export("web", str(here / "out")),
    "snapshot create": lambda here: manager.snapshots("web").create("s"),
    "snapshot tree": lambda here: manager.snapshots("web").tree(),
    "snapshot limit": lambda here: manager.snapshots("web").set_limit(3),
    "snapshot merges": lambda here: manager.snapshots("web").merges_due(),
    "snapshot size": lambda here: manager.snapshots("web").size_of_now(),
}


def new_image(here: Path) -> Path:
    """One that no machine has."""
    path = here / "new.vhd"
    vhdkit.create_image(path, DISK_BYTES)
    return path


@pytest.mark.parametrize("left", [by_backup, by_create])
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_settles_first(machines: Machines, verb: str, left: Left) -> None:
    """Whichever verb comes next finds the image that the guest wrote to last, and nothing is left to settle."""
    _, newest, expected = cut(machines, left)
    VERBS[verb](machines.folder)
    machine = registry.load("web")
    tree = load_tree(machine.paths)
    assert tree.journal is None and not has_note(machine.paths)
    assert newest in vhdkit.chain_paths(str(machine.spec.disks[0].path))
    assert tree.images[newest].ours and tree.images[newest].id == vhdkit.image_id(newest)
    with vhdkit.open_disk(str(machine.spec.disks[0].path)) as disk:
        assert hashlib.sha256(disk.read(0, DISK_BYTES)).hexdigest() == expected
    assert not list(Path(machine.paths.folder).rglob("*.part")), "no memory of a snapshot that is none is left"


def by_create_off(machine: Machine, frozen: str) -> str:
    """A snapshot of a machine that is off, whose new leaf was just made."""
    child, folder = child_path(frozen), f"{machine.paths.folder}/snaps/{uuid.uuid4()}"
    with holding(machine.paths, machine.name) as held:
        held.begin(CreateOff(folder, (Pivot("disk-0", frozen, child, "vhd"),)))
    vhdkit.create_child(child, frozen, options=options_of_all(machine.spec))
    return child


@pytest.mark.parametrize("left", [by_backup, by_create, by_create_off])
def test_a_golden_image_in_a_folder_of_its_own(machines: Machines, left: Left) -> None:
    """What was cut short is settled, too, where the disk's base lies in a folder that the disk allows: new leaves
    that hold something are the machine's disks, unused ones go, and merges get on."""
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


def test_a_backups_merge_is_finished_before_its_disk_is_opened(machines: Machines) -> None:
    """After everything was killed while a backup's image was merged away, the definition names an image that is still
    there when it was opened for writing, and the disk reads as before."""
    frozen, newest, expected = cut(machines, by_backup)
    ends = set()
    for _ in after_each_kill(machines, lambda: vhdkit.merge(newest, into=frozen)):
        leaf = str(manager.show("web").spec.disks[0].path)  # type: ignore[union-attr]
        with vhdkit.open_disk(leaf, writable=True):
            pass
        assert content(leaf) == expected
        assert all(os.path.exists(path) for path in load_tree(registry.load("web").paths).images)
        ends.add(leaf)
    assert ends == {frozen, newest}


@pytest.mark.parametrize("left", [by_backup, by_create])
def test_copies_are_of_the_newest(machines: Machines, left: Left) -> None:
    """Backup and export copy what was flushed last; a machine that died does not pass for one that was shut down."""
    _, _, expected = cut(machines, left)
    result = manager.backup("web", str(machines.folder / "copy"))
    assert content(machines.folder / "copy" / "disk-0.vhd") == expected and result.consistent is False
    export("web", str(machines.folder / "flat"), flat=True)
    assert content(machines.folder / "flat" / "disks" / "disk-0.vhd") == expected


@pytest.mark.parametrize("left", [by_backup, by_create])
def test_merged_again(machines: Machines, left: Left) -> None:
    """The next merge puts what was written last into the machine's own image, and only that is left."""
    frozen, newest, expected = cut(machines, left)
    assert manager.snapshots("web").merge() == 1
    assert registry.load("web").spec.disks[0].path == frozen and content(frozen) == expected
    assert not os.path.exists(newest) and machines.images() == {os.path.basename(frozen)}


@pytest.mark.parametrize("left", [by_backup, by_create])
def test_removed_is_the_newest_and_the_frozen_one_is_not_added(machines: Machines, left: Left) -> None:
    """`disk remove` names the newest image; adding the one below it is refused, and says why."""
    frozen, newest, _ = cut(machines, left)
    assert manager.remove_disk("web", "disk-0").path == newest
    for name in ("web", "other"):
        with pytest.raises(Refused, match="not the newest image"):
            if name == "web":
                manager.add_disk("web", vmm.DiskRequest(frozen))
            else:
                manager.create("other", disks=[vmm.DiskRequest(frozen)], memory_bytes=16 << 20)
    manager.add_disk("web", vmm.DiskRequest(newest))


def test_consistent_is_what_is_known(machines: Machines) -> None:
    """One that never ran is consistent, one that ran is not before its guest shut itself down; a snapshot knows."""
    small = machines.create()
    assert manager.backup("web", str(machines.folder / "1")).consistent is True
    assert small.create("clean").consistent is True
    note_unclean(registry.load("web").paths)
    assert manager.backup("web", str(machines.folder / "2")).consistent is False
    assert small.create("unclean").consistent is False
    small.apply("clean", discard_current=True)
    assert manager.backup("web", str(machines.folder / "3")).consistent is True
    small.apply("unclean", discard_current=True)
    assert manager.backup("web", str(machines.folder / "4")).consistent is False


def test_missing_newest_image_is_said(machines: Machines) -> None:
    """Where the image that the guest wrote to last is gone nothing goes back to the one below it in silence."""
    _, newest, _ = cut(machines, by_create)
    os.rename(newest, f"{newest}.elsewhere")
    for verb in ("show", "set", "backup", "snapshot create"):
        with pytest.raises(Refused, match=r"is missing.*put it back; vmm repair web"):
            VERBS[verb](machines.folder)
    os.rename(f"{newest}.elsewhere", newest)
    assert manager.show("web").spec.disks[0].path == newest  # type: ignore[union-attr]


@pytest.mark.parametrize("make", [lambda folder, one: CreateOff(folder, (one,)), lambda folder, one: Apply((one,))])
def test_what_holds_data_is_never_removed(machines: Machines, make: Callable[[str, Pivot], CreateOff | Apply]) -> None:
    """INV-PROVEN-OURS: a journal that calls an image new and unused removes it only when it is."""
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
            os.rename(precious, f"{precious}.kept")  # else the other one would be its sibling
            vhdkit.create_child(unused, frozen)
        with holding(machine.paths, "web") as held:
            held.begin(make(folder, Pivot("disk-0", frozen, child, "vhd")))
        manager.set("web", notes=child)
        assert os.path.exists(child) is stays and load_tree(machine.paths).journal is None


@pytest.mark.parametrize("kind", ["other id", "elsewhere", "link", "no child"])
def test_images_of_somebody_else_stay(machines: Machines, kind: str) -> None:
    """INV-PROVEN-OURS: a tree that calls a foreign image ours gets it neither removed nor merged away."""
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
    """INV-PROVEN-OURS: of a snapshot's folder only its own files go; what else lies there stays with the folder."""
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
    """A note that names images elsewhere, or nothing, stops every verb with its name; nothing is merged by it."""
    machines.create()
    machine = registry.load("web")
    path = Path(machine.paths.folder, "backup.json")
    for content_ in ('{"disk-0": {"frozen": "/etc/x.vhd", "child": "/home/y.backup-1.avhd"}}', "[", '{"disk-0": 7}'):
        path.write_text(content_)
        with pytest.raises(VmmError, match="note of an interrupted backup is damaged"):
            manager.show("web")
