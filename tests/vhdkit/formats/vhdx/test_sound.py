# SPDX-License-Identifier: Apache-2.0
"""The quick examination of a BAT, against the thorough one."""

from __future__ import annotations

from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness.stores import MemStore
from tests.vhdkit.formats.vhdx.images import BAT, PARENT, set_entry
from vhdkit.formats.vhdx import bat as bat_module
from vhdkit.formats.vhdx.bat import Bat
from vhdkit.formats.vhdx.create import create, new_disk
from vhdkit.formats.vhdx.entries import faults
from vhdkit.formats.vhdx.metadata import Metadata, read_metadata
from vhdkit.formats.vhdx.sound import is_sound
from vhdkit.units import GIB, MIB

BLOCK = 256 * MIB  # 16 blocks in a chunk


def made(child: bool, blocks: int = 40, more_bytes: int = 0) -> MemStore:
    """An image with three chunks, the last one incomplete; the file is as large as if all blocks were present."""
    store = MemStore("image.vhdx")
    create(store, new_disk(blocks * BLOCK - 4096), BLOCK, parent=PARENT if child else None)
    store.truncate(4 * MIB + blocks * BLOCK + 8 * MIB + more_bytes)
    return store


def table(store: MemStore) -> tuple[Metadata, Bat]:
    """What is examined."""
    metadata = read_metadata(store)
    return metadata, Bat.load(metadata.view, metadata.regions.bat.file_offset, metadata.shape)


ENTRY = st.tuples(
    st.integers(0, 52),
    st.sampled_from([0, 1, 2, 3, 6, 6, 6, 6, 7, 7, 4, 5]),
    st.one_of(
        st.integers(0, 42).map(lambda number: 12 * MIB + number * BLOCK),
        st.integers(0, 12).map(lambda number: number * MIB),
        st.integers(0, (1 << 44) - 1).map(lambda number: number * MIB),
    ),
)


@settings(max_examples=300)
@given(child=st.booleans(), entries=st.lists(ENTRY, max_size=8), piece=st.sampled_from([3, 17, 1 << 15]))
def test_sound_means_without_fault(child: bool, entries: list[tuple[int, int, int]], piece: int) -> None:
    """INV-BOUNDED: whatever the entries, a table found sound has no fault, wherever its parts end."""
    store = made(child)
    for number, state, place in entries:
        if child or number < 42:
            set_entry(store, number, state, place)
    metadata, bat = table(store)
    with mock.patch.object(bat_module, "_ENTRIES_AT_ONCE", piece):
        found = is_sound(metadata, bat)
    assert not (found and list(faults(metadata, bat)))


@pytest.mark.parametrize("child", [False, True])
@pytest.mark.parametrize("in_order", [False, True])
def test_usual_tables_are_found_sound(child: bool, in_order: bool) -> None:
    """Every block in its place, in any order, with the bitmaps of a child: no second examination is needed."""
    store = made(child)
    places = [12 * MIB + number * BLOCK for number in range(40)]
    for block, place in enumerate(places if in_order else reversed(places)):
        set_entry(store, block + block // 16, 7 if child and block % 3 else 6, place)
    for chunk in range(3 if child else 0):
        set_entry(store, chunk * 17 + 16, 6, (5 + chunk) * MIB)
    metadata, bat = table(store)
    assert is_sound(metadata, bat) and not list(faults(metadata, bat))
    set_entry(store, 16, 0)
    assert is_sound(*table(store)) is not child


@pytest.mark.parametrize("place", [BAT, MIB, 12 * MIB + BLOCK - MIB, 12 * MIB + 40 * BLOCK, (1 << 43) * MIB, 66 << 40])
def test_a_misplaced_block_is_left_to_the_thorough_examination(place: int) -> None:
    """A block over a structure or another block, past the end of the file or of the largest file, is found."""
    store = made(child=False, more_bytes=4 * GIB if place == 12 * MIB + BLOCK - MIB else 0)
    set_entry(store, 0, 6, 12 * MIB)
    assert is_sound(*table(store))
    set_entry(store, 1, 6, place)
    assert not is_sound(*table(store)) and list(faults(*table(store)))
