# SPDX-License-Identifier: Apache-2.0
"""Drafts: every short history of changes, and limits. That a draft reads as its base and its diff is in
`test_patched`.
"""

from __future__ import annotations

from itertools import product

import pytest

from tests.harness.stores import MemStore
from tests.histories import Step, modelled, step, store_of
from vhdkit import errors
from vhdkit.formats.draft import MAX_DRAFT_BYTES, DraftStore
from vhdkit.units import KIB, MIB, SECTOR_SIZE


def test_every_short_history_of_a_draft() -> None:
    """INV-DRAFT-EXACT: the same for every sequence of up to three changes at the edges of two sectors."""
    changes: list[Step] = [("write", offset, raw) for offset in (0, 512, 700) for raw in (b"\2" * 512, b"\0")]
    changes += [("truncate", size, 0) for size in (0, 1, 512, 700, 1600)]
    changes += [("punch", 1, 600), ("reserve", 512, 700), ("copy", 500, b"\3" * 20)]
    for start in (b"", b"\1", b"\1" * 1100):
        base = store_of(start)
        base.frozen = True
        for length in (1, 2, 3):
            for steps in product(changes, repeat=length):
                draft, model = DraftStore(base), bytearray(start)
                for one in steps:
                    step(draft, *one)
                    modelled(model, *one)
                assert draft.pread(0, 4096) == model
                made = bytearray(start)
                for offset, raw in draft.diff():
                    modelled(made, "write", offset, raw)
                modelled(made, "truncate", draft.size(), 0)
                assert made == model, (start, steps)


def test_a_draft_is_bounded() -> None:
    """INV-BOUNDED: the memory of a draft is limited, and no file becomes longer than files can be."""
    draft = DraftStore(MemStore(size_bytes=1))
    position = 0
    with pytest.raises(errors.InvalidArgument):
        for position in range(0, MAX_DRAFT_BYTES + 2 * MIB, MIB):
            draft.pwrite(position, b"x" * MIB)
    assert draft.size() == position == MAX_DRAFT_BYTES, "a refused write changed something"
    changes: list[Step] = [("write", (1 << 63) - 10, b"x"), ("truncate", 1 << 63, 0), ("reserve", 1 << 63, 1)]
    for one in changes:
        with pytest.raises(errors.NoSpace):
            step(draft, *one)
    assert draft.size() == MAX_DRAFT_BYTES


def test_small_writes_cost_no_more_than_the_sectors_they_change() -> None:
    """INV-BOUNDED: table entries written one by one take only the memory of the table."""
    draft = DraftStore(MemStore(size_bytes=64 * KIB))
    for offset in range(0, 64 * KIB, 4):
        draft.pwrite(offset, b"entr")
    assert draft.pread(0, 64 * KIB) == b"entr" * (16 * KIB)
    assert draft._patches.held_bytes == 64 * KIB
    assert len(draft._patches.all()) <= 64 * KIB // SECTOR_SIZE
