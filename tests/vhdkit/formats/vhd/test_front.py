# SPDX-License-Identifier: Apache-2.0
"""Header and names stay before the first block, waste no space, and are complete after every power cut."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tests.harness.packing import content_of, crowd, names_behind
from tests.harness.power import BLOCK_SIZE, DISK_SIZE, LINK, child_scene, open_mem
from tests.harness.stores import CrashStore, MemStore
from tests.harness.vhd_builder import Block, Locator, Vhd, child, pattern, relative
from tests.xenserver import faults_in
from vhdkit.finding import Severity
from vhdkit.formats.vhd import layout
from vhdkit.formats.vhd.bat import Bat
from vhdkit.formats.vhd.check import check_vhd
from vhdkit.formats.vhd.create import ParentLink, create_differencing
from vhdkit.formats.vhd.front import after_first_block, settle_front
from vhdkit.formats.vhd.metadata import read_metadata
from vhdkit.formats.vhd.opening import open_dynamic
from vhdkit.formats.vhd.relink import relink
from vhdkit.units import SECTOR_SIZE

LONG = "a folder\\" * 100
FAR = ParentLink(LINK.unique_id, 7, "moved.vhd", f"..\\{LONG}moved.vhd", f"\\srv\\{LONG}moved.vhd")
NEAR = ParentLink(LINK.unique_id, 7, "moved.vhd", "..\\elsewhere\\moved.vhd", "\\srv\\elsewhere\\moved.vhd")


def places(store: MemStore) -> list[int]:
    """Where the names are."""
    return [one.data_offset_bytes for one in read_metadata(store).locators]


def misplaced(store: MemStore) -> bool:
    """Whether header or names are behind the first block."""
    metadata = read_metadata(store)
    assert metadata.header is not None
    bat = Bat.load(store, metadata.header.table_offset, metadata.block_count)
    return bool(after_first_block(metadata, bat))


def test_names_take_the_places_of_the_old_ones() -> None:
    """After any number of changes the file has its old length, and the names are where they were."""
    leaf = child_scene(1).leaf
    size, before = leaf.size(), places(leaf)
    for link in (NEAR, LINK, NEAR):
        relink(open_dynamic(leaf, writable=True), link)
        assert leaf.size() == size and places(leaf) == before and faults_in(leaf) == []


def test_longer_names_go_where_there_is_room_before_the_first_block() -> None:
    """Names of two kilobytes fit between header and BAT, or behind the BAT, and the file does not grow."""
    scene = child_scene(1)
    leaf, size = scene.leaf, scene.leaf.size()
    relink(open_dynamic(leaf, writable=True), FAR)
    assert leaf.size() == size and not misplaced(leaf) and faults_in(leaf) == []
    assert content_of(leaf, scene.parents) == scene.content
    assert read_metadata(leaf).locators[1].text == FAR.absolute


def test_names_of_an_image_without_blocks_may_push_its_footer() -> None:
    """Without blocks there is always room: the footer follows the names, and shorter ones free the space."""
    leaf = MemStore("leaf.avhd")
    create_differencing(leaf, DISK_SIZE, LINK, block_size_bytes=BLOCK_SIZE)
    size = leaf.size()
    very_far = replace(FAR, relative="..\\" + LONG * 8, absolute="\\" + LONG * 8)
    relink(open_dynamic(leaf, writable=True), very_far)
    assert leaf.size() > size and read_metadata(leaf).locators[0].text == very_far.relative
    relink(open_dynamic(leaf, writable=True), NEAR)
    assert leaf.size() == size and faults_in(leaf) == []


def crowded(seed: int = 1) -> MemStore:
    """A child whose first block begins right behind its one short name, at most a few sectors from it."""
    blocks = {0: Block(pattern(BLOCK_SIZE, seed)), 2: Block(pattern(BLOCK_SIZE, seed + 1))}
    image = child(size=DISK_SIZE, block_size=BLOCK_SIZE, blocks=blocks, chs=(45, 4, 17), table_offset=1536)
    return image.build().store()


def test_a_block_makes_room_for_names_that_do_not_fit() -> None:
    """The first block moves behind the others, leaving a hole, and later changes move nothing."""
    leaf = crowded()
    content = content_of(leaf, [])
    relink(open_dynamic(leaf, writable=True), FAR)
    assert content_of(leaf, []) == content and faults_in(leaf) == []
    assert [one for one in check_vhd(leaf) if one.severity > Severity.NOTE] == []
    size, starts = leaf.size(), open_dynamic(leaf).bat.entries.tolist()
    for link in (NEAR, FAR):
        relink(open_dynamic(leaf, writable=True), link)
        assert leaf.size() == size and open_dynamic(leaf).bat.entries.tolist() == starts


@pytest.mark.parametrize("header", [False, True])
def test_names_behind_the_blocks_are_reported_and_moved(header: bool) -> None:
    """`check` warns; afterwards header and names are in front, the file is shorter, and the disk is the same."""
    store, parents = names_behind(child_scene(2).leaf, NEAR, header=header), child_scene(2).parents
    content, size = content_of(store, parents), store.size()
    assert "behind-blocks" in [one.code for one in check_vhd(store)] and faults_in(store)
    assert settle_front(open_dynamic(store, writable=True))
    assert content_of(store, parents) == content and faults_in(store) == [] and check_vhd(store) == []
    assert store.size() < size and read_metadata(store).locators[0].text == NEAR.relative
    assert not settle_front(open_dynamic(store, writable=True))


@pytest.mark.parametrize("header", [False, True])
def test_the_next_change_of_names_moves_them_to_the_front(header: bool) -> None:
    """Images of an earlier vhdkit need only the next rebase."""
    store = names_behind(child_scene(2).leaf, NEAR, header=header)
    relink(open_dynamic(store, writable=True), LINK)
    assert faults_in(store) == [] and check_vhd(store) == []


@pytest.mark.parametrize("work", ["far", "settle", "settle header"])
def test_inv_footer_copy_holds_while_the_front_changes(work: str) -> None:
    """INV-FOOTER-COPY: a cut in any step of making room or of moving to the front leaves every byte, and old names or
    new ones; then the work can be repeated, and is cut once more."""
    start = crowded() if work == "far" else names_behind(child_scene(2).leaf, NEAR, header=work == "settle header")
    parents = [] if work == "far" else child_scene(2).parents
    old, content = read_metadata(start).locators[0].text, content_of(start, parents)
    seen: set[str | None] = set()

    def change(store: CrashStore) -> None:
        image = open_dynamic(store, writable=True)
        if work == "far":
            relink(image, FAR)
        else:
            settle_front(image)

    def watch(store: CrashStore, cuts: int, *, again: bool) -> None:
        def judge() -> None:
            for seed in range(cuts):
                rng = random.Random(f"{store.operation_count} {seed}")
                found = store.after_cut(rng)
                text = read_metadata(found).locators[0].text
                assert text in (old, FAR.relative)
                seen.add(text)
                assert content_of(found.copy(frozen=True), parents) == content
                if again and rng.random() < 0.3:
                    second = CrashStore(found)
                    watch(second, 1, again=False)
                    assert not misplaced(second) and not faults_in(second)

        store.watcher = judge
        change(store)
        store.watcher = None

    watch(CrashStore(start), 1, again=True)
    assert seen == ({old, FAR.relative} if work == "far" else {old})


def test_xenservers_room_for_a_larger_table_is_left_alone() -> None:
    """BAT entries that the disk does not need yet are not lost space, and no name is put there."""
    name = {0: relative(".\\parent.vhd"), 1: Locator(b"MacX", b"file://./parent.vhd")}
    blocks = {1: Block(pattern(BLOCK_SIZE))}
    image = child(size=DISK_SIZE, block_size=BLOCK_SIZE, blocks=blocks, entry_count=200_000, locators=name)
    store = image.build().store()
    assert [one.code for one in check_vhd(store) if one.code != "geometry"] == ["bat-spare"]
    spare = store.pread(1536 + 16, 800_000 - 16)
    for link in (NEAR, FAR):
        relink(open_dynamic(store, writable=True), link)
        assert store.pread(1536 + 16, 800_000 - 16) == spare and faults_in(store) == []


def test_images_of_any_shape_keep_their_content_when_names_change() -> None:
    """Gaps, unaligned blocks, batmaps: whatever the layout, the disk reads the same, and blocks stay disjoint."""
    for seed in range(12):
        scene = crowd(seed, differencing=True, batmap=bool(seed % 2))
        for link in (FAR, NEAR):
            relink(open_dynamic(scene.store, writable=True), link)
            assert content_of(scene.store, scene.parents) == scene.content and not misplaced(scene.store)
    with open_mem(scene.store, scene.parents, writable=True) as disk:
        disk.write(0, b"x" * SECTOR_SIZE)
    assert not misplaced(scene.store)


def test_a_dynamic_disk_has_a_front_too() -> None:
    """After a power cut in a resize only the header may be behind the blocks."""
    store = Vhd(size=2 * BLOCK_SIZE, block_size=BLOCK_SIZE, blocks={0: Block(pattern(BLOCK_SIZE))}).build().store()
    metadata = read_metadata(store)
    assert metadata.header is not None
    end = store.size()
    store.pwrite(end, layout.build_header(metadata.header))
    footer = layout.build_footer(replace(metadata.footer, data_offset=end))
    store.pwrite(0, footer)
    store.pwrite(end + layout.HEADER_SIZE, footer)
    assert settle_front(open_dynamic(store, writable=True)) and read_metadata(store).footer.data_offset == 512
    assert store.size() == end + SECTOR_SIZE  # the header is gone, the footer before it stays where it was
