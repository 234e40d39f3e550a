# SPDX-License-Identifier: Apache-2.0
"""Another virtual size: old or new after every cut, every byte kept, no old data exposed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.harness.packing import BLOCK, Crowd, content_of, crowd, cut_everywhere, short, short_content_of, sound
from tests.harness.power import LINK
from tests.harness.stores import Fault, FaultyStore, MemStore, io_failed, no_space, sync_failed
from tests.harness.vhd_builder import Block, Vhd, bits_of, child, pattern, put, seal_header
from tests.support import daily_or_nightly
from tests.xenserver import faults_in
from vhdkit import errors
from vhdkit.formats.format import DEFAULT_BLOCK_SIZE
from vhdkit.formats.vhd import geometry
from vhdkit.formats.vhd.check import check_vhd
from vhdkit.formats.vhd.create import create_differencing, create_dynamic
from vhdkit.formats.vhd.dynamic import DynamicImage
from vhdkit.formats.vhd.metadata import read_metadata
from vhdkit.formats.vhd.move import plan_packing
from vhdkit.formats.vhd.opening import open_dynamic
from vhdkit.formats.vhd.resize import grow_dynamic, plan_grow, resized_footer, shrink_dynamic
from vhdkit.image import Layer
from vhdkit.units import GIB, MIB, SECTOR_SIZE, TIB

KINDS = [(False, False), (True, False), (False, True), (True, True)]
MANY = 140  # blocks: more than one sector of BAT, so that it grows over what follows it


def grow(layers: list[Layer], size: int) -> int:
    """Make the first of the layers larger, unless it is already; returns the number of blocks moved."""
    image = layers[0]
    assert isinstance(image, DynamicImage)
    if image.size_bytes == size:
        return 0
    plan = plan_grow(image, size)
    grow_dynamic(image, size, plan)
    return len(plan.packing.blocks)


def shrink(layers: list[Layer], size: int) -> None:
    """Make the first of the layers smaller, unless it is already."""
    image = layers[0]
    assert isinstance(image, DynamicImage)
    if image.size_bytes != size:
        shrink_dynamic(image, size)


def checked(scene: Crowd, content: bytes) -> None:
    """The image holds `content`, its layout is sound, and both footers and the geometry are right."""
    assert content_of(scene.store, scene.parents) == content
    assert not sound(scene.store), sound(scene.store)
    metadata = read_metadata(scene.store)
    assert metadata.copy is not None and metadata.copy.raw == metadata.tail.raw
    footer = metadata.footer
    assert footer.current_size == footer.original_size == len(content)
    assert geometry.footer_geometry(footer) == geometry.geometry_for(len(content))
    assert metadata.header is not None and metadata.header.max_table_entries >= metadata.block_count


def extended(content: bytes, size: int) -> bytes:
    """The disk after it has grown."""
    return content.ljust(size, b"\0")


@pytest.mark.parametrize(("differencing", "batmap"), KINDS)
@pytest.mark.parametrize("seed", range(daily_or_nightly(1, 6)))
def test_inv_resize_grows_with_zeros(seed: int, differencing: bool, batmap: bool) -> None:
    """INV-RESIZE-WHOLE: grown by a little or past its BAT, an image of any shape keeps every byte and adds zeros."""
    scene = crowd(seed, differencing=differencing, batmap=batmap)
    for size in (len(scene.content) + SECTOR_SIZE, 12 * BLOCK, 140 * BLOCK - 5 * SECTOR_SIZE):
        grow(scene.layers, size)
        found = content_of(scene.store, scene.parents)
        assert found == extended(scene.content, size)
    checked(scene, found)


@pytest.mark.parametrize(("differencing", "batmap"), KINDS)
@pytest.mark.parametrize("seed", range(daily_or_nightly(2, 3)))
def test_inv_resize_whole_at_every_cut_of_growing(seed: int, differencing: bool, batmap: bool) -> None:
    """INV-RESIZE-WHOLE: a cut in any write or sync, twice, leaves the old size or the new, and growing completes."""
    scene = crowd(40 + seed, blocks=4, differencing=differencing, batmap=batmap)
    size = (7 if seed else 140) * BLOCK
    states = (scene.content, extended(scene.content, size))
    seen = cut_everywhere(scene, lambda layers: grow(layers, size), states, seed=seed, cuts=2)
    assert seen == set(states)


@pytest.mark.parametrize(("differencing", "batmap"), KINDS)
@pytest.mark.parametrize("seed", range(daily_or_nightly(1, 2)))
def test_inv_resize_whole_at_every_cut_of_shrinking(seed: int, differencing: bool, batmap: bool) -> None:
    """INV-RESIZE-WHOLE: the same for a smaller size: the disk never has other content."""
    scene = crowd(60 + seed, blocks=7, differencing=differencing, batmap=batmap)
    size = 3 * BLOCK + 5 * SECTOR_SIZE
    states = (scene.content, scene.content[:size])
    seen = cut_everywhere(scene, lambda layers: shrink(layers, size), states, seed=seed)
    assert seen == set(states)


def test_a_header_written_in_place_would_be_caught() -> None:
    """The tests above can fail: if the new part of a BAT is not synced before the switch, false blocks appear."""

    def careless(layers: list[Layer]) -> None:
        image = layers[0]
        assert isinstance(image, DynamicImage)
        store, sync = image.store, image.store.sync
        store.sync = lambda: None  # type: ignore[method-assign]
        grow(layers, 140 * BLOCK)
        store.sync = sync  # type: ignore[method-assign]
        sync()

    with pytest.raises(AssertionError):
        for seed in range(6):
            scene = crowd(40 + seed, blocks=4)
            states = (scene.content, extended(scene.content, 140 * BLOCK))
            cut_everywhere(scene, careless, states, seed=seed, cuts=8)


def test_an_extend_bat_and_move_blocks() -> None:
    """The BAT grows in place, and the blocks in its way move behind the others."""
    blocks = {number: Block(pattern(BLOCK, number)) for number in range(3)}
    built = Vhd(size=3 * BLOCK, block_size=BLOCK, blocks=blocks).build()
    store = built.store()
    scene = Crowd(store, [], content_of(store, []))
    before = read_metadata(store)
    assert before.header is not None and built.starts[0] == before.header.table_offset + SECTOR_SIZE
    assert grow(scene.layers, MANY * BLOCK) == 1
    checked(scene, extended(scene.content, MANY * BLOCK))
    after, image = read_metadata(store), open_dynamic(store)
    assert after.header is not None and after.header.table_offset == before.header.table_offset
    assert image.block_offset(0) > image.block_offset(2) and image.block_offset(0) % 4096 == 0
    assert store.size() < built.size + BLOCK + 8192


def test_spare_entries_are_used_and_cleaned() -> None:
    """A BAT with spare entries moves nothing; junk in them is cleared."""
    blocks = {0: Block(pattern(BLOCK))}
    image = Vhd(size=BLOCK, block_size=BLOCK, blocks=blocks, entry_count=256, junk=b"\1\2\3\4" * 255)
    store = image.build().store()
    scene = Crowd(store, [], content_of(store, []))
    size_before = store.size()
    assert grow(scene.layers, 200 * BLOCK) == 0
    checked(scene, extended(scene.content, 200 * BLOCK))
    assert store.size() == size_before


def test_the_bat_moves_behind_locators() -> None:
    """Locators stay in place: a longer BAT goes to the first place where only blocks are in the way."""
    scene = crowd(5, differencing=True)
    before = read_metadata(scene.store)
    grow(scene.layers, MANY * BLOCK)
    after = read_metadata(scene.store)
    assert before.header is not None and after.header is not None
    assert after.header.table_offset > before.header.table_offset
    assert after.header.table_offset < 8 * 4096
    assert after.locators == before.locators
    checked(scene, extended(scene.content, MANY * BLOCK))


def test_a_claimed_table_of_four_billion_entries_does_not_matter() -> None:
    """If a header claims spare entries over its own blocks, only the entries that the disk needs count."""
    store = Vhd(size=BLOCK, block_size=BLOCK, blocks={0: Block(pattern(BLOCK))}).build().store()
    store.pwrite(512, seal_header(put(store.pread(512, 1024), 28, b"\xff" * 4)))
    scene = Crowd(store, [], content_of(store, []))
    grow(scene.layers, 3 * BLOCK)
    assert content_of(store, []) == extended(scene.content, 3 * BLOCK)


def test_hidden_bytes_behind_the_end_do_not_appear() -> None:
    """Hidden bytes of the last block are zeros when the disk grows over them, in a child, too."""
    size = BLOCK + 8 * SECTOR_SIZE
    for image in (
        Vhd(size=size, block_size=BLOCK, blocks={1: Block(pattern(BLOCK))}),
        child(size=size, block_size=BLOCK, blocks={1: Block(pattern(BLOCK))}),
    ):
        store = image.build().store()
        scene = Crowd(store, [], content_of(store, []))
        grow(scene.layers, 2 * BLOCK)
        checked(scene, extended(scene.content, 2 * BLOCK))


def test_shrinking_forgets_what_was_behind_the_end() -> None:
    """If the disk grows again after a shrink, it has zeros where data had been."""
    scene = crowd(12, blocks=6)
    shrink(scene.layers, 2 * BLOCK + SECTOR_SIZE)
    kept = scene.content[: 2 * BLOCK + SECTOR_SIZE]
    checked(scene, kept)
    grow(scene.layers, 6 * BLOCK)
    checked(scene, extended(kept, 6 * BLOCK))


def test_shrinking_frees_space() -> None:
    """The file has no more blocks than the smaller disk allows, wherever they were."""
    blocks = {number: Block(pattern(BLOCK, number)) for number in (9, 0, 8, 1, 7)}
    store = Vhd(size=10 * BLOCK, block_size=BLOCK, blocks=blocks).build().store()
    scene = Crowd(store, [], content_of(store, []))
    shrink(scene.layers, 2 * BLOCK)
    checked(scene, scene.content[: 2 * BLOCK])
    assert store.size() < 2 * BLOCK + 16 * SECTOR_SIZE


def test_the_batmap_grows_with_the_bat() -> None:
    """The batmap keeps its bits, has none for new blocks, and has a correct checksum."""
    scene = crowd(8, batmap=True)
    before = read_metadata(scene.store)
    assert before.batmap is not None
    old = scene.store.pread(before.batmap.batmap_offset, 2)
    grow(scene.layers, MANY * BLOCK)
    after = read_metadata(scene.store)
    assert after.batmap is not None
    raw = scene.store.pread(after.batmap.batmap_offset, after.batmap.batmap_size * SECTOR_SIZE)
    assert raw[:2] == old and not any(raw[2:]) and after.batmap.checksum == 0xFFFFFFFF - sum(raw)


@pytest.mark.parametrize("operation", ["read", "write", "reserve", "punch", "truncate", "sync"])
@pytest.mark.parametrize("make_error", [io_failed, no_space, sync_failed])
@pytest.mark.parametrize("work", [lambda ls: grow(ls, 140 * BLOCK), lambda ls: shrink(ls, 2 * BLOCK)])
def test_every_failing_call_is_a_clean_error(
    operation: str, make_error: Callable[[], errors.VhdkitError], work: Callable[[list[Layer]], object]
) -> None:
    """Whichever call fails, the error is reported, the size is old or new, and a second attempt works."""
    start = crowd(41, blocks=4)
    final = start.over(start.store.copy())
    work(final)
    states = (short(start.content), short_content_of(final[0].store, []))
    for at in range(1, 100):
        store = FaultyStore(start.store)
        layers = start.over(store)
        store.faults.append(Fault(operation, make_error, at=at, partly=operation == "write"))
        try:
            work(layers)
        except errors.VhdkitError:
            store.faults.clear()
            assert short_content_of(store.copy(), []) in states, at
            work(start.over(store))
            assert short_content_of(store, []) == states[1] and not sound(store)
        else:
            break
    else:
        pytest.fail("never came to an end")


def test_a_full_disk_keeps_the_file_as_long_as_it_was() -> None:
    """Without space for the blocks that move nothing changes, not even the file's size."""
    start = crowd(40, blocks=4)
    store = FaultyStore(start.store, Fault("reserve", no_space))
    with pytest.raises(errors.NoSpace):
        grow(start.over(store), 140 * BLOCK)
    assert store.size() == start.store.size() and content_of(store, []) == start.content


@pytest.mark.parametrize("creator", [b"vpc ", b"qemu", b"tap\0", b"win ", b"xo  "])
def test_the_size_is_the_requested_one(creator: bytes) -> None:
    """For any creator the image has exactly that size, also for readers that use the original size or CHS."""
    store = Vhd(size=4 * BLOCK, block_size=BLOCK, creator=creator, chs=(60, 4, 17)).build().store()
    grow([open_dynamic(store, writable=True)], 9 * BLOCK + SECTOR_SIZE)
    metadata = read_metadata(store)
    assert metadata.size_bytes == metadata.footer.original_size == 9 * BLOCK + SECTOR_SIZE
    kept = creator in (b"tap\0", b"win ", b"xo  ")
    assert metadata.footer.creator_application == (creator if kept else b"win ")


def test_grown_to_the_limit() -> None:
    """An empty image becomes 2040 GiB in place, with a BAT of a million entries and a file of four MiB."""
    store = MemStore("big.vhd")
    create_dynamic(store, GIB, block_size_bytes=DEFAULT_BLOCK_SIZE)
    grow([open_dynamic(store, writable=True)], geometry.MAX_CREATE_BYTES)
    image = open_dynamic(store)
    assert image.size_bytes == geometry.MAX_CREATE_BYTES and not image.allocated_blocks().any()
    assert store.size() < 5 * MIB


def test_blocks_that_would_go_past_two_tebibytes_do_not_move() -> None:
    """A BAT entry cannot express such a place: the error is NoSpace, and nothing changes."""
    blocks = {0: Block(pattern(SECTOR_SIZE))}
    store = Vhd(size=BLOCK, block_size=BLOCK, blocks=blocks, footer_at=2 * TIB).build().store()
    with pytest.raises(errors.NoSpace):
        plan_grow(open_dynamic(store, writable=True), MANY * BLOCK)


def test_a_footer_for_another_size_keeps_its_other_fields() -> None:
    """Identity, time, saved state and reserved bytes are kept."""
    store = Vhd(size=BLOCK, block_size=BLOCK, hidden=1, saved_state=1, blocks={0: Block(bits=bits_of({1}, BLOCK))})
    footer = read_metadata(store.build().store()).footer
    other = resized_footer(footer, 7 * BLOCK)
    for name in ("unique_id", "timestamp", "hidden", "saved_state", "disk_type", "data_offset", "features"):
        assert getattr(other, name) == getattr(footer, name)


def test_a_last_block_without_room_does_not_grow() -> None:
    """INV-BLOCKS-DISJOINT: the unused part of the last block may belong to another block: it is not zeroed."""
    size = BLOCK + 5 * SECTOR_SIZE
    image = Vhd(size=size, block_size=BLOCK, blocks={1: Block(pattern(5 * SECTOR_SIZE)), 0: Block(pattern(BLOCK, 3))})
    image.blocks[0].start = image.build().starts[1] + 6 * SECTOR_SIZE
    store = image.build().store(frozen=True)
    with pytest.raises(errors.InvalidArgument, match="cannot become whole"):
        plan_grow(open_dynamic(store, writable=True), 3 * BLOCK)


@pytest.mark.parametrize("differencing", [False, True])
@pytest.mark.parametrize("count", [129, 1024, 1025, 100_000])
def test_growing_leaves_no_findings(differencing: bool, count: int) -> None:
    """The space that blocks and table leave when the table grows is a hole before the first block: no lost space, and
    no gap that a block would fit into."""
    size = 5 * BLOCK + 3 * SECTOR_SIZE
    store = MemStore("image.vhd")
    if differencing:
        create_differencing(store, size, LINK, block_size_bytes=BLOCK)
    else:
        create_dynamic(store, size, block_size_bytes=BLOCK)
    image = open_dynamic(store, writable=True)
    for number in range(5):
        image.write(number * BLOCK // SECTOR_SIZE, memoryview(pattern(BLOCK, number)))
    image.close()
    grow([open_dynamic(store, writable=True)], count * BLOCK)
    larger = open_dynamic(store, writable=True)
    assert check_vhd(store) == [] and faults_in(store) == []
    assert len(plan_packing(larger).blocks) == 0
    shrink([larger], size)
    assert check_vhd(store) == [] and faults_in(store) == []
