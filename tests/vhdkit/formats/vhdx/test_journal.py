# SPDX-License-Identifier: Apache-2.0
"""What a session leaves in headers and log: when the DataWriteGuid changes, and what a failed write leaves."""

from __future__ import annotations

import contextlib

import pytest

import vhdkit
from tests.harness.power import open_mem
from tests.harness.stores import Fault, FaultyStore, no_space
from tests.vhdkit.formats.vhdx.images import BAT, PARENT, add_log, assert_equal_headers, image
from vhdkit.formats.vhdx.create import new_locator
from vhdkit.formats.vhdx.format import VHDX
from vhdkit.formats.vhdx.header import read_headers
from vhdkit.formats.vhdx.locator import build_locator
from vhdkit.formats.vhdx.log import SECTOR, LogChange
from vhdkit.formats.vhdx.opening import open_vhdx
from vhdkit.image import ParentRef
from vhdkit.store import Store
from vhdkit.units import MIB


def test_a_session_that_writes_brings_one_new_id() -> None:
    """With the first write; a flush and more writes keep it, and so does a session that only reads."""
    store = image()
    before = VHDX.linkage_id(store)
    with open_mem(store, writable=True) as disk:
        assert disk.read(0, 512) == bytes(512) and VHDX.linkage_id(store) == before
        disk.write(0, b"a" * 512)
        during = VHDX.linkage_id(store)
        disk.flush()
        disk.write(MIB, b"b" * 512)
    assert before != during == VHDX.linkage_id(store)
    assert_equal_headers(store)
    with open_mem(store, writable=True) as disk:
        disk.read(0, MIB)
    assert VHDX.linkage_id(store) == during


def test_a_replay_keeps_the_id() -> None:
    """The disk reads as before."""
    store = image()
    before = VHDX.linkage_id(store)
    add_log(store, [[LogChange(BAT, SECTOR, None)]])
    open_mem(store, writable=True).close()
    assert VHDX.linkage_id(store) == before
    assert_equal_headers(store)


def test_new_names_of_the_parent_keep_the_id() -> None:
    """And every session gives the file another FileWriteGuid."""
    store = image(parent=PARENT)
    before = read_headers(store)[0].header
    VHDX.relink(store, PARENT)
    after = read_headers(store)[0].header
    assert before.data_write_guid == after.data_write_guid and before.file_write_guid != after.file_write_guid
    assert_equal_headers(store)


def test_pages_that_could_not_be_put_in_their_places_are_put_there_at_the_end() -> None:
    """INV-LOG-WHOLE: whichever write of a change of metadata fails, closing makes all of the change or none."""
    names = ParentRef.of_paths(b"n" * 16, 0, relative=".\\new.vhdx", absolute="\\new.vhdx", name="new.vhdx")
    old, new, seen = (PARENT.linkage_id,), (names.linkage_id,), set()
    for at in range(1, 40):
        store = FaultyStore(image(parent=PARENT), Fault("write", no_space, at=at))
        opened = open_vhdx(store, writable=True)
        item = opened.metadata.items.locator
        assert item is not None
        writes = [(item.offset_bytes, build_locator(new_locator(names)))]
        try:
            opened.log_writes(writes)
        except vhdkit.NoSpace:
            seen.add(recorded(store))
        with contextlib.suppress(vhdkit.NoSpace):
            opened.finish()
        assert recorded(store) in (old, new)
        seen.add(recorded(store))
        if store.faults and store.faults[0].seen < at:
            break
    assert seen == {old, new} and at > 5
    assert_equal_headers(store)


def recorded(store: Store) -> tuple[bytes, ...]:
    """The ids that the image records for its parent."""
    parent = VHDX.facts(store).parent
    assert parent is not None
    return parent.linkage_ids


def test_an_opening_whose_file_got_a_log_from_another_one_stops_writing() -> None:
    """Entries that a failed change through another opening left in the log would be lost with the next header."""
    store = image()
    disk = open_mem(store, writable=True)
    disk.write(0, b"a" * 512)
    disk.chain.leaf.seal()
    add_log(store, [[LogChange(BAT, SECTOR, None)]])
    for _ in range(2):
        with pytest.raises(vhdkit.SyncFailed, match="another open handle"):
            disk.write(MIB, b"b" * 512)
    disk.close()
    assert VHDX.describe(store)[1].log_entries == 1
