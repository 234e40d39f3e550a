# SPDX-License-Identifier: Apache-2.0
"""Random chains of VHDX images are merged: blocks of zeros without space, mixed block sizes, both sector sizes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness.chains import pattern
from tests.harness.stores import MemStore
from tests.support import daily_or_nightly
from tests.vhdkit.formats.vhdx.images import set_entry
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.verbs.merge_plan import plan_merge
from vhdkit.chain.verbs.merge_steps import fold
from vhdkit.formats.vhdx.bat import BlockState
from vhdkit.formats.vhdx.blocks import ZERO_STATES, VhdxImage
from vhdkit.formats.vhdx.create import create, new_disk
from vhdkit.formats.vhdx.format import VHDX
from vhdkit.formats.vhdx.opening import open_vhdx
from vhdkit.image import NULL_ID, ExtentKind, ParentRef
from vhdkit.units import MIB, PAGE_SIZE, SECTOR_SIZE, whole_sectors

PAGES = 5 * MIB // PAGE_SIZE + 3
SIZE = PAGES * PAGE_SIZE
BLOCK_SIZES = st.sampled_from([MIB, 2 * MIB, 4 * MIB])


@dataclass(frozen=True)
class LayerPlan:
    """A layer: runs in units of its sectors as fractions of the disk, blocks in states of zeros, its block size."""

    block_size_bytes: int
    runs: tuple[tuple[float, int, bool], ...]  # where, how many sectors, whether they are zeros
    zero_blocks: tuple[tuple[int, BlockState], ...]


def layer_plans() -> st.SearchStrategy[LayerPlan]:
    """A layer of any kind."""
    sizes = st.one_of(st.integers(1, 40), st.sampled_from([256, 2048, 4096]))
    runs = st.lists(st.tuples(st.floats(0, 1), sizes, st.booleans()), max_size=5).map(tuple)
    zeros = st.lists(st.tuples(st.integers(0, 5), st.sampled_from(ZERO_STATES)), max_size=2).map(tuple)
    return st.builds(LayerPlan, BLOCK_SIZES, runs, zeros)


def write_runs(store: MemStore, plan: LayerPlan, number: int, per_sector: int) -> None:
    """Write the layer's runs, and give blocks without space one of the states that read as zeros."""
    layer = open_vhdx(store, writable=True)
    end = whole_sectors(SIZE)
    for where, size, is_zeros in plan.runs:
        first = min(int(where * end), end - 1) // per_sector * per_sector
        count = min(size * per_sector, end - first)
        if is_zeros:
            layer.write_zeroes(first, count)
        else:
            layer.write(first, memoryview(pattern(first, count, number)))
    layer.finish()
    absent = ~(layer.allocated_blocks())
    for block, state in plan.zero_blocks:
        if block < len(absent) and absent[block]:
            set_entry(store, block, state)


def build(plans: list[LayerPlan], sector_bytes: int) -> list[MemStore]:
    """The files of a chain, leaf first; the last plan is the base."""
    stores: list[MemStore] = []
    for number, plan in reversed(list(enumerate(plans))):
        store = MemStore(f"{number}.avhdx" if stores else "base.vhdx")
        if stores:
            below = open_vhdx(stores[0].copy(frozen=True))
            name = stores[0].name
            link = ParentRef.of_paths(
                below.unique_id or NULL_ID, 0, relative=f".\\{name}", absolute=f"\\{name}", name=name
            )
            VHDX.create_child(store, SIZE, link, block_size_bytes=plan.block_size_bytes, disk=below)
        else:
            create(store, new_disk(SIZE, sector_bytes), plan.block_size_bytes)
        write_runs(store, plan, number, whole_sectors(sector_bytes))
        stores.insert(0, store)
    return stores


def content(layers: list[VhdxImage]) -> bytes:
    """The disk that a chain shows."""
    buffer = bytearray(SIZE)
    Chain(layers).read_into(0, memoryview(buffer))
    return bytes(buffer)


@given(
    plans=st.lists(layer_plans(), min_size=2, max_size=5),
    sector_bytes=st.sampled_from([SECTOR_SIZE, PAGE_SIZE]),
    target=st.integers(1, 4),
    stop=st.integers(0, 3),
)
@settings(max_examples=daily_or_nightly(25, 150), deadline=None)
def test_the_target_reads_as_the_leaf(plans: list[LayerPlan], sector_bytes: int, target: int, stop: int) -> None:
    """INV-MERGE-PRESERVES: after any number of blocks the leaf reads as before; after the merge the target does, and
    the image is sound. No byte of another layer changes."""
    index = min(target, len(plans) - 1)
    stores = build(plans, sector_bytes)
    before = content([open_vhdx(store) for store in stores])
    for number, store in enumerate(stores):
        store.frozen = number != index

    class Stop(Exception):
        """The merge is interrupted here."""

    def merge(after: int | None) -> None:
        sources = [open_vhdx(store) for store in stores[:index]]
        opened, seen = open_vhdx(stores[index], writable=True), 0

        def progress(done: int, total: int) -> None:
            nonlocal seen
            seen += 1
            if after is not None and seen > after:
                raise Stop

        below = SIZE if index + 1 < len(stores) else 0
        try:
            fold(plan_merge(sources, opened, below_bytes=below), opened, progress)
        except Stop:
            opened.flush()
        opened.finish()

    for after in (stop, None):
        merge(after)
        assert content([open_vhdx(store) for store in stores]) == before
    assert content([open_vhdx(store) for store in stores[index:]]) == before
    assert VHDX.check(stores[index]) == []


@pytest.mark.parametrize("state", ZERO_STATES)
@pytest.mark.parametrize("through", [False, True])
def test_a_block_of_zeros_hides_the_targets_data(state: BlockState, through: bool) -> None:
    """INV-SECTOR-RULE: a leaf's block in any of these states becomes zeros in the target: its data if it has some, or
    its own block of zeros, which takes no space, over a parent with data."""
    whole = LayerPlan(MIB, ((0.0, whole_sectors(SIZE), False),), ())
    leaf = LayerPlan(MIB, (), ((1, state),))
    stores = build([leaf, LayerPlan(MIB, (), ()), whole] if through else [leaf, whole], SECTOR_SIZE)
    before = content([open_vhdx(store) for store in stores])
    assert not any(before[MIB : 2 * MIB]) and any(before[:PAGE_SIZE]) and any(before[2 * MIB :][:PAGE_SIZE])
    target = open_vhdx(stores[1], writable=True)
    fold(plan_merge([open_vhdx(stores[0])], target, below_bytes=SIZE if through else 0), target)
    target.finish()
    layers = [open_vhdx(store) for store in stores[1:]]
    assert content(layers) == before
    if through:
        kinds = [one.kind for one in layers[0].extents(0, whole_sectors(SIZE))]
        assert kinds == [ExtentKind.ABSENT, ExtentKind.ZERO, ExtentKind.ABSENT] and stores[1].size() == 4 * MIB
