# SPDX-License-Identifier: Apache-2.0
"""Bits behind the end of the disk: vhdkit sets none, `check` reports them, a repair clears them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import vhdkit
from tests.harness.power import BLOCK_SIZE, DISK_SIZE, LINK
from tests.harness.stores import MemStore
from tests.harness.vhd_builder import Block, Vhd, bits_of, child, pattern
from tests.xenserver import faults_in, faults_of
from vhdkit.finding import Severity
from vhdkit.formats.draft import DraftStore
from vhdkit.formats.format import Consent
from vhdkit.formats.vhd import bitmap
from vhdkit.formats.vhd.bat import Bat
from vhdkit.formats.vhd.check import check_vhd
from vhdkit.formats.vhd.create import create_differencing, create_dynamic
from vhdkit.formats.vhd.last_block import bits_past_end
from vhdkit.formats.vhd.metadata import read_metadata
from vhdkit.formats.vhd.opening import open_dynamic
from vhdkit.formats.vhd.repair import repair_vhd
from vhdkit.formats.vhd.resize import grow_dynamic, plan_grow, shrink_dynamic
from vhdkit.image import Piece
from vhdkit.units import SECTOR_SIZE, whole_sectors

LAST = DISK_SIZE // BLOCK_SIZE
FIRST_OF_LAST = LAST * whole_sectors(BLOCK_SIZE)
INSIDE = whole_sectors(DISK_SIZE) - FIRST_OF_LAST


def new(*, differencing: bool) -> MemStore:
    """An empty image whose end is inside its last block."""
    store = MemStore("image.vhd")
    if differencing:
        create_differencing(store, DISK_SIZE, LINK, block_size_bytes=BLOCK_SIZE)
    else:
        create_dynamic(store, DISK_SIZE, block_size_bytes=BLOCK_SIZE)
    return store


def set_sectors(store: MemStore) -> list[int]:
    """The sectors of the last block whose bits are set in the file."""
    metadata = read_metadata(store)
    assert metadata.header is not None
    bat = Bat.load(store, metadata.header.table_offset, metadata.block_count)
    raw = store.pread(bat.block_start(len(bat) - 1), bitmap.bitmap_size(metadata.header.block_size))
    return [int(one) for one in bitmap.owned(raw, 8 * len(raw)).nonzero()[0]]


@pytest.mark.parametrize("differencing", [False, True])
@pytest.mark.parametrize("ignoring", [False, True])
@pytest.mark.parametrize("way", ["write", "write twice", "zeros", "copy"])
def test_no_way_of_writing_sets_bits_behind_the_end(way: str, ignoring: bool, differencing: bool) -> None:
    """A write up to the end of the disk owns exactly the sectors of the disk."""
    store = new(differencing=differencing)
    image = open_dynamic(store, writable=True, ignore_bitmaps=ignoring)
    data = memoryview(pattern(INSIDE * SECTOR_SIZE))
    if way == "copy":
        source = MemStore("source")
        source.pwrite(0, data)
        image.copy_in([Piece(FIRST_OF_LAST, INSIDE, source, 0)])
        assert image.owned_sectors(LAST) is None
        image.copy_in([Piece(FIRST_OF_LAST + 3, 2, source, 0)])
    elif way == "zeros":
        image.write(FIRST_OF_LAST, data[:SECTOR_SIZE])
        image.write_zeroes(FIRST_OF_LAST + 1, INSIDE - 1)
    else:
        image.write(FIRST_OF_LAST, data[: None if way == "write" else SECTOR_SIZE])
        image.write(FIRST_OF_LAST, data)
    assert image.owned_sectors(LAST) is None and not image.write(FIRST_OF_LAST, data[:SECTOR_SIZE])
    image.close()
    assert set_sectors(store) == list(range(INSIDE)) and not faults_in(store)


def test_a_merge_sets_no_bits_behind_the_end(tmp_path: Path) -> None:
    """XenServer can coalesce a child into which vhdkit merged a complete short block."""
    base, middle, leaf = (tmp_path / name for name in ("base.vhd", "middle.avhd", "leaf.avhd"))
    vhdkit.create_image(base, DISK_SIZE, block_size_bytes=BLOCK_SIZE)
    vhdkit.create_child(middle, base)
    vhdkit.create_child(leaf, middle)
    with vhdkit.open_disk(leaf, writable=True) as disk:
        disk.write(LAST * BLOCK_SIZE, pattern(INSIDE * SECTOR_SIZE))
    vhdkit.merge(leaf)
    assert faults_of(base) + faults_of(middle) == [] and vhdkit.check(middle) == []


def test_a_smaller_disk_owns_nothing_behind_its_end() -> None:
    """Shrinking into a block clears its bits behind the new end, and the batmap's."""
    blocks = {number: Block(pattern(BLOCK_SIZE // 2, number)) for number in range(4)}
    xen = {"creator": b"tap\0", "creator_version": 0x00010003, "batmap": b"\xf0", "chs": (60, 4, 17)}
    store = damaged(size=4 * BLOCK_SIZE, blocks=blocks, **xen)
    shrink_dynamic(open_dynamic(store, writable=True), 2 * BLOCK_SIZE + BLOCK_SIZE // 2)
    assert faults_in(store) == [] and set_sectors(store) == list(range(whole_sectors(BLOCK_SIZE // 2)))
    assert [one.code for one in check_vhd(store) if one.severity > Severity.NOTE] == []
    larger = open_dynamic(store, writable=True)
    grow_dynamic(larger, 4 * BLOCK_SIZE, plan_grow(larger, 4 * BLOCK_SIZE))
    assert faults_in(store) == []


def damaged(**fields: Any) -> MemStore:
    """A child as an earlier vhdkit left it after a merge: all bits of a short last block are set."""
    values: dict[str, Any] = {
        "size": DISK_SIZE, "block_size": BLOCK_SIZE, "chs": (45, 4, 17), "blocks": {LAST: Block(pattern(512))}
    }  # fmt: skip
    return child(**(values | fields)).build().store()


def test_bits_behind_the_end_are_reported_and_cleared() -> None:
    """The warning names the programs that fail; a repair clears those bits and changes nothing else."""
    store = damaged()
    (found,) = check_vhd(store)
    assert (found.code, found.severity) == ("bits-past-end", Severity.WARNING)
    assert found.structure == f"bitmap of block {LAST}" and "XenServer cannot coalesce" in found.message
    draft = DraftStore(store)
    fixes = repair_vhd(draft, Consent())
    assert [(fix.code, fix.needs) for fix in fixes] == [("bits-past-end", None)]
    for offset, raw in draft.diff():
        store.pwrite(offset, raw)
    assert set_sectors(store) == list(range(INSIDE)) and check_vhd(store) == [] and faults_in(store) == []


def test_bits_behind_the_end_of_a_dynamic_disk_are_a_note() -> None:
    """A disk without a parent is not coalesced, and QEMU sets all bits: this is not a fault."""
    image = Vhd(size=DISK_SIZE, block_size=BLOCK_SIZE, chs=(45, 4, 17), blocks={LAST: Block(pattern(512))})
    (found,) = check_vhd(image.build().store())
    assert (found.code, found.severity) == ("bits-past-end", Severity.NOTE)


def test_a_batmap_that_claims_too_much_is_cleared() -> None:
    """A batmap's bits for a short last block, for blocks without space and for partly owned ones are cleared."""
    blocks = {0: Block(pattern(BLOCK_SIZE)), 1: Block(b"x", bits_of({0}, BLOCK_SIZE)), LAST: Block(b"y")}
    store = damaged(blocks=blocks, creator=b"tap\0", creator_version=0x00010003, batmap=b"\xf0")
    assert sum(one.code == "batmap" for one in check_vhd(store)) == 3
    draft = DraftStore(store)
    assert "batmap" in [fix.code for fix in repair_vhd(draft, Consent())]
    assert check_vhd(draft) == [] and faults_in(draft) == []
    metadata = read_metadata(draft)
    assert metadata.batmap is not None and draft.pread(metadata.batmap.batmap_offset, 1) == b"\x80"


def test_a_disk_that_fills_its_last_block_has_no_such_bits() -> None:
    """A whole block has nothing behind its end, and neither has a block without space."""
    whole = child(size=2 * BLOCK_SIZE, block_size=BLOCK_SIZE, blocks={1: Block(b"x")}).build().store()
    for store in (whole, damaged(blocks={})):
        metadata = read_metadata(store)
        assert metadata.header is not None
        bat = Bat.load(store, metadata.header.table_offset, metadata.block_count)
        assert bits_past_end(store, metadata, bat) is None
