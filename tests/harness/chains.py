# SPDX-License-Identifier: Apache-2.0
"""Random chains in memory for property tests: mixed block sizes, sizes and kinds, partial bitmaps.

A `ChainPlan` is plain data that Hypothesis draws and shrinks; `build` makes the stores it describes. Layers are
listed leaf first, as everywhere.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from hypothesis import strategies as st

from tests.harness.model import ParsedVhd
from tests.harness.power import LINK
from tests.harness.stores import MemStore
from vhdkit.formats.probe import FormatName, open_layer
from vhdkit.formats.raw import create_raw
from vhdkit.formats.vhd.create import create_differencing, create_dynamic, create_fixed
from vhdkit.image import Layer
from vhdkit.units import KIB, MIB, SECTOR_SIZE, sectors_to_bytes, whole_sectors

BLOCK_SIZES = (512 * KIB, MIB, 2 * MIB, 4 * MIB)
BASE_KINDS = ("raw", "fixed", "dynamic")
MAX_SECTORS = whole_sectors(5 * MIB)


@dataclass(frozen=True)
class LayerPlan:
    """One layer: its kind, its size, and the runs (first sector, count) that are written to it in this order.

    `cleared` runs lose their bits afterwards, so that a dynamic base has data under clear bits.
    """

    kind: str
    sector_count: int
    block_size_bytes: int
    runs: tuple[tuple[int, int], ...]
    cleared: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class ChainPlan:
    """Layers, leaf first, and whether a dynamic base's bitmap is ignored."""

    layers: tuple[LayerPlan, ...]
    ignore_bitmaps: bool = False


def runs_within(sector_count: int, *, max_size: int = 6) -> st.SearchStrategy[tuple[tuple[int, int], ...]]:
    """Runs inside a disk of that many sectors, small and large ones, often at the edge of a block or page."""

    def run(first: int, count: int, snap: int) -> tuple[int, int]:
        first = min(first // snap * snap, sector_count - 1)
        return first, min(count, sector_count - first)

    firsts = st.integers(0, sector_count - 1)
    counts = st.one_of(st.integers(1, 40), st.sampled_from([1, 8, 1024, 1030, 4096]), st.integers(1, sector_count))
    one = st.builds(run, firsts, counts, st.sampled_from([1, 1, 8, 1024, 4096]))
    return st.lists(one, max_size=max_size).map(tuple)


@st.composite
def layer_plans(draw: st.DrawFn, kind: str) -> LayerPlan:
    """A layer of one kind."""
    sector_count = draw(st.one_of(st.integers(1, MAX_SECTORS), st.sampled_from([1, 8, 1024, 2048, 8192])))
    runs = draw(runs_within(sector_count))
    cleared = draw(runs_within(sector_count, max_size=3)) if kind == "dynamic" else ()
    return LayerPlan(kind, sector_count, draw(st.sampled_from(BLOCK_SIZES)), runs, cleared)


@st.composite
def chain_plans(draw: st.DrawFn, *, max_children: int = 5, min_children: int = 0) -> ChainPlan:
    """A base and differencing layers above it, each larger or smaller than the one below."""
    base = draw(layer_plans(draw(st.sampled_from(BASE_KINDS))))
    children = draw(st.lists(layer_plans("differencing"), min_size=min_children, max_size=max_children))
    return ChainPlan((*children, base), draw(st.booleans()))


def build(plan: ChainPlan, *, writable: bool = False) -> list[Layer]:
    """The open layers of a plan, leaf first. A write to a parent fails the test."""
    layers = []
    for number, layer_plan in enumerate(plan.layers):
        is_leaf = number == 0
        store = make_store(layer_plan, number)
        store.frozen = not (is_leaf and writable)
        layers.append(
            open_layer(
                store,
                format_name=FormatName.RAW if layer_plan.kind == "raw" else FormatName.VHD,
                writable=is_leaf and writable,
                ignore_bitmaps=plan.ignore_bitmaps,
            )
        )
    return layers


def make_store(plan: LayerPlan, number: int) -> MemStore:
    """The file of one layer. The bytes of every sector it writes identify the layer and the run."""
    size = sectors_to_bytes(plan.sector_count)
    store = MemStore(f"layer{number}.{'img' if plan.kind == 'raw' else 'vhd'}")
    if plan.kind == "raw":
        create_raw(store, size)
    elif plan.kind == "fixed":
        create_fixed(store, size)
    elif plan.kind == "dynamic":
        create_dynamic(store, size, block_size_bytes=plan.block_size_bytes)
    else:
        create_differencing(store, size, LINK, block_size_bytes=plan.block_size_bytes)
    layer = open_layer(store, format_name=FormatName.RAW if plan.kind == "raw" else FormatName.VHD, writable=True)
    for run_number, (first, count) in enumerate(plan.runs):
        layer.write(first, memoryview(pattern(first, count, 100 * number + run_number)))
    layer.close()
    for first, count in plan.cleared:
        clear_bits(store, first, count)
    return store


def pattern(first_sector: int, sector_count: int, tag: int) -> bytes:
    """Bytes that differ by sector and by tag, and are never zeros."""
    words = [(tag + 1) << 40 | index for index in range(first_sector, first_sector + sector_count)]
    return b"".join([word.to_bytes(8, "little") * (SECTOR_SIZE // 8) for word in words])


def clear_bits(store: MemStore, first_sector: int, sector_count: int) -> None:
    """Remove sectors from a dynamic or differencing image, but leave their bytes."""
    parsed = ParsedVhd.parse(store)
    per_block = whole_sectors(parsed.block_size_bytes)
    for block, entry in enumerate(parsed.entries):
        low = max(first_sector, block * per_block) - block * per_block
        high = min(first_sector + sector_count, (block + 1) * per_block) - block * per_block
        if entry == 0xFFFFFFFF or high <= low:
            continue
        raw = int.from_bytes(store.pread(sectors_to_bytes(entry), parsed.bitmap_bytes), "big")
        bits = 8 * parsed.bitmap_bytes
        raw &= ~(((1 << (high - low)) - 1) << (bits - high))
        store.pwrite(sectors_to_bytes(entry), raw.to_bytes(parsed.bitmap_bytes, "big"))


def interesting_sectors(plan: ChainPlan, rng: random.Random) -> list[int]:
    """The sectors of the leaf where an answer may change, their neighbours, and some others."""
    end = plan.layers[0].sector_count
    edges = {0, end}
    for layer in plan.layers:
        edges.add(layer.sector_count)
        edges.update(range(0, end, whole_sectors(layer.block_size_bytes)))
        for first, count in (*layer.runs, *layer.cleared):
            edges.update((first, first + count))
    near = {edge + step for edge in edges for step in (-1, 0, 1)}
    near.update(rng.randrange(end) for _ in range(60))
    return sorted(index for index in near if 0 <= index < end)
