# SPDX-License-Identifier: Apache-2.0
"""Disks whose file system is full: a write that needs space changes nothing, and works once there is space."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.model import SectorModel
from tests.harness.power import faults_of
from tests.harness.stores import Fault, io_failed, no_space
from tests.support import not_available, require_tool
from tests.vhdkit.faulty_disks import BLOCKS, assert_reopens, everything, open_faulty, scene_of
from vhdkit import errors
from vhdkit.chain.verbs.create import create_child, create_image
from vhdkit.disk import Disk, open_disk
from vhdkit.units import KIB, MIB, SECTOR_SIZE


def part_of_the_first(disk: Disk, block_size: int) -> None:
    """Write to the first block. A VHDX changes its headers before that, and a child gets a sector bitmap."""
    disk.write(0, b"first block" * 100)


def all_of_the_first(disk: Disk, block_size: int) -> None:
    """Write the whole first block, so that a VHDX child has no sector bitmap yet."""
    disk.write(0, b"7" * block_size)


def zeros_in_the_second(disk: Disk, block_size: int) -> None:
    """Make the second block, too, one of zeros, which in a VHDX takes no space."""
    part_of_the_first(disk, block_size)
    disk.write_zeroes(block_size, block_size)


@pytest.mark.parametrize(
    ("kind", "before", "zeroes"),
    [
        *itertools.product(BLOCKS, [part_of_the_first], [False]),
        *itertools.product(["child", "vhdx-child"], [part_of_the_first], [True]),
        *itertools.product(["vhdx-child"], [all_of_the_first], [False, True]),
        ("vhdx-child", zeros_in_the_second, False),
    ],
)
@pytest.mark.parametrize("flushed_before", [False, True])
def test_no_space_for_a_block_changes_nothing(
    kind: str, before: Callable[[Disk, int], None], zeroes: bool, flushed_before: bool
) -> None:
    """If there is no space for a new block, the write that needs it raises NoSpace; file and disk are unchanged, the
    next flush succeeds, and once there is space the same write works."""
    struck = 0
    for operation in ("reserve", "write", "truncate"):
        for at in itertools.count(1):
            if not fails_without_a_trace(kind, Fault(operation, no_space, at=at), before, zeroes, flushed_before):
                break
            struck += 1
    assert struck == (2 if kind.startswith("vhdx") else 4) - zeroes + (before is all_of_the_first)


def fails_without_a_trace(
    kind: str, fault: Fault, before: Callable[[Disk, int], None], zeroes: bool, flushed_before: bool
) -> bool:
    """The test above for one failing call; False if the write makes no such call."""
    scene = scene_of(kind)
    disk, store = open_faulty(scene)
    block_size = scene.block_size_bytes
    before(disk, block_size)
    if flushed_before:
        disk.flush()
    expected, file_before = bytearray(everything(disk)), store.contents()
    fault.partly = fault.operation == "write"
    store.faults = [fault]
    start, data = block_size + SECTOR_SIZE, (b"\0" if zeroes else b"y") * 8 * SECTOR_SIZE
    try:
        disk.write_zeroes(start, len(data)) if zeroes else disk.write(start, data)
    except errors.NoSpace:
        pass
    else:
        return False
    assert everything(disk) == expected
    assert store.contents() == file_before
    disk.flush()
    later = block_size + 9 * SECTOR_SIZE  # elsewhere in the block: the failed data is not there
    disk.write(later, b"z" * SECTOR_SIZE)
    expected[later : later + SECTOR_SIZE] = b"z" * SECTOR_SIZE
    assert everything(disk) == expected
    disk.write(start, data)
    expected[start : start + len(data)] = data
    disk.close()
    assert_reopens(store, scene, expected)
    assert not faults_of(store)
    return True


@pytest.mark.parametrize("kind", BLOCKS)
def test_space_that_cannot_be_freed_is_not_used(kind: str) -> None:
    """INV-NO-REUSE: if even the cleanup of a failed allocation fails, the next block goes behind its leftovers."""
    scene = scene_of(kind)
    disk, store = open_faulty(scene)
    model, block_size = SectorModel(scene.content), scene.block_size_bytes
    model.write(0, b"first")
    disk.write(0, b"first")
    size_before = store.size()
    store.faults = [
        Fault("write", no_space, partly=True),
        Fault("truncate", io_failed, where=lambda size: size <= size_before),
    ]
    with pytest.raises(errors.NoSpace):
        disk.write(block_size + SECTOR_SIZE, b"y" * 80 * SECTOR_SIZE)
    model.write(block_size + 100 * SECTOR_SIZE, b"z" * SECTOR_SIZE)
    disk.write(block_size + 100 * SECTOR_SIZE, b"z" * SECTOR_SIZE)
    assert everything(disk) == model.current
    disk.close()
    assert_reopens(store, scene, model.current)


@pytest.mark.parametrize(
    ("kind", "zeroes"),
    [
        ("dynamic", False),
        ("child", False),
        ("child", True),
        ("vhdx", False),
        ("vhdx-child", False),
        ("vhdx-child", True),
    ],
)
@pytest.mark.parametrize("retry_first_block_only", [False, True])
def test_a_write_that_fails_in_its_second_block(kind: str, zeroes: bool, retry_first_block_only: bool) -> None:
    """After a write over two blocks failed in the second, every sector is old or new, and later writes to the first
    block are read back: the map knows that the leaf owns it."""
    scene = scene_of(kind)
    disk, store = open_faulty(scene)
    everything(disk)  # the map is settled
    model = SectorModel(scene.content)
    start, data = scene.block_size_bytes - 4 * SECTOR_SIZE, (b"\0" if zeroes else b"n") * 8 * SECTOR_SIZE
    of_one_block = 2 if zeroes else 3  # writes: footer, bitmap, data
    vhd, vhdx = Fault("write", no_space, at=of_one_block + 1), Fault("truncate", no_space, at=2)
    store.faults = [vhdx if kind.startswith("vhdx") else vhd]
    model.write(start, data)
    with pytest.raises(errors.NoSpace):
        if zeroes:
            disk.write_zeroes(start, len(data))
        else:
            disk.write(start, data)
    model.adopt(everything(disk))
    again = b"m" * (4 if retry_first_block_only else 8) * SECTOR_SIZE
    model.write(start, again)
    disk.write(start, again)
    assert everything(disk) == model.current
    disk.close()
    assert_reopens(store, scene, model.current)


# -- a real file system -----------------------------------------------------------------------------------------


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    with small_file_system(tmp_path, 2):
        yield tmp_path / "small"


@contextlib.contextmanager
def small_file_system(tmp_path: Path, mebibytes: int) -> Iterator[Path]:
    """A file system of the given size in MiB."""
    if os.geteuid() != 0:
        not_available("needs root to mount a small file system")
    mount, folder = require_tool("mount"), tmp_path / "small"
    folder.mkdir()
    command = [mount, "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        not_available(f"cannot mount a small file system here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run([require_tool("umount"), str(folder)], check=True)


@pytest.mark.parametrize(("suffix", "child_suffix", "mebibytes"), [(".vhd", ".avhd", 2), (".vhdx", ".avhdx", 4)])
@pytest.mark.parametrize("is_child", [False, True], ids=["dynamic", "child"])
def test_a_full_file_system(tmp_path: Path, suffix: str, child_suffix: str, mebibytes: int, is_child: bool) -> None:
    """On a file system that is really full the write that needs space raises NoSpace (exit code 7); earlier writes can
    be flushed, and once there is space the disk is usable again."""
    size = 64 * MIB
    with small_file_system(tmp_path, mebibytes) as folder:
        path = folder / f"base{suffix}"
        create_image(path, size)
        if is_child:
            create_child(folder / f"leaf{child_suffix}", path)
            path = folder / f"leaf{child_suffix}"
        (folder / "ballast").write_bytes(bytes(256 * KIB))
        rng, model = random.Random(1), SectorModel(bytes(size))
        with open_disk(path, writable=True) as disk:
            with pytest.raises(errors.NoSpace) as failure:
                for number in range(100):
                    offset, data = number * (2 * MIB - 4096) % size, rng.randbytes(64 * KIB)
                    model.write(offset, data)
                    disk.write(offset, data)
            assert failure.value.exit_code == 7 and 10 < number < 99
            model.adopt(everything(disk))
            disk.flush()
            (folder / "ballast").unlink()
            model.write(offset, data)
            disk.write(offset, data)
            disk.flush()
            assert everything(disk) == model.current
        with open_disk(path) as disk:
            assert everything(disk) == model.current
