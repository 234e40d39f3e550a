# SPDX-License-Identifier: Apache-2.0
"""The table: which entry is which block's."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vhdkit.formats.vhdx.bat import Shape
from vhdkit.units import MIB


@given(
    size=st.integers(1, 1 << 46),
    power=st.integers(0, 8),
    sector_bytes=st.sampled_from([512, 4096]),
    has_parent=st.booleans(),
    data=st.data(),
)
def test_blocks_and_entries(size: int, power: int, sector_bytes: int, has_parent: bool, data: st.DataObject) -> None:
    """Every block has an entry inside the table that leads back to it, every chunk's bitmap one of its own."""
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
