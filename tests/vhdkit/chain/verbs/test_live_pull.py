# SPDX-License-Identifier: Apache-2.0
"""Filling a layer under an open chain: reads stay the same, writes are kept, and a crash loses nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vhdkit
from tests.harness.killing import CHANGING, killings
from tests.support import daily_or_nightly
from tests.vhdkit.chain.verbs.test_live_merge import (
    SECTORS,
    SIZE,
    _explained,
    _Failing,
    content,
    disk_as_opened_now,
    make_chain,
    write_some,
)
from vhdkit import errors, formats
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.verbs import live_pull as module
from vhdkit.chain.verbs.live_pull import live_pull
from vhdkit.image import Layer
from vhdkit.store import Store
from vhdkit.units import MIB, SECTOR_SIZE

OPTIONS = OpenOptions(allow_raw_parent=True)


def pull(chain: Chain, index: int, last: int, *, cuts: bool = True) -> Chain:
    """Pull, and return the chain that is served then. Raises what the exchange reports."""
    with live_pull(chain, index, last, cuts=cuts) as pulling:
        pulling.copy()
        new, problem = pulling.exchange()
        if problem is not None:
            raise problem
    return new


@given(
    depth=st.integers(3, 6),
    base=st.sampled_from(["dynamic", "fixed", "raw", "vhdx"]),
    cuts=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
@settings(max_examples=daily_or_nightly(6, 80), deadline=None)
def test_reads_and_writes_go_on(
    depth: int, base: str, cuts: bool, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """INV-PULL-PRESERVES: while a layer is filled, in several parts, the disk reads and takes writes as before, and no
    other file changes; at the end it stands on what was left below, or on nothing."""
    folder = tmp_path_factory.mktemp("live")
    rng = random.Random(seed)
    paths, model = make_chain(folder, depth, base, rng)
    last = rng.randrange(2, depth)
    index = rng.randrange(1, last)
    others = {path: path.read_bytes() for number, path in enumerate(paths) if number not in (0, index)}
    chains = [Chain.open(paths[0], writable=True, options=OPTIONS)]

    def meanwhile(done: int, total: int) -> None:
        assert 0 < done <= total
        place = rng.randrange(SECTORS - 64)
        buffer = bytearray(64 * SECTOR_SIZE)
        chains[-1].read_into(place, memoryview(buffer))
        assert buffer == model[place * SECTOR_SIZE :][: len(buffer)]
        write_some(chains[-1], model, rng, 1)
        if rng.random() < 0.3:
            chains[-1].flush()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PART_BYTES", MIB)
        with live_pull(chains[-1], index, last, cuts=cuts) as pulling:
            pulling.copy(meanwhile, lambda: chains.append(pulling.look_again()))
            assert content(chains[-1]) == model
            new, problem = pulling.exchange()
            assert problem is None
    write_some(new, model, rng, 2)
    assert content(new) == model
    with pytest.raises(errors.ImageInUse):
        vhdkit.open_disk(paths[0])
    new.close()
    kept = [*paths[: index + 1], *(paths[last + 1 :] if cuts else paths[index + 1 :])]
    assert {path: path.read_bytes() for path in others} == others
    assert vhdkit.chain_paths(paths[0], options=OPTIONS) == [str(path) for path in kept]
    assert disk_as_opened_now(paths[0]) == model
    assert [one for one in vhdkit.check(paths[0], options=OPTIONS) if one.severity is vhdkit.Severity.ERROR] == []


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("base", ["dynamic", pytest.param("vhdx", marks=pytest.mark.nightly)])
def test_killed_at_every_call(base: str, tmp_path: Path) -> None:
    """INV-PULL-PRESERVES: killed before any call that changes a file, every sector holds its old content or what was
    written since, and the pull can be repeated."""
    master, work = tmp_path / "master", tmp_path / "work"
    master.mkdir()
    paths, model = make_chain(master, 4, base, random.Random(5))
    here, depths = [work / path.name for path in paths], set()
    shutil.copytree(master, work)

    def served() -> None:
        rng = random.Random(9)
        chain = Chain.open(here[0], writable=True)
        written = bytearray(content(chain))
        with live_pull(chain, 1, 3, cuts=True) as pulling:
            pulling.copy(lambda done, total: write_some(chain, written, rng, 1))
            new, problem = pulling.exchange()
            assert problem is None
        write_some(new, written, rng, 1)
        new.close()

    for number in killings(served, step=daily_or_nightly(9, 1)):
        assert _explained(disk_as_opened_now(here[0]), model, number), f"killed at call {number}"
        depths.add(len(vhdkit.chain_paths(here[0])))
        with vhdkit.open_disk(here[0], writable=True) as disk:
            assert _explained(disk.read(0, SIZE), model, number)
        pull(Chain.open(here[0], writable=True), 1, 3).close() if len(vhdkit.chain_paths(here[0])) == 4 else None
        assert _explained(disk_as_opened_now(here[0]), model, number) and len(vhdkit.chain_paths(here[0])) == 2
        shutil.rmtree(work)
        shutil.copytree(master, work)
    assert depths == {4, 2}


@pytest.mark.parametrize("base", ["dynamic", pytest.param("vhdx", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_failing_at_every_call(base: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing call is an error; what is then served reads correctly, including writes that were not flushed."""
    master, work = tmp_path / "master", tmp_path / "work"
    master.mkdir()
    paths, model = make_chain(master, 4, base, random.Random(6))
    failures = 0
    for number in range(1, 400, daily_or_nightly(7, 1)):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(master, work)
        chain = Chain.open(work / paths[0].name, writable=True)
        written = bytearray(model)
        write_some(chain, written, random.Random(number), 4)
        with monkeypatch.context() as patch:
            failing = _Failing(number, code)
            for name in CHANGING:
                patch.setattr(os, name, failing.around(getattr(os, name)))
            try:
                with live_pull(chain, 1, 2, cuts=True) as pulling:
                    pulling.copy()
                    chain, problem = pulling.exchange()
                    failures += problem is not None
            except errors.VhdkitError:
                failures += 1
        assert content(chain) == written, f"call {number} failed"
        chain.close()
        assert disk_as_opened_now(work / paths[0].name) == written
        if not failing.struck:
            break
    assert failing.left > 0 and failures > 2


@pytest.mark.parametrize("base", ["dynamic", "vhdx"])
def test_what_is_refused(base: str, tmp_path: Path) -> None:
    """A layer that another program reads is not filled; then, and after a cancelled pull, locks are as before."""
    paths, model = make_chain(tmp_path, 4, base, random.Random(8))
    chain = Chain.open(paths[0], writable=True)
    with Chain.open(paths[1]), pytest.raises(errors.ImageInUse), live_pull(chain, 1, 2, cuts=True):
        pass

    def stop(done: int, total: int) -> None:
        raise errors.Cancelled("enough")

    with pytest.raises(errors.Cancelled), live_pull(chain, 1, 3, cuts=True) as pulling:
        pulling.copy(stop)
    assert content(chain) == model
    with Chain.open(paths[1]) as other:
        assert len(other.layers) == 3
    chain = pull(chain, 1, 3, cuts=False)
    assert content(chain) == model and len(chain.layers) == 4
    chain = pull(chain, 1, 3)
    assert content(chain) == model and len(chain.layers) == 2
    chain.close()


def test_a_layer_that_cannot_be_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the layer cannot be opened again after it was cut off, the old chain reads as before."""
    paths, model = make_chain(tmp_path, 4, "dynamic", random.Random(11))
    chain = Chain.open(paths[0], writable=True)
    honest = formats.reopened

    def failing(layer: Layer, *, writable: bool, store: Store | None = None) -> Layer:
        if layer is chain.layers[1] and not writable:
            raise errors.IoFailed("no", path=layer.store.name)
        return honest(layer, writable=writable, store=store)

    with pytest.raises(errors.IoFailed), live_pull(chain, 1, 3, cuts=True) as pulling:
        pulling.copy()
        monkeypatch.setattr(formats, "reopened", failing)
        pulling.exchange()
    monkeypatch.undo()
    assert content(chain) == model
    with contextlib.suppress(errors.VhdkitError):
        chain.close()
    assert disk_as_opened_now(paths[0]) == model and len(vhdkit.chain_paths(paths[0])) == 2


@pytest.mark.parametrize("suffix", ["vhd", "vhdx"])
def test_nothing_is_noted(suffix: str, tmp_path: Path) -> None:
    """Killed while it fills a layer, a server with a folder for notes leaves none about it: they would be reported as
    lost, since children of the layer own sectors, although the disk reads the same."""
    notes, paths = tmp_path / "notes", [tmp_path / f"{name}.{suffix}" for name in ("base", "middle", "leaf")]
    notes.mkdir()
    vhdkit.create_image(paths[0], SIZE, disk_format="vhdx" if suffix == "vhdx" else "dynamic")
    with vhdkit.open_disk(paths[0], writable=True) as disk:
        disk.write(5000, b"data" * 5000)
    for child, parent in zip(paths[1:], paths, strict=False):
        vhdkit.create_child(child, parent)
    chain = Chain.open(paths[-1], writable=True, options=OpenOptions(notes_folder=notes))
    left: list[list[str]] = []
    with live_pull(chain, 1, 2, cuts=False) as pulling:
        pulling.copy(lambda *now: left.append(os.listdir(notes)))
    chain.close()
    assert left and not any(left)
