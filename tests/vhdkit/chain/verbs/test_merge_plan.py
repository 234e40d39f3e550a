# SPDX-License-Identifier: Apache-2.0
"""What a merge moves: random chains, merged in memory, compared with a naive walk of the layers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.chains import ChainPlan, LayerPlan, build, chain_plans, interesting_sectors, make_store
from tests.harness.model import walk_read
from tests.harness.power import LINK
from tests.harness.stores import MemStore
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.verbs.merge_plan import MergePlan, _cut, plan_merge
from vhdkit.chain.verbs.merge_steps import fold
from vhdkit.formats.probe import FormatName, open_layer
from vhdkit.formats.raw import create_raw
from vhdkit.formats.vhd.create import create_differencing, create_dynamic, create_fixed
from vhdkit.image import Layer
from vhdkit.units import KIB, MIB, SECTOR_SIZE, sectors_to_bytes, whole_sectors


def content_of(layers: Sequence[Layer]) -> bytes:
    """The content of the disk that these layers form."""
    buffer = bytearray(layers[0].size_bytes)
    Chain(layers).read_into(0, memoryview(buffer))
    return bytes(buffer)


def clipped(plan: LayerPlan, sector_count: int) -> LayerPlan:
    """The layer with another size, and the runs that fit into it."""

    def inside(runs: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        return tuple((first, min(count, sector_count - first)) for first, count in runs if first < sector_count)

    return replace(plan, sector_count=sector_count, runs=inside(plan.runs), cleared=inside(plan.cleared))


def reopened(store: MemStore, plan: ChainPlan, number: int, *, writable: bool) -> Layer:
    """A layer of the plan over another store."""
    kind = FormatName.RAW if plan.layers[number].kind == "raw" else FormatName.VHD
    return open_layer(store, format_name=kind, writable=writable, ignore_bitmaps=plan.ignore_bitmaps)


@st.composite
def merges(draw: st.DrawFn) -> tuple[ChainPlan, int]:
    """A chain, and the index of an ancestor of the leaf that has the leaf's size."""
    plan = draw(chain_plans(min_children=1, max_children=4))
    index = draw(st.integers(1, len(plan.layers) - 1))
    layers = list(plan.layers)
    layers[index] = clipped(layers[index], layers[0].sector_count)
    return ChainPlan(tuple(layers), plan.ignore_bitmaps), index


@given(merges(), st.randoms(use_true_random=False))
def test_the_target_reads_as_the_leaf_did(case: tuple[ChainPlan, int], rng: random.Random) -> None:
    """INV-MERGE-PRESERVES: after a merge the target holds what the leaf held, and at every step the leaf reads the
    same; sources and deeper layers are only read (otherwise their stores fail the test)."""
    plan, index = case
    layers = build(plan)
    before = content_of(layers)
    sectors = interesting_sectors(plan, rng)
    naive = [walk_read(layers, sector) for sector in sectors]
    store = make_store(plan.layers[index], index)
    target = reopened(store, plan, index, writable=True)
    below = layers[index + 1 :]
    merge = plan_merge(layers[:index], target, below_bytes=below[0].size_bytes if below else 0)
    for pieces in merge.blocks():
        if pieces:
            target.copy_in(pieces)
            now = [*layers[:index], target, *below]
            assert [walk_read(now, sector) for sector in sectors[::7]] == naive[::7]
    target.close()
    merged = [reopened(store, plan, index, writable=False), *below]
    assert [walk_read(merged, sector) for sector in sectors] == naive
    assert content_of(merged) == before
    assert content_of([*layers[:index], *merged]) == before


@given(chain_plans(min_children=1, max_children=4), st.integers(1, 4), st.sampled_from([512 * KIB, 2 * MIB]))
def test_a_new_file_reads_as_the_leaf_does(plan: ChainPlan, depth: int, block_size: int) -> None:
    """INV-MERGE-PRESERVES: merged into a new file, whatever the sizes of the layers, the disk is the same."""
    layers = build(plan)
    index = min(depth, len(plan.layers) - 1)
    below = layers[index + 1 :]
    kind = plan.layers[index].kind
    size = layers[0].size_bytes
    store = MemStore("new.img" if kind == "raw" else "new.vhd")
    if kind == "differencing":
        create_differencing(store, size, LINK, block_size_bytes=block_size)
    elif kind == "dynamic":
        create_dynamic(store, size, block_size_bytes=block_size)
    else:
        (create_raw if kind == "raw" else create_fixed)(store, size)
    target = reopened(store, plan, index, writable=True)
    sources = layers[: index + 1]
    fold(plan_merge(sources, target, below_bytes=below[0].size_bytes if below else 0, fresh=True), target)
    target.close()
    assert content_of([reopened(store, plan, index, writable=False), *below]) == content_of(layers)


@given(chain_plans(min_children=1, max_children=4), st.integers(1, 4))
def test_a_source_that_is_alone_gives_the_pieces_of_the_walk(plan: ChainPlan, depth: int) -> None:
    """Where one source alone has anything, its pieces are those that going through all sources sector by sector finds,
    to the last one."""
    layers = build(plan)
    sources = layers[: min(depth, len(layers))]
    store = MemStore("new.vhd")
    create_differencing(store, layers[0].size_bytes, LINK)
    merge = plan_merge(sources, open_layer(store, writable=True), below_bytes=layers[0].size_bytes, fresh=True)
    found = list(merge.blocks())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MergePlan, "_sole_owner", lambda self, first, count: None)
        assert list(merge.blocks()) == found


@given(st.sets(st.integers(0, 24)), st.sets(st.integers(0, 24)))
def test_runs_are_cut_at_holes(owned: set[int], holes: set[int]) -> None:
    """Every sector of a run is in a part that says whether it is in a hole, and no two parts could be one."""
    cut = [*_cut(runs_of(owned), [(one, one + 1) for one in sorted(holes)])]
    assert [(one, is_zero) for start, stop, is_zero in cut for one in range(start, stop)] == [
        (one, one in holes) for one in sorted(owned)
    ]
    assert all(before[1] < after[0] or before[2] != after[2] for before, after in itertools.pairwise(cut))


def runs_of(numbers: set[int]) -> list[tuple[int, int]]:
    """The numbers as runs (from, to)."""
    starts = sorted(one for one in numbers if one - 1 not in numbers)
    return list(zip(starts, sorted(one + 1 for one in numbers if one + 1 not in numbers), strict=True))


def two_layers(*, target_kind: str, base: bool = False) -> list[Layer]:
    """A leaf that owns zeros over data of its parent, and with `base` a third layer below."""
    size = whole_sectors(2 * MIB)
    leaf = LayerPlan("differencing", size, 512 * KIB, ())
    middle = LayerPlan(target_kind, size, 512 * KIB, () if base else ((0, size),))
    plans = [leaf, middle, *([LayerPlan("dynamic", size, 512 * KIB, ((0, size),))] if base else [])]
    stores = [make_store(plan, number) for number, plan in enumerate(plans)]
    with_zeros = open_layer(stores[0], writable=True)
    with_zeros.write_zeroes(3, 5)
    with_zeros.close()
    raw = FormatName.RAW if target_kind == "raw" else FormatName.VHD
    return [open_layer(stores[0]), open_layer(stores[1], format_name=raw), *map(open_layer, stores[2:])]


def test_zeros_in_a_source_hide_older_data() -> None:
    """dosbox-x #4545: zeros written over a block hide an ancestor's data, also after they are merged down; a
    differencing target that does not own those sectors gets them as zeros that it owns."""
    for kind in ("raw", "fixed", "dynamic", "differencing"):
        layers = two_layers(target_kind=kind, base=kind == "differencing")
        before = content_of(layers)
        assert before[3 * SECTOR_SIZE : 8 * SECTOR_SIZE] == bytes(5 * SECTOR_SIZE)
        assert before[2 * SECTOR_SIZE] and before[8 * SECTOR_SIZE]
        name = FormatName.RAW if kind == "raw" else FormatName.VHD
        target = open_layer(layers[1].store, format_name=name, writable=True)
        plan = plan_merge(layers[:1], target, below_bytes=2 * MIB)
        (pieces,) = plan.blocks()
        assert [(one.sector_index, one.sector_count, one.source) for one in pieces] == [(3, 5, None)]
        fold(plan, target)
        target.flush()
        assert content_of([target, *layers[2:]]) == before, kind


def test_a_smaller_source_hides_what_is_below() -> None:
    """Behind the end of a smaller source the disk reads as zeros, and still does when that source is gone."""
    size = whole_sectors(3 * MIB)
    plans = (
        LayerPlan("differencing", size, 512 * KIB, ((5, 9),)),
        LayerPlan("differencing", 700, 512 * KIB, ((600, 100),)),
        LayerPlan("differencing", size, MIB, ((600, 3000),)),
        LayerPlan("raw", size, 512 * KIB, ((0, size),)),
    )
    layers = build(ChainPlan(plans))
    before = content_of(layers)
    assert not any(before[sectors_to_bytes(700) :])
    store = make_store(plans[2], 2)
    target = open_layer(store, writable=True)
    fold(plan_merge(layers[:2], target, below_bytes=sectors_to_bytes(size)), target)
    target.close()
    assert content_of([open_layer(store), layers[3]]) == before


def test_runs_are_joined_and_untouched_blocks_left_out() -> None:
    """A block that one layer owns entirely is one piece; the plan has no entry for a block that no source has."""
    plans = (
        LayerPlan("differencing", 8192, 512 * KIB, ((1024, 1024), (4096, 8))),
        LayerPlan("differencing", 8192, 512 * KIB, ((1030, 20), (4100, 8))),
        LayerPlan("dynamic", 8192, 512 * KIB, ((0, 8192),)),
    )
    layers = build(ChainPlan(plans))
    plan = plan_merge(layers[:2], layers[2])
    whole, partial = plan.blocks()
    assert plan.units.tolist() == [1, 4]
    assert [(one.sector_index, one.sector_count) for one in whole] == [(1024, 1024)]
    assert [(one.sector_index, one.sector_count) for one in partial] == [(4096, 8), (4104, 4)]
    assert partial[0].source is layers[0].store and partial[1].source is layers[1].store
    assert plan.touched_bytes == MIB
