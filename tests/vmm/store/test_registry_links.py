# SPDX-License-Identifier: Apache-2.0
"""Files that are given as symbolic links: resolved once, when they are given; those recorded by 0.1.0, when they are
read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import vhdkit
import vmm
from tests.support import ROOT
from tests.vmm.snapshots.machines import Machines
from vmm.model.errors import hint_of_vhdkit
from vmm.store import registry
from vmm.store.snapshots.store import load_tree, tree_path


@pytest.fixture
def linked(machines: Machines) -> Path:
    """A link to an image in another folder."""
    (machines.folder / "store").mkdir()
    (machines.folder / "links").mkdir()
    machines.disk("store/a.vhd")
    link = machines.folder / "links" / "a.vhd"
    link.symlink_to("../store/a.vhd")
    return link


def write_links(machines: Machines, name: str, names: dict[Path, Path]) -> None:
    """Make all records of a machine name the links, as 0.1.0 did."""
    machine = registry.load(name)
    for path in (machine.paths.definition, tree_path(machine.paths)):
        if Path(path).exists():
            text = Path(path).read_text()
            for real, link in names.items():
                text = text.replace(f'"{real}"', f'"{link}"')
            Path(path).write_text(text)


def test_links_are_resolved_when_they_are_given(machines: Machines, linked: Path) -> None:
    """Disks, ISO images, kernel, initrd, parents' folders and folders are stored with their real paths."""
    for name in ("k", "i", "x.iso"):
        (machines.folder / "store" / name).write_bytes(b"x" * 4096)
        (machines.folder / "links" / name).symlink_to(machines.folder / "store" / name)
    (machines.folder / "way").symlink_to(machines.folder / "store")
    links, store, manager = machines.folder / "links", machines.folder / "store", vmm.Manager()
    manager.create(
        "web", disks=[vmm.DiskRequest(str(linked), parent_dirs=(str(machines.folder / "way"),))],
        kernel=str(links / "k"),
        paths={"disks": str(machines.folder / "way")},
    )  # fmt: skip
    manager.set("web", initrd=str(links / "i"), paths={"snapshots": str(machines.folder / "way")})
    manager.add_disk("web", vmm.DiskRequest(str(links / "x.iso"), kind="iso"))
    text = Path(registry.load("web").paths.definition).read_text()
    assert "links" not in text and "way" not in text
    spec = registry.load("web").spec
    assert [disk.path for disk in spec.disks] == [str(store / "a.vhd"), str(store / "x.iso")]
    assert (spec.kernel, spec.initrd, spec.paths.snapshots) == (str(store / "k"), str(store / "i"), str(store))
    with pytest.raises(vmm.InvalidSpec, match="not a folder"):
        manager.set("web", paths={"disks": str(machines.folder / "nowhere")})
    assert manager.remove_disk("web", str(links / "x.iso")).kind == "iso"  # by either of its names


@pytest.mark.parametrize("is_old", [False, True])
def test_snapshots_of_a_linked_disk(machines: Machines, linked: Path, is_old: bool) -> None:
    """The new leaf lies beside the image, where it finds its parent; all verbs work from there."""
    web = machines.create("web", [linked])
    real = machines.folder / "store" / "a.vhd"
    if is_old:
        write_links(machines, "web", {real: linked})
        assert str(linked) in Path(registry.load("web").paths.definition).read_text()
    before = machines.now("web")
    web.create("a")
    if is_old:
        write_links(machines, "web", {real: linked})
        assert str(linked) in Path(tree_path(registry.load("web").paths)).read_text()
    (leaf,) = [disk.path for disk in registry.load("web").spec.disks]
    assert leaf is not None and Path(leaf).parent == machines.folder / "store"
    vhdkit.open_disk(leaf, writable=True).close()  # by the default rules, as with the disk server
    assert list((machines.folder / "links").iterdir()) == [linked]
    tree = load_tree(registry.load("web").paths)
    assert set(tree.images) == {str(real), leaf} and tree.images[leaf].parent == str(real)
    machines.write("web", 4096, b"now" * 512)
    web.apply("a", discard_current=True)
    assert machines.now("web") == before
    web.delete("a")
    machines.merge("web")
    assert [disk.path for disk in registry.load("web").spec.disks] == [str(real)] and machines.now("web") == before
    assert vmm.Manager().delete("web", with_disks=True).disks == (str(real),) and not real.exists()


def test_no_image_is_listed_as_removed_and_kept(machines: Machines, linked: Path) -> None:
    """Removed and kept images of a deletion never overlap, whatever names a file has."""
    web = machines.create("web", [linked])
    web.create("a")
    real = machines.folder / "store" / "a.vhd"
    write_links(machines, "web", {real: linked})
    (leaf,) = [disk.path for disk in registry.load("web").spec.disks]
    manager = vmm.Manager()
    manager.create("other", disks=[vmm.DiskRequest(str(linked), read_only=True)])
    for with_disks in (False, True):
        plan = manager.plan_delete("web", with_disks=with_disks, with_snapshots=True)
        kept = {str(Path(one.path).resolve()) for one in plan.kept}
        assert not kept & {str(Path(path).resolve()) for path in plan.disks}
        assert str(real) not in plan.disks
    assert plan.disks == (leaf,)
    with vhdkit.open_disk(str(leaf), writable=True):  # another machine uses it
        plan = manager.plan_delete("web", with_disks=True, with_snapshots=True)
        assert plan.disks == () and [one.path for one in plan.kept] == [leaf]


def test_a_home_behind_a_link(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home that is reached through a link works like any other; its machines do not count as links."""
    (machines.folder / "home").mkdir(0o700)
    (machines.folder / "way").symlink_to(machines.folder / "home")
    monkeypatch.setenv("VMM_HOME", str(machines.folder / "way"))
    web = machines.create("web")
    folder = machines.folder / "home" / "machines" / "web"
    assert registry.load("web").paths.folder == str(folder) and not folder.is_symlink()
    web.create("a")
    vmm.Manager().set("web", name="www")
    assert vmm.Manager().names() == ["www"] and machines.states("www")
    vmm.Manager().delete("www", with_disks=True, with_snapshots=True)
    assert list(folder.parent.iterdir()) == []


def test_a_saved_state_of_a_linked_disk(machines: Machines, linked: Path) -> None:
    """Memory that was saved with the link on record still belongs to the machine, also when 0.1.0 saved it, which did
    not record sector sizes; memory of other sectors does not."""
    from vmm.store import saved

    machines.create("web", [linked])
    spec = registry.load("web").spec
    document: dict[str, Any] = json.loads(spec.to_json())
    document["disks"][0]["path"] = str(linked)
    description = saved.Description("7.2.0", "tcg", True, 0, document, 1.0)
    assert saved._definition_problem(description, spec) is None
    for name in ("sector_bytes", "physical_sector_bytes"):
        assert document["disks"][0].pop(name) == 512
    assert saved._definition_problem(description, spec) is None
    document["disks"][0]["physical_sector_bytes"] = 4096
    assert saved._definition_problem(description, spec) == "its disks were changed"
    del document["disks"][0]["physical_sector_bytes"]
    document["disks"][0]["path"] = str(machines.folder / "other.vhd")
    assert saved._definition_problem(description, spec) == "its disks were changed"


def test_hints_name_options_of_vmm() -> None:
    """Hints of vhdkit are passed on in vmm's words, or left out if they name an option that only vhdkit has."""
    assert hint_of_vhdkit("if you trust it, add --allow-parent-dir '/a b'") == (
        "if you trust it, add the disk as IMAGE,parent-dir='/a b' "
        "(first: vmm disk remove, if the machine already has it)"
    )
    assert "allow-raw-parent" in str(hint_of_vhdkit("if you trust it, add --allow-raw-parent"))
    assert hint_of_vhdkit("repair it (`vhdkit check --repair`)") == "repair it (`vhdkit check --repair`)"
    assert hint_of_vhdkit("if it is a raw disk, add --format raw") is None
    packed = "unpack it first: gunzip -k 'a disk.gz'"
    assert hint_of_vhdkit(f"{packed}; if it is a raw disk that only begins like one, add --format raw") == packed
    assert hint_of_vhdkit("move it away") == "move it away" and hint_of_vhdkit(None) is None
    found = 0
    for path in (ROOT / "vhdkit").rglob("*.py"):
        for hint in re.findall(r'hint=f?"([^"]*--[^"]*)"', path.read_text()):
            words = hint_of_vhdkit(hint)
            found += 1
            named = set(re.findall(r"--[a-z][a-z-]*", words or ""))
            assert "vhdkit " in str(words) or "vmm " in str(words) or named <= {"--shrink"}, hint
    assert found > 10
