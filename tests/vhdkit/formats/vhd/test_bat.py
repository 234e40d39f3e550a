# SPDX-License-Identifier: Apache-2.0
"""The block allocation table: tables of other programs, and which sectors are written back."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.stores import MemStore
from tests.harness.vhd_builder import FREE, KIB, MIB, Block, Vhd, pattern
from vhdkit.errors import CorruptImage, CorruptReason
from vhdkit.formats.vhd.bat import Bat
from vhdkit.formats.vhd.opening import open_dynamic
from vhdkit.image import read_extents

ENTRIES = st.lists(st.one_of(st.just(FREE), st.integers(min_value=0, max_value=FREE - 1)), min_size=1, max_size=400)


def _load(entries: list[int], at: int = 1536) -> Bat:
    store = MemStore()
    store.pwrite(at, struct.pack(f">{len(entries)}I", *entries))
    return Bat.load(store, at, len(entries))


@given(ENTRIES)
def test_entries_are_big_endian_sectors(entries: list[int]) -> None:
    """Every entry becomes the byte offset of its block, or -1 if it is all ones."""
    bat = _load(entries)
    assert len(bat) == len(entries)
    assert [bat.block_start(one) for one in range(len(bat))] == [-1 if one == FREE else one * 512 for one in entries]
    assert bat.allocated().tolist() == [one != FREE for one in entries]
    assert not bat.is_dirty


def test_quirk_entries_from_2_to_the_31_do_not_go_negative() -> None:
    """Quirk: a block at sector 2^31 or above is at 1 TiB or above, not at a negative offset."""
    bat = _load([0x80000000, 0xFFFFFFFE])
    assert bat.block_start(0) == 1 << 40
    assert bat.block_start(1) == 0xFFFFFFFE * 512
    bat.set(0, 0xFFFFFFFD * 512)
    assert bat.take_dirty()[0][:4] == bytes.fromhex("fffffffd")


@given(ENTRIES, st.data())
def test_changes_are_taken_as_whole_sectors(entries: list[int], data: st.DataObject) -> None:
    """The sectors of `take_dirty`, written over the table, make it equal to memory; once taken, it is clean."""
    bat, at = _load(entries), 1536
    changed = data.draw(st.dictionaries(st.integers(0, len(entries) - 1), st.integers(0, FREE - 1), max_size=8))
    for block, sector in changed.items():
        bat.set(block, sector * 512)
    assert bat.is_dirty == bool(changed)
    taken = bat.take_dirty()
    assert set(taken) == {block // 128 for block in changed}
    assert not bat.is_dirty and bat.take_dirty() == {}
    raw = bytearray(struct.pack(f">{len(entries)}I", *entries))
    for number, piece in taken.items():
        assert bat.sector_offset(number) == at + number * 512
        raw[number * 512 : number * 512 + len(piece)] = piece
    expected = [changed.get(block, entry) for block, entry in enumerate(entries)]
    assert bytes(raw) == struct.pack(f">{len(entries)}I", *expected)


def test_taken_changes_can_be_given_back() -> None:
    """After a failed write the sectors are dirty again, with their newest entries."""
    bat = _load([FREE] * 300)
    bat.set(5, 512)
    bat.set(299, 1024)
    taken = bat.take_dirty()
    bat.set(6, 2048)
    bat.mark_dirty(taken)
    again = bat.take_dirty()
    assert set(again) == {0, 2}
    assert again[0][20:28] == struct.pack(">II", 1, 4)


@pytest.mark.parametrize(
    "image",
    [
        Vhd(entry_count=1000, blocks={1: Block(pattern(512))}),
        Vhd(entry_count=1000, junk=b"\0\0\0\x09" * 998, blocks={1: Block(pattern(512))}),
        Vhd(junk=b"junk" * 100, blocks={1: Block(pattern(512))}, first_block=8192),
        Vhd(junk=b"", size=200 * MIB, block_size=2 * MIB, blocks={1: Block(pattern(512))}),
    ],
    ids=["longer-than-needed", "longer-with-junk", "junk-in-the-padding", "unpadded"],
)
def test_quirk_bat_longer_than_needed_or_with_junk_behind(image: Vhd) -> None:
    """Quirk: spare entries (XenServer preallocates) and the bytes behind the table are ignored."""
    layer = open_dynamic(image.build().store(frozen=True))
    assert len(layer.bat) == image.needed_entries
    assert layer.allocated_blocks().tolist() == [block == 1 for block in range(image.needed_entries)]
    buffer = bytearray(512)
    read_extents(layer.store, layer.extents(4096, 1), memoryview(buffer))
    assert buffer == pattern(512)


def test_quirk_bat_unpadded_at_the_very_end_of_the_file() -> None:
    """Quirk: the first block, or the footer, may follow the last entry directly, inside its sector."""
    image = Vhd(footer_at=1536 + 8, size=4 * MIB)
    built = image.build()
    built.pieces = [one for one in built.pieces if one[0] != 1536] + [(1536, b"\xff" * 8)]
    built.pieces.append((1544, image.footer()))
    layer = open_dynamic(built.store(frozen=True))
    assert not layer.allocated_blocks().any()


@pytest.mark.parametrize(
    ("count", "good"), [(1, False), (2, True), (3, True)], ids=["one-too-few", "exact", "one-spare"]
)
def test_bat_must_hold_every_block(count: int, good: bool) -> None:
    """A header with fewer entries than the virtual size needs is refused; exactly as many are accepted."""
    store = Vhd(size=4 * MIB, entry_count=count).build().store(frozen=True)
    if good:
        assert len(open_dynamic(store).bat) == 2
        return
    with pytest.raises(CorruptImage) as caught:
        open_dynamic(store)
    assert caught.value.reason is CorruptReason.BAT_TOO_SHORT


def test_a_partial_last_block_needs_an_entry() -> None:
    """One sector beyond a whole number of blocks makes one more block."""
    layer = open_dynamic(Vhd(size=MIB + 512, block_size=512 * KIB, blocks={2: Block(b"x")}).build().store())
    assert layer.allocated_blocks().tolist() == [False, False, True]
