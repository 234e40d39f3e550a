# SPDX-License-Identifier: Apache-2.0
"""States of blocks in an open image."""

from __future__ import annotations

import pytest

from tests.harness.power import open_mem
from tests.vhdkit.formats.vhdx.images import BAT, PARENT, SIZE, image, set_entry
from vhdkit.formats.probe import open_layer
from vhdkit.formats.vhdx.bat import BlockState
from vhdkit.units import MIB


@pytest.mark.parametrize("state", [BlockState.UNDEFINED, BlockState.ZERO, BlockState.UNMAPPED])
def test_zero_states_of_a_child(state: BlockState) -> None:
    """They hide the parent, and a write to a part of such a block makes it fully present."""
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
