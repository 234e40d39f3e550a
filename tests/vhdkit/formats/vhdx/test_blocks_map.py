# SPDX-License-Identifier: Apache-2.0
"""INV-MAP-EQUALS-WALK over VHDX chains with blocks in every state, against a model that paints layers over others."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness.model import walk_read
from tests.harness.stores import MemStore
from tests.vhdkit.formats.vhdx.images import PARENT, SIZE, set_entry
from vhdkit.chain.engine.chain import Chain
from vhdkit.formats.vhdx.blocks import VhdxImage
from vhdkit.formats.vhdx.create import create, new_disk
from vhdkit.formats.vhdx.opening import open_vhdx
from vhdkit.image import ExtentKind
from vhdkit.units import GIB, MIB, SECTOR_SIZE, whole_sectors

SECTORS = whole_sectors(SIZE)


@dataclass(frozen=True)
class Plan:
    """A layer: the size of its blocks, the state of each, and (first, count) of the owned sectors of partial ones."""

    block: int
    states: tuple[int, ...]
    owned: tuple[tuple[int, int], ...]


@st.composite
def plans(draw: st.DrawFn) -> list[Plan]:
    """A chain, leaf first."""
    found = []
    for number in range(draw(st.integers(1, 4))):
        block = draw(st.sampled_from([MIB, 2 * MIB, 4 * MIB]))
        per_block = whole_sectors(block)
        states = st.sampled_from([0, 0, 1, 2, 3, 6, 7, 7] if number else [0, 1, 2, 3, 6])
        first = st.sampled_from([0, 1, 7, 8, 9, 2040, per_block - 1])
        runs = st.tuples(first, st.sampled_from([1, 2, 8, 100, per_block])).map(
            lambda run, whole=per_block: (run[0], min(run[1], whole - run[0]))  # type: ignore[misc]
        )
        count = SIZE // block
        found.append(
            Plan(
                block,
                tuple(draw(st.lists(states, min_size=count, max_size=count))),
                tuple(draw(st.lists(runs, min_size=count, max_size=count))),
            )
        )
    return found[::-1]


def built(plan: Plan, number: int, is_base: bool) -> VhdxImage:
    """The image of a plan; each sector of its data shows to which layer it belongs."""
    store = MemStore("image.vhdx")
    create(store, new_disk(SIZE), plan.block, parent=None if is_base else PARENT)
    bitmap = 0
    if 7 in plan.states:
        bitmap = store.size()
        store.truncate(bitmap + MIB)
        set_entry(store, 4 * GIB // plan.block, 6, bitmap)
    for block, (state, (first, count)) in enumerate(zip(plan.states, plan.owned, strict=True)):
        place = 0
        if state >= 6 or state in (1, 3):  # trimmed space that is still held: it is not read
            place = store.size()
            store.truncate(place + plan.block)
            store.pwrite(place, tag(number, block) * whole_sectors(plan.block))
        set_entry(store, block, state, place)
        if state == 7:
            size = plan.block // SECTOR_SIZE // 8
            bits = sum(1 << one for one in range(first, first + count))
            store.pwrite(bitmap + block * size, bits.to_bytes(size, "little"))
    store.frozen = True
    return open_vhdx(store)


def tag(number: int, block: int) -> bytes:
    """The content of the sectors of a block."""
    return bytes([16 * number + block + 1]) * SECTOR_SIZE


def model(chain: list[Plan]) -> tuple[bytes, list[int]]:
    """(content, owner or -1 of each sector): the layers painted over each other, from the base up."""
    content, owners = bytearray(SIZE), [-1] * SECTORS
    for number, plan in reversed(list(enumerate(chain))):
        per_block = whole_sectors(plan.block)
        for block, state in enumerate(plan.states):
            first, count = plan.owned[block] if state == 7 else (0, per_block)
            if state == 0:
                continue
            start, owner = block * per_block + first, number if state >= 6 else -1
            raw = tag(number, block) if state >= 6 else bytes(SECTOR_SIZE)
            content[start * SECTOR_SIZE : (start + count) * SECTOR_SIZE] = raw * count
            owners[start : start + count] = [owner] * count
    return bytes(content), owners


@settings(max_examples=20)
@given(chain=plans(), data=st.data())
def test_the_map_equals_the_walk_and_the_words(chain: list[Plan], data: st.DataObject) -> None:
    """INV-MAP-EQUALS-WALK: content and owner of every sector, zeros without space included, however it is asked."""
    layers = [built(plan, number, number == len(chain) - 1) for number, plan in enumerate(chain)]
    content, expected = model(chain)
    whole = Chain(layers)
    first = data.draw(st.integers(0, SECTORS - 1))  # asked first, while nothing is known
    some = bytearray(min(9, SECTORS - first) * SECTOR_SIZE)
    whole.read_into(first, memoryview(some))
    assert some == content[first * SECTOR_SIZE :][: len(some)]
    owners: list[int] = []
    for extent in whole.extents(0, SECTORS):
        owners += [extent.layer_index if extent.kind is ExtentKind.DATA else -1] * extent.sector_count
    assert owners == expected
    everything = bytearray(SIZE)
    whole.read_into(0, memoryview(everything))
    assert everything == content
    for sector in [*range(0, SECTORS, 301), first]:
        assert walk_read(layers, sector) == content[sector * SECTOR_SIZE : (sector + 1) * SECTOR_SIZE]
