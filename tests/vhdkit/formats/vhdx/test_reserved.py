# SPDX-License-Identifier: Apache-2.0
"""Space for the BAT and for sector bitmaps: taken before a block is, so that neither is lost if there is none."""

from __future__ import annotations

import itertools

import pytest

import vhdkit
from tests.harness.power import VHDX_SIZE, faults_of, open_mem, vhdx_child_scene
from tests.harness.stores import Fault, FaultyStore, MemStore, io_failed, no_space
from tests.vhdkit.formats.vhdx.images import PARENT
from vhdkit.formats.probe import open_layer
from vhdkit.formats.vhdx.blocks import VhdxImage
from vhdkit.formats.vhdx.create import create, new_disk
from vhdkit.formats.vhdx.reserved import PART_BYTES, Reserved
from vhdkit.image import ParentRef
from vhdkit.units import GIB, MIB, SECTOR_SIZE, whole_sectors

SIZE = 24 * GIB
FIRST, OTHER_PART = 3, 13000  # blocks of 1 MiB: their BAT entries, and those of their bitmaps, lie in three parts


def test_a_part_is_reserved_once_and_again_after_a_truncation() -> None:
    """Each part is reserved as a whole, once; when the file is truncated below it, it is reserved again."""
    store = MemStore()
    reserved = Reserved(store)
    for offset, size_after in ((3 * PART_BYTES + 1, 4 * PART_BYTES), (PART_BYTES, 4 * PART_BYTES)):
        reserved.ensure(offset)
        assert store.size() == size_after
    store.truncate(2 * PART_BYTES)
    reserved.ensure(3 * PART_BYTES)
    assert store.size() == 2 * PART_BYTES
    reserved.forget_from(2 * PART_BYTES)
    reserved.ensure(3 * PART_BYTES)
    assert store.size() == 4 * PART_BYTES


def test_space_for_metadata_is_taken_only_in_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-FLUSHED-OR-NEWER where space is reserved by writing zeros: a page that lies partly in a hole keeps its bits.

    The holes of a memory store are sectors, as those of a file system with small blocks are.
    """
    reserved: list[tuple[int, int]] = []

    def with_zeros(store: MemStore, offset_bytes: int, size_bytes: int) -> None:
        reserved.append((offset_bytes, size_bytes))
        store.pwrite(offset_bytes, bytes(size_bytes))

    scene = vhdx_child_scene(0)
    with open_mem(scene.leaf, scene.parents, writable=True) as disk:
        monkeypatch.setattr(MemStore, "reserve", with_zeros)
        for sector in range(0, VHDX_SIZE // SECTOR_SIZE, 41):
            start = sector * SECTOR_SIZE
            disk.write(start, scene.content[start : start + SECTOR_SIZE])
        with open_mem(scene.leaf.copy(), scene.parents) as cut:
            assert cut.read(0, VHDX_SIZE) == scene.content
    assert reserved


def image(parent: ParentRef | None) -> MemStore:
    """An empty image of many blocks."""
    store = MemStore("leaf.avhdx")
    create(store, new_disk(SIZE), MIB, fixed=False, parent=parent)
    return store


def sectors_of(store: MemStore) -> tuple[int, list[tuple[int, bytes]]]:
    """The size and the data of a large store."""
    return store.size(), [
        (offset, store.pread(offset, size)) for offset, size, is_data in store.data_runs(0, store.size()) if is_data
    ]


def fails_without_a_trace(parent: ParentRef | None, fault: Fault, *, zeroes: bool, reaches_parent: bool) -> bool:
    """Fail a call of a write to a block far from the first one; False if the write makes no such call."""
    store = FaultyStore(image(parent))
    layer = open_layer(store, writable=True)
    assert isinstance(layer, VhdxImage)
    first, block = (whole_sectors(number * MIB) for number in (FIRST, OTHER_PART))
    layer.write(first, memoryview(b"a" * (SECTOR_SIZE if reaches_parent else MIB)))
    if not reaches_parent:
        layer.write_zeroes(block, whole_sectors(MIB))
    layer.flush()
    before, owned = sectors_of(store), list(layer.extents(block, whole_sectors(MIB)))
    store.faults = [fault]
    try:
        layer.write_zeroes(block + 9, 5) if zeroes else layer.write(block + 9, memoryview(b"b" * 5 * SECTOR_SIZE))
    except (vhdkit.NoSpace, vhdkit.IoFailed):
        pass
    else:
        assert fault.seen < fault.at, "a failure was ignored"
        return False
    store.faults = []
    assert list(layer.extents(block, whole_sectors(MIB))) == owned
    if fault.operation != "reserve":
        assert sectors_of(store) == before
    layer.write(block, memoryview(b"c" * SECTOR_SIZE))
    store.faults = [Fault("reserve", no_space, persistent=True), Fault("truncate", no_space, persistent=True)]
    layer.flush()  # it needs no space
    layer.close()
    found = open_layer(store)
    extents = [one for one in found.extents(block, whole_sectors(MIB)) if one.store_offset_bytes is not None]
    assert store.pread(extents[0].store_offset_bytes or 0, SECTOR_SIZE) == b"c" * SECTOR_SIZE
    assert sum(one.sector_count for one in extents) == (1 if parent and reaches_parent else whole_sectors(MIB))
    assert store.size() == before[0] + MIB * (2 if parent and reaches_parent else 1), "space was lost"
    assert not faults_of(store)
    return True


@pytest.mark.parametrize("make_error", [no_space, io_failed])
@pytest.mark.parametrize(
    ("parent", "zeroes", "reaches_parent", "calls"),
    [
        (None, False, True, {"reserve": 1, "write": 1, "truncate": 1}),
        (PARENT, False, True, {"reserve": 3, "write": 1, "truncate": 1, "read": 1}),
        (PARENT, True, True, {"reserve": 3, "truncate": 1, "read": 1}),
        (PARENT, False, False, {"write": 1, "truncate": 1}),
    ],
    ids=["dynamic", "child", "child-zeros", "child-over-zeros"],
)
def test_a_block_without_space_for_its_metadata_leaves_no_trace(
    parent: ParentRef | None, zeroes: bool, reaches_parent: bool, calls: dict[str, int], make_error: object
) -> None:
    """INV-FLUSHED-OR-NEWER, INV-NO-REUSE: whichever call of an allocation fails, the file keeps its size, neither a
    bit nor an entry of the BAT changes, no space is lost, and no later flush needs any."""
    failed = {}
    for operation in ("reserve", "write", "truncate", "read"):
        for at in itertools.count(1):
            fault = Fault(operation, make_error, at=at)  # type: ignore[arg-type]
            if not fails_without_a_trace(parent, fault, zeroes=zeroes, reaches_parent=reaches_parent):
                break
            failed[operation] = at
    assert failed == calls
