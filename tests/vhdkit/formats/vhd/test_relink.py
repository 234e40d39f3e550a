# SPDX-License-Identifier: Apache-2.0
"""Changing the parent's names: complete after every power cut."""

from __future__ import annotations

import random

import pytest

from tests.harness.power import BLOCK_SIZE, LINK, child_scene
from tests.harness.stores import CrashStore, Fault, FaultyStore, MemStore, no_space
from vhdkit import errors
from vhdkit.formats.vhd.create import ParentLink
from vhdkit.formats.vhd.metadata import read_metadata
from vhdkit.formats.vhd.opening import open_dynamic
from vhdkit.formats.vhd.relink import relink

NEW_LINK = ParentLink(LINK.unique_id, 7, "moved.vhd", "..\\elsewhere\\moved.vhd", "\\srv\\elsewhere\\moved.vhd")
SEEDS = 12


def names_of(store: MemStore) -> tuple[str, ...]:
    """Every name that the image has for its parent."""
    metadata = read_metadata(store)
    return (metadata.parent_name, *(locator.text or "" for locator in metadata.locators))


def test_relink_changes_only_the_names() -> None:
    """After relinking, name, locators and timestamp are new; identity, blocks and both footers are as before."""
    leaf = child_scene(1).leaf
    before, blocks = read_metadata(leaf), open_dynamic(leaf).bat.entries.tolist()
    relink(open_dynamic(leaf, writable=True), NEW_LINK)
    after = read_metadata(leaf)
    assert names_of(leaf) == ("moved.vhd", NEW_LINK.relative, NEW_LINK.absolute)
    assert after.header is not None and before.header is not None
    assert after.header.parent_timestamp == 7
    assert after.header.parent_unique_id == before.header.parent_unique_id
    assert after.footer == before.footer
    assert after.copy is not None and after.copy.raw == after.tail.raw
    assert open_dynamic(leaf).bat.entries.tolist() == blocks


def test_relink_twice_keeps_working() -> None:
    """Names can change any number of times; new blocks go behind the leftovers."""
    leaf = child_scene(2).leaf
    for link in (NEW_LINK, LINK, NEW_LINK):
        relink(open_dynamic(leaf, writable=True), link)
    assert names_of(leaf)[0] == NEW_LINK.name
    image = open_dynamic(leaf, writable=True)
    image.write(0, memoryview(b"x" * BLOCK_SIZE))
    image.flush()
    assert names_of(leaf)[0] == NEW_LINK.name


def test_inv_footer_copy_holds_while_names_change() -> None:
    """INV-FOOTER-COPY: a power cut inside any step leaves the old names or the new ones, and every block."""
    scene = child_scene(3)
    old, blocks = names_of(scene.leaf), open_dynamic(scene.leaf).bat.entries.tolist()
    new = ("moved.vhd", NEW_LINK.relative, NEW_LINK.absolute)
    seen = set()
    store = CrashStore(scene.leaf)

    def judge() -> None:
        for seed in range(SEEDS):
            found = store.after_cut(random.Random(f"{store.operation_count} {seed}"))
            names = names_of(found)
            assert names in (old, new), (store.operation_count, seed, names)
            seen.add(names)
            assert open_dynamic(found, writable=True).bat.entries.tolist() == blocks
            assert names_of(found) in (old, new)  # mending did not mix old and new names

    image = open_dynamic(store, writable=True)
    store.watcher = judge
    relink(image, NEW_LINK)
    assert seen == {old, new}


def test_a_header_overwritten_in_place_would_be_caught() -> None:
    """The test above can fail: a header overwritten in place is lost in a cut between its sectors."""
    leaf = child_scene(4).leaf
    raw = leaf.pread(512, 1024)
    changed = bytes(byte ^ 1 if index in (70, 600) else byte for index, byte in enumerate(raw))
    store = CrashStore(leaf)
    broken = []

    def judge() -> None:
        for seed in range(40):
            found = store.after_cut(random.Random(seed))
            try:
                read_metadata(found)
            except Exception as error:
                broken.append(error)

    store.watcher = judge
    store.pwrite(512, changed)
    assert broken


@pytest.mark.parametrize("operation", ["reserve", "write"])
def test_a_full_disk_leaves_the_image_unchanged(operation: str) -> None:
    """Without space for the second header nothing changes, not even the place of the trailing footer."""
    leaf = child_scene(5).leaf
    before = leaf.contents()
    store = FaultyStore(leaf, Fault(operation, no_space))
    image = open_dynamic(store, writable=True)
    with pytest.raises(errors.NoSpace):
        relink(image, NEW_LINK)
    assert store.contents() == before
