# SPDX-License-Identifier: Apache-2.0
"""The verbs of a chain on VHDX images."""

from __future__ import annotations

import random
import uuid
from pathlib import Path

import pytest

import vhdkit
from tests.harness.stores import MemStore
from tests.vhdkit.formats.vhdx.images import PARENT, image, set_items
from vhdkit.formats.vhdx.format import VHDX
from vhdkit.formats.vhdx.opening import open_vhdx
from vhdkit.units import KIB, MIB, SECTOR_SIZE

SIZE = 6 * MIB


def written(path: Path, content: bytearray, seed: int) -> None:
    """A block of zeros, then random data, in the leaf at this path; also in `content`."""
    rng = random.Random(seed)
    with vhdkit.open_disk(path, writable=True) as disk:
        block = rng.randrange(SIZE // MIB // 2) * 2 * MIB
        disk.write_zeroes(block, 2 * MIB)
        content[block : block + 2 * MIB] = bytes(2 * MIB)
        for _ in range(3):
            offset, size = rng.randrange(SIZE - 64 * KIB), rng.randint(1, 64 * KIB)
            data = rng.randbytes(size)
            disk.write(offset, data)
            content[offset : offset + size] = data


@pytest.mark.parametrize("seed", range(4))
def test_a_chain_reads_and_merges_as_its_model(tmp_path: Path, seed: int) -> None:
    """Snapshots, another name of the parent, a merge to a new file and conversions preserve what the leaf reads."""
    content, leaf = bytearray(SIZE), tmp_path / "0.vhdx"
    vhdkit.create_image(leaf, SIZE, disk_format="vhdx", block_size_bytes=MIB)
    with vhdkit.open_disk(leaf, writable=True) as disk:
        content[:] = random.Random(seed).randbytes(SIZE)
        disk.write(0, content)
    for depth in range(1, 4):
        child = tmp_path / f"{depth}.avhdx"
        vhdkit.create_child(child, leaf, block_size_bytes=MIB << seed % 2)
        leaf = child
        written(leaf, content, seed * 10 + depth)
    made = [leaf]
    for number, into in enumerate([None, tmp_path / "1.avhdx", tmp_path / "0.vhdx"]):
        made.append(tmp_path / f"merged{number}.avhdx")
        vhdkit.merge(leaf, into=into, to=made[-1])
    for kind in ("raw", "dynamic", "vhdx", "vhdx-fixed"):
        made.append(tmp_path / f"converted-{kind}")
        vhdkit.convert(leaf, made[-1], kind)
    for path in made:
        options = vhdkit.OpenOptions(format_name="raw") if path.name.endswith("raw") else None
        with vhdkit.open_disk(path, options=options) as disk:
            assert disk.read(0, SIZE) == content, path.name
        if options is None:
            assert not [one for one in vhdkit.check(path) if one.severity > 0], path.name


def test_items_of_a_parents_disk_that_leave_no_room_for_the_locator() -> None:
    """The child is refused before a byte is written, not made with items that lie over its BAT."""
    parent = image()
    sizes = [478 * KIB + SECTOR_SIZE, 478 * KIB + SECTOR_SIZE, SECTOR_SIZE]
    added = {uuid.UUID(int=99 + number).bytes: (2, b"q" * size) for number, size in enumerate(sizes)}
    set_items(parent, lambda items: items.update(added))
    child = MemStore("child.avhdx")
    with pytest.raises(vhdkit.InvalidArgument, match="do not fit into a child"):
        VHDX.create_child(child, SIZE, PARENT, block_size_bytes=MIB, disk=open_vhdx(parent))
    assert child.size() == 0
