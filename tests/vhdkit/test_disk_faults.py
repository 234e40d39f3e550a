# SPDX-License-Identifier: Apache-2.0
"""Disks whose storage fails: full file systems, failed flushes, bad sectors, Ctrl-C."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.model import ParsedVhd, SectorModel
from tests.harness.power import BLOCK_SIZE, Scene, child_scene, dynamic_scene, open_mem, work
from tests.harness.stores import CrashStore, Fault, FaultyStore, MemStore, PowerCut, io_failed, no_space, sync_failed
from tests.support import not_available, require_tool
from vhdkit import errors
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.verbs.create import create_child, create_image
from vhdkit.disk import Disk, open_disk
from vhdkit.formats.probe import FormatName, open_layer
from vhdkit.formats.raw import create_raw
from vhdkit.formats.vhd import commit
from vhdkit.formats.vhd.create import create_fixed
from vhdkit.units import KIB, MIB, SECTOR_SIZE

BAT_OFFSET = 4096  # in the images that vhdkit creates
MAKERS: dict[str, Callable[[], Scene]] = {
    "dynamic": lambda: dynamic_scene(1, writes=0),
    "child": lambda: child_scene(1, writes=0),
}


def linear_scene(kind: str) -> Scene:
    """A raw or fixed image of zeros."""
    store = MemStore("disk.img" if kind == "raw" else "disk.vhd")
    (create_raw if kind == "raw" else create_fixed)(store, MIB)
    return Scene(store, [], bytes(MIB))


def scene_of(kind: str) -> Scene:
    """An image of any kind."""
    return MAKERS[kind]() if kind in MAKERS else linear_scene(kind)


def open_faulty(scene: Scene, *faults: Fault) -> tuple[Disk, FaultyStore]:
    """The scene's image, writable, on a store that is going to fail."""
    store = FaultyStore(scene.leaf)
    is_raw = store.name.endswith(".img")
    disk = Disk(raw_chain(store)) if is_raw else open_mem(store, scene.parents, writable=True)
    store.faults.extend(faults)
    return disk, store


def raw_chain(store: MemStore) -> Chain:
    """A chain of one raw image."""
    return Chain([open_layer(store, format_name=FormatName.RAW, writable=True)])


def everything(disk: Disk) -> bytes:
    """The whole disk."""
    return disk.read(0, disk.size_bytes)


# -- flushes that fail ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dynamic", "child", "raw", "fixed"])
@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_flush_poisons_the_disk(kind: str, failing: int) -> None:
    """INV-FLUSHED-OR-NEWER: after one failed fdatasync, even a single one, no flush reports success and no write is
    accepted until the image is opened again: the kernel has forgotten which pages were lost."""
    if kind in ("raw", "fixed") and failing > 1:
        failing = 1  # their flush is one sync
    disk, store = open_faulty(scene_of(kind), Fault("sync", sync_failed, at=failing))
    disk.write(0, b"lost" * 128)
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


@pytest.mark.parametrize("kind", ["dynamic", "child", "raw", "fixed"])
def test_a_failed_flush_at_close_is_reported(kind: str) -> None:
    """A close whose flush fails raises SyncFailed; the files are closed all the same."""
    disk, _ = open_faulty(scene_of(kind), Fault("sync", sync_failed))
    disk.write(0, b"lost" * 128)
    with pytest.raises(errors.SyncFailed):
        disk.close()
    disk.close()


@pytest.mark.parametrize("kind", ["dynamic", "child"])
def test_metadata_is_not_written_after_a_failed_data_sync(kind: str) -> None:
    """INV-DATA-BEFORE-METADATA: if the data did not reach the device, no bit and no BAT entry is written."""
    disk, store = open_faulty(scene_of(kind), Fault("sync", sync_failed))
    disk.write(0, b"lost" * 128)
    with pytest.raises(errors.SyncFailed):
        disk.flush()
    with pytest.raises(errors.SyncFailed):
        disk.close()
    assert set(ParsedVhd.parse(store).entries) == {0xFFFFFFFF}


# -- no space ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dynamic", "child"])
@pytest.mark.parametrize(("operation", "at"), [("reserve", 1), ("reserve", 2), ("write", 1)])
@pytest.mark.parametrize("flushed_before", [False, True])
def test_no_space_for_a_block_changes_nothing(kind: str, operation: str, at: int, flushed_before: bool) -> None:
    """If there is no space for a new block, the write that needs it raises NoSpace; file and disk are unchanged, the
    next flush succeeds, and once there is space the same write works."""
    scene = scene_of(kind)
    disk, store = open_faulty(scene)
    disk.write(0, b"first block" * 100)
    if flushed_before:
        disk.flush()
    content, file_before = everything(disk), store.contents()
    store.faults = [Fault(operation, no_space, at=at, partly=operation == "write")]
    with pytest.raises(errors.NoSpace):
        disk.write(BLOCK_SIZE + SECTOR_SIZE, b"y" * 8 * SECTOR_SIZE)
    assert everything(disk) == content
    assert store.contents() == file_before
    disk.flush()
    disk.write(
        BLOCK_SIZE + 9 * SECTOR_SIZE, b"z" * SECTOR_SIZE
    )  # elsewhere in the block: the failed data is not there
    expected = bytearray(content)
    expected[BLOCK_SIZE + 9 * SECTOR_SIZE : BLOCK_SIZE + 10 * SECTOR_SIZE] = b"z" * SECTOR_SIZE
    assert everything(disk) == expected
    disk.write(BLOCK_SIZE + SECTOR_SIZE, b"y" * 8 * SECTOR_SIZE)
    expected[BLOCK_SIZE + SECTOR_SIZE : BLOCK_SIZE + 9 * SECTOR_SIZE] = b"y" * 8 * SECTOR_SIZE
    disk.close()
    with open_mem(store, scene.parents) as reopened:
        assert everything(reopened) == expected
    assert not ParsedVhd.parse(store).overlaps()


@pytest.mark.parametrize("kind", ["dynamic", "child"])
def test_space_that_cannot_be_freed_is_not_used(kind: str) -> None:
    """INV-NO-REUSE: if even the cleanup of a failed allocation fails, the next block goes behind its leftovers."""
    scene = scene_of(kind)
    disk, store = open_faulty(scene, Fault("write", no_space, partly=True), Fault("truncate", io_failed))
    with pytest.raises(errors.NoSpace):
        disk.write(SECTOR_SIZE, b"y" * 80 * SECTOR_SIZE)
    disk.write(100 * SECTOR_SIZE, b"z" * SECTOR_SIZE)
    expected = bytearray(scene.content)
    expected[100 * SECTOR_SIZE : 101 * SECTOR_SIZE] = b"z" * SECTOR_SIZE
    assert everything(disk) == expected
    disk.close()
    with open_mem(store, scene.parents) as reopened:
        assert everything(reopened) == expected


@pytest.mark.parametrize(("kind", "zeroes"), [("dynamic", False), ("child", False), ("child", True)])
@pytest.mark.parametrize("retry_first_block_only", [False, True])
def test_a_write_that_fails_in_its_second_block(kind: str, zeroes: bool, retry_first_block_only: bool) -> None:
    """After a write over two blocks failed in the second, every sector is old or new, and later writes to the first
    block are read back: the map knows that the leaf owns it."""
    scene = scene_of(kind)
    disk, store = open_faulty(scene)
    everything(disk)  # the map is settled
    model = SectorModel(scene.content)
    start, data = BLOCK_SIZE - 4 * SECTOR_SIZE, (b"\0" if zeroes else b"n") * 8 * SECTOR_SIZE
    store.faults = [Fault("reserve", no_space, at=3)]
    model.write(start, data)
    with pytest.raises(errors.NoSpace):
        if zeroes:
            disk.write_zeroes(start, len(data))
        else:
            disk.write(start, data)
    model.adopt(everything(disk))
    again = b"m" * (4 if retry_first_block_only else 8) * SECTOR_SIZE
    model.write(start, again)
    disk.write(start, again)
    assert everything(disk) == model.current
    disk.close()
    with open_mem(store, scene.parents) as reopened:
        assert everything(reopened) == model.current


@pytest.mark.parametrize("make_error", [no_space, io_failed])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["dynamic", "child"])
def test_a_failed_metadata_write_can_be_retried(
    kind: str, at: int, make_error: Callable[[], errors.VhdkitError]
) -> None:
    """INV-FLUSHED-OR-NEWER: if a bitmap, a BAT sector or the footer cannot be written, the flush fails; nothing is
    forgotten, and the next successful flush makes everything durable."""
    scene = scene_of(kind)
    store = FlakyCrashStore(scene.leaf)
    disk, model = open_mem(store, scene.parents, writable=True), SectorModel(scene.content)
    for number, offset in enumerate((0, BLOCK_SIZE + 700)):
        data = bytes([number + 1]) * 3000
        model.write(offset, data)
        disk.write(offset, data)
    store.fault = Fault("write", make_error, at=at)
    with pytest.raises(errors.VhdkitError):
        disk.flush()
    assert everything(disk) == model.current
    late = b"late" * 200
    model.write(2 * BLOCK_SIZE, late)
    disk.write(2 * BLOCK_SIZE, late)
    disk.flush()
    model.flushed()
    for seed in range(10):
        with open_mem(store.after_cut(random.Random(seed)), scene.parents) as found:
            assert not model.violations(everything(found))


class FlakyCrashStore(CrashStore):
    """A store that loses power and fails a write."""

    fault: Fault | None = None

    def pwrite(self, offset_bytes: int, data: bytes | bytearray | memoryview) -> None:
        """Fail when the fault strikes."""
        if self.fault is not None and self.fault.strikes("write", offset_bytes):
            raise self.fault.make_error()
        super().pwrite(offset_bytes, data)


@pytest.mark.parametrize("kind", ["dynamic", "child"])
def test_a_flush_inside_a_write_that_fails(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a write's own flush (too many dirty bitmaps) finds no space, the write fails; the data that it already put
    into the leaf is not hidden by an old map, and the write can be repeated."""
    monkeypatch.setattr(commit, "MAX_DIRTY_BYTES", SECTOR_SIZE)
    scene = scene_of(kind)
    disk, store = open_faulty(scene)
    everything(disk)
    model = SectorModel(scene.content)
    for offset in (0, 64 * SECTOR_SIZE):
        if offset and kind == "dynamic":
            break  # its first write owned the whole block: no metadata is left to write
        bat = Fault("write", no_space, where=lambda where: where == BAT_OFFSET)
        store.faults = [Fault("write", no_space, at=2) if offset else bat]
        model.write(offset, b"n" * SECTOR_SIZE)
        with pytest.raises(errors.NoSpace):
            disk.write(offset, b"n" * SECTOR_SIZE)
        model.adopt(everything(disk))
        model.write(offset, b"m" * SECTOR_SIZE)
        disk.write(offset, b"m" * SECTOR_SIZE)
        assert everything(disk) == model.current
    disk.close()
    with open_mem(store, scene.parents) as reopened:
        assert everything(reopened) == model.current


def test_reading_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """If many bitmaps are dirty and cannot be flushed, reads still work: only writers flush."""
    monkeypatch.setattr(commit, "MAX_DIRTY_BYTES", SECTOR_SIZE)
    scene = child_scene(1, writes=0)
    with open_mem(scene.leaf, scene.parents, writable=True) as disk:
        disk.write(BLOCK_SIZE, b"old" * SECTOR_SIZE)
    content = bytearray(scene.content)
    content[BLOCK_SIZE : BLOCK_SIZE + 3 * SECTOR_SIZE] = b"old" * SECTOR_SIZE
    disk, _ = open_faulty(scene, Fault("write", no_space, persistent=True, where=lambda where: where == BAT_OFFSET))
    content[:SECTOR_SIZE] = b"n" * SECTOR_SIZE
    with pytest.raises(errors.NoSpace):
        disk.write(0, content[:SECTOR_SIZE])
    assert everything(disk) == content
    with pytest.raises(errors.NoSpace):
        disk.close()


# -- other failures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dynamic", "child", "raw", "fixed"])
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


@pytest.mark.parametrize("kind", ["dynamic", "child"])
@pytest.mark.parametrize("at", range(1, 12))
def test_ctrl_c_anywhere_loses_nothing(kind: str, at: int) -> None:
    """INV-FLUSHED-OR-NEWER, INV-CLOSE-REPORTS: after an interrupt inside any store operation of a write the disk
    refuses writes, since memory may hold half of one; it is flushed and closed with all that was written before, and
    the file keeps every promise. An interrupted flush is simply repeated."""
    scene = scene_of(kind)
    store = CrashStore(scene.leaf)
    disk, model = open_mem(store, scene.parents, writable=True), SectorModel(scene.content)
    strike = store.operation_count + at

    def watch() -> None:
        """Raise once."""
        if store.operation_count == strike:
            raise KeyboardInterrupt

    store.watcher = watch
    struck: tuple[int, bytes] | None = None
    for offset, step in ((0, disk.write), (BLOCK_SIZE - 700, disk.write), (0, None), (5000, disk.write), (0, None)):
        data = random.Random(offset).randbytes(1500)
        try:
            if step is None:
                disk.flush()
                model.flushed()
            else:
                step(offset, data)
                model.write(offset, data)
        except KeyboardInterrupt:
            struck = None if step is None else (offset, data)
            break
    if struck is not None:
        with pytest.raises(errors.SyncFailed, match="open it again"):
            disk.write(0, b"more")
    model.flushed()
    if struck is not None:
        model.write(*struck)  # this one may have been made in part
    if at % 2:
        disk.flush()
        for seed in range(3):
            with open_mem(store.after_cut(random.Random(seed)), scene.parents, writable=True) as again:
                assert not model.violations(everything(again)), "INV-CLOSE-REPORTS"
    disk.close()
    for found in (store.copy(), *(store.after_cut(random.Random(seed)) for seed in range(6))):
        with open_mem(found, scene.parents, writable=True) as again:
            assert not model.violations(everything(again)), "INV-FLUSHED-OR-NEWER"


@pytest.mark.parametrize("kind", ["dynamic", "child"])
@pytest.mark.parametrize("seed", range(6))
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
        assert not ParsedVhd.parse(found).overlaps()


class RainStore(CrashStore):
    """A store that loses power, and whose writes fail now and then, some after half the data."""

    def __init__(self, start: MemStore, rng: random.Random) -> None:
        super().__init__(start)
        self.chance = 0.0
        self._rng = rng

    def pwrite(self, offset_bytes: int, data: bytes | bytearray | memoryview) -> None:
        """Fail by chance."""
        if self._rng.random() < self.chance:
            half = len(data) // 2 // SECTOR_SIZE * SECTOR_SIZE
            if half:
                super().pwrite(offset_bytes, data[:half])
            raise self._rng.choice((no_space, io_failed))()
        super().pwrite(offset_bytes, data)

    def reserve(self, offset_bytes: int, size_bytes: int) -> None:
        """Fail by chance."""
        if self._rng.random() < self.chance:
            raise no_space()
        super().reserve(offset_bytes, size_bytes)


def test_a_dead_store_stays_dead() -> None:
    """After a power cut nothing that the engine tries on its way out reaches the device."""
    scene = scene_of("child")
    store = CrashStore(scene.leaf)
    disk = open_mem(store, scene.parents, writable=True)
    store.cut_at = store.operation_count + 3
    with pytest.raises(PowerCut):
        disk.write(0, b"x" * SECTOR_SIZE)
    found = store.after_cut(random.Random(0)).contents()
    with pytest.raises(PowerCut):
        disk.close()
    assert store.after_cut(random.Random(0)).contents() == found


# -- a real file system -----------------------------------------------------------------------------------------


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    if os.geteuid() != 0:
        not_available("needs root to mount a small file system")
    mount, folder = require_tool("mount"), tmp_path / "small"
    folder.mkdir()
    command = [mount, "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        not_available(f"cannot mount a small file system here: {done.stderr.strip()}")
    yield folder
    subprocess.run([require_tool("umount"), str(folder)], check=True)


@pytest.mark.parametrize("kind", ["dynamic", "child"])
def test_a_full_file_system(small_tmpfs: Path, kind: str) -> None:
    """On a file system that is really full the write that needs space raises NoSpace (exit code 7); earlier writes can
    be flushed, and once there is space the disk is usable again."""
    path, size = small_tmpfs / "leaf.vhd", 64 * MIB
    create_image(small_tmpfs / "base.vhd", size)
    if kind == "child":
        create_child(path, small_tmpfs / "base.vhd")
    else:
        (small_tmpfs / "base.vhd").rename(path)
    (small_tmpfs / "ballast").write_bytes(bytes(256 * KIB))
    rng, model = random.Random(1), SectorModel(bytes(size))
    with open_disk(path, writable=True) as disk:
        with pytest.raises(errors.NoSpace) as failure:
            for number in range(100):
                offset, data = number * (2 * MIB - 4096) % size, rng.randbytes(64 * KIB)
                model.write(offset, data)
                disk.write(offset, data)
        assert failure.value.exit_code == 7 and 10 < number < 99
        model.adopt(everything(disk))
        disk.flush()
        (small_tmpfs / "ballast").unlink()
        model.write(offset, data)
        disk.write(offset, data)
        disk.flush()
        assert everything(disk) == model.current
    with open_disk(path) as disk:
        assert everything(disk) == model.current
