# SPDX-License-Identifier: Apache-2.0
"""Files read through patches: base + diff = view, for drafts, views of undo logs, and patches alone."""

from __future__ import annotations

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.harness.reading import recorded
from tests.harness.stores import CrashStore, Fault, FaultyStore, MemStore, io_failed
from tests.histories import (
    DATA,
    LIMIT,
    OFFSETS,
    STEPS,
    Step,
    assert_its_diff_makes_it,
    assert_reads_as,
    modelled,
    step,
    store_of,
)
from vhdkit import errors
from vhdkit.formats.draft import DraftStore
from vhdkit.formats.patched import Patch, PatchedStore, Patches
from vhdkit.formats.undo import UndoneStore, apply_change, plan_change, roll_back
from vhdkit.units import MIB, SECTOR_SIZE, TIB


@settings(derandomize=False)
@given(DATA, st.lists(STEPS, max_size=8), st.booleans())
@example(b"\1", [("truncate", 0, 0), ("write", 512, b"\0")], False)
@example(b"\1" * 1500, [("truncate", 700, 0), ("reserve", 700, 900)], True)
@example(b"\1" * 1500, [("write", 600, b"\2"), ("truncate", 601, 0), ("write", 2000, b"\2")], False)
def test_base_and_diff_make_the_view(start: bytes, steps: list[Step], nested: bool) -> None:
    """INV-DRAFT-EXACT: a draft, also one of a draft, reads as the changed file; its diff makes that file, read through
    patches or written, and undoing restores the base, in the view of the log and in the file.

    Looks at other examples in every run, in CI too: the same ones hid that a draft forgot what a truncation cut off.
    """
    below = store_of(start)
    below.frozen = True
    base = DraftStore(below)
    draft = DraftStore(base) if nested else base
    model = bytearray(start)
    for one in steps:
        step(draft, *one)
        modelled(model, *one)
        assert_reads_as(draft, bytes(model))
    assert_its_diff_makes_it(draft, start, bytes(model))


@settings(derandomize=False)
@given(DATA, st.integers(0, LIMIT), st.lists(st.tuples(OFFSETS, st.binary(min_size=1, max_size=1500), st.booleans())))
def test_later_patches_hide_earlier_ones(start: bytes, size: int, laid: list[tuple[int, bytes, bool]]) -> None:
    """INV-DRAFT-EXACT: later patches, also of zeros, hide earlier ones, and bytes behind the end are hidden."""
    below = store_of(start)
    below.frozen = True
    patches = Patches()
    model = bytearray(start)
    for offset, raw, is_data in laid:
        patches.lay(offset, offset + len(raw), raw if is_data else None)
        modelled(model, "write", offset, raw if is_data else bytes(len(raw)))
    assert patches.held_bytes == sum(len(one.data or b"") for one in patches.all())
    assert all(one.stop <= after.start for one, after in zip(patches.all(), patches.all()[1:], strict=False))
    view = PatchedStore(below, size, patches)
    seen = bytes(model[:size]).ljust(size, b"\0")
    assert_reads_as(view, seen)
    assert (view.name, view.identity) == (below.name, below.identity)
    assert_its_diff_makes_it(view, start, seen)


@settings(derandomize=False)
@given(DATA, st.lists(STEPS, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_a_partial_change_reads_as_before(start: bytes, steps: list[Step], rng: random.Random) -> None:
    """INV-DRAFT-EXACT, INV-UNDO-LOG: whatever part of a change was made, its log shows the old content."""
    below = store_of(start)
    draft = DraftStore(below)
    for one in steps:
        step(draft, *one)
    if not start and not draft.size():
        return
    log = plan_change(below, bytes(16), draft.diff(), draft.size())
    crash = CrashStore(below)
    found: list[MemStore] = []
    crash.watcher = lambda: found.append(crash.after_cut(rng))
    apply_change(crash, log)
    for cut in found:
        before = cut.contents()
        view = UndoneStore(cut, log)
        assert_reads_as(view, start)
        refused: list[Step] = [
            ("write", 0, b"x"),
            ("copy", 0, b"x"),
            ("punch", 0, 1),
            ("reserve", 0, 1),
            ("truncate", 0, 0),
        ]
        for one in refused:
            with pytest.raises(errors.ReadOnly):
                step(view, *one)
        assert cut.contents() == before
        roll_back(cut, log)
        assert cut.contents() == start


def test_what_is_patched_is_not_read_below() -> None:
    """An unreadable sector does not matter under a patch, and is an error beside it."""
    base = FaultyStore(
        store_of(b"x" * 3 * SECTOR_SIZE), Fault("read", io_failed, persistent=True, where=SECTOR_SIZE.__eq__)
    )
    patches = Patches()
    patches.lay(SECTOR_SIZE, 2 * SECTOR_SIZE, b"y" * SECTOR_SIZE)
    view = PatchedStore(base, base.size(), patches)
    assert view.pread(0, base.size()) == b"x" * SECTOR_SIZE + b"y" * SECTOR_SIZE + b"x" * SECTOR_SIZE
    with pytest.raises(errors.IoFailed):
        PatchedStore(base, base.size(), Patches()).pread(SECTOR_SIZE, 1)


def test_patches_of_zeros_take_no_memory() -> None:
    """A patch of zeros may be as long as a disk: it stores nothing, and the diff has only the data below it."""
    below = MemStore(size_bytes=TIB)
    below.pwrite(TIB // 2, b"x")
    patches = Patches()
    patches.lay(0, TIB, None)
    patches.lay(MIB, MIB + 4, b"data")
    view = PatchedStore(below, TIB, patches)
    assert patches.held_bytes == 4
    assert list(view.data_runs(0, TIB)) == [(0, MIB, False), (MIB, 4, True), (MIB + 4, TIB - MIB - 4, False)]
    assert view.diff() == [(MIB, b"data"), (TIB // 2, bytes(SECTOR_SIZE))]
    assert patches.within(0, MIB + 1) == [Patch(0, MIB, None), Patch(MIB, MIB + 1, b"d")]


@given(DATA, st.integers(0, LIMIT), st.lists(st.tuples(OFFSETS, st.binary(min_size=1, max_size=1500))))
def test_only_what_the_base_shows_is_prefetched(start: bytes, size: int, laid: list[tuple[int, bytes]]) -> None:
    """A read of a prefetched range reads nothing from the base that was not prefetched, and nothing else was."""
    below, patches = store_of(start), Patches()
    for offset, raw in laid:
        patches.lay(offset, offset + len(raw), raw)
    view = PatchedStore(below, size, patches)
    with recorded(MemStore) as (read, prefetched):
        view.prefetch(100, LIMIT)
        assert not read
        view.pread_into(100, memoryview(bytearray(LIMIT)))
        assert prefetched.merged() == read.merged()
