# SPDX-License-Identifier: Apache-2.0
"""The delete rule: its cases, and random histories against a naive model that keeps whole disks."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from vmm.store.snapshots.deletion_plan import LayerMerge, Plan, plan
from vmm.store.snapshots.tree import Image, Snapshot, Tree

SECTORS = 6


def images(**parents: str | None) -> dict[str, Image]:
    """Images by name: name -> parent; "base" is the user's own."""
    return {name: Image(parent, ours=name != "base") for name, parent in parents.items()}


def test_none_removed_one_merged_two_kept() -> None:
    """An image without dependants goes, one with one takes it in, one with two stays."""
    files = images(base=None, a="base", b="a", c="a", d="c", e="d", f="base")
    judged = plan(files, frozen=["base", "b"], live=["e"])
    assert judged == Plan(("f",), (LayerMerge("c", ("e", "d")),), {"a": "2 images stand on it"})


def test_whole_branch_goes_children_first() -> None:
    """What stands on nothing needed goes from its leaves on."""
    files = images(base=None, a="base", b="a", c="b", d="base")
    assert plan(files, frozen=["base"], live=["d"]).unlink == ("c", "b", "a")


def test_first_image_is_merged_into_the_users_own() -> None:
    """When the snapshot of the user's own image is deleted, what stands on it alone goes into it."""
    assert plan(images(base=None, a="base"), frozen=[], live=["a"]).merges == (LayerMerge("base", ("a",)),)


def test_users_own_image_is_never_removed() -> None:
    """A user's image that nobody needs is forgotten, not removed; the one written to, too."""
    files = images(base=None)
    assert plan(files, frozen=[], live=[]) == Plan(forget=("base",))
    assert plan(files, frozen=[], live=["base"]) == Plan(forget=("base",))
    assert plan(files, frozen=["base"], live=["base"]) == Plan()


def test_foreign_dependants_count() -> None:
    """A linked clone that somebody made keeps an image from being removed, merged into, and merged away."""
    files = images(base=None, a="base", b="a")
    assert "a" in plan(files, frozen=["base"], live=["b"], foreign={"a": ["clone"]}).kept
    assert plan(files, frozen=["base"], live=["base"], foreign={"b": ["clone"]}).unlink == ()
    merged_away = plan(files, frozen=["base"], live=["b"], foreign={"b": ["clone"]})
    assert merged_away.merges == () and "a" in merged_away.kept


def test_what_another_machine_uses_stays() -> None:
    """An image that another machine has as a disk is neither changed nor removed nor merged away."""
    files = images(base=None, a="base", b="a")
    assert plan(files, frozen=["base"], live=["b"], held=["a"]) == Plan()
    assert plan(files, frozen=["base"], live=["base"], held=["b"]).unlink == ()
    assert plan(files, frozen=["base"], live=["b"], held=["b"]).merges == ()


class Model:
    """A machine of one disk: images with their own sectors, and beside them every state's whole disk."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.tree = Tree()
        self.parents: dict[str, str | None] = {"base": None}
        self.sectors: dict[str, dict[int, int]] = {"base": dict.fromkeys(range(SECTORS), 0)}
        self.live = "base"
        self.expected: dict[str, list[int]] = {}  # by snapshot
        self.expected_now = [0] * SECTORS
        self.clones: dict[str, list[int]] = {}  # foreign images, and what they read
        self.count = 0

    def read(self, path: str | None) -> list[int]:
        """The whole disk as an image shows it."""
        disk = [-1] * SECTORS
        while path is not None:
            for sector, value in self.sectors[path].items():
                if disk[sector] == -1:
                    disk[sector] = value
            path = self.parents[path]
        return disk

    def name(self, kind: str) -> str:
        """A name that was never used."""
        self.count += 1
        return f"/{kind}{self.count}"

    def new(self, parent: str, kind: str) -> str:
        """An empty image on another."""
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

    def apply(self) -> None:
        """Back to some snapshot."""
        snapshot = self.random.choice(list(self.tree.snapshots.values()))
        child = self.new(snapshot.disks["d"], "a")
        self.tree.grow(snapshot.disks["d"], child, "vhd")
        self.tree.now, self.live = snapshot.id, child
        self.expected_now = list(self.expected[snapshot.id])

    def delete(self, *, subtree: bool) -> None:
        """Some snapshot goes, or all that came of it, too."""
        snapshot = self.random.choice(list(self.tree.snapshots.values()))
        gone = self.tree.subtree(snapshot.id) if subtree else [snapshot]
        self.tree.remove(gone)
        for one in gone:
            del self.expected[one.id]

    def clone(self) -> None:
        """Somebody makes an image on one of ours; then the machine does not write to that any more."""
        path = self.random.choice([one for one in self.parents if one != self.live])
        clone = self.new(path, "clone")
        self.sectors[clone][0] = self.count
        self.clones[clone] = self.read(clone)

    def judge(self) -> Plan:
        """What the rule says now."""
        foreign = {path: [one for one in self.clones if self.parents[one] == path] for path in self.tree.images}
        return plan(self.tree.images, frozen=self.tree.frozen(), live=[self.live], foreign=foreign)

    def carry_out(self, *, merge: bool) -> None:
        """Do what the rule says, merges only where the machine is off."""
        judged = self.judge()
        for path in judged.unlink:
            assert path.startswith("/a"), "only images of the machine's own are removed"
            assert path not in self.parents.values(), "nothing stands on what is removed"
            del self.parents[path], self.sectors[path]
            self.tree.forget(path)
        for one in judged.merges if merge else ():
            self.merge(one)
        for path in judged.forget:
            self.tree.forget(path)

    def merge(self, one: LayerMerge) -> None:
        """As vhdkit's merge: sectors go down, children of the newest are repointed, the layers go."""
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
        """Everything reads as it did, and nothing is known of that is not there."""
        assert self.read(self.live) == self.expected_now
        for snapshot in self.tree.snapshots.values():
            assert self.read(snapshot.disks["d"]) == self.expected[snapshot.id]
        for clone, disk in self.clones.items():
            assert self.read(clone) == disk
        assert set(self.tree.images) | {"base"} == set(self.parents) - set(self.clones) | {"base"}
        for path, image in self.tree.images.items():
            assert image.parent == self.parents[path] or not image.ours


_STEPS = st.sampled_from(["write", "create", "apply", "delete", "subtree", "clone", "off"])


@given(st.lists(_STEPS, max_size=40), st.integers(0, 1 << 30))
def test_random_histories_keep_every_state(steps: list[str], seed: int) -> None:
    """INV-DELETE-RULE: whatever comes and goes, every snapshot, the present state and every clone read as they did."""
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
    assert not judged.unlink and not judged.merges, "one time is enough"
    for path in judged.kept:
        family = [one for one, parent in model.parents.items() if parent == path]
        assert (
            len(family) >= 2
            or set(family) & set(model.clones)
            or set(model.clones) & {one for one, parent in model.parents.items() if parent in family}
        ), "what stays hidden has two dependants or a foreign one"
