# SPDX-License-Identifier: Apache-2.0
"""Which ranges are prefetched for which reads."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vhdkit.readahead import MAX_STREAMS, REMEMBERED_ENDS, WINDOW_BYTES, Budget, ReadAhead
from vhdkit.units import KIB, MIB

SIZE = 256 * MIB
SIZES = st.sampled_from([512, 4 * KIB, 64 * KIB, 256 * KIB, 1000 * KIB, MIB, 4 * MIB])
# (reader, offset or None for where that reader's last read ended, size)
READS = st.tuples(st.integers(0, 2), st.none() | st.integers(0, SIZE - 4 * MIB), SIZES)


@given(st.lists(READS, max_size=80), st.sampled_from([0, MIB, 5 * MIB, 64 * MIB]))
def test_reading_ahead_is_bounded(reads: list[tuple[int, int | None, int]], limit: int) -> None:
    """INV-READ-AHEAD-BOUNDED: whatever is read, what is prefetched and not yet read never passes the budget; each
    range lies on the disk; all of the budget comes back at the end."""
    budget = Budget(limit)
    readers = [ReadAhead(SIZE, budget) for _ in range(3)]
    ends = [0, 0, 0]
    for number, offset, size in reads:
        offset = min(ends[number] if offset is None else offset, SIZE - size)
        ends[number] = offset + size
        found = readers[number].note(offset, size)
        if found is not None:
            start, length = found
            assert 0 < length <= WINDOW_BYTES and start >= 0 and start + length <= SIZE
        ahead = [one for reader in readers for one in reader._streams]
        assert sum(max(one.end - one.position, 0) for one in ahead) <= sum(one.window for one in ahead)
        assert sum(one.window for one in ahead) == limit - budget.left_bytes <= limit
        for reader in readers:
            assert len(reader._streams) <= MAX_STREAMS and len(reader.marks) <= MAX_STREAMS + REMEMBERED_ENDS
    for reader in readers:
        reader.forget()
        assert not reader.marks
    assert budget.left_bytes == limit


@given(st.integers(0, 16 * MIB), SIZES, st.integers(3, 60))
def test_a_stream_finds_everything_prefetched(start: int, size: int, count: int) -> None:
    """From the third read on, each read of a stream was prefetched whole before it is made, no byte twice; and the
    reads at marks are enough to note."""
    dense, sparse = ReadAhead(SIZE), ReadAhead(SIZE)
    fetched = sparsely_fetched = 0
    for number in range(count):
        offset = start + number * size
        if offset + size > SIZE:
            break
        if number >= 2:
            assert fetched >= offset + size and sparsely_fetched >= offset + size
        found = dense.note(offset, size)
        if found is not None:
            assert found[0] == (fetched or offset + size), "no gap, and nothing twice"
            fetched = sum(found)
        if number == 0 or offset in sparse.marks:
            found = sparse.note(offset, size)
            if found is not None:
                assert found[0] == (sparsely_fetched or offset + size)
                sparsely_fetched = sum(found)
        assert fetched <= offset + size + WINDOW_BYTES


@given(st.lists(st.integers(0, SIZE // MIB - 1), unique=True, max_size=100), st.integers(1, MIB - 1))
def test_random_reads_prefetch_nothing(places: list[int], size: int) -> None:
    """Reads of which none begins where another ended are left alone."""
    readahead = ReadAhead(SIZE)
    assert all(readahead.note(place * MIB, size) is None for place in places)
    assert readahead.marks == {place * MIB + size for place in places[-REMEMBERED_ENDS:]}


def test_a_seek_ends_a_stream() -> None:
    """After a seek no more of the old place is prefetched, and its part of the budget comes back in the end."""
    budget = Budget()
    readahead = ReadAhead(SIZE, budget)
    for number in range(40):
        readahead.note(number * MIB, MIB)
    assert budget.left_bytes == 64 * MIB - WINDOW_BYTES, "the window has grown to its limit"
    far = 100 * MIB
    found = [readahead.note(far + 3 * KIB * number, 512) for number in range(200)]
    assert found == [None] * 200
    assert budget.left_bytes == 64 * MIB and not readahead._streams


def test_a_few_streams_at_once() -> None:
    """Interleaved streams are told apart; the one used least recently makes way for a new one."""
    readahead = ReadAhead(SIZE)
    for number in range(8):
        for stream in range(MAX_STREAMS):
            offset = stream * 32 * MIB + number * 256 * KIB
            found = readahead.note(offset, 256 * KIB)
            assert found is None or stream * 32 * MIB < found[0] < (stream + 1) * 32 * MIB
    assert len(readahead._streams) == MAX_STREAMS
    readahead.note(200 * MIB, MIB)
    assert readahead.note(201 * MIB, MIB) is not None
    assert len(readahead._streams) == MAX_STREAMS and readahead._streams[0].position > 32 * MIB


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 20)), max_size=40))
def test_budgets_within_a_budget(takes: list[tuple[int, int]]) -> None:
    """What two budgets give together never passes that in which they lie; a refusal takes nothing."""
    whole = Budget(40)
    parts = [Budget(30, within=whole), Budget(25, within=whole), whole]
    taken = [0, 0, 0]
    for number, size in takes:
        fits = size <= 40 - sum(taken) and (number == 2 or size <= (30, 25)[number] - taken[number])
        assert parts[number].take(size) is fits
        taken[number] += size if fits else 0
    for number, size in enumerate(taken):
        parts[number].give_back(size)
    assert [one.left_bytes for one in parts] == [30, 25, 40]
