# SPDX-License-Identifier: Apache-2.0
"""What every format must do: the checks behind the `image.Layer` contract.

`SUBJECTS` has a row for each kind of layer. A format that is not in it fails `tests/vhdkit/test_conformance.py`,
so a new format begins with its row here. A check gets a `Subject` and makes what it needs from it.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

import vhdkit.formats
from tests.harness.power import LINK
from tests.harness.stores import Fault, FaultyStore, MemStore, sync_failed
from vhdkit import errors
from vhdkit.formats.linear import LinearImage
from vhdkit.formats.raw import create_raw, open_raw
from vhdkit.formats.vhd.create import create_differencing, create_dynamic, create_fixed
from vhdkit.formats.vhd.dynamic import DynamicImage
from vhdkit.formats.vhd.fixed import FixedImage, open_fixed
from vhdkit.formats.vhd.opening import open_dynamic
from vhdkit.formats.vhdx.blocks import VhdxImage
from vhdkit.formats.vhdx.create import create as create_vhdx
from vhdkit.formats.vhdx.create import new_disk
from vhdkit.formats.vhdx.opening import open_vhdx
from vhdkit.image import ExtentKind, Layer, ParentRef, read_extents
from vhdkit.store import Store
from vhdkit.units import KIB, MIB, PAGE_SIZE, SECTOR_SIZE, is_power_of_two, sectors_to_bytes, whole_sectors

BLOCK_SIZE = 512 * KIB
SIZE = 3 * BLOCK_SIZE + 5 * SECTOR_SIZE
VHDX_SIZE = 3 * MIB + 5 * PAGE_SIZE
REF = ParentRef.of_paths(b"p" * 16, 0, relative=".\\base.vhdx", absolute="\\srv\\base.vhdx", name="base.vhdx")
LAYER_METHODS = frozenset(name for name in vars(Layer) if not name.startswith("_"))


@dataclass(frozen=True)
class Subject:
    """One kind of layer: how to make an empty image of `SIZE` bytes in a store, and how to open it."""

    name: str
    layer_class: type
    create: Callable[[Store], object]
    opener: Callable[..., Layer]
    unit: int = 1  # sectors that are written together
    size: int = SIZE

    def whole(self, first: int, count: int) -> tuple[int, int]:
        """The units that a run of sectors touches, as (first sector, count)."""
        start = first // self.unit * self.unit
        end = min(-(-(first + count) // self.unit) * self.unit, whole_sectors(self.size))
        return start, end - start

    def new(self) -> MemStore:
        """A store with an empty image."""
        store = MemStore(f"{self.name}.vhd")
        self.create(store)
        return store

    def open(self, store: Store, *, writable: bool = False) -> Layer:
        """Open the image in it."""
        return self.opener(store, writable=writable)


def vhdx_in(
    store: Store, *, fixed: bool = False, parent: ParentRef | None = None, sector_bytes: int = SECTOR_SIZE
) -> None:
    """Make the store an empty VHDX."""
    create_vhdx(store, new_disk(VHDX_SIZE, sector_bytes), MIB, fixed=fixed, parent=parent)


SUBJECTS = (
    Subject("raw", LinearImage, lambda store: create_raw(store, SIZE), open_raw),
    Subject("fixed", FixedImage, lambda store: create_fixed(store, SIZE), open_fixed),
    Subject(
        "dynamic", DynamicImage, lambda store: create_dynamic(store, SIZE, block_size_bytes=BLOCK_SIZE), open_dynamic
    ),
    Subject("vhdx", VhdxImage, vhdx_in, open_vhdx, size=VHDX_SIZE),
    Subject("vhdx-fixed", VhdxImage, lambda store: vhdx_in(store, fixed=True), open_vhdx, size=VHDX_SIZE),
    Subject("vhdx-child", VhdxImage, lambda store: vhdx_in(store, parent=REF), open_vhdx, size=VHDX_SIZE),
    Subject("vhdx-4k", VhdxImage, lambda store: vhdx_in(store, sector_bytes=PAGE_SIZE), open_vhdx, 8, VHDX_SIZE),
    Subject(
        "vhdx-child-4k",
        VhdxImage,
        lambda store: vhdx_in(store, parent=REF, sector_bytes=PAGE_SIZE),
        open_vhdx,
        8,
        VHDX_SIZE,
    ),
    Subject(
        "differencing",
        DynamicImage,
        lambda store: create_differencing(store, SIZE, LINK, block_size_bytes=BLOCK_SIZE),
        open_dynamic,
    ),
)


def format_modules() -> Iterator[object]:
    """Every module below `vhdkit.formats`."""
    for found in pkgutil.walk_packages(vhdkit.formats.__path__, "vhdkit.formats."):
        yield importlib.import_module(found.name)


def classes_with_layer_methods() -> set[type]:
    """Every class defined by a format module that implements the contract's one question, `extents`."""
    found = set()
    for module in format_modules():
        for _, one in inspect.getmembers(module, inspect.isclass):
            if one.__module__.startswith("vhdkit.formats") and callable(getattr(one, "extents", None)):
                found.add(one)
    return found


def openers() -> set[object]:
    """Every `open_*` function defined by a format module, except the one that chooses between them."""
    return {
        function
        for module in format_modules()
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if name.startswith("open_") and name != "open_layer" and function.__module__.startswith("vhdkit.formats")
    }


# -- the checks -------------------------------------------------------------------------------------------------


def content_of(layer: Layer) -> bytes:
    """The content of a layer by itself; sectors that it does not own are zeros."""
    buffer = bytearray(b"\xee" * layer.size_bytes)
    read_extents(layer.store, layer.extents(0, whole_sectors(layer.size_bytes)), memoryview(buffer))
    return bytes(buffer)


def check_shape(subject: Subject) -> None:
    """Sizes, the unit of allocation and the tables are consistent, and nothing is owned that is not stored."""
    layer = subject.open(subject.new())
    assert all(hasattr(layer, name) for name in LAYER_METHODS)
    assert layer.size_bytes == subject.size and not layer.writable
    assert layer.unowned in (ExtentKind.ZERO, ExtentKind.ABSENT)
    if layer.block_size_bytes:
        assert is_power_of_two(layer.block_size_bytes)
        assert len(layer.allocated_blocks()) == -(-subject.size // layer.block_size_bytes)
        stored = layer.allocated_blocks()
        assert all(stored) or not any(stored)  # a fixed image with blocks has space for each of them
        assert all((layer.block_offset(block) >= 0) == stored[block] for block in range(len(stored)))
    else:
        assert len(layer.allocated_blocks()) == 0
        assert layer.block_offset(0) == 0 and layer.owned_sectors(0) is None
    assert content_of(layer) == bytes(subject.size)


def check_extents(subject: Subject) -> None:
    """Any range is covered in order, without gaps; data has an offset in the file, the rest is what `unowned` says."""
    store, rng = subject.new(), random.Random(1)
    layer, end = subject.open(store, writable=True), whole_sectors(subject.size)
    for _ in range(12):
        count = rng.randint(1, 300)
        first, count = subject.whole(rng.randrange(end - count), count)
        layer.write(first, memoryview(rng.randbytes(sectors_to_bytes(count))))
    per_block = whole_sectors(layer.block_size_bytes)
    ranges = [
        (0, end),
        (end - 1, 1),
        (0, 1),
        (5, 0),
        *((rng.randrange(end // 2), rng.randrange(end // 2)) for _ in range(99)),
    ]
    for first, count in ranges:
        position = first
        for extent in layer.extents(first, count):
            assert extent.sector_index == position and extent.sector_count > 0 and extent.layer_index == 0
            position = extent.end_sector
            if extent.kind is not ExtentKind.DATA:
                assert extent.store_offset_bytes is None and extent.kind is layer.unowned
                continue
            assert extent.store_offset_bytes is not None
            assert 0 <= extent.store_offset_bytes <= store.size() - extent.size_bytes
            if per_block:
                block, within = divmod(extent.sector_index, per_block)
                assert extent.store_offset_bytes == layer.block_offset(block) + sectors_to_bytes(within)
                owned = layer.owned_sectors(block)
                assert owned is None or owned[within]
        assert position == first + count


def check_write_and_read(subject: Subject) -> None:
    """Written data is read back: at once, next to unflushed neighbours, and when the file is opened later."""
    store, rng, end = subject.new(), random.Random(2), whole_sectors(subject.size)
    layer, expected = subject.open(store, writable=True), bytearray(subject.size)
    for turn in range(60):
        count = rng.choice((1, 2, 8, 100, 1500))
        first = rng.choice((rng.randrange(end - count + 1), end - count, 0, max(1024 - count // 2, 0)))
        first, count = subject.whole(first, count)
        data = rng.randbytes(sectors_to_bytes(count))
        before = owned_count(layer)
        grew = layer.write(first, memoryview(data))
        assert grew == (owned_count(layer) > before)
        expected[sectors_to_bytes(first) : sectors_to_bytes(first) + len(data)] = data
        if turn % 7 == 0:
            layer.flush()
            assert content_of(subject.open(store.copy(frozen=True))) == expected
        assert content_of(layer) == expected
    layer.close()
    assert content_of(subject.open(store.copy(frozen=True))) == expected


def owned_count(layer: Layer) -> int:
    """How many sectors the layer owns."""
    count = 0
    if not layer.block_size_bytes:
        return whole_sectors(layer.size_bytes)
    for block in range(len(layer.allocated_blocks())):
        if layer.block_offset(block) >= 0:
            owned = layer.owned_sectors(block)
            count += whole_sectors(layer.block_size_bytes) if owned is None else int(owned.sum())
    return count


def check_zeroes(subject: Subject) -> None:
    """Zeroed sectors read as zeros and, in an image with a parent, are owned; their neighbours are unchanged."""
    store, rng = subject.new(), random.Random(3)
    layer, end = subject.open(store, writable=True), whole_sectors(subject.size)
    expected = bytearray(rng.randbytes(BLOCK_SIZE)).ljust(subject.size, b"\0")
    layer.write(0, memoryview(expected)[:BLOCK_SIZE])
    for first, count in ((0, 1), (3, 500), (1000, 60), (end - 1, 1), (1500, 1100), (700, 1)):
        first, count = subject.whole(first, count)
        before = owned_count(layer)
        assert layer.write_zeroes(first, count) == (owned_count(layer) > before)
        expected[sectors_to_bytes(first) : sectors_to_bytes(first + count)] = bytes(sectors_to_bytes(count))
        assert content_of(layer) == expected
        assert all(extent.kind is not ExtentKind.ABSENT for extent in layer.extents(first, count))
    layer.close()
    assert content_of(subject.open(store.copy(frozen=True))) == expected


def check_trim(subject: Subject) -> None:
    """Trimmed sectors that the layer owns read as zeros; ownership and everything else stay as they are."""
    store, rng = subject.new(), random.Random(4)
    layer = subject.open(store, writable=True)
    expected = bytearray(rng.randbytes(BLOCK_SIZE)).ljust(subject.size, b"\0")
    layer.write(0, memoryview(expected)[:BLOCK_SIZE])
    some = b"x" * sectors_to_bytes(subject.unit)
    layer.write(2000, memoryview(some))
    expected[sectors_to_bytes(2000) : sectors_to_bytes(2000) + len(some)] = some
    used, owned = store.allocated_bytes(), owned_count(layer)
    for first, count in ((1, 100), (900, 1000), (1990, 20), (0, whole_sectors(subject.size))):
        first, count = subject.whole(first, count)
        layer.trim(first, count)
        expected[sectors_to_bytes(first) : sectors_to_bytes(first + count)] = bytes(sectors_to_bytes(count))
        assert content_of(layer) == expected
        assert owned_count(layer) == owned
    assert store.allocated_bytes() <= used - BLOCK_SIZE, "the space was not freed"
    layer.close()
    assert content_of(subject.open(store.copy(frozen=True))) == expected


def check_range(subject: Subject) -> None:
    """A range outside the image fails an assertion, before anything is written: `Disk` checks the range."""
    store = subject.new()
    layer, end = subject.open(store, writable=True), whole_sectors(subject.size)
    before = store.contents()
    for first, count in ((end, subject.unit), (end - subject.unit, 2 * subject.unit)):
        data = memoryview(bytes(sectors_to_bytes(count)))
        with pytest.raises(AssertionError):
            layer.write(first, data)
        with pytest.raises(AssertionError):
            layer.write_zeroes(first, count)
        with pytest.raises(AssertionError):
            layer.trim(first, count)
    assert store.contents() == before


def check_read_only(subject: Subject) -> None:
    """An image opened for reading never changes its store, not even by flush or close, and asserts on a write."""
    store = subject.new()
    store.frozen = True
    layer = subject.open(store)
    with pytest.raises(AssertionError):
        layer.write(0, memoryview(bytes(sectors_to_bytes(subject.unit))))
    with pytest.raises(AssertionError):
        layer.write_zeroes(0, subject.unit)
    with pytest.raises(AssertionError):
        layer.trim(0, subject.unit)
    layer.flush()
    layer.close()


def check_flush(subject: Subject) -> None:
    """A flush syncs at least once, even with nothing to do; after a failed one all later ones fail, and no write is
    accepted."""
    store = FaultyStore(subject.new())
    layer = subject.open(store, writable=True)
    for _ in range(2):
        syncs = store.sync_count
        layer.flush()
        assert store.sync_count > syncs
    layer.write(0, memoryview(b"x" * sectors_to_bytes(subject.unit)))
    store.faults.append(Fault("sync", sync_failed))
    for _ in range(2):
        with pytest.raises(errors.SyncFailed):
            layer.flush()
        with pytest.raises(errors.SyncFailed):
            layer.write(0, memoryview(b"y" * sectors_to_bytes(subject.unit)))
        with pytest.raises(errors.SyncFailed):
            layer.write_zeroes(0, subject.unit)
        with pytest.raises(errors.SyncFailed):
            layer.trim(0, subject.unit)
    assert store.faults[0].seen == 1, "a second sync would have claimed success"


def check_close(subject: Subject) -> None:
    """Close syncs what was written, and releases the store even if that fails."""

    class Watched(FaultyStore):
        """Counts how often it was closed."""

        closed = 0

        def close(self) -> None:
            """Count."""
            self.closed += 1

    store = Watched(subject.new())
    layer = subject.open(store, writable=True)
    layer.write(0, memoryview(b"x" * sectors_to_bytes(subject.unit)))
    syncs = store.sync_count
    layer.close()
    assert store.sync_count > syncs and store.closed == 1
    failing = Watched(subject.new())
    layer = subject.open(failing, writable=True)
    layer.write(0, memoryview(b"x" * sectors_to_bytes(subject.unit)))
    failing.faults.append(Fault("sync", sync_failed))
    with pytest.raises(errors.SyncFailed):
        layer.close()
    assert failing.closed == 1


def check_large(subject: Subject) -> None:
    """A write longer than several blocks is complete."""
    store = subject.new()
    layer, data = subject.open(store, writable=True), random.Random(5).randbytes(subject.size)
    assert len(data) > MIB
    layer.write(0, memoryview(data))
    assert content_of(layer) == data
    layer.close()
    assert content_of(subject.open(store.copy(frozen=True))) == data


CHECKS = (
    check_shape,
    check_extents,
    check_write_and_read,
    check_zeroes,
    check_trim,
    check_range,
    check_read_only,
    check_flush,
    check_close,
    check_large,
)
