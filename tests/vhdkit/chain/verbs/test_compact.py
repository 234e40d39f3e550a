# SPDX-License-Identifier: Apache-2.0
"""Compacting: files become smaller, and no disk changes a byte."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import vhdkit
from tests.harness.chains import clear_bits
from tests.harness.packing import BLOCK, Crowd, content_of, crowd, cut_everywhere, names_behind, sound
from tests.harness.power import LINK
from tests.harness.stores import Fault, FaultyStore, MemStore, io_failed, no_space, sync_failed
from tests.harness.vhd_builder import Block, Vhd, bits_of, child, pattern
from tests.support import daily_or_nightly
from tests.xenserver import faults_in
from vhdkit import errors
from vhdkit.chain.verbs.compact import compactable_of, plan_compact, run_compact
from vhdkit.formats.format import CompactPlan
from vhdkit.formats.probe import open_layer
from vhdkit.formats.vhd.dynamic import DynamicImage
from vhdkit.formats.vhd.metadata import read_metadata
from vhdkit.formats.vhd.opening import open_dynamic
from vhdkit.image import Layer
from vhdkit.units import KIB, MIB, PAGE_SIZE, SECTOR_SIZE

KINDS = [(False, False), (True, False), (False, True), (True, True)]


def compacted(layers: list[Layer]) -> tuple[int, int]:
    """Compact the first of the layers; returns the numbers of dropped and of moved blocks."""
    image = layers[0]
    assert isinstance(image, DynamicImage)
    compactable = compactable_of(image)
    plan = plan_compact(layers, compactable)
    run_compact(compactable, plan)
    return len(plan.dropped), plan.moved_block_count


def planned(layers: list[Layer]) -> CompactPlan:
    """What compacting the first of the layers would do."""
    return plan_compact(layers, compactable_of(layers[0]))


@pytest.mark.parametrize(("differencing", "batmap"), KINDS)
@pytest.mark.parametrize("seed", range(12))
def test_inv_compact_preserves_the_disk(seed: int, differencing: bool, batmap: bool) -> None:
    """INV-COMPACT-PRESERVES: every byte reads as before, both footers are good, compacting again changes nothing."""
    scene = crowd(seed, differencing=differencing, batmap=batmap)
    size = scene.store.size()
    layers = scene.layers
    before = len(layers[0].allocated_blocks().nonzero()[0])
    dropped, _ = compacted(layers)
    layers[0].close()
    assert content_of(scene.store, scene.parents) == scene.content
    assert not sound(scene.store) and scene.store.size() <= size
    metadata = read_metadata(scene.store)
    assert metadata.copy is not None and metadata.copy.raw == metadata.tail.raw
    image = open_dynamic(scene.store)
    assert int(np.count_nonzero(image.allocated_blocks())) == before - dropped
    after = scene.store.contents()
    assert compacted(scene.layers) == (0, 0) and scene.store.contents() == after


@pytest.mark.parametrize(("differencing", "batmap"), KINDS)
@pytest.mark.parametrize("seed", range(daily_or_nightly(1, 3)))
def test_inv_compact_preserves_the_disk_at_every_cut(seed: int, differencing: bool, batmap: bool) -> None:
    """INV-COMPACT-PRESERVES: two cuts, inside any write or sync, leave the same disk, and compacting completes."""
    scene = crowd(100 + seed, blocks=7, differencing=differencing, batmap=batmap)
    cut_everywhere(scene, compacted, (scene.content,), seed=seed)


def test_reusing_space_too_early_is_detected() -> None:
    """The test above can fail: without the sync between dropping and moving, a cut exposes another block's data."""

    def careless(layers: list[Layer]) -> None:
        image = layers[0]
        assert isinstance(image, DynamicImage)
        store = image.store
        sync = store.sync
        store.sync = lambda: None  # type: ignore[method-assign]
        compacted(layers)
        store.sync = sync  # type: ignore[method-assign]
        sync()

    with pytest.raises(AssertionError):
        for seed in range(6):
            scene = crowd(100 + seed, blocks=7)
            cut_everywhere(scene, careless, (scene.content,), seed=seed, cuts=8)


@pytest.mark.parametrize("operation", ["read", "write", "punch", "truncate", "sync"])
@pytest.mark.parametrize("make_error", [io_failed, no_space, sync_failed])
def test_every_failing_call_is_a_clean_error(operation: str, make_error: Callable[[], errors.VhdkitError]) -> None:
    """Whichever call fails, the error is reported, the disk is unchanged, and a second attempt completes."""
    for at in range(1, 200):
        scene = crowd(7, blocks=7)
        store = FaultyStore(scene.store)
        layers = scene.over(store)
        store.faults.append(Fault(operation, make_error, at=at, partly=operation == "write"))
        try:
            compacted(layers)
        except errors.VhdkitError:
            pass
        else:
            assert at > 1 or operation == "punch"
            break
        store.faults.clear()
        assert content_of(store, scene.parents) == scene.content, at
        compacted(scene.over(store))
        assert content_of(store, scene.parents) == scene.content and not sound(store)


def test_zeros_that_hide_data_are_kept() -> None:
    """A block of zeros in a child is dropped only if its parent reads as zeros in every sector that the child owns."""
    base = Vhd(size=4 * BLOCK, block_size=BLOCK, blocks={0: Block(pattern(BLOCK)), 2: Block(pattern(SECTOR_SIZE))})
    parents = [open_layer(base.build().store("base.vhd", frozen=True))]
    over_hole = bits_of(set(range(1, 1024)), BLOCK)  # except for the one sector where the parent has data
    blocks = {0: Block(), 1: Block(), 2: Block(bits=over_hole), 3: Block(bits=bits_of({0}, BLOCK))}
    store = child(size=4 * BLOCK, block_size=BLOCK, blocks=blocks).build().store()
    scene = Crowd(store, parents, content_of(store, parents))
    dropped = planned(scene.layers).dropped
    assert dropped.tolist() == [1, 2, 3]
    compacted(scene.layers)
    assert content_of(store, parents) == scene.content
    assert open_dynamic(store).allocated_blocks().tolist() == [True, False, False, False]


def test_data_under_clear_bits_of_a_dynamic_disk_is_kept() -> None:
    """Some readers show the data under clear bits of a dynamic disk: such a block is not dropped."""
    store = Vhd(size=2 * BLOCK, block_size=BLOCK, blocks={0: Block(pattern(BLOCK)), 1: Block()}).build().store()
    clear_bits(store, 0, 1024)
    dropped = planned([open_dynamic(store, writable=True)]).dropped
    assert dropped.tolist() == [1]


def test_bytes_behind_the_end_of_the_disk_do_not_count() -> None:
    """Bytes of the last block behind the end of the disk do not keep a block from being dropped."""
    store = Vhd(size=BLOCK + 8 * KIB, block_size=BLOCK, blocks={1: Block(b"x", at=16 * KIB)}).build().store()
    dropped = planned([open_dynamic(store, writable=True)]).dropped
    assert dropped.tolist() == [1]


def test_last_block_is_trimmed_when_virtual_size_is_not_a_multiple_of_block_size() -> None:
    """A last block that is stored only up to the end of the disk is completed, moved, and reads as before."""
    size = 2 * BLOCK + 37 * SECTOR_SIZE
    blocks = {0: Block(), 1: Block(), 2: Block(pattern(37 * SECTOR_SIZE))}
    built = Vhd(size=size, block_size=BLOCK, blocks=blocks).build()
    store = built.store()
    footer = store.pread(store.size() - SECTOR_SIZE, SECTOR_SIZE)
    end = built.starts[2] + SECTOR_SIZE + 37 * SECTOR_SIZE
    store.truncate(end)
    store.pwrite(end, footer)
    content = content_of(store, [])
    assert compacted([open_dynamic(store, writable=True)]) == (2, 1)
    assert content_of(store, []) == content and not sound(store)


def test_can_skip_blank_after_the_last_block_and_before_the_footer() -> None:
    """Blank space between the last block and the footer is cut off."""
    built = Vhd(size=BLOCK, block_size=BLOCK, blocks={0: Block(pattern(BLOCK))}, footer_at=3 * MIB).build()
    store = built.store()
    compacted([open_dynamic(store, writable=True)])
    assert store.size() == built.starts[0] + SECTOR_SIZE + BLOCK + SECTOR_SIZE
    assert content_of(store, []) == pattern(BLOCK)


def test_does_not_use_the_bat_msb_for_sign() -> None:
    """A block beyond 2^31 sectors moves down like any other, and is not taken for a negative offset."""
    far = (1 << 31) * SECTOR_SIZE + 7 * SECTOR_SIZE
    store = Vhd(size=2 * BLOCK, block_size=BLOCK, blocks={1: Block(pattern(BLOCK), start=far)}).build().store()
    content = content_of(store, [])
    assert compacted([open_dynamic(store, writable=True)]) == (0, 1)
    assert content_of(store, []) == content and store.size() < 2 * MIB


def test_moved_blocks_become_aligned() -> None:
    """Blocks that move into the space of several blocks have their data on 4 KiB boundaries afterwards."""
    blocks = {n: Block(pattern(BLOCK, n) if n >= 10 else b"") for n in range(14)}
    store = Vhd(size=14 * BLOCK, block_size=BLOCK, blocks=blocks).build().store()
    assert open_dynamic(store).block_offset(13) % PAGE_SIZE
    assert compacted([open_dynamic(store, writable=True)]) == (10, 4)
    image = open_dynamic(store)
    assert [image.block_offset(block) % PAGE_SIZE for block in range(10, 14)] == [0] * 4


def test_batmap_bits_are_cleared_before_their_blocks_are_dropped() -> None:
    """A dropped block loses its batmap bit, the others keep theirs, and the batmap's checksum is correct."""
    scene = crowd(3, batmap=True)
    dropped = planned(scene.layers).dropped
    assert len(dropped)
    before = read_metadata(scene.store)
    assert before.batmap is not None
    old = int.from_bytes(scene.store.pread(before.batmap.batmap_offset, 2), "big")
    compacted(scene.layers)
    after = read_metadata(scene.store)
    assert after.batmap is not None
    raw = scene.store.pread(after.batmap.batmap_offset, SECTOR_SIZE)
    for block in dropped.tolist():
        old &= ~(1 << (15 - block))
    assert int.from_bytes(raw[:2], "big") == old
    assert after.batmap.checksum == 0xFFFFFFFF - sum(raw)


def test_a_batmap_that_overlaps_a_block_is_left_alone() -> None:
    """A batmap that claims to lie in a block is not written to."""
    scene = crowd(3, batmap=True)
    metadata = read_metadata(scene.store)
    assert metadata.header is not None and metadata.batmap is not None
    image = open_dynamic(scene.store)
    kept = next(b for b in range(9) if image.block_offset(b) > 0 and scene.content[b * BLOCK] and b != 8)
    place = metadata.header.table_offset + SECTOR_SIZE
    raw = bytearray(scene.store.pread(place, SECTOR_SIZE))
    raw[8:16] = image.block_offset(kept).to_bytes(8, "big")
    scene.store.pwrite(place, raw)
    compacted(scene.layers)
    assert content_of(scene.store, []) == scene.content


# -- real files ---------------------------------------------------------------------------------------------------


FORMATS = ["vhd", "vhdx"]


def grown_chain(folder: Path, suffix: str = "vhd") -> tuple[Path, Path, Path]:
    """A base, a child with blocks of zeros, and a grandchild."""
    paths = [folder / name for name in (f"base.{suffix}", f"child.a{suffix}", f"leaf.a{suffix}")]
    vhdkit.create_image(paths[0], 40 * MIB, disk_format="vhdx" if suffix == "vhdx" else "dynamic")
    rng = random.Random(4)
    for number, path in enumerate(paths):
        if number:
            vhdkit.create_child(path, paths[number - 1])
        with vhdkit.open_disk(path, writable=True) as disk:
            for block in rng.sample(range(20), 12):
                disk.write(block * 2 * MIB, rng.randbytes(MIB) if rng.random() < 0.6 else bytes(2 * MIB))
    return paths[0], paths[1], paths[2]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_layer_in_the_middle_is_compacted_under_its_children(tmp_path: Path, suffix: str) -> None:
    """Compacting any layer, also one with children, leaves the leaf's disk unchanged."""
    paths = grown_chain(tmp_path, suffix)
    vhdkit.convert(paths[2], tmp_path / "before.raw", vhdkit.DiskFormat.RAW)
    for path in paths:
        size = path.stat().st_size
        result = vhdkit.compact(path)
        assert result.dropped_block_count and path.stat().st_size == result.file_size_after_bytes < size
    assert vhdkit.compare(paths[2], tmp_path / "before.raw").same_content
    assert [one for one in vhdkit.check(paths[2]) if one.code != "space-unused"] == []


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_dry_run_reports_the_plan(tmp_path: Path, suffix: str) -> None:
    """The plan has the numbers that the real run then reports, and no byte changes."""
    paths = grown_chain(tmp_path, suffix)
    before = paths[1].read_bytes()
    plan = vhdkit.compact(paths[1], dry_run=True)
    assert paths[1].read_bytes() == before and plan.allocated_after_bytes is None
    done = vhdkit.compact(paths[1])
    assert done.dropped_block_count == plan.dropped_block_count > 0
    assert done.moved_block_count == plan.moved_block_count > 0
    assert done.file_size_after_bytes == plan.file_size_after_bytes == paths[1].stat().st_size


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_image_that_is_open_is_not_compacted(tmp_path: Path, suffix: str) -> None:
    """While a leaf is open, no layer of its chain is compacted."""
    paths = grown_chain(tmp_path, suffix)
    with vhdkit.open_disk(paths[2]):
        for path in paths:
            with pytest.raises(vhdkit.ImageInUse):
                vhdkit.compact(path)


@pytest.mark.parametrize("disk_format", [vhdkit.DiskFormat.FIXED, vhdkit.DiskFormat.RAW])
def test_zeros_of_fixed_and_raw_images_become_holes(tmp_path: Path, disk_format: vhdkit.DiskFormat) -> None:
    """The file keeps its size and every byte, and takes less space on the file system."""
    path = tmp_path / ("disk.vhd" if disk_format is vhdkit.DiskFormat.FIXED else "disk.img")
    vhdkit.create_image(path, 8 * MIB, disk_format=disk_format)
    with path.open("r+b") as file:
        file.write(bytes(3 * MIB) + b"x" * 5000 + bytes(MIB) + b"y" * MIB + bytes(2 * MIB))
    before = path.read_bytes()
    plan = vhdkit.compact(path, dry_run=True)
    result = vhdkit.compact(path)
    assert path.read_bytes() == before
    assert plan.punched_bytes == result.punched_bytes >= 5 * MIB
    assert result.allocated_after_bytes is not None
    assert result.allocated_after_bytes <= result.allocated_before_bytes - 4 * MIB
    assert vhdkit.compact(path).punched_bytes == 0


@pytest.mark.parametrize("suffix", FORMATS)
def test_progress_reaches_its_end(tmp_path: Path, suffix: str) -> None:
    """Progress grows, never passes its end, and reaches it."""
    _, path, _ = grown_chain(tmp_path, suffix)
    calls: list[tuple[int, int]] = []
    vhdkit.compact(path, progress=lambda done, total: calls.append((done, total)))
    assert all(done <= total for done, total in calls) and calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1] > 0


def test_an_empty_store_is_refused() -> None:
    """Nothing is planned for a file that is not an image."""
    with pytest.raises(errors.VhdkitError):
        planned([open_dynamic(MemStore())])


def misplaced(store: MemStore) -> list[str]:
    """Findings against XenServer's layout, but not data under clear bits, which a crowd's images have on purpose."""
    return [fault for fault in faults_in(store) if "bitmap is clear" not in fault]


@pytest.mark.parametrize("header", [False, True])
def test_names_behind_the_blocks_move_to_the_front(header: bool) -> None:
    """Compacting corrects what an earlier rebase left: the file ends behind its blocks, as was planned."""
    scene = crowd(3, differencing=True)
    names_behind(scene.store, LINK, header=header)
    assert misplaced(scene.store)
    end = planned(scene.over(scene.store.copy())).file_end_bytes
    compacted(scene.layers)
    assert not misplaced(scene.store) and content_of(scene.store, scene.parents) == scene.content
    assert scene.store.size() == end
    after = scene.store.contents()
    assert compacted(scene.layers) == (0, 0) and scene.store.contents() == after


def test_inv_compact_preserves_the_disk_at_every_cut_of_mending_names() -> None:
    """INV-COMPACT-PRESERVES: also while header and names move to the front."""
    scene = crowd(3, blocks=4, differencing=True)
    names_behind(scene.store, LINK, header=True)
    cut_everywhere(scene, compacted, (scene.content,), cuts=1)


def test_room_for_a_larger_table_is_kept() -> None:
    """A BAT that XenServer made longer than the disk needs keeps its length, and no block moves into its room."""
    blocks = {number: Block(pattern(BLOCK, number)) for number in (0, 2)}
    image = Vhd(size=3 * BLOCK, block_size=BLOCK, blocks=blocks, entry_count=200_000)
    store = image.build().store()
    before = store.contents()
    assert compacted([open_dynamic(store, writable=True)]) == (0, 0) and store.contents() == before
