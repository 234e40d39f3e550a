# SPDX-License-Identifier: Apache-2.0
"""Which blocks the changes of a damaged log concern."""

from __future__ import annotations

import random

import numpy as np

from tests.harness.power import vhdx_scene
from vhdkit.formats.draft import DraftStore
from vhdkit.formats.vhdx.layout import BAT_ENTRY_SIZE
from vhdkit.formats.vhdx.log import LogChange
from vhdkit.formats.vhdx.metadata import read_metadata
from vhdkit.formats.vhdx.repair_log import _mark_entries


def test_a_change_that_begins_and_ends_inside_entries() -> None:
    """Exactly the blocks are marked whose entries a change alters, wherever in the table it begins and ends."""
    rng = random.Random(1)
    store = vhdx_scene(1).leaf
    metadata = read_metadata(store)
    table, shape = metadata.regions.bat.file_offset, metadata.shape
    whole = shape.entry_count * BAT_ENTRY_SIZE
    store.pwrite(table, rng.randbytes(whole))  # only whether an entry changes counts, not what it says
    assert shape.block_count == shape.entry_count <= shape.ratio
    for _ in range(300):
        start, size = rng.randrange(whole + 8), rng.randrange(1, whole + 8)
        change = LogChange(table + start, size, rng.choice([None, rng.randbytes(size)]))
        after = store.copy()
        after.pwrite(table + start, bytes(size) if change.data is None else change.data)
        blocks = np.zeros(shape.block_count, dtype=np.bool_)
        _mark_entries(DraftStore(store), metadata, change, blocks)
        for number in range(shape.block_count):
            place = table + number * BAT_ENTRY_SIZE
            is_changed = store.pread(place, BAT_ENTRY_SIZE) != after.pread(place, BAT_ENTRY_SIZE)
            assert blocks[number] == is_changed, (start, size, number)
