# SPDX-License-Identifier: Apache-2.0
"""The byte-addressed interface: every edge of a request, every refusal, and several threads at once."""

from __future__ import annotations

import os
import random
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.harness.model import SectorModel
from tests.harness.power import BLOCK_SIZE, child_scene, dynamic_scene, open_mem
from tests.harness.stores import MemStore
from vhdkit import errors
from vhdkit.chain.verbs.create import DiskFormat, create_child, create_image
from vhdkit.disk import Disk, open_disk
from vhdkit.image import ExtentKind
from vhdkit.units import MIB, SECTOR_SIZE, covering_sectors

OFFSETS = (0, 1, 511, 512, 513, 1024, BLOCK_SIZE - 513, BLOCK_SIZE - 512, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 7)
SIZES = (0, 1, 2, 510, 511, 512, 513, 1023, 1024, 1025, 1535, 4096, 5000)


@pytest.fixture
def disk() -> Iterator[Disk]:
    """A writable child over a base with content."""
    scene = child_scene(1)
    with open_mem(scene.leaf, scene.parents, writable=True) as opened:
        yield opened


def everything(disk: Disk) -> bytes:
    """The whole disk."""
    return disk.read(0, disk.size_bytes)


@pytest.mark.parametrize("offset", OFFSETS)
def test_reads_at_every_edge(disk: Disk, offset: int) -> None:
    """A read returns exactly the requested bytes, wherever it begins and ends inside a sector."""
    content = everything(disk)
    for size in SIZES:
        for start in (offset, disk.size_bytes - size - offset):
            assert disk.read(start, size) == content[start : start + size], (start, size)
            buffer = bytearray(b"\xee" * (size + 2))
            disk.read_into(start, memoryview(buffer)[1 : size + 1])
            assert buffer == b"\xee" + content[start : start + size] + b"\xee", (start, size)


@pytest.mark.parametrize("kind", ["write", "zero", "trim"])
@pytest.mark.parametrize("offset", OFFSETS)
def test_changes_at_every_edge(disk: Disk, offset: int, kind: str) -> None:
    """A change touches exactly its bytes; a trim only whole sectors, which read as zeros or as before."""
    model, rng = SectorModel(everything(disk)), random.Random(offset)
    for size in SIZES:
        for start in (offset, disk.size_bytes - size - offset):
            if kind == "write":
                data = rng.randbytes(size)
                disk.write(start, data)
                model.write(start, data)
            elif kind == "zero":
                disk.write_zeroes(start, size)
                model.write(start, bytes(size))
            else:
                model.begin_trim(start, size)
                disk.trim(start, size)
                first = start // SECTOR_SIZE * SECTOR_SIZE
                model.adopt(everything(disk)[first : first + size + 2 * SECTOR_SIZE - size % SECTOR_SIZE], first)
            assert everything(disk) == model.current, (start, size)


@pytest.mark.parametrize("change", ["write", "zero", "trim"])
def test_empty_changes_write_nothing(change: str) -> None:
    """A request of zero bytes, also inside a sector, writes nothing: no block gets space for it."""
    scene = child_scene(1, writes=0)
    disk = open_mem(scene.leaf, scene.parents, writable=True)
    before = scene.leaf.contents()
    for offset in (0, 1, 700, BLOCK_SIZE, disk.size_bytes - 1, disk.size_bytes):
        assert disk.read(offset, 0) == b""
        if change == "write":
            disk.write(offset, b"")
        elif change == "zero":
            disk.write_zeroes(offset, 0)
        else:
            disk.trim(offset, 0)
    assert scene.leaf.contents() == before


def test_a_trim_leaves_the_parents_data_alone() -> None:
    """A trim leaves the parent's data visible in sectors that the child does not own; its own become zeros."""
    scene = child_scene(1, writes=0)
    with open_mem(scene.leaf, scene.parents, writable=True) as disk:
        disk.write(SECTOR_SIZE, b"x" * SECTOR_SIZE)
        disk.trim(0, 3 * SECTOR_SIZE)
        parts = scene.content[:SECTOR_SIZE], bytes(SECTOR_SIZE), scene.content[2 * SECTOR_SIZE : 3 * SECTOR_SIZE]
        assert disk.read(0, 3 * SECTOR_SIZE) == b"".join(parts)


def test_zeroes_hide_the_parent() -> None:
    """Zeros over an unallocated block of a child hide the parent's data, now and after a reopen."""
    scene = child_scene(1, writes=0)
    with open_mem(scene.leaf, scene.parents, writable=True) as disk:
        assert disk.read(0, BLOCK_SIZE) != bytes(BLOCK_SIZE)
        disk.write_zeroes(0, BLOCK_SIZE)
        assert disk.read(0, BLOCK_SIZE) == bytes(BLOCK_SIZE)
    with open_mem(scene.leaf, scene.parents) as disk:
        assert disk.read(0, BLOCK_SIZE) == bytes(BLOCK_SIZE)
        assert disk.read(BLOCK_SIZE, SECTOR_SIZE) == scene.content[BLOCK_SIZE : BLOCK_SIZE + SECTOR_SIZE]


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (-512, 512), (0, -1), (1, -1), (-1, 0)])
def test_negative_ranges_are_refused(disk: Disk, offset: int, size: int) -> None:
    """A range that begins before the disk or has a negative size raises OutOfRange in every method."""
    before = everything(disk)
    with pytest.raises(errors.OutOfRange):
        disk.read(offset, size)
    with pytest.raises(errors.OutOfRange):
        disk.write_zeroes(offset, size)
    with pytest.raises(errors.OutOfRange):
        disk.trim(offset, size)
    with pytest.raises(errors.OutOfRange):
        disk.extents(offset, size)
    assert everything(disk) == before


@pytest.mark.parametrize("beyond", [1, 511, 512, 1 << 62])
def test_ranges_past_the_end_are_refused(disk: Disk, beyond: int) -> None:
    """A request that ends one byte or more past the disk raises OutOfRange and changes nothing before the end."""
    before, end = everything(disk), disk.size_bytes
    size = min(beyond, 4096)
    with pytest.raises(errors.OutOfRange):
        disk.read(end - size + beyond, size)
    with pytest.raises(errors.OutOfRange):
        disk.read_into(end - size + beyond, bytearray(size))
    with pytest.raises(errors.OutOfRange):
        disk.write(end - size + beyond, bytes(size))
    with pytest.raises(errors.OutOfRange):
        disk.write_zeroes(end - 1, 1 + beyond)
    with pytest.raises(errors.OutOfRange):
        disk.trim(end - 1, 1 + beyond)
    with pytest.raises(errors.OutOfRange):
        disk.extents(end + beyond)
    assert everything(disk) == before
    assert disk.read(end, 0) == b""


def test_a_read_only_disk_refuses_changes() -> None:
    """INV-PARENT-READ-ONLY: a disk that was opened read-only raises ReadOnly and never touches its file."""
    scene = dynamic_scene(1)
    scene.leaf.frozen = True
    with open_mem(scene.leaf) as disk:
        assert not disk.writable
        with pytest.raises(errors.ReadOnly):
            disk.write(0, b"x")
        with pytest.raises(errors.ReadOnly):
            disk.write_zeroes(0, 512)
        with pytest.raises(errors.ReadOnly):
            disk.trim(0, 512)
        disk.flush()
        assert everything(disk) == scene.content


def test_a_closed_disk_refuses_everything(disk: Disk) -> None:
    """After close every request raises InvalidArgument; a second close is allowed."""
    disk.close()
    disk.close()
    with pytest.raises(errors.InvalidArgument, match="closed"):
        disk.read(0, 1)
    with pytest.raises(errors.InvalidArgument, match="closed"):
        disk.read_into(0, bytearray(512))
    with pytest.raises(errors.InvalidArgument, match="closed"):
        disk.write(0, b"x")
    with pytest.raises(errors.InvalidArgument, match="closed"):
        disk.write_zeroes(0, 1)
    with pytest.raises(errors.InvalidArgument, match="closed"):
        disk.trim(0, 1)
    with pytest.raises(errors.InvalidArgument, match="closed"):
        disk.flush()
    with pytest.raises(errors.InvalidArgument, match="closed"):
        disk.extents()


def test_buffers_of_any_kind(disk: Disk) -> None:
    """Data may be passed in any contiguous buffer, of bytes or of larger items."""
    numbers = memoryview(bytearray(b"abcdefgh" * 128)).cast("Q")
    disk.write(8, numbers)
    assert disk.read(8, 1024) == b"abcdefgh" * 128
    target = memoryview(bytearray(1024)).cast("I")
    disk.read_into(8, target)
    assert target.tobytes() == b"abcdefgh" * 128


def test_extents_cover_the_requested_range(disk: Disk) -> None:
    """Extents are whole sectors that cover the requested bytes, by default to the end of the disk."""
    for offset, size in ((0, None), (1, 1), (700, 5000), (BLOCK_SIZE - 1, 2), (disk.size_bytes, None)):
        runs = list(disk.extents(offset, size))
        end = disk.size_bytes if size is None else offset + size
        assert sum(run.sector_count for run in runs) == covering_sectors(end) - offset // SECTOR_SIZE
        assert not runs or runs[0].sector_index == offset // SECTOR_SIZE
        assert all(run.kind is not ExtentKind.ABSENT for run in runs)


def test_flushed_writes_are_there_after_reopening(tmp_path: Path) -> None:
    """With real files: what was written to a child is read again, and the parent's file did not change."""
    create_image(tmp_path / "base.vhd", 5 * MIB)
    with open_disk(tmp_path / "base.vhd", writable=True) as disk:
        disk.write(3 * MIB - 100, b"base" * 100)
    create_child(tmp_path / "leaf.avhd", tmp_path / "base.vhd")
    before = (tmp_path / "base.vhd").read_bytes()
    with open_disk(tmp_path / "leaf.avhd", writable=True) as disk:
        disk.write(3 * MIB, b"leaf", fua=True)
    with open_disk(tmp_path / "leaf.avhd") as disk:
        assert disk.read(3 * MIB - 100, 400) == b"base" * 25 + b"leaf" + b"base" * 74
    assert (tmp_path / "base.vhd").read_bytes() == before


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Make threads switch far more often than usual."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


class Crew:
    """Threads whose failures fail the test."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self.failures: list[BaseException] = []

    def start(self, work: object, *args: object) -> None:
        """Run `work(*args)` in another thread."""
        assert callable(work)

        def guarded() -> None:
            try:
                work(*args)
            except BaseException as failure:
                self.failures.append(failure)

        thread = threading.Thread(target=guarded)
        thread.start()
        self._threads.append(thread)

    def join(self) -> None:
        """Wait for all, and raise the first failure."""
        for thread in self._threads:
            thread.join()
        if self.failures:
            raise self.failures[0]


@pytest.mark.usefixtures("hasty_threads")
@pytest.mark.parametrize("disk_format", ["child", "vhdx-child", *DiskFormat])
def test_writers_that_share_sectors(tmp_path: Path, disk_format: str) -> None:
    """Threads that change their own bytes of shared sectors lose nothing; a flush at the same time is harmless, and
    readers see every byte either old or new."""
    path = tmp_path / ("disk.img" if disk_format == DiskFormat.RAW else "disk.vhd")
    block_size = MIB if "vhdx" in disk_format else BLOCK_SIZE
    if disk_format.endswith("child"):
        base_format = DiskFormat.VHDX if "vhdx" in disk_format else DiskFormat.DYNAMIC
        create_image(tmp_path / "base", 2 * MIB, disk_format=base_format)
        create_child(path, tmp_path / "base", block_size_bytes=block_size)
    else:
        create_image(path, 2 * MIB, disk_format=DiskFormat(disk_format), block_size_bytes=block_size)
    piece, workers, rounds = 300, 4, 25
    starts = (0, BLOCK_SIZE - 1000, MIB + 77)
    disk, crew, done = open_disk(path, writable=True), Crew(), threading.Event()

    def writer(number: int) -> None:
        for turn in range(rounds):
            for start in starts:
                offset = start + number * piece
                data = bytes([number + workers * (turn % 10) + 1]) * piece
                disk.write(offset, data)
                assert disk.read(offset, piece) == data

    def reader() -> None:
        while not done.is_set():
            for number in range(workers):
                found = set(disk.read(starts[1] + number * piece, piece))
                assert all(byte == 0 or (byte - 1) % workers == number for byte in found)

    def flusher() -> None:
        while not done.is_set():
            disk.flush()

    watchers = Crew()
    watchers.start(reader)
    watchers.start(flusher)
    for number in range(workers):
        crew.start(writer, number)
    try:
        crew.join()
    finally:
        done.set()
    watchers.join()
    disk.close()
    with open_disk(path) as reopened:
        for start in starts:
            for number in range(workers):
                last = bytes([number + workers * ((rounds - 1) % 10) + 1]) * piece
                assert reopened.read(start + number * piece, piece) == last


@pytest.mark.usefixtures("hasty_threads")
def test_reading_during_the_first_write_of_each_block() -> None:
    """A concurrent reader sees for each sector the parent's content or the new one, never anything else."""
    scene = child_scene(2, writes=0)
    disk, crew = open_mem(scene.leaf, scene.parents, writable=True), Crew()
    size, done = disk.size_bytes // SECTOR_SIZE * SECTOR_SIZE, threading.Event()
    new = random.Random(1).randbytes(size)

    def reader() -> None:
        model = SectorModel(scene.content)
        model.write(0, new)
        while not done.is_set():
            assert not model.violations(everything(disk))

    readers = Crew()
    readers.start(reader)
    for first in random.Random(2).sample(range(0, size, 8192), 150):
        crew.start(disk.write, first, new[first : first + 8192])
    try:
        crew.join()
    finally:
        done.set()
    readers.join()
    assert isinstance(disk.chain.leaf.store, MemStore)


def test_try_read_and_try_write_do_nothing_that_may_wait(tmp_path: Path) -> None:
    """What is not known yet or locked by another writer is refused, as are writes of parts of sectors."""
    path = tmp_path / "d.vhd"
    create_image(path, 8 * MIB)
    with open_disk(path, writable=True) as disk:
        data, buffer = os.urandom(8192), memoryview(bytearray(8192))
        assert disk.try_read_into(0, buffer) and bytes(buffer) == bytes(8192)
        assert disk.has_known_holes(0, 4 * MIB)
        assert disk.try_write(4096, memoryview(data))
        assert not disk.try_read_into(4096, buffer), "its bitmap was already read"
        assert disk.read(4096, 8192) == data
        assert disk.try_read_into(4096, buffer) and bytes(buffer) == data
        assert disk.try_read_into(4096, memoryview(bytearray())), "an empty buffer is filled at once"
        assert not disk.try_write(1, memoryview(data))
        assert disk.try_write_parts(4097, memoryview(data)[:700])
        assert disk.read(4096, 8192) == data[:1] + data[:700] + data[701:]
        for offset, size in ((1, 8192), (4095, 2), (5000, 511), (4608, 1), (12287, 513)):
            part = memoryview(bytearray(size))
            assert disk.try_read_into(offset, part) and part == disk.read(offset, size)
        assert not disk.try_read_into(2 * MIB - 1, memoryview(bytearray(3))) or disk.is_settled(2 * MIB - 1, 3)
        assert disk.known_holes(100, 4 * MIB) == [(100, 2 * MIB - 100, False), (2 * MIB, 2 * MIB + 100, True)]
        with ThreadPoolExecutor(1) as other:
            other.submit(disk._write_lock.acquire).result()
            assert not disk.try_write(0, memoryview(data)) and not disk.try_write_parts(1, memoryview(data))
            other.submit(disk._write_lock.release).result()
        with pytest.raises(errors.OutOfRange):
            disk.try_write(8 * MIB - SECTOR_SIZE, memoryview(data))
        with pytest.raises(errors.OutOfRange):
            disk.try_read_into(8 * MIB, buffer)
    with open_disk(path) as disk, pytest.raises(errors.ReadOnly):
        disk.try_write(0, memoryview(data))


def test_a_large_read_takes_only_its_own_memory(tmp_path: Path) -> None:
    """The data of a read exists once: there is no second copy at any moment."""
    create_image(tmp_path / "d.vhd", 24 * MIB)
    with open_disk(tmp_path / "d.vhd", writable=True) as disk:
        disk.write(5 * MIB, b"x" * MIB)
        disk.read(0, MIB)
        tracemalloc.start()
        try:
            data = disk.read(1, 20 * MIB)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert type(data) is bytes and len(data) == 20 * MIB
    assert data.count(b"x") == MIB and data.index(b"x") == 5 * MIB - 1
    assert peak < 30 * MIB
