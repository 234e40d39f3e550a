# SPDX-License-Identifier: Apache-2.0
"""Drafts: changes that are thought of and not made."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.stores import MemStore
from vhdkit import errors
from vhdkit.formats.draft import MAX_DRAFT_BYTES, DraftStore
from vhdkit.formats.undo import apply_change, plan_change, roll_back
from vhdkit.units import MIB, SECTOR_SIZE

LIMIT = 12 * SECTOR_SIZE
OFFSETS = st.integers(0, LIMIT)
STEPS = st.one_of(
    st.tuples(st.just("write"), OFFSETS, st.binary(min_size=1, max_size=3 * SECTOR_SIZE)),
    st.tuples(st.just("punch"), OFFSETS, OFFSETS),
    st.tuples(st.just("truncate"), OFFSETS, st.just(0)),
    st.tuples(st.just("reserve"), OFFSETS, OFFSETS),
)


@given(st.binary(max_size=LIMIT), st.lists(STEPS, max_size=8))
def test_a_draft_reads_as_the_file_would(start: bytes, steps: list[tuple[str, int, object]]) -> None:
    """INV-UNDO-LOG builds on it: a draft reads as the changed file, its writes make that file, undoing restores it."""
    below, real = MemStore(), MemStore()
    for made in (below, real):
        made.pwrite(0, start)
    below.frozen = True
    draft = DraftStore(below)
    for kind, offset, argument in steps:
        stores: tuple[DraftStore | MemStore, ...] = (draft, real)
        for one in stores:
            if kind == "write":
                assert isinstance(argument, bytes)
                one.pwrite(offset, argument)
            elif kind == "truncate":
                one.truncate(offset)
            else:
                assert isinstance(argument, int)
                (one.punch if kind == "punch" else one.reserve)(offset, argument)
        assert draft.size() == real.size()
        assert draft.pread(0, 2 * LIMIT) == real.contents()
        assert draft.pread(700, 900) == real.pread(700, 900)
        covered = list(draft.data_runs(0, draft.size()))
        assert sum(size for _, size, _ in covered) == draft.size()
        for at, size, is_data in covered:
            assert is_data or draft.pread(at, size) == bytes(size)
    below.frozen = False
    if not below.size() and not real.size():
        return
    log = plan_change(below, bytes(16), draft.writes(), draft.size())
    apply_change(below, log)
    assert below.contents() == real.contents()
    roll_back(below, log)
    assert below.contents() == start


def test_a_draft_is_bounded() -> None:
    """INV-BOUNDED: a draft does not take memory without end, and no file becomes longer than files can be."""
    draft = DraftStore(MemStore(size_bytes=1))
    with pytest.raises(errors.InvalidArgument):
        for position in range(0, MAX_DRAFT_BYTES + 2 * MIB, MIB):
            draft.pwrite(position, b"x" * MIB)
    with pytest.raises(errors.NoSpace):
        draft.pwrite((1 << 63) - 10, b"x")
