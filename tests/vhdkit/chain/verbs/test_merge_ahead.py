# SPDX-License-Identifier: Apache-2.0
"""Reading ahead of a merge: the pieces stay the same, and what is asked for is bounded."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness.stores import MemStore
from vhdkit.chain.verbs import merge_ahead, merge_steps
from vhdkit.chain.verbs.merge_ahead import read_ahead
from vhdkit.chain.verbs.merge_plan import MergePlan, plan_merge
from vhdkit.chain.verbs.merge_steps import fold
from vhdkit.formats.probe import open_layer
from vhdkit.formats.vhd.create import create_dynamic
from vhdkit.image import Layer
from vhdkit.store import ReadStore
from vhdkit.units import KIB, MIB, SECTOR_SIZE

SIZE, BLOCK = 16 * MIB, 512 * KIB


class AskedStore(MemStore):
    """Records what is asked for, and by which threads."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, int]] = []
        self.threads: set[str] = set()

    def prefetch(self, offset_bytes: int, size_bytes: int) -> None:
        """See `ReadStore.prefetch`."""
        self.asked.append((offset_bytes, size_bytes))
        self.threads.add(threading.current_thread().name)


def made(blocks: set[int]) -> tuple[AskedStore, Layer]:
    """An image with data in these blocks, open for reading, and its store."""
    store = AskedStore()
    create_dynamic(store, SIZE, block_size_bytes=BLOCK)
    layer = open_layer(store, writable=True)
    for block in sorted(blocks):
        layer.write(block * BLOCK // SECTOR_SIZE, memoryview(bytes([block + 1]) * BLOCK))
    layer.flush()
    return store, open_layer(store)


def empty() -> Layer:
    """The image into which is merged."""
    store = MemStore()
    create_dynamic(store, SIZE, block_size_bytes=BLOCK)
    return open_layer(store, writable=True)


def plan_of(layer: Layer, target: Layer) -> MergePlan:
    """A merge of one layer."""
    return plan_merge([layer], target, fresh=True)


@given(blocks=st.sets(st.integers(0, SIZE // BLOCK - 1)))
@settings(max_examples=25, deadline=None)
def test_no_more_than_the_limit_is_asked_for_and_not_yet_copied(blocks: set[int]) -> None:
    """The pieces are those of the plan, and at no moment more than the limit and one block are read ahead."""
    store, layer = made(blocks)
    target = empty()
    expected = list(plan_of(layer, target).blocks())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge_ahead, "DATA_BYTES", 3 * BLOCK)
        store.asked.clear()
        found, copied = [], 0
        for pieces in read_ahead(plan_of(layer, target), target):
            asked = sum(size for _, size in list(store.asked) if size > SECTOR_SIZE)
            assert asked <= copied + 4 * BLOCK
            found.append(pieces)
            copied += sum(piece.size_bytes for piece in pieces)
    assert found == expected
    places = {(piece.offset_bytes, piece.size_bytes) for pieces in expected for piece in pieces}
    assert {one for one in store.asked if one[1] > SECTOR_SIZE} <= places


def test_bitmaps_and_data_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first blocks need is asked for before the first of them is copied, data by another thread."""
    store, layer = made({0, 1, 2, 3})
    target = empty()
    done = threading.Event()
    ask = merge_ahead._ask_for_data

    def asked(wanted: list[tuple[ReadStore, int, int]]) -> None:
        ask(wanted)
        done.set()

    monkeypatch.setattr(merge_ahead, "_ask_for_data", asked)
    store.asked.clear()
    blocks = read_ahead(plan_of(layer, target), target)
    first = next(blocks)
    assert done.wait(60)
    blocks.close()
    assert (first[0].offset_bytes, BLOCK) in store.asked
    assert {first[0].offset_bytes - SECTOR_SIZE + number * (BLOCK + 4 * KIB) for number in range(4)} <= {
        offset for offset, size in store.asked if size == SECTOR_SIZE
    }
    assert any(name.startswith("vhdkit-ahead") for name in store.threads)
    assert not any(one.name.startswith("vhdkit-ahead") for one in threading.enumerate())


def test_what_the_file_system_will_share_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that will not be copied is not asked for, only the bitmaps."""
    store, layer = made(set(range(8)))
    target = empty()
    monkeypatch.setattr(merge_ahead, "sharing_stores", lambda layers, new: frozenset({store}))
    store.asked.clear()
    assert len(list(read_ahead(plan_of(layer, target), target))) == 8
    assert {size for _, size in store.asked} == {SECTOR_SIZE}


def test_only_copied_bytes_cause_flushes_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shared makes no dirty pages, so a merge flushes after sixteen times as many of such bytes."""
    store, layer = made(set(range(32)))
    monkeypatch.setattr(merge_steps, "_FLUSH_BYTES", BLOCK)
    for sharing, expected in (frozenset(), 32), (frozenset({store}), 2):
        target = empty()
        flushes: list[None] = []
        monkeypatch.setattr(merge_steps, "sharing_stores", lambda layers, new, found=sharing: found)
        monkeypatch.setattr(target, "flush", lambda flushes=flushes: flushes.append(None))
        fold(plan_of(layer, target), target)
        assert len(flushes) == expected


def test_without_threads_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system allows no more threads, the pieces still come."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    _, layer = made({0, 1, 5})
    plan = plan_of(layer, empty())
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert list(read_ahead(plan, empty())) == list(plan.blocks())
