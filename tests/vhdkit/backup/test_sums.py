# SPDX-License-Identifier: Apache-2.0
"""Sums of a file: computed as the format says, whatever holes and lengths, and every changed byte is found."""

from __future__ import annotations

import hashlib
import random
import struct
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.stores import MemStore
from vhdkit.backup.documents import DamagedRepository
from vhdkit.backup.sums import (
    HEADER_BYTES,
    PAGE_BYTES,
    RANGE_BYTES,
    SUM_BYTES,
    check_table,
    differing,
    joined,
    make_table,
    range_count,
    renewed_table,
    require_same_size,
    table_bytes,
)
from vhdkit.store import FileStore
from vhdkit.units import KIB, MIB


def expected_table(content: bytes) -> bytes:
    """The table of a file, as its format is described, in the plainest way."""
    table = struct.pack("<32sQQQ8x", b"vhdkit sums 1\n", len(content), 65536, 4096)
    for at in range(0, len(content), 65536):
        pages = [content[page : page + 4096] for page in range(at, min(at + 65536, len(content)), 4096)]
        pages[-1] = pages[-1].ljust(4096, b"\0")
        mask = sum(1 << number for number, page in enumerate(pages) if any(page))
        data = b"".join(page for page in pages if any(page))
        table += hashlib.sha256(mask.to_bytes(2, "little") + data).digest() if mask else bytes(32)
    return table


def stored(content: bytes) -> MemStore:
    """The content in a store."""
    store = MemStore("file")
    if content:
        store.pwrite(0, content)
    return store


@st.composite
def contents(draw: st.DrawFn) -> bytes:
    """A file of pages that are zeros, have a byte somewhere, or are full; of any length."""
    rng = random.Random(draw(st.integers(0, 1 << 30)))
    content = bytearray()
    for count, kind in draw(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 2)), max_size=6)):
        for _ in range(count):
            page = bytearray(PAGE_BYTES)
            if kind == 1:
                page[rng.randrange(PAGE_BYTES)] = 1 + rng.randrange(255)
            elif kind == 2:
                page[:] = rng.randbytes(PAGE_BYTES)
            content += page
    return bytes(content[: max(len(content) - draw(st.integers(0, PAGE_BYTES)), 0)])


@given(contents())
def test_a_table_is_as_the_format_says(content: bytes) -> None:
    """The table has the sums that its description gives, and the root is the SHA-256 of it."""
    table = MemStore("table")
    root = make_table(stored(content), table)
    assert table.pread(0, table.size()) == expected_table(content)
    assert root == hashlib.sha256(expected_table(content)).hexdigest()
    assert table.size() == table_bytes(len(content))
    check_table(table, root, len(content))
    assert list(differing(stored(content), table)) == []


@given(contents().filter(bool), st.data())
def test_every_changed_byte_is_found(content: bytes, data: st.DataObject) -> None:
    """A changed byte anywhere, also in a hole, is found, and just its 64 KiB are reported."""
    table = MemStore("table")
    make_table(stored(content), table)
    at = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[at] ^= data.draw(st.integers(1, 255))
    found = list(differing(stored(bytes(changed)), table))
    begin = at // RANGE_BYTES * RANGE_BYTES
    assert [(one.offset_bytes, one.size_bytes) for one in found] == [(begin, min(RANGE_BYTES, len(content) - begin))]
    near = [(at, 1)]
    assert list(differing(stored(bytes(changed)), table, near)) == found
    elsewhere = [(begin + RANGE_BYTES, MIB)] if begin + RANGE_BYTES < len(content) else [(0, 0)]
    assert list(differing(stored(bytes(changed)), table, elsewhere)) == []


@given(contents(), contents(), st.data())
def test_changed_ranges_are_summed_again(old: bytes, other: bytes, data: st.DataObject) -> None:
    """A table with new sums for what changed is the table of the new file, also of another size."""
    size = data.draw(st.sampled_from([len(old), len(other), len(old) // 2]))
    new = bytearray(old[:size].ljust(size, b"\0"))
    ranges = []
    for _ in range(data.draw(st.integers(0, 3))):
        if not size:
            break
        at = data.draw(st.integers(0, size - 1))
        piece = other[at : at + data.draw(st.integers(1, 3 * RANGE_BYTES))]
        new[at : at + len(piece)] = piece
        ranges.append((at, len(piece)))
    del new[size:]
    before, after = MemStore("before"), MemStore("after")
    make_table(stored(old), before)
    store = stored(bytes(new))
    store.truncate(size)
    root = renewed_table(store, before, after, joined(ranges))
    assert after.pread(0, after.size()) == expected_table(bytes(new))
    assert root == hashlib.sha256(expected_table(bytes(new))).hexdigest()


def test_holes_are_not_read(tmp_path: Path) -> None:
    """A file of a tebibyte with two pages of data is summed and compared at once, and its table is sparse, too."""
    path = tmp_path / "sparse"
    path.touch()
    with FileStore.open(path, writable=True) as store:
        store.truncate(1 << 34)
        store.pwrite(5 * MIB + 3, b"x")
        store.pwrite((1 << 34) - 1, b"y")
        (tmp_path / "table").touch()
        with FileStore.open(tmp_path / "table", writable=True) as table:
            tracemalloc.start()
            root = make_table(store, table)
            assert tracemalloc.get_traced_memory()[1] < 48 * MIB
            tracemalloc.stop()
            check_table(table, root, 1 << 34)
            assert table.allocated_bytes() < MIB
            entries = [
                table.pread(HEADER_BYTES + at * SUM_BYTES, SUM_BYTES) for at in (80, 81, range_count(1 << 34) - 1)
            ]
            assert [any(one) for one in entries] == [True, False, True]
            assert list(differing(store, table)) == []
            store.punch(5 * MIB, MIB)
            assert [one.offset_bytes for one in differing(store, table)] == [5 * MIB]


@pytest.mark.parametrize("at", [0, 40, 48, HEADER_BYTES, HEADER_BYTES + 5 * SUM_BYTES])
def test_a_damaged_table_is_refused(at: int) -> None:
    """A changed byte of the table, a wrong length or another file's table is never believed."""
    content = random.Random(1).randbytes(MIB)
    table = MemStore("table")
    root = make_table(stored(content), table)
    with pytest.raises(DamagedRepository):
        check_table(table, root, len(content) + 1)
    with pytest.raises(DamagedRepository):
        check_table(table, root, len(content) + RANGE_BYTES)
    table.pwrite(at, bytes([table.pread(at, 1)[0] ^ 1]))
    with pytest.raises(DamagedRepository):
        check_table(table, root, len(content))


def test_a_shorter_file_is_damaged() -> None:
    """A file of another length than its record says is reported with both lengths."""
    store = stored(bytes(10))
    require_same_size(store, 10)
    for size in (9, 11):
        with pytest.raises(DamagedRepository, match=f"expected {size} bytes, found 10 bytes"):
            require_same_size(store, size)


def test_progress_counts_to_the_end() -> None:
    """Progress never goes back, and ends with the size of the file if that has data at its end."""
    seen: list[tuple[int, int]] = []
    store = stored(bytes(3 * MIB) + b"x" * (5 * MIB + 100))
    make_table(store, MemStore("table"), lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1] == (8 * MIB + 100, 8 * MIB + 100)


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 20)), max_size=8))
def test_joined_ranges_are_the_same_bytes(ranges: list[tuple[int, int]]) -> None:
    """Joined ranges are in order, apart from each other, and cover the same bytes."""
    found = joined(ranges)
    covered = [{at for begin, size in some for at in range(begin, begin + size)} for some in (found, ranges)]
    assert covered[0] == covered[1]
    assert all(one[0] + one[1] < other[0] for one, other in pairwise(found))


def test_sums_per_64_kib() -> None:
    """The table takes a twentieth of a percent of the file."""
    assert (RANGE_BYTES, PAGE_BYTES) == (64 * KIB, 4 * KIB)
    assert table_bytes(1 << 40) / (1 << 40) < 0.0005
