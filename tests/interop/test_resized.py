# SPDX-License-Identifier: Apache-2.0
"""Resized and compacted images, as QEMU, libvhdi and 7-Zip read them, and real images resized and compacted."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import shutil
import uuid
from pathlib import Path

import pytest

import vhdkit
from tests.harness.vhd_builder import Block, Vhd, pattern
from tests.interop.disks import content_of, unpack_tar
from tests.interop.qemu import qemu_content, qemu_create, qemu_io, qemu_virtual_size
from tests.interop.test_libvhdi import PROGRAM
from tests.interop.test_samples_verbs import ORPHANS_PARENT, ORPHANS_PARENT_ID
from tests.support import require_pyvhdi, require_tool, run, sample
from vhdkit.chain.verbs.describe import describe_image
from vhdkit.units import GIB, KIB, MIB

pytestmark = pytest.mark.interop

SIZE = 24 * MIB


def made(folder: Path, kind: str) -> tuple[Path, bytes]:
    """An image with scattered data, and its content."""
    rng, content = random.Random(6), bytearray(SIZE)
    for offset in rng.sample(range(0, 16 * MIB, MIB), 7):
        content[offset : offset + MIB] = rng.randbytes(MIB)
    path = folder / f"{kind}.vhd"
    vhdkit.create_image(path, SIZE, disk_format=vhdkit.DiskFormat(kind))
    with vhdkit.open_disk(path, writable=True) as disk:
        for offset in range(0, SIZE, MIB):
            if any(content[offset : offset + MIB]):
                disk.write(offset, content[offset : offset + MIB])
    return path, bytes(content)


@pytest.mark.parametrize("kind", ["fixed", "dynamic"])
@pytest.mark.parametrize("size", [SIZE + 512, 16 * MIB + 512 * 37, 100 * MIB])
def test_qemu_and_libvhdi_read_resized_images(tmp_path: Path, kind: str, size: int) -> None:
    """Both give the right size and every byte; and QEMU can write to it."""
    path, content = made(tmp_path, kind)
    vhdkit.resize(path, size, shrink=True)
    expected = content[:size].ljust(size, b"\0")
    assert qemu_virtual_size(path) == size and qemu_content(path, tmp_path) == expected
    facts = json.loads(run([require_pyvhdi(), "-c", PROGRAM, str(path)]).stdout)
    assert (facts["size"], facts["sha256"]) == (size, hashlib.sha256(expected).hexdigest())
    qemu_io(path, f"write -P 0xab {size - 4096} 4096")
    with vhdkit.open_disk(path) as disk:
        assert disk.read(0, size) == expected[: size - 4096] + b"\xab" * 4096


@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
def test_images_of_qemu_are_resized(tmp_path: Path, kind: str) -> None:
    """An image that QEMU made, with its own rounding, has exactly the requested size afterwards."""
    path = tmp_path / "qemu.vhd"
    qemu_create(path, SIZE, kind, force_size=False)
    qemu_io(path, "write -P 0x11 1M 3M", "write -P 0x22 20M 64k")
    with vhdkit.open_disk(path) as disk:
        before = disk.read(0, disk.size_bytes)
    for size in (5 * GIB, 21 * MIB):
        vhdkit.resize(path, size, shrink=True)
        assert qemu_virtual_size(path) == size
    assert qemu_content(path, tmp_path) == before[: 21 * MIB]
    assert vhdkit.check(path) == []


def test_qemu_reads_compacted_images(tmp_path: Path) -> None:
    """Dropped blocks are zeros for QEMU, too, and moved ones have their content."""
    path, content = made(tmp_path, "dynamic")
    with vhdkit.open_disk(path, writable=True) as disk:
        for block in range(0, 12, 3):
            disk.write(block * 2 * MIB, bytes(2 * MIB))
    expected = bytearray(content)
    for block in range(0, 12, 3):
        expected[block * 2 * MIB : (block + 1) * 2 * MIB] = bytes(2 * MIB)
    done = vhdkit.compact(path)
    assert done.dropped_block_count and done.moved_block_count
    assert qemu_content(path, tmp_path) == bytes(expected)


@pytest.mark.parametrize("archive", ["peer-vhdutil/vhdutil-chain.tar.xz"])
def test_real_chains_are_compacted(tmp_path: Path, archive: str) -> None:
    """Every layer of XenServer's chains, with batmaps, is compacted: every leaf reads as before."""
    unpack_tar(sample(archive), tmp_path)
    images = sorted(path for path in tmp_path.rglob("*.vhd") if path.stat().st_size < 200 * MIB)
    before, sizes = {}, {}
    for path in images:
        try:
            with vhdkit.open_disk(path) as disk:
                sizes[path] = disk.size_bytes
            if sizes[path] <= 256 * MIB:
                before[path] = hashlib.sha256(content_of(path)).hexdigest()
        except vhdkit.ParentError:
            continue
    assert before
    for path in before:
        vhdkit.compact(path)
    assert {path: hashlib.sha256(content_of(path)).hexdigest() for path in before} == before
    assert [one for path in before for one in vhdkit.check(path) if one.severity is vhdkit.Severity.ERROR] == []


@pytest.mark.parametrize("name", ["node-vhd/dynamic.vhd.gz", "node-vhd/fixed.vhd.gz", "dfvfs/ext2.vhd.gz"])
def test_real_images_are_compacted_and_resized(tmp_path: Path, name: str) -> None:
    """Images of Windows and others are compacted, grown and shrunk again: the content is unchanged."""
    path = tmp_path / "disk.vhd"
    with gzip.open(sample(name)) as packed, path.open("wb") as file:
        shutil.copyfileobj(packed, file)
    content = content_of(path)
    vhdkit.compact(path)
    assert content_of(path) == content
    vhdkit.resize(path, len(content) + 2 * GIB)
    with vhdkit.open_disk(path) as disk:
        assert disk.read(0, len(content)) == content and disk.read(len(content), 64 * KIB) == bytes(64 * KIB)
    vhdkit.resize(path, len(content), shrink=True)
    assert content_of(path) == content
    assert [one for one in vhdkit.check(path) if one.severity is vhdkit.Severity.ERROR] == []


def test_a_real_differencing_image_is_compacted_and_resized(tmp_path: Path) -> None:
    """Hyper-V's own differencing image, on a parent made for it, is compacted and grown: the content is unchanged."""
    path = tmp_path / "fat-differential.vhd"
    with gzip.open(sample("dfvfs/fat-differential.vhd.gz")) as packed, path.open("wb") as file:
        shutil.copyfileobj(packed, file)
    size = describe_image(path).virtual_size_bytes
    blocks = {number: Block(pattern(2 * MIB, number)) for number in range(0, size // (2 * MIB), 2)}
    parent = Vhd(size=size, unique_id=uuid.UUID(ORPHANS_PARENT_ID).bytes, blocks=blocks)
    parent.build().write(tmp_path / ORPHANS_PARENT)
    content = content_of(path)
    with vhdkit.open_disk(path, writable=True) as disk:
        disk.write(size - 4 * MIB, bytes(4 * MIB))  # half of it hides data of the parent
    content = content[: size - 4 * MIB] + bytes(4 * MIB)
    for image in (path, tmp_path / ORPHANS_PARENT):
        vhdkit.compact(image)
        assert content_of(path) == content
    vhdkit.resize(path, size + 2 * GIB)
    with vhdkit.open_disk(path) as disk:
        assert disk.read(0, size) == content and disk.read(size, 64 * KIB) == bytes(64 * KIB)


# -- VHDX -------------------------------------------------------------------------------------------------------------


def peers_agree(path: Path, content: bytes, scratch: Path) -> None:
    """QEMU and 7-Zip find no error in a VHDX, which begins with this content for QEMU, too."""
    raw = scratch / "expected.raw"
    raw.write_bytes(content)
    with vhdkit.open_disk(path) as disk:
        assert disk.read(0, len(content)) == content
        size = disk.size_bytes
    run([require_tool("qemu-img"), "check", "-q", "-f", "vhdx", path])
    part = f"driver=raw,size={len(content)},file.driver=vhdx,file.file.driver=file,file.file.filename={path}"
    whole = f"driver=raw,file.driver=file,file.filename={raw}"
    run([require_tool("qemu-img"), "compare", "-q", "--image-opts", part, whole])
    if size <= 8 * GIB:  # it reads all zeros of a larger one, too
        run([require_tool("7zz"), "t", "-tVHDX", path])
    assert {one.code for one in vhdkit.check(path)} <= {"space-unused", "headers-differ"}  # the latter by QEMU


@pytest.mark.parametrize("kind", ["vhdx", "vhdx-fixed"])
@pytest.mark.parametrize("size", [SIZE + 4096, 16 * MIB + 4096 * 37, 300 * GIB])
def test_qemu_and_7zip_read_resized_and_compacted_vhdx_images(tmp_path: Path, kind: str, size: int) -> None:
    """After each step both give the right size and every byte; and QEMU can write to it."""
    if kind == "vhdx-fixed":
        size = min(size, 100 * MIB)
    path, content = made(tmp_path, kind)
    vhdkit.resize(path, size, shrink=True)
    peers_agree(path, content[:size], tmp_path)
    run([require_tool("qemu-io"), "-f", "vhdx", "-c", f"write -P 0xab {12 * MIB} 64k", str(path)])
    expected = bytearray(content[:size])
    expected[12 * MIB : 12 * MIB + 64 * KIB] = b"\xab" * 64 * KIB
    peers_agree(path, bytes(expected), tmp_path)
    if kind == "vhdx":
        with vhdkit.open_disk(path, writable=True) as disk:
            disk.write(0, bytes(8 * MIB))
        expected[: 8 * MIB] = bytes(8 * MIB)
        before = path.stat().st_size
        vhdkit.compact(path)
        assert path.stat().st_size < before
        peers_agree(path, bytes(expected), tmp_path)


def test_vhdx_images_of_qemu_are_resized_and_compacted(tmp_path: Path) -> None:
    """With its gap before the first block, its states, and as "fixed", whose space it does not use."""
    options_of = [
        "subformat=dynamic,block_size=1M",
        "subformat=fixed,block_size=1M",
        "log_size=4M,block_state_zero=off",
    ]
    for options in options_of:
        path = tmp_path / f"{len(options)}.vhdx"
        run([require_tool("qemu-img"), "create", "-q", "-f", "vhdx", "-o", options, str(path), str(SIZE)])
        commands = ["-c", "write -P 0x11 1M 3M", "-c", "write -P 0x22 20M 64k", "-c", "write -z 1M 1M"]
        run([require_tool("qemu-io"), "-f", "vhdx", *commands, str(path)])
        content = content_of(path)
        vhdkit.resize(path, 5 * GIB if "fixed" not in options else 40 * MIB)
        peers_agree(path, content, tmp_path)
        vhdkit.resize(path, 21 * MIB, shrink=True)
        peers_agree(path, content[: 21 * MIB], tmp_path)
        if "fixed" not in options:
            vhdkit.compact(path)
            peers_agree(path, content[: 21 * MIB], tmp_path)


def test_the_chain_from_windows_is_compacted_and_resized(tmp_path: Path) -> None:
    """A parent and its child that Windows made keep their content, and the child its parent."""
    unpack_tar(sample("docker-explorer/vhdx_files.tgz"), tmp_path)
    child = next(tmp_path.rglob("diff.vhdx"))
    base = child.with_name("base.vhdx")
    before = [content_of(base), content_of(child)]
    vhdkit.compact(base)
    vhdkit.compact(child)
    assert [content_of(base), content_of(child)] == before
    peers_agree(base, before[0], tmp_path)
    vhdkit.resize(child, len(before[1]) + GIB)
    with vhdkit.open_disk(child) as disk:
        assert disk.read(0, len(before[1])) == before[1] and disk.read(disk.size_bytes - MIB, MIB) == bytes(MIB)
    assert [one for one in vhdkit.check(child) if one.severity is vhdkit.Severity.ERROR] == []
