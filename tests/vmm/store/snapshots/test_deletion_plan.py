# SPDX-License-Identifier: Apache-2.0
"""The rule for deletions: its cases, and random histories against a naive model that keeps whole disks."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from vmm.store.snapshots.deletion_plan import LayerMerge, Plan, plan
from vmm.store.snapshots.kept import Kept
from vmm.store.snapshots.tree import Image, Snapshot, Tree

SECTORS = 6


def images(**parents: str | None) -> dict[str, Image]:
    """Images by name: name -> parent; "base" belongs to the user."""
    return {name: Image(parent, ours=name != "base") for name, parent in parents.items()}


def test_the_number_of_children_decides() -> None:
    """An image without children is removed, into one with one child that child is merged, one with two stays."""
    files = images(base=None, a="base", b="a", c="a", d="c", e="d", f="base")
    judged = plan(files, frozen=["base", "b"], live=["e"])
    assert judged == Plan(("f",), (LayerMerge("c", ("e", "d")),), {"a": "2 images stand on it"})


def test_a_branch_is_removed_children_first() -> None:
    """Images on which nothing that is needed depends are removed, beginning with the leaves."""
    files = images(base=None, a="base", b="a", c="b", d="base")
    assert plan(files, frozen=["base"], live=["d"]).unlink == ("c", "b", "a")


def test_the_first_image_is_merged_into_the_users_image() -> None:
    """When the snapshot of the user's image is deleted, its only child is merged into it."""
    assert plan(images(base=None, a="base"), frozen=[], live=["a"]).merges == (LayerMerge("base", ("a",)),)


def test_a_users_image_is_never_removed() -> None:
    """A user's image that is no longer needed is forgotten, not removed, even if it was the one written to."""
    files = images(base=None)
    assert plan(files, frozen=[], live=[]) == Plan(forget=("base",))
    assert plan(files, frozen=[], live=["base"]) == Plan(forget=("base",))
    assert plan(files, frozen=["base"], live=["base"]) == Plan()


def test_foreign_children_count() -> None:
    """A linked clone made by another program keeps an image from being removed, merged into, or merged away."""
    files = images(base=None, a="base", b="a")
    assert "a" in plan(files, frozen=["base"], live=["b"], foreign={"a": ["clone"]}).kept
    assert plan(files, frozen=["base"], live=["base"], foreign={"b": ["clone"]}).unlink == ()
    merged_away = plan(files, frozen=["base"], live=["b"], foreign={"b": ["clone"]})
    assert merged_away.merges == () and "a" in merged_away.kept


def test_images_of_another_machine_stay() -> None:
    """An image that is a disk of another machine is neither changed nor removed nor merged."""
    files = images(base=None, a="base", b="a")
    assert plan(files, frozen=["base"], live=["b"], held=["a"]) == Plan()
    assert plan(files, frozen=["base"], live=["base"], held=["b"]).unlink == ()
    assert plan(files, frozen=["base"], live=["b"], held=["b"]).merges == ()


class Model:
    """A machine with one disk: images with their sectors, and for every state the whole disk."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.tree = Tree()
        self.parents: dict[str, str | None] = {"base": None}
        self.sectors: dict[str, dict[int, int]] = {"base": dict.fromkeys(range(SECTORS), 0)}
        self.live = "base"
        self.expected: dict[str, list[int]] = {}  # by snapshot
        self.expected_now = [0] * SECTORS
        self.expected_kept = list[int]()  # by the image that the last night left
        self.clones: dict[str, list[int]] = {}  # foreign images, and their content
        self.count = 0

    def read(self, path: str | None) -> list[int]:
        """The whole disk, as an image shows it."""
        disk = [-1] * SECTORS
        while path is not None:
            for sector, value in self.sectors[path].items():
                if disk[sector] == -1:
                    disk[sector] = value
            path = self.parents[path]
        return disk

    def name(self, kind: str) -> str:
        """A name that was never used before."""
        self.count += 1
        return f"/{kind}{self.count}"

    def new(self, parent: str, kind: str) -> str:
        """A new empty image on another one."""
        path = self.name(kind)
        self.parents[path], self.sectors[path] = parent, {}
        return path

    def write(self) -> None:
        """The guest writes."""
        self.count += 1
        sector = self.random.randrange(SECTORS)
        self.sectors[self.live][sector] = self.count
        self.expected_now[sector] = self.count

    def create(self) -> None:
        """A snapshot of the present state."""
        snapshot = Snapshot(self.name("s"), self.name("n"), self.count, self.tree.now, "/", {"d": self.live}, "off")
        child = self.new(self.live, "a")
        self.tree.grow(self.live, child, "vhd")
        self.tree.add(snapshot)
        self.live = child
        self.expected[snapshot.id] = list(self.expected_now)

    def night(self) -> None:
        """A backup, whose frozen image is kept in place of the last night's."""
        self.count += 1
        frozen, child, night_id = self.live, self.new(self.live, "a"), f"{self.count:032x}"
        self.tree.grow(frozen, child, "vhd")
        self.tree.begin_night([Kept("1" * 32, "/repo", night_id, "d", frozen, "maker")])
        self.live = child
        if self.random.random() < 0.8:
            self.tree.end_night(night_id, "1" * 32, exists=True)
            self.expected_kept = list(self.expected_now)
        else:
            self.tree.end_night(night_id, "1" * 32, exists=False)

    def drop_unneeded(self) -> None:
        """A kept image on which no state stands any more is not kept."""
        leaves = [self.live, *(one.disks["d"] for one in self.tree.snapshots.values())]
        below = self.tree.below(leaves)
        self.tree.keep_only(lambda one: one.image in below)

    def apply(self) -> None:
        """Apply some snapshot."""
        snapshot = self.random.choice(list(self.tree.snapshots.values()))
        child = self.new(snapshot.disks["d"], "a")
        self.tree.grow(snapshot.disks["d"], child, "vhd")
        self.tree.now, self.live = snapshot.id, child
        self.expected_now = list(self.expected[snapshot.id])

    def delete(self, *, subtree: bool) -> None:
        """Delete some snapshot, or with all its descendants."""
        snapshot = self.random.choice(list(self.tree.snapshots.values()))
        gone = self.tree.subtree(snapshot.id) if subtree else [snapshot]
        self.tree.remove(gone)
        for one in gone:
            del self.expected[one.id]

    def clone(self) -> None:
        """Make a foreign image on one of ours, which the machine does not write to any more."""
        path = self.random.choice([one for one in self.parents if one != self.live])
        clone = self.new(path, "clone")
        self.sectors[clone][0] = self.count
        self.clones[clone] = self.read(clone)

    def judge(self) -> Plan:
        """The plan that the rule gives now."""
        foreign = {path: [one for one in self.clones if self.parents[one] == path] for path in self.tree.images}
        return plan(self.tree.images, frozen=self.tree.frozen(), live=[self.live], foreign=foreign)

    def carry_out(self, *, merge: bool) -> None:
        """Carry out the plan, with merges only if the machine is off."""
        self.drop_unneeded()
        judged = self.judge()
        for path in judged.unlink:
            assert path.startswith("/a"), "an image that is not the machine's was removed"
            assert path not in self.parents.values(), "an image with children was removed"
            del self.parents[path], self.sectors[path]
            self.tree.forget(path)
        for one in judged.merges if merge else ():
            self.merge(one)
        for path in judged.forget:
            self.tree.forget(path)

    def merge(self, one: LayerMerge) -> None:
        """Merge as vhdkit does: sectors move down, children of the newest layer get another parent, the layers are
        removed."""
        for layer in reversed(one.layers):
            assert layer.startswith("/a")
            self.sectors[one.target] |= self.sectors[layer]
        for path, parent in self.parents.items():
            if parent == one.layers[0]:
                self.parents[path] = one.target
        for layer in one.layers:
            del self.parents[layer], self.sectors[layer]
        assert not set(one.layers) & set(self.parents.values())
        self.live = one.target if self.live == one.layers[0] else self.live
        self.tree.merged(one.target, one.layers)

    def check(self) -> None:
        """Everything reads as before, and no image is recorded that does not exist."""
        assert self.read(self.live) == self.expected_now
        for snapshot in self.tree.snapshots.values():
            assert self.read(snapshot.disks["d"]) == self.expected[snapshot.id]
        for clone, disk in self.clones.items():
            assert self.read(clone) == disk
        for one in self.tree.kept:
            assert self.read(one.image) == self.expected_kept and one.maker is None
        assert len(self.tree.kept) <= 1
        assert set(self.tree.images) | {"base"} == set(self.parents) - set(self.clones) | {"base"}
        for path, image in self.tree.images.items():
            assert image.parent == self.parents[path] or not image.ours


_STEPS = st.sampled_from(["write", "create", "night", "apply", "delete", "subtree", "clone", "off"])


@given(st.lists(_STEPS, max_size=40), st.integers(0, 1 << 30))
def test_random_histories_keep_every_state(steps: list[str], seed: int) -> None:
    """INV-DELETE-RULE: whatever is created or deleted, every snapshot, the present state, every clone and the image
    that the next backup needs read as before."""
    model = Model(seed)
    for step in steps:
        if step in ("apply", "delete", "subtree") and not model.tree.snapshots:
            continue
        if step == "clone" and len(model.parents) < 2:
            continue
        match step:
            case "delete" | "subtree":
                model.delete(subtree=step == "subtree")
            case "off":
                pass
            case _:
                getattr(model, step)()
        model.carry_out(merge=step == "off")
        model.check()
    model.carry_out(merge=True)
    model.check()
    judged = model.judge()
    assert not judged.unlink and not judged.merges, "a second run had something to do"
    for path in judged.kept:
        family = [one for one, parent in model.parents.items() if parent == path]
        assert (
            len(family) >= 2
            or set(family) & set(model.clones)
            or set(model.clones) & {one for one, parent in model.parents.items() if parent in family}
        ), "a hidden image has fewer than two children, and none is foreign"
