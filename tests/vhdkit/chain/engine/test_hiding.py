# SPDX-License-Identifier: Apache-2.0
"""Zeros that hide nothing take no space in a child, and stay zeros whatever happens to the chain."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vhdkit
from tests.harness.chains import ChainPlan, build, chain_plans, clear_bits, pattern
from tests.harness.model import SectorModel, walk_read
from tests.harness.power import DISK_SIZE, LINK, PowerRun, Scene, open_mem
from tests.harness.stores import MemStore
from tests.support import daily_or_nightly
from vhdkit import DiskFormat, errors
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.verbs.live_merge import live_merge
from vhdkit.disk import Disk
from vhdkit.formats.probe import FormatName, open_layer
from vhdkit.formats.raw import create_raw
from vhdkit.formats.vhd.create import create_differencing, create_dynamic
from vhdkit.units import GIB, KIB, MIB, PAGE_SIZE, SECTOR_SIZE, round_up

SIZE = 4 * MIB + 3 * SECTOR_SIZE
SECTORS = SIZE // SECTOR_SIZE
BLOCK = 512 * KIB
PER_BLOCK = BLOCK // SECTOR_SIZE
RAW = OpenOptions(allow_raw_parent=True)


@pytest.mark.parametrize("disk_format", [DiskFormat.DYNAMIC, DiskFormat.VHDX])
def test_gigabytes_of_zeros_take_no_space(tmp_path: Path, disk_format: DiskFormat) -> None:
    """Over an empty parent a whole disk of zeros leaves the child's file unchanged, and reads as zeros."""
    vhdkit.create_image(tmp_path / "base.vhd", 6 * GIB, disk_format=disk_format)
    child = tmp_path / "child.avhd"
    vhdkit.create_child(child, tmp_path / "base.vhd")
    before = child.stat().st_size
    with vhdkit.open_disk(child, writable=True) as disk:
        disk.write_zeroes(0, 6 * GIB)
        assert disk.read(3 * GIB, KIB) == bytes(KIB)
    assert child.stat().st_size == before < (64 * KIB if disk_format is DiskFormat.DYNAMIC else 5 * MIB)


def chain_over(base: MemStore, *, middle: MemStore | None = None) -> Chain:
    """An empty leaf over `middle`, if any, over `base`."""
    leaf = MemStore("leaf.avhd")
    create_differencing(leaf, SIZE // BLOCK * BLOCK, LINK, block_size_bytes=BLOCK)
    below = [store for store in (middle, base) if store is not None]
    as_raw = {True: FormatName.RAW, False: None}
    return Chain(
        [
            open_layer(leaf, writable=True),
            *[open_layer(store, format_name=as_raw[store.name.endswith(".img")]) for store in below],
        ]
    )


def test_a_raw_parent_is_always_hidden() -> None:
    """Any program may write to a raw parent or extend it: the child owns zeros over its holes and behind its end."""
    base = MemStore("base.img")
    create_raw(base, BLOCK)
    chain = chain_over(base)
    chain.write_zeroes(0, 3 * PER_BLOCK)
    assert chain.leaf.allocated_blocks().tolist()[:4] == [True, True, True, False]


def test_bytes_under_clear_bits_are_hidden() -> None:
    """Readers disagree about such bytes of a dynamic disk, so the child owns its zeros there."""
    base = MemStore("base.vhd")
    create_dynamic(base, SIZE // BLOCK * BLOCK, block_size_bytes=BLOCK)
    layer = open_layer(base, writable=True)
    layer.write(PER_BLOCK, memoryview(pattern(PER_BLOCK, 8, 1)))
    layer.close()
    clear_bits(base, PER_BLOCK, 8)
    chain = chain_over(base)
    chain.write_zeroes(0, 3 * PER_BLOCK)
    assert chain.leaf.allocated_blocks().tolist()[:4] == [False, True, False, False]


def test_data_behind_the_end_of_a_smaller_layer_is_hidden() -> None:
    """Data that is hidden only by the size of a layer would become visible if the layer grew."""
    base, middle = MemStore("base.vhd"), MemStore("middle.avhd")
    create_dynamic(base, SIZE // BLOCK * BLOCK, block_size_bytes=BLOCK)
    layer = open_layer(base, writable=True)
    layer.write(2 * PER_BLOCK, memoryview(pattern(0, 1, 1)))
    layer.close()
    create_differencing(middle, BLOCK, LINK, block_size_bytes=BLOCK)
    chain = chain_over(base, middle=middle)
    chain.write_zeroes(0, 4 * PER_BLOCK)
    assert chain.leaf.allocated_blocks().tolist()[:5] == [False, False, True, False, False]


def test_zeros_of_a_parent_need_no_hiding() -> None:
    """Over blocks that a parent owns as holes zeros take no space either; over the data beside them they do."""
    base, middle = MemStore("base.vhd"), MemStore("middle.avhd")
    create_dynamic(base, SIZE // BLOCK * BLOCK, block_size_bytes=BLOCK)
    create_differencing(middle, SIZE // BLOCK * BLOCK, LINK, block_size_bytes=BLOCK)
    layer = open_layer(middle, writable=True)
    layer.write(0, memoryview(pattern(0, 8, 1)))
    layer.write_zeroes(8, PER_BLOCK - 8)
    layer.close()
    chain = chain_over(base, middle=middle)
    chain.write_zeroes(8, 2 * PER_BLOCK)
    assert not chain.leaf.allocated_blocks().any()
    chain.write_zeroes(7, 8)
    assert chain.leaf.allocated_blocks().tolist()[:2] == [True, False]


@given(plan=chain_plans(min_children=1, max_children=4), seed=st.integers(0, 1 << 30))
@settings(max_examples=40, deadline=None)
def test_zeros_are_read_over_any_chain(plan: ChainPlan, seed: int) -> None:
    """INV-SECTOR-RULE: over any chain zeros read as zeros and the rest reads as before, by the map and by a walk."""
    rng = random.Random(seed)
    chain = Chain(build(plan, writable=True))
    count = chain.size_bytes // SECTOR_SIZE
    before = bytearray(chain.size_bytes)
    chain.read_into(0, memoryview(before))
    for _ in range(3):
        first = rng.randrange(count)
        size = min(rng.choice([1, 8, 1024, count]), count - first)
        chain.write_zeroes(first, size)
        before[first * SECTOR_SIZE : (first + size) * SECTOR_SIZE] = bytes(size * SECTOR_SIZE)
    after = bytearray(chain.size_bytes)
    chain.read_into(0, memoryview(after))
    assert after == before
    for index in rng.sample(range(count), min(count, 40)):
        assert walk_read(chain.layers, index) == before[index * SECTOR_SIZE : (index + 1) * SECTOR_SIZE]


def holes_scene(rng: random.Random) -> Scene:
    """An empty leaf over a layer that owns holes and data, over a base with data in some blocks."""
    base, middle, leaf = MemStore("base.vhd"), MemStore("middle.avhd"), MemStore("leaf.avhd")
    content = bytearray(DISK_SIZE)
    create_dynamic(base, DISK_SIZE, block_size_bytes=BLOCK)
    create_differencing(middle, DISK_SIZE, LINK, block_size_bytes=BLOCK)
    create_differencing(leaf, DISK_SIZE, LINK, block_size_bytes=BLOCK)
    with open_mem(base, writable=True) as disk:
        content[:BLOCK] = rng.randbytes(BLOCK)
        disk.write(0, content[:BLOCK])
    below = open_layer(base.copy(frozen=True))
    with open_mem(middle, [below], writable=True) as disk:
        disk.write_zeroes(BLOCK // 2, BLOCK)
        content[BLOCK // 2 : BLOCK] = bytes(BLOCK // 2)
        content[2 * BLOCK : 2 * BLOCK + 9000] = rng.randbytes(9000)
        disk.write(2 * BLOCK, content[2 * BLOCK : 2 * BLOCK + 9000])
    return Scene(leaf, [open_layer(middle.copy(frozen=True)), below], bytes(content))


@pytest.mark.parametrize("seed", range(daily_or_nightly(1, 20)))
def test_inv_flushed_or_newer_with_zeros_that_take_no_space(seed: int) -> None:
    """INV-FLUSHED-OR-NEWER: cut anywhere among zeros and data, flushed zeros are zeros, with or without a block."""
    rng = random.Random(f"zeros {seed}")

    def script(disk: Disk, model: SectorModel) -> None:
        model.write(BLOCK, bytes(BLOCK))
        disk.write_zeroes(BLOCK, BLOCK, fua=True)
        model.flushed_range(BLOCK, BLOCK)
        assert not disk.chain.leaf.allocated_blocks().any(), "the zeros took space"
        for _ in range(12):
            offset = rng.choice([rng.randrange(DISK_SIZE), rng.randrange(DISK_SIZE) // BLOCK * BLOCK, BLOCK // 2])
            size = min(rng.choice([SECTOR_SIZE, 5000, BLOCK // 2, BLOCK, 2 * BLOCK]), DISK_SIZE - offset)
            fua = rng.random() < 0.3
            if rng.random() < 0.6:
                model.write(offset, bytes(size))
                disk.write_zeroes(offset, size, fua=fua)
            else:
                size = min(size, 6000)
                data = rng.randbytes(size)
                model.write(offset, data)
                disk.write(offset, data, fua=fua)
            if fua:
                model.flushed_range(offset, size)
            elif rng.random() < 0.3:
                disk.flush()
                model.flushed()

    PowerRun(holes_scene(rng), seed, cuts=1, script=script).run()


# -- what becomes of such zeros ---------------------------------------------------------------------------------


def make_chain(folder: Path, base: str, rng: random.Random, sizes: list[int]) -> tuple[list[Path], bytearray]:
    """Make a leaf, two layers and a base of these sizes, with data and zeros; return the leaf's content, too."""
    paths = [folder / f"{number}.avhd" for number in range(3)]
    paths.append(folder / ("base.img" if base == "raw" else "base.vhd"))
    model, block = bytearray(), MIB if base == "vhdx" else BLOCK
    for number in reversed(range(4)):
        size = sizes[number]
        if number == 3:
            vhdkit.create_image(paths[3], size, disk_format=DiskFormat(base), block_size_bytes=block)
        else:
            vhdkit.create_child(paths[number], paths[number + 1], size_bytes=size, block_size_bytes=block, options=RAW)
        model = model[:size] + bytearray(max(size - len(model), 0))
        with vhdkit.open_disk(paths[number], writable=True, options=RAW) as disk:
            change(disk, model, rng, 4)
    return paths, model


def change(disk: Disk, model: bytearray, rng: random.Random, count: int) -> None:
    """Write data and zeros at random to the disk and to the model."""
    for _ in range(count):
        offset = rng.choice([rng.randrange(len(model)), rng.randrange(len(model)) // BLOCK * BLOCK])
        size = min(rng.choice([SECTOR_SIZE, 5000, BLOCK, 3 * BLOCK]), len(model) - offset)
        if rng.random() < 0.7:
            disk.write_zeroes(offset, size)
            model[offset : offset + size] = bytes(size)
        else:
            data = rng.randbytes(size)
            disk.write(offset, data)
            model[offset : offset + size] = data


def merge_live(leaf: Path, model: bytearray, rng: random.Random) -> None:
    """Merge layers below the leaf while it is written to."""
    disk = Disk(Chain.open(leaf, writable=True, options=RAW))
    with live_merge(disk.chain, 1, rng.choice([2, 3]), RAW) as merging:
        merging.copy(lambda done, total: change(disk, model, rng, 1))
        disk = Disk(merging.exchange()[0])
        change(disk, model, rng, 3)
        assert disk.read(0, len(model)) == model
        merging.done()
    disk.close()


def content(path: Path) -> bytes:
    """The whole disk."""
    with vhdkit.open_disk(path, options=RAW) as disk:
        return disk.read(0, disk.size_bytes)


@given(
    base=st.sampled_from(["dynamic", "fixed", "raw", "vhdx"]),
    then=st.sampled_from(["all", "into the base", "middle", "live", "rebase", "compact"]),
    seed=st.integers(0, 1 << 30),
)
@settings(max_examples=daily_or_nightly(14, 36), deadline=None)
def test_zeros_stay(base: str, then: str, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """INV-MERGE-PRESERVES, INV-COMPACT-PRESERVES: whatever is merged (also while the disk is written), compacted or
    rebased, the disk reads as the model says, and takes more zeros."""
    rng = random.Random(seed)
    size = round_up(SIZE, PAGE_SIZE) if base == "vhdx" else SIZE
    smaller = [size if then == "live" else rng.choice([size, 2 * BLOCK, 5 * BLOCK]) for _ in range(3)]
    sizes = [size, *sorted(smaller, reverse=True)]
    paths, model = make_chain(tmp_path_factory.mktemp("zeros"), base, rng, sizes)
    leaf = paths[0]
    if then == "live":
        merge_live(leaf, model, rng)
    elif then == "rebase":
        copy = paths[1].with_name("copy.vhd")
        vhdkit.convert(paths[1], copy, DiskFormat.VHDX if base == "vhdx" else DiskFormat.DYNAMIC, options=RAW)
        vhdkit.rebase(leaf, copy, unsafe_new_id=True, options=RAW)
    elif then == "compact":
        vhdkit.compact(leaf, options=RAW)
    elif then == "middle":
        vhdkit.merge(paths[1], into=paths[2], relink_children=True, options=RAW)
    else:
        target = paths[1] if then == "all" else paths[3]
        vhdkit.merge(leaf, into=target, options=RAW)
        leaf = target
    assert content(leaf) == model
    with vhdkit.open_disk(leaf, writable=True, options=RAW) as disk:
        change(disk, model, rng, 2)
    assert content(leaf) == model


@pytest.mark.parametrize("disk_format", [DiskFormat.DYNAMIC, DiskFormat.VHDX])
def test_another_parent_with_data_is_refused(tmp_path: Path, disk_format: DiskFormat) -> None:
    """INV-PARENT-ID: where zeros were written that the child does not own, a parent with data is another disk."""
    for name in ("base.vhd", "other.vhd"):
        vhdkit.create_image(tmp_path / name, 4 * MIB, disk_format=disk_format)
    child = tmp_path / "child.avhd"
    vhdkit.create_child(child, tmp_path / "base.vhd")
    with vhdkit.open_disk(child, writable=True) as disk:
        disk.write_zeroes(0, 4 * MIB)
    with vhdkit.open_disk(tmp_path / "other.vhd", writable=True) as disk:
        disk.write(2 * MIB, b"data")
    with pytest.raises(errors.ParentMismatch, match="would read differently"):
        vhdkit.rebase(child, tmp_path / "other.vhd", unsafe_new_id=True)
    assert content(child) == bytes(4 * MIB)
