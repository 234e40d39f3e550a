# SPDX-License-Identifier: Apache-2.0
"""The library inside other programs: threads, asyncio, forks, process pools, signal handlers, all kinds of buffers."""

from __future__ import annotations

import array
import asyncio
import gc
import math
import multiprocessing
import os
import random
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vhdkit
from tests.harness.stores import MemStore
from vhdkit.chain.engine.chain import Chain
from vhdkit.disk import Disk
from vhdkit.formats.probe import open_layer
from vhdkit.formats.vhd.create import create_dynamic
from vhdkit.store import FileStore
from vhdkit.units import KIB, MIB, SECTOR_SIZE

SIZE = 4 * MIB
PATIENCE = 30


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A dynamic disk whose first half is full of `x`."""
    path = tmp_path / "d.vhd"
    vhdkit.create_image(path, SIZE, block_size_bytes=512 * KIB)
    with vhdkit.open_disk(path, writable=True) as disk:
        disk.write(0, b"x" * (SIZE // 2))
    return path


def _descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def _left_since(before: set[str]) -> dict[str, str]:
    """Descriptors that are new since then, and what they are."""
    left = {}
    for fd in _descriptors() - before:
        with suppress(FileNotFoundError):  # the listing's own
            left[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return left


# -- threads ----------------------------------------------------------------------------------------------------


def test_a_read_during_close_never_reads_another_file(image: Path, tmp_path: Path) -> None:
    """INV-DESCRIPTOR-HELD: threads that read while the disk is closed get its bytes or DiskClosed, whatever file gets
    the number of the descriptor next."""
    other = tmp_path / "other"
    other.write_bytes(b"!" * SIZE)
    wrong: list[bytes] = []

    def read(disk: vhdkit.Disk, started: threading.Barrier) -> None:
        buffer = memoryview(bytearray(8 * KIB))
        started.wait()
        with suppress(vhdkit.DiskClosed):
            while True:
                for call in (disk.read_into, disk.try_read_into):
                    call(64 * KIB, buffer)
                    if bytes(buffer).strip(b"x"):
                        wrong.append(bytes(buffer))

    for _ in range(60):
        disk = vhdkit.open_disk(image)
        started = threading.Barrier(4)
        readers = [threading.Thread(target=read, args=(disk, started)) for _ in range(3)]
        for one in readers:
            one.start()
        started.wait()
        disk.close()
        others = [os.open(other, os.O_RDONLY) for _ in range(8)]
        for one in readers:
            one.join(PATIENCE)
        for fd in others:
            os.close(fd)
        assert not any(one.is_alive() for one in readers)
    assert wrong == []


def test_close_waits_for_a_read_under_way(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-DESCRIPTOR-HELD: the number is not freed while a system call uses it; the reader gets its bytes."""
    disk = vhdkit.open_disk(image)
    inside, go_on, closing = threading.Event(), threading.Event(), threading.Event()
    preadv, fd = os.preadv, disk.chain.leaf.store._fd  # type: ignore[attr-defined]

    def slow(*arguments: Any) -> int:
        inside.set()
        assert go_on.wait(PATIENCE)
        return preadv(*arguments)

    def close() -> None:
        closing.set()
        disk.close()

    monkeypatch.setattr(os, "preadv", slow)
    with ThreadPoolExecutor(2) as pool:
        read = pool.submit(disk.read, 0, SECTOR_SIZE)
        assert inside.wait(PATIENCE)
        closed = pool.submit(close)
        assert closing.wait(PATIENCE)
        with pytest.raises(TimeoutError):
            closed.result(0.05)
        assert os.fstat(fd)
        go_on.set()
        assert read.result(PATIENCE) == b"x" * SECTOR_SIZE
        closed.result(PATIENCE)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


CALLS: dict[str, Callable[[vhdkit.Disk], object]] = {
    "read": lambda disk: disk.read(0, 512),
    "read_into": lambda disk: disk.read_into(1, bytearray(7)),
    "try_read_into": lambda disk: disk.try_read_into(0, memoryview(bytearray(512))),
    "write": lambda disk: disk.write(0, b"1"),
    "try_write": lambda disk: disk.try_write(0, memoryview(bytes(512))),
    "try_write_parts": lambda disk: disk.try_write_parts(1, memoryview(bytes(512))),
    "write_zeroes": lambda disk: disk.write_zeroes(0, 512),
    "trim": lambda disk: disk.trim(0, 512),
    "flush": lambda disk: disk.flush(),
    "extents": lambda disk: list(disk.extents()),
    "zeroes_are_fast": lambda disk: disk.zeroes_are_fast(),
}


@pytest.mark.parametrize("name", CALLS)
def test_after_close_every_call_raises_disk_closed(name: str, image: Path) -> None:
    """A closed disk is distinguished from one that fails: DiskClosed."""
    disk = vhdkit.open_disk(image, writable=True)
    disk.close()
    with pytest.raises(vhdkit.DiskClosed, match="the disk is closed"):
        CALLS[name](disk)
    disk.close()


def test_extents_under_way_end_with_the_disk(image: Path) -> None:
    """An iterator that outlives its disk raises instead of returning invented extents."""
    disk = vhdkit.open_disk(image)
    runs = disk.extents()
    next(runs)
    disk.close()
    with pytest.raises(vhdkit.DiskClosed):
        next(runs)


def test_asyncio_with_threads(image: Path) -> None:
    """Many tasks use one disk through `asyncio.to_thread`; when it is closed, each completes or gets DiskClosed."""

    async def main() -> None:
        disk = vhdkit.open_disk(image, writable=True)

        async def one(number: int) -> None:
            data = bytes([number]) * 1000
            with suppress(vhdkit.DiskClosed):
                for _ in range(20):
                    await asyncio.to_thread(disk.write, number * 8192, data)
                    assert await asyncio.to_thread(disk.read, number * 8192, 1000) == data

        tasks = [asyncio.create_task(one(number)) for number in range(16)]
        await asyncio.sleep(0.05)  # close it while they read and write
        await asyncio.to_thread(disk.close)
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert not [one for one in vhdkit.check(image) if one.severity is vhdkit.Severity.ERROR]


# -- buffers ----------------------------------------------------------------------------------------------------


def _memory_disk() -> tuple[Disk, MemStore]:
    store = MemStore()
    create_dynamic(store, 2 * MIB, block_size_bytes=512 * KIB)
    return Disk(Chain([open_layer(store, writable=True)])), store


@st.composite
def _buffers(draw: st.DrawFn) -> Any:
    """Any kind of buffer: shapes, formats, orders and strides, also empty and read-only ones."""
    kind = draw(st.sampled_from(["numpy", "array", "memoryview", "bytes", "bytearray"]))
    size = draw(st.integers(0, 2000))
    raw = random.Random(size).randbytes(size)
    if kind == "bytes":
        return raw
    if kind == "bytearray":
        return bytearray(raw)
    if kind == "array":
        return array.array(draw(st.sampled_from("bBhHiIlLqQfd")), raw[: size // 8 * 8])
    if kind == "memoryview":
        view = memoryview(bytearray(raw))
        step = draw(st.sampled_from([1, 2, 3, -1, -2]))
        return view[::step] if draw(st.booleans()) else view.toreadonly()[::step]
    dtype = np.dtype(draw(st.sampled_from(["u1", "i1", "?", ">u2", "<u4", ">f8", "u8", "S3", "u1,u4"])))
    shape = tuple(draw(st.lists(st.integers(0, 5), min_size=1, max_size=4)))
    values = np.frombuffer(random.Random(7).randbytes(math.prod(shape) * dtype.itemsize), dtype).reshape(shape).copy()
    if draw(st.booleans()):
        values = np.asfortranarray(values)
    if draw(st.booleans()):
        values = values[tuple(slice(None, None, draw(st.sampled_from([1, 2, -1]))) for _ in shape)]
    return values


@given(_buffers(), st.sampled_from([0, 1, 511, 512, 4096, 512 * KIB - 700]), st.sampled_from(["write", "try_write"]))
def test_any_buffer_is_written_as_its_bytes(buffer: Any, offset: int, call: str) -> None:
    """INV-FLAT-BUFFERS: whatever its shape, format and strides, exactly `bytes(view)` is written."""
    disk, _ = _memory_disk()
    disk.write(0, b"\xa5" * MIB)
    expected = bytearray(b"\xa5" * MIB)
    view, taken = memoryview(buffer), True
    if call == "write":
        disk.write(offset, buffer)
    else:
        taken = disk.try_write(offset, view)
    if taken:
        raw = view.tobytes()
        expected[offset : offset + len(raw)] = raw
    assert disk.read(0, MIB) == expected
    disk.close()


@given(_buffers(), st.sampled_from([0, 1, 511, 512, 4096]), st.booleans())
def test_any_buffer_is_filled_or_refused(buffer: Any, offset: int, is_try: bool) -> None:
    """INV-FLAT-BUFFERS: a contiguous writable buffer is filled to its last byte; any other is left unchanged."""
    disk, _ = _memory_disk()
    content = random.Random(3).randbytes(64 * KIB)
    disk.write(0, content)
    view = memoryview(buffer)
    before = view.tobytes()
    try:
        done = True
        if is_try:
            done = disk.try_read_into(offset, view)
        else:
            disk.read_into(offset, buffer)
    except vhdkit.InvalidArgument:
        assert view.readonly or not view.c_contiguous
        assert view.tobytes() == before
    else:
        assert not done or view.tobytes() == content[offset : offset + view.nbytes]
    disk.close()


def test_a_view_of_two_dimensions_stays_within_its_range(image: Path) -> None:
    """INV-FLAT-BUFFERS: `len()` of a buffer is not its size: neighbours, bitmap and footer are unchanged."""
    with vhdkit.open_disk(image, writable=True) as disk:
        before = disk.read(0, SIZE)
        data = memoryview(bytes([7]) * 512 * KIB).cast("B", (512, 1024))
        disk.write(0, data)
        assert disk.read(0, SIZE) == data.tobytes() + before[data.nbytes :]
        with pytest.raises(vhdkit.OutOfRange):
            disk.write(SIZE - 512, data)
    assert vhdkit.check(image) == []


# -- fork -------------------------------------------------------------------------------------------------------


def _in_fork(body: Callable[[], object]) -> None:
    """Run `body` in a forked process; an exception or a hang in it fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            signal.alarm(PATIENCE)
            body()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _all_refused(disk: vhdkit.Disk) -> None:
    for name, call in CALLS.items():
        try:
            call(disk)
        except vhdkit.DiskClosed as error:
            assert "fork" in str(error), name
        else:
            raise AssertionError(f"{name} was not refused")
    disk.close()
    disk.close()


def test_a_forked_disk_refuses_and_releases_nothing(image: Path) -> None:
    """INV-FORK-APART: in the child every call is refused and closing does nothing; the parent's disk, its lock and its
    writes are as if there had been no child."""
    disk = vhdkit.open_disk(image, writable=True)
    disk.write(0, b"before" * 100)

    def child() -> None:
        _all_refused(disk)
        try:
            vhdkit.open_disk(image, writable=True)
        except vhdkit.ImageInUse:
            return
        raise AssertionError("the lock of the parent is gone")

    _in_fork(child)
    disk.write(600, b"after" * 100)
    disk.close()
    with vhdkit.open_disk(image, writable=True) as again:
        assert again.read(0, 1100) == b"before" * 100 + b"after" * 100
    assert vhdkit.check(image) == []


def test_a_fork_during_writes_of_other_threads_does_not_hang(image: Path) -> None:
    """INV-FORK-APART: locks that other threads held at the moment of the fork do not block the child."""
    disk, stop = vhdkit.open_disk(image, writable=True), threading.Event()

    def work(seed: int) -> None:
        rng = random.Random(seed)
        while not stop.is_set():
            disk.write(rng.randrange(SIZE - 9000), rng.randbytes(rng.randrange(9000)))
            disk.flush()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for one in threads:
        one.start()
    try:
        for _ in range(10):
            _in_fork(lambda: _all_refused(disk))
    finally:
        stop.set()
        for one in threads:
            one.join()
    disk.close()
    assert vhdkit.check(image) == []


def test_a_child_that_lives_on_keeps_no_lock(image: Path) -> None:
    """INV-FORK-APART: after the parent has closed the disk it can be opened, even if a forked process still runs."""
    disk = vhdkit.open_disk(image, writable=True)
    ready, wait = os.pipe(), os.pipe()

    def child() -> None:
        os.write(ready[1], b"+")
        os.close(wait[1])
        os.read(wait[0], 1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(PATIENCE)
            child()
        finally:
            os._exit(0)
    try:
        assert os.read(ready[0], 1) == b"+"
        disk.close()
        vhdkit.open_disk(image, writable=True).close()
    finally:
        for fd in (*ready, *wait):
            os.close(fd)
        os.waitpid(pid, 0)


def _content_of(path: str) -> bytes:
    with vhdkit.open_disk(path) as disk:
        return disk.read(0, 16)


def _fail(path: str) -> None:
    with vhdkit.open_disk(path):
        pass


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_process_pools_open_for_themselves(method: str, image: Path, tmp_path: Path) -> None:
    """A pool's processes open their own images while the parent has a disk open; a damaged one is an error of its task
    and does not break the pool."""
    damaged = tmp_path / "damaged.vhd"
    damaged.write_bytes(image.read_bytes()[:600] + bytes(100_000))
    with vhdkit.open_disk(image) as disk, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool:
            assert pool.submit(_content_of, str(image)).result(PATIENCE) == b"x" * 16
            with pytest.raises(vhdkit.CorruptImage) as failure:
                pool.submit(_fail, str(damaged)).result(PATIENCE)
            assert isinstance(failure.value.reason, vhdkit.CorruptReason)
            assert pool.submit(_content_of, str(image)).result(PATIENCE) == b"x" * 16
        assert disk.read(0, 16) == b"x" * 16


# -- signal handlers and other interruptions ----------------------------------------------------------------------


class Struck(BaseException):
    """What a signal handler raises: no library catches it by mistake."""


@contextmanager
def _striking(rng: random.Random, longest: float) -> Iterator[None]:
    """Raise an exception from a signal handler at a random moment of the block, if it lasts that long."""

    def strike(number: int, frame: object) -> None:
        raise Struck

    before = signal.signal(signal.SIGALRM, strike)
    try:
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, longest))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_signal_handlers_leave_nothing_behind(image: Path) -> None:
    """INV-CLOSE-REPORTS: exceptions from signal handlers, at random moments of opening, writing, flushing and closing,
    leak no descriptor, leave no lock, and lose no write that had returned once closing has succeeded."""
    rng, before, struck = random.Random(5), _descriptors(), 0
    for number in range(60):
        stamp, disk, written = number.to_bytes(4, "big") * 128, None, False
        try:
            with _striking(rng, 0.004):
                disk = vhdkit.open_disk(image, writable=True)
                disk.write(number % 8 * 4096, stamp)
                written = True
                disk.write(SIZE // 2 + number % 4 * 512 * KIB, stamp)
                disk.flush()
                disk.close()
        except Struck:
            struck += 1
        if disk is not None:
            disk.close()
        del disk
        gc.collect()
        with vhdkit.open_disk(image, writable=True) as again:
            if written:
                assert again.read(number % 8 * 4096, 512) == stamp
    assert struck
    assert not _left_since(before)
    assert not [one for one in vhdkit.check(image) if one.severity is vhdkit.Severity.ERROR]


def test_a_signal_handler_that_closes_does_not_hang(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing inside a call of the same thread is refused during a write, and allowed during a read."""
    disk, seen = vhdkit.open_disk(image, writable=True), []

    def handler(*_: object) -> None:
        try:
            disk.close()
        except vhdkit.InvalidArgument as error:
            seen.append(str(error))

    pwrite, preadv = os.pwrite, os.preadv

    def striking(*arguments: Any) -> int:
        handler()
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", striking)
    disk.write(0, b"1" * SECTOR_SIZE)
    monkeypatch.setattr(os, "pwrite", pwrite)
    assert len(seen) == 1 and "signal handler" in seen[0]
    disk.flush()

    def reading(*arguments: Any) -> int:
        handler()
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", reading)
    with suppress(vhdkit.DiskClosed):
        disk.read_into(0, bytearray(SECTOR_SIZE))
    monkeypatch.undo()
    assert len(seen) == 1
    vhdkit.open_disk(image, writable=True).close()


def test_a_refused_buffer_interrupts_nothing(image: Path) -> None:
    """INV-CLOSE-REPORTS: after a refused call earlier writes are kept, and the disk stays usable."""
    with vhdkit.open_disk(image, writable=True) as disk:
        disk.write(0, b"1" * SECTOR_SIZE)
        for wrong in (None, "text", 7):
            with pytest.raises(TypeError):
                disk.write(0, wrong)  # type: ignore[arg-type]
        released = memoryview(bytes(512))
        released.release()
        with pytest.raises(ValueError, match="released"):
            disk.write(0, released)
        disk.write(SECTOR_SIZE, b"2" * SECTOR_SIZE)
    with vhdkit.open_disk(image) as disk:
        assert disk.read(0, 1024) == b"1" * SECTOR_SIZE + b"2" * SECTOR_SIZE


def test_an_interrupted_close_reports_the_loss(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-CLOSE-REPORTS: if both attempts of a close were interrupted, a further one raises SyncFailed, once."""
    disk = vhdkit.open_disk(image, writable=True)
    disk.write(0, b"1" * SECTOR_SIZE)

    def strike(fd: int) -> None:
        raise Struck

    monkeypatch.setattr(os, "fdatasync", strike)
    with pytest.raises(Struck):
        disk.close()
    monkeypatch.undo()
    vhdkit.open_disk(image, writable=True).close()
    with pytest.raises(vhdkit.SyncFailed, match="is lost"):
        disk.close()
    disk.close()


def test_closing_after_an_error_does_not_hide_it(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing `with` block raises its own error; that closing failed as well is added as a note."""

    def fail(fd: int) -> None:
        raise OSError(5, "I/O error")

    with pytest.raises(Struck) as failure, vhdkit.open_disk(image, writable=True) as disk:
        disk.write(SIZE // 2, b"1" * SECTOR_SIZE)
        monkeypatch.setattr(os, "fdatasync", fail)
        raise Struck
    assert "closing the disk failed, too" in failure.value.__notes__[0]


# -- dropped ----------------------------------------------------------------------------------------------------


def test_a_dropped_disk_releases_everything(image: Path) -> None:
    """An unclosed disk is reported with its path, its descriptors are closed, its lock is free; flushed data stays."""
    before = _descriptors()
    disk = vhdkit.open_disk(image, writable=True)
    disk.write(0, b"flushed!")
    disk.flush()
    with pytest.warns(ResourceWarning, match=r"d\.vhd' was never closed; what was written since its last flush"):
        del disk
        gc.collect()
    assert not _left_since(before)
    with vhdkit.open_disk(image, writable=True) as again:
        assert again.read(0, 8) == b"flushed!"


def test_a_dropped_store_is_reported_once(image: Path) -> None:
    """A closed store is not reported, and an unclosed one only once."""
    with warnings.catch_warnings(record=True) as caught_warnings:
        warnings.simplefilter("always")
        store = FileStore.open(image)
        store.close()
        del store
        other = FileStore.open(image)
        del other
        gc.collect()
        time.sleep(0)  # lets another thread run, which may warn
    assert [str(one.message) for one in caught_warnings if one.category is ResourceWarning] == [
        f"{str(image)!r} was never closed"
    ]
