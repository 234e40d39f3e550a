# SPDX-License-Identifier: Apache-2.0
"""Recording another parent, or other names of the same parent, in a VHDX child."""

from __future__ import annotations

import random
import uuid

import pytest

from tests.harness.stores import CrashStore, MemStore
from vhdkit import errors
from vhdkit.formats.vhdx.create import create, new_disk
from vhdkit.formats.vhdx.format import VHDX
from vhdkit.image import ParentRef
from vhdkit.units import MIB

OLD, NEW = uuid.UUID(int=1).bytes, uuid.UUID(int=2).bytes


def parent(linkage_id: bytes, folder: str) -> ParentRef:
    """A parent in a folder."""
    return ParentRef.of_paths(
        linkage_id, 0, relative=f".\\{folder}\\base.vhdx", absolute=f"\\srv\\{folder}\\base.vhdx", name="base.vhdx"
    )


def child() -> MemStore:
    """A child of `OLD`."""
    store = MemStore("child.avhdx")
    create(store, new_disk(3 * MIB), MIB, parent=parent(OLD, "old"))
    return store


def recorded(store: MemStore) -> tuple[bytes, set[str]]:
    """The parent's id and its paths, as the child records them."""
    found = VHDX.facts(store).parent
    assert found is not None
    return found.linkage_id, {one.text for one in found.names}


def test_a_child_records_its_new_parent() -> None:
    """Id and paths are the new ones; the disk reads as before, so its own DataWriteGuid stays."""
    store = child()
    before = VHDX.linkage_id(store)
    VHDX.relink(store, parent(NEW, "x" * 500))
    assert recorded(store) == (NEW, {f".\\{'x' * 500}\\base.vhdx", f"\\srv\\{'x' * 500}\\base.vhdx"})
    assert VHDX.linkage_id(store) == before and VHDX.check(store) == []


def test_a_second_id_is_recorded_beside_the_first() -> None:
    """A parent that is about to get another id is found by either id."""
    store = child()
    ref = ParentRef((NEW, OLD), 0, parent(NEW, "new").names)
    VHDX.relink(store, ref)
    found = VHDX.facts(store).parent
    assert found is not None and found.linkage_ids == (NEW, OLD)


@pytest.mark.parametrize("seed", range(3))
def test_a_power_cut_leaves_the_old_parent_or_the_new_one(seed: int) -> None:
    """A cut at any write or sync leaves id and paths all old or all new, and the file can be opened for writing."""
    store, judged = CrashStore(child()), 0
    old = recorded(store.copy())
    new = (NEW, {".\\new\\base.vhdx", "\\srv\\new\\base.vhdx"})

    def judge() -> None:
        nonlocal judged
        for cut in range(3):
            found = store.after_cut(random.Random(f"{seed} {store.operation_count} {cut}"))
            assert recorded(found) in (old, new)
            VHDX.open(found, writable=True).close()
            assert recorded(found) in (old, new)
            judged += 1

    store.watcher = judge
    VHDX.relink(store, parent(NEW, "new"))
    store.watcher = None
    assert recorded(store.copy()) == new and judged > 30


def test_an_image_without_a_parent_cannot_get_one() -> None:
    """An image without a parent is refused."""
    store = MemStore("base.vhdx")
    create(store, new_disk(MIB), MIB)
    with pytest.raises(errors.InvalidArgument, match="has no parent"):
        VHDX.relink(store, parent(NEW, "new"))
