# SPDX-License-Identifier: Apache-2.0
"""Disks whose storage fails: failed flushes and writes of metadata, bad sectors, Ctrl-C."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable

import pytest

from tests.harness.model import SectorModel
from tests.harness.power import faults_of, open_mem, work
from tests.harness.stores import CrashStore, Fault, PowerCut, io_failed, no_space, sync_failed
from tests.support import daily_or_nightly
from tests.vhdkit.faulty_disks import (
    BLOCKS,
    KINDS,
    FlakyCrashStore,
    RainStore,
    assert_reopens,
    everything,
    open_faulty,
    scene_of,
)
from vhdkit import errors
from vhdkit.formats.vhd import commit as vhd_commit
from vhdkit.formats.vhdx import commit as vhdx_commit
from vhdkit.units import MIB, SECTOR_SIZE

# Where the BAT begins, and the byte of which unused entries consist.
PLACE_OF_BAT = {
    "dynamic": (4096, b"\xff"),
    "child": (4096, b"\xff"),
    "vhdx": (3 * MIB, b"\0"),
    "vhdx-child": (3 * MIB, b"\0"),
}


# -- flushes that fail ------------------------------------------------------------------------------------------


SYNCS_OF_A_FLUSH = {"raw": 1, "fixed": 1, "dynamic": 2, "child": 2, "vhdx": 4, "vhdx-child": 5}  # the first one


@pytest.mark.parametrize(
    ("kind", "failing"), [(kind, at) for kind in KINDS for at in range(1, SYNCS_OF_A_FLUSH[kind] + 1)]
)
def test_a_failed_flush_poisons_the_disk(kind: str, failing: int) -> None:
    """INV-FLUSHED-OR-NEWER: after one failed fdatasync, even a single one, no flush reports success and no write is
    accepted until the image is opened again: the kernel has forgotten which pages were lost."""
    disk, store = open_faulty(scene_of(kind))
    disk.write(0, b"lost" * 128)
    store.faults = [Fault("sync", sync_failed, at=failing)]
    with pytest.raises(errors.SyncFailed):
        disk.flush()
    syncs = store.sync_count
    for _ in range(3):
        with pytest.raises(errors.SyncFailed):
            disk.flush()
        with pytest.raises(errors.SyncFailed):
            disk.write(0, b"more")
        with pytest.raises(errors.SyncFailed):
            disk.write_zeroes(0, SECTOR_SIZE)
        with pytest.raises(errors.SyncFailed):
            disk.trim(0, SECTOR_SIZE)
        with pytest.raises(errors.SyncFailed):
            disk.write(0, b"more", fua=True)
    with pytest.raises(errors.SyncFailed):  # INV-CLOSE-REPORTS
        disk.close()
    disk.close()
    assert store.sync_count == syncs, "a sync after the failed one would have reported success"


@pytest.mark.parametrize("kind", KINDS)
def test_no_flush_has_more_syncs_than_were_failed(kind: str) -> None:
    """The syncs of a first flush are those that the test above lets fail."""
    disk, store = open_faulty(scene_of(kind))
    disk.write(0, b"x" * SECTOR_SIZE)
    before = store.sync_count
    disk.flush()
    assert store.sync_count - before == SYNCS_OF_A_FLUSH[kind]
    disk.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_flush_at_close_is_reported(kind: str) -> None:
    """A close whose flush fails raises SyncFailed; the files are closed all the same."""
    disk, store = open_faulty(scene_of(kind))
    disk.write(0, b"lost" * 128)
    store.faults = [Fault("sync", sync_failed)]
    with pytest.raises(errors.SyncFailed):
        disk.close()
    disk.close()


@pytest.mark.parametrize("kind", BLOCKS)
def test_metadata_is_not_written_after_a_failed_data_sync(kind: str) -> None:
    """INV-DATA-BEFORE-METADATA: if the data did not reach the device, no bit and no BAT entry is written."""
    disk, store = open_faulty(scene_of(kind))
    disk.write(0, b"lost" * 128)
    store.faults = [Fault("sync", sync_failed)]
    with pytest.raises(errors.SyncFailed):
        disk.flush()
    with pytest.raises(errors.SyncFailed):
        disk.close()
    offset, unused = PLACE_OF_BAT[kind]
    assert store.pread(offset, 16) == unused * 16


# -- writes of metadata that fail -------------------------------------------------------------------------------


WRITES_OF_A_FLUSH = {"dynamic": 1, "child": 3, "vhdx": 5, "vhdx-child": 6}  # the first one, after two blocks


@pytest.mark.parametrize("make_error", [no_space, io_failed])
@pytest.mark.parametrize(
    ("kind", "at"), [(kind, at) for kind in BLOCKS for at in range(1, WRITES_OF_A_FLUSH[kind] + 1)]
)
def test_a_failed_metadata_write_can_be_retried(
    kind: str, at: int, make_error: Callable[[], errors.VhdkitError]
) -> None:
    """INV-FLUSHED-OR-NEWER: if a bitmap or a BAT sector cannot be written, the flush fails; nothing is forgotten, and
    the next successful flush makes everything durable."""
    scene = scene_of(kind)
    store = FlakyCrashStore(scene.leaf)
    disk, model = open_mem(store, scene.parents, writable=True), SectorModel(scene.content)
    block_size = scene.block_size_bytes
    for number, offset in enumerate((0, block_size + 700)):
        data = bytes([number + 1]) * 3000
        model.write(offset, data)
        disk.write(offset, data)
    store.fault = Fault("write", make_error, at=at)
    with pytest.raises(errors.VhdkitError):
        disk.flush()
    assert everything(disk) == model.current
    late = b"late" * 200
    model.write(2 * block_size, late)
    disk.write(2 * block_size, late)
    disk.flush()
    model.flushed()
    for seed in range(daily_or_nightly(4, 10)):
        with open_mem(store.after_cut(random.Random(seed)), scene.parents) as found:
            assert not model.violations(everything(found))


def flushing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every change of metadata be the last one for which there is room in memory."""
    monkeypatch.setattr(vhd_commit, "MAX_DIRTY_BYTES", SECTOR_SIZE)
    monkeypatch.setattr(vhdx_commit, "MAX_DIRTY_PAGES", 1)


def is_metadata(kind: str) -> Callable[[int], bool]:
    """Whether a write changes the BAT of a VHD, or the log of a VHDX."""
    if kind.startswith("vhdx"):
        return lambda offset: MIB <= offset < 2 * MIB
    return lambda offset: offset == PLACE_OF_BAT[kind][0]


@pytest.mark.parametrize(
    ("kind", "places"),
    [
        ("child", ["BAT", "bitmap"]),
        ("vhdx", ["BAT"]),  # its first write owned the whole block: no metadata is left to write
        ("vhdx-child", ["BAT", "bitmap"]),
    ],
)
def test_a_flush_inside_a_write_that_fails(kind: str, places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """If a write's own flush (too many dirty bitmaps) finds no space, the write fails; the data that it already put
    into the leaf is not hidden by an old map, and the write can be repeated."""
    flushing_at_once(monkeypatch)
    scene = scene_of(kind)
    disk, store = open_faulty(scene)
    everything(disk)
    model = SectorModel(scene.content)
    if kind == "child":  # the bitmap of a new block does not wait for a flush; those of later writes do
        model.write(0, b"n" * SECTOR_SIZE)
        disk.write(0, b"n" * SECTOR_SIZE)
    for number, place in enumerate(places):
        offset = (number if kind.startswith("vhdx") else number + 1) * 64 * SECTOR_SIZE
        if place == "BAT" or kind.startswith("vhdx"):
            fault = Fault("write", no_space, where=is_metadata(kind))
        else:  # after the data
            fault = Fault("write", no_space, at=2, where=lambda where: where != PLACE_OF_BAT["child"][0])
        store.faults = [fault]
        model.write(offset, b"n" * SECTOR_SIZE)
        with pytest.raises(errors.NoSpace):
            disk.write(offset, b"n" * SECTOR_SIZE)
        model.adopt(everything(disk))
        model.write(offset, b"m" * SECTOR_SIZE)
        disk.write(offset, b"m" * SECTOR_SIZE)
        assert everything(disk) == model.current
    disk.close()
    assert_reopens(store, scene, model.current)


@pytest.mark.parametrize("kind", ["child", "vhdx-child"])
def test_reading_writes_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If many bitmaps are dirty and cannot be flushed, reads still work: only writers flush."""
    flushing_at_once(monkeypatch)
    scene = scene_of(kind)
    block_size = scene.block_size_bytes
    with open_mem(scene.leaf, scene.parents, writable=True) as disk:
        disk.write(block_size, b"old" * SECTOR_SIZE)
    content = bytearray(scene.content)
    content[block_size : block_size + 3 * SECTOR_SIZE] = b"old" * SECTOR_SIZE
    disk, _ = open_faulty(scene, Fault("write", no_space, persistent=True, where=is_metadata(kind)))
    content[: 2 * SECTOR_SIZE] = b"n" * 2 * SECTOR_SIZE
    if kind == "child":  # the bitmap of a new block does not wait for a flush; that of the next write does
        disk.write(0, b"n" * SECTOR_SIZE)
    with pytest.raises(errors.NoSpace):
        disk.write(SECTOR_SIZE if kind == "child" else 0, b"n" * (1 if kind == "child" else 2) * SECTOR_SIZE)
    assert everything(disk) == content
    with pytest.raises(errors.NoSpace):
        disk.close()


# -- other failures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_sector_fails_its_read_only(kind: str) -> None:
    """A read error is an IoFailed for that request; the disk stays usable."""
    disk, store = open_faulty(scene_of(kind))
    disk.write(0, b"x" * SECTOR_SIZE)
    content = everything(disk)
    store.faults = [Fault("read", io_failed)]
    with pytest.raises(errors.IoFailed):
        disk.read(0, SECTOR_SIZE)
    assert everything(disk) == content
    disk.write(SECTOR_SIZE, b"y")
    disk.close()


CALLS = {"dynamic": 18, "child": 22, "vhdx": 31, "vhdx-child": 38}  # that change the file, in the test below
HEADERS = {"dynamic": 0, "child": 0, "vhdx": 3, "vhdx-child": 3}  # the first ones of them: no write has begun


@pytest.mark.parametrize(
    ("kind", "at"), [(kind, at) for kind in BLOCKS for at in range(1, CALLS[kind] + 1, daily_or_nightly(4, 1))]
)
def test_ctrl_c_anywhere_loses_nothing(kind: str, at: int) -> None:
    """INV-FLUSHED-OR-NEWER, INV-CLOSE-REPORTS: after an interrupt inside any store operation of a write the disk
    refuses writes, since memory may hold half of one; it is flushed and closed with all that was written before, and
    the file keeps every promise. An interrupted flush is simply repeated."""
    scene = scene_of(kind)
    store, block = CrashStore(scene.leaf), scene.block_size_bytes
    disk, model = open_mem(store, scene.parents, writable=True), SectorModel(scene.content)
    strike = store.operation_count + at

    def watch() -> None:
        """Raise once."""
        if store.operation_count == strike:
            raise KeyboardInterrupt

    store.watcher = watch
    struck: tuple[int, bytes] | None = None
    with contextlib.suppress(KeyboardInterrupt):
        for offset, step in ((0, disk.write), (block - 700, disk.write), (0, None), (5000, disk.write), (0, None)):
            data = random.Random(offset).randbytes(1500)
            if step is None:
                disk.flush()
                model.flushed()
                continue
            struck = (offset, data)
            step(offset, data)
            model.write(offset, data)
            struck = None
    if struck is not None and at > HEADERS[kind]:
        with pytest.raises(errors.SyncFailed, match="open it again"):
            disk.write(0, b"more")
    model.flushed()
    if struck is not None:
        model.write(*struck)  # this one may have been made in part
    if struck is not None and at <= HEADERS[kind]:
        disk.write(*struck)
    is_over = store.operation_count >= strike
    if at % 2 and is_over:
        disk.flush()
        for seed in range(3):
            with open_mem(store.after_cut(random.Random(seed)), scene.parents, writable=True) as again:
                assert not model.violations(everything(again)), "INV-CLOSE-REPORTS"
    with pytest.raises(KeyboardInterrupt) if not is_over else contextlib.nullcontext():
        disk.close()
    disk.close()
    for found in (store.copy(), *(store.after_cut(random.Random(seed)) for seed in range(daily_or_nightly(3, 12)))):
        with open_mem(found, scene.parents, writable=True) as again:
            assert not model.violations(everything(again)), "INV-FLUSHED-OR-NEWER"


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("seed", range(daily_or_nightly(4, 60)))
def test_random_faults_never_break_a_disk(kind: str, seed: int) -> None:
    """INV-FLUSHED-OR-NEWER, INV-BLOCKS-DISJOINT: under many transient faults each write is made, or may have been made
    in part, and what a successful flush promised survives a power cut."""
    scene, rng = scene_of(kind), random.Random(seed)
    store = RainStore(scene.leaf, random.Random(seed))
    disk, model = open_mem(store, scene.parents, writable=True), SectorModel(scene.content)
    store.chance = 0.15
    failures = 0
    for _ in range(80):
        try:
            work(disk, model, rng)
        except (errors.NoSpace, errors.IoFailed):
            failures += 1
            store.chance = 0
            model.adopt(everything(disk))
            store.chance = 0.15
    store.chance = 0
    assert failures
    disk.flush()
    model.flushed()
    for cut in range(6):
        found = store.after_cut(random.Random(cut))
        with open_mem(found, scene.parents, writable=True) as reopened:
            assert not model.violations(everything(reopened))
        assert not faults_of(found)


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_dead_store_stays_dead(kind: str) -> None:
    """After a power cut nothing that the engine tries on its way out reaches the device."""
    scene = scene_of(kind)
    store = CrashStore(scene.leaf)
    disk = open_mem(store, scene.parents, writable=True)
    store.cut_at = store.operation_count + 3
    with pytest.raises(PowerCut):
        disk.write(0, b"x" * SECTOR_SIZE)
    found = store.after_cut(random.Random(0)).contents()
    with pytest.raises(PowerCut):
        disk.close()
    assert store.after_cut(random.Random(0)).contents() == found
