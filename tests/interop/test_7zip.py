# SPDX-License-Identifier: Apache-2.0
"""7-Zip reads our images as we do: of the installed readers, it alone handles partial bitmaps in chains correctly."""

from __future__ import annotations

import gzip
import random
import shutil
import subprocess
import uuid
from pathlib import Path

import pytest

import vhdkit
from tests.harness.vhd_builder import Block, Vhd, bits_of, child, pattern
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
    unpack_tar,
)
from tests.interop.qemu import qemu_content
from tests.support import require_tool, run, sample
from vhdkit import DiskFormat
from vhdkit.chain.verbs.describe import describe_image

pytestmark = pytest.mark.interop

DEPTHS = (1, 2, 3, 4)
BASES = (
    Shape(DiskFormat.DYNAMIC, 5 * MIB + 3 * SECTOR, 512 * KIB),
    Shape(DiskFormat.DYNAMIC, 9 * MIB - SECTOR, 2 * MIB),
    Shape(DiskFormat.FIXED, 6 * MIB, 2 * MIB),
)


def _seven_zip(path: Path) -> bytes:
    """7-Zip's content of the image; it finds the parents in the folder by itself."""
    command = [require_tool("7zz"), "x", "-so", "-tVHD", str(path)]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout


@pytest.mark.parametrize("shape", FIXED_SHAPES + DYNAMIC_SHAPES, ids=str)
def test_what_we_create_reads_the_same_in_7zip(tmp_path: Path, shape: Shape) -> None:
    """Size and content of our fixed and dynamic images agree; 7-Zip's own test has no complaint."""
    path = tmp_path / "ours.vhd"
    expected = create_with_content(path, shape)
    assert content_of(path) == expected
    assert _seven_zip(path) == expected
    run([require_tool("7zz"), "t", "-tVHD", str(path)])


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("base", BASES, ids=str)
def test_our_chains_with_partial_bitmaps_read_the_same_in_7zip(tmp_path: Path, base: Shape, depth: int) -> None:
    """A leaf on one to four layers, each owning single sectors, reads as it was written."""
    contents = grow_chain(tmp_path, base, depth, seed=10 * depth)
    assert len(set(contents)) == depth + 1
    leaf = tmp_path / f"{depth}.vhd"
    assert _partial_bytes(leaf)
    assert content_of(leaf) == contents[-1]
    assert _seven_zip(leaf) == contents[-1]


def _partial_bytes(path: Path) -> bool:
    """True if the leaf owns some sectors of a bitmap's byte and leaves others to its parents."""
    with vhdkit.open_disk(path) as disk:
        edges = [one.sector_index for one in disk.extents() if one.layer_index == 0]
    return any(edge % 8 for edge in edges)


def test_zeros_in_a_child_hide_the_parent_in_7zip(tmp_path: Path) -> None:
    """Zeros written over a parent's data, in a block that the child did not have, are zeros to 7-Zip and to us."""
    base, leaf = tmp_path / "base.vhd", tmp_path / "leaf.vhd"
    model = bytearray(create_with_content(base, BASES[1]))
    with vhdkit.open_disk(base, writable=True) as disk:
        disk.write(0, b"\x55" * MIB)
        model[:MIB] = b"\x55" * MIB
    vhdkit.create_child(leaf, base)
    with vhdkit.open_disk(leaf, writable=True) as disk:
        disk.write_zeroes(3 * SECTOR, 100 * SECTOR)
        disk.write(200 * SECTOR, bytes(SECTOR))
    model[3 * SECTOR : 103 * SECTOR] = bytes(100 * SECTOR)
    model[200 * SECTOR : 201 * SECTOR] = bytes(SECTOR)
    assert content_of(leaf) == bytes(model)
    assert _seven_zip(leaf) == bytes(model)


def test_a_chain_rebased_to_a_moved_parent_reads_the_same_in_7zip(tmp_path: Path) -> None:
    """After a parent was renamed and `rebase` recorded that, 7-Zip finds it by the name in the child."""
    contents = grow_chain(tmp_path, BASES[0], 2)
    (tmp_path / "1.vhd").rename(tmp_path / "Zwischenstück ä 2.avhd")
    with pytest.raises(vhdkit.ParentMissing):
        content_of(tmp_path / "2.vhd")
    vhdkit.rebase(tmp_path / "2.vhd", tmp_path / "Zwischenstück ä 2.avhd")
    assert content_of(tmp_path / "2.vhd") == contents[2]
    assert _seven_zip(tmp_path / "2.vhd") == contents[2]


@pytest.mark.parametrize("relink", [False, True])
def test_images_that_do_without_their_parents_read_the_same_in_7zip_and_qemu(tmp_path: Path, relink: bool) -> None:
    """A clone that was made independent reads the same in both, with its parents gone; one that was relinked in 7-Zip,
    which follows its new name."""
    contents = grow_chain(tmp_path, BASES[0], 4)
    leaf = tmp_path / "4.vhd"
    vhdkit.pull(leaf, to=tmp_path / "2.vhd" if relink else None, relink=relink, independent=not relink)
    for number in (2, 3) if relink else range(4):
        (tmp_path / f"{number}.vhd").unlink()
    assert content_of(leaf) == contents[4] == _seven_zip(leaf)
    run([require_tool("7zz"), "t", "-tVHD", str(leaf)])
    if not relink:
        assert qemu_content(leaf, tmp_path)[: len(contents[4])] == contents[4]


def test_copied_layers_read_the_same_in_7zip(tmp_path: Path) -> None:
    """Layers that were copied to a child of a converted base read as in their chain, with that chain gone."""
    source, copies = tmp_path / "source", tmp_path / "copies"
    source.mkdir()
    copies.mkdir()
    contents = grow_chain(source, BASES[1], 3)
    vhdkit.convert(source / "1.vhd", copies / "full.vhd", DiskFormat.DYNAMIC)
    vhdkit.copy_layers(source / "3.vhd", copies / "new.avhd", above=source / "1.vhd", parent=copies / "full.vhd")
    shutil.rmtree(source)
    assert _seven_zip(copies / "new.avhd") == contents[3]
    run([require_tool("7zz"), "t", "-tVHD", str(copies / "new.avhd")])


@pytest.mark.parametrize("depth", DEPTHS)
def test_hand_made_chains_read_the_same_in_both(tmp_path: Path, depth: int) -> None:
    """Random bitmaps, blocks in any order and of any size, in files that vhdkit did not write: both readers agree."""
    rng = random.Random(depth)
    size = 6 * MIB
    base = Vhd(size=size, blocks={number: Block(pattern(MIB, 1)) for number in (2, 0)}, unique_id=_id(0))
    base.build().write(tmp_path / "0.vhd")
    for number in range(1, depth + 1):
        block_size = rng.choice((512 * KIB, MIB, 2 * MIB))
        order = rng.sample(range(size // block_size), size // block_size // 2)
        blocks = {one: Block(rng.randbytes(block_size), bits=_random_bits(rng, block_size)) for one in order}
        image = child(
            f"{number - 1}.vhd",
            size=size,
            block_size=block_size,
            blocks=blocks,
            parent_id=_id(number - 1),
            unique_id=_id(number),
            aligned=rng.random() < 0.5,
        )
        image.build().write(tmp_path / f"{number}.vhd")
    leaf = tmp_path / f"{depth}.vhd"
    assert content_of(leaf) == _seven_zip(leaf)
    assert content_of(leaf) != content_of(tmp_path / f"{depth - 1}.vhd")


def _id(number: int) -> bytes:
    return bytes([number + 1]) * 16


def _random_bits(rng: random.Random, block_size: int) -> bytes:
    sectors = range(block_size // SECTOR)
    return bits_of(set(rng.sample(sectors, len(sectors) // 3)), block_size)


def test_windows_partial_bitmap_reads_the_same_in_both(tmp_path: Path) -> None:
    """The differencing sample from Windows, with a parent of the recorded id, is the same disk to both readers."""
    leaf = tmp_path / "fat-differential.vhd"
    with gzip.open(sample("dfvfs/fat-differential.vhd.gz")) as packed, leaf.open("wb") as file:
        shutil.copyfileobj(packed, file)
    asked = describe_image(leaf).parent
    assert asked is not None
    base = Vhd(
        size=4 * MIB,
        unique_id=uuid.UUID(asked.unique_id).bytes,
        blocks={0: Block(pattern(2 * MIB, 1)), 1: Block(pattern(2 * MIB, 2))},
    )
    base.build().write(tmp_path / "fat-parent.vhd")
    with vhdkit.open_disk(leaf) as disk:
        owners = {one.layer_index for one in disk.extents()}
    assert owners == {0, 1}
    assert content_of(leaf) == _seven_zip(leaf)


def test_what_we_write_into_vhd_utils_chain_reads_the_same_in_7zip(tmp_path: Path) -> None:
    """Our child on XenServer's third child, with writes to it, reads correctly in 7-Zip."""
    unpack_tar(sample("peer-vhdutil/vhdutil-chain.tar.xz"), tmp_path)
    assert _seven_zip(tmp_path / "s3.vhd") == content_of(tmp_path / "s3.vhd")
    leaf = tmp_path / "ours.avhd"
    vhdkit.create_child(leaf, tmp_path / "s3.vhd")
    model = bytearray(content_of(tmp_path / "s3.vhd"))
    with vhdkit.open_disk(leaf, writable=True) as disk:
        for offset in range(SECTOR, len(model), 3 * MIB):
            disk.write(offset, b"\xee" * 5 * SECTOR)
            model[offset : offset + 5 * SECTOR] = b"\xee" * 5 * SECTOR
    assert content_of(leaf) == bytes(model)
    assert _seven_zip(leaf) == bytes(model)
