# SPDX-License-Identifier: Apache-2.0
"""A merged VHDX takes over the leaf's metadata items that are marked as belonging to the virtual disk."""

from __future__ import annotations

import random
import uuid

import pytest

import vhdkit
from tests.harness.stores import CrashStore, MemStore
from tests.vhdkit.formats.vhdx.images import PARENT, image, set_items
from vhdkit.formats.vhdx import adopt, layout
from vhdkit.formats.vhdx.adopt import take_over_disk
from vhdkit.formats.vhdx.format import VHDX
from vhdkit.formats.vhdx.items import inherited, read_items
from vhdkit.formats.vhdx.metadata import read_metadata
from vhdkit.formats.vhdx.opening import open_vhdx
from vhdkit.store import Store

OF_DISK, OF_USER = layout.ITEM_IS_VIRTUAL_DISK, layout.ITEM_IS_USER
MINE, GONE, SHARED, LEAF = (uuid.UUID(int=number).bytes for number in range(101, 105))


def base() -> MemStore:
    """An image with an item of its own, and two items of the disk that differ in its child."""
    store = image()

    def change(found: dict[bytes, tuple[int, bytes]]) -> None:
        found[MINE] = OF_USER, b"stays"
        found[GONE] = OF_USER | OF_DISK, b"goes"
        found[SHARED] = OF_USER | OF_DISK, b"old"

    set_items(store, change)
    return store


def leaf(*, size: int = 600) -> MemStore:
    """A child whose disk has another id and more items, one of them empty."""
    store = image(parent=PARENT)

    def change(found: dict[bytes, tuple[int, bytes]]) -> None:
        flags, _ = found[layout.ITEM_VIRTUAL_DISK_ID]
        found[layout.ITEM_VIRTUAL_DISK_ID] = flags, bytes(range(16))
        found[SHARED] = OF_USER | OF_DISK, b"new value"
        found[LEAF] = OF_USER | OF_DISK, b"x" * size
        found[uuid.UUID(int=200).bytes] = OF_DISK, b""

    set_items(store, change)
    return store


def items_of(store: Store) -> dict[tuple[bytes, int], bytes]:
    """All items except file parameters and locator: bytes by id and flags."""
    metadata = read_metadata(store)
    found = read_items(metadata.view, metadata.regions.metadata)
    kept = {layout.ITEM_FILE_PARAMETERS, layout.ITEM_PARENT_LOCATOR}
    return {
        (one.entry.item_id, one.entry.flags): metadata.view.pread(one.offset_bytes, one.entry.length)
        for one in found.all
        if one.entry.item_id not in kept
    }


def expected() -> dict[tuple[bytes, int], bytes]:
    """The items after a merge of `leaf` into `base`: those of the leaf's disk, and the base's own item."""
    metadata = read_metadata(leaf())
    disk = {(one, flags): raw for one, flags, raw in inherited(metadata.view, metadata.items)}
    return disk | {(MINE, OF_USER): b"stays"}


def test_the_disks_items_are_replaced_and_others_stay() -> None:
    """The leaf's items of the disk replace the target's; the DataWriteGuid stays, and the file is sound."""
    store = base()
    before = VHDX.linkage_id(store)
    opened = open_vhdx(store, writable=True)
    take_over_disk(opened, open_vhdx(leaf()))
    opened.finish()
    assert items_of(store) == expected()
    assert VHDX.linkage_id(store) == before and VHDX.check(store) == []
    again = store.copy(frozen=True)
    take_over_disk(open_vhdx(again), open_vhdx(leaf()))  # writes nothing where nothing differs


@pytest.mark.parametrize("seed", range(2))
def test_a_power_cut_leaves_the_old_items_or_the_new_ones(seed: int) -> None:
    """A cut at any write or sync leaves all items old, or all new."""
    store = CrashStore(base())
    old, new, seen = items_of(store.copy()), expected(), set()

    def judge() -> None:
        for cut in range(3):
            found = store.after_cut(random.Random(f"{seed} {store.operation_count} {cut}"))
            assert items_of(found) in (old, new)
            seen.add(items_of(found) == new)
            open_vhdx(found, writable=True).close()
            assert items_of(found) in (old, new)

    store.watcher = judge
    opened = open_vhdx(store, writable=True)
    take_over_disk(opened, open_vhdx(leaf()))
    opened.finish()
    assert seen == {False, True}


KNOWN_BYTES = 4 + 4 + 16  # sector sizes and id


def with_item(store: MemStore, size: int) -> MemStore:
    """The image with one more item of the disk."""
    set_items(store, lambda found: found.update({LEAF: (OF_USER | OF_DISK, b"x" * size)}))
    return store


def refused(store: MemStore, source: MemStore) -> None:
    """Neither a dry run nor a real one changes the image."""
    store.frozen = True
    opened = open_vhdx(store, writable=True)
    for dry_run in (True, False):
        with pytest.raises(vhdkit.InvalidArgument, match="do not fit"):
            take_over_disk(opened, open_vhdx(source), dry_run=dry_run)


def test_items_without_room_in_the_region_are_refused() -> None:
    """Old and new items exist at the same time, so both must fit into the metadata region."""
    store = with_item(image(), 300_000)
    opened = open_vhdx(store.copy(), writable=True)
    take_over_disk(opened, open_vhdx(with_item(image(parent=PARENT), 600_000)))
    refused(store, with_item(image(parent=PARENT), 700_000))


@pytest.mark.parametrize("above", [0, 1])
def test_the_items_of_a_disk_have_a_limit(above: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Items up to the limit are taken over; one byte more is refused."""
    monkeypatch.setattr(adopt, "MAX_ITEMS_BYTES", KNOWN_BYTES + 1000)
    source = with_item(image(parent=PARENT), 1000 + above)
    if above:
        refused(image(), source)
        return
    store = image()
    take_over_disk(open_vhdx(store, writable=True), open_vhdx(source), dry_run=True)
