# SPDX-License-Identifier: Apache-2.0
"""States of blocks in an open image."""

from __future__ import annotations

import pytest

from tests.harness.power import open_mem
from tests.harness.stores import MemStore
from tests.vhdkit.formats.vhdx.images import BAT, METADATA, PARENT, SIZE, add_log, image, page, set_entry
from vhdkit.errors import CorruptImage, CorruptReason
from vhdkit.formats.probe import open_layer
from vhdkit.formats.vhdx.bat import BlockState
from vhdkit.formats.vhdx.create import create, new_disk
from vhdkit.formats.vhdx.format import VHDX
from vhdkit.formats.vhdx.log import LogChange
from vhdkit.units import MIB


@pytest.mark.parametrize("state", [BlockState.UNDEFINED, BlockState.ZERO, BlockState.UNMAPPED])
def test_zero_states_of_a_child(state: BlockState) -> None:
    """Blocks of zeros hide the parent, and a write to a part of one makes it fully present."""
    base = image()
    with open_mem(base, writable=True) as disk:
        disk.write(0, b"p" * SIZE)
    parents, child = [open_layer(base.copy(frozen=True))], image(parent=PARENT)
    set_entry(child, 1, state)
    with open_mem(child, parents, writable=True) as disk:
        assert disk.read(0, 3 * MIB) == b"p" * MIB + bytes(MIB) + b"p" * MIB
        disk.write(MIB + 512, b"d" * 512)
    assert child.pread(BAT + 8, 1)[0] & 7 == BlockState.FULLY_PRESENT
    with open_mem(child, parents) as disk:
        assert disk.read(MIB, MIB) == bytes(512) + b"d" * 512 + bytes(MIB - 1024)
        assert disk.read(2 * MIB, MIB) == b"p" * MIB


def test_a_new_block_lies_after_a_truncated_last_block() -> None:
    """A file may end inside its last block, past the end of the disk: that space stays the block's."""
    store = MemStore("cut.vhdx")
    create(store, new_disk(4 * MIB + 4096), 4 * MIB)
    first = store.size()
    store.truncate(first + 4096)
    store.pwrite(3 * MIB + 8, (first | 6).to_bytes(8, "little"))  # the block of the last page
    layer = VHDX.open(store, writable=True)
    layer.write(0, memoryview(b"x" * 512))
    assert layer.block_offset(0) >= first + 4 * MIB
    layer.close()
    assert VHDX.check(store) == []


def test_a_doubtful_image_is_refused_before_its_log_is_replayed() -> None:
    """An image that is refused for writing is not changed."""
    store = image()
    set_entry(store, 1, 0, 8)
    add_log(store, [[LogChange(METADATA + 512 * 1024, 4096, page(b"y"))]])
    before = store.contents()
    with pytest.raises(CorruptImage) as caught:
        VHDX.open(store, writable=True)
    assert caught.value.reason is CorruptReason.BAT_RESERVED and store.contents() == before
