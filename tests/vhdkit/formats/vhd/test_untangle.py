# SPDX-License-Identifier: Apache-2.0
"""Overlapping blocks are moved apart: only what they shared is in doubt."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness.stores import MemStore
from tests.harness.vhd_builder import KIB, MIB, PARENT_ID, Vhd, child, pattern, relative
from vhdkit.finding import Severity
from vhdkit.formats.draft import DraftStore
from vhdkit.formats.format import Consent, Fix
from vhdkit.formats.undo import apply_change, plan_change, roll_back
from vhdkit.formats.vhd.check import check_vhd
from vhdkit.formats.vhd.dynamic import DynamicImage
from vhdkit.formats.vhd.footers import image_id
from vhdkit.formats.vhd.metadata import read_metadata
from vhdkit.formats.vhd.opening import open_dynamic
from vhdkit.formats.vhd.repair import repair_vhd
from vhdkit.image import ExtentKind, read_extents
from vhdkit.units import SECTOR_SIZE, whole_sectors

BLOCK = 512 * KIB
SECTORS = BLOCK // SECTOR_SIZE
SPACE = SECTORS + 1  # with the bitmap
COUNT = 6


@dataclass(frozen=True)
class Scene:
    """An image given by its blocks' first sectors, relative to the first possible one; `bits_last`: bitmaps win."""

    starts: dict[int, int]
    differencing: bool = False
    bits_last: bool = True
    seed: int = 0
    size: int = COUNT * BLOCK

    def bits(self, block: int) -> list[bool]:
        """The sectors the block was meant to own: all of a dynamic disk's, runs of a differencing one's."""
        rng = random.Random(f"{self.seed} {block}")
        if not self.differencing or rng.random() < 0.5:
            return [True] * SECTORS
        return [rng.random() < 0.5 for _ in range(16) for _ in range(SECTORS // 16)]

    def data(self, block: int) -> bytes:
        """What the block was meant to hold."""
        whole = pattern(BLOCK, block + 1)
        owned = self.bits(block)
        return b"".join(whole[at * 512 : at * 512 + 512] if owned[at] else bytes(512) for at in range(SECTORS))

    def made(self) -> tuple[MemStore, int]:
        """The file, and the first sector where a block may begin."""
        image = Vhd(size=self.size, block_size=BLOCK, chs=(90, 4, 17))
        if self.differencing:
            image = child(size=self.size, block_size=BLOCK, chs=(90, 4, 17), locators={0: relative(".\\p.vhd")})
        image.first_block = 8 * KIB
        base = 16
        image.entries = {block: base + start for block, start in self.starts.items()}
        end = max((base + start + SPACE) * 512 for start in self.starts.values())
        image.footer_at = end
        store = image.build().store()
        writes = [(base + start + 1, self.data(block)) for block, start in self.starts.items()]
        for block, start in self.starts.items():
            raw = (
                int("".join("01"[bit] for bit in self.bits(block)), 2).to_bytes(SECTORS // 8, "big").ljust(512, b"\0")
            )
            writes.append((base + start, raw))
        for sector, raw in writes if self.bits_last else reversed(writes):
            store.pwrite(sector * 512, raw[: max(end - sector * 512, 0)])
        return store, base

    def sharing(self) -> set[tuple[int, int]]:
        """(block, sector in it) of all data that overlaps another block's data or bitmap."""
        users: dict[int, int] = {}
        for start in self.starts.values():
            for place in range(start, start + SPACE):
                users[place] = users.get(place, 0) + 1
        return {
            (block, place - start - 1)
            for block, start in self.starts.items()
            for place in range(start + 1, start + SPACE)
            if users[place] > 1
        }

    def shares_its_bitmap(self, block: int) -> bool:
        """Whether another block overlaps this one's bitmap."""
        place = self.starts[block]
        return any(one != block and start <= place < start + SPACE for one, start in self.starts.items())


def read(image: DynamicImage) -> bytes:
    """What the image itself reads as, ABSENT sectors as zeros."""
    buffer = bytearray(image.size_bytes)
    read_extents(image.store, image.extents(0, whole_sectors(image.size_bytes)), memoryview(buffer))
    return bytes(buffer)


def owners(image: DynamicImage) -> list[bool]:
    """For each sector, whether the image owns it."""
    found: list[bool] = []
    for one in image.extents(0, whole_sectors(image.size_bytes)):
        found += [one.kind is not ExtentKind.ABSENT] * one.sector_count
    return found


def repaired(store: MemStore, *, data_loss: bool = False) -> tuple[MemStore, list[Fix]]:
    """The store after a repair, made through its undo log."""
    draft = DraftStore(store)
    fixes = repair_vhd(draft, Consent(data_loss))
    made = store.copy()
    log = plan_change(made, image_id(draft), draft.diff(), draft.size())
    apply_change(made, log)
    undone = made.copy()
    roll_back(undone, log)
    assert undone.contents() == store.contents()
    return made, fixes


def within(ranges: tuple[tuple[int, int], ...], offset: int) -> bool:
    """Whether one of the ranges covers the byte."""
    return any(start <= offset < start + size for start, size in ranges)


def judge(scene: Scene) -> None:
    """Repair it; only shared data may be wrong afterwards and is reported, and the image is sound."""
    store, _ = scene.made()
    before = open_dynamic(store)
    assert before.damage is not None and not before.writable
    shown, owned_before = read(before), owners(before)
    made, fixes = repaired(store)
    (fix,) = [one for one in fixes if one.code == "blocks-overlap"]
    assert fix.needs is None and fix.lost == ()
    assert not [one for one in check_vhd(made) if one.severity is Severity.ERROR]
    after = open_dynamic(made.copy(), writable=True)
    now, owned = read(after), owners(after)
    sharing = scene.sharing()
    for block in scene.starts:
        meant, meant_bits = scene.data(block), scene.bits(block)
        for sector in range(SECTORS):
            at = block * BLOCK + sector * 512
            found = now[at : at + 512]
            if found != meant[sector * 512 : sector * 512 + 512]:
                assert (block, sector) in sharing, f"sector {sector} of block {block} is wrong, and was not shared"
                assert within(fix.doubtful, at)
            if scene.differencing and owned[at // 512] != meant_bits[sector]:
                assert scene.shares_its_bitmap(block) and within(fix.doubtful, at)
            if found != shown[at : at + 512] or owned[at // 512] != owned_before[at // 512]:
                assert scene.shares_its_bitmap(block), "what a reader sees that ignores the damage has changed"
        if not scene.differencing:
            in_doubt = {sector for sector in range(SECTORS) if within(fix.doubtful, block * BLOCK + sector * 512)}
            shared = {sector for one, sector in sharing if one == block}
            assert in_doubt <= shared or scene.shares_its_bitmap(block), "more is in doubt than was shared"
    again, more = repaired(made)
    assert "blocks-overlap" not in [one.code for one in more]
    assert read(open_dynamic(again)) == now


STARTS = st.dictionaries(
    st.integers(0, COUNT - 1),
    st.one_of(
        st.integers(0, 3 * SPACE),
        st.builds(lambda number, shift: number * SPACE + shift, st.integers(1, 3), st.sampled_from((-1, 0, 1))),
        st.integers(0, 4).map(lambda number: number * SECTORS),
    ),
    min_size=2,
)
SCENES = st.builds(Scene, STARTS, st.booleans(), st.booleans(), st.integers(0, 99)).filter(lambda one: one.sharing())


@settings(derandomize=False, max_examples=20)
@given(SCENES)
def test_only_what_was_shared_may_be_wrong(scene: Scene) -> None:
    """INV-UNTANGLED: blocks overlap at random: after the repair only what two of them shared may be wrong.

    Uses other examples in every run, in CI too.
    """
    judge(scene)


@pytest.mark.parametrize("bits_last", [True, False])
@pytest.mark.parametrize("differencing", [False, True])
def test_each_bitmap_on_its_neighbours_last_sector(differencing: bool, bits_last: bool) -> None:
    """INV-UNTANGLED: eight blocks of 2 MiB, each a sector too close: seven sectors are in doubt, not half the disk."""
    starts = {block: block * SECTORS for block in range(COUNT)}
    judge(Scene(starts, differencing, bits_last))
    size = 2 * MIB
    image = Vhd(size=8 * size, block_size=size, chs=(481, 4, 17), first_block=8 * KIB)
    image.entries = {block: 16 + block * 4096 for block in range(8)}
    image.footer_at = (16 + 7 * 4096 + 4097) * 512
    store = image.build().store()
    for block in range(8):
        store.pwrite((17 + block * 4096) * 512, pattern(size, block + 1))
    for block in range(8):
        store.pwrite((16 + block * 4096) * 512, b"\xff" * 512)
    made, fixes = repaired(store)
    assert sum(count for _, count in fixes[0].doubtful) == 7 * 512
    now = read(open_dynamic(made, writable=True))
    meant = b"".join(pattern(size, block + 1) for block in range(8))
    wrong = [at for at in range(0, len(meant), 512) if now[at : at + 512] != meant[at : at + 512]]
    assert wrong == [block * size + size - 512 for block in range(7)]


@pytest.mark.parametrize("differencing", [False, True])
@pytest.mark.parametrize("inside", [1, 2, 3])
def test_a_block_over_headers_keeps_the_rest(inside: int, differencing: bool) -> None:
    """INV-UNTANGLED: a block that begins on the last sectors of the headers loses only what overlaps them."""
    image = Vhd(size=COUNT * BLOCK, block_size=BLOCK, chs=(90, 4, 17))
    if differencing:
        image = child(size=COUNT * BLOCK, block_size=BLOCK, chs=(90, 4, 17), parent_id=PARENT_ID)
    places = read_metadata(image.build().store()).forbidden_to_blocks()
    end = -(-max(offset + size for _, offset, size in places) // 512)
    first = end - inside
    image.entries = {2: first}
    image.footer_at = (first + SPACE) * 512
    store = image.build().store()
    kept = store.pread(first * 512, inside * 512)
    store.pwrite((first + 1) * 512, pattern(BLOCK))
    store.pwrite(first * 512, kept)
    cut = (inside - 1) * 512
    if cut:
        made, fixes = repaired(store)
        assert made.contents() == store.contents() and fixes[0].needs is not None
    made, fixes = repaired(store, data_loss=True)
    lost = tuple(one for fix in fixes for one in fix.lost)
    assert lost == (((2 * BLOCK, cut),) if cut else ())
    image_after = open_dynamic(made, writable=True)
    now = read(image_after)[2 * BLOCK : 3 * BLOCK]
    assert now == bytes(cut) + pattern(BLOCK)[cut:]
    assert owners(image_after)[2 * SECTORS : 2 * SECTORS + inside - 1] == [not differencing] * (inside - 1)
    assert read_metadata(made).footer == read_metadata(store).footer


def test_a_block_cut_by_the_footer_is_moved_completely() -> None:
    """INV-UNTANGLED: if the footer is inside a block, the part behind it still reads as zeros after the move."""
    scene = Scene({0: 0, 1: SECTORS})
    store, base = scene.made()
    cut = (base + SECTORS + 100) * 512
    footer = store.pread(store.size() - 512, 512)
    for tail in (footer, b"", b"\x11" * 100):
        short = store.copy()
        short.truncate(cut)
        short.pwrite(cut, tail)
        before = read(open_dynamic(short))
        made, fixes = repaired(short)
        assert read(open_dynamic(made.copy(), writable=True)) == before
        assert not [one for one in check_vhd(made) if one.severity is Severity.ERROR], fixes


def test_large_overlaps_are_left_to_convert() -> None:
    """INV-BOUNDED: more than one change can hold is not moved; the image can be read, and so be copied."""
    count, size = 40, 2 * MIB
    image = Vhd(size=count * size, block_size=size, chs=(65535, 16, 255), first_block=8 * KIB)
    image.entries = {block: 16 + block * 4096 for block in range(count)}
    image.footer_at = (16 + count * 4096 + 1) * 512
    store = image.build().store()
    for block in range(count):
        store.pwrite((17 + block * 4096) * 512, pattern(size, block + 1))
    for block in range(count):
        store.pwrite((16 + block * 4096) * 512, b"\xff" * 512)
    draft = DraftStore(store)
    fixes = repair_vhd(draft, Consent(data_loss=True, writer_is_dead=True))
    assert [(fix.code, fix.needs) for fix in fixes if fix.code != "geometry"] == [("blocks-overlap", "vhdkit convert")]
    assert read(open_dynamic(store))[512:1024] == pattern(size, 1)[512:1024]
