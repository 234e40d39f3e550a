# SPDX-License-Identifier: Apache-2.0
"""Another header and other footers: complete after every power cut, and after every failing call."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.harness.power import BLOCK_SIZE, DISK_SIZE, child_scene, dynamic_scene
from tests.harness.stores import CrashStore, Fault, FaultyStore, MemStore, io_failed, no_space, sync_failed
from vhdkit import errors
from vhdkit.formats.vhd.dynamic import DynamicImage
from vhdkit.formats.vhd.metadata import read_metadata
from vhdkit.formats.vhd.opening import open_dynamic
from vhdkit.formats.vhd.switch import switch_header

SMALLER = DISK_SIZE - BLOCK_SIZE


def shrink(image: DynamicImage) -> None:
    """Change the header and both footers: one block less."""
    header, footer = image.metadata.header, image.metadata.footer
    assert header is not None
    entry_count = header.max_table_entries - 1
    switch_header(image, replace(header, max_table_entries=entry_count), footer=replace(footer, current_size=SMALLER))


def state_of(store: MemStore) -> tuple[int, int]:
    """Entries according to the header, size according to the footer that is used."""
    metadata = read_metadata(store)
    assert metadata.header is not None
    return metadata.header.max_table_entries, metadata.size_bytes


def test_header_and_footers_change_together() -> None:
    """Afterwards both footers have the new fields and point to the old place, where the new header is."""
    leaf = dynamic_scene(1).leaf
    before = read_metadata(leaf)
    shrink(open_dynamic(leaf, writable=True))
    after = read_metadata(leaf)
    assert state_of(leaf) == (3, SMALLER)
    assert after.footer == replace(before.footer, current_size=SMALLER, checksum=after.footer.checksum)
    assert after.copy is not None and after.copy.raw == after.tail.raw


def test_inv_footer_copy_holds_while_the_header_changes() -> None:
    """INV-FOOTER-COPY: a cut inside any step, and another one later, leaves the old state or the new."""
    scene = child_scene(2)
    old, new, seen = state_of(scene.leaf), (3, SMALLER), set()
    store = CrashStore(scene.leaf)

    def judge() -> None:
        for seed in range(16):
            rng = random.Random(f"{store.operation_count} {seed}")
            found = store.after_cut(rng)
            state = state_of(found)
            assert state in (old, new), (store.operation_count, seed)
            seen.add(state)
            open_dynamic(found, writable=True)
            assert state_of(found) == state  # mending did not mix the two states
            if state == old and seed < 4:
                again = CrashStore(found)
                again.watcher = lambda crash=again, luck=rng: judge_again(crash, luck)
                shrink(open_dynamic(again, writable=True))

    def judge_again(crash: CrashStore, rng: random.Random) -> None:
        assert state_of(crash.after_cut(rng)) in (old, new)

    image = open_dynamic(store, writable=True)
    store.watcher = judge
    shrink(image)
    assert seen == {old, new}


@pytest.mark.parametrize("operation", ["reserve", "write", "sync"])
@pytest.mark.parametrize("make_error", [io_failed, no_space, sync_failed])
def test_a_failing_call_leaves_one_state(operation: str, make_error: Callable[[], errors.VhdkitError]) -> None:
    """Whichever call fails, the error is reported and the image is in the old state or in the new one."""
    scene, states = dynamic_scene(3), set()
    for at in range(1, 12):
        store = FaultyStore(scene.leaf)
        image = open_dynamic(store, writable=True)
        store.faults.append(Fault(operation, make_error, at=at))
        try:
            shrink(image)
        except errors.VhdkitError:
            states.add(state_of(store))
            assert state_of(store) in ((4, DISK_SIZE), (3, SMALLER)), at
        else:
            break
    assert states


def test_the_file_is_as_long_as_before() -> None:
    """The temporary second header leaves nothing behind; the trailing footer is where it was."""
    leaf = dynamic_scene(4).leaf
    before = leaf.contents()
    image = open_dynamic(leaf, writable=True)
    assert image.metadata.header is not None
    switch_header(image, image.metadata.header)
    assert leaf.contents() == before


def test_a_header_in_free_space_needs_no_second_one() -> None:
    """If header and texts go to free sectors, the file does not grow, and a full disk does not matter."""
    leaf = dynamic_scene(4).leaf
    store = FaultyStore(leaf, Fault("reserve", no_space))
    image = open_dynamic(store, writable=True)
    assert image.metadata.header is not None
    switch_header(image, image.metadata.header, texts=[(3072, b"text".ljust(512))], home_bytes=1536)
    after = read_metadata(store)
    assert store.size() == leaf.size() and store.pread(3072, 4) == b"text"
    assert after.footer.data_offset == 1536 and after.copy is not None and after.copy.raw == after.tail.raw
