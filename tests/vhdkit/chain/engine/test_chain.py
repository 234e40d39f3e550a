# SPDX-License-Identifier: Apache-2.0
"""A chain writes only to its leaf, and opens its parents read-only."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness.chains import ChainPlan, build, chain_plans
from tests.harness.model import ParsedVhd, SectorModel
from tests.harness.power import BLOCK_SIZE, child_scene, open_mem, work
from tests.harness.reading import recorded
from tests.harness.stores import MemStore
from tests.support import daily_or_nightly
from vhdkit import errors
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.names import opening
from vhdkit.chain.verbs.create import create_child, create_image
from vhdkit.disk import Disk, open_disk
from vhdkit.image import ExtentKind
from vhdkit.store import FileStore
from vhdkit.units import KIB, MIB, SECTOR_SIZE, sectors_to_bytes, whole_sectors


@settings(max_examples=daily_or_nightly(30, 60))
@given(plan=chain_plans(min_children=1), seed=st.integers(0, 999))
def test_only_the_leaf_changes(plan: ChainPlan, seed: int) -> None:
    """INV-LEAF-ONLY-WRITES: whatever is done to a disk, the parents' files keep their bytes (a write to one of them
    fails at once: they are frozen), and only the leaf has changed."""
    layers, rng = build(plan, writable=True), random.Random(seed)
    stores = [layer.store for layer in layers]
    assert all(isinstance(store, MemStore) and store.frozen for store in stores[1:])
    before = [dict(store._sectors) for store in stores if isinstance(store, MemStore)]
    disk = Disk(Chain(layers))
    model = SectorModel(disk.read(0, disk.size_bytes))
    if disk.size_bytes < 2 * MIB:  # `work` needs some room
        disk.write(0, b"x")
    else:
        for _ in range(8):
            work(disk, model, rng)
        assert disk.read(0, disk.size_bytes) == model.current
        disk.write(disk.size_bytes - 1, b"x")
    disk.close()
    after = [store._sectors for store in stores if isinstance(store, MemStore)]
    assert after[1:] == before[1:] and after[0] != before[0]
    assert not ParsedVhd.parse(stores[0]).overlaps(), "INV-BLOCKS-DISJOINT"


@settings(max_examples=daily_or_nightly(20, 200))
@given(plan=chain_plans(), data=st.data())
def test_a_read_touches_only_what_was_prefetched(plan: ChainPlan, data: st.DataObject) -> None:
    """Once `prefetch` knows where all of a range lies, a read of it reads nothing but what was prefetched; before
    that, `settle` reads nothing but what was prefetched. `prefetch` itself reads nothing."""
    with recorded(MemStore) as (read, prefetched):
        chain = Chain(build(plan))
        count = whole_sectors(chain.size_bytes)
        for _ in range(3):
            first = data.draw(st.integers(0, count - 1))
            size = data.draw(st.one_of(st.integers(1, 16), st.integers(1, count)))
            size = min(size, count - first)
            read.clear()
            prefetched.clear()
            if not chain.prefetch(first, size):
                assert not read and not chain.try_read_into(first, memoryview(bytearray(sectors_to_bytes(size))))
                read.clear()
                chain.settle(first, size)
                assert prefetched.covers(read)
                read.clear()
                assert chain.prefetch(first, size)
            assert not read
            buffer = memoryview(bytearray(sectors_to_bytes(size)))
            chain.read_into(first, buffer)
            assert prefetched.covers(read)
            again = memoryview(bytearray(sectors_to_bytes(size)))
            assert chain.try_read_into(first, again) and again == buffer


@pytest.mark.parametrize("suffix", ["vhd", "vhdx"])
@pytest.mark.parametrize("table_bytes", [opening.MAX_TABLE_BYTES, 0], ids=["tables in memory", "tables in files"])
def test_prefetch_finds_data_in_chains_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, table_bytes: int
) -> None:
    """Whatever the format, and also where the tables stay in the files, a prefetched range is read from what was asked
    for, except for the tables."""
    base, child = tmp_path / f"base.{suffix}", tmp_path / f"child.a{suffix}"
    create_image(base, 32 * MIB, block_size_bytes=2 * MIB)
    with open_disk(base, writable=True) as disk:
        disk.write(MIB, b"base" * MIB)
    create_child(child, base)
    with open_disk(child, writable=True) as disk:
        disk.write(3 * MIB, b"leaf" * 1024)
        disk.write(9 * MIB, b"leaf" * 1024)
    monkeypatch.setattr(opening, "MAX_TABLE_BYTES", table_bytes)
    with recorded(FileStore) as (read, prefetched), open_disk(child) as disk:
        prefetched.clear()
        assert not disk.prefetch(2 * MIB, 2 * MIB + 100), "its bits were already read"
        assert prefetched
        read.clear()
        disk.settle(2 * MIB, 2 * MIB + 100)
        assert table_bytes == 0 or prefetched.covers(read)
        assert disk.prefetch(2 * MIB, 2 * MIB + 100)
        read.clear()
        assert disk.read(3 * MIB - 8, 4104) == b"base" * 2 + b"leaf" * 1024
        assert prefetched.covers(read)
        assert disk.prefetch(20 * MIB, MIB) and disk.prefetch(0, 0) and disk.prefetch(32 * MIB, 0)
        with pytest.raises(errors.OutOfRange):
            disk.prefetch(32 * MIB - 1, 2)
        with pytest.raises(errors.OutOfRange):
            disk.settle(-1, 2)


def make_chain(folder: Path) -> list[Path]:
    """Three real files, leaf first."""
    paths = [folder / "leaf.avhd", folder / "middle.avhd", folder / "base.vhd"]
    create_image(paths[2], 4 * MIB, block_size_bytes=512 * KIB)
    with open_disk(paths[2], writable=True) as disk:
        disk.write(MIB, b"base" * 1000)
    create_child(paths[1], paths[2])
    with open_disk(paths[1], writable=True) as disk:
        disk.write(MIB + 1000, b"middle" * 100)
    create_child(paths[0], paths[1])
    return paths


def test_parents_are_opened_read_only(tmp_path: Path) -> None:
    """INV-PARENT-READ-ONLY: under a writable leaf the parents' descriptors cannot write, whatever the engine does."""
    paths = make_chain(tmp_path)
    before = [path.read_bytes() for path in paths]
    with open_disk(paths[0], writable=True) as disk:
        assert [layer.writable for layer in disk.chain.layers] == [True, False, False]
        for layer in disk.chain.layers[1:]:
            assert isinstance(layer.store, FileStore)
            with pytest.raises(errors.IoFailed):
                layer.store.pwrite(0, b"x")
            with pytest.raises(OSError, match="descriptor"):
                os.pwrite(layer.store.fileno(), b"x", 0)
        disk.write(0, b"leaf" * (MIB // 2))
        disk.write_zeroes(MIB, 2000)
        disk.trim(0, MIB)
    assert [path.read_bytes() for path in paths[1:]] == before[1:]


@pytest.mark.parametrize("parent", [1, 2])
def test_an_image_with_children_is_not_opened_for_writing(tmp_path: Path, parent: int) -> None:
    """INV-PARENT-READ-ONLY: a writable open of a parent is refused and names the child; a read-only open works."""
    paths = make_chain(tmp_path)
    before = paths[parent].read_bytes()
    with pytest.raises(errors.HasChildren, match=paths[parent - 1].name):
        open_disk(paths[parent], writable=True)
    with open_disk(paths[parent]) as disk:
        assert disk.read(MIB, 4) == b"base"
    assert paths[parent].read_bytes() == before


def test_a_writable_parent_in_a_chain_is_an_assertion(tmp_path: Path) -> None:
    """INV-PARENT-READ-ONLY: a chain asserts that no layer below the leaf is writable."""
    create_image(tmp_path / "base.vhd", MIB)
    create_child(tmp_path / "leaf.avhd", tmp_path / "base.vhd")
    with open_disk(tmp_path / "leaf.avhd") as leaf, pytest.raises(AssertionError):
        open_layers = [leaf.chain.leaf, type("Writable", (), {"writable": True})()]
        Chain(open_layers)


def test_holes_are_found_sector_by_sector() -> None:
    """With `find_holes` owned sectors that are holes in their file are ZERO of their layer, the others DATA."""
    scene = child_scene(1, writes=0)
    with open_mem(scene.leaf, scene.parents, writable=True) as disk:
        disk.write(10 * SECTOR_SIZE, b"x" * 4 * SECTOR_SIZE)
        disk.write_zeroes(12 * SECTOR_SIZE, 4 * SECTOR_SIZE)
        runs = [(run.sector_count, run.kind, run.layer_index) for run in disk.extents(0, BLOCK_SIZE, find_holes=True)]
        rest = whole_sectors(BLOCK_SIZE) - 16
        data, zero = ExtentKind.DATA, ExtentKind.ZERO
        assert runs == [(10, data, 1), (2, data, 0), (4, zero, 0), (rest, data, 1)]
        plain = [(run.sector_count, run.kind, run.layer_index) for run in disk.extents(0, BLOCK_SIZE)]
        assert plain == [(10, data, 1), (6, data, 0), (rest, data, 1)]
