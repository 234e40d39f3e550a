# SPDX-License-Identifier: Apache-2.0
"""Every verb is killed at every change it makes to files: afterwards it is done or undone, and no state has
changed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vhdkit
from tests.harness.killing import killings
from tests.support import daily_or_nightly
from tests.vmm.snapshots.machines import Machines, each_kind, each_kind_nightly
from vmm.api.machine_snapshots import MachineSnapshots
from vmm.snapshots import background_merge as fold
from vmm.snapshots.recovery import settle
from vmm.store import registry
from vmm.store.snapshots.journal import MergeLive
from vmm.store.snapshots.store import holding, load_tree

States = dict[str | None, dict[str, str]]


def built(machines: Machines) -> tuple[MachineSnapshots, States]:
    """A tree with a branch: base <- a <- b <- now, and a <- c."""
    web = machines.create(disks=1 if machines.kind == "vhdx" else 2)
    for name in ("a", "c"):
        web.create(name)
        machines.write("web", 4096, name.encode() * 512)
    web.apply("a", discard_current=True)
    machines.write("web", 8192, b"now" * 512)
    web.create("b")
    machines.write("web", 12288, b"later" * 100)
    return web, machines.states("web")


def step_of(machines: Machines, everyday: int, with_vhdx: int) -> int:
    """Which of the changes are tried every day: fewer with VHDX, whose files are larger and change in more steps."""
    return daily_or_nightly(with_vhdx if machines.kind == "vhdx" else everyday, 1)


def settled(machines: Machines) -> None:
    """What the next command does first."""
    machine = registry.load("web")
    with holding(machine.paths, "web") as held:
        settle(held)
    assert load_tree(machine.paths).journal is None


def after_each_kill(machines: Machines, work: Callable[[], object], *, step: int = 1) -> Iterator[bool]:
    """Kill the work at each change of a file, and restore all files after each check. Yields True last, when it runs
    to its end."""
    backup = machines.folder.with_name(machines.folder.name + ".backup")
    shutil.copytree(machines.folder, backup, symlinks=True)
    try:
        for number in killings(work, step=step):
            yield number < 0
            _empty(machines.folder)
            shutil.copytree(backup, machines.folder, symlinks=True, dirs_exist_ok=True)
    finally:
        shutil.rmtree(backup)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def check_known(machines: Machines) -> None:
    """Every image in the folder is recorded somewhere."""
    tree = load_tree(registry.load("web").paths)
    spec = registry.load("web").spec
    paths = (*tree.images, *tree.frozen(), *(disk.path or "" for disk in spec.disks))
    assert machines.images() <= {os.path.basename(path) for path in paths}


@each_kind
def test_create_is_done_or_undone(machines: Machines) -> None:
    """A killed create leaves a complete snapshot or none; all other states read as before."""
    web, before = built(machines)
    whole = 0
    for ended in after_each_kill(machines, lambda: web.create("new"), step=step_of(machines, 4, 11)):
        settled(machines)
        after = machines.states("web")
        made = set(after) - set(before)
        whole += bool(made)
        assert len(made) <= 1 and all(after[one] == before[None] for one in made)
        assert {one: after[one] for one in before} == before
        assert bool(made) or not ended
        check_known(machines)
        web.create("again")
    assert whole > 1


@each_kind_nightly
def test_apply_is_done_or_undone(machines: Machines) -> None:
    """A killed apply leaves the present state as it was or as the snapshot's; the snapshots read as before."""
    web, before = built(machines)
    goal = web.find("c").id
    applied = 0
    for ended in after_each_kill(
        machines, lambda: web.apply("c", discard_current=True), step=step_of(machines, 2, 11)
    ):
        settled(machines)
        after = machines.states("web")
        assert after[None] in (before[None], before[goal])
        applied += after[None] == before[goal]
        assert after | {None: before[None]} == before
        assert web.tree().now == (goal if after[None] == before[goal] else web.find("b").id)
        assert after[None] == before[goal] or not ended
        machines.merge("web")
        check_known(machines)
    assert applied > 1


@each_kind_nightly
@pytest.mark.parametrize("subtree", [False, True])
def test_delete_is_done_or_undone(machines: Machines, subtree: bool) -> None:
    """A killed delete leaves the snapshot or removes it; no other state changes, and every image is still recorded."""
    web, before = built(machines)
    goal = web.find("c" if subtree else "a").id
    for _ in after_each_kill(machines, lambda: web.delete(goal, subtree=subtree), step=daily_or_nightly(2, 1)):
        settled(machines)
        after = machines.states("web")
        assert {one: after.get(one, before[one]) for one in before} == before and set(before) - set(after) <= {goal}
        machines.merge("web")
        check_known(machines)
        for one, disks in machines.states("web").items():
            assert before[one] == disks


@each_kind_nightly
def test_a_merge_continues_after_every_kill(machines: Machines) -> None:
    """A killed merge leaves every state as it was; the machine can be used at once, and the next merge finishes."""
    web, before = built(machines)
    for name in ("b", "c"):
        before.pop(web.delete(name).snapshots[0].id)
    machine = registry.load("web")
    assert web.merges_due()
    for _ in after_each_kill(
        machines, lambda: fold.Fold(machine.paths, machine.runtime).run(), step=step_of(machines, 5, 23)
    ):
        settled(machines)  # as a start does
        assert machines.states("web") == before
        machines.merge("web")
        assert machines.states("web") == before and web.merges_due() == 0
        assert not [one for one in os.listdir(machines.folder) if one.endswith(".vhdkit-merge")]
        check_known(machines)


@each_kind_nightly
def test_a_nearly_finished_merge_is_recorded_before_its_disk_is_opened(machines: Machines) -> None:
    """INV-DELETE-RULE: if a disk is opened for writing after a killed merge, as by a start, every snapshot stays
    readable: a merge below it that was nearly finished has been finished before, in the tree as well."""
    web, before = built(machines)
    before.pop(web.delete("b").snapshots[0].id)  # its image is in the middle, and the next one is merged into it
    machine = registry.load("web")
    finished = 0
    work, step = fold.Fold(machine.paths, machine.runtime).run, daily_or_nightly(3, 1)
    for _ in after_each_kill(machines, work, step=step):
        settled(machines)
        finished += web.merges_due() == 0
        for disk in registry.load("web").spec.disks:
            with vhdkit.open_disk(str(disk.path), writable=True):
                pass
        assert machines.states("web") == before
        check_known(machines)
    assert finished > 1


@each_kind_nightly
@pytest.mark.parametrize("layer_count", [1, 2])
def test_a_live_merge_is_finished_before_its_disk_is_opened(machines: Machines, layer_count: int) -> None:
    """INV-DELETE-RULE: after everything was killed in a live merge of the leaf, the definition names an image that
    still exists after it was opened for writing: the nearly finished merge has been finished before."""
    web, _ = built(machines)
    web.delete("b")
    disk = registry.load("web").spec.disks[0]
    chain = vhdkit.chain_paths(str(disk.path))
    layers, target = chain[:layer_count], chain[layer_count]
    if layer_count == 2:
        web.delete("c", subtree=True)
        web.delete("a")
    before = machines.states("web")
    with holding(registry.load("web").paths, "web") as held:
        held.begin(MergeLive(disk.id, target, tuple(layers)))
    for _ in after_each_kill(
        machines, lambda: vhdkit.merge(layers[0], into=target, relink_children=True), step=step_of(machines, 4, 19)
    ):
        settled(machines)
        for one in registry.load("web").spec.disks:
            with vhdkit.open_disk(str(one.path), writable=True):
                pass
        assert machines.states("web") == before
        assert all(os.path.exists(path) for path in load_tree(registry.load("web").paths).images)
        check_known(machines)


@each_kind_nightly
def test_writing_between_a_killed_merge_and_the_next(machines: Machines) -> None:
    """A guest may run and write after a merge was killed; the merge then preserves what it wrote."""
    web, before = built(machines)
    for name in ("b", "c"):
        before.pop(web.delete(name).snapshots[0].id)
    machine = registry.load("web")
    for _ in after_each_kill(
        machines, lambda: fold.Fold(machine.paths, machine.runtime).run(), step=step_of(machines, 7, 29)
    ):
        settled(machines)
        machines.write("web", 4096, b"after the kill" * 300)
        now = machines.now("web")
        machines.merge("web")
        assert machines.states("web") == before | {None: now}
