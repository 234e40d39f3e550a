# SPDX-License-Identifier: Apache-2.0
"""Merges of real chains, made by vhd-util and by us, and how other programs read the results."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import vhdkit
from tests.interop.disks import (
    MIB,
    SECTOR,
    Shape,
    content_of,
    content_sha256,
    erase,
    grow_chain,
    scribble,
    sha256,
    unpack_tar,
)
from tests.interop.qemu import qemu_content
from tests.support import expected_samples, require_pyvhdi, require_tool, run, sample
from vhdkit import DiskFormat

pytestmark = pytest.mark.interop

EXPECTED: dict[str, Any] = expected_samples("peer-vhdutil/expected.json")
CHAIN = ("s3.vhd", "s2.vhd", "s1.vhd", "base.vhd")
PYVHDI = (
    "import hashlib, pyvhdi, sys; f = pyvhdi.file(); f.open(sys.argv[1]); digest = hashlib.sha256()\n"
    "for offset in range(0, f.get_media_size(), 1 << 20):\n"
    "    digest.update(f.read_buffer_at_offset(min(1 << 20, f.get_media_size() - offset), offset))\n"
    "print(digest.hexdigest())"
)


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """A fresh copy of vhd-util's chain of four."""
    archive = sample("peer-vhdutil/vhdutil-chain.tar.xz")
    whole = tmp_path / "whole"
    whole.mkdir()
    unpack_tar(archive, whole)
    folder = tmp_path / "chain"
    folder.mkdir()
    for name in CHAIN:
        shutil.copy(whole / name, folder)
    return folder


def hash_of(path: Path) -> str:
    """The hash of vhdkit's content."""
    with vhdkit.open_disk(path) as disk:
        return content_sha256(disk)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_merging_the_vhdutil_chain(chain: Path, depth: int) -> None:
    """INV-MERGE-PRESERVES: merged into each of its ancestors, the hash is that of `expected.json`, and if that is the
    base, qemu and libvhdi agree, as they do for what vhd-util itself coalesced."""
    assert hash_of(chain / "s3.vhd") == EXPECTED["s3.vhd"]
    target = chain / CHAIN[depth]
    vhdkit.merge(chain / "s3.vhd", into=target)
    assert sorted(path.name for path in chain.iterdir()) == sorted(CHAIN[depth:])
    assert hash_of(target) == EXPECTED["s3.vhd"]
    if depth == 3:
        assert sha256(qemu_content(target, chain)) == EXPECTED["s3.vhd"]
        assert run([require_pyvhdi(), "-c", PYVHDI, target]).stdout.strip() == EXPECTED["s3.vhd"]
        assert hash_of(target) == EXPECTED["collapsed/base.vhd"]


def test_merging_the_vhdutil_chain_into_a_new_file(chain: Path) -> None:
    """The new file has the leaf's disk; every file of the chain is unchanged."""
    before = {name: (chain / name).read_bytes() for name in CHAIN}
    vhdkit.merge(chain / "s3.vhd", into=chain / "base.vhd", to=chain / "new.vhd")
    assert {name: (chain / name).read_bytes() for name in CHAIN} == before
    assert hash_of(chain / "new.vhd") == sha256(qemu_content(chain / "new.vhd", chain)) == EXPECTED["s3.vhd"]


@pytest.mark.parametrize("base", [DiskFormat.DYNAMIC, DiskFormat.FIXED])
def test_other_programs_read_the_result(tmp_path: Path, base: DiskFormat) -> None:
    """A chain of five is merged into its base: `qemu-img check` where possible, and the same bytes in qemu and
    libvhdi."""
    shape = Shape(base, size=9 * (1 << 20) + 512, block_size=1 << 20)
    contents = grow_chain(tmp_path, shape, 4)
    vhdkit.merge(tmp_path / "4.vhd", into=tmp_path / "0.vhd")
    assert [path.name for path in tmp_path.iterdir()] == ["0.vhd"]
    assert content_of(tmp_path / "0.vhd") == contents[-1]
    assert qemu_content(tmp_path / "0.vhd", tmp_path)[: len(contents[-1])] == contents[-1]
    assert run([require_pyvhdi(), "-c", PYVHDI, tmp_path / "0.vhd"]).stdout.strip() == sha256(contents[-1])
    run([require_tool("qemu-img"), "info", "-f", "vpc", tmp_path / "0.vhd"])


@pytest.mark.parametrize("into", [0, 2])
@pytest.mark.parametrize("sector_bytes", [SECTOR, 4096])
def test_other_programs_read_a_merged_vhdx(tmp_path: Path, sector_bytes: int, into: int) -> None:
    """A chain of five is merged into its base or into a child, and 7-Zip reads the content; so does qemu, which finds
    no error, of an image without a parent whose sectors have 512 bytes."""
    size, paths = 9 * MIB + 8192, [tmp_path / f"{number}.vhdx" for number in range(5)]
    vhdkit.create_image(paths[0], size, disk_format=DiskFormat.VHDX, block_size_bytes=MIB, sector_bytes=sector_bytes)
    for number, path in enumerate(paths):
        if number:
            vhdkit.create_child(path, paths[number - 1], block_size_bytes=(2 if number == 3 else 1) * MIB)
        with vhdkit.open_disk(path, writable=True) as disk:
            scribble(disk, bytearray(size), number)
            erase(disk, bytearray(size), number)
    model = content_of(paths[4])
    vhdkit.merge(paths[4], into=paths[into])
    assert sorted(tmp_path.iterdir()) == paths[: into + 1] and vhdkit.check(paths[into]) == []
    assert content_of(paths[into]) == model
    extracted = subprocess.run(
        [require_tool("7zz"), "x", "-so", "-tVHDX", paths[into]], capture_output=True, check=True, timeout=60
    )
    assert extracted.stdout == model
    if into == 0 and sector_bytes == SECTOR:
        raw = tmp_path / "raw"
        raw.write_bytes(model)
        run([require_tool("qemu-img"), "check", "-f", "vhdx", paths[into]])
        run([require_tool("qemu-img"), "compare", "-f", "vhdx", "-F", "raw", paths[into], raw])
