# SPDX-License-Identifier: Apache-2.0
"""Machines whose definition lost track of their newest image, as with vmm 0.1.0: it is found, shown and adopted."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

import vhdkit
import vmm
from tests.vmm.cli.running import document, good, run
from tests.vmm.snapshots.machines import Machines, each_kind, each_kind_nightly
from vmm.api.export_import.exporting import export
from vmm.model.errors import NotFound, Refused, VmmError, store_error
from vmm.snapshots.steps import child_path
from vmm.store import registry
from vmm.store.snapshots.journal import CreateLive, Pivot
from vmm.store.snapshots.store import holding, load_tree

manager = vmm.Manager()


def leaf_of() -> str:
    """The image that the definition names."""
    return str(registry.load("web").spec.disks[0].path)


def name_in_definition(path: str) -> None:
    """Name another image in the definition, as after a kill of 0.1.0."""
    definition = Path(registry.load("web").paths.definition)
    document = json.loads(definition.read_text())
    document["disks"][0]["path"] = path
    definition.write_text(json.dumps(document))


def orphaned(machines: Machines, *, known: bool = False) -> tuple[str, str, dict[str, str]]:
    """A machine whose definition names the image that its snapshot froze: (that image, the newest, the expected
    content)."""
    machines.create().create("a")
    newest = leaf_of()
    machines.write("web", 8192, b"written last" * 40)
    expected = machines.now("web")
    frozen = vhdkit.chain_paths(newest)[1]
    name_in_definition(frozen)
    if not known:
        tree_path = Path(registry.load("web").paths.folder, "snapshots.json")
        document = json.loads(tree_path.read_text())
        del document["images"][newest]
        tree_path.write_text(json.dumps(document))
    return frozen, newest, expected


@each_kind
@pytest.mark.parametrize("known", [False, True])
def test_the_newest_image_is_adopted(machines: Machines, known: bool) -> None:
    """The image on top of the one that the definition names is shown first, then adopted; no state changes."""
    frozen, newest, expected = orphaned(machines, known=known)
    kept = machines.of_snapshot("web", "a")
    before = machines.images()
    [step] = manager.repair("web", dry_run=True)
    assert (step.kind, step.path, step.chain) == ("adopt", frozen, (frozen, newest)) and leaf_of() == frozen
    assert manager.repair("web") == [step]
    assert leaf_of() == newest and machines.now("web") == expected and machines.images() == before
    assert machines.of_snapshot("web", "a") == kept and load_tree(registry.load("web").paths).images[newest].ours
    assert manager.repair("web") == []
    manager.snapshots("web").delete("a")
    manager.snapshots("web").merge()
    assert machines.now("web") == expected and machines.images() == {f"web-0.{machines.kind}"}


@each_kind_nightly
def test_two_candidates_are_not_guessed_at(machines: Machines) -> None:
    """If there are two newest images, nothing is done before the user names one."""
    frozen, newest, expected = orphaned(machines)
    other = child_path(frozen, load_tree(registry.load("web").paths).images[frozen].format)
    vhdkit.create_child(other, frozen)
    [step] = manager.repair("web")
    assert step.remedy is None and newest in step.problem and other in step.problem and leaf_of() == frozen
    with pytest.raises(NotFound, match="not one of the newest"):
        manager.repair("web", leaf=frozen)
    manager.repair("web", leaf=newest)
    assert leaf_of() == newest and machines.now("web") == expected and os.path.exists(other)


def test_images_of_others_are_not_adopted(machines: Machines) -> None:
    """An image of another machine, or one that no machine names, is not adopted automatically."""
    machines.create()
    base = leaf_of()
    clone = machines.folder / "clone.avhd"
    vhdkit.create_child(clone, base)
    [step] = manager.repair("web")
    assert step.remedy is None and str(clone) in str(step.hint) and leaf_of() == base
    vmm.Manager().create("other", disks=[vmm.DiskRequest(str(clone))], memory_bytes=16 << 20)
    assert manager.repair("web") == []
    with pytest.raises(NotFound):
        manager.repair("web", leaf=str(clone))


@each_kind_nightly
def test_a_kept_image_gets_a_new_leaf(machines: Machines) -> None:
    """If the definition names an image that a snapshot keeps, with nothing on top, it gets a new leaf; the snapshot
    stays."""
    frozen, newest, _ = orphaned(machines)
    os.unlink(newest)
    kept = machines.of_snapshot("web", "a")
    [step] = manager.repair("web")
    assert step.kind == "new leaf" and leaf_of() != frozen
    machines.write("web", 0, b"new" * 100)
    assert machines.of_snapshot("web", "a") == kept


@each_kind_nightly
def test_a_missing_image_is_given_up_only_when_asked(machines: Machines) -> None:
    """The error names a missing newest image; only --give-up-missing continues from the one below it."""
    machines.create().create("a")
    kept, newest = machines.of_snapshot("web", "a"), leaf_of()
    (machines.folder / "away").mkdir()
    os.rename(newest, machines.folder / "away" / os.path.basename(newest))
    [step] = manager.repair("web")
    assert step.remedy is None and step.path == newest and "--give-up-missing" in str(step.hint)
    assert leaf_of() == newest
    [step] = manager.repair("web", give_up_missing=True)
    assert step.kind == "give up" and leaf_of() != newest and machines.now("web") == kept
    machines.write("web", 0, b"new" * 100)
    assert machines.of_snapshot("web", "a") == kept


def test_an_interrupted_snapshot_that_cannot_be_finished(machines: Machines) -> None:
    """After an interrupted live snapshot whose newest image is lost, every command but this one is refused."""
    machines.create()
    frozen = leaf_of()
    with holding(registry.load("web").paths, "web") as held:
        one = Pivot("disk-0", frozen, child_path(frozen), "vhd")
        held.begin(CreateLive(f"{machines.folder}/snaps/{uuid.uuid4()}", (one,), pivoted=True))
    with pytest.raises(Refused, match="vmm repair web"):
        manager.show("web")
    assert [step.kind for step in manager.repair("web", dry_run=True)] == ["operation", "give up"]
    with pytest.raises(Refused, match="is missing"):
        manager.repair("web")
    manager.repair("web", give_up_missing=True)
    assert manager.show("web").spec is not None and load_tree(registry.load("web").paths).journal is None


OLDER: dict[str, Callable[[Machines], object]] = {
    "snapshot create": lambda machines: manager.snapshots("web").create("b"),
    "backup": lambda machines: manager.save_night("web", str(machines.folder / "copy")),
    "export": lambda machines: export("web", str(machines.folder / "out")),
    "flat export": lambda machines: export("web", str(machines.folder / "out"), flat=True),
}


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("verb", OLDER)
def test_an_older_image_is_not_taken_for_the_present_state(machines: Machines, verb: str, known: bool) -> None:
    """While a newer image exists on top of the one that the definition names, that is neither copied nor frozen
    again."""
    frozen, newest, expected = orphaned(machines, known=known)
    with pytest.raises(Refused, match="may have the latest writes") as refused:
        OLDER[verb](machines)
    assert newest in refused.value.problem and "vmm repair web" in str(refused.value.hint) and leaf_of() == frozen
    manager.repair("web")
    OLDER[verb](machines)
    assert machines.now("web") == expected


def test_a_newer_image_survives_deletions(machines: Machines) -> None:
    """INV-DELETE-RULE: images above the one that the definition names stay when snapshots are deleted and merged."""
    machines.create().create("a")
    frozen = vhdkit.chain_paths(leaf_of())[1]
    web = manager.snapshots("web")
    web.create("b")
    newest = leaf_of()
    machines.write("web", 8192, b"written last" * 40)
    expected = machines.now("web")
    name_in_definition(frozen)
    for name in ("a", "b"):
        web.delete(name)
        machines.merge("web")
    assert os.path.exists(newest) and "vmm repair" in web.hidden()[newest]
    manager.repair("web")
    assert leaf_of() == newest and machines.now("web") == expected
    machines.merge("web")
    assert machines.now("web") == expected and machines.images() == {f"web-0.{machines.kind}"}


def test_a_damaged_tree_can_be_moved_away(machines: Machines) -> None:
    """The way that the refusal names works: without the damaged list the newest image is found, and all are kept."""
    frozen, newest, expected = orphaned(machines, known=True)
    tree_path = Path(registry.load("web").paths.folder, "snapshots.json")
    tree_path.write_text('{"x":')
    before = machines.images()
    with pytest.raises(VmmError, match="is damaged") as damaged:
        manager.repair("web")
    assert "move it away" in str(damaged.value.hint) and "vmm repair" in str(damaged.value.hint)
    tree_path.rename(tree_path.with_suffix(".damaged"))
    manager.repair("web")
    assert leaf_of() == newest and machines.now("web") == expected and machines.images() == before
    assert frozen in vhdkit.chain_paths(newest)


def test_command_line(machines: Machines) -> None:
    """It shows the findings; without --yes and a terminal nothing is done."""
    frozen, newest, _ = orphaned(machines)
    assert f"{newest} becomes the disk" in good("repair", "web", "--dry-run") and leaf_of() == frozen
    result = run("repair", "web")
    assert result.exit_code == 2 and "--yes" in result.stderr and leaf_of() == frozen
    good("repair", "web", "--yes")
    assert leaf_of() == newest and "disks are in order" in good("repair", "web")
    assert document("repair", "web") == []


def test_hints_lead_to_repair(machines: Machines) -> None:
    """The error for the image below refers to `vmm repair`, and never advises moving or deleting the newest one."""
    frozen, _, _ = orphaned(machines)
    with pytest.raises(vhdkit.HasChildren) as refused:
        vhdkit.open_disk(frozen, writable=True)
    hints = [str(refused.value.hint), str(store_error(refused.value).hint)]
    assert not any(word in hint for hint in hints for word in ("move", "delete", "remove")), hints
    assert "vmm repair" in hints[1]
    with pytest.raises(VmmError) as caught:
        manager.add_disk("web", vmm.DiskRequest(frozen, controller="scsi"))
    assert not any(word in str(caught.value.hint) for word in ("move", "delete", "remove"))
