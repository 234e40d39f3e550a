# SPDX-License-Identifier: Apache-2.0
"""Snapshots of machines that are off: taken, applied, deleted, merged; and what is refused."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import vhdkit
import vmm
from tests.support import daily_or_nightly
from tests.vmm.snapshots.machines import DISK_BYTES, Machines, each_kind, each_kind_nightly
from vmm.model.errors import AlreadyExists, InUse, InvalidSpec, NotFound, Refused, WrongState
from vmm.model.spec import DiskSpec
from vmm.store import registry
from vmm.store.snapshots.tree import read_tree


@each_kind
def test_create_apply_and_branch(machines: Machines) -> None:
    """Applying a snapshot discards later writes, the snapshot stays, and the next one begins a branch."""
    web = machines.create(disks=2)
    first = web.create("first", notes="clean")
    at_first = machines.now("web")
    machines.write("web", 4096, b"second" * 100)
    second = web.create("second")
    at_second = machines.now("web")
    machines.write("web", 4096, b"lost" * 100)
    applied = web.apply("first", discard_current=True)
    assert applied.state == "off" and len(applied.tidied.removed) == 2
    assert machines.now("web") == at_first
    third = web.create("third")
    tree = web.tree()
    assert [one.name for one in tree.children(first.id)] == ["second", "third"] and tree.now == third.id
    assert machines.of_snapshot("web", second.id) == at_second
    assert machines.of_snapshot("web", "first") == at_first and web.find(first.id[:6]).notes == "clean"
    web.apply("second", discard_current=True)
    assert machines.now("web") == at_second


def test_applying_restores_the_configuration(machines: Machines) -> None:
    """Memory, processors and disks are the snapshot's again; name, id and folders stay those of the machine."""
    web = machines.create(disks=1)
    web.create("small")
    manager = vmm.Manager()
    manager.set("web", cpu_count=4, notes="more")
    added = manager.add_disk("web", vmm.DiskRequest(str(machines.disk("more.vhd"))))
    with registry.changing("web") as machine:
        registry.rename(machine, machine.spec.changed(name="site"))
    site = manager.snapshots("site")
    site.create("large")
    site.apply("small", discard_current=True)
    spec = manager.show("site").spec
    assert spec is not None and (spec.cpu_count, spec.name, len(spec.disks), spec.notes) == (1, "site", 1, "")
    assert (machines.folder / "more.vhd").exists()
    site.apply("large", discard_current=True)
    spec = manager.show("site").spec
    assert spec is not None and spec.cpu_count == 4 and spec.disk(added.id) is not None


@each_kind
def test_delete_in_every_position(machines: Machines) -> None:
    """The image of a leaf is removed at once; one with one child is merged when off; one with two stays hidden until
    one of them is deleted."""
    web = machines.create()
    for name in ("a", "b", "c"):
        web.create(name)
        machines.write("web", 4096, name.encode() * 512)
    web.apply("b", discard_current=True)
    machines.write("web", 8192, b"branch" * 80)
    states = machines.states("web")
    ids = {one.name: one.id for one in web.tree().snapshots.values()}
    deleted = web.delete("b")
    assert deleted.tidied.merges == 0 and len(deleted.tidied.kept) == 1 == len(web.hidden())
    assert web.tree().find("c").parent == ids["a"] == web.tree().now
    del states[ids["b"]]
    assert machines.states("web") == states
    before = machines.images()
    deleted = web.delete("c")  # a leaf: its own image is removed, and then b's has one child
    web.merge()
    del states[ids["c"]]
    assert machines.states("web") == states and len(machines.images()) < len(before)
    web.delete("a")
    web.merge()
    del states[ids["a"]]
    assert machines.states("web") == states and machines.images() == {f"web-0.{machines.kind}"}
    assert not web.tree().images


@each_kind_nightly
def test_delete_subtree(machines: Machines) -> None:
    """A snapshot and all its descendants are deleted, the present state stays."""
    web = machines.create(disks=2)
    for name in ("a", "b", "c"):
        web.create(name)
        machines.write("web", 4096, name.encode() * 512)
    now = machines.now("web")
    assert [one.name for one in web.delete("b", subtree=True).snapshots] == ["b", "c"]
    web.merge()
    assert [one.name for one in web.tree().snapshots.values()] == ["a"] and machines.now("web") == now
    assert len(machines.images()) == 4


@pytest.mark.parametrize(
    ("machines", "seed"),
    [("vhd", seed) for seed in range(daily_or_nightly(4, 8))]
    + [("vhdx", seed) for seed in range(daily_or_nightly(1, 8))],
    indirect=["machines"],
)
def test_random_histories_keep_every_disk(machines: Machines, seed: int) -> None:
    """Whatever is done in whichever order, every snapshot and the present state read as before."""
    choose = random.Random(seed)
    web = machines.create(disks=2)
    states = machines.states("web")
    for step in range(14):
        snapshots = list(web.tree().snapshots.values())
        verb = choose.choice(["create", "create", "write", "apply", "delete", "subtree", "merge"])
        if verb == "create" or not snapshots:
            made = web.create()
            states[made.id] = states[None]
        elif verb == "write":
            machines.write("web", choose.randrange(0, 1 << 20, 4096), bytes([step + 1]) * 4096)
            states[None] = machines.now("web")
        elif verb == "apply":
            one = choose.choice(snapshots)
            web.apply(one.id, discard_current=True)
            states[None] = states[one.id]
        elif verb in ("delete", "subtree"):
            for gone in web.delete(choose.choice(snapshots).id, subtree=verb == "subtree").snapshots:
                del states[gone.id]
        else:
            web.merge()
        assert machines.states("web") == states, verb
    web.merge()
    assert machines.states("web") == states and web.merges_due() == 0


@each_kind_nightly
def test_linked_clones_keep_their_base(machines: Machines) -> None:
    """Machines on children of one base: whatever one does, the base and the other's disk stay as they are."""
    base = machines.disk(f"base.{machines.kind}")
    leaves = [machines.folder / f"{name}.a{machines.kind}" for name in ("one", "two")]
    vhdkit.clone(base, leaves)
    one = machines.create("one", leaves[:1])
    machines.create("two", leaves[1:])
    content, two = base.read_bytes(), machines.now("two")
    one.create("a")
    machines.write("one", 4096, b"one" * 99)
    now = machines.now("one")
    one.delete("a")
    one.merge()
    assert machines.now("one") == now and machines.now("two") == two and base.read_bytes() == content
    assert machines.images() == {base.name, *(path.name for path in leaves)}


@each_kind_nightly
def test_a_clone_of_a_snapshot_keeps_its_image(machines: Machines) -> None:
    """If another machine, or another program, made an image on a snapshot's image, that is not merged or removed."""
    web = machines.create()
    web.create("a")
    machines.write("web", 4096, b"x" * 512)
    b = web.create("b")
    image = b.disks["disk-0"]
    clone = machines.folder / f"clone.a{machines.kind}"
    vhdkit.clone(image, [clone])
    machines.create("other", [clone])
    machines.write("other", 8192, b"other" * 50)
    other, now = machines.now("other"), machines.now("web")
    for name in ("a", "b"):
        web.delete(name)
    web.merge()
    assert machines.now("other") == other and machines.now("web") == now
    assert Path(image).exists() and web.hidden()


def test_snapshots_of_a_raw_disk_are_merged_into_it(machines: Machines) -> None:
    """A raw image can be frozen, and the last merge restores the raw image, as a raw one."""
    raw = machines.folder / "disk.raw"
    raw.write_bytes(bytes(1 << 20))
    web = machines.create(disks=[raw])
    web.create("a")
    spec = vmm.Manager().show("web").spec
    assert spec is not None and spec.disks[0].format == "vhd"
    machines.write("web", 0, b"conectix" * 64)
    now = machines.now("web")
    web.delete("a")
    web.merge()
    spec = vmm.Manager().show("web").spec
    assert spec is not None and (spec.disks[0].path, spec.disks[0].format) == (str(raw), "raw")
    assert machines.now("web") == now and raw.read_bytes().startswith(b"conectix")


def test_refused_snapshot_verbs(machines: Machines) -> None:
    """Each is refused with its reason, and nothing changes."""
    web = machines.create()
    with pytest.raises(NotFound, match="has no snapshots"):
        web.find("x")
    a = web.create("a")
    with pytest.raises(NotFound, match="no snapshot 'nope'"):
        web.apply("nope", discard_current=True)
    with pytest.raises(AlreadyExists):
        web.create("a")
    for bad in ("", " a", "a\n", "x" * 200):
        with pytest.raises(InvalidSpec):
            web.create(bad)
    with pytest.raises(Refused, match="would be lost"):
        web.apply("a")
    with pytest.raises(WrongState, match="does not run"):
        web.create("b", consistent=True)
    with pytest.raises(InvalidSpec, match="unknown mode"):
        web.create("b", mode="magic")
    with pytest.raises(InvalidSpec):
        web.set_limit(0)
    with pytest.raises(WrongState, match="has no memory"):
        web.forget_memory("a")
    with pytest.raises(WrongState):
        web.merge_live()
    with pytest.raises(NotFound, match="does not exist"):
        vmm.Manager().snapshots("unknown")
    web.set_limit(1)
    with pytest.raises(Refused, match="its limit is 1"):
        web.create("b")
    assert list(web.tree().snapshots) == [a.id] and len(machines.images()) == 2


def test_a_missing_image_is_named(machines: Machines) -> None:
    """A snapshot whose image was removed is not applied, and the error names the file."""
    web = machines.create()
    a = web.create("a")
    now = vmm.Manager().show("web").spec
    Path(a.disks["disk-0"]).rename(machines.folder / "gone")
    with pytest.raises(Refused, match=r"web-0\.vhd"):
        web.apply("a", discard_current=True)
    assert vmm.Manager().show("web").spec == now


def test_an_image_in_use_is_not_frozen(machines: Machines) -> None:
    """A disk that another program writes to is refused, and nothing is made."""
    web = machines.create(disks=2)
    with vhdkit.open_disk(machines.folder / "web-1.vhd", writable=True), pytest.raises(InUse):
        web.create("a")
    assert not web.tree().snapshots and machines.images() == {"web-0.vhd", "web-1.vhd"}


def test_names_and_notes(machines: Machines) -> None:
    """Names and notes can be changed; the default name is the time, and names are unique."""
    web = machines.create()
    first, second = web.create(), web.create()
    assert first.name != second.name
    web.rename(first.id, "first")
    web.annotate("first", "before all")
    assert web.find("first").notes == "before all"
    with pytest.raises(AlreadyExists):
        web.rename(second.id, "first")
    web.rename("first", "first")


def test_a_damaged_tree_stops_everything(machines: Machines) -> None:
    """If the tree cannot be read, nothing is guessed or removed, and the machine does not start."""
    web = machines.create()
    web.create("a")
    home = machines.folder / "home" / "machines" / "web"
    (home / "snapshots.json").write_text('{"schema_version": 1}')
    for verb in (web.create, lambda: web.delete("a"), web.merge, lambda: vmm.Manager().start("web")):
        with pytest.raises(vmm.VmmError, match="damaged"):
            verb()
    assert len(machines.images()) == 2


@each_kind
def test_a_machine_is_deleted_with_its_snapshots(machines: Machines) -> None:
    """Deleting a machine with snapshots requires an option; then nothing of them is left, and the user's images
    stay."""
    web = machines.create()
    web.create("a")
    with pytest.raises(WrongState, match="snapshots"):
        vmm.Manager().delete("web")
    folder = Path(folder_of_the_only(web))
    vmm.Manager().delete("web", with_snapshots=True)
    assert not folder.exists()
    assert len(machines.images()) == 2, "the machine's last writes are lost"
    other = machines.create("other")
    other.create("a")
    vmm.Manager().delete("other", with_snapshots=True, with_disks=True)
    assert not any(name.startswith("other") for name in machines.images())


def folder_of_the_only(snapshots: vmm.MachineSnapshots) -> str:
    """The folder of the machine's only snapshot."""
    [one] = snapshots.tree().snapshots.values()
    return one.folder


def test_a_stored_tree_reads_back(machines: Machines) -> None:
    """A stored tree reads back unchanged, whatever the machine's name is."""
    web = machines.create(disks=2)
    web.create("a")
    tree = web.tree()
    assert read_tree(tree.to_json(), "x") == tree


def test_passed_through_disks_have_no_snapshots(machines: Machines) -> None:
    """A machine with a device of the host is refused, because no layer of ours could keep the device's content."""
    web = machines.create()
    device = DiskSpec(id="disk-9", kind="pass-through", path="/dev/null", controller="scsi")
    with registry.changing("web") as machine:
        registry.save(machine, machine.spec.changed(disks=[*machine.spec.disks, device]))
    with pytest.raises(Refused, match="passed-through"):
        web.create()
    assert not web.tree().snapshots and machines.images() == {"web-0.vhd"}


def test_a_guest_that_writes_a_footer_into_its_raw_disk(machines: Machines) -> None:
    """With a VHD footer at its end a raw disk stays raw: it can be frozen, restored and merged as before."""
    path = machines.folder / "raw.img"
    vhdkit.create_image(machines.folder / "fixed.vhd", DISK_BYTES, disk_format=vhdkit.DiskFormat.FIXED)
    path.write_bytes(bytes(DISK_BYTES))
    web = machines.create("web", [path])
    with path.open("r+b") as file:
        file.seek(DISK_BYTES - 512)
        file.write((machines.folder / "fixed.vhd").read_bytes()[-512:])
    web.create("one")
    machines.write("web", 4096, b"later" * 100)
    before = machines.states("web")
    web.apply("one", discard_current=True)
    assert machines.now("web") == before[web.find("one").id]
    web.delete("one")
    machines.merge("web")
    assert path.read_bytes()[:4096] == bytes(4096)


@pytest.mark.parametrize("kind", ["raw", "fixed"])
def test_a_guest_that_writes_a_vhdx_into_its_disk(machines: Machines, kind: str) -> None:
    """With the beginning of a VHDX in its first sector, a raw disk or a fixed VHD stays what it was."""
    path = machines.folder / ("disk.raw" if kind == "raw" else "disk.vhd")
    vhdkit.create_image(path, DISK_BYTES, disk_format=vhdkit.DiskFormat(kind))
    web = machines.create("web", [path])
    with path.open("r+b") as file:
        file.write(b"vhdxfile")
    web.create("one")
    machines.write("web", 0, b"vhdxfile")
    machines.write("web", 4096, b"later" * 100)
    web.create("two")
    before = machines.states("web")
    web.apply("one", discard_current=True)
    before[None] = before[web.find("one").id]
    assert machines.states("web") == before
    machines.write("web", 8192, b"now" * 100)
    now = machines.now("web")
    for name in ("two", "one"):
        web.delete(name)
    machines.merge("web")
    [disk] = registry.load("web").spec.disks
    assert (disk.path, disk.format) == (str(path), "raw" if kind == "raw" else "vhd") and machines.now("web") == now
    assert path.read_bytes().startswith(b"vhdxfile")
