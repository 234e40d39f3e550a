# SPDX-License-Identifier: Apache-2.0
"""Comparing disks of any kinds."""

from __future__ import annotations

from pathlib import Path

import pytest

import vhdkit
from vhdkit import DiskFormat
from vhdkit.chain.engine import blockmap
from vhdkit.chain.engine.ahead import Ahead
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.verbs.compare import compare_chains
from vhdkit.units import MIB, SECTOR_SIZE


def image(path: Path, size: int, writes: dict[int, bytes], disk_format: DiskFormat = DiskFormat.DYNAMIC) -> Path:
    """Make an image with these bytes at these offsets."""
    vhdkit.create_image(path, size, disk_format=disk_format)
    with vhdkit.open_disk(path, writable=True) as disk:
        for offset, data in writes.items():
            disk.write(offset, data)
    return path


@pytest.mark.parametrize("one", list(DiskFormat))
@pytest.mark.parametrize("other", list(DiskFormat))
def test_same_content_in_any_formats(tmp_path: Path, one: DiskFormat, other: DiskFormat) -> None:
    """Equal disks compare equal in any format, also where one holds written zeros and the other nothing."""
    writes = {0: b"a" * 1000, 5 * MIB + 3: b"b"}
    first = image(tmp_path / "1.img", 8 * MIB, writes | {3 * MIB: bytes(MIB)}, one)
    second = image(tmp_path / "2.img", 8 * MIB, writes, other)
    result = vhdkit.compare(first, second)
    assert result.same_content and result.first_difference_bytes is None


def test_first_difference_and_count(tmp_path: Path) -> None:
    """The first differing byte is reported exactly, and the differing sectors are counted."""
    first = image(tmp_path / "1.vhd", 8 * MIB, {0: b"a", 4 * MIB: b"x" * 2000})
    second = image(tmp_path / "2.vhd", 8 * MIB, {0: b"a", 4 * MIB: b"x" * 700 + b"y" + b"x" * 1299, 7 * MIB: b"z"})
    result = vhdkit.compare(first, second)
    assert result.first_difference_bytes == 4 * MIB + 700
    assert result.different_sector_count == 2
    assert not result.same_content


def test_a_longer_disk_is_compared_with_zeros(tmp_path: Path) -> None:
    """Past the end of the shorter disk only nonzero bytes differ."""
    first = image(tmp_path / "1.vhd", 4 * MIB, {0: b"a"})
    second = image(tmp_path / "2.vhd", 4 * MIB + 3 * SECTOR_SIZE, {0: b"a", 4 * MIB: bytes(SECTOR_SIZE)})
    assert vhdkit.compare(first, second).same_content
    with vhdkit.open_disk(second, writable=True) as disk:
        disk.write(4 * MIB + 600, b"!")
    for pair in ((first, second), (second, first)):
        result = vhdkit.compare(*pair)
        assert (result.first_difference_bytes, result.different_sector_count) == (4 * MIB + 600, 1)


def test_shared_layers_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a child and its parent both take from the parent's file is equal without being read."""
    base = image(tmp_path / "base.vhd", 8 * MIB, {0: b"a" * 6 * MIB})
    child = tmp_path / "child.avhd"
    vhdkit.create_child(child, base)
    with vhdkit.open_disk(child, writable=True) as disk:
        disk.write(MIB, b"b" * SECTOR_SIZE)
    reads: list[int] = []
    read = Ahead.read_into

    def counted(self: Ahead, sector_index: int, buffer: memoryview) -> None:
        reads.append(len(buffer))
        read(self, sector_index, buffer)

    monkeypatch.setattr(Ahead, "read_into", counted)
    result = vhdkit.compare(base, child)
    assert (result.first_difference_bytes, result.different_sector_count) == (MIB, 1)
    assert sum(reads) == 2 * SECTOR_SIZE


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    """Progress never falls, and ends at the size of the longer disk."""
    first = image(tmp_path / "1.vhd", 4 * MIB, {0: b"a" * 3 * MIB})
    second = image(tmp_path / "2.vhd", 6 * MIB, {0: b"a" * 3 * MIB})
    seen: list[tuple[int, int]] = []
    vhdkit.compare(first, second, progress=lambda *step: seen.append(step))
    assert seen == sorted(seen) and seen[-1] == (6 * MIB, 6 * MIB)


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains of large disks are compared in bounded memory: the ownership of a block is forgotten afterwards."""
    image(tmp_path / "base.vhd", 40 * MIB, {number * 2 * MIB: b"base" for number in range(20)})
    vhdkit.create_child(tmp_path / "leaf.avhd", tmp_path / "base.vhd")
    with vhdkit.open_disk(tmp_path / "leaf.avhd", writable=True) as disk:
        for number in range(20):
            disk.write(number * 2 * MIB + 8192, b"leaf")
    monkeypatch.setattr(blockmap, "WALK_MIXED_BYTES", 3 * 4096)
    with Chain.open(tmp_path / "leaf.avhd") as one, Chain.open(tmp_path / "leaf.avhd") as other:
        list(one.extents(0, one.size_bytes // SECTOR_SIZE))
        assert len(one.map.known) == 20
    with Chain.open(tmp_path / "leaf.avhd") as one, Chain.open(tmp_path / "leaf.avhd") as other:
        assert compare_chains(one, other).same_content
        assert 0 < len(one.map.known) <= 3 and 0 < len(other.map.known) <= 3
