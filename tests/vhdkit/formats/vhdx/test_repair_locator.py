# SPDX-License-Identifier: Apache-2.0
"""A parent locator that cannot be read: what is kept of it, and what needs consent."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness.stores import MemStore
from tests.vhdkit.formats.vhdx.damaged import ALL, child, content, faults, repaired
from tests.vhdkit.formats.vhdx.images import PARENT, set_items
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.format import VHDX
from vhdkit.formats.vhdx.locator import build_locator, linkage_text
from vhdkit.formats.vhdx.metadata import read_metadata
from vhdkit.formats.vhdx.repair_headers import LOSS
from vhdkit.formats.vhdx.repair_locator import UNKNOWN_PARENT
from vhdkit.image import ParentRef

SECOND = uuid.UUID(int=77).bytes


def recorded(store: MemStore) -> ParentRef:
    """What the child records of its parent."""
    found = VHDX.facts(store).parent
    assert found is not None
    return found


def with_locator(store: MemStore, raw: bytes) -> None:
    """Replace the bytes of the locator."""
    set_items(store, lambda known: known.update({layout.ITEM_PARENT_LOCATOR: (layout.ITEM_IS_REQUIRED, raw)}))


def locator_of(store: MemStore) -> tuple[int, int]:
    """(offset, size) of the locator."""
    item = read_metadata(store).items.locator
    assert item is not None
    return item.offset_bytes, item.entry.length


def test_paths_that_cannot_be_read_leave_the_id() -> None:
    """A damaged path is dropped, the others stay; even without any path, the parent's id is kept."""
    store = child()
    expected = content(store)
    linkage = linkage_text(PARENT.linkage_id)
    texts = {"parent_linkage": linkage, "relative_path": ".\\base.vhdx", "volume_path": "x\0y"}
    with_locator(store, build_locator(texts))
    made, fixes = repaired(store)
    assert [(fix.code, fix.needs) for fix in fixes] == [("locator", None)] and faults(made) == []
    assert [one.text for one in recorded(made).names] == [".\\base.vhdx"] and content(made) == expected
    with_locator(store, build_locator({"parent_linkage": linkage, "volume_path": "x\0y"}))
    made, fixes = repaired(store)
    assert [one.text for one in recorded(made).names] == [UNKNOWN_PARENT]
    assert recorded(made).linkage_ids == (PARENT.linkage_id,)


def test_ids_are_found_wherever_they_stand() -> None:
    """If the table of pairs is garbage, ids are found by the text of linkages; a volume's id is not taken for one."""
    store = child()
    texts = {
        "parent_linkage": linkage_text(PARENT.linkage_id),
        "volume_path": f"\\\\?\\Volume{linkage_text(uuid.UUID(int=5).bytes)}\\base.vhdx",
        "parent_linkage2": linkage_text(SECOND),
    }
    raw = build_locator(texts)
    with_locator(store, raw[:18] + b"\x03\0" + b"\xff" * 36 + raw[56:])
    made, fixes = repaired(store)
    assert [(fix.code, fix.needs) for fix in fixes] == [("locator", None)]
    assert recorded(made).linkage_ids == (PARENT.linkage_id, SECOND)


@pytest.mark.parametrize("there", [True, False])
def test_a_child_without_an_id_needs_consent(there: bool) -> None:
    """With consent the child gets an id that no image has, so that `rebase` can set its parent."""
    store = child()
    expected = content(store)
    if there:
        with_locator(store, build_locator({"relative_path": ".\\base.vhdx"}))
    else:
        set_items(store, lambda known: known.pop(layout.ITEM_PARENT_LOCATOR))
    made, fixes = repaired(store)
    assert [(fix.code, fix.needs) for fix in fixes] == [("locator", LOSS)]
    made, fixes = repaired(store, ALL)
    assert faults(made) == [] and content(made) == expected and "rebase" in fixes[0].message
    assert recorded(made).linkage_id not in (PARENT.linkage_id, bytes(16))
    assert [one.text for one in recorded(made).names] == [".\\base.vhdx" if there else UNKNOWN_PARENT]
    assert repaired(made, ALL)[1] == []


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=24)), min_size=1, max_size=4))
def test_no_id_is_made_up_without_consent(damage: list[tuple[int, bytes]]) -> None:
    """Whatever the locator holds, an id recorded without consent comes from the item, and the disk is unchanged."""
    store = child()
    offset, size = locator_of(store)
    expected = content(store)
    for place, raw in damage:
        store.pwrite(offset + place % size, raw[: size - place % size])
    item = store.pread(offset, size)
    made, fixes = repaired(store)
    if fixes and not fixes[0].needs:
        for one in recorded(made).linkage_ids:
            assert uuid.UUID(bytes=one).hex in item.decode("latin-1").replace("\0", "").replace("-", "").lower()
    made, fixes = repaired(store, ALL)
    assert faults(made) in ([], ["locator-type"])
    assert faults(made) or content(made) == expected
