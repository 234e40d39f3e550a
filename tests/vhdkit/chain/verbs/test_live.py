# SPDX-License-Identifier: Apache-2.0
"""Chains that grow while open: the content stays, old leaves do not change, sets are complete or not made."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness.chains import ChainPlan, build, chain_plans, pattern
from tests.harness.killing import killings
from tests.harness.power import LINK
from tests.harness.stores import CrashStore, MemStore, PowerCut
from vhdkit import errors
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.verbs.create import create_child, create_image
from vhdkit.chain.verbs.live import freezing, scratch_child, stack
from vhdkit.chain.verbs.newest import newest_leaf
from vhdkit.disk import Disk, open_disk
from vhdkit.formats.probe import FormatName, open_layer
from vhdkit.formats.vhd.create import create_differencing, create_dynamic
from vhdkit.image import Layer
from vhdkit.store import FileStore
from vhdkit.units import KIB, MIB, SECTOR_SIZE

SIZE = 4 * MIB


def empty_child(size_bytes: int, block_size_bytes: int = 512 * KIB) -> MemStore:
    """A child that owns nothing, named and synced."""
    store = MemStore("child.avhd")
    create_differencing(store, size_bytes, LINK, block_size_bytes=block_size_bytes)
    return store


def content(chain: Chain) -> bytes:
    """The whole disk."""
    return Disk(chain).read(0, chain.size_bytes)


@given(plan=chain_plans(max_children=2), seed=st.integers(0, 1 << 20))
@settings(max_examples=40)
def test_content_stays_and_writes_go_to_the_child(plan: ChainPlan, seed: int) -> None:
    """INV-LIVE-PRESERVES: with a new child the disk reads the same; later writes change only the child."""
    rng = random.Random(seed)
    chain = Chain(build(plan, writable=True))
    sectors = chain.size_bytes // SECTOR_SIZE
    model = bytearray(content(chain))
    for round_number in range(2):
        for tag in range(3):
            first = rng.randrange(sectors)
            count = min(rng.choice([1, 8, 300, 1030]), sectors - first)
            data = pattern(first, count, 1000 + 10 * round_number + tag)
            chain.write(first, memoryview(data))
            model[first * SECTOR_SIZE : first * SECTOR_SIZE + len(data)] = data
        if not round_number:
            old = chain.leaf.store
            assert isinstance(old, MemStore)
            new = open_layer(empty_child(chain.size_bytes), format_name=FormatName.VHD, writable=True)
            chain = stack(chain, new)
            old.frozen = True
            assert content(chain) == model and not chain.layers[1].writable and chain.writable
    assert content(chain) == model


def run_until_cut(parent: CrashStore, child: CrashStore) -> list[set[bytes]]:
    """Write, flush, write more, stack, write, flush until the power is cut; returns what each sector may hold then."""
    sectors = SIZE // SECTOR_SIZE
    allowed: list[set[bytes]] = [{bytes(SECTOR_SIZE)} for _ in range(sectors)]
    try:
        chain = Chain([open_layer(parent, format_name=FormatName.VHD, writable=True)])
        new = open_layer(child, format_name=FormatName.VHD, writable=True)
        for step in range(6):
            if step == 3:
                chain = stack(chain, new)
            first = (step * 700) % (sectors - 40)
            data = pattern(first, 30, step)
            for index in range(30):
                allowed[first + index].add(data[index * SECTOR_SIZE : (index + 1) * SECTOR_SIZE])
            chain.write(first, memoryview(data))
            if step % 2:
                chain.flush()
                for index in range(sectors):
                    now = Disk(chain).read(index * SECTOR_SIZE, SECTOR_SIZE) if len(allowed[index]) > 1 else None
                    if now is not None:
                        allowed[index] = {now}
        chain.close()
    except PowerCut:
        pass
    return allowed


def test_power_cut_anywhere() -> None:
    """INV-LIVE-PRESERVES: a cut at any operation, before, during or after stacking, loses no flushed data."""
    base = MemStore("base.vhd")
    create_dynamic(base, SIZE, block_size_bytes=512 * KIB)
    rng, number, cuts = random.Random(7), 0, 0
    while True:
        number += 1
        parent, child = CrashStore(base), CrashStore(empty_child(SIZE))
        seen = [0]

        def cut(limit: int = number, seen: list[int] = seen, stores: tuple[CrashStore, ...] = (parent, child)) -> None:
            seen[0] += 1
            if seen[0] == limit:
                for store in stores:
                    store.dead = True
                raise PowerCut(f"at {limit}")

        parent.watcher = child.watcher = cut
        allowed = run_until_cut(parent, child)
        if seen[0] < number:
            break
        cuts += 1
        for _ in range(3):
            layers: list[Layer] = [
                open_layer(store.after_cut(rng), format_name=FormatName.VHD) for store in (child, parent)
            ]
            found = content(Chain(layers))
            for index, contents in enumerate(allowed):
                sector = found[index * SECTOR_SIZE : (index + 1) * SECTOR_SIZE]
                assert sector in contents, f"cut {number}: sector {index}"
    assert cuts > 15


def test_failing_flush_leaves_the_old_leaf() -> None:
    """If the old leaf cannot be flushed, no new chain is made, and the old one is unchanged."""

    class Full(MemStore):
        failing = False

        def sync(self) -> None:
            if self.failing:
                raise errors.NoSpace("full")

    store = Full("base.vhd")
    create_dynamic(store, SIZE)
    chain = Chain([open_layer(store, format_name=FormatName.VHD, writable=True)])
    chain.write(5, memoryview(pattern(5, 3, 1)))
    before = content(chain)
    store.failing = True
    new = open_layer(empty_child(SIZE), format_name=FormatName.VHD, writable=True)
    with pytest.raises(errors.NoSpace):
        stack(chain, new)
    store.failing = False
    chain.write(90, memoryview(pattern(90, 1, 2)))
    chain.close()
    again = content(Chain([open_layer(store, format_name=FormatName.VHD)]))
    assert again[: 9 * SECTOR_SIZE] == before[: 9 * SECTOR_SIZE] and again[90 * SECTOR_SIZE :][:8] != bytes(8)


def test_depth_is_limited() -> None:
    """A chain that already has the maximum number of layers refuses another one, and stays in use."""
    layers: list[Layer] = [open_layer(empty_child(SIZE), format_name=FormatName.VHD) for _ in range(254)]
    with pytest.raises(errors.InvalidArgument, match="would have 255 layers"):
        stack(Chain(layers), open_layer(empty_child(SIZE), format_name=FormatName.VHD, writable=True))


# -- files --------------------------------------------------------------------------------------------------------


def make(folder: Path, *names: str) -> list[Disk]:
    """Open disks with distinct data, some of it not flushed."""
    disks = []
    for name in names:
        create_image(folder / name, SIZE, disk_format="vhdx" if name.endswith("x") else "dynamic")
        disk = open_disk(folder / name, writable=True)
        disk.write(0, name.encode() * 100)
        disk.flush()
        disk.write(MIB, name.encode() * 50)
        disks.append(disk)
    return disks


def names(folder: Path) -> list[str]:
    """Every name in the folder, hidden files included."""
    return sorted(path.name for path in folder.iterdir())


def test_a_set_is_frozen_without_ever_releasing_its_locks(tmp_path: Path) -> None:
    """The children take the writes; other writers are refused throughout; readers of old leaves are admitted later."""
    disks = make(tmp_path, "a.vhd", "b.vhd")
    before = [disk.read(0, SIZE) for disk in disks]
    with freezing([(disks[0].chain, None), (disks[1].chain, str(tmp_path / "other.avhd"))]) as prepared:
        assert prepared.plan.paths == (str(tmp_path / "a.avhd"), str(tmp_path / "other.avhd"))
        new = [Disk(chain) for chain in prepared.freeze()]
        with pytest.raises(errors.ImageInUse):
            open_disk(tmp_path / "a.vhd")
        prepared.done()
    with pytest.raises(errors.ImageInUse):
        open_disk(tmp_path / "a.avhd")
    with FileStore.open(tmp_path / "a.vhd", writable=True) as store, pytest.raises(errors.ImageInUse):
        store.lock(writer=True)
    for disk, old in zip(new, before, strict=True):
        assert disk.read(0, SIZE) == old
        disk.write(0, b"new")
        disk.close()
    with open_disk(tmp_path / "a.vhd") as frozen, open_disk(tmp_path / "a.avhd") as leaf:
        assert frozen.read(0, SIZE) == before[0] and leaf.read(0, 3) == b"new"


def test_leaving_early_undoes_everything(tmp_path: Path) -> None:
    """An error before the new chains are taken removes all children, and the old leaves stay in use."""
    disks = make(tmp_path, "a.vhd", "b.vhd")
    with pytest.raises(RuntimeError), freezing([(disk.chain, None) for disk in disks]) as prepared:
        prepared.freeze()
        raise RuntimeError
    assert names(tmp_path) == ["a.vhd", "b.vhd"]
    for disk in disks:
        disk.write(2 * MIB, b"goes on")
        disk.close()
    with open_disk(tmp_path / "b.vhd") as disk:
        assert disk.read(2 * MIB, 7) == b"goes on"


def test_refusals_make_no_file(tmp_path: Path) -> None:
    """A taken name, a missing folder, a disk that is open read-only: no child of the set is made."""
    disks = make(tmp_path, "a.vhd", "b.vhd")
    (tmp_path / "taken.avhd").write_text("x")
    before = names(tmp_path)
    for path, kind in (("taken.avhd", errors.AlreadyExists), ("no/such.avhd", errors.NotFound)):
        with pytest.raises(kind), freezing([(disks[0].chain, None), (disks[1].chain, str(tmp_path / path))]):
            pass
    twice = [(disks[0].chain, None), (disks[0].chain, None)]
    with pytest.raises(errors.InvalidArgument, match="twice"), freezing(twice):
        pass
    disks[1].close()
    with open_disk(tmp_path / "b.vhd") as reader:
        one_reads = [(disks[0].chain, None), (reader.chain, None)]
        with pytest.raises(errors.ReadOnly), freezing(one_reads):
            pass
    assert names(tmp_path) == before
    disks[0].close()


@pytest.mark.parametrize("x", ["", pytest.param("x", marks=pytest.mark.nightly)])
def test_killed_at_any_call_the_newest_leaf_is_complete(tmp_path: Path, x: str) -> None:
    """INV-SET-HARMLESS: killed at any step, the newest leaf of each disk opens and holds everything flushed."""
    pristine = tmp_path / "pristine"
    pristine.mkdir()
    bases = (f"a.vhd{x}", f"b.vhd{x}")
    for disk in make(pristine, *bases):
        disk.close()
    work_folder = tmp_path / "work"

    def work() -> None:
        disks = [open_disk(work_folder / name, writable=True) for name in bases]
        for disk in disks:
            disk.write(3 * MIB, b"flushed")
            disk.flush()
            disk.write(3 * MIB + SECTOR_SIZE, b"perhaps")
        with freezing([(disk.chain, None) for disk in disks]) as prepared:
            new = [Disk(chain) for chain in prepared.freeze()]
            prepared.done()
        for disk in new:
            disk.write(0, b"later", fua=True)
            disk.close()

    shutil.copytree(pristine, work_folder)
    seen = set()
    for number in killings(work, step=3):
        for name in bases:
            leaf = newest_leaf(work_folder / name, OpenOptions())
            seen.add(Path(leaf).name)
            with open_disk(leaf, writable=True) as disk:
                assert disk.read(0, 5) in (name.encode()[:5], b"later")
                assert disk.read(MIB, 5) == name.encode()[:5]
                if Path(leaf).suffix.startswith(".a") or number < 0:
                    assert disk.read(3 * MIB, 7) == b"flushed"
        shutil.rmtree(work_folder)
        shutil.copytree(pristine, work_folder)
    assert seen == {*bases, f"a.avhd{x}", f"b.avhd{x}"}


def test_what_is_only_dropped_removes_nothing(tmp_path: Path) -> None:
    """INV-FORK-APART: a forked process that ends, and with it its copy of a prepared snapshot, leaves the children."""
    disks = make(tmp_path, "a.vhd")
    with contextlib.ExitStack() as held:
        prepared = held.enter_context(freezing([(disks[0].chain, None)]))
        pid = os.fork()
        if pid == 0:
            try:
                held.pop_all()
                del held
                gc.collect()
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert names(tmp_path) == ["a.avhd", "a.vhd"]
        [chain] = prepared.freeze()
        prepared.done()
    chain.close()
    assert names(tmp_path) == ["a.avhd", "a.vhd"]


@pytest.mark.parametrize(("disk_format", "sector_bytes"), [("dynamic", 512), ("vhdx", 512), ("vhdx", 4096)])
def test_scratch_child(tmp_path: Path, disk_format: str, sector_bytes: int) -> None:
    """A child without a name takes the writes and leaves no trace, neither in a file nor in a folder."""
    create_image(tmp_path / "a.vhd", SIZE, disk_format=disk_format, sector_bytes=sector_bytes)
    before = (tmp_path / "a.vhd").read_bytes()
    with Disk(scratch_child(open_disk(tmp_path / "a.vhd").chain, str(tmp_path))) as disk:
        disk.write(77, b"gone soon")
        disk.flush()
        assert disk.read(77, 9) == b"gone soon" and names(tmp_path) == ["a.vhd"]
    assert (tmp_path / "a.vhd").read_bytes() == before
    with open_disk(tmp_path / "a.vhd") as plain, pytest.raises(errors.NotFound):
        scratch_child(plain.chain, str(tmp_path / "nowhere"))


def test_newest_leaf(tmp_path: Path) -> None:
    """Single children are followed to the end, from raw bases too; at a fork both are named."""
    options = OpenOptions(allow_raw_parent=True)
    (tmp_path / "base.raw").write_bytes(bytes(SIZE))
    assert newest_leaf(tmp_path / "base.raw", options) == str(tmp_path / "base.raw")
    create_child(tmp_path / "one.avhd", tmp_path / "base.raw", options=options)
    create_child(tmp_path / "two.avhd", tmp_path / "one.avhd", options=options)
    assert newest_leaf(tmp_path / "base.raw", options) == str(tmp_path / "two.avhd")
    create_child(tmp_path / "three.avhd", tmp_path / "one.avhd", options=options)
    with pytest.raises(errors.HasChildren, match=r"three\.avhd and .*two\.avhd"):
        newest_leaf(tmp_path / "base.raw", options)
    with pytest.raises(errors.NotFound):
        newest_leaf(tmp_path / "gone.vhd", options)
