# SPDX-License-Identifier: Apache-2.0
"""Which large reads are a stream, and that it has a description of its own."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vhdkit import errors, page_cache, streams
from vhdkit.store import FileStore
from vhdkit.streams import LARGE_BYTES, MAX_STREAMS, Stream
from vhdkit.uncached import Sweeper
from vhdkit.units import KIB, MIB

SIZE = 48 * MIB
CONTENT = random.Random(3).randbytes(SIZE // 16) * 16


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random bytes."""
    path = tmp_path_factory.mktemp("streams") / "a"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def store(path: Path) -> Iterator[FileStore]:
    """The file, open."""
    with FileStore.open(path) as opened:
        yield opened


def found(store: FileStore, offset: int, size: int = 256 * KIB) -> Stream | None:
    """The stream through which such a read would go."""
    return store.stream_of(offset, size)


def open_here(path: Path) -> int:
    """How many descriptors of the file this process has."""
    fds = Path("/proc/self/fd")
    return sum(os.path.realpath(fds / name) == os.fspath(path) for name in os.listdir(fds))


def test_reads_that_follow_one_another_are_a_stream(store: FileStore) -> None:
    """The second read begins the stream; small gaps, repeated reads and several on their way belong to it."""
    assert found(store, MIB) is None
    stream = found(store, MIB + 256 * KIB)
    assert stream is not None and stream._fd != store.fileno()
    for offset in (MIB + 512 * KIB, 12 * MIB, MIB, MIB + 768 * KIB):
        assert (found(store, offset) is stream) == (offset != 12 * MIB)
    assert found(store, MIB + 1024 * KIB + 4 * KIB) is stream, "a bitmap lies between"
    assert found(store, 20 * MIB) is None, "a seek"


def test_random_reads_are_no_stream(path: Path, store: FileStore) -> None:
    """Large reads of which none begins near the end of another one go through the shared description."""
    places = random.Random(1).sample(range(SIZE // MIB - 1), 40)
    assert all(found(store, place * MIB, 128 * KIB) is None for place in places)
    assert open_here(path) == 1 and len(store._ends) < 40


def test_interleaved_streams_are_kept_apart(path: Path, store: FileStore) -> None:
    """INV-STREAMS-BOUNDED: each stream has its own description, up to a limit; a further one takes that of the stream
    used least recently. All are closed with the file."""
    starts = [number * 9 * MIB for number in range(MAX_STREAMS)]
    seen = []
    for step in range(5):
        seen.append([found(store, start + step * 256 * KIB) for start in starts])
    assert seen[0] == [None] * MAX_STREAMS and len(set(seen[1])) == MAX_STREAMS and None not in seen[1]
    assert all(row == seen[1] for row in seen[2:])
    assert open_here(path) == 1 + MAX_STREAMS
    far = SIZE - 2 * MIB
    assert found(store, far) is None
    assert found(store, far + 256 * KIB) is seen[1][0]
    assert open_here(path) == 1 + MAX_STREAMS
    store.close()
    assert open_here(path) == 0
    with pytest.raises(errors.DiskClosed):
        store.try_pread_into(0, memoryview(bytearray(MIB)))


_READS = st.tuples(st.none() | st.integers(0, SIZE - MIB), st.sampled_from([4096, LARGE_BYTES, 128 * KIB, MIB]))


@given(st.lists(_READS, max_size=40))
@settings(deadline=None)
def test_every_read_gives_the_bytes_of_the_file(path: Path, reads: list[tuple[int | None, int]]) -> None:
    """Whatever is read in which order, an attempt that succeeds reads what a plain read does, also what another
    description has just written."""
    with FileStore.open(path, writable=True) as store:
        end = 0
        for offset, size in reads:
            start = min(end if offset is None else offset, SIZE - size)
            end = start + size
            store.pwrite(start, CONTENT[start : start + 512])
            room = memoryview(bytearray(size))
            if store.try_pread_into(start, room):
                assert room == CONTENT[start:end]
        assert len(store._streams) <= MAX_STREAMS and len(store._ends) <= 16


def asked(store: FileStore, offset: int) -> bool:
    """Whether a hint for that place reaches the kernel."""
    places = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_cache, "prefetch", lambda fd, offset, size: places.append(offset))
        store.prefetch(offset, MIB)
    return bool(places)


@pytest.mark.parametrize("limit_bytes", [128 * KIB, 8 * MIB])
def test_what_the_kernel_reads_ahead_is_not_asked_for(
    store: FileStore, monkeypatch: pytest.MonkeyPatch, limit_bytes: int
) -> None:
    """Near the position of a stream the kernel reads by itself, if it reads far enough ahead."""
    monkeypatch.setattr(page_cache, "read_ahead_bytes", lambda fd: limit_bytes)
    assert asked(store, 0)
    found(store, 0)
    assert found(store, 256 * KIB) is not None
    reads_far = limit_bytes > MIB
    assert asked(store, MIB) is not reads_far
    assert asked(store, 40 * MIB)


def test_reads_that_were_left_out_belong_to_their_stream(store: FileStore) -> None:
    """A stream goes on past reads that are made later, as it is not known yet where they lie."""
    found(store, 0)
    stream = found(store, 256 * KIB)
    assert stream is not None
    assert found(store, 2 * MIB) is stream
    assert found(store, 512 * KIB) is stream, "made later"
    assert found(store, 8 * MIB) is not stream


def test_without_a_second_description_the_first_serves(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file cannot be opened again, its reads go on as before."""

    def refuse(path: str, flags: int) -> list[int]:
        raise PermissionError

    monkeypatch.setattr(streams, "opened", refuse)
    room = memoryview(bytearray(256 * KIB))
    for offset in range(0, 2 * MIB, len(room)):
        if store.try_pread_into(offset, room):
            assert room == CONTENT[offset : offset + len(room)]
    assert store._streams == [] and not store.has_streams


def test_a_file_that_is_not_cached_has_no_streams(store: FileStore) -> None:
    """What is read ahead of them would be swept out of the cache before it is used."""
    store.keep_out_of_cache(Sweeper())
    for offset in range(0, 2 * MIB, 256 * KIB):
        store.try_pread_into(offset, memoryview(bytearray(256 * KIB)))
    assert store._streams == []
