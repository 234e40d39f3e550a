# SPDX-License-Identifier: Apache-2.0
"""The undo log: changes that are complete or undone, and logs that must not be trusted."""

from __future__ import annotations

import contextlib
import hashlib
import random
import struct
import sys
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.stores import CrashStore, Fault, FaultyStore, MemStore, PowerCut, io_failed, no_space
from vhdkit import errors
from vhdkit.formats import undo
from vhdkit.formats.undo import (
    Change,
    UndoLog,
    UndoneStore,
    apply_change,
    belongs,
    encode,
    mentions,
    plan_change,
    read_log,
    roll_back,
)
from vhdkit.formats.vhd import layout
from vhdkit.formats.vhd.create import create_dynamic, create_fixed, new_footer
from vhdkit.formats.vhd.metadata import read_metadata
from vhdkit.units import KIB, SECTOR_SIZE

IMAGE_ID = bytes(range(16))
SEEDS = 12


def image(size: int = 40 * KIB, seed: int = 1) -> MemStore:
    """A file of random bytes without a footer."""
    store = MemStore("image.vhd")
    store.pwrite(0, random.Random(seed).randbytes(size))
    return store


def stored(log: UndoLog) -> MemStore:
    """The log in a file."""
    store = MemStore("log")
    store.pwrite(0, encode(log))
    return store


def fixed_grow(seed: int = 3) -> tuple[MemStore, UndoLog]:
    """The typical change: a fixed image gets another size, and its only footer another place."""
    store = MemStore("fixed.vhd")
    footer = create_fixed(store, 24 * KIB)
    store.pwrite(0, random.Random(seed).randbytes(24 * KIB))
    new = layout.build_footer(footer)[:48] + struct.pack(">Q", 60 * KIB) + layout.build_footer(footer)[56:]
    new = layout.sealed(new, layout.FOOTER_CHECKSUM_OFFSET)
    writes = [(24 * KIB, bytes(SECTOR_SIZE)), (60 * KIB, new)]
    return store, plan_change(store, footer.unique_id, writes)


@st.composite
def changes(draw: st.DrawFn) -> tuple[MemStore, list[tuple[int, bytes]], int]:
    """A file, disjoint writes to it, and its new size."""
    size = draw(st.integers(1, 20)) * SECTOR_SIZE + draw(st.sampled_from([0, 0, 0, 1, 511]))
    store = image(size, draw(st.integers(0, 3)))
    writes, position = [], 0
    for _ in range(draw(st.integers(0, 5))):
        position += draw(st.integers(0, 4 * KIB))
        length = draw(st.integers(1, 3 * KIB))
        data = store.pread(position, length).ljust(length, b"\0")
        if draw(st.booleans()):
            data = draw(st.binary(min_size=1, max_size=8)) * length
        writes.append((position, data[:length]))
        position += length
    size_after = max([size, *(offset + len(data) for offset, data in writes)])
    if draw(st.booleans()):
        size_after = draw(st.integers(1, size_after + 4 * KIB))
        if size_after < size:  # what is cut off is zeros or part of the writes
            covered = [(offset, offset + len(data)) for offset, data in writes]
            for byte in range(size_after // SECTOR_SIZE * SECTOR_SIZE, size, SECTOR_SIZE):
                start, stop = max(byte, size_after), min(byte + SECTOR_SIZE, size)
                if not any(low <= start and stop <= high for low, high in covered):
                    store.pwrite(start, bytes(stop - start))
    return store, writes, size_after


@given(changes())
def test_a_change_is_made_and_undone(change: tuple[MemStore, list[tuple[int, bytes]], int]) -> None:
    """The change applies the writes and the size; its log, read back from its bytes, restores every byte."""
    store, writes, size_after = change
    before = store.contents()
    log = plan_change(store, IMAGE_ID, writes, size_after)
    assert read_log(stored(log)) == log
    expected = bytearray(before.ljust(max(size_after, len(before)), b"\0"))
    for offset, data in writes:
        expected = expected.ljust(offset, b"\0")
        expected[offset : offset + len(data)] = data
    assert belongs(store, log)
    apply_change(store, log)
    assert store.contents() == bytes(expected[:size_after]).ljust(size_after, b"\0")
    assert belongs(store, log)
    assert UndoneStore(store, log).pread(0, store.size() + len(before)) == before
    roll_back(store, log)
    assert store.contents() == before


@given(changes(), st.integers(0, 10**6))
def test_inv_undo_log_holds_at_every_cut_of_the_change(
    change: tuple[MemStore, list[tuple[int, bytes]], int], seed: int
) -> None:
    """INV-UNDO-LOG: cut inside any write or sync of the change or of its undoing, the file reads as before."""
    start, writes, size_after = change
    before = start.contents()
    log = plan_change(start, IMAGE_ID, writes, size_after)
    rng = random.Random(seed)
    store = CrashStore(start)
    store.watcher = lambda: survives(store, log, before, rng, again=True)
    apply_change(store, log)


def survives(store: CrashStore, log: UndoLog, before: bytes, rng: random.Random, *, again: bool) -> None:
    """The log applies to what a cut leaves: it reads as before and is restored, also after one more cut."""
    for _ in range(3):
        found = store.after_cut(rng)
        assert belongs(found, log)
        seen = UndoneStore(found, log)
        assert seen.size() == len(before) and seen.pread(0, len(before)) == before
        if again:
            second = CrashStore(found)
            second.watcher = lambda crash=second: survives(crash, log, before, rng, again=False)
            roll_back(second, log)
            assert second.contents() == before


def test_a_fixed_footer_in_flight_may_be_torn() -> None:
    """A cut that tears the only footer of a fixed image is undone, too."""
    start, log = fixed_grow()
    before = start.contents()
    torn = []
    for seed in range(60):
        rng = random.Random(seed)
        store = CrashStore(start)
        store.cut_at = rng.randint(1, 4)
        with pytest.raises(PowerCut):
            apply_change(store, log)
            store.sync()
        found = store.after_cut(rng)
        torn.append(found.pread(60 * KIB, 8)[:8] not in (b"", bytes(8), b"conectix"))
        assert belongs(found, log), seed
        roll_back(found, log)
        assert found.contents() == before


def test_without_a_log_a_cut_would_leave_a_mixture() -> None:
    """The tests above can fail: a cut in the middle of the change leaves neither the old nor the new state."""
    start, log = fixed_grow()
    after = start.copy()
    apply_change(after, log)
    store = CrashStore(start)
    seen: set[bytes] = set()
    whole = (start.contents(), after.contents())
    store.watcher = lambda: seen.update(store.after_cut(random.Random(n)).contents() for n in range(SEEDS))
    apply_change(store, log)
    assert [one for one in seen if one not in whole]


def test_the_old_file_is_read_in_any_pieces() -> None:
    """The view agrees with the old file byte for byte, for any range; what it calls holes is never data."""
    start, log = fixed_grow()
    before = start.contents()
    changed = start.copy()
    apply_change(changed, log)
    seen = UndoneStore(changed, log)
    rng = random.Random(5)
    for _ in range(300):
        offset, size = rng.randrange(70 * KIB), rng.randrange(8 * KIB)
        assert seen.pread(offset, size) == before[offset : offset + size]
        buffer = bytearray(b"x" * size)
        seen.pread_into(offset, memoryview(buffer))
        assert bytes(buffer) == before[offset : offset + size].ljust(size, b"\0")
        runs = list(seen.data_runs(offset, size))
        assert [run[0] for run in runs] == [offset, *(run[0] + run[1] for run in runs)][: len(runs)]
        assert sum(run[1] for run in runs) == size
        assert all(not any(before[run[0] : run[0] + run[1]]) for run in runs if not run[2])


def test_the_old_file_is_read_only() -> None:
    """Every call that would change the file is refused as read-only."""
    start, log = fixed_grow()
    seen = UndoneStore(start.copy(frozen=True), log)
    calls: list[Callable[[], None]] = [
        lambda: seen.pwrite(0, b"x"),
        lambda: seen.punch(0, 1),
        lambda: seen.reserve(0, 1),
        lambda: seen.truncate(0),
        lambda: seen.copy_from(start, 0, 0, 1),
    ]
    for call in calls:
        with pytest.raises(errors.ReadOnly):
            call()
    seen.sync()


@pytest.mark.parametrize("cut", [0, 1, 40, 100, -33, -32, -1])
def test_a_torn_log_is_ignored(cut: int) -> None:
    """A log that lost its end is not used."""
    _, log = fixed_grow()
    raw = encode(log)
    store = MemStore("log")
    store.pwrite(0, raw[:cut])
    assert read_log(store) is None


@given(st.integers(0, 2000), st.integers(1, 255))
def test_a_damaged_log_is_ignored(position: int, mask: int) -> None:
    """A log with a single wrong byte is not used."""
    _, log = fixed_grow()
    raw = bytearray(encode(log))
    raw[position % len(raw)] ^= mask
    store = MemStore("log")
    store.pwrite(0, raw)
    assert read_log(store) is None


def resealed(raw: bytes) -> MemStore:
    """A log with a correct digest, whatever it says."""
    store = MemStore("log")
    store.pwrite(0, raw + hashlib.sha256(raw).digest())
    return store


HOSTILE = {
    "another magic": struct.pack(">8sII16sQQ", b"vhdkREDO", 1, 0, IMAGE_ID, 1, 1),
    "a version to come": struct.pack(">8sII16sQQ", b"vhdkUNDO", 2, 0, IMAGE_ID, 1, 1),
    "no size": struct.pack(">8sII16sQQ", b"vhdkUNDO", 1, 0, IMAGE_ID, 0, 0),
    "a size past all images": struct.pack(">8sII16sQQ", b"vhdkUNDO", 1, 0, IMAGE_ID, 1, 1 << 62),
    "four billion changes": struct.pack(">8sII16sQQ", b"vhdkUNDO", 1, 0xFFFFFFFF, IMAGE_ID, 1, 1),
    "a change past all images": struct.pack(
        ">8sII16sQQQQ2s", b"vhdkUNDO", 1, 1, IMAGE_ID, 512, 512, (1 << 64) - 1, 1, b"ab"
    ),
    "a change without end": struct.pack(
        ">8sII16sQQQQ2s", b"vhdkUNDO", 1, 1, IMAGE_ID, 512, 512, 0, (1 << 63) - 1, b"ab"
    ),
    "an empty change": struct.pack(">8sII16sQQQQ", b"vhdkUNDO", 1, 1, IMAGE_ID, 512, 512, 0, 0),
    "changes over each other": struct.pack(
        ">8sII16sQQQQQQ6s", b"vhdkUNDO", 1, 2, IMAGE_ID, 512, 512, 0, 2, 1, 1, b"abcdef"
    ),
    "bytes behind the last change": struct.pack(">8sII16sQQQQ3s", b"vhdkUNDO", 1, 1, IMAGE_ID, 512, 512, 0, 1, b"abc"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_impossible_log_is_ignored(name: str) -> None:
    """A log with a correct digest but impossible numbers is not used, in bounded time and memory."""
    assert read_log(resealed(HOSTILE[name])) is None


def test_a_log_at_the_limit_and_above() -> None:
    """The largest log is planned and read; a larger change is refused, and a larger file is not a log."""
    store = MemStore("image.vhd")
    store.truncate(undo.MAX_LOG_BYTES)
    overhead = len(encode(plan_change(store, IMAGE_ID, [(0, b"x")]))) - 2
    largest = bytes((undo.MAX_LOG_BYTES - overhead) // 2)
    log = plan_change(store, IMAGE_ID, [(0, largest)])
    assert undo.MAX_LOG_BYTES - 1 <= len(encode(log)) <= undo.MAX_LOG_BYTES
    assert read_log(stored(log)) == log
    with pytest.raises(errors.InvalidArgument):
        plan_change(store, IMAGE_ID, [(0, largest + b"xx")])
    huge = MemStore("log")
    huge.truncate(undo.MAX_LOG_BYTES + 1)
    assert read_log(huge) is None


def test_too_many_changes_are_refused() -> None:
    """The number of ranges has a limit when a change is planned and when a log is read."""
    store = MemStore("image.vhd")
    store.truncate(2 * undo.MAX_CHANGES + 2)
    writes = [(2 * number, b"x") for number in range(undo.MAX_CHANGES)]
    log = plan_change(store, IMAGE_ID, writes)
    assert read_log(stored(log)) == log
    with pytest.raises(errors.InvalidArgument):
        plan_change(store, IMAGE_ID, [*writes, (2 * undo.MAX_CHANGES, b"x")])


def other_file(size: int, unique_id: bytes) -> MemStore:
    """Another fixed image, full of data."""
    store = MemStore("fixed.vhd")
    store.pwrite(0, random.Random(9).randbytes(size))
    footer = layout.build_footer(new_footer(layout.DISK_TYPE_FIXED, size))
    raw = footer[:68] + unique_id + footer[84:]
    store.pwrite(size, layout.sealed(raw, layout.FOOTER_CHECKSUM_OFFSET))
    return store


@pytest.mark.parametrize("size", [8 * KIB, 24 * KIB, 40 * KIB, 60 * KIB, 200 * KIB])
@pytest.mark.parametrize("same_id", [False, True])
def test_the_log_of_another_file_is_ignored(size: int, same_id: bool) -> None:
    """A file that replaced the image, even a copy of an earlier state, keeps every byte."""
    _, log = fixed_grow()
    other = other_file(size, log.unique_id if same_id else b"another image id")
    other.pwrite(other.size() - 8, b"mark")  # from another time: its footer has other reserved bytes
    raw = other.pread(size, SECTOR_SIZE)
    other.pwrite(size, layout.sealed(raw, layout.FOOTER_CHECKSUM_OFFSET))
    assert not belongs(other, log)


def test_a_file_changed_since_is_not_rolled_back() -> None:
    """If another program wrote over the changed ranges after the cut, the log is not used."""
    start = image()
    log = plan_change(start, IMAGE_ID, [(1000, b"new" * 500), (9000, b"x" * 100)])
    apply_change(start, log)
    assert belongs(start, log)
    start.pwrite(9050, b"neither")
    assert not belongs(start, log)


@pytest.mark.parametrize("operation", ["write", "truncate", "sync"])
@pytest.mark.parametrize("make_error", [io_failed, no_space])
def test_a_failing_change_is_undone(operation: str, make_error: Callable[[], errors.VhdkitError]) -> None:
    """Whichever call fails, the log still applies to the file, and undoing works once the fault is gone."""
    start, log = fixed_grow()
    before = start.contents()
    for at in (1, 2):
        store = FaultyStore(start, Fault(operation, make_error, at=at, partly=operation == "write"))
        with contextlib.suppress(errors.VhdkitError):
            apply_change(store, log)
        store.faults.clear()
        assert belongs(store, log)
        roll_back(store, log)
        assert store.contents() == before


def holding(content: bytes, store: MemStore | None = None) -> MemStore:
    """A file with these bytes."""
    store = store or MemStore("file")
    store.pwrite(0, content)
    return store


class _CountingStore(MemStore):
    """Counts the bytes that are read."""

    read_bytes = 0

    def pread(self, offset_bytes: int, size_bytes: int) -> bytes:
        """See `Store.pread`."""
        piece = super().pread(offset_bytes, size_bytes)
        self.read_bytes += len(piece)
        return piece


@pytest.mark.parametrize("which", ["size", "id"])
def test_the_log_of_another_image_is_not_read_completely(which: str) -> None:
    """INV-BOUNDED: a log's first bytes name its image: one of another image costs no more than those."""
    image = MemStore("image")
    create_dynamic(image, 4 << 20)
    size = image.size() + (which == "size")
    unique_id = read_metadata(image).footer.unique_id if which == "size" else bytes(range(16))
    log = UndoLog(unique_id, size, size, (Change(4096, bytes(1 << 20), b"x" * (1 << 20)),))
    record = _CountingStore("log")
    holding(encode(log), record)
    assert read_log(record, image) is None and record.read_bytes < 100
    assert read_log(record) == log


@pytest.mark.parametrize("length", [480, 1 << 20])
def test_a_hostile_mixture_is_compared_in_bulk(length: int) -> None:
    """INV-BOUNDED: old and new bytes are compared many at once, not one by one."""
    count = (2 << 20) // length
    rng = random.Random(7)
    content = bytearray(4096)
    changes = []
    for _ in range(count):
        changes.append(Change(len(content), bytes(length), b"\1" * length))
        content += bytes(rng.choices((0, 1), k=length)) + bytes(480)
    store = holding(bytes(content))
    log = UndoLog(bytes(16), store.size(), store.size(), tuple(changes))
    calls = 0

    def count_calls(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count_calls)
    try:
        assert belongs(store, log)
    finally:
        sys.setprofile(None)
    assert calls < 20 * count + 1000, "two million bytes"


def test_mentions_needs_a_log_and_finds_an_id_anywhere() -> None:
    """Only a file that begins like a log is searched, also across the pieces in which it is read."""
    wanted = bytes(range(16))
    piece = bytes((1 << 20) - 100)
    change = Change(0, piece + wanted + piece, bytes(2 * len(piece) + 16))
    log = encode(UndoLog(bytes(16), 1 << 22, 1 << 22, (change,)))
    assert mentions(holding(log), {b"y" * 16, wanted})
    assert not mentions(holding(log), {b"y" * 16})
    assert not mentions(holding(b"X" + log[1:]), {wanted})
    assert not mentions(MemStore("log"), {wanted})
