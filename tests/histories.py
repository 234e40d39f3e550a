# SPDX-License-Identifier: Apache-2.0
"""Histories of changes to a store, applied to plain bytes as well, and what must hold for every view of them."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.harness.stores import MemStore
from vhdkit.formats.patched import PatchedStore, Patches
from vhdkit.formats.undo import UndoneStore, apply_change, plan_change, roll_back
from vhdkit.store import ReadStore, Store
from vhdkit.units import SECTOR_SIZE

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
    """Apply one change to a store."""
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
    """Apply the same change to plain bytes."""
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


def assert_reads_as(store: ReadStore, model: bytes) -> None:
    """Every way to read a store gives these bytes, also across its end."""
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


def assert_its_diff_makes_it(view: PatchedStore, start: bytes, model: bytes) -> None:
    """Base + diff = view: by hand, as a patched store, and through an undo log, which restores the base from any point
    of the change."""
    made = bytearray(start)
    patches, end = Patches(), -1
    for offset, raw in view.diff():
        assert offset > end and raw
        end = offset + len(raw)
        modelled(made, "write", offset, raw)
        patches.lay(offset, end, raw)
    modelled(made, "truncate", view.size(), 0)
    assert made == model
    below = store_of(start)
    below.frozen = True
    again = PatchedStore(below, view.size(), patches)
    assert_reads_as(again, model)
    assert again.diff() == view.diff()
    below.frozen = False
    if not start and not model:
        return
    log = plan_change(below, bytes(16), view.diff(), view.size())
    assert_reads_as(UndoneStore(below, log), start)
    apply_change(below, log)
    assert below.contents() == model
    undone = UndoneStore(below, log)
    assert_reads_as(undone, start)
    back = bytearray(model)
    for offset, raw in undone.diff():
        modelled(back, "write", offset, raw)
    modelled(back, "truncate", undone.size(), 0)
    assert back == start
    roll_back(below, log)
    assert below.contents() == start
