# SPDX-License-Identifier: Apache-2.0
"""The flattened map compared with naive walks, over random chains, before and after writes."""

from __future__ import annotations

import random
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness.chains import ChainPlan, LayerPlan, build, chain_plans, interesting_sectors, pattern, runs_within
from tests.harness.model import ParsedVhd, walk_read, walk_sector
from tests.harness.stores import ZERO_SECTOR, MemStore
from tests.support import daily_or_nightly
from vhdkit.chain.engine import blockmap
from vhdkit.chain.engine.blockmap import BlockMap, owner_runs
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.names.opening import MAX_CHAIN_DEPTH
from vhdkit.formats.probe import FormatName, open_layer
from vhdkit.formats.raw import create_raw
from vhdkit.image import ExtentKind
from vhdkit.units import GIB, KIB, MIB, SECTOR_SIZE, TIB, sectors_to_bytes, whole_sectors

SIZES = (1, 2, 7, 8, 9, 64, 1024, 5000)


def read(chain: Chain, first: int, count: int) -> bytes:
    """What the chain returns for a run; the buffer is filled with junk first."""
    buffer = bytearray(b"\xee" * sectors_to_bytes(count))
    chain.read_into(first, memoryview(buffer))
    return bytes(buffer)


def check_reads(chain: Chain, sectors: list[int], rng: random.Random) -> None:
    """Single sectors and longer runs, in random order, each twice: first cold, then from the settled map."""
    order = sectors * 2
    rng.shuffle(order)
    for index in order:
        assert read(chain, index, 1) == walk_read(chain.layers, index), f"sector {index}"
    end = whole_sectors(chain.size_bytes)
    for first in rng.sample(sectors, min(len(sectors), 12)):
        count = min(rng.choice(SIZES), end - first)
        found = read(chain, first, count)
        for index in {first, first + count - 1, *(i for i in sectors if first <= i < first + count)}:
            piece = found[sectors_to_bytes(index - first) : sectors_to_bytes(index - first + 1)]
            assert piece == walk_read(chain.layers, index), f"sector {index} of a run from {first}"


def check_extents(chain: Chain, sectors: list[int], first: int, count: int) -> None:
    """The extents cover the range without gaps, and at each of `sectors` name the owner that the walk finds."""
    position, looked = first, [index for index in sectors if first <= index < first + count]
    for extent in chain.extents(first, count):
        assert extent.sector_index == position and extent.sector_count > 0
        position = extent.end_sector
        while looked and looked[0] < position:
            index = looked.pop(0)
            layer, offset = walk_sector(chain.layers, index)
            assert extent.layer_index == layer, f"sector {index}"
            if layer < 0:
                assert extent.kind is ExtentKind.ZERO and extent.store_offset_bytes is None
            else:
                assert extent.kind is ExtentKind.DATA and extent.store_offset_bytes is not None
                assert extent.store_offset_bytes + sectors_to_bytes(index - extent.sector_index) == offset
    assert position == first + count


@settings(max_examples=daily_or_nightly(50, 150))
@given(plan=chain_plans(), seed=st.integers(0, 999), extents_first=st.booleans())
def test_map_equals_walk(plan: ChainPlan, seed: int, extents_first: bool) -> None:
    """INV-MAP-EQUALS-WALK: on any chain, reads and extents agree with asking each layer, sector by sector."""
    chain, rng = Chain(build(plan)), random.Random(seed)
    sectors, end = interesting_sectors(plan, rng), whole_sectors(plan.layers[0].sector_count * SECTOR_SIZE)
    if extents_first:
        check_extents(chain, sectors, 0, end)
    check_reads(chain, sectors, rng)
    check_extents(chain, sectors, 0, end)
    first = rng.randrange(end)
    check_extents(chain, sectors, first, rng.randint(1, end - first))


@settings(max_examples=daily_or_nightly(40, 100))
@given(plan=chain_plans(min_children=1), seed=st.integers(0, 999), data=st.data())
def test_map_equals_walk_after_writes(plan: ChainPlan, seed: int, data: st.DataObject) -> None:
    """INV-MAP-EQUALS-WALK, INV-LEAF-ONLY-WRITES: they still agree after writes, zeroes and trims, none of which
    reaches a parent (their stores are frozen)."""
    chain, rng = Chain(build(plan, writable=True)), random.Random(seed)
    runs = data.draw(runs_within(plan.layers[0].sector_count, max_size=8))
    leaf = plan.layers[0]
    touched = LayerPlan(leaf.kind, leaf.sector_count, leaf.block_size_bytes, (*leaf.runs, *runs))
    sectors = interesting_sectors(ChainPlan((touched, *plan.layers[1:])), rng)
    check_reads(chain, rng.sample(sectors, len(sectors) // 2), rng)  # settle half of the map before the writes
    expected = {index: walk_read(chain.layers, index) for index in sectors}
    for number, (first, count) in enumerate(runs):
        step = rng.choice(["write", "write", "zero", "trim", "flush"])
        if step == "write":
            content = pattern(first, count, 9000 + number)
            chain.write(first, memoryview(content))
        elif step == "zero":
            content = bytes(sectors_to_bytes(count))
            chain.write_zeroes(first, count)
        elif step == "trim":
            content = b""
            owners = {index: walk_sector(chain.layers, index)[0] for index in sectors}
            chain.trim(first, count)
            for index in sectors:
                if first <= index < first + count and owners[index] == 0:
                    expected[index] = ZERO_SECTOR
        else:
            content = b""
            chain.flush()
        for index in sectors:
            if content and first <= index < first + count:
                expected[index] = content[sectors_to_bytes(index - first) : sectors_to_bytes(index - first + 1)]
    for index in sectors:
        assert read(chain, index, 1) == expected[index], f"sector {index}"
    check_reads(chain, sectors, rng)
    check_extents(chain, sectors, 0, leaf.sector_count)


@settings(max_examples=daily_or_nightly(40, 100))
@given(plan=chain_plans(), seed=st.integers(0, 999))
def test_the_first_layer_that_owns_a_sector_answers(plan: ChainPlan, seed: int) -> None:
    """INV-SECTOR-RULE: each sector comes from the first layer whose file, read bit by bit, owns it."""
    chain, rng = Chain(build(plan)), random.Random(seed)
    parsed = {
        number: ParsedVhd.parse(chain.layers[number].store)
        for number, layer in enumerate(plan.layers)
        if layer.kind in ("dynamic", "differencing")
    }
    for index in interesting_sectors(plan, rng):
        content = ZERO_SECTOR
        for number, layer in enumerate(plan.layers):
            if index >= layer.sector_count:
                break
            offset = parsed[number].owned_offset(index) if number in parsed else sectors_to_bytes(index)
            if offset < 0 and layer.kind == "dynamic" and plan.ignore_bitmaps:
                block, within = divmod(sectors_to_bytes(index), parsed[number].block_size_bytes)
                entry = parsed[number].entries[block]
                if entry != 0xFFFFFFFF:
                    offset = sectors_to_bytes(entry) + parsed[number].bitmap_bytes + within
            if offset >= 0:
                content = chain.layers[number].store.pread(offset, SECTOR_SIZE)
                break
        assert read(chain, index, 1) == content, f"sector {index}"


@pytest.mark.parametrize("depth", [128, MAX_CHAIN_DEPTH])
def test_deep_chains(depth: int) -> None:
    """INV-MAP-EQUALS-WALK: also at depth 128, and at the maximum depth."""
    rng = random.Random(depth)
    end = whole_sectors(3 * MIB)
    children = [
        LayerPlan(
            "differencing",
            end - rng.randrange(2) * rng.randrange(100),
            rng.choice((512 * KIB, MIB)),
            tuple((rng.randrange(end - 300), rng.randint(1, 200)) for _ in range(2)),
        )
        for _ in range(depth - 1)
    ]
    plan = ChainPlan((*children, LayerPlan("dynamic", end, 2 * MIB, ((0, 3000),))))
    chain = Chain(build(plan))
    sectors = interesting_sectors(plan, rng)
    assert len({walk_sector(chain.layers, index)[0] for index in sectors}) > depth // 4
    check_reads(chain, sectors, rng)
    check_extents(chain, sectors, 0, plan.layers[0].sector_count)


def test_evicted_grains_are_rebuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-MAP-EQUALS-WALK: a cache of owner bytes that holds only one grain gives the same answers."""
    monkeypatch.setattr(blockmap, "MAX_MIXED_BYTES", 1)
    rng, end = random.Random(3), whole_sectors(4 * MIB)
    runs = tuple((rng.randrange(end - 50), rng.randint(1, 49)) for _ in range(30))
    child = LayerPlan("differencing", end, 512 * KIB, runs)
    plan = ChainPlan((child, LayerPlan("raw", end, 512 * KIB, ((0, end),))))
    chain = Chain(build(plan, writable=True))
    sectors = interesting_sectors(plan, rng)
    check_reads(chain, sectors, rng)
    assert len(chain.map.known) == 1
    for number in range(20):
        chain.write(rng.randrange(end), memoryview(pattern(number, 1, 5000)))
        check_reads(chain, rng.sample(sectors, 10), rng)
    check_extents(chain, sectors, 0, end)


def test_a_coarse_fine_table_gives_the_same_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-MAP-EQUALS-WALK: a fine table with few entries, as for very large disks, gives the same answers."""
    monkeypatch.setattr(blockmap, "MAX_FINE_ENTRIES", 24)
    rng, end = random.Random(4), whole_sectors(4 * MIB)
    runs = tuple((rng.randrange(end - 900), rng.randint(1, 899)) for _ in range(12))
    plan = ChainPlan((LayerPlan("differencing", end, 512 * KIB, runs), LayerPlan("fixed", end, MIB, ((0, end),))))
    chain = Chain(build(plan, writable=True))
    assert 4 * KIB < chain.map.fine_bytes < 512 * KIB
    sectors = interesting_sectors(plan, rng)
    check_reads(chain, sectors, rng)
    chain.write(1001, memoryview(pattern(1001, 999, 5000)))
    check_reads(chain, [*sectors, 1000, 1001, 1999, 2000], rng)


@pytest.mark.parametrize("size", [512, 2 * GIB + 512, 20 * GIB - 512, 64 * TIB])
def test_a_linear_disk_needs_no_memory_for_its_map(size: int) -> None:
    """INV-MAP-EQUALS-WALK: a single raw or fixed image is one entry, however large it is."""
    store = MemStore("huge.img")
    create_raw(store, size)
    store.pwrite(size - SECTOR_SIZE, b"z" * SECTOR_SIZE)
    end = whole_sectors(size)
    tracemalloc.start()
    chain = Chain([open_layer(store, format_name=FormatName.RAW)])
    (extent,) = chain.extents(0, end)
    assert (extent.kind, extent.sector_count, extent.layer_index) == (ExtentKind.DATA, end, 0)
    assert read(chain, end - 1, 1) == b"z" * SECTOR_SIZE
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MIB


def test_a_smaller_layer_hides_what_is_behind_its_end() -> None:
    """INV-SECTOR-RULE: data that the base has behind the end of a smaller layer in the middle is not visible."""
    base = LayerPlan("raw", 4000, MIB, ((0, 4000),))
    middle = LayerPlan("differencing", 1500, MIB, ((1499, 1),))
    leaf = LayerPlan("differencing", 4000, MIB, ())
    chain = Chain(build(ChainPlan((leaf, middle, base))))
    assert read(chain, 1498, 1) == pattern(1498, 1, 200)
    assert read(chain, 1499, 1) == pattern(1499, 1, 100)
    assert read(chain, 1500, 2500) == bytes(2500 * SECTOR_SIZE)


def test_owner_runs_end_where_the_owner_changes() -> None:
    """Neighbours with the same owner form one run, limited to the requested range."""
    owners = bytearray([1, 1, 2, 2, 2, 255, 0])
    assert owner_runs(owners, 0, 7) == [(0, 2, 1), (2, 3, 2), (5, 1, 255), (6, 1, 0)]
    assert owner_runs(owners, 1, 2) == [(1, 1, 1), (2, 1, 2)]


def test_an_untouched_map_knows_zeros_without_reading() -> None:
    """Grains for which no layer has space are ZERO from the start; those of a linear base belong to it."""
    leaf = LayerPlan("differencing", 4096, MIB, ())
    for kind, expected in (("dynamic", 0), ("raw", 2)):
        entries = BlockMap(build(ChainPlan((leaf, LayerPlan(kind, 4096, MIB, ()))))).entries
        assert [entry & 255 for entry in entries] == [expected] * 2
