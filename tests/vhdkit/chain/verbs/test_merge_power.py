# SPDX-License-Identifier: Apache-2.0
"""Power cuts inside every operation of a merge: on the target, on the leaf's children, on names and the record."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.harness.merging import MergeRun, Scene, World, base_image, child_of, unaligned
from tests.harness.power import BLOCK_SIZE, Violation
from tests.support import daily_or_nightly
from vhdkit.formats.vhd.commit import Commit
from vhdkit.units import MIB, sectors_to_bytes, whole_sectors

PER_BLOCK = whole_sectors(BLOCK_SIZE)
WHOLE = (0, 3 * PER_BLOCK + 37)


def two_layers() -> Scene:
    """A leaf over a dynamic base: a new block, a partial one, a whole one, zeros."""
    rng = random.Random("two")
    base = base_image("dynamic", [(10, 50), (2 * PER_BLOCK, PER_BLOCK)], rng)
    runs = [(0, 9), (30, 70), (PER_BLOCK + 5, 11), (2 * PER_BLOCK, -PER_BLOCK), (3 * PER_BLOCK, 37)]
    return Scene([child_of(base, "leaf.avhd", runs, rng), base], 1)


def many_layers() -> Scene:
    """Three layers into a differencing one whose base has data everywhere."""
    rng = random.Random("many")
    base = base_image("fixed", [WHOLE], rng)
    target = child_of(base, "target.avhd", [(0, 60), (PER_BLOCK, 30)], rng)
    lower = child_of(target, "lower.avhd", [(40, 40), (2 * PER_BLOCK, PER_BLOCK)], rng)
    middle = child_of(lower, "middle.avhd", [(70, -5), (PER_BLOCK + 700, 40)], rng)
    leaf = child_of(middle, "leaf.avhd", [(72, 1), (3 * PER_BLOCK + 3, -9)], rng)
    return Scene([leaf, middle, lower, target, base], 3)


def moving_blocks() -> Scene:
    """The target's blocks are not page-aligned; one of them becomes complete and moves."""
    rng = random.Random("moving")
    base = base_image("dynamic", [WHOLE], rng)
    target = unaligned(child_of(base, "target.avhd", [(0, 600), (PER_BLOCK, 90), (3 * PER_BLOCK, 30)], rng))
    leaf = child_of(target, "leaf.avhd", [(500, PER_BLOCK - 500), (PER_BLOCK + 50, 90), (3 * PER_BLOCK + 30, 7)], rng)
    return Scene([leaf, target, base], 1)


def moving_blocks_of_a_dynamic_base() -> Scene:
    """The same in a dynamic base: every block is complete, so every touched one moves."""
    rng = random.Random("base")
    base = unaligned(base_image("dynamic", [WHOLE], rng))
    return Scene([child_of(base, "leaf.avhd", [(7, 20), (2 * PER_BLOCK + 900, 161)], rng), base], 1)


def raw_base() -> Scene:
    """Into a raw base, which is changed in place."""
    rng = random.Random("raw")
    base = base_image("raw", [WHOLE], rng)
    return Scene([child_of(base, "leaf.avhd", [(7, 20), (900, 2000), (2100, -8)], rng), base], 1)


def target_without_its_footer() -> Scene:
    """The ancestor lost its trailing footer in an earlier crash."""
    scene = two_layers()
    scene.stores[1].truncate(scene.stores[1].size() - 512)
    return scene


def growing_target() -> Scene:
    """The target is smaller than the leaf and grows first."""
    rng = random.Random("growing")
    base = unaligned(base_image("dynamic", [(0, 700)], rng, size=BLOCK_SIZE + 10 * 512))
    leaf = child_of(base, "leaf.avhd", [(500, 600), (PER_BLOCK + 5, 20), (3 * PER_BLOCK, 30)], rng)
    return Scene([leaf, base], 1)


def shrinking_target() -> Scene:
    """The target is larger than the leaf."""
    rng = random.Random("shrinking")
    base = base_image("dynamic", [WHOLE], rng)
    leaf = child_of(base, "leaf.avhd", [(3, 60), (PER_BLOCK + 1, 8)], rng, size=BLOCK_SIZE + 10 * 512)
    return Scene([leaf, base], 1)


def with_children() -> Scene:
    """The leaf has two children, which are relinked to the target."""
    scene = two_layers()
    rng = random.Random("children")
    scene.children = [child_of(scene.stores[0], f"child{n}.avhd", [(20 * n, 30)], rng) for n in (1, 2)]
    return scene


PER_MIB = whole_sectors(MIB)
VHDX_SECTORS = 2 * PER_MIB + 40
VHDX_BYTES = sectors_to_bytes(VHDX_SECTORS)


def two_vhdx() -> Scene:
    """A leaf over a dynamic base, with two children: a new block, a partial one, a whole one, zeros."""
    rng = random.Random("two vhdx")
    base = base_image("vhdx", [(10, 50), (2 * PER_MIB, 20)], rng, size=VHDX_BYTES)
    leaf = child_of(base, "leaf.avhdx", [(0, 9), (30, 70), (PER_MIB + 5, 11), (2 * PER_MIB, -40)], rng)
    return Scene([leaf, base], 1)


def vhdx_with_children() -> Scene:
    """The same with children of the leaf, which are relinked to the target."""
    scene, rng = two_vhdx(), random.Random("children")
    scene.children = [child_of(scene.stores[0], f"child{n}.avhdx", [(20 * n, 30)], rng) for n in (1, 2)]
    return scene


def many_vhdx() -> Scene:
    """Two layers into a differencing one, which has no sector bitmap, above a fixed base with data everywhere."""
    rng = random.Random("many vhdx")
    base = base_image("vhdx-fixed", [(0, VHDX_SECTORS)], rng, size=VHDX_BYTES)
    target = child_of(base, "target.avhdx", [(PER_MIB, PER_MIB)], rng)
    middle = child_of(target, "middle.avhdx", [(70, -5), (PER_MIB + 700, 40)], rng)
    leaf = child_of(middle, "leaf.avhdx", [(72, 1), (2 * PER_MIB + 8, -8)], rng)
    return Scene([leaf, middle, target, base], 2)


def growing_vhdx() -> Scene:
    """The target is smaller than the leaf and grows first."""
    rng = random.Random("growing vhdx")
    base = base_image("vhdx", [(0, 700)], rng, size=MIB + 4096)
    leaf = child_of(base, "leaf.avhdx", [(500, 600), (PER_MIB + 5, 20), (2 * PER_MIB, 30)], rng, size=VHDX_BYTES)
    return Scene([leaf, base], 1)


def shrinking_vhdx() -> Scene:
    """The target is larger than the leaf."""
    rng = random.Random("shrinking vhdx")
    base = base_image("vhdx", [(0, VHDX_SECTORS)], rng, size=VHDX_BYTES)
    leaf = child_of(base, "leaf.avhdx", [(3, 60), (PER_MIB + 1, 3)], rng, size=MIB + 4096)
    return Scene([leaf, base], 1)


SCENES: dict[str, Callable[[], Scene]] = {
    make.__name__: make
    for make in (
        two_layers,
        many_layers,
        moving_blocks,
        moving_blocks_of_a_dynamic_base,
        raw_base,
        target_without_its_footer,
        growing_target,
        shrinking_target,
        with_children,
    )
}
VHDX_SCENES: dict[str, Callable[[], Scene]] = {
    make.__name__: make for make in (two_vhdx, vhdx_with_children, many_vhdx, growing_vhdx, shrinking_vhdx)
}
SELDOM = ("vhdx_with_children", "shrinking_vhdx")  # in the nightly run alone


@pytest.mark.parametrize(
    "name",
    [pytest.param(one, marks=pytest.mark.nightly) if one in SELDOM else one for one in SCENES | VHDX_SCENES],
)
def test_every_cut_of_a_merge(name: str) -> None:
    """INV-MERGE-PRESERVES: wherever the power is cut, the leaf reads as before or, once it is gone, the target reads
    as the leaf did, and each image knows its parent's id; then recovery, cut a second time, completes the merge."""
    run = MergeRun((SCENES | VHDX_SCENES)[name](), every=daily_or_nightly(17, 1) if name in VHDX_SCENES else 1)
    run.run()
    phases = {"None, leaf", "copy, leaf", "remove, leaf", "remove, gone", "None, gone"}
    assert run.seen >= phases | ({"relink, leaf"} if run.scene.children else set())
    assert run.judged > 2 * run.operations // run.every


def run_all(known: str) -> None:
    """Run every scene; the harness must find the fault in one of them, the last time in the one that is `known`."""
    for name in (known, *SCENES):
        MergeRun(SCENES[name](), cuts=6).run()


def sabotage_early_removal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The leaf is removed before the target is on the device."""

    def carry_out(intent, names, fill, repoint=()):  # type: ignore[no-untyped-def]
        names.write(intent)
        names.remove(intent.leaf.path)
        return fill()

    monkeypatch.setattr("tests.harness.merging.carry_out", carry_out)


def sabotage_order_of_removal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The leaf's parents are removed before the leaf."""

    def remove_sources(intent, names):  # type: ignore[no-untyped-def]
        for one in reversed(intent.sources):
            names.remove(one.path)
        names.remove_record()

    monkeypatch.setattr("vhdkit.chain.verbs.merge_steps.remove_sources", remove_sources)


def sabotage_moved_bitmap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A moved block becomes reachable before its bitmap is on the device."""
    honest = Commit.publish

    def publish(
        self: Commit, block: int, start: int, bitmap: bytearray | None, vacated: tuple[int, int] | None = None
    ) -> None:
        raw = bytearray(self._store.pread(start, self._bitmap_size))
        self._store.punch(start, self._bitmap_size)
        honest(self, block, start, raw, vacated)
        self.touch(block)

    monkeypatch.setattr(Commit, "publish", publish)


def sabotage_vacated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The old place of a block is punched before the BAT on the device points elsewhere."""
    honest = Commit.publish

    def publish(
        self: Commit, block: int, start: int, bitmap: bytearray | None, vacated: tuple[int, int] | None = None
    ) -> None:
        honest(self, block, start, bitmap)
        if vacated is not None:
            self._store.punch(*vacated)

    monkeypatch.setattr(Commit, "publish", publish)


def sabotage_target_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target is not flushed before the record says that it is complete."""
    monkeypatch.setattr("vhdkit.formats.guard.SyncGuard.sync", lambda self: None)


@pytest.mark.parametrize(
    ("spoil", "known"),
    [
        (sabotage_early_removal, "two_layers"),
        (sabotage_order_of_removal, "many_layers"),
        pytest.param(sabotage_moved_bitmap, "moving_blocks", marks=pytest.mark.nightly),
        (sabotage_vacated, "moving_blocks"),
        (sabotage_target_sync, "two_layers"),
    ],
)
def test_the_harness_finds_a_wrong_order(
    spoil: Callable[[pytest.MonkeyPatch], None], known: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INV-MERGE-PRESERVES: each step that comes too early is detected in one of the scenes."""
    spoil(monkeypatch)
    with pytest.raises(Violation):
        run_all(known)


def test_sources_are_only_read() -> None:
    """INV-MERGE-PRESERVES: no byte of a merged layer, or of one below the target, changes."""
    scene = many_layers()
    order = [store.name for store in scene.stores]
    world = World({store.name: store for store in scene.stores}, None, scene.index, order)
    for name in order:
        world.files[name].frozen = name != "target.avhd"
    world.merge(scene.intent)
    assert sorted(world.files) == ["base.vhd", "target.avhd"]
