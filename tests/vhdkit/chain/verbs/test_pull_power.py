# SPDX-License-Identifier: Apache-2.0
"""Power cuts inside every operation of filling an image, relinking it and making it independent."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from tests.harness.merging import (
    base_image,
    child_of,
    content_of,
    format_of,
    identity,
    layer_of,
    link_to,
    parents_of,
    unaligned,
)
from tests.harness.packing import crowd, names_behind, vhdx_crowd
from tests.harness.power import LINK, Violation, faults_of
from tests.harness.stores import CrashStore, MemStore, PowerCut
from tests.support import daily_or_nightly
from tests.vhdkit.chain.verbs.test_merge_power import PER_BLOCK, PER_MIB, WHOLE, many_vhdx
from vhdkit import errors
from vhdkit.chain.verbs import pull
from vhdkit.chain.verbs.pull_plan import plan_pull
from vhdkit.formats.vhd.create import ParentLink
from vhdkit.formats.vhdx import detach as detach_vhdx
from vhdkit.units import SECTOR_SIZE


@dataclass
class Scene:
    """An image over its parents, leaf first, of which the first `count` are pulled."""

    image: MemStore
    parents: list[MemStore]
    count: int


@dataclass
class PullRun:
    """One pull, cut inside each `every`-th operation; the files found there are judged, and the pull is repeated.

    The first of the `cuts` at each operation is followed by a second pull that is cut, too.
    """

    scene: Scene
    cuts: int = 2
    every: int = 1
    judged: int = 0
    seen: set[str] = field(default_factory=set)  # how the image was found

    def run(self) -> None:
        """Run it; raises Violation."""
        scene = self.scene
        self.before, self.id = content_of([scene.image, *scene.parents]), identity(scene.image)
        store = CrashStore(scene.image)
        store.watcher = lambda: self._watch(store)
        self.pull(store)
        store.watcher = None
        self._judge_finished(store.after_cut(random.Random(0)), "the end")

    def pull(self, store: MemStore) -> None:
        """As `chain.verbs.pull.pull` does it with real files."""
        image, parents = layer_of(store, writable=True), [layer_of(one) for one in self._parents_of(store)]
        rest = self.scene.parents[self.scene.count :]
        if not parents or (rest and len(parents) == len(rest)):
            image.close()
            return
        plan = plan_pull(image, parents[: self.scene.count], parents[self.scene.count :])
        pull.keep_id(image)
        pull.fill(plan)
        pull.prepare_cut(plan)
        image.refuse_writing()
        if rest:
            format_of(store).relink(store, link_to((identity(rest[0]),), rest[0].name))
        else:
            format_of(store).detach(store)

    def _parents_of(self, store: MemStore) -> list[MemStore]:
        """The files that the image stands on now."""
        parents, rest = self.scene.parents, self.scene.parents[self.scene.count :]
        if format_of(store).facts(store).parent is None:
            return []
        return rest if rest and identity(rest[0]) in parents_of(store) else parents

    def _watch(self, store: CrashStore) -> None:
        if store.operation_count % self.every:
            return
        for cut in range(self.cuts):
            seed = f"operation {store.operation_count}, cut {cut}"
            rng = random.Random(seed)
            found = store.after_cut(rng)
            self.judge(found, seed)
            if cut == 0:
                self._again(found, rng, seed)

    def _again(self, found: MemStore, rng: random.Random, seed: str) -> None:
        store, stop = CrashStore(found), rng.randint(1, 60)

        def cut() -> None:
            if store.operation_count >= stop:
                store.dead = True
                raise PowerCut("again")

        store.watcher = cut
        try:
            self.pull(store)
        except PowerCut:
            found = store.after_cut(rng)
            self.judge(found, f"{seed}, second cut")
            store = CrashStore(found)
            self.pull(store)
        store.watcher = None
        self._judge_finished(store.after_cut(rng), f"{seed}, repeated")

    def judge(self, found: MemStore, seed: str) -> None:
        """Check what a reader sees, and what it sees after the image was opened for writing."""
        self.judged += 1
        for mended in (False, True):
            store = found.copy()
            try:
                if mended:
                    layer_of(store, writable=True).close()
                parents = self._parents_of(store)
                observed = content_of([store, *parents])
                self.seen.add("old parent" if len(parents) == len(self.scene.parents) else "cut off")
                if not parents and store.name.endswith("vhd"):
                    assert observed == _ignoring_bitmaps(store), f"other programs see other data ({seed})"
            except errors.VhdkitError as error:
                raise Violation(f"INV-PULL-PRESERVES: no open after a cut: {error} ({seed})") from error
            if observed != self.before:
                wrong = [
                    at
                    for at in range(0, len(observed), SECTOR_SIZE)
                    if observed[at : at + SECTOR_SIZE] != self.before[at : at + SECTOR_SIZE]
                ]
                raise Violation(f"INV-PULL-PRESERVES: {len(wrong)} sectors differ, first {wrong[:1]} ({seed})")
            if identity(store) != self.id:
                raise Violation(f"INV-PARENT-ID: the children of the image lost their parent ({seed})")

    def _judge_finished(self, found: MemStore, seed: str) -> None:
        self.judge(found, seed)
        assert len(self._parents_of(found)) == len(self.scene.parents) - self.scene.count, seed
        layer_of(found, writable=True).close()
        assert not faults_of(found), (faults_of(found), seed)


def _ignoring_bitmaps(store: MemStore) -> bytearray:
    layer = format_of(store).open(store, ignore_bitmaps=True)
    content = bytearray(layer.size_bytes)
    for extent in layer.extents(0, layer.size_bytes // SECTOR_SIZE):
        if extent.store_offset_bytes is not None:
            raw = store.pread(extent.store_offset_bytes, extent.size_bytes)
            content[extent.offset_bytes : extent.offset_bytes + len(raw)] = raw
    return content


def vhd_chain(*, moved: bool = False, name: str = "image.avhd") -> tuple[MemStore, list[MemStore]]:
    """An image with a part of a block, over a part of that block, zeros, a new block and a base with data."""
    rng = random.Random(f"vhd {moved}")
    base = base_image("dynamic", [WHOLE], rng)
    lower = child_of(base, "lower.avhd", [(40, 400), (2 * PER_BLOCK + 3, 90), (PER_BLOCK, -30)], rng)
    upper = child_of(lower, "upper.avhd", [(70, -5), (PER_BLOCK + 700, 40)], rng)
    image = child_of(upper, name, [(0, 60), (72, 1), (3 * PER_BLOCK + 3, -9)], rng)
    return (unaligned(image) if moved else image), [upper, lower, base]


def independent() -> Scene:
    """An image becomes independent of three layers."""
    image, parents = vhd_chain()
    return Scene(image, parents, 3)


def independent_of_a_raw_disk() -> Scene:
    """The same with a raw base, which is larger and ends inside a block."""
    rng = random.Random("raw")
    base = base_image("raw", [(3, 60), (PER_BLOCK, 300)], rng)
    return Scene(child_of(base, "image.avhd", [(7, 20), (900, 200), (2100, -8)], rng), [base], 1)


def unaligned_blocks() -> Scene:
    """The image's blocks are not page-aligned; each becomes complete, and moves."""
    image, parents = vhd_chain(moved=True)
    return Scene(image, parents, 3)


def header_behind_blocks() -> Scene:
    """Header and names lie behind the blocks, as after a power cut in an earlier change."""
    image, parents = vhd_chain()
    return Scene(names_behind(image, _link(parents[0]), header=True), parents, 3)


def _link(parent: MemStore) -> ParentLink:
    return replace(LINK, unique_id=identity(parent), name=parent.name)


def below_two() -> Scene:
    """The image takes what two layers own, zeros included, and becomes a child of the base."""
    image, parents = vhd_chain()
    return Scene(image, parents, 2)


def two_vhdx() -> tuple[MemStore, list[MemStore]]:
    """An image and two parents above a base; the image owns a part of one block, and zeros."""
    scene = many_vhdx()
    rng = random.Random("image")
    image = child_of(scene.stores[0], "image.avhdx", [(5, 9), (PER_MIB + 740, -9), (2 * PER_MIB + 16, 8)], rng)
    return image, scene.stores


def independent_vhdx() -> Scene:
    """A VHDX becomes independent of four layers."""
    image, parents = two_vhdx()
    return Scene(image, parents, 4)


def vhdx_below_two() -> Scene:
    """A VHDX takes what two layers own, and becomes a child of the third."""
    image, parents = two_vhdx()
    return Scene(image, parents, 2)


SCENES: dict[str, Callable[[], Scene]] = {
    make.__name__: make
    for make in (
        independent,
        independent_of_a_raw_disk,
        unaligned_blocks,
        header_behind_blocks,
        below_two,
        independent_vhdx,
        vhdx_below_two,
    )
}


@pytest.mark.parametrize("name", SCENES)
def test_every_cut_of_a_pull(name: str) -> None:
    """INV-PULL-PRESERVES: wherever the power is cut, the image opens, has its id and reads as before, on its old
    parent, on its new one or without any; then the pull, cut a second time, completes."""
    run = PullRun(SCENES[name](), every=daily_or_nightly(11 if "vhdx" in name else 3, 1))
    run.run()
    assert run.seen == {"old parent", "cut off"} and run.judged > daily_or_nightly(20, 90)


def sabotage_unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The image is cut off before what it took over is on the device."""
    monkeypatch.setattr("vhdkit.formats.guard.SyncGuard.sync", lambda self: None)


def sabotage_missing_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """One piece is left out."""
    monkeypatch.setattr("vhdkit.chain.verbs.pull_plan.PullPlan.is_done", lambda self: True)
    honest = plan_pull.__globals__["PullPlan"].pieces_of
    monkeypatch.setattr(
        "vhdkit.chain.verbs.pull_plan.PullPlan.pieces_of", lambda self, block: honest(self, block) if block else []
    )


def sabotage_order_of_a_vhdx(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sector bitmaps go while blocks are still partially present."""
    monkeypatch.setattr(detach_vhdx, "_make_present", lambda image: None)


def sabotage_new_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """The image gets another id, as if it read differently."""
    monkeypatch.setattr(pull, "keep_id", lambda image: None)


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (sabotage_unflushed, "below_two"),
        (sabotage_missing_data, "independent"),
        (sabotage_order_of_a_vhdx, "independent_vhdx"),
        (sabotage_new_id, "vhdx_below_two"),
    ],
)
def test_the_harness_finds_what_is_wrong(
    spoil: Callable[[pytest.MonkeyPatch], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INV-PULL-PRESERVES: each step that is left out, or comes too early, is detected."""
    spoil(monkeypatch)
    with pytest.raises((AssertionError, errors.VhdkitError)):
        PullRun(SCENES[name](), every=7).run()


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("is_vhdx", [False, True])
def test_every_cut_in_images_of_all_kinds(is_vhdx: bool, seed: int) -> None:
    """The same for images with blocks in any order, gaps, zeros without space and logs anywhere."""
    made = vhdx_crowd(seed, differencing=True) if is_vhdx else crowd(seed, differencing=True)
    [parent] = made.parents
    assert isinstance(parent.store, MemStore)
    PullRun(Scene(made.store, [parent.store], 1), every=7).run()
