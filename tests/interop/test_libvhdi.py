# SPDX-License-Identifier: Apache-2.0
"""libvhdi reads our images as we do.

It misreads the bitmaps of a VHD whose bytes are partly set, so the chains of VHDs here own only whole blocks.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import vhdkit
from tests.interop.disks import (
    DYNAMIC_SHAPES,
    FIXED_SHAPES,
    KIB,
    MIB,
    SECTOR,
    Shape,
    content_of,
    create_with_content,
    grow_chain,
    sha256,
)
from tests.support import require_pyvhdi, run
from vhdkit import DiskFormat

pytestmark = pytest.mark.interop

BLOCK_SIZES = (512 * KIB, 2 * MIB)
QUICK_SHAPES = tuple(one for one in DYNAMIC_SHAPES if one.block_size <= 2 * MIB)  # libvhdi takes seconds for 32 MiB

# Runs in the system's Python. Its arguments are a chain, leaf first.
PROGRAM = """
import hashlib, json, sys
import pyvhdi

files = []
for path in sys.argv[1:]:
    files.append(pyvhdi.file())
    files[-1].open(path)
for child, parent in zip(files, files[1:]):
    assert child.parent_identifier == parent.identifier, "the child names another parent"
    child.set_parent(parent)
leaf, digest, offset = files[0], hashlib.sha256(), 0
while offset < leaf.media_size:
    data = leaf.read_buffer_at_offset(min(8 << 20, leaf.media_size - offset), offset)
    assert data, offset
    digest.update(data)
    offset += len(data)
print(json.dumps({
    "size": leaf.media_size,
    "sha256": digest.hexdigest(),
    "kind": leaf.disk_type,
    "parent": leaf.parent_filename,
}))
"""
KIND_NUMBER = {DiskFormat.FIXED: 2, DiskFormat.DYNAMIC: 3}
DIFFERENCING_NUMBER = 4


def _libvhdi(*chain: Path) -> dict[str, object]:
    """libvhdi's report about a chain, leaf first."""
    done = run([require_pyvhdi(), "-c", PROGRAM, *(str(path) for path in chain)])
    said: dict[str, object] = json.loads(done.stdout)
    return said


@pytest.mark.parametrize("shape", FIXED_SHAPES + QUICK_SHAPES, ids=str)
def test_what_we_create_reads_the_same_in_libvhdi(tmp_path: Path, shape: Shape) -> None:
    """libvhdi agrees on kind, size and content of our fixed and dynamic images."""
    path = tmp_path / "ours.vhd"
    expected = create_with_content(path, shape)
    assert content_of(path) == expected
    assert _libvhdi(path) == {
        "size": shape.size,
        "sha256": sha256(expected),
        "kind": KIND_NUMBER[shape.disk_format],
        "parent": None,
    }


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_chain_of_whole_blocks_reads_the_same_in_libvhdi(tmp_path: Path, block_size: int) -> None:
    """Each level of a chain of four, linked by the ids and names that libvhdi reads."""
    shape = Shape(DiskFormat.DYNAMIC, 7 * block_size + 9 * SECTOR, block_size)
    contents = grow_chain(tmp_path, shape, 3, whole_blocks=True)
    assert len(set(contents)) == len(contents)
    for depth in range(1, len(contents)):
        assert content_of(tmp_path / f"{depth}.vhd") == contents[depth]
        said = _libvhdi(*(tmp_path / f"{number}.vhd" for number in range(depth, -1, -1)))
        assert said == {
            "size": shape.size,
            "sha256": sha256(contents[depth]),
            "kind": DIFFERENCING_NUMBER,
            "parent": f"{depth - 1}.vhd",
        }


@pytest.mark.parametrize("disk_format", [DiskFormat.VHDX, DiskFormat.VHDX_FIXED])
def test_a_vhdx_reads_the_same_in_libvhdi(tmp_path: Path, disk_format: DiskFormat) -> None:
    """libvhdi agrees on kind, size and content of our VHDX images, whose last block is a partial one."""
    path, size = tmp_path / "ours.vhdx", 9 * MIB + 20 * KIB
    vhdkit.create_image(path, size, disk_format=disk_format, block_size_bytes=2 * MIB)
    content = written(path, size, 1)
    kind = KIND_NUMBER[DiskFormat.FIXED if disk_format is DiskFormat.VHDX_FIXED else DiskFormat.DYNAMIC]
    assert _libvhdi(path) == {"size": size, "sha256": sha256(content), "kind": kind, "parent": None}


def test_a_chain_of_vhdx_reads_the_same_in_libvhdi(tmp_path: Path) -> None:
    """Children that own parts of blocks, three deep; zeros without space in a child are more than libvhdi knows."""
    size, paths = 9 * MIB + 20 * KIB, [tmp_path / "0.vhdx"]
    vhdkit.create_image(paths[0], size, disk_format=DiskFormat.VHDX, block_size_bytes=2 * MIB)
    written(paths[0], size, 0)
    for number in range(1, 4):
        paths.append(tmp_path / f"{number}.avhdx")
        vhdkit.create_child(paths[-1], paths[-2])
        content = written(paths[-1], size, number)
        said = _libvhdi(*reversed(paths))
        assert (said["size"], said["sha256"], said["kind"]) == (size, sha256(content), DIFFERENCING_NUMBER)


def written(path: Path, size: int, seed: int) -> bytes:
    """Write to places all over the disk; returns the content of the whole disk."""
    rng = random.Random(seed)
    with vhdkit.open_disk(path, writable=True) as disk:
        for count in (SECTOR, 3 * SECTOR, 64 * KIB, MIB + SECTOR):
            disk.write(rng.randrange((size - count) // SECTOR) * SECTOR, rng.randbytes(count))
        disk.write(size - SECTOR, rng.randbytes(SECTOR))
        return disk.read(0, size)
