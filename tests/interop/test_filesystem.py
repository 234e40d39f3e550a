# SPDX-License-Identifier: Apache-2.0
"""Real file systems inside chains: the verdict of their own tools after vhdkit moved every sector."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

import vhdkit
from tests.interop.disks import MIB, SECTOR
from tests.support import require_tool, run
from vhdkit import DiskFormat

pytestmark = pytest.mark.interop

EXT_BYTES = 24 * MIB
FAT_BYTES = 8 * MIB
PAGE = 4096


def _files(seed: int, count: int) -> dict[str, bytes]:
    """Names and contents: empty, tiny, and larger than a block of the file system."""
    rng = random.Random(seed)
    return {f"file-{seed}-{number}.bin": rng.randbytes(number * number * 5000) for number in range(count)}


def _store_files(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _write_changes(old: bytes, new: bytes, image: Path) -> int:
    """Write the differences, page by page, as a guest would; returns how many pages."""
    changed = 0
    with vhdkit.open_disk(image, writable=True) as disk:
        for offset in range(0, len(new), PAGE):
            page = new[offset : offset + PAGE]
            if page != old[offset : offset + PAGE]:
                disk.write(offset, page)
                changed += 1
    return changed


def _layer(raw: Path, before: bytes, folder: Path, number: int) -> bytes:
    """Add child `number`, which makes the disk equal to `raw`; returns its content."""
    after = raw.read_bytes()
    vhdkit.create_child(folder / f"{number}.vhd", folder / f"{number - 1}.vhd")
    assert 0 < _write_changes(before, after, folder / f"{number}.vhd") < len(after) // PAGE // 2
    return after


def _make_ext(raw: Path, source: Path) -> None:
    with raw.open("wb") as file:
        file.truncate(EXT_BYTES)
    run([require_tool("mke2fs"), "-q", "-F", "-t", "ext4", "-d", str(source), str(raw)])


def _debugfs_write(raw: Path, *requests: str) -> None:
    for request in requests:
        run([require_tool("debugfs"), "-w", "-R", request, str(raw)])


def _assert_ext_holds(image: Path, files: dict[str, bytes], folder: Path) -> None:
    """e2fsck reports nothing, and debugfs finds exactly these files with these contents."""
    run([require_tool("e2fsck"), "-f", "-n", str(image)])
    out = folder / f"out-{image.name}"
    out.mkdir()
    run([require_tool("debugfs"), "-R", f"rdump / {out}", str(image)])
    found = {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert found == files


def test_ext4_in_a_chain(tmp_path: Path) -> None:
    """A tree made by mke2fs, changed in two layers: every layer, converted to raw and fixed, is clean and correct."""
    raw, source = tmp_path / "disk.img", tmp_path / "tree"
    trees = [_files(1, 8)]
    _store_files(source, trees[0])
    _make_ext(raw, source)
    content = raw.read_bytes()
    vhdkit.convert(raw, tmp_path / "0.vhd", DiskFormat.DYNAMIC, sync=False)
    for number in (1, 2):
        added = _files(number + 1, 6)
        _store_files(source, added)
        gone = sorted(trees[-1])[3]
        _debugfs_write(raw, f"rm /{gone}", *(f"write {source / name} {name}" for name in added))
        trees.append({name: data for name, data in trees[-1].items() if name != gone} | added)
        content = _layer(raw, content, tmp_path, number)
    for number, tree in enumerate(trees):
        for disk_format in (DiskFormat.RAW, DiskFormat.FIXED):
            flat = tmp_path / f"flat-{number}.{disk_format}"
            vhdkit.convert(tmp_path / f"{number}.vhd", flat, disk_format, sync=False)
            _assert_ext_holds(flat, tree, tmp_path)


def test_e2fsck_notices_a_lost_layer(tmp_path: Path) -> None:
    """Self-test: with the metadata of one layer and the data of another the same check fails."""
    raw, source = tmp_path / "disk.img", tmp_path / "tree"
    _store_files(source, _files(1, 8))
    _make_ext(raw, source)
    before = raw.read_bytes()
    _debugfs_write(raw, f"rm /{sorted(_files(1, 8))[7]}")
    mixed = bytearray(raw.read_bytes())
    pages = [at for at in range(0, len(mixed), PAGE) if mixed[at : at + PAGE] != before[at : at + PAGE]]
    mixed[pages[0] : pages[0] + PAGE] = before[pages[0] : pages[0] + PAGE]
    raw.write_bytes(mixed)
    done = subprocess.run([require_tool("e2fsck"), "-f", "-n", str(raw)], capture_output=True, check=False)
    assert done.returncode != 0


def _mtools(command: str, image: Path, *arguments: str) -> None:
    run([require_tool(command), "-i", str(image), *arguments])


def _assert_fat_holds(image: Path, files: dict[str, bytes], folder: Path) -> None:
    """fsck.fat reports nothing, and mtools finds exactly these files with these contents."""
    out = folder / f"out-{image.name}"
    out.mkdir()
    _mtools("mcopy", image, "-s", "-n", "::*", str(out))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files
    run([require_tool("fsck.fat"), "-n", str(image)])


def test_fat_in_a_chain(tmp_path: Path) -> None:
    """Files that mtools wrote in three layers are in the fixed VHD and the raw disk made from each layer."""
    raw, source = tmp_path / "disk.img", tmp_path / "tree"
    with raw.open("wb") as file:
        file.truncate(FAT_BYTES)
    run([require_tool("mkfs.fat"), str(raw)])
    trees = [_files(1, 6)]
    _store_files(source, trees[0])
    _mtools("mcopy", raw, *(str(source / name) for name in trees[0]), "::")
    content = raw.read_bytes()
    vhdkit.convert(raw, tmp_path / "0.vhd", DiskFormat.DYNAMIC, sync=False)
    for number in (1, 2):
        added, gone = _files(number + 1, 5), sorted(trees[-1])[2]
        _store_files(source, added)
        _mtools("mdel", raw, f"::{gone}")
        _mtools("mcopy", raw, *(str(source / name) for name in added), "::")
        trees.append({name: data for name, data in trees[-1].items() if name != gone} | added)
        content = _layer(raw, content, tmp_path, number)
    for number, tree in enumerate(trees):
        for disk_format in (DiskFormat.RAW, DiskFormat.FIXED):
            flat = tmp_path / f"flat-{number}.{disk_format}"
            vhdkit.convert(tmp_path / f"{number}.vhd", flat, disk_format, sync=False)
            _assert_fat_holds(flat, tree, tmp_path)


def test_mtools_write_into_our_fixed_vhd(tmp_path: Path) -> None:
    """A file that mtools writes directly to a fixed VHD is on the disk that vhdkit shows, and the image stays
    sound."""
    image, raw, name = tmp_path / "fat.vhd", tmp_path / "disk.img", "hello.txt"
    vhdkit.create_image(image, FAT_BYTES, disk_format=DiskFormat.FIXED)
    sectors = FAT_BYTES // SECTOR
    run([require_tool("mkfs.fat"), str(image), str(sectors // 2)])  # it counts in KiB, and the footer stays
    (tmp_path / name).write_bytes(b"hello\n" * 9999)
    _mtools("mcopy", image, str(tmp_path / name), "::")
    assert vhdkit.check(image) == []
    vhdkit.convert(image, raw, DiskFormat.RAW, sync=False)
    _assert_fat_holds(raw, {name: b"hello\n" * 9999}, tmp_path)
