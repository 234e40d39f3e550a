# SPDX-License-Identifier: Apache-2.0
"""Merges whose storage fails: every call of every kind, on the target and on a source."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import vhdkit
from tests.harness.merging import Scene, content_of, layer_of
from tests.harness.stores import Fault, FaultyStore, MemStore, io_failed, no_space, sync_failed
from tests.vhdkit.chain.verbs.test_merge_power import many_layers, moving_blocks, raw_base, two_layers
from tests.vhdkit.test_disk_full import small_tmpfs
from vhdkit import errors
from vhdkit.chain.verbs.merge_plan import plan_merge
from vhdkit.chain.verbs.merge_steps import fold
from vhdkit.units import KIB, MIB

__all__ = ["small_tmpfs"]
SCENES: dict[str, Callable[[], Scene]] = {
    make.__name__: make for make in (two_layers, many_layers, moving_blocks, raw_base)
}


def merge(scene: Scene, stores: list[MemStore]) -> None:
    """Merge only the data into the target's file."""
    layers = [layer_of(store) for store in stores]
    target = layer_of(stores[scene.index], writable=True)
    below = layers[scene.index + 1].size_bytes if layers[scene.index + 1 :] else 0
    fold(plan_merge(layers[: scene.index], target, below_bytes=below), target)
    target.close()


@pytest.mark.parametrize("operation", ["read", "write", "punch", "reserve", "sync"])
@pytest.mark.parametrize("name", SCENES)
def test_each_call_that_fails(name: str, operation: str) -> None:
    """INV-MERGE-PRESERVES: after EIO or ENOSPC at the n-th call, for every n, there is a typed error, the leaf reads
    as before, no byte of the sources has changed, and a second merge completes."""
    scene = SCENES[name]()
    before = content_of(scene.stores)
    errors_made = [sync_failed] if operation == "sync" else [io_failed, *([] if operation == "read" else [no_space])]
    for make_error in errors_made:
        at, done = 0, False
        while not done:
            at += 1
            fault = Fault(operation, make_error, at=at, partly=operation == "write" and at % 2 == 0)
            stores = [store.copy(frozen=number != scene.index) for number, store in enumerate(scene.stores)]
            failing = FaultyStore(stores[scene.index], fault)
            stores[scene.index] = failing
            try:
                merge(scene, stores)
                done = fault.seen < at
            except errors.VhdkitError as error:
                assert isinstance(error, type(make_error()))
            failing.faults.clear()
            assert content_of(stores) == before, f"{operation} {at}"
            if not done:
                merge(scene, stores)
            assert content_of(stores[scene.index :]) == before, f"{operation} {at}, again"
        assert at > 1 or operation in ("punch", "reserve") or name == "raw_base", "nothing failed"


@pytest.mark.parametrize("at", range(1, 9))
def test_a_bad_sector_in_a_source(at: int) -> None:
    """A source that cannot be read stops the merge; the target holds nothing that the leaf does not hide."""
    scene = many_layers()
    before = content_of(scene.stores)
    stores: list[MemStore] = [store.copy(frozen=number != scene.index) for number, store in enumerate(scene.stores)]
    bad = FaultyStore(stores[1])
    stores[1] = bad
    layers = [layer_of(store) for store in stores]
    target = layer_of(stores[scene.index], writable=True)
    plan = plan_merge(layers[: scene.index], target, below_bytes=layers[-1].size_bytes)
    bad.faults = [Fault("read", io_failed, at=at)]
    try:
        fold(plan, target)
    except errors.IoFailed:
        target.store.close()
    bad.faults.clear()
    assert content_of(stores) == before


def test_a_full_file_system(small_tmpfs: Path) -> None:
    """On a file system that is really full the merge ends in NoSpace and the leaf reads as before; once there is space
    it is resumed. A new file that does not fit is not left behind."""
    leaf, base = small_tmpfs / "leaf.avhd", small_tmpfs / "base.vhd"
    vhdkit.create_image(base, 64 * MIB)
    vhdkit.create_child(leaf, base)
    with vhdkit.open_disk(leaf, writable=True) as disk:
        for number in range(6):
            disk.write(number * 4 * MIB, os.urandom(120 * KIB))
        before = disk.read(0, disk.size_bytes)
    with pytest.raises(errors.NoSpace):
        (small_tmpfs / "ballast").write_bytes(bytes(700 * KIB))
        vhdkit.merge(leaf, to=small_tmpfs / "new.vhd")
    assert sorted(os.listdir(small_tmpfs)) == ["ballast", "base.vhd", "leaf.avhd"]
    with pytest.raises(errors.NoSpace):
        vhdkit.merge(leaf)
    with vhdkit.open_disk(leaf) as disk:
        assert disk.read(0, disk.size_bytes) == before
    (small_tmpfs / "ballast").unlink()
    vhdkit.resume_merge(leaf)
    assert os.listdir(small_tmpfs) == ["base.vhd"]
    with vhdkit.open_disk(base) as disk:
        assert disk.read(0, disk.size_bytes) == before
