# SPDX-License-Identifier: Apache-2.0
"""The sums that are made while a file is written are those of the file, however it is written."""

from __future__ import annotations

import hashlib
import random
import threading
import tracemalloc
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness.stores import MemStore
from tests.vhdkit.backup.sources import MACHINE, Source, content_of
from tests.vhdkit.backup.test_sums import expected_table
from vhdkit import errors
from vhdkit.backup import page_sums, summing
from vhdkit.backup.manifest import How
from vhdkit.backup.repository import open_repository
from vhdkit.backup.summing import SummedFile
from vhdkit.backup.sums import PAGE_BYTES, RANGE_BYTES
from vhdkit.store import FileStore
from vhdkit.units import KIB, MIB

_USUAL = {name: getattr(summing, name) for name in ("_OPEN_RANGES", "_MOST_AGAIN")}
_SPAN = 6 * RANGE_BYTES
_SMALL = {"_OPEN_RANGES": 2, "_MOST_AGAIN": 3, "_COPY_BYTES": 2 * RANGE_BYTES, "_WINDOW_BYTES": 64, "_WINDOWS": 2}

offsets = st.one_of(
    st.integers(0, _SPAN),
    st.builds(lambda at, by: max(at * RANGE_BYTES + by, 0), st.integers(0, 6), st.integers(-2, 2)),
)
sizes = st.one_of(st.integers(0, 3 * RANGE_BYTES), st.sampled_from([1, 512, PAGE_BYTES, RANGE_BYTES, 2 * RANGE_BYTES]))
steps = st.lists(
    st.tuples(st.sampled_from(["write", "zeros", "copy", "punch", "cut", "reserve"]), offsets, sizes), max_size=12
)


def carry_out(file: SummedFile, steps: list[tuple[str, int, int]], seed: int = 1) -> None:
    """Write to the file in these ways."""
    rng = random.Random(seed)
    for how, offset, size in steps:
        if how == "write":
            file.pwrite(offset, rng.randbytes(size))
        elif how == "zeros":
            file.pwrite(offset, memoryview(bytearray(size)))
        elif how == "copy":
            source = MemStore("source")
            source.pwrite(0, bytes(PAGE_BYTES) + rng.randbytes(size))
            file.copy_from(source, PAGE_BYTES // 2 if size else 0, offset, size)
        elif how == "punch" and offset < file.size():
            file.punch(offset, min(size, file.size() - offset))
        elif how == "cut":
            file.truncate(offset)
        elif how == "reserve" and size:
            file.reserve(file.size(), size)


def content(store: MemStore) -> bytes:
    """All bytes of a store."""
    return store.pread(0, store.size())


@given(steps, st.booleans())
def test_sums_are_those_of_the_file(steps: list[tuple[str, int, int]], is_small: bool) -> None:
    """INV-SUMS-OF-FILE: whatever is written, again, in parts, punched or cut off, and whatever memory there is for
    what is collected, the table is that of the file."""
    store, table = MemStore("file"), MemStore("table")
    with mock.patch.multiple(summing, **(_SMALL if is_small else _USUAL)), SummedFile(store, table) as file:
        carry_out(file, steps)
        root = file.finish()
    assert content(table) == expected_table(content(store))
    assert root == hashlib.sha256(content(table)).hexdigest()


@settings(max_examples=20)
@given(steps)
def test_it_is_the_file(steps: list[tuple[str, int, int]]) -> None:
    """Reading gives what the file has: it is the same file for its users."""
    store = MemStore("file")
    with SummedFile(store, MemStore("table")) as file:
        carry_out(file, steps)
        assert (file.name, file.identity, file.size(), file.punches()) == (
            store.name, store.identity, store.size(), store.punches(),
        )  # fmt: skip
        assert file.pread(0, file.size()) == content(store)
        assert list(file.data_runs(0, file.size())) == list(store.data_runs(0, store.size()))
        for read in (file.pread_into, file.try_pread_into):
            buffer = memoryview(bytearray(file.size()))
            read(0, buffer)
            assert bytes(buffer) == content(store)


def test_what_is_written_once_is_not_read() -> None:
    """Only ranges that were written again are read at the end."""
    store, table = MemStore("file"), MemStore("table")
    rng = random.Random(3)
    with SummedFile(store, table) as file:
        file.pwrite(512, rng.randbytes(5 * MIB))
        for at in range(6 * MIB, 20 * MIB, 31 * PAGE_BYTES):  # scattered pages
            file.pwrite(at, rng.randbytes(PAGE_BYTES))
        with mock.patch.object(MemStore, "pread_into", side_effect=AssertionError):
            file.finish()
        file.pwrite(MIB, b"again")
        with mock.patch.object(store, "pread_into", wraps=store.pread_into) as reading:
            file.finish()
        assert [call.args[0] for call in reading.call_args_list] == [MIB]
    assert content(table) == expected_table(content(store))


def test_without_another_thread() -> None:
    """Where the system allows no more threads, the sums are made in this one."""
    store, table = MemStore("file"), MemStore("table")
    with SummedFile(store, table) as file:
        with mock.patch("threading.Thread.start", side_effect=RuntimeError("can't start new thread")):
            file.pwrite(0, random.Random(4).randbytes(MIB))
        file.finish()
    assert content(table) == expected_table(content(store))


def test_a_write_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of the file reaches the caller, and its buffer is no longer used then."""
    store, hashed, begun, failed = MemStore("file"), list[int](), threading.Event(), threading.Event()

    def fail(offset_bytes: int, data: memoryview) -> None:
        if len(data) == MIB:
            begun.wait()
        failed.set()
        raise errors.NoSpace("the disk is full", path="file")

    def slow(data: memoryview) -> bytes:
        begun.set()
        failed.wait()
        hashed.append(len(data))
        return b""

    monkeypatch.setattr(store, "pwrite", fail)
    monkeypatch.setattr(page_sums, "sums_of_data", slow)
    with SummedFile(store, MemStore("table")) as file:
        for size in (512, MIB):
            failed.clear()
            with pytest.raises(errors.NoSpace):
                file.pwrite(0, memoryview(bytearray(size)))
        assert hashed
        begun.clear()
    assert not begun.is_set()


def test_a_source_that_became_shorter_is_reported() -> None:
    """A source that ends before the range does is an error, not zeros."""
    source = MemStore("source")
    source.pwrite(0, bytes(PAGE_BYTES))
    with SummedFile(MemStore("file"), MemStore("table")) as file, pytest.raises(errors.IoFailed, match="shorter"):
        file.copy_from(source, 0, 0, 2 * PAGE_BYTES)


def test_memory_does_not_depend_on_the_file(tmp_path: Path) -> None:
    """Pages all over a terabyte, then one range again, take little memory and no time for holes."""
    for name in ("file", "table"):
        (tmp_path / name).touch()
    with (
        FileStore.open(tmp_path / "file", writable=True) as store,
        FileStore.open(tmp_path / "table", writable=True) as table,
        SummedFile(store, table) as file,
    ):
        tracemalloc.start()
        for at in range(0, 1 << 40, 1 << 31):
            file.pwrite(at + 3, b"x")
            file.pwrite(at + MIB, b"y" * 300 * KIB)
        file.pwrite(0, b"z")
        file.finish()
        assert tracemalloc.get_traced_memory()[1] < 24 * MIB
        tracemalloc.stop()
        assert table.allocated_bytes() < 130 * MIB < table.size()


@pytest.mark.parametrize("kind", ["vhd", "vhdx", "raw"])
def test_nights_have_the_sums_of_their_files(kind: str, tmp_path: Path) -> None:
    """INV-SUMS-OF-FILE: images of every sort that a night writes have the table that their bytes give."""
    source, repository = Source(tmp_path / "source", kind), tmp_path / "repository"
    found: list[How] = []
    wishes: dict[str, Any]
    for wishes in ({}, {}, {"compare": True}, {"full_every": 1}):
        source.write(MIB + len(found) * 40_000, 70_000)
        made = source.save(repository, **wishes)
        found.append(made.disks[0].how)
        assert content_of(repository, made.night) == source.content
    assert found == [How.FULL, How.LAYERS, How.COMPARED, How.FULL]
    with open_repository(repository) as opened, opened.machine(MACHINE) as machine:
        for night in machine.nights():
            assert night.manifest is not None
            image = Path(machine.path, night.manifest.disks[0].image.text)
            table = image.with_name(f"{image.name}.sums").read_bytes()
            assert table == expected_table(image.read_bytes())
            assert night.manifest.disks[0].sums_root == hashlib.sha256(table).hexdigest()
