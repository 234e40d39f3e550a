# SPDX-License-Identifier: Apache-2.0
"""Everything impossible in a VHDX is refused, with a reason, the structure and its offset."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.harness.stores import MemStore
from tests.vhdkit.formats.vhdx.images import (
    BAT,
    FIRST_BLOCK,
    LOG,
    LOG_GUID,
    METADATA,
    PARENT,
    add_log,
    image,
    page,
    place_block,
    set_entry,
    set_header,
    set_items,
    set_regions,
)
from vhdkit.errors import CorruptImage, CorruptReason
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.format import VHDX
from vhdkit.formats.vhdx.layout import RegionEntry
from vhdkit.formats.vhdx.locator import build_locator
from vhdkit.formats.vhdx.log import LogChange
from vhdkit.units import MIB, TIB

R = CorruptReason
OTHER = uuid.UUID(int=99).bytes
REQUIRED = layout.ITEM_IS_REQUIRED
Change = Callable[[MemStore], object]


def item(key: bytes, raw: bytes, flags: int = 6) -> Change:
    """Replace the bytes of a metadata item."""
    return lambda store: set_items(store, lambda known: known.update({key: (flags, raw)}))


def locator(pairs: dict[str, str]) -> Change:
    """Give the parent locator these pairs."""
    return item(layout.ITEM_PARENT_LOCATOR, build_locator(pairs), REQUIRED)


def raw_locator(change: Callable[[bytes], bytes]) -> Change:
    """Change bytes of the parent locator."""
    good = build_locator({"parent_linkage": f"{{{uuid.UUID(int=5)}}}", "relative_path": ".\\base.vhdx"})
    return item(layout.ITEM_PARENT_LOCATOR, change(good), REQUIRED)


def logged(change: LogChange) -> Change:
    """Put a change into the log that was not replayed."""
    return lambda store: add_log(store, [[change]])


def dirty(**values: int) -> Change:
    """Put an entry with these file sizes into the log."""
    return lambda store: add_log(store, [[LogChange(BAT, 4096, page(b"\0"))]], **values)


def patched(offset: int, raw: bytes) -> Change:
    """Change bytes of the file."""
    return lambda store: store.pwrite(offset, raw)


def both(*changes: Change) -> Change:
    """One change after the other."""
    return lambda store: [change(store) for change in changes]


LINKAGE = f"{{{uuid.UUID(int=5)}}}"
CASES: dict[str, tuple[CorruptReason, Change]] = {
    "identifier": (R.FILE_IDENTIFIER, lambda s: s.pwrite(0, b"vhdxfilf")),
    "no header": (R.HEADER_CHECKSUM, both(*(patched(one + 100, b"x") for one in layout.HEADER_OFFSETS))),
    "cut headers": (R.HEADER_OUTSIDE_FILE, lambda s: s.truncate(layout.HEADER_OFFSETS[0] + 100)),
    "header pair": (
        R.HEADER_PAIR,
        both(lambda s: set_header(s, sequence_number=5), lambda s: set_header(s, [1], data_write_guid=OTHER)),
    ),
    "version": (R.HEADER_VERSION, lambda s: set_header(s, version=2)),
    "log version": (R.LOG_VERSION, lambda s: set_header(s, log_version=1, log_guid=OTHER)),
    "log place": (R.LOG_PLACE, lambda s: set_header(s, log_offset=MIB + 4096)),
    "log outside": (R.LOG_PLACE, lambda s: set_header(s, log_length=64 * MIB)),
    "log too long": (R.LOG_PLACE, both(lambda s: s.truncate(3 << 30), lambda s: set_header(s, log_length=2 << 30))),
    "log sequence": (R.LOG_SEQUENCE, lambda s: set_header(s, log_guid=OTHER)),
    "log truncated": (R.LOG_TRUNCATED, dirty(flushed=64 * MIB)),
    "log end": (R.LOG_OFFSET, dirty(last=67 * TIB)),
    "log headers": (R.LOG_OFFSET, logged(LogChange(layout.HEADER_OFFSETS[0], 4096, page(b"x")))),
    "log itself": (R.LOG_OFFSET, logged(LogChange(LOG + 8192, 4096, page(b"x")))),
    "log far": (R.LOG_OFFSET, logged(LogChange(67 * TIB, 4096, page(b"x")))),
    "log zeros far": (R.LOG_OFFSET, logged(LogChange(FIRST_BLOCK, 80 * TIB, None))),
    "log over data": (
        R.LOG_OVER_DATA,
        both(lambda s: place_block(s, 0), logged(LogChange(FIRST_BLOCK, 4096, page(b"x")))),
    ),
    "region tables": (R.REGION_TABLE, both(*(patched(one + 20, b"x") for one in layout.REGION_TABLE_OFFSETS))),
    "region twice": (R.REGION_ENTRY, lambda s: set_regions(s, lambda e: e.append(e[0]))),
    "region missing": (R.REGION_ENTRY, lambda s: set_regions(s, lambda e: e.pop())),
    "region odd": (
        R.REGION_ENTRY,
        lambda s: set_regions(s, lambda e: e.__setitem__(0, replace(e[0], file_offset=BAT + 512))),
    ),
    "region unknown": (
        R.REGION_REQUIRED,
        lambda s: set_regions(s, lambda e: e.append(RegionEntry(OTHER, 64 * MIB, MIB, 1))),
    ),
    "region outside": (
        R.REGION_OUTSIDE_FILE,
        lambda s: set_regions(s, lambda e: e.__setitem__(0, replace(e[0], file_offset=64 * MIB))),
    ),
    "regions overlap": (
        R.STRUCTURES_OVERLAP,
        lambda s: set_regions(s, lambda e: e.__setitem__(0, replace(e[0], file_offset=METADATA))),
    ),
    "metadata table": (R.METADATA_TABLE, lambda s: s.pwrite(METADATA, b"metadatb")),
    "item place": (R.ITEM_PLACE, lambda s: s.pwrite(METADATA + 32 + 16, (100).to_bytes(4, "little"))),
    "items overlap": (
        R.ITEM_PLACE,
        lambda s: s.pwrite(METADATA + 64 + 16, s.pread(METADATA + 32 + 16, 4)),
    ),
    "item twice": (R.ITEM_PLACE, lambda s: s.pwrite(METADATA + 64, s.pread(METADATA + 32, 16))),
    "item unknown": (R.ITEM_REQUIRED, item(OTHER, b"x", REQUIRED)),
    "item missing": (
        R.ITEM_MISSING,
        lambda s: set_items(s, lambda known: known.pop(layout.ITEM_VIRTUAL_DISK_ID)),
    ),
    "item length": (R.ITEM_VALUE, item(layout.ITEM_VIRTUAL_DISK_ID, b"short")),
    "flags": (R.ITEM_VALUE, item(layout.ITEM_FILE_PARAMETERS, MIB.to_bytes(4, "little") + b"\x08\0\0\0", REQUIRED)),
    "incomplete": (R.INCOMPLETE_FILE, item(layout.ITEM_INCOMPLETE_FILE, b"", REQUIRED)),
    "block size": (
        R.BLOCK_SIZE,
        item(layout.ITEM_FILE_PARAMETERS, (3 * MIB).to_bytes(4, "little") + bytes(4), REQUIRED),
    ),
    "size": (R.VIRTUAL_SIZE, item(layout.ITEM_VIRTUAL_DISK_SIZE, (65 * TIB).to_bytes(8, "little"))),
    "odd size": (R.VIRTUAL_SIZE, item(layout.ITEM_VIRTUAL_DISK_SIZE, (MIB + 1).to_bytes(8, "little"))),
    "sector size": (R.SECTOR_SIZE, item(layout.ITEM_LOGICAL_SECTOR_SIZE, (1024).to_bytes(4, "little"))),
    "short BAT": (R.BAT_TOO_SHORT, item(layout.ITEM_VIRTUAL_DISK_SIZE, TIB.to_bytes(8, "little"))),
    "state 4": (R.BLOCK_STATE, lambda s: set_entry(s, 1, 4)),
    "state 5": (R.BLOCK_STATE, lambda s: set_entry(s, 1, 5)),
    "state 7": (R.BLOCK_STATE, lambda s: place_block(s, 1, state=7)),
    "block outside": (R.BLOCK_OUTSIDE_FILE, lambda s: set_entry(s, 2, 6, 64 * MIB)),
    "block far": (R.BLOCK_OUTSIDE_FILE, lambda s: set_entry(s, 2, 6, 1 << 63)),
    "block over headers": (R.BLOCK_OVER_METADATA, lambda s: set_entry(s, 2, 6, 0)),
    "block over log": (R.BLOCK_OVER_METADATA, lambda s: set_entry(s, 2, 6, LOG)),
    "blocks overlap": (R.BLOCKS_OVERLAP, lambda s: set_entry(s, 2, 6, place_block(s, 0))),
}
CHILD_CASES: dict[str, tuple[CorruptReason, Change]] = {
    "state 7 without bitmap": (R.BITMAP_MISSING, lambda s: place_block(s, 1, state=7)),
    "locator gone": (
        R.ITEM_MISSING,
        lambda s: set_items(s, lambda known: known.pop(layout.ITEM_PARENT_LOCATOR)),
    ),
    "locator type": (R.LOCATOR_TYPE, raw_locator(lambda raw: OTHER + raw[16:])),
    "locator cut": (R.LOCATOR_LENGTH, raw_locator(lambda raw: raw[:10])),
    "locator count": (R.LOCATOR_LENGTH, raw_locator(lambda raw: raw[:18] + b"\xff\xff" + raw[20:])),
    "locator outside": (R.LOCATOR_LENGTH, raw_locator(lambda raw: raw[:20] + b"\xff\xff\0\0" + raw[24:])),
    "locator odd": (R.LOCATOR_LENGTH, raw_locator(lambda raw: raw[:28] + b"\x1b\0" + raw[30:])),
    "locator text": (R.LOCATOR_TEXT, raw_locator(lambda raw: raw[:-2] + b"\0\xd8")),
    "locator zero": (R.LOCATOR_TEXT, raw_locator(lambda raw: raw[:-2] + b"\0\0")),
    "no linkage": (R.LOCATOR_KEYS, locator({"relative_path": "x"})),
    "null linkage": (R.LOCATOR_KEYS, locator({"parent_linkage": f"{{{uuid.UUID(int=0)}}}", "relative_path": "x"})),
    "odd linkage": (R.LOCATOR_KEYS, locator({"parent_linkage": "{5e9b69e7}", "relative_path": "x"})),
    "no path": (R.LOCATOR_KEYS, locator({"parent_linkage": LINKAGE})),
}


def refused(store: MemStore, reason: CorruptReason) -> CorruptImage:
    """The error with which the image is refused for reading and for writing, without any change."""
    before = store.contents() if store.size() < 64 * MIB else b""
    for writable in (False, True):
        with pytest.raises(CorruptImage) as caught:
            VHDX.open(store, writable=writable)
        assert caught.value.reason is reason and caught.value.path == store.name
        assert caught.value.structure is not None and caught.value.offset_bytes is not None
    assert store.size() >= 64 * MIB or store.contents() == before
    return caught.value


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_true_is_refused(case: str) -> None:
    """Opening fails with the reason, names structure and byte, and changes nothing; `check` reports the same."""
    reason, change = CASES[case]
    store = image()
    change(store)
    refused(store, reason)
    assert reason.value in [one.code for one in VHDX.check(store)]


@pytest.mark.parametrize("case", CHILD_CASES)
def test_what_cannot_be_true_of_a_child_is_refused(case: str) -> None:
    """The same for structures that only a differencing image has."""
    reason, change = CHILD_CASES[case]
    store = image(parent=PARENT)
    change(store)
    refused(store, reason)
    assert reason.value in [one.code for one in VHDX.check(store)]


def test_too_many_changes_in_a_log_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-BOUNDED: a hostile log costs bounded time."""
    monkeypatch.setattr("vhdkit.formats.vhdx.replay._MAX_CHANGES", 3)
    store = image()
    add_log(store, [[LogChange(BAT, 4096, page(b"\0"))] * 4])
    refused(store, R.LOG_ENTRY)


def test_reserved_bits_of_the_bat_prevent_writing_only() -> None:
    """A file that other programs refuse can be read, and `check` reports it."""
    store = image()
    set_entry(store, 1, 0, 8)
    damage = VHDX.open(store).damage
    assert damage is not None and damage.reason is R.BAT_RESERVED
    with pytest.raises(CorruptImage) as caught:
        VHDX.open(store, writable=True)
    assert caught.value.reason is R.BAT_RESERVED
    assert [one.code for one in VHDX.check(store)] == ["bat-reserved"]


def test_either_header_and_either_region_table_will_do() -> None:
    """One damaged copy is a warning; the other one is used."""
    for offset, code in (
        *((one + 100, "header-damaged") for one in layout.HEADER_OFFSETS),
        *((one + 20, "region-table-damaged") for one in layout.REGION_TABLE_OFFSETS),
    ):
        store = image()
        store.pwrite(offset, b"x")
        assert [one.code for one in VHDX.open(store).findings] == [code]
        assert code in [one.code for one in VHDX.check(store)]


def test_what_is_odd_but_harmless_is_reported() -> None:
    """`check` warns of region tables that differ, and of sector bitmaps in an image without a parent."""
    store = image()
    store.pwrite(layout.REGION_TABLE_OFFSETS[1], store.pread(layout.REGION_TABLE_OFFSETS[0], 16))
    set_regions(store, lambda entries: entries.append(RegionEntry(OTHER, 64 * MIB, MIB, 0)))
    first = store.pread(layout.REGION_TABLE_OFFSETS[0], layout.REGION_TABLE_SIZE)
    set_regions(store, lambda entries: None)
    store.pwrite(layout.REGION_TABLE_OFFSETS[0], first)
    assert [one.code for one in VHDX.check(store)] == ["region-tables-differ"]
    store = image()
    create_large(store)
    set_entry(store, 4096, 6, FIRST_BLOCK)
    assert "bitmap-unexpected" in [one.code for one in VHDX.check(store)]


def create_large(store: MemStore) -> None:
    """Give the disk more blocks than one chunk has."""
    item(layout.ITEM_VIRTUAL_DISK_SIZE, (5 << 30).to_bytes(8, "little"))(store)


def test_a_log_that_was_not_replayed_is_seen_and_left_alone() -> None:
    """Opened for reading, the image reads as after a replay, with a note; opening for writing replays the log."""
    store = image()
    offset = store.size()
    entry = (offset | 6).to_bytes(8, "little")
    add_log(store, [[LogChange(BAT, 4096, entry.ljust(4096, b"\0"))]], last=offset + MIB)
    before = store.contents()
    layer = VHDX.open(store)
    assert layer.block_offset(0) == offset and [one.code for one in layer.findings] == ["log-not-replayed"]
    assert store.contents() == before
    VHDX.open(store, writable=True).close()
    assert store.size() == offset + MIB and VHDX.check(store) == []
    assert VHDX.open(store).block_offset(0) == offset and VHDX.facts(store).findings == ()
    assert LOG_GUID not in store.pread(layout.HEADER_OFFSETS[0], 4096)
