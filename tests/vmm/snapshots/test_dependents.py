# SPDX-License-Identifier: Apache-2.0
"""What else needs a machine's images: a copy of its folder, and a machine that gets one during a merge."""

from __future__ import annotations

import os

import pytest

import vhdkit
from tests.vmm.snapshots.machines import Machines
from tests.vmm.store.test_copies import copied
from vmm.api.manager import DiskRequest, Manager
from vmm.model.errors import InUse, WrongState
from vmm.snapshots.background_merge import merge_files
from vmm.snapshots.dependents import judge
from vmm.snapshots.steps import begin_merge, child_path
from vmm.store import registry
from vmm.store.snapshots.deletion_plan import LayerMerge
from vmm.store.snapshots.journal import Backup, MergeOff, Pivot
from vmm.store.snapshots.store import holding, load_tree


def test_images_that_a_copy_names_are_kept(machines: Machines) -> None:
    """An image that the copy still names is neither removed nor merged by the original."""
    web = machines.create()
    web.create("one")
    copied()
    frozen = str(registry.load("copy").spec.disks[0].path)
    web.create("two")
    web.apply("one", discard_current=True)
    web.delete("two")
    assert os.path.exists(frozen) and frozen in load_tree(registry.load("web").paths).images
    with pytest.raises(WrongState, match="only machine with its id"):
        Manager().new_id("web")
    Manager().new_id("copy")
    web.merge()
    assert not os.path.exists(frozen)


def due() -> tuple[LayerMerge, registry.Machine]:
    """The merge that is due."""
    machine = registry.load("web")
    [merge] = judge(machine, load_tree(machine.paths)).merges
    return merge, machine


def with_hidden_image(machines: Machines) -> None:
    """A machine whose snapshot was deleted: base <- hidden <- now; and another machine."""
    web = machines.create()
    web.create("one")
    machines.write("web", 8192, b"hidden" * 100)
    web.create("two")
    with holding(registry.load("web").paths, "web") as held:
        held.tree.remove([held.tree.find("one")])
        held.save()
    machines.create("other")


def test_an_image_that_is_being_merged_is_refused(machines: Machines) -> None:
    """INV-REMOVED-UNUSED: another machine cannot get an image that a merge is about to change or remove, even for
    reading."""
    with_hidden_image(machines)
    merge, machine = due()
    refused = []

    def meanwhile(done: int, total: int) -> None:
        for path in (merge.target, *merge.layers):
            with pytest.raises(InUse, match="is being merged by the machine web"):
                Manager().add_disk("other", DiskRequest(path, read_only=True))
            refused.append(path)

    with holding(machine.paths, "web") as held:
        merge_files(held, merge, meanwhile)
    assert set(refused) == {merge.target, *merge.layers}
    Manager().add_disk("other", DiskRequest(merge.target, read_only=True))


def test_an_image_of_a_backup_is_not_given_to_another_machine(machines: Machines) -> None:
    """INV-REMOVED-UNUSED: while a backup's journal exists, another machine is refused what will be merged, for reading
    as well.
    """
    machines.create()
    machines.create("other")
    machine = registry.load("web")
    frozen = str(machine.spec.disks[0].path)
    pivot = Pivot("disk-0", frozen, child_path(frozen), "vhd")
    vhdkit.create_child(pivot.child, frozen)
    with holding(machine.paths, "web") as held:
        held.begin(Backup((pivot,), pivoted=True))
    for path in (pivot.frozen, pivot.child):
        with pytest.raises(InUse, match="is being merged by the machine web"):
            Manager().add_disk("other", DiskRequest(path, read_only=True))


def test_an_image_that_another_machine_got_is_not_merged(machines: Machines) -> None:
    """INV-REMOVED-UNUSED: no merge begins of an image that another machine got after the merge was planned."""
    with_hidden_image(machines)
    merge, machine = due()
    Manager().add_disk("other", DiskRequest(merge.layers[0], read_only=True))
    with holding(machine.paths, "web") as held, pytest.raises(InUse, match="the machine other uses it"):
        begin_merge(held, MergeOff(merge.target, merge.layers))
    assert load_tree(machine.paths).journal is None
    assert not judge(machine, load_tree(machine.paths)).merges
