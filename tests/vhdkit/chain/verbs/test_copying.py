# SPDX-License-Identifier: Apache-2.0
"""How content is copied: everything arrives, memory is bounded, and a failure of either thread ends both."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness.stores import MemStore
from tests.waiting import becomes, wait_until
from vhdkit import errors, formats
from vhdkit.chain.engine.chain import Chain, Progress
from vhdkit.chain.verbs import copying
from vhdkit.chain.verbs.copying import copy_content
from vhdkit.units import PAGE_SIZE, sectors_to_bytes


def raw_store(content: bytes = b"", size_bytes: int = 0) -> MemStore:
    """A raw disk in memory."""
    store = MemStore("disk.raw", size_bytes=size_bytes)
    if content:
        store.pwrite(0, content)
    return store


def copied(source: MemStore, to: MemStore, progress: Progress | None = None) -> None:
    """Copy one raw disk to another."""
    raw = formats.plain()
    copy_content(Chain([raw.open(source)]), raw.open(to, writable=True), progress=progress)


@given(
    st.lists(st.tuples(st.integers(0, 15), st.integers(1, 9), st.booleans()), max_size=12),
    st.integers(1, 16 * 8),
)
@settings(max_examples=40, deadline=None)
def test_everything_arrives(runs: list[tuple[int, int, bool]], sector_count: int) -> None:
    """Whatever lies in the pieces, at their edges and at the end of the disk, the copy reads the same."""
    source = raw_store(size_bytes=sectors_to_bytes(sector_count))
    for page, sectors, is_data in runs:
        inside = min(sectors, sector_count - page * 8)
        if inside > 0:
            source.pwrite(page * PAGE_SIZE, bytes([page + 1 if is_data else 0]) * sectors_to_bytes(inside))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "_PIECE_BYTES", 4 * PAGE_SIZE)
        to = raw_store(size_bytes=source.size())
        copied(source, to)
    assert to.contents() == source.contents()


def test_progress_says_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """When progress is reported, in the caller's thread, everything up to there is in the new image."""
    monkeypatch.setattr(copying, "_PIECE_BYTES", PAGE_SIZE)
    source, to = raw_store(b"x" * 40 * PAGE_SIZE), raw_store(size_bytes=40 * PAGE_SIZE)
    seen: list[int] = []

    def progress(done: int, size: int) -> None:
        assert threading.current_thread() is threading.main_thread() and size == 40 * PAGE_SIZE
        assert to.pread(0, done) == b"x" * done
        seen.append(done)

    copied(source, to, progress)
    assert seen == sorted(seen) and seen[-1] == 40 * PAGE_SIZE and len(set(seen)) == 40


class Slow(MemStore):
    """A store whose first write waits until it is let go; it counts what it has written by then, and may fail."""

    def __init__(self, size_bytes: int, failure: Exception | None = None) -> None:
        super().__init__("slow.raw", size_bytes=size_bytes)
        self.free = threading.Event()
        self.writes = 0
        self.failure = failure

    def pwrite(self, offset_bytes: int, data: bytes | bytearray | memoryview) -> None:
        """Wait, count, fail."""
        assert self.free.wait(10)
        self.writes += 1
        if self.failure is not None:
            raise self.failure
        super().pwrite(offset_bytes, data)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """`INV-COPY-BOUNDED`: while the device does not write, no more is read than the buffers hold."""
    monkeypatch.setattr(copying, "_PIECE_BYTES", PAGE_SIZE)
    source, to = raw_store(b"x" * 40 * PAGE_SIZE), Slow(40 * PAGE_SIZE)
    reads: list[int] = []
    read = source.pread_into

    def counted(offset_bytes: int, buffer: memoryview) -> None:
        reads.append(offset_bytes)
        read(offset_bytes, buffer)

    monkeypatch.setattr(source, "pread_into", counted)
    monkeypatch.setattr(source, "try_pread_into", lambda *where: False)
    copying_thread = threading.Thread(target=copied, args=(source, to), daemon=True)
    copying_thread.start()
    wait_until(lambda: len(reads) == copying._BUFFERS, "the buffers are full")
    assert not becomes(lambda: len(reads) > copying._BUFFERS, 0.05)
    to.free.set()
    copying_thread.join(10)
    assert len(reads) == 40 and to.contents() == source.contents()


def test_a_full_disk_ends_both_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed write reaches the caller, and nothing more is written after it."""
    monkeypatch.setattr(copying, "_PIECE_BYTES", PAGE_SIZE)
    to = Slow(40 * PAGE_SIZE, errors.NoSpace("simulated"))
    to.free.set()
    with pytest.raises(errors.NoSpace):
        copied(raw_store(b"x" * 40 * PAGE_SIZE), to)
    assert to.writes == 1
    assert not [one for one in threading.enumerate() if one.name == "vhdkit-convert"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, errors.IoFailed("simulated")])
def test_after_an_interruption_nothing_more_is_written(
    error: BaseException | type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When reading fails, or at Ctrl-C, the write in progress ends, those that wait do not happen, and both stop."""
    monkeypatch.setattr(copying, "_PIECE_BYTES", PAGE_SIZE)
    source, to = raw_store(b"x" * 40 * PAGE_SIZE), Slow(40 * PAGE_SIZE)
    reads: list[int] = []

    def read(offset_bytes: int, buffer: memoryview) -> bool:
        reads.append(offset_bytes)
        if len(reads) == copying._BUFFERS:
            to.free.set()
            raise error
        buffer[:] = b"x" * len(buffer)
        return True

    monkeypatch.setattr(source, "try_pread_into", read)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        copied(source, to)
    assert to.writes <= copying._BUFFERS - 1
    written = to.contents()
    assert written == source.contents()[: to.writes * PAGE_SIZE].ljust(len(written), b"\0")
    assert not [one for one in threading.enumerate() if one.name == "vhdkit-convert"]
