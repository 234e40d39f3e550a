# SPDX-License-Identifier: Apache-2.0
"""Drafts: changes that are thought of and not made."""

from __future__ import annotations

import random
from itertools import product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.stores import CrashStore, MemStore
from vhdkit import errors
from vhdkit.formats.draft import MAX_DRAFT_BYTES, DraftStore
from vhdkit.formats.undo import UndoneStore, apply_change, plan_change, roll_back
from vhdkit.store import Store
from vhdkit.units import MIB, SECTOR_SIZE

LIMIT = 6 * SECTOR_SIZE
EDGES = (0, 1, 511, 512, 513, 1023, 1024, 1536, 2000, LIMIT)
OFFSETS = st.one_of(st.sampled_from(EDGES), st.integers(0, LIMIT))
DATA = st.one_of(st.binary(max_size=3 * SECTOR_SIZE), st.integers(0, 3 * SECTOR_SIZE).map(bytes))
Step = tuple[str, int, int | bytes]
STEPS: st.SearchStrategy[Step] = st.one_of(
    st.tuples(st.just("write"), OFFSETS, DATA),
    st.tuples(st.just("copy"), OFFSETS, DATA),
    st.tuples(st.just("punch"), OFFSETS, OFFSETS),
    st.tuples(st.just("truncate"), OFFSETS, st.just(0)),
    st.tuples(st.just("reserve"), OFFSETS, OFFSETS),
)


def store_of(raw: bytes) -> MemStore:
    """A store that holds `raw`."""
    store = MemStore()
    store.pwrite(0, raw)
    return store


def step(store: Store, kind: str, offset: int, argument: int | bytes) -> None:
    """One change of a store."""
    if isinstance(argument, bytes):
        if kind == "write":
            store.pwrite(offset, argument)
        else:
            store.copy_from(store_of(b"xyz" + argument), 3, offset, len(argument))
    elif kind == "truncate":
        store.truncate(offset)
    elif kind == "punch":
        store.punch(offset, argument)
    else:
        store.reserve(offset, argument)


def modelled(model: bytearray, kind: str, offset: int, argument: int | bytes) -> None:
    """The same change made to plain bytes."""
    if isinstance(argument, bytes):
        if argument:
            model.extend(bytes(max(offset + len(argument) - len(model), 0)))
            model[offset : offset + len(argument)] = argument
    elif kind == "truncate":
        model.extend(bytes(max(offset - len(model), 0)))
        del model[offset:]
    elif kind == "punch":
        inside = max(min(argument, len(model) - offset), 0)
        model[offset : offset + inside] = bytes(inside)
    elif argument > 0:
        model.extend(bytes(max(offset + argument - len(model), 0)))


def assert_reads_as(store: Store, model: bytes) -> None:
    """Every way to read a store says what the bytes say, also across its end."""
    assert store.size() == len(model)
    for offset, size in ((0, 2 * LIMIT), (1, 511), (513, 700), (len(model), 9), (len(model) + 700, 9)):
        assert store.pread(offset, size) == model[offset : offset + size]
        buffer = bytearray(b"\xee" * size)
        store.pread_into(offset, memoryview(buffer))
        assert buffer == model[offset : offset + size].ljust(size, b"\0")
        if store.try_pread_into(offset, memoryview(buffer)):
            assert buffer == model[offset : offset + size].ljust(size, b"\0")
        position = offset
        for at, count, may_hold_data in store.data_runs(offset, size):
            assert at == position and count > 0
            assert may_hold_data or not any(model[at : at + count])
            position += count
        assert position == offset + size


def assert_its_writes_make_it(draft: DraftStore, start: bytes, model: bytes) -> None:
    """Base + diff = view, by hand and by way of an undo log, which gives the base back from any point of it."""
    made = bytearray(start)
    end = -1
    for offset, raw in draft.writes():
        assert offset > end and raw
        end = offset + len(raw)
        modelled(made, "write", offset, raw)
    modelled(made, "truncate", draft.size(), 0)
    assert made == model
    below = store_of(start)
    if not start and not model:
        return
    log = plan_change(below, bytes(16), draft.writes(), draft.size())
    assert_reads_as(UndoneStore(below, log), start)
    apply_change(below, log)
    assert below.contents() == model
    assert_reads_as(UndoneStore(below, log), start)
    roll_back(below, log)
    assert below.contents() == start


@settings(derandomize=False)
@given(DATA, st.lists(STEPS, max_size=8), st.booleans())
@example(b"\1", [("truncate", 0, 0), ("write", 512, b"\0")], False)
@example(b"\1" * 1500, [("truncate", 700, 0), ("reserve", 700, 900)], True)
@example(b"\1" * 1500, [("write", 600, b"\2"), ("truncate", 601, 0), ("write", 2000, b"\2")], False)
def test_a_draft_reads_as_the_file_would(start: bytes, steps: list[Step], nested: bool) -> None:
    """INV-DRAFT-EXACT: a draft reads as the changed file, its writes make that file, undoing restores it.

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
    assert_its_writes_make_it(draft, start, bytes(model))


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
                for offset, raw in draft.writes():
                    modelled(made, "write", offset, raw)
                modelled(made, "truncate", draft.size(), 0)
                assert made == model, (start, steps)


@settings(derandomize=False)
@given(DATA, st.lists(STEPS, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_a_change_half_made_reads_as_before(start: bytes, steps: list[Step], rng: random.Random) -> None:
    """INV-DRAFT-EXACT, INV-UNDO-LOG: whatever part of a change was made, the view with its log reads as before it."""
    below = store_of(start)
    draft = DraftStore(below)
    for one in steps:
        step(draft, *one)
    if not start and not draft.size():
        return
    log = plan_change(below, bytes(16), draft.writes(), draft.size())
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


def test_a_draft_is_bounded() -> None:
    """INV-BOUNDED: a draft does not take memory without end, and no file becomes longer than files can be."""
    draft = DraftStore(MemStore(size_bytes=1))
    position = 0
    with pytest.raises(errors.InvalidArgument):
        for position in range(0, MAX_DRAFT_BYTES + 2 * MIB, MIB):
            draft.pwrite(position, b"x" * MIB)
    assert draft.size() == position == MAX_DRAFT_BYTES, "a refused write changes nothing"
    changes: list[Step] = [("write", (1 << 63) - 10, b"x"), ("truncate", 1 << 63, 0), ("reserve", 1 << 63, 1)]
    for one in changes:
        with pytest.raises(errors.NoSpace):
            step(draft, *one)
    assert draft.size() == MAX_DRAFT_BYTES
