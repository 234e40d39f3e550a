# SPDX-License-Identifier: Apache-2.0
"""The table: which entry is which block's."""

from __future__ import annotations

from unittest import mock

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vhdkit.formats.vhdx import bat as bat_module
from vhdkit.formats.vhdx.bat import Bat, BlockState, Shape, state_of
from vhdkit.units import MIB


@given(
    size=st.integers(1, 1 << 46),
    power=st.integers(0, 8),
    sector_bytes=st.sampled_from([512, 4096]),
    has_parent=st.booleans(),
    data=st.data(),
)
def test_blocks_and_entries(size: int, power: int, sector_bytes: int, has_parent: bool, data: st.DataObject) -> None:
    """Every block has an entry in the table that maps back to it, and every chunk's bitmap has one of its own."""
    shape = Shape(size, MIB << power, sector_bytes, has_parent=has_parent)
    block = data.draw(st.integers(0, shape.block_count - 1))
    entry = shape.block_entry(block)
    assert entry < shape.entry_count and shape.block_of(entry) == block
    assert f"block {block}" in shape.structure(entry)
    bitmap = shape.bitmap_entry(block // shape.ratio)
    assert shape.block_of(bitmap) is None and bitmap > entry and "sector bitmap" in shape.structure(bitmap)
    last = shape.bitmap_entry(shape.chunk_count - 1)
    if has_parent:
        assert last == shape.entry_count - 1
    else:
        assert shape.block_entry(shape.block_count - 1) == shape.entry_count - 1


def test_the_last_chunk_of_a_disk_without_parent_has_no_bitmap_entry() -> None:
    """A whole chunk, and one block more; ratio 4096 for blocks of 1 MiB."""
    counts = [
        Shape(blocks * MIB, MIB, 512, has_parent=parent).entry_count
        for blocks in (4096, 4097)
        for parent in (False, True)
    ]
    assert counts == [4096, 4097, 4098, 8194]


@given(
    blocks=st.integers(1, 70),
    has_parent=st.booleans(),
    run=st.tuples(st.integers(0, 80), st.integers(0, 80)),
    part=st.integers(1, 50),
    states=st.sets(st.sampled_from(list(BlockState)[1:]), min_size=1),
    seed=st.integers(0, 1 << 30),
)
def test_blocks_in_a_state(
    blocks: int, has_parent: bool, run: tuple[int, int], part: int, states: set[BlockState], seed: int
) -> None:
    """Each block counts by its own entry, wherever the parts of the table begin and end; 16 blocks in a chunk."""
    shape = Shape(blocks * 256 * MIB, 256 * MIB, 512, has_parent=has_parent)
    entries = np.random.default_rng(seed).choice(list(BlockState), shape.entry_count).astype(np.uint64)
    first, stop = min(run), min(max(run), shape.entry_count)
    entries[:first] = entries[stop:] = 0
    bat = Bat(shape, MIB, entries, [(first, stop)] if first < stop else [])
    with mock.patch.object(bat_module, "_ENTRIES_AT_ONCE", part):
        found = bat.in_states(*states)
    assert found.tolist() == [state_of(bat.block(block)) in states for block in range(blocks)]
