# SPDX-License-Identifier: Apache-2.0
"""INV-BOUNDED for the largest disks: what the table, and the map made from it, cost in memory.

The peak of a separate process is measured: the memory that the system gave it, not what it asked for. The process
alone takes about 40 MiB.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import vhdkit
from vhdkit.formats.vhdx.bat import Bat, Shape
from vhdkit.formats.vhdx.metadata import read_metadata
from vhdkit.store import FileStore
from vhdkit.units import MIB, TIB

SCRIPT = """
import re, sys
from pathlib import Path
import vhdkit
verb, path = sys.argv[1:]
if verb == "check":
    vhdkit.check(path)
elif verb == "info":
    from vhdkit.chain.verbs.describe import describe_chain
    describe_chain(path)
else:
    with vhdkit.open_disk(path, writable=verb == "write") as disk:
        disk.read(disk.size_bytes // 2, 512)
        if verb == "map":
            assert [run.size_bytes for run in disk.extents(find_holes=True)] == [disk.size_bytes]
        if verb == "write":
            disk.write(disk.size_bytes // 2, bytes(512) + b"w" * 4096)
            assert disk.read(disk.size_bytes // 2 + 512, 4096) == b"w" * 4096
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def peak_mib(verb: str, path: Path) -> int:
    """The peak memory of a process that did this with the image."""
    command = [sys.executable, "-c", SCRIPT, verb, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) // 1024


def allocate_all(path: Path) -> None:
    """Place every block in a hole of the file."""
    store = FileStore.open(path, writable=True)
    try:
        metadata = read_metadata(store)
        shape, block = metadata.shape, metadata.items.block_size
        numbers = np.arange(shape.entry_count, dtype=np.uint64)
        chunks, within = np.divmod(numbers, np.uint64(shape.ratio + 1))
        blocks = chunks * np.uint64(shape.ratio) + within
        entries = (np.uint64(store.size()) + blocks * np.uint64(block)) | np.uint64(6)
        entries[(within == shape.ratio) | (blocks >= shape.block_count)] = 0
        store.pwrite(metadata.regions.bat.file_offset, entries.astype("<u8").tobytes())
        store.truncate(store.size() + shape.block_count * block)
    finally:
        store.close()


@pytest.fixture(scope="module")
def largest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty disk of 64 TiB with blocks of 2 MiB: its table has 32 Mi entries."""
    path = tmp_path_factory.mktemp("largest") / "empty.vhdx"
    vhdkit.create_image(path, 64 * TIB, disk_format="vhdx", block_size_bytes=2 * MIB)
    return path


@pytest.fixture
def huge_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in a file system whose files can have 65 TiB; on ext4 that is one in memory."""
    for folder in (tmp_path, Path("/dev/shm")):
        path = folder / f"vhdkit-test-{os.getpid()}.vhdx"
        try:
            path.touch()
            os.truncate(path, 65 * TIB)
        except OSError:
            path.unlink(missing_ok=True)
            continue
        path.unlink()
        yield folder
        path.unlink(missing_ok=True)
        return
    pytest.skip("no file system here has files of 65 TiB")


@pytest.mark.parametrize("verb", ["open", "info", "check", "map"])
def test_the_largest_empty_disk(largest: Path, verb: str) -> None:
    """INV-BOUNDED: blocks that no layer owns take no memory."""
    assert peak_mib(verb, largest) < 150


def test_writing_to_the_largest_disk(tmp_path: Path) -> None:
    """INV-BOUNDED: the same is true for a writer's own tables."""
    path = tmp_path / "written.vhdx"
    vhdkit.create_image(path, 64 * TIB, disk_format="vhdx", block_size_bytes=2 * MIB)
    assert peak_mib("write", path) < 150


def test_a_child_of_the_largest_empty_disk(largest: Path) -> None:
    """INV-BOUNDED: the same is true in a chain whose child has smaller or larger blocks than its parent."""
    for number, block in enumerate((MIB, 8 * MIB)):
        child = largest.with_name(f"child{number}.avhdx")
        vhdkit.create_child(child, largest, block_size_bytes=block)
        assert peak_mib("map", child) < 150
        child.unlink()


def test_a_table_of_zeros_that_take_space(tmp_path: Path) -> None:
    """INV-BOUNDED: a copy whose holes were filled, as other programs make them, takes no more memory."""
    path = tmp_path / "filled.vhdx"
    vhdkit.create_image(path, 16 * TIB, disk_format="vhdx", block_size_bytes=MIB)
    with path.open("r+b") as file:
        file.seek(3 * MIB)
        for _ in range(128):
            file.write(bytes(MIB))
    store = FileStore.open(path)
    try:
        assert Bat.load(store, 3 * MIB, Shape(16 * TIB, MIB, 512, has_parent=False)).memory_bytes == 0
    finally:
        store.close()
    assert peak_mib("open", path) < 100


def test_the_largest_full_disk(huge_folder: Path) -> None:
    """INV-BOUNDED: with blocks of 32 MiB the table has 2 Mi entries, all of them in use."""
    path = huge_folder / f"vhdkit-test-{os.getpid()}.vhdx"
    vhdkit.create_image(path, 64 * TIB, disk_format="vhdx-fixed", block_size_bytes=32 * MIB)
    assert peak_mib("open", path) < 300


def test_eight_full_layers_of_two_tebibytes(tmp_path: Path) -> None:
    """INV-BOUNDED: a million entries in each of eight tables."""
    leaf = tmp_path / "layer0.vhdx"
    vhdkit.create_image(leaf, 2 * TIB, disk_format="vhdx")
    for number in range(1, 8):
        child = tmp_path / f"layer{number}.avhdx"
        vhdkit.create_child(child, leaf)
        leaf = child
    for path in tmp_path.iterdir():
        allocate_all(path)
    assert peak_mib("open", leaf) < 150
