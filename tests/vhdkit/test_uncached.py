# SPDX-License-Identifier: Apache-2.0
"""Files that are kept out of the page cache: what stays there, when a writer waits, and what a power cut may leave."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.harness.power import PowerRun, Scene, child_scene, dynamic_scene, vhdx_child_scene, vhdx_scene
from tests.harness.stores import CrashStore, MemStore
from tests.support import daily_or_nightly, not_available
from vhdkit import uncached
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.verbs.create import create_child, create_image
from vhdkit.disk import Disk, open_disk
from vhdkit.errors import InvalidArgument
from vhdkit.store import Buffer, FileStore
from vhdkit.uncached import PORTION_BYTES, CacheMode, Sweeper
from vhdkit.units import KIB, MIB, PAGE_SIZE

NONE = OpenOptions(cache=CacheMode.NONE)
PATIENCE = 20  # seconds, for threads that must not hang
BOUND_BYTES = 5 * PORTION_BYTES  # four portions, and what the kernel reads ahead
_TMPFS = "tmpfs"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def cached_pages(path: Path) -> list[bool]:
    """For each page of the file, whether it is in the page cache."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE) as view:
        found = ctypes.create_string_buffer(-(-len(view) // PAGE_SIZE))
        start = ctypes.addressof(ctypes.c_char.from_buffer(view))
        assert _libc.mincore(start, len(view), found) == 0
    return [bool(byte & 1) for byte in found.raw]


def cached_bytes(path: Path) -> int:
    """How much of the file is in the page cache."""
    return sum(cached_pages(path)) * PAGE_SIZE


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system whose files are not always in memory."""
    for place in (tmp_path, Path("/var/tmp")):
        with tempfile.TemporaryDirectory(dir=place, prefix="uncached-") as name:
            probe = Path(name, "probe")
            probe.write_bytes(bytes(MIB))
            with probe.open("rb") as file:
                os.fdatasync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if not cached_bytes(probe):
                yield Path(name)
                return
    not_available("all folders for temporary files are in memory")


def _filled(disk: Disk, size: int) -> Iterator[None]:
    """Write the whole disk, MiB by MiB."""
    block = bytearray(random.Random(1).randbytes(MIB))
    for offset in range(0, size, MIB):
        block[:8] = offset.to_bytes(8, "little")
        disk.write(offset, block)
        yield


# -- what stays in the cache ------------------------------------------------------------------------------------


def test_little_of_an_image_is_cached(folder: Path) -> None:
    """While 96 MiB are written and read back, at most the bound is in the cache, at every moment; else all of it."""
    path, size = folder / "disk.vhd", 96 * MIB
    create_image(path, size)
    with open_disk(path, writable=True, options=NONE) as disk:
        for number, _ in enumerate(_filled(disk, size)):
            if number % 4 == 0:
                assert cached_bytes(path) <= BOUND_BYTES
        disk.flush()
        for offset in range(0, size, MIB):
            found = disk.read(offset, MIB)
            assert int.from_bytes(found[:8], "little") == offset
            if offset % (4 * MIB) == 0:
                assert cached_bytes(path) <= BOUND_BYTES
    with open_disk(path) as disk:  # what the same reads leave otherwise
        for offset in range(0, size, MIB):
            disk.read(offset, MIB)
    assert cached_bytes(path) > 2 * BOUND_BYTES


def test_all_layers_of_a_chain_share_the_bound(folder: Path) -> None:
    """Reading a chain of four layers leaves no more in the cache than reading one file."""
    paths, part = [folder / f"{number}.vhd" for number in range(4)], 24 * MIB
    create_image(paths[0], 4 * part)
    for number, path in enumerate(paths):
        if number:
            create_child(path, paths[number - 1])
        with open_disk(path, writable=True) as disk:
            for offset in range(number * part, (number + 1) * part, MIB):
                disk.write(offset, bytes([number + 1]) * MIB)
    with open_disk(paths[-1], options=NONE) as disk:
        for _ in range(2):
            for offset in range(0, 4 * part, MIB):
                assert disk.read(offset, MIB)[:1] == bytes([offset // part + 1])
        assert sum(map(cached_bytes, paths)) <= BOUND_BYTES


def test_a_parent_that_others_use_stays_cached(folder: Path) -> None:
    """A base that another disk holds is not dropped; once it is closed there, it is."""
    base, size = folder / "base.vhd", 64 * MIB
    create_image(base, size)
    with open_disk(base, writable=True) as disk:
        list(_filled(disk, size))
    leaves = [folder / "a.avhd", folder / "b.avhd"]
    for leaf in leaves:
        create_child(leaf, base)
    other, own = open_disk(leaves[0]), open_disk(leaves[1], options=NONE)
    with own:
        with other:
            for disk in (other, own):
                for offset in range(0, size, MIB):
                    disk.read(offset, MIB)
            assert cached_bytes(base) > size * 3 // 4
        for offset in range(0, size, MIB):
            own.read(offset, MIB)
        assert cached_bytes(base) <= BOUND_BYTES


def test_ranges_that_were_asked_for_stay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked for ahead is still cached after a sweep, and leaves the cache when more was asked for."""
    monkeypatch.setattr(uncached, "PORTION_BYTES", 1 << 40)  # sweeps are made below
    monkeypatch.setattr(uncached, "_TOO_MANY_BYTES", 1 << 40)
    path = folder / "file"
    path.write_bytes(bytes(64 * MIB))
    sweeper = Sweeper()
    with FileStore.open(path, writable=True) as store:
        store.sync()
        store.keep_out_of_cache(sweeper)
        assert store.uncached is not None

        def asked(number: int) -> None:
            assert store.uncached is not None
            sweeper.asked(store.uncached, number * 8 * MIB, 8 * MIB)
            store.pread(number * 8 * MIB, 8 * MIB)

        def is_cached(number: int) -> bool:
            pages = 8 * MIB // PAGE_SIZE
            return all(cached_pages(path)[number * pages : (number + 1) * pages])

        asked(1)
        asked(3)
        store.pread(0, 8 * MIB)
        store.uncached.begin_writing()
        store.uncached.drop(sweeper.kept(store.uncached))
        assert [is_cached(number) for number in range(4)] == [False, True, False, True]
        asked(5)
        store.pread(0, 8 * MIB)
        store.uncached.begin_writing()
        store.uncached.drop(sweeper.kept(store.uncached))
        assert [is_cached(number) for number in range(6)] == [False, False, False, True, False, True]


# -- waiting ----------------------------------------------------------------------------------------------------


class _SlowDevice:
    """In place of the kernel: `sync_file_range` waits until the device is let go, or fails."""

    def __init__(self) -> None:
        self.goes_on = threading.Event()
        self.is_entered = threading.Event()
        self.answer = 0

    def sync_file_range(self, *arguments: int) -> bool:
        self.is_entered.set()
        assert self.goes_on.wait(PATIENCE)
        return not self.answer


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[_SlowDevice]:
    """A device that writes nothing until it is let go."""
    slow = _SlowDevice()
    monkeypatch.setattr(uncached, "sync_file_range", slow.sync_file_range)
    yield slow
    slow.goes_on.set()


def test_a_writer_waits_for_a_slow_device(tmp_path: Path, device: _SlowDevice) -> None:
    """With two portions not yet written, `try_write` refuses, reads go on, and a write waits until the device has."""
    path = tmp_path / "disk.vhd"
    create_image(path, 64 * MIB)
    with open_disk(path, writable=True, options=NONE) as disk:
        written = 0
        while disk.try_write(written, memoryview(bytes(MIB))):
            written += MIB
        assert device.is_entered.wait(PATIENCE)
        assert 2 * PORTION_BYTES <= written <= 4 * PORTION_BYTES
        assert disk.read(0, 4096) == bytes(4096)
        thread = threading.Thread(target=disk.write, args=(written, bytes(MIB)), daemon=True)
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()
        device.goes_on.set()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert disk.try_write(0, memoryview(bytes(MIB)))


def test_readers_do_not_wait_for_a_slow_device(folder: Path, device: _SlowDevice) -> None:
    """While a sweep waits for the device, readers drop what they read by themselves."""
    path = folder / "file"
    path.write_bytes(bytes(96 * MIB))
    with FileStore.open(path, writable=True) as store:
        store.sync()
        store.keep_out_of_cache(Sweeper())
        for offset in range(0, 2 * PORTION_BYTES, MIB):
            store.pwrite(offset, bytes(MIB))
        assert device.is_entered.wait(PATIENCE)
        store.sync()  # the pages are clean now, but the sweep still waits
        for _ in range(2):
            for offset in range(0, 96 * MIB, MIB):
                store.pread(offset, MIB)
        assert cached_bytes(path) <= BOUND_BYTES
        device.goes_on.set()


def test_nothing_is_dropped_after_a_failed_write(
    folder: Path, device: _SlowDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the device could not write, memory may have the only copy: it stays, and the error is left for `sync`."""
    path = folder / "file"
    path.write_bytes(bytes(4 * PORTION_BYTES))
    device.answer = -1
    device.goes_on.set()
    with FileStore.open(path, writable=True) as store:
        store.sync()
        store.keep_out_of_cache(Sweeper())
        for offset in range(0, 4 * PORTION_BYTES, MIB):
            store.pwrite(offset, b"x" * MIB)
        store.uncached.sweeper.make_room()  # type: ignore[union-attr]  # kept out of the cache above
        store.sync()
        assert all(cached_pages(path))


def test_without_threads_the_writer_sweeps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no thread can be started, a writer does the work itself, and the bound holds."""

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    path = folder / "file"
    path.write_bytes(b"")
    with FileStore.open(path, writable=True) as store:
        store.keep_out_of_cache(Sweeper())
        for offset in range(0, 96 * MIB, MIB):
            store.pwrite(offset, bytes(MIB))
        assert cached_bytes(path) <= BOUND_BYTES


# -- opening ----------------------------------------------------------------------------------------------------


def test_the_mode_is_checked() -> None:
    """A mode may be a plain string; others are refused when they are given (INV-OPTIONS-CHECKED)."""
    assert OpenOptions(cache="none").cache is CacheMode.NONE
    assert OpenOptions().cache is CacheMode.WRITEBACK
    with pytest.raises(InvalidArgument, match=r"cache must be one of 'writeback', 'none', not 'nothing'"):
        OpenOptions(cache="nothing")


def test_descriptors_are_closed(tmp_path: Path) -> None:
    """Closing a disk closes the second descriptor of each layer, and so does opening that fails."""
    base, leaf = tmp_path / "base.vhd", tmp_path / "leaf.avhd"
    create_image(base, 4 * MIB)
    create_child(leaf, base)
    before = sorted(os.listdir("/proc/self/fd"))
    with open_disk(leaf, writable=True, options=NONE) as disk:
        disk.write(0, bytes(KIB))
    base.unlink()
    with ExitStack() as stack:
        stack.enter_context(pytest.raises(Exception, match=r"base"))
        stack.enter_context(open_disk(leaf, writable=True, options=NONE))
    assert sorted(os.listdir("/proc/self/fd")) == before


# -- power cuts -------------------------------------------------------------------------------------------------


class _Swept(CrashStore):
    """A store whose bytes lie in a real file that is kept out of the cache; reads must equal what memory has."""

    def __init__(self, start: MemStore, path: Path) -> None:
        super().__init__(start)
        path.write_bytes(start.contents())
        self.file = FileStore.open(path, writable=True)
        self.file.keep_out_of_cache(Sweeper())

    def pread(self, offset_bytes: int, size_bytes: int) -> bytes:
        """See `ReadStore.pread`."""
        found = self.file.pread(offset_bytes, size_bytes)
        assert found == super().pread(offset_bytes, size_bytes)
        return found

    def pread_into(self, offset_bytes: int, buffer: memoryview) -> None:
        """See `ReadStore.pread_into`."""
        super().pread_into(offset_bytes, buffer)
        expected = bytes(buffer)
        self.file.pread_into(offset_bytes, buffer)
        assert buffer == expected

    def pwrite(self, offset_bytes: int, data: Buffer) -> None:
        """See `Store.pwrite`."""
        self.file.pwrite(offset_bytes, data)
        super().pwrite(offset_bytes, data)

    def punch(self, offset_bytes: int, size_bytes: int) -> None:
        """See `Store.punch`."""
        self.file.punch(offset_bytes, size_bytes)
        super().punch(offset_bytes, size_bytes)

    def reserve(self, offset_bytes: int, size_bytes: int) -> None:
        """See `Store.reserve`."""
        self.file.reserve(offset_bytes, size_bytes)
        super().reserve(offset_bytes, size_bytes)

    def truncate(self, size_bytes: int) -> None:
        """See `Store.truncate`."""
        self.file.truncate(size_bytes)
        super().truncate(size_bytes)

    def sync(self) -> None:
        """See `Store.sync`."""
        self.file.sync()
        super().sync()

    def close(self) -> None:
        """See `ReadStore.close`."""
        self.file.close()
        super().close()


SCENES: dict[str, Callable[[int], Scene]] = {
    "vhd": dynamic_scene,
    "vhd child": child_scene,
    "vhdx": vhdx_scene,
    "vhdx child": vhdx_child_scene,
}


def _counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[None]:
    """A list that grows with every call of this function of `os`."""
    call = getattr(os, name)
    calls: list[None] = []

    def counted(*arguments: object) -> object:
        calls.append(None)
        return call(*arguments)

    monkeypatch.setattr(os, name, counted)
    return calls


@pytest.mark.parametrize("kind", SCENES)
def test_power_cuts(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Swept at every few requests, a file reads as it was written, and after a cut at any moment it holds what was
    flushed (INV-FLUSHED-OR-NEWER).
    """
    monkeypatch.setattr(uncached, "PORTION_BYTES", 16 * KIB)
    monkeypatch.setattr(uncached, "_BEHIND_BYTES", 32 * KIB)
    syncs = _counted(monkeypatch, "fdatasync")
    drops = _counted(monkeypatch, "posix_fadvise")
    for seed in range(daily_or_nightly(1, 40)):
        syncs.clear()
        path = folder / f"{seed}.image"
        run = PowerRun(
            SCENES[kind](seed), seed, cuts=1, steps=daily_or_nightly(12, 22), second_cuts=False,
            make_store=functools.partial(_Swept, path=path),
        )  # fmt: skip
        run.run()
        assert run.judged > run.operations
        assert len(syncs) == run.syncs > 0
        assert drops
        assert path.read_bytes() == run.store.copy().contents()
        path.unlink()
