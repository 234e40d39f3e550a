# SPDX-License-Identifier: Apache-2.0
"""Compacting a VHDX: the file becomes smaller, no disk changes, and no space is reused too early."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from tests.harness.packing import Crowd, content_of, cut_everywhere, short_content_of, vhdx_crowd
from tests.harness.power import faults_of, open_mem
from tests.harness.stores import CrashStore, Fault, FaultyStore, MemStore, io_failed, no_space, sync_failed
from tests.harness.vhd_builder import pattern
from tests.harness.vhdx_builder import LINKAGE, Vhdx, VhdxBlock
from tests.support import daily_or_nightly
from tests.vhdkit.formats.vhdx.images import assert_equal_headers
from vhdkit import errors
from vhdkit.chain.verbs.compact import compactable_of, plan_compact, run_compact
from vhdkit.formats.format import CompactPlan
from vhdkit.formats.guard import SyncGuard
from vhdkit.formats.probe import open_layer
from vhdkit.formats.vhdx import log
from vhdkit.formats.vhdx.bat import BlockState, state_of
from vhdkit.formats.vhdx.commit import Commit
from vhdkit.formats.vhdx.entries import read_bat
from vhdkit.formats.vhdx.format import VHDX
from vhdkit.formats.vhdx.log import Entry
from vhdkit.formats.vhdx.metadata import read_metadata
from vhdkit.image import Layer
from vhdkit.units import GIB, MIB, PAGE_SIZE, SECTOR_SIZE, whole_sectors

KINDS = {"dynamic": (False, 512), "child": (True, 512), "4k": (False, 4096), "child-4k": (True, 4096)}
NIGHTLY = daily_or_nightly(0, 1)


def made(kind: str, seed: int, *, blocks: int = 6) -> Crowd:
    """A crowd of a kind."""
    differencing, sector_bytes = KINDS[kind]
    return vhdx_crowd(seed, blocks=blocks, differencing=differencing, sector_bytes=sector_bytes)


def compacted(layers: list[Layer]) -> CompactPlan:
    """Compact the first of the layers."""
    compactable = compactable_of(layers[0])
    plan = plan_compact(layers, compactable)
    run_compact(compactable, plan)
    return plan


def compact(scene: Crowd) -> CompactPlan:
    """Compact and close."""
    layers = scene.layers
    plan = compacted(layers)
    layers[0].close()
    return plan


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(daily_or_nightly(6, 60)))
def test_inv_compact_preserves_the_disk(kind: str, seed: int) -> None:
    """INV-COMPACT-PRESERVES: every byte reads as before, children know the image, and a second run changes nothing."""
    scene = made(kind, seed)
    before, linkage_id = scene.store.size(), VHDX.linkage_id(scene.store)
    plan = compact(scene)
    assert content_of(scene.store, scene.parents) == scene.content
    assert VHDX.linkage_id(scene.store) == linkage_id
    assert scene.store.size() == min(before, plan.file_end_bytes)
    assert {one.code for one in VHDX.check(scene.store)} <= {"space-unused", "block-cut", "bits-past-end"}
    assert_equal_headers(scene.store)
    after = scene.store.contents()
    again = compact(scene)
    assert len(again.dropped) == again.moved_block_count == 0 and scene.store.contents() == after
    content = bytearray(scene.content)
    with open_mem(scene.store, scene.parents, writable=True) as disk:  # and it is written to as any other image
        disk.write(0, b"new" * 4096)
        disk.write_zeroes(disk.size_bytes - 8192, 4096)
    content[: 3 * 4096], content[-8192:-4096] = b"new" * 4096, bytes(4096)
    assert content_of(scene.store, scene.parents) == content and not faults_of(scene.store)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS if NIGHTLY else ["child"])
@pytest.mark.parametrize("seed", range(daily_or_nightly(1, 5)))
@pytest.mark.parametrize("like_qemu", [False, True] if NIGHTLY else [True])
def test_inv_compact_preserves_the_disk_at_every_cut(kind: str, seed: int, like_qemu: bool) -> None:
    """INV-COMPACT-PRESERVES: two cuts, inside any write or sync, leave the same disk, and compacting completes."""
    scene = made(kind, moving_seed(kind, seed), blocks=5)
    cuts, chance = daily_or_nightly(1, 3), 0.3 if NIGHTLY else 0.012  # every day one second run is cut
    with qemu_replays() if like_qemu else contextlib.nullcontext():
        cut_everywhere(scene, compacted, (scene.content,), seed=seed, cuts=cuts, chance=chance)


@functools.cache
def moving_seed(kind: str, number: int) -> int:
    """The seed of the n-th crowd in which blocks are dropped and others move."""
    found = []
    for seed in range(200):
        scene = made(kind, seed, blocks=5)
        plan = plan_compact([VHDX.open(scene.store), *scene.parents], compactable_of(VHDX.open(scene.store)))
        if len(plan.dropped) and plan.moved_block_count:
            found.append(seed)
        if len(found) > number:
            return found[-1]
    raise AssertionError("no such crowd")


@contextlib.contextmanager
def qemu_replays() -> Iterator[None]:
    """Replay the log as QEMU does: with the intact entries before the tail as well, up to the first gap."""
    real = log.active_sequence

    def from_the_oldest(entries: dict[int, Entry], log_size: int) -> list[Entry]:
        found = real(entries, log_size)
        by_end = {(one.offset_bytes + one.header.entry_length) % log_size: one for one in entries.values()}
        while found:
            before = by_end.get(found[0].offset_bytes)
            if before is None or before.header.sequence_number + 1 != found[0].header.sequence_number:
                break
            found.insert(0, before)
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(log, "active_sequence", from_the_oldest)
        yield


def reused_scene(seed: int) -> None:
    """A session writes to a child, then compacts it: a block moves into the space of a bitmap whose pages were logged.

    Every cut of the compaction is judged, by a reader that replays as QEMU does.
    """
    rng = random.Random(seed)
    base = Vhdx(6 * MIB).store("base.vhdx", frozen=True)
    parents = [open_layer(base)]
    built = Vhdx(6 * MIB, parent=LINKAGE)
    store = CrashStore(built.store("child.avhdx"))
    layer = open_layer(store, writable=True)
    layer.write(8, memoryview(b"x" * PAGE_SIZE))  # a bitmap, and a block that is partially present
    layer.flush()
    data = rng.randbytes(MIB)
    layer.write(whole_sectors(5 * MIB), memoryview(data))
    layer.flush()
    layer.write_zeroes(8, PAGE_SIZE // SECTOR_SIZE)
    layer.flush()
    content = bytes(5 * MIB) + data

    def judge() -> None:
        for _ in range(3):
            found = store.after_cut(rng)
            with qemu_replays():
                try:
                    assert content_of(found, parents) == content
                except errors.CorruptImage as error:  # an entry over a block
                    raise AssertionError(str(error)) from error
                assert not faults_of(found)

    store.watcher = judge
    plan = compacted([layer, *parents])
    assert len(plan.dropped) == 1 and plan.moved_block_count == 1
    layer.close()
    store.watcher = None
    assert store.size() == 5 * MIB and content_of(store, parents) == content


@pytest.mark.parametrize("seed", range(daily_or_nightly(1, 10)))
def test_space_of_metadata_is_used_only_under_another_log_id(seed: int) -> None:
    """An entry before the tail, which some programs replay, does not overwrite the former space of a bitmap."""
    reused_scene(seed)


def test_space_of_metadata_that_is_used_under_the_same_log_id_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-test: detects that, if the log is not closed, a replay of older entries overwrites a block."""
    monkeypatch.setattr(Commit, "settle", lambda self: (self.flush(), self._journal.settle()))
    with pytest.raises(AssertionError):
        for seed in range(4):
            reused_scene(seed)


def test_space_that_is_freed_before_the_entries_are_durable_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-test: detects that, if drops are only in memory, a moving block destroys one that a cut brings back."""
    real = SyncGuard.sync

    def careless(layers: list[Layer]) -> None:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(SyncGuard, "sync", lambda self: None)
            compacted(layers)
        real(layers[0].commit.guard)  # type: ignore[attr-defined]

    with pytest.raises(AssertionError):
        for number in range(6):
            scene = made("child", moving_seed("child", number), blocks=5)
            cut_everywhere(scene, careless, (scene.content,), seed=number, cuts=6, again=False)


@pytest.mark.timeout(1800)
@pytest.mark.nightly
def test_a_copy_that_is_not_durable_before_its_entry_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-test: detects an entry that leads to stale content of free space."""
    monkeypatch.setattr(Commit, "sync", lambda self: None)
    with pytest.raises(AssertionError):
        for number in range(6):
            scene = made("dynamic", moving_seed("dynamic", number), blocks=5)
            cut_everywhere(scene, compacted, (scene.content,), seed=number, cuts=6, again=False)


OPERATIONS = ["read", "write", "punch", "truncate", "sync"]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("operation", OPERATIONS if NIGHTLY else ["write", "sync"])
@pytest.mark.parametrize("make_error", [io_failed, no_space, sync_failed] if NIGHTLY else [no_space])
@pytest.mark.parametrize("kind", ["child", "dynamic"] if NIGHTLY else ["child"])
def test_every_failing_call_is_a_clean_error(
    operation: str, make_error: Callable[[], errors.VhdkitError], kind: str
) -> None:
    """Whichever call fails, the error is reported, the disk is unchanged, and a second attempt completes."""
    scene = made(kind, moving_seed(kind, 1), blocks=5)
    for at in range(1, 300, daily_or_nightly(2, 1)):
        store = FaultyStore(scene.store)
        layers = scene.over(store)
        store.faults.append(Fault(operation, make_error, at=at, partly=operation == "write"))
        try:
            compacted(layers)
        except errors.VhdkitError:
            pass
        else:
            assert at > 1 or operation in ("punch", "truncate")
            break
        store.faults.clear()
        with contextlib.suppress(errors.SyncFailed):  # after the error of compacting
            layers[0].close()
        assert content_of(store, scene.parents) == scene.content, at
        compacted(scene.over(store))
        assert content_of(store, scene.parents) == scene.content and not faults_of(store)


def test_zeros_that_hide_data_need_no_space() -> None:
    """A block of zeros that a child owns as a whole becomes zeros without space; a partially owned one stays."""
    base = Vhdx(4 * MIB, blocks={number: VhdxBlock(6, (4 + number) * MIB, {0: pattern(MIB)}) for number in range(4)})
    parents = [open_layer(base.store("base.vhdx", frozen=True))]
    blocks = {
        0: VhdxBlock(6, 4 * MIB),
        1: VhdxBlock(7, 5 * MIB, bits=set(range(100))),
        2: VhdxBlock(7, 6 * MIB, bits=set(range(2048))),
        3: VhdxBlock(3, 8 * MIB),
    }
    store = Vhdx(4 * MIB, parent=LINKAGE, blocks=blocks, bitmaps={0: 7 * MIB}, file_size=9 * MIB).store()
    scene = Crowd(store, parents, content_of(store, parents))
    assert compact(scene).dropped.tolist() == [0, 2]
    assert content_of(store, parents) == scene.content and store.size() == 6 * MIB
    bat = read_bat(read_metadata(store))
    assert [bat.block(number) & 0xFFFFF for number in range(4)] == [2, 7, 2, 2]
    assert [bat.block(number) >> 20 for number in (0, 2, 3)] == [0, 0, 0]
    bits = store.pread(bat.bitmap_offset(0), 1024)
    assert bits[256:512] == b"\xff" * 12 + b"\x0f" + bytes(243) and not any(bits[:256]) and not any(bits[512:])


def test_bitmaps_that_no_block_needs_are_dropped() -> None:
    """Space that entries without content keep is freed; in an image without a parent, that of bitmaps, too."""
    blocks = {0: VhdxBlock(6, 6 * MIB, {0: pattern(MIB)}), 1: VhdxBlock(7, 5 * MIB, {}, {1, 2})}
    store = Vhdx(4 * MIB, parent=LINKAGE, blocks=blocks, bitmaps={0: 4 * MIB}).store()
    scene = Crowd(store, [open_layer(Vhdx(4 * MIB).store(frozen=True))], b"")
    assert compact(scene).dropped.tolist() == [1]
    assert store.size() == 5 * MIB and VHDX.check(store) == []
    assert read_bat(read_metadata(store)).bitmap_offset(0) == -1
    entries = {1: 5 * MIB | 1, 2: 6 * MIB | 3, 3: 7 * MIB | 2, 4096: 8 * MIB | 6}
    store = Vhdx(5 * GIB, blocks={0: VhdxBlock(6, 9 * MIB, {0: b"x"})}, entries=entries).store()
    compact(Crowd(store, [], b""))
    assert store.size() == 5 * MIB and VHDX.check(store) == []
    bat = read_bat(read_metadata(store))
    assert [bat.entry(number) for number in (1, 2, 3, 4096)] == [0, 0, 0, 0]


def test_the_space_of_an_old_table_is_found_again() -> None:
    """After it has outgrown its BAT, a compacted image is like one created with its new size."""
    blocks = {number: VhdxBlock(6, (7 - number) * MIB) for number in range(4)}
    blocks[0].data = {0: pattern(MIB)}
    store = Vhdx(4 * MIB, blocks=blocks).store()
    sizing = VHDX.resizable(layer := VHDX.open(store, writable=True))
    assert sizing is not None
    sizing.run(sizing.plan(300 * GIB))
    layer.close()
    assert store.size() == 11 * MIB
    compact(Crowd(store, [], b""))
    assert store.size() == 7 * MIB and VHDX.check(store) == []
    assert short_content_of(store, []) == (300 * GIB, pattern(MIB))


def test_log_and_regions_from_the_end_fill_gaps_too() -> None:
    """A file whose structures lie after its blocks becomes as short as any other; unknown regions stay."""
    image = Vhdx(4 * MIB, log=30 * MIB, metadata=31 * MIB, table=32 * MIB)
    image.blocks = {2: VhdxBlock(6, 20 * MIB, {0: pattern(MIB)}), 3: VhdxBlock(6, 10 * MIB)}
    store = image.store()
    compact(Crowd(store, [], b""))
    assert store.size() == 5 * MIB and VHDX.check(store) == []
    assert content_of(store, []) == bytes(2 * MIB) + pattern(MIB) + bytes(MIB)
    with open_mem(store, writable=True) as disk:
        disk.write(0, b"new")
    assert_equal_headers(store)
    assert content_of(store, [])[:4] == b"new\0"
    image.other = 33 * MIB
    compact(Crowd(store := image.store(), [], b""))
    assert store.size() == 34 * MIB and store.pread(33 * MIB, 12) == b"other region"


def test_a_last_block_that_the_file_cuts_short_moves_whole() -> None:
    """A truncated last block gets the space of a whole block, with zeros in the part that was missing."""
    size = 2 * MIB + 3 * PAGE_SIZE
    image = Vhdx(
        size, 2 * MIB, blocks={0: VhdxBlock(6, 4 * MIB, {0: b""}), 1: VhdxBlock(6, 8 * MIB, {0: pattern(9000)})}
    )
    image.file_size = 8 * MIB + 3 * PAGE_SIZE
    store = image.store()
    assert compact(Crowd(store, [], b"")).moved_block_count == 1
    assert store.size() == 6 * MIB and VHDX.check(store) == []
    assert content_of(store, []) == bytes(2 * MIB) + pattern(9000).ljust(3 * PAGE_SIZE, b"\0")


def test_blocks_and_bitmaps_share_a_gap() -> None:
    """The lowest gap that is large enough takes what lies last, whatever its size."""
    image = Vhdx(12 * MIB, 4 * MIB, parent=LINKAGE)
    image.blocks = {0: VhdxBlock(6, 9 * MIB, {0: b"a"}), 1: VhdxBlock(7, 20 * MIB, {0: b"b" * 512}, {0})}
    image.bitmaps = {0: 30 * MIB}
    store = image.store()
    scene = Crowd(store, [open_layer(Vhdx(12 * MIB).store(frozen=True))], b"")
    content = content_of(store, scene.parents)
    assert compact(scene).moved_block_count == 2
    bat = read_bat(read_metadata(store))
    assert (bat.bitmap_offset(0), bat.block(1) >> 20) == (4 * MIB, 5)
    assert content_of(store, scene.parents) == content and store.size() == 13 * MIB


def test_a_fixed_image_is_not_compacted() -> None:
    """A fixed image keeps the space of all its blocks."""
    store = Vhdx(MIB, fixed=True, blocks={0: VhdxBlock(6, 4 * MIB)}).store(frozen=True)
    with pytest.raises(errors.InvalidArgument, match="fixed VHDX, whose file cannot be made smaller"):
        compactable_of(VHDX.open(store))


def test_a_large_image_moves_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches of blocks move, with small log entries."""
    monkeypatch.setattr("vhdkit.formats.vhdx.move._BATCH_BYTES", 2 * MIB)
    blocks = {number * 600: VhdxBlock(6, (200 - 2 * number) * MIB, {0: pattern(512, number)}) for number in range(9)}
    store = Vhdx(5000 * MIB, blocks=blocks).store()
    moved: list[int] = []
    compactable = compactable_of(layer := open_layer(store, writable=True))
    plan = compactable.plan(np.zeros(0, dtype=np.int64))
    compactable.run(moved.append)
    layer.close()
    assert sum(moved) == plan.moved_bytes == 9 * MIB and store.size() == 13 * MIB
    found = open_layer(store)
    assert all(found.store.pread(found.block_offset(n * 600), 512) == pattern(512, n) for n in range(9))
    states = [state_of(read_bat(read_metadata(store)).block(block)) for block in blocks]
    assert states == [BlockState.FULLY_PRESENT] * 9 and isinstance(store, MemStore)
