# SPDX-License-Identifier: Apache-2.0
"""Power cuts inside every write and sync of random workloads: flushed data is kept, no stale data appears."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest

from tests.harness.model import ParsedVhd, SectorModel
from tests.harness.power import (
    BLOCK_SIZE,
    PowerRun,
    Scene,
    bad_copy_scene,
    child_scene,
    cut_block_scene,
    dynamic_scene,
    judge,
    lost_tail_scene,
    open_mem,
    short_block_scene,
    work,
)
from tests.harness.stores import CrashStore, MemStore, PowerCut
from tests.support import daily_or_nightly
from vhdkit.formats.vhd import commit
from vhdkit.formats.vhd.bat import Bat
from vhdkit.formats.vhd.dynamic import DynamicImage
from vhdkit.units import SECTOR_SIZE, covering_sectors


def empty_dynamic_scene(seed: int) -> Scene:
    """A dynamic image without blocks."""
    return dynamic_scene(seed, writes=0)


def larger_child_scene(seed: int) -> Scene:
    """A child that is larger than its raw base."""
    return child_scene(seed, raw_base=True, size_bytes=4 * BLOCK_SIZE)


SCENES: dict[str, Callable[[int], Scene]] = {
    "empty dynamic": empty_dynamic_scene,
    "dynamic": dynamic_scene,
    "child": child_scene,
    "child of a smaller raw base": larger_child_scene,
    "lost tail": lost_tail_scene,
    "bad copy": bad_copy_scene,
    "last block cut by the footer": short_block_scene,
    "last block cut by the end of the disk": cut_block_scene,
}

SEEDS = range(60 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else daily_or_nightly(1, 4))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SCENES)
def test_every_cut_leaves_flushed_or_newer(name: str, seed: int) -> None:
    """INV-FLUSHED-OR-NEWER, INV-FOOTER-COPY, INV-BLOCKS-DISJOINT: wherever the power is cut, also a second time after
    recovery, the image opens, its blocks are disjoint, and each sector holds its flushed content or newer."""
    run = PowerRun(SCENES[name](seed), seed, steps=22 if seed < 3 else 50)
    run.run()
    assert run.operations > run.syncs > 3, "the workload did hardly anything"
    assert run.judged > run.cuts * run.operations, "some operation was not cut"


@pytest.mark.parametrize("name", SCENES)
def test_a_real_cut_at_each_operation(name: str) -> None:
    """INV-FLUSHED-OR-NEWER: if the store fails under the engine, its cleanup on the way out does no harm."""
    scene, cut_at, done = SCENES[name](7), 0, False
    while not done:
        cut_at += 1
        store, model, rng = CrashStore(scene.leaf), SectorModel(scene.content), random.Random(11)
        store.cut_at = cut_at
        try:
            disk = open_mem(store, scene.parents, writable=True)
            for _ in range(8):
                work(disk, model, rng)
            disk.close()
            model.flushed()
            done = True
        except PowerCut:
            pass
        judge(store.after_cut(rng), scene.parents, model, f"cut at {cut_at}")
    assert cut_at > 10


@pytest.mark.parametrize("name", ["empty dynamic", "dynamic", "child", "last block cut by the footer"])
@pytest.mark.parametrize("seed", range(daily_or_nightly(1, 4)))
def test_writes_during_a_flush(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-FLUSHED-OR-NEWER, INV-DATA-BEFORE-METADATA: writes and reads in the middle of a flush belong to the next
    one: this one puts none of their bits or BAT entries on the device, and what is in flight is not forgotten."""
    monkeypatch.setattr(commit, "MAX_CACHED_BYTES", -commit.MAX_DIRTY_BYTES)  # keep no clean page
    scene = SCENES[name](seed)
    store, model = CrashStore(scene.leaf), SectorModel(scene.content)
    disk = open_mem(store, scene.parents, writable=True)
    rng, inside = random.Random(seed), False

    def write_some() -> None:
        """A small write, often to a block that is in flight."""
        offset = rng.randrange(0, disk.size_bytes - 5000)
        data = rng.randbytes(rng.choice((512, 1500, 5000)))
        model.write(offset, data)
        disk.write(offset, data)

    def in_flush() -> None:
        """Called inside each operation of the flush, and of the writes made here."""
        nonlocal inside
        for cut in range(2):
            cut_rng = random.Random(f"{seed} {store.operation_count} {cut}")
            judge(store.after_cut(cut_rng), scene.parents, model, f"operation {store.operation_count}")
        if not inside:
            inside = True
            write_some()
            assert disk.read(0, disk.size_bytes) == model.current
            inside = False

    for _ in range(4):
        for _ in range(4):
            write_some()
        store.watcher = in_flush
        model.flush_begins()
        disk.flush()
        model.flush_ends()
        in_flush()
        store.watcher = None
    disk.close()
    assert store.pread(store.size() - SECTOR_SIZE, SECTOR_SIZE) == store.pread(0, SECTOR_SIZE), "INV-FOOTER-COPY"


@pytest.mark.parametrize("name", SCENES)
def test_a_closed_image_has_both_footers(name: str) -> None:
    """INV-FOOTER-COPY: when close has returned, both footers are on the device, the last at the end of the file."""
    scene = SCENES[name](9)
    store, model = CrashStore(scene.leaf), SectorModel(scene.content)
    disk = open_mem(store, scene.parents, writable=True)
    for seed in range(8):
        work(disk, model, random.Random(seed))
    disk.close()
    for seed in range(20):
        found = store.after_cut(random.Random(seed))
        assert found.size() == store.size()
        assert found.pread(0, SECTOR_SIZE) == found.pread(found.size() - SECTOR_SIZE, SECTOR_SIZE)


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("seed", range(4))
def test_no_data_is_in_flight_beside_metadata(name: str, seed: int) -> None:
    """INV-DATA-BEFORE-METADATA: when a BAT sector is written, or the bitmap of a block to which the BAT in the file
    points, every byte of data of such blocks is on the device."""
    scene = SCENES[name](seed)
    store = CrashStore(scene.leaf)
    disk = open_mem(store, scene.parents, writable=True)
    layer = disk.chain.leaf
    assert isinstance(layer, DynamicImage)
    metadata_writes = 0

    def watch() -> None:
        """Metadata in flight must be alone, with footers at most."""
        nonlocal metadata_writes
        pending = store.pending_sectors()
        in_file = Bat.load(store, layer.bat.table_offset_bytes, len(layer.bat))
        starts = [in_file.block_start(block) // SECTOR_SIZE for block in range(len(in_file))]
        bitmap_sectors = covering_sectors(BLOCK_SIZE // SECTOR_SIZE // 8)
        data: set[int] = set()
        metadata = {layer.bat.table_offset_bytes // SECTOR_SIZE}
        for start in starts:
            if start >= 0:
                metadata.update(range(start, start + bitmap_sectors))
                data.update(range(start + bitmap_sectors, start + bitmap_sectors + BLOCK_SIZE // SECTOR_SIZE))
        if pending & metadata:
            metadata_writes += 1
            assert not pending & data, "INV-DATA-BEFORE-METADATA"

    store.watcher = watch
    model, rng = SectorModel(scene.content), random.Random(seed)
    for _ in range(40):
        work(disk, model, rng)
    disk.write(disk.size_bytes - SECTOR_SIZE, bytes([1]) * SECTOR_SIZE)  # cover the short block, too
    disk.close()
    assert metadata_writes


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("seed", range(4))
def test_two_footers_are_never_in_flight(name: str, seed: int) -> None:
    """INV-FOOTER-COPY: while one footer is being written the other one is on the device."""
    scene = SCENES[name](seed)
    store = CrashStore(scene.leaf)
    footers_seen = 0

    def watch() -> None:
        """Either the copy is in flight, or footers after blocks are, and then the copy is durable."""
        nonlocal footers_seen
        sectors = [index for index in store.pending_sectors() if is_footer(store, index)]
        footers_seen += len(sectors)
        assert 0 not in sectors or len(sectors) == 1, "INV-FOOTER-COPY"
        assert not sectors or is_footer(store, 0), "INV-FOOTER-COPY"

    store.watcher = watch
    disk = open_mem(store, scene.parents, writable=True)
    model, rng = SectorModel(scene.content), random.Random(seed)
    for _ in range(30):
        work(disk, model, rng)
    disk.write(disk.size_bytes - SECTOR_SIZE, bytes([1]) * SECTOR_SIZE)  # cover the short block, too
    disk.close()
    assert footers_seen


def is_footer(store: MemStore, sector_index: int) -> bool:
    """Whether the sector begins like a footer."""
    return store.pread(sector_index * SECTOR_SIZE, 8) == b"conectix"


@pytest.mark.parametrize("name", ["dynamic", "child"])
@pytest.mark.parametrize("lost", ["copy", "tail"])
def test_either_footer_is_enough(name: str, lost: str) -> None:
    """INV-FOOTER-COPY: with one of the two footers overwritten by anything, the image opens and reads the same."""
    scene = SCENES[name](3)
    offset = 0 if lost == "copy" else scene.leaf.size() - SECTOR_SIZE
    for garbage in (bytes(SECTOR_SIZE), b"conectix" + bytes(504), random.Random(1).randbytes(SECTOR_SIZE)):
        damaged = scene.leaf.copy()
        damaged.pwrite(offset, garbage)
        with open_mem(damaged.copy(frozen=True), scene.parents) as disk:
            assert disk.read(0, disk.size_bytes) == scene.content
        with open_mem(damaged, scene.parents, writable=True) as disk:
            assert disk.read(0, disk.size_bytes) == scene.content
        footer = scene.leaf.pread(scene.leaf.size() - SECTOR_SIZE, SECTOR_SIZE)
        assert damaged.pread(0, SECTOR_SIZE) == damaged.pread(damaged.size() - SECTOR_SIZE, SECTOR_SIZE) == footer


@pytest.mark.parametrize("name", SCENES)
def test_blocks_do_not_move_or_overlap(name: str) -> None:
    """INV-NO-REUSE, INV-BLOCKS-DISJOINT: trims and zeroes free no block, and no two blocks ever share space, not even
    a current block with one of an earlier state of the image."""
    scene = SCENES[name](5)
    store, model, rng = scene.leaf.copy(), SectorModel(scene.content), random.Random(5)
    with open_mem(store, scene.parents, writable=True):
        pass  # mended, if necessary
    before = ParsedVhd.parse(store).entries
    for _ in range(6):
        with open_mem(store, scene.parents, writable=True) as disk:
            for _ in range(10):
                work(disk, model, rng)
            disk.trim(0, disk.size_bytes)
            disk.write_zeroes(0, BLOCK_SIZE + SECTOR_SIZE)
            model = SectorModel(disk.read(0, disk.size_bytes))
        after = ParsedVhd.parse(store)
        assert not after.overlaps(), "INV-BLOCKS-DISJOINT"
        for old, new in zip(before, after.entries, strict=True):
            assert old in (new, 0xFFFFFFFF), "INV-NO-REUSE: a block moved"
        before = after.entries
