# SPDX-License-Identifier: Apache-2.0
"""Every real image with the library's verbs: streamed, checked, described, and refused where it must be.

`test_samples.py` has their content.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import pytest

import vhdkit
from tests.interop.disks import MIB, SECTOR, content_of, content_sha256, unpack_tar
from tests.interop.qemu import qemu_content
from tests.support import expected_samples, require_tool, sample
from vhdkit.chain.verbs.describe import describe_chain, describe_image
from vhdkit.chain.verbs.stream import export_stream, import_stream
from vhdkit.finding import Severity
from vhdkit.formats.vhd.dump import dump_vhd
from vhdkit.store import FileStore

pytestmark = pytest.mark.interop

ORPHAN = "dfvfs/fat-differential.vhd"
ORPHANS_PARENT = "fat-parent.vhd"
ORPHANS_PARENT_ID = "5fa21a55-f394-aa4d-9958-1951a67d5540"
FIXED = "node-vhd/fixed.vhd"
SAMPLES = expected_samples()
VHD_SAMPLES = [name for name in SAMPLES if name.endswith(".vhd") and name != ORPHAN]
VHDX_SAMPLES = [name for name in SAMPLES if name.endswith(".vhdx")]
QEMU_ARCHIVE = "peer-qemu/qemu.tar.xz"
VHDUTIL_ARCHIVE = "peer-vhdutil/vhdutil-chain.tar.xz"
TOO_LARGE_TO_HASH = {"empty-130G.vhd", "far-1T.vhd"}
KINDS = {"VHD fixed": "fixed", "VHD dynamic": "dynamic"}
_OPENERS: dict[str, Callable[[Path], BufferedIOBase]] = {".bz2": bz2.BZ2File, ".gz": gzip.GzipFile}

Unpack = Callable[[str], Path]


@pytest.fixture(scope="module")
def unpack(tmp_path_factory: pytest.TempPathFactory) -> Unpack:
    """A function that unpacks one of the packed samples, once, and returns its folder."""
    folder = tmp_path_factory.mktemp("samples")

    @cache
    def unpack_once(packed: str) -> Path:
        source = sample(packed)
        target = folder / packed.replace("/", "-")
        target.mkdir()
        if source.suffix in _OPENERS:
            with _OPENERS[source.suffix](source) as reader, (target / source.stem).open("wb") as writer:
                shutil.copyfileobj(reader, writer, MIB)
        else:
            unpack_tar(source, target)
        return target

    return unpack_once


def _find(unpack: Unpack, name: str) -> Path:
    """The unpacked file of an entry in the main `expected.json`, verified to be the right one."""
    packed: str = SAMPLES[name]["packed"]
    path = unpack(packed) / Path(name).relative_to(Path(packed).parent)
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == SAMPLES[name]["file_sha256"]
    return path


def _streamed_sha256(path: Path) -> str:
    """The SHA-256 of what `vhdkit convert` sends into a pipe."""
    digest = hashlib.sha256()
    with vhdkit.open_disk(path) as disk:
        export_stream(disk.chain, digest.update, vhdkit.DiskFormat.RAW)
    return digest.hexdigest()


def _hashes(paths: list[Path]) -> dict[str, tuple[str, str]]:
    """(hash of the disk in pieces that do not match blocks, hash of the stream) of each image, by file name."""
    found = {}
    for path in paths:
        with vhdkit.open_disk(path) as disk:
            found[path.name] = (content_sha256(disk), _streamed_sha256(path))
    return found


def _errors(path: Path) -> list[str]:
    return [str(one) for one in vhdkit.check(path) if one.severity is vhdkit.Severity.ERROR]


@pytest.mark.parametrize("name", VHD_SAMPLES)
def test_streaming_checking_and_describing_a_single_vhd(unpack: Unpack, name: str) -> None:
    """A disk of Windows or qemu streams its content, has no error, and is of the kind and creator that it states."""
    path, expected = _find(unpack, name), SAMPLES[name]
    assert _hashes([path]) == {path.name: (expected["content_sha256"],) * 2}
    assert _errors(path) == []
    info = describe_image(path)
    assert (info.kind, info.virtual_size_bytes) == (KINDS[expected["type"]], expected["virtual_size_bytes"])
    creator, version = expected["creator"].strip("'").split("'")
    assert (info.creator, info.creator_version) == (creator.rstrip(), version.strip())


def test_a_fixed_vhd_from_a_pipe(unpack: Unpack, tmp_path: Path) -> None:
    """Windows' fixed VHD, read as a stream, makes a raw disk without the footer."""
    packed, raw = sample("node-vhd/fixed.vhd.gz"), tmp_path / "disk.img"
    with gzip.GzipFile(packed) as file:
        import_stream(file.read, raw, vhdkit.DiskFormat.RAW, sync=False)
    assert raw.stat().st_size == SAMPLES[FIXED]["virtual_size_bytes"]
    assert hashlib.sha256(raw.read_bytes()).hexdigest() == SAMPLES[FIXED]["content_sha256"]


def test_streaming_checking_and_describing_vhds_of_qemu(unpack: Unpack) -> None:
    """Fixed and dynamic disks of qemu, with the size forced or rounded to CHS: size and stream are right, without
    errors."""
    images = sorted(unpack(QEMU_ARCHIVE).glob("*.vhd"))
    expected = expected_samples("peer-qemu/expected.json")
    paths = [path for path in images if path.name in expected]
    assert {path.name for path in images} - expected.keys() == TOO_LARGE_TO_HASH
    assert _hashes(paths) == {path.name: (expected[path.name]["sha256"],) * 2 for path in paths}
    sizes = {path.name: describe_image(path).virtual_size_bytes for path in paths}
    assert sizes == {path.name: expected[path.name]["virtual_size"] for path in paths}
    assert {path.name: _errors(path) for path in images} == {path.name: [] for path in images}


def test_streaming_checking_and_describing_chains_of_vhd_util(unpack: Unpack) -> None:
    """XenServer's base, children with partial bitmaps, resized and fixed disks: the stream and all layers are right,
    without errors."""
    images = sorted(unpack(VHDUTIL_ARCHIVE).glob("*.vhd"))
    expected: dict[str, Any] = expected_samples("peer-vhdutil/expected.json")
    assert {path.name for path in images} >= {"base.vhd", "s1.vhd", "s2.vhd", "s3.vhd"}
    assert _hashes(images) == {path.name: (expected[path.name],) * 2 for path in images}
    assert {path.name: _errors(path) for path in images} == {path.name: [] for path in images}
    chain = describe_chain(unpack(VHDUTIL_ARCHIVE) / "s3.vhd")
    assert chain.problem is None
    found = [(Path(one.image.path).name, one.image.kind) for one in chain.layers]
    assert found == [(f"s{number}.vhd", "differencing") for number in (3, 2, 1)] + [("base.vhd", "dynamic")]


def test_data_at_high_offsets_reads_as_in_qemu(unpack: Unpack, tmp_path: Path) -> None:
    """Three blocks on a disk of 1 TiB lie where qemu finds them, with the same content."""
    path = unpack(QEMU_ARCHIVE) / "far-1T.vhd"
    with vhdkit.open_disk(path) as disk:
        data = [one for one in disk.extents() if one.kind is vhdkit.ExtentKind.DATA]
        assert [one.size_bytes for one in data] == [2 * MIB] * 3
        for one in data:
            block = disk.read(one.offset_bytes, one.size_bytes)
            assert any(block)
            assert qemu_content(path, tmp_path, offset=one.offset_bytes, size=one.size_bytes) == block


def test_the_chain_from_windows_is_merged(unpack: Unpack, tmp_path: Path) -> None:
    """A differencing VHDX that Windows made is merged into its parent with default options; qemu and 7-Zip read the
    result as the recorded content, and nothing else is left."""
    names = [f"docker-explorer/vhdx_files/{name}.vhdx" for name in ("diff", "base")]
    for name in names:
        shutil.copyfile(_find(unpack, name), tmp_path / Path(name).name)
    vhdkit.merge(tmp_path / "diff.vhdx")
    assert [path.name for path in tmp_path.iterdir()] == ["base.vhdx"]
    merged = tmp_path / "base.vhdx"
    expected = SAMPLES[names[0]]["content_sha256"]
    with vhdkit.open_disk(merged) as disk:
        assert content_sha256(disk) == expected
    assert vhdkit.check(merged) == []
    subprocess.run([require_tool("qemu-img"), "check", "-q", merged], check=True, timeout=60)
    command = [require_tool("7zz"), "x", "-so", "-tVHDX", str(merged)]
    extracted = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    assert hashlib.sha256(extracted).hexdigest() == expected


@pytest.mark.parametrize("name", VHDX_SAMPLES)
def test_a_vhdx_is_one_under_any_name(unpack: Unpack, tmp_path: Path, name: str) -> None:
    """A VHDX is never taken for another format, also when it is called .vhd or .raw."""
    path = _find(unpack, name)
    for other in ("renamed.vhd", "renamed.raw", "renamed"):
        renamed = path.parent / other  # beside its parent
        renamed.symlink_to(path.name)
        try:
            assert describe_image(renamed).title.endswith("VHDX")
            with vhdkit.open_disk(renamed) as disk:
                assert disk.size_bytes == SAMPLES[name]["virtual_size_bytes"]
            assert not [one for one in vhdkit.check(renamed) if one.severity > Severity.NOTE]
        finally:
            renamed.unlink()


@pytest.fixture
def orphan(unpack: Unpack, tmp_path: Path) -> Path:
    """The differencing VHD without its parent, in its own folder."""
    sample("dfvfs/fat-differential.vhd.gz")
    folder = tmp_path / "orphan"
    folder.mkdir()
    return Path(shutil.copy(_find(unpack, ORPHAN), folder))


def test_an_orphans_error_lists_the_places_searched(orphan: Path, tmp_path: Path) -> None:
    """It lists both folders in which the parent was searched, in this order, and no other; then the command that
    helps."""
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(vhdkit.ParentMissing) as caught:
        vhdkit.open_disk(orphan, options=vhdkit.OpenOptions(parent_dirs=(str(other),)))
    said = str(caught.value)
    assert caught.value.path == str(orphan)
    assert f"{ORPHANS_PARENT} (id {ORPHANS_PARENT_ID}) was not found" in said
    places = said.partition("searched ")[2].partition(";")[0].split(", ")
    assert places == [str(orphan.parent / ORPHANS_PARENT), str(other / ORPHANS_PARENT)]
    assert f"vhdkit rebase {orphan} --parent" in said


def test_an_orphan_can_be_described(orphan: Path) -> None:
    """Facts and raw structures of an image need no parent; its absence is reported."""
    info = describe_image(orphan)
    assert (info.kind, info.virtual_size_bytes, info.allocated_block_count) == ("differencing", 4 * MIB, 1)
    assert info.parent is not None
    assert info.parent.path is None
    assert info.parent.problem is not None
    assert str(orphan.parent / ORPHANS_PARENT) in info.parent.problem
    chain = describe_chain(orphan)
    assert (len(chain.layers), chain.problem) == (1, info.parent.problem)
    with FileStore.open(orphan) as store:
        dumps = {one.structure: one for one in dump_vhd(store)}
    assert {one.state for one in dumps.values()} == {"good"}
    fields = {field.name: field.value for field in dumps["dynamic header"].fields}
    assert fields["parent_unique_id"] == ORPHANS_PARENT_ID.replace("-", "")


def test_an_orphan_is_found_by_check(orphan: Path) -> None:
    """The missing parent is the orphan's only fault."""
    found = [one for one in vhdkit.check(orphan) if one.severity is vhdkit.Severity.ERROR]
    assert [one.code for one in found] == ["parent-missing"]
    assert ORPHANS_PARENT in found[0].message


def test_reading_verbs_change_no_byte(unpack: Unpack, tmp_path: Path) -> None:
    """Opening, checking, describing and converting a chain change no byte of its files."""
    folder = unpack(VHDUTIL_ARCHIVE)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(content_of(folder / "s3.vhd")) % SECTOR == 0
    vhdkit.check(folder / "s3.vhd")
    describe_chain(folder / "s3.vhd")
    vhdkit.convert(folder / "s3.vhd", tmp_path / "raw.img", vhdkit.DiskFormat.RAW, sync=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
