# SPDX-License-Identifier: Apache-2.0
"""What an image lacks of its parents: it reads the same at every step, and afterwards without the pulled layers."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness.chains import ChainPlan, LayerPlan, build, chain_plans, interesting_sectors, make_store
from tests.harness.model import walk_read
from tests.harness.stores import MemStore
from tests.support import daily_or_nightly
from vhdkit import formats
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.verbs.merge_steps import fold
from vhdkit.chain.verbs.pull_plan import _part, plan_pull
from vhdkit.formats.probe import open_layer
from vhdkit.image import Layer, Piece
from vhdkit.units import KIB, MIB, sectors_to_bytes, whole_sectors


def content_of(layers: list[Layer]) -> bytes:
    """The whole disk."""
    chain = Chain(layers)
    buffer = bytearray(chain.size_bytes)
    chain.read_into(0, memoryview(buffer))
    return bytes(buffer)


cases = chain_plans(min_children=1, max_children=4).flatmap(
    lambda plan: st.tuples(st.just(plan), st.integers(1, len(plan.layers) - 1))
)


@given(cases, st.randoms(use_true_random=False))
@settings(max_examples=daily_or_nightly(30, 200), deadline=None)
def test_it_reads_the_same_with_and_without_the_pulled_layers(case: tuple[ChainPlan, int], rng: random.Random) -> None:
    """INV-PULL-PRESERVES: at every step the image reads the same on its parents; filled, it reads the same on what is
    below the pulled layers, or, if that is nothing, without a parent, even for a reader that ignores bitmaps."""
    plan, last = case
    layers = build(plan)
    before = content_of(layers)
    sectors = interesting_sectors(plan, rng)
    naive = [walk_read(layers, sector) for sector in sectors]
    pulled, below = layers[1 : last + 1], layers[last + 1 :]
    store = make_store(plan.layers[0], 0)
    image = open_layer(store, writable=True)
    pulling = plan_pull(image, pulled, below)
    for pieces in pulling.blocks():
        if pieces:
            image.copy_in(pieces)
            assert [walk_read([image, *pulled, *below], sector) for sector in sectors[::7]] == naive[::7]
    assert pulling.is_done()
    image.seal()
    filled = open_layer(store)
    assert content_of([filled, *pulled, *below]) == before
    if below:
        assert content_of([filled, *below]) == before
        return
    formats.of(image).prepare_detach(image)
    image.seal()
    image.refuse_writing()
    formats.of(image).detach(store)
    alone = open_layer(store)
    assert alone.facts.parent is None and alone.unique_id == filled.unique_id
    assert content_of([alone]) == before
    assert content_of([open_layer(store, ignore_bitmaps=True)]) == before
    assert formats.of(alone).check(store) == []


def test_what_is_owned_is_neither_read_nor_copied() -> None:
    """A pull that is repeated moves nothing, and after an interruption only what is still missing."""
    layers = build(
        ChainPlan((layer("differencing", (5, 3)), layer("differencing", (0, 2000)), layer("dynamic", (900, 3000))))
    )
    store = make_store(layer("differencing", (5, 3)), 0)
    image = open_layer(store, writable=True)
    plan = plan_pull(image, layers[1:2], layers[2:])
    first, *others = [pieces for pieces in plan.blocks() if pieces]
    assert [(one.sector_index, one.sector_count) for one in first] == [(0, 5), (8, 1016)] and len(others) == 1
    image.copy_in(first)
    assert [pieces for pieces in plan.blocks() if pieces] == others
    assert fold(plan, image) == (sectors_to_bytes(976), 0)
    assert fold(plan, image) == (0, 0) and plan.is_done()


def layer(kind: str, *runs: tuple[int, int]) -> LayerPlan:
    """A layer of 4 MiB, in blocks of 512 KiB."""
    return LayerPlan(kind, whole_sectors(4 * MIB), 512 * KIB, runs)


@pytest.mark.parametrize("is_last", [False, True])
def test_zeros(is_last: bool) -> None:
    """Zeros of a pulled layer are owned where they hide what stays below; where nothing stays, only in blocks with
    space."""
    upper = make_store(layer("differencing", (3000, 5)), 1)
    with_zeros = open_layer(upper, writable=True)
    with_zeros.write_zeroes(0, 1024)
    with_zeros.write_zeroes(3072, 10)
    with_zeros.close()
    base = open_layer(make_store(layer("dynamic", (0, 1024)), 2))
    image = open_layer(make_store(layer("differencing", (3072, 1)), 0), writable=True)
    pulled = [open_layer(upper), base] if is_last else [open_layer(upper)]
    plan = plan_pull(image, pulled, [] if is_last else [base])
    found = [(one.sector_index, one.sector_count, one.source is None) for pieces in plan.blocks() for one in pieces]
    if is_last:
        assert found == [(2048, 952, True), (3000, 5, False), (3005, 67, True), (3073, 9, True), (3082, 1014, True)]
    else:
        assert found == [(0, 1024, True), (3000, 5, False), (3073, 9, True)]


def test_a_part_of_a_piece_keeps_its_place_in_its_file() -> None:
    """The parts of a piece whose end lies past the end of a raw file have only the end that is missing."""
    piece = Piece(8, 4, MemStore(), 4096, 100)
    assert _part(piece, 1, 2) == Piece(9, 2, piece.source, 4096 + 512, 0)
    assert _part(piece, 3, 1) == Piece(11, 1, piece.source, 4096 + 3 * 512, 100)
    assert _part(Piece(8, 4), 1, 2) == Piece(9, 2)
