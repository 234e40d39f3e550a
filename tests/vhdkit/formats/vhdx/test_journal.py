# SPDX-License-Identifier: Apache-2.0
"""What a session leaves in the headers: when the DataWriteGuid changes."""

from __future__ import annotations

from tests.harness.power import open_mem
from tests.vhdkit.formats.vhdx.images import BAT, PARENT, add_log, assert_equal_headers, image
from vhdkit.formats.vhdx.format import VHDX
from vhdkit.formats.vhdx.header import read_headers
from vhdkit.formats.vhdx.log import SECTOR, LogChange
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
