# SPDX-License-Identifier: Apache-2.0
"""Every real image in the samples opens with the right hash, or is refused with the documented error."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import expected_samples, sample, samples_dir
from vhdkit import errors
from vhdkit.chain.names.opening import open_layers
from vhdkit.chain.names.options import OpenOptions
from vhdkit.disk import Disk, open_disk
from vhdkit.formats.vhd.dump import dump_vhd
from vhdkit.formats.vhd.dynamic import DynamicImage
from vhdkit.formats.vhd.metadata import read_metadata
from vhdkit.formats.vhd.opening import open_dynamic
from vhdkit.image import ExtentKind
from vhdkit.store import FileStore
from vhdkit.units import GIB, MIB, TIB

pytestmark = pytest.mark.interop

ORPHAN = "dfvfs/fat-differential.vhd"
SINGLE = expected_samples()
QEMU = expected_samples("peer-qemu/expected.json")
VHDUTIL: dict[str, Any] = expected_samples("peer-vhdutil/expected.json")
ARCHIVED = {
    "docker-explorer": "docker-explorer/vhdx_files.tgz",
    "qemu": "peer-qemu/qemu.tar.xz",
    "vhdutil": "peer-vhdutil/vhdutil-chain.tar.xz",
}


def content_hash(disk: Disk) -> str:
    """SHA-256 of the whole virtual content; runs of zeros are hashed without being read."""
    digest, zeros = hashlib.sha256(), bytes(MIB)
    for extent in disk.extents():
        for offset in range(extent.offset_bytes, extent.offset_bytes + extent.size_bytes, MIB):
            size = min(MIB, extent.offset_bytes + extent.size_bytes - offset)
            digest.update(disk.read(offset, size) if extent.kind is ExtentKind.DATA else zeros[:size])
    return digest.hexdigest()


def whole_hash(disk: Disk) -> str:
    """SHA-256 of the whole virtual content, every byte read."""
    digest = hashlib.sha256()
    for offset in range(0, disk.size_bytes, MIB):
        digest.update(disk.read(offset, min(MIB, disk.size_bytes - offset)))
    return digest.hexdigest()


def _unpack(archive: Path, folder: Path) -> None:
    """The regular files of an archive, holes kept as holes."""
    with tarfile.open(archive) as tar:
        for member in tar:
            source = tar.extractfile(member)
            if source is None:
                continue
            path = folder / Path(member.name).name
            with path.open("wb") as target:
                while piece := source.read(MIB):
                    if piece.count(0) == len(piece):
                        target.seek(len(piece), os.SEEK_CUR)
                    else:
                        target.write(piece)
                target.truncate(member.size)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder for each archive, with its files."""
    folders = {}
    for name, archive in ARCHIVED.items():
        folders[name] = tmp_path_factory.mktemp(name)
        _unpack(sample(archive), folders[name])
    return folders


def _single(name: str, tmp_path: Path) -> Path:
    """A sample that is packed alone, unpacked under its own name."""
    samples_dir()  # skips where there are none, before the name is looked up
    packed = sample(SINGLE[name]["packed"])
    path = tmp_path / Path(name).name
    raw = gzip.decompress(packed.read_bytes()) if packed.suffix == ".gz" else bz2.decompress(packed.read_bytes())
    path.write_bytes(raw)
    return path


def test_every_sample_is_tested() -> None:
    """Every packed file in the folder belongs to a test below; a new one must be added here."""
    folder = samples_dir()
    packed = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    packed = {path for path in packed if not path.startswith("hyperv-machines/")}  # machines' definitions, no images
    described = {entry["packed"] for entry in SINGLE.values()} | set(ARCHIVED.values())
    assert {path for path in packed if not path.endswith((".json", ".md", ".txt"))} == described


@pytest.mark.parametrize("name", [name for name in SINGLE if name.endswith(".vhd") and name != ORPHAN])
def test_a_single_vhd_reads_as_nine_readers_agree(name: str, tmp_path: Path) -> None:
    """Size and content are those of the samples' README; there is no finding, and opening it changed no byte."""
    path, expected = _single(name, tmp_path), SINGLE[name]
    with open_disk(path) as disk:
        assert disk.size_bytes == expected["virtual_size_bytes"]
        assert content_hash(disk) == expected["content_sha256"]
    with FileStore.open(path) as store:
        metadata = read_metadata(store)
        assert metadata.findings == () and expected["type"] == f"VHD {metadata.kind}"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == expected["file_sha256"]


def _vhdx(unpacked: dict[str, Path], tmp_path: Path) -> Iterator[Path]:
    for name in SINGLE:
        if name.endswith(".vhdx"):
            yield (
                unpacked["docker-explorer"] / Path(name).name
                if name.startswith("docker-explorer/")
                else _single(name, tmp_path)
            )
    yield from sorted(unpacked["qemu"].glob("*.vhdx"))


def test_every_vhdx_reads_as_several_readers_agree(unpacked: dict[str, Path], tmp_path: Path) -> None:
    """The content is that of the samples' page, also over a dirty log; no byte of the file changes."""
    expected = {Path(name).name: entry for name, entry in SINGLE.items() if name.endswith(".vhdx")}
    for path in _vhdx(unpacked, tmp_path):
        if path.name not in expected:
            continue
        one, before = expected.pop(path.name), hashlib.sha256(path.read_bytes()).hexdigest()
        with open_disk(path) as disk:
            assert disk.size_bytes == one["virtual_size_bytes"]
            if disk.size_bytes <= GIB:
                assert content_hash(disk) == one["content_sha256"], path.name
            codes = [finding.code for layer in disk.chain.layers for finding in layer.findings]
            assert codes == (["log-not-replayed"] if "DIRTY" in one["type"] else [])
        assert hashlib.sha256(path.read_bytes()).hexdigest() == before == one["file_sha256"]
    assert not expected


def test_every_vhdx_reads_the_same_once_it_was_written_to(unpacked: dict[str, Path], tmp_path: Path) -> None:
    """Opening a copy for writing replays its log for good; the content is the same, and qemu-img finds no fault."""
    for path in _vhdx(unpacked, tmp_path):
        expected = {Path(name).name: entry for name, entry in SINGLE.items()}.get(path.name)
        if expected is None or expected["virtual_size_bytes"] > GIB or "differencing" in expected["type"]:
            continue
        copy = tmp_path / f"copy-{path.name}"
        shutil.copy(path, copy)
        with open_disk(copy, writable=True) as disk:
            sector = disk.read(0, 512)
            disk.write(0, sector)
        with open_disk(copy) as disk:
            assert content_hash(disk) == expected["content_sha256"], path.name
        subprocess.run(["qemu-img", "check", copy], check=True, capture_output=True)


def test_qemu_vhdx_images(unpacked: dict[str, Path]) -> None:
    """VHDX written by qemu-img: each block size it was asked for."""
    seen = 0
    for path in sorted(unpacked["qemu"].glob("*.vhdx")):
        expected = QEMU.get(path.name)
        if expected is None:
            with open_disk(path) as disk:  # too large to be hashed
                assert disk.size_bytes >= TIB
            continue
        with open_disk(path) as disk:
            assert disk.size_bytes == expected["virtual_size"], path.name
            assert whole_hash(disk) == expected["sha256"], path.name
        seen += 1
    assert seen >= 5


def test_qemu_images(unpacked: dict[str, Path]) -> None:
    """Fixed and dynamic, force_size on and off (CHS or current size), odd and tiny sizes."""
    seen = set()
    for path in sorted(unpacked["qemu"].glob("*-vpc-*.vhd")):
        expected = QEMU[path.name]
        with open_disk(path) as disk:
            assert (disk.size_bytes, whole_hash(disk)) == (expected["virtual_size"], expected["sha256"]), path.name
            assert content_hash(disk) == expected["sha256"], path.name
        seen.add(path.name)
    assert {f"{size}-vpc-{kind}-fs{force}.vhd" for size in ("odd", "tiny") for kind in ("dynamic", "fixed")
            for force in ("on", "off")} <= seen  # fmt: skip


def test_a_qemu_image_of_130_gib_is_empty(unpacked: dict[str, Path]) -> None:
    """It is larger than CHS can describe: the current size counts, and the whole disk is one run of zeros."""
    with open_disk(unpacked["qemu"] / "empty-130G.vhd") as disk:
        assert disk.size_bytes == 130 << 30
        assert [(one.kind, one.layer_index) for one in disk.extents()] == [(ExtentKind.ZERO, -1)]


def test_a_qemu_image_written_at_one_tebibyte(unpacked: dict[str, Path]) -> None:
    """Data at a high offset is found there, and nowhere else."""
    with open_disk(unpacked["qemu"] / "far-1T.vhd") as disk:
        assert disk.size_bytes == TIB
        blocks = [one for one in disk.extents() if one.kind is ExtentKind.DATA]
        assert blocks and all(disk.read(one.offset_bytes, one.size_bytes).strip(b"\0") for one in blocks)
        assert max(one.offset_bytes + one.size_bytes for one in blocks) > TIB // 2


@pytest.mark.parametrize("name", ["base.vhd", "s1.vhd", "s2.vhd", "s3.vhd", "resized.vhd", "fixed.vhd"])
def test_vhdutil_images_and_chains(name: str, unpacked: dict[str, Path]) -> None:
    """XenServer's base, three children with partial bitmaps and batmaps, a resized and a fixed disk."""
    with open_disk(unpacked["vhdutil"] / name) as disk:
        assert whole_hash(disk) == VHDUTIL[name]
        assert content_hash(disk) == VHDUTIL[name]


def test_vhdutil_chain_has_four_layers_and_partial_bitmaps(unpacked: dict[str, Path]) -> None:
    """The chain is as in the README: s3, s2, s1, base, leaf first; some child block has a partial bitmap."""
    layers = open_layers(unpacked["vhdutil"] / "s3.vhd")
    try:
        assert [Path(one.store.name).name for one in layers] == ["s3.vhd", "s2.vhd", "s1.vhd", "base.vhd"]
        children = [one for one in layers[:3] if isinstance(one, DynamicImage)]
        assert all(one.metadata.batmap is not None for one in children) and len(children) == 3
        owned = [
            one.owned_sectors(block) for one in children for block in one.allocated_blocks().nonzero()[0].tolist()
        ]
        assert any(bits is not None and bits.any() for bits in owned)
    finally:
        for one in layers:
            one.close()


def test_the_orphan_names_its_parent_and_every_place(tmp_path: Path) -> None:
    """The error for Windows' differencing image without its parent names the parent, its id and the places
    searched."""
    path = _single(ORPHAN, tmp_path)
    for writable in (False, True):
        with pytest.raises(errors.ParentMissing) as caught:
            open_disk(path, writable=writable)
        text = str(caught.value)
        assert "fat-parent.vhd" in text and str(tmp_path / "fat-parent.vhd") in text
        assert "5fa21a55-f394-aa4d-9958-1951a67d5540" in text and "--allow-parent-dir" in text
    other = tmp_path / "elsewhere"
    other.mkdir()
    with pytest.raises(errors.ParentMissing) as caught:
        open_disk(path, options=OpenOptions(parent_dirs=(str(other),)))
    assert str(other / "fat-parent.vhd") in str(caught.value)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SINGLE[ORPHAN]["file_sha256"]


def test_the_orphans_metadata_still_reads(tmp_path: Path) -> None:
    """With a missing parent, the image itself, its locators and its partial bitmap are readable."""
    with FileStore.open(_single(ORPHAN, tmp_path)) as store:
        metadata = read_metadata(store)
        assert (metadata.kind, metadata.size_bytes) == ("differencing", 4 * MIB)
        assert [(one.platform_code, one.text) for one in metadata.locators] == [
            (b"W2ku", "C:\\Projects\\dfvfs\\test_data\\fat-parent.vhd"),
            (b"W2ru", ".\\fat-parent.vhd"),
        ]
        assert {one.structure for one in dump_vhd(store)} >= {"footer", "footer copy", "dynamic header"}
        layer = open_dynamic(store)
        (block,) = layer.allocated_blocks().nonzero()[0].tolist()
        raw = store.pread(layer.bat.block_start(block), 512)
        assert bytes(one for one in raw if one).startswith(bytes.fromhex("0201ffcba8"))
        owned = layer.owned_sectors(block)
        assert owned is not None
        bits = "".join("1" if one else "0" for one in owned.tolist())
        assert bits == "".join(f"{byte:08b}" for byte in raw)[: len(bits)]  # the most significant bit first


def test_a_stand_in_with_another_id_is_not_the_orphans_parent(tmp_path: Path) -> None:
    """INV-PARENT-ID: a disk with the parent's name and another id is refused."""
    path = _single(ORPHAN, tmp_path)
    _single("dfvfs/ext2.vhd", tmp_path).rename(tmp_path / "fat-parent.vhd")
    with pytest.raises(errors.ParentMismatch, match="another disk"):
        open_disk(path)
