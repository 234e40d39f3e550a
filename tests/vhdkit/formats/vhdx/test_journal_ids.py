# SPDX-License-Identifier: Apache-2.0
"""When ids in the headers change: FileWriteGuid with any change of the file, DataWriteGuid with one of the disk."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness.stores import MemStore
from tests.vhdkit.formats.vhdx.images import BAT, PARENT, SIZE, add_log, image, page
from vhdkit.formats.vhdx.check import check_vhdx
from vhdkit.formats.vhdx.dump import dump_vhdx
from vhdkit.formats.vhdx.format import VHDX
from vhdkit.formats.vhdx.header import read_headers
from vhdkit.formats.vhdx.log import LogChange
from vhdkit.formats.vhdx.opening import open_vhdx
from vhdkit.image import read_extents
from vhdkit.store import ReadStore
from vhdkit.units import SECTOR_SIZE, whole_sectors


class Recording(MemStore):
    """A store that records every (FileWriteGuid, DataWriteGuid) written to a header."""

    def __init__(self, store: MemStore) -> None:
        super().__init__(store.name, sectors=dict(store._sectors), size_bytes=store.size())
        self.seen: list[tuple[bytes, bytes]] = []

    def pwrite(self, offset_bytes: int, data: bytes | bytearray | memoryview) -> None:
        """See `Store.pwrite`."""
        super().pwrite(offset_bytes, data)
        for place in read_headers(self):
            if place.offset_bytes == offset_bytes:
                self.seen.append((place.header.file_write_guid, place.header.data_write_guid))


def ids(store: ReadStore) -> tuple[bytes, bytes]:
    """The ids in both headers, which agree."""
    first, second = (place.header for place in read_headers(store))
    assert (first.file_write_guid, first.data_write_guid) == (second.file_write_guid, second.data_write_guid)
    return first.file_write_guid, first.data_write_guid


ACTION = st.sampled_from(["write", "zeroes", "trim", "flush", "seal", "read"])


@settings(max_examples=60)
@given(actions=st.lists(ACTION, max_size=8), child=st.booleans())
def test_a_session_brings_one_id_of_each_kind(actions: list[str], child: bool) -> None:
    """A session sets at most one new id of each kind, whatever it does, and none if it changes nothing."""
    store = Recording(image(parent=PARENT if child else None))
    before = ids(store)
    layer = open_vhdx(store, writable=True)
    for number, action in enumerate(actions):
        first = 2000 * (number % 4)
        if action == "write":
            layer.write(first, memoryview(bytes([number + 1]) * SECTOR_SIZE))
        elif action == "zeroes":
            layer.write_zeroes(first, 9)
        elif action == "trim":
            layer.trim(first, 9)
        elif action == "flush":
            layer.flush()
        elif action == "seal":
            layer.seal()
        else:
            read_extents(store, layer.extents(first, 1), memoryview(bytearray(SECTOR_SIZE)))
    layer.close()
    seen = [before, *store.seen]
    assert all(len({one[kind] for one in seen}) <= 2 for kind in range(2))
    changes = any(action in ("write", "zeroes", "trim") for action in actions)
    if not changes:
        assert ids(store)[1] == before[1]
    if "write" in actions:
        assert ids(store)[0] != before[0] and ids(store)[1] != before[1]


READERS: dict[str, Callable[[MemStore], object]] = {
    "open": open_vhdx,
    "read": lambda store: list(open_vhdx(store).extents(0, whole_sectors(SIZE))),
    "check": check_vhdx,
    "dump": dump_vhdx,
    "facts": VHDX.facts,
    "describe": VHDX.describe,
    "linkage": VHDX.linkage_id,
}


@pytest.mark.parametrize("verb", READERS)
@pytest.mark.parametrize("dirty", [False, True])
def test_reading_changes_nothing(verb: str, dirty: bool) -> None:
    """Reading changes not a single byte, even if the log was not replayed."""
    store = image()
    if dirty:
        add_log(store, [[LogChange(BAT, 4096, page(b"\0"))]])
    store.frozen = True
    READERS[verb](store)


def test_a_replay_and_new_names_keep_the_id_of_the_content() -> None:
    """What a guest sees stays, so the DataWriteGuid stays; the file changes, and so does its FileWriteGuid."""
    store = image(parent=PARENT)
    add_log(store, [[LogChange(BAT, 4096, page(b"\0"))]])
    before = ids(store)
    open_vhdx(store, writable=True).close()
    replayed = ids(store)
    assert replayed[0] != before[0] and replayed[1] == before[1]
    VHDX.relink(store, PARENT)
    assert ids(store)[0] != replayed[0] and ids(store)[1] == before[1]
