# SPDX-License-Identifier: Apache-2.0
"""Merging under an open chain: reads stay the same, writes are kept, and a crash at any point leaves a chain."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vhdkit
from tests.harness.chains import pattern
from tests.harness.killing import CHANGING, killings
from tests.harness.merging import unaligned
from tests.harness.stores import MemStore
from tests.support import daily_or_nightly
from vhdkit import DiskFormat, errors, formats
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.records.intent import KIND, Phase
from vhdkit.chain.verbs.live import freezing
from vhdkit.chain.verbs.live_merge import live_merge
from vhdkit.chain.verbs.merge_steps import RealNames
from vhdkit.disk import Disk
from vhdkit.folder import sidecar_path
from vhdkit.image import Layer
from vhdkit.store import Store
from vhdkit.units import KIB, MIB, SECTOR_SIZE

SIZE = 4 * MIB
SECTORS = SIZE // SECTOR_SIZE
BLOCK = 512 * KIB


def write_some(chain: Chain, model: bytearray, rng: random.Random, count: int) -> None:
    """Write data, zeros and trims at random to the leaf and to the model."""
    for _ in range(count):
        first = rng.choice([rng.randrange(SECTORS), rng.randrange(SECTORS // 1024) * 1024])
        size = min(rng.choice([1, 8, 31, 300, 1024, 1500]), SECTORS - first)
        start, end = first * SECTOR_SIZE, (first + size) * SECTOR_SIZE
        if rng.random() < 0.2:
            chain.write_zeroes(first, size)
            model[start:end] = bytes(end - start)
        else:
            data = pattern(first, size, rng.randrange(1 << 16))
            chain.write(first, memoryview(data))
            model[start:end] = data


def make_chain(folder: Path, depth: int, base: str, rng: random.Random) -> tuple[list[Path], bytearray]:
    """Make images, leaf first, with random content and some unaligned blocks; return them and the content."""
    child, of_base = {"vhdx": ("avhdx", "vhdx"), "raw": ("avhd", "img")}.get(base, ("avhd", "vhd"))
    paths = [folder / f"{number}.{child}" for number in range(depth - 1)]
    paths.append(folder / f"base.{of_base}")
    block = MIB if base == "vhdx" else BLOCK
    model = bytearray(SIZE)
    options = OpenOptions(allow_raw_parent=True)
    for number in reversed(range(depth)):
        if number < depth - 1:
            vhdkit.create_child(paths[number], paths[number + 1], block_size_bytes=block, options=options)
        elif base == "vhdx":
            vhdkit.create_image(paths[number], SIZE, disk_format=DiskFormat.VHDX, block_size_bytes=block)
        elif base == "dynamic":
            vhdkit.create_image(paths[number], SIZE, disk_format=DiskFormat.DYNAMIC, block_size_bytes=BLOCK)
        else:
            vhdkit.create_image(paths[number], SIZE, disk_format=DiskFormat(base))
        chain = Chain.open(paths[number], writable=True, options=options)
        write_some(chain, model, rng, rng.randrange(5))
        chain.close()
        has_table = base != "vhdx" and (number < depth - 1 or base == "dynamic")
        if has_table and paths[number].stat().st_size > BLOCK and rng.random() < 0.4:
            store = MemStore(str(paths[number]))
            store.pwrite(0, paths[number].read_bytes())
            moved = unaligned(store)
            paths[number].write_bytes(moved.pread(0, moved.size()))
    return paths, model


def content(chain: Chain) -> bytes:
    """The whole disk."""
    return Disk(chain).read(0, SIZE)


def disk_as_opened_now(path: Path) -> bytes:
    """The whole disk as a new reader sees it."""
    with vhdkit.open_disk(path, options=OpenOptions(allow_raw_parent=True, lock=False)) as disk:
        return disk.read(0, SIZE)


@given(
    depth=st.integers(3, 6), base=st.sampled_from(["dynamic", "fixed", "raw", "vhdx"]), seed=st.integers(0, 1 << 30)
)
@settings(max_examples=daily_or_nightly(20, 60), deadline=None)
def test_reads_and_writes_go_on(depth: int, base: str, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """INV-MERGE-PRESERVES: while layers below the leaf are merged, the disk reads and takes writes as before, the
    layers below the target are not changed, and the sources are removed at the end."""
    folder = tmp_path_factory.mktemp("live")
    rng = random.Random(seed)
    paths, model = make_chain(folder, depth, base, rng)
    target = rng.randrange(2, depth)
    first = rng.randrange(1, target)
    below = {path: path.read_bytes() for path in paths[target + 1 :]}
    options = OpenOptions(allow_raw_parent=True)
    chain = Chain.open(paths[0], writable=True, options=options)

    def meanwhile(done: int, total: int) -> None:
        assert 0 < done <= total
        place = rng.randrange(SECTORS - 64)
        buffer = bytearray(64 * SECTOR_SIZE)
        chain.read_into(place, memoryview(buffer))
        assert buffer == model[place * SECTOR_SIZE :][: len(buffer)]
        write_some(chain, model, rng, 1)
        if rng.random() < 0.3:
            chain.flush()

    with live_merge(chain, first, target, options) as merging:
        merging.copy(meanwhile)
        assert content(chain) == model
        new, problem = merging.exchange()
        assert problem is None
        write_some(new, model, rng, 2)
        merging.done()
    assert content(new) == model
    write_some(new, model, rng, 2)
    new.close()
    kept = [*paths[:first], *paths[target:]]
    assert sorted(os.listdir(folder)) == sorted(path.name for path in kept)
    assert {path: path.read_bytes() for path in below} == below
    assert disk_as_opened_now(paths[0]) == model
    assert [one for one in vhdkit.check(paths[0], options=options) if one.severity is vhdkit.Severity.ERROR] == []


@given(base=st.sampled_from(["dynamic", "fixed", "vhdx"]), deeper=st.booleans(), seed=st.integers(0, 1 << 30))
@settings(max_examples=daily_or_nightly(15, 40), deadline=None)
def test_the_leaf_is_merged_into_its_parent(
    base: str, deeper: bool, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The parent takes the leaf's content and the later writes, and holds a writer's lock."""
    folder = tmp_path_factory.mktemp("leaf")
    rng = random.Random(seed)
    paths, model = make_chain(folder, 3 if deeper else 2, base, rng)
    chain = Chain.open(paths[0], writable=True)
    write_some(chain, model, rng, 3)
    with live_merge(chain, 0, 1) as merging:
        merging.copy()
        new, problem = merging.exchange()
        assert problem is None
        merging.done()
    assert content(new) == model and not paths[0].exists()
    with pytest.raises(errors.ImageInUse):
        vhdkit.open_disk(paths[1])
    write_some(new, model, rng, 3)
    new.close()
    assert sorted(os.listdir(folder)) == sorted(path.name for path in paths[1:])
    assert disk_as_opened_now(paths[1]) == model
    vhdkit.open_disk(paths[1], writable=True).close()


def merge_while_writing(paths: list[Path], seed: int) -> Chain:
    """Merge layers 1 and 2 into layer 3 with writes in between, then the leaf into that; return what remains."""
    rng = random.Random(seed)
    chain = Chain.open(paths[0], writable=True)
    model = bytearray(content(chain))
    with live_merge(chain, 1, 3) as merging:
        merging.copy(lambda done, total: write_some(chain, model, rng, 1))
        new, problem = merging.exchange()
        if problem is not None:
            raise problem
        merging.done()
    write_some(new, model, rng, 1)
    with live_merge(new, 0, 1) as merging:
        merging.copy()
        last, problem = merging.exchange()
        if problem is not None:
            raise problem
        merging.done()
    return last


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("base", ["dynamic", pytest.param("vhdx", marks=pytest.mark.nightly)])
def test_killed_at_every_call(base: str, tmp_path: Path) -> None:
    """INV-MERGE-PRESERVES: killed before any call that changes a file, every sector holds its old content or what was
    written since, read through the leaf while it exists and through the target afterwards; resuming completes the
    merge."""
    rng = random.Random(5)
    master = tmp_path / "master"
    master.mkdir()
    paths, model = make_chain(master, 5, base, rng)
    names = [path.name for path in paths]
    work = tmp_path / "work"
    states = set()
    shutil.copytree(master, work)

    def served() -> None:
        merge_while_writing([work / name for name in names], 9).close()

    for number in killings(served, step=daily_or_nightly(5, 1)):
        here = [work / name for name in names]
        top = here[0] if here[0].exists() else here[3]
        states.add((top.name, Path(sidecar_path(here[3], KIND)).exists()))
        seen = disk_as_opened_now(top)
        assert _explained(seen, model, number), f"killed at call {number}"
        for _ in range(2):
            with _settled(top) as disk:
                assert _explained(disk.read(0, SIZE), model, number)
                top = Path(disk.path)
        if vhdkit.merge_under_way(here[3]):
            vhdkit.resume_merge(here[3])
        top = here[0] if here[0].exists() else here[3]
        assert _explained(disk_as_opened_now(top), model, number)
        assert not vhdkit.merge_under_way(here[3])
        shutil.rmtree(work)
        shutil.copytree(master, work)
    complete = {(names[0], False), (names[0], True), (names[3], True), (names[3], False)}
    assert states >= complete if daily_or_nightly(False, True) else states >= {(names[0], True), (names[3], False)}


def _settled(top: Path) -> vhdkit.Disk:
    """Opened for writing: that may complete the merge of the leaf and report where its content is now."""
    try:
        return vhdkit.open_disk(top, writable=True)
    except errors.NotFound as error:
        return vhdkit.open_disk(error.problem.split("merged into ")[1].split(":")[0], writable=True)


def _explained(seen: bytes, before: bytearray, number: int) -> bool:
    """Every sector is unchanged, or zeros, or holds a later write: patterns contain the number of their sector."""
    for index in range(SECTORS):
        sector = seen[index * SECTOR_SIZE : (index + 1) * SECTOR_SIZE]
        if sector in (before[index * SECTOR_SIZE : (index + 1) * SECTOR_SIZE], bytes(SECTOR_SIZE)):
            continue
        word = int.from_bytes(sector[:8], "little")
        if word & 0xFFFFFFFFFF != index or sector != sector[:8] * (SECTOR_SIZE // 8):
            return False
    return True


@pytest.mark.parametrize("base", ["dynamic", pytest.param("vhdx", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_failing_at_every_call(base: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing call is an error; what is then served, the old chain or the new one, reads correctly, including writes
    that were not yet flushed."""
    rng = random.Random(6)
    master, work = tmp_path / "master", tmp_path / "work"
    master.mkdir()
    paths, model = make_chain(master, 4, base, rng)
    failures = 0
    # Every day every second call fails with one of the two errors, in the nightly run each call with both.
    for number in range(1 + (code == errno.ENOSPC and daily_or_nightly(2, 0)), 400, daily_or_nightly(4, 1)):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(master, work)
        chain = Chain.open(work / paths[0].name, writable=True)
        written = bytearray(model)
        write_some(chain, written, random.Random(number), 4)
        with monkeypatch.context() as patch:
            failing = _Failing(number, code)
            for name in CHANGING:
                patch.setattr(os, name, failing.around(getattr(os, name)))
            chain, failed = _try_to_merge(chain, 1, 2)
        assert content(chain) == written, f"call {number} failed"
        try:
            chain.flush()
            whole = True
        except errors.SyncFailed:  # then no flush has promised that the last writes are safe
            whole = False
        with _quiet():
            chain.close()
        assert not whole or disk_as_opened_now(work / paths[0].name) == written
        failures += failed
        if not failing.struck:
            break
    assert failing.left > 0 and failures > 10


@pytest.mark.parametrize("base", ["dynamic", "fixed", "raw", "vhdx"])
def test_the_target_is_not_written_while_the_old_leaf_may_come_back(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it is uncertain whether the leaf is gone for good, the target reads as before and refuses writes."""
    paths, model = make_chain(tmp_path, 2, base, random.Random(3))
    options = OpenOptions(allow_raw_parent=True)
    chain = Chain.open(paths[0], writable=True, options=options)

    def remove(self: RealNames, path: str) -> None:
        os.unlink(path)
        raise errors.IoFailed("the folder was not synced", path=path)

    monkeypatch.setattr(RealNames, "remove", remove)
    with live_merge(chain, 0, 1, options) as merging:
        merging.copy()
        chain, problem = merging.exchange()
    assert isinstance(problem, errors.IoFailed) and content(chain) == model
    with pytest.raises(errors.SyncFailed):
        chain.write(0, memoryview(bytes(SECTOR_SIZE)))
    chain.close()
    assert disk_as_opened_now(paths[1]) == model


class _Failing:
    """The n-th call fails, all others are made."""

    def __init__(self, number: int, code: int) -> None:
        self.left = number
        self.struck = False
        self._code = code

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                self.struck = True
                raise OSError(self._code, os.strerror(self._code))
            return call(*args, **options)

        return counted


def _try_to_merge(chain: Chain, first: int, target: int) -> tuple[Chain, bool]:
    """The chain to be served afterwards, and whether the merge failed."""
    try:
        with live_merge(chain, first, target) as merging:
            merging.copy()
            chain, problem = merging.exchange()
            if problem is not None:
                return chain, True
            merging.done()
    except errors.VhdkitError:
        return chain, True
    return chain, False


class _quiet:
    """A close after a failed flush may report the failure again."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: object, trace: object) -> bool:
        return isinstance(error, errors.VhdkitError)


@pytest.mark.parametrize("base", ["dynamic", "vhdx"])
def test_a_cancelled_merge_leaves_the_chain_unchanged_and_can_be_repeated(base: str, tmp_path: Path) -> None:
    """Cancelling a merge by an error from its progress loses nothing; locks are a reader's again."""
    rng = random.Random(8)
    paths, model = make_chain(tmp_path, 4, base, rng)
    chain = Chain.open(paths[0], writable=True)
    for number in range(3, 6):  # every block of the middle layers is in use
        write_some(chain, model, rng, number)
    with freezing([(chain, str(tmp_path / f"new{paths[0].suffix}"))]) as prepared:
        [chain] = prepared.freeze()
        prepared.done()

    def stop(done: int, total: int) -> None:
        raise errors.Cancelled("enough")

    with pytest.raises(errors.Cancelled), live_merge(chain, 1, 3) as merging:
        merging.copy(stop)
    assert content(chain) == model
    with Chain.open(paths[2]):  # a second reader is admitted
        assert vhdkit.merge_under_way(paths[2]) == str(paths[2])
        with pytest.raises(errors.ImageInUse), live_merge(chain, 1, 3):
            pass
    with live_merge(chain, 1, 3) as merging:
        merging.copy()
        chain, problem = merging.exchange()
        assert problem is None
        merging.done()
    assert content(chain) == model and vhdkit.merge_under_way(paths[2]) is None
    chain.close()


@pytest.mark.parametrize("base", ["dynamic", "vhdx"])
def test_a_leaf_that_cannot_be_opened_again_leaves_its_chain_readable(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it was repointed the leaf is opened again; if that fails, the old chain reads as before and takes no more
    writes, and the merge is finished from its record."""
    paths, model = make_chain(tmp_path, 4, base, random.Random(11))
    chain = Chain.open(paths[0], writable=True)
    honest = formats.reopened

    def failing(layer: Layer, *, writable: bool, store: Store | None = None) -> Layer:
        if layer is chain.leaf:
            raise errors.IoFailed("no", path=layer.store.name)
        return honest(layer, writable=writable, store=store)

    with pytest.raises(errors.IoFailed), live_merge(chain, 1, 2) as merging:
        merging.copy()
        monkeypatch.setattr(formats, "reopened", failing)
        merging.exchange()
    monkeypatch.undo()
    assert content(chain) == model
    with pytest.raises(errors.SyncFailed):
        chain.write(0, memoryview(bytes(SECTOR_SIZE)))
    with contextlib.suppress(errors.VhdkitError):
        chain.close()
    assert vhdkit.resume_merge(paths[2]).removed == (str(paths[1]),) and disk_as_opened_now(paths[0]) == model


@pytest.mark.parametrize("base", ["dynamic", "vhdx"])
def test_the_next_open_completes_the_merge_of_a_dead_server(base: str, tmp_path: Path) -> None:
    """If only the merged files are left to be removed, the next writable open of the leaf removes them; else a later
    merge under clients would find that the target has other children."""
    paths, model = make_chain(tmp_path, 4, base, random.Random(4))
    for relinked in (True, False):
        chain = Chain.open(paths[0], writable=True)
        with live_merge(chain, 1, 2) as merging:
            merging.copy()
            if relinked:
                chain, problem = merging.exchange()
                assert problem is None
            else:
                RealNames(str(paths[2])).write(merging.plan.intent.in_phase(Phase.RELINK))
        chain.close()
        assert vhdkit.merge_under_way(paths[2]) is not None and paths[1].exists()
        with vhdkit.open_disk(paths[0], writable=True) as disk:
            assert disk.read(0, SIZE) == model and disk.chain.layers[1].store.name == str(paths[2])
        assert vhdkit.merge_under_way(paths[2]) is None and not paths[1].exists()
        paths = [tmp_path / f"above-{paths[0].name}", paths[0], *paths[2:]]
        vhdkit.create_child(paths[0], paths[1])
