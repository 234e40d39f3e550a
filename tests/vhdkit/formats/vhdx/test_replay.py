# SPDX-License-Identifier: Apache-2.0
"""A log that was not replayed, against a model that writes every change in its order."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vhdkit.formats.vhdx.images import BAT, FIRST_BLOCK, LOG, add_log, image, page
from vhdkit.errors import CorruptImage, CorruptReason
from vhdkit.formats.vhdx.header import current_header, read_headers
from vhdkit.formats.vhdx.log import SECTOR, LogChange
from vhdkit.formats.vhdx.replay import Replay, read_log
from vhdkit.store import ReadStore
from vhdkit.units import MIB

SPAN = 16  # pages from the start of the BAT


def replay(store: ReadStore) -> Replay | None:
    """What the log changes."""
    return read_log(store, current_header(store.name, read_headers(store)))


CHANGES = st.tuples(st.integers(0, SPAN - 1), st.integers(0, 6), st.integers(1, 255))


@settings(max_examples=50)
@given(entries=st.lists(st.lists(CHANGES, max_size=5), min_size=1, max_size=4))
def test_a_later_change_wins(entries: list[list[tuple[int, int, int]]]) -> None:
    """Pages and ranges of zeros in any order result in changes apart and in file order; the file is unchanged."""
    store = image()
    store.pwrite(BAT, page(b"o") * SPAN)
    model, logged = bytearray(page(b"o") * SPAN), []
    for entry in entries:
        changes = []
        for first, count, fill in entry:
            size = min(count, SPAN - first) * SECTOR or SECTOR
            data = None if count else page(bytes([fill]))
            changes.append(LogChange(BAT + first * SECTOR, size, data))
            model[first * SECTOR : first * SECTOR + size] = data or bytes(size)
        logged.append(changes)
    add_log(store, logged)
    found = replay(store.copy(frozen=True))
    assert found is not None and found.view.pread(BAT, len(model)) == model
    ends = [(one.file_offset_bytes, one.end_bytes) for one in found.changes]
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    assert store.pread(BAT, len(model)) == page(b"o") * SPAN


@pytest.mark.parametrize(
    "change",
    [
        LogChange(BAT + 512, SECTOR, page(b"x")),
        LogChange(BAT, SECTOR + 1, None),
        LogChange(0, SECTOR, page(b"x")),
        LogChange(128 * 1024, SECTOR, None),
        LogChange(LOG, SECTOR, page(b"x")),
        LogChange(LOG - SECTOR, 2 * SECTOR, None),
        LogChange(1 << 60, SECTOR, page(b"x")),
    ],
    ids=["unaligned", "part-of-page", "identifier", "header", "log", "into-log", "behind"],
)
def test_what_no_program_logs_is_refused(change: LogChange) -> None:
    """Changes of headers, of the log, of parts of pages, and past the largest file are refused."""
    store = image()
    add_log(store, [[change]])
    with pytest.raises(CorruptImage) as caught:
        replay(store)
    assert caught.value.reason is CorruptReason.LOG_OFFSET
    assert (caught.value.path, caught.value.structure, caught.value.offset_bytes) == (store.name, "log entry", LOG)


def test_sizes_of_the_file() -> None:
    """A truncated file is refused; one that the log extends reads as if it had grown."""
    store = image()
    add_log(store, [[]], flushed=store.size() + MIB)
    with pytest.raises(CorruptImage) as caught:
        replay(store)
    assert caught.value.reason is CorruptReason.LOG_TRUNCATED
    store = image()
    add_log(store, [[]], last=FIRST_BLOCK + 7 * MIB)
    found = replay(store)
    assert found is not None and found.view.size() == FIRST_BLOCK + 7 * MIB
    assert replay(image()) is None
