# SPDX-License-Identifier: Apache-2.0
"""Raw images: every byte belongs to the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.stores import MemStore
from tests.harness.vhd_builder import MIB, pattern
from vhdkit.errors import InvalidArgument
from vhdkit.finding import Severity
from vhdkit.formats.raw import create_raw, examine_raw, open_raw
from vhdkit.image import Extent, ExtentKind, read_extents
from vhdkit.store import FileStore


def _store(raw: bytes) -> MemStore:
    store = MemStore("disk.img")
    store.pwrite(0, raw)
    return store


def test_a_raw_image_is_its_bytes() -> None:
    """All sectors are owned, each at its own offset."""
    store = _store(pattern(4096))
    store.frozen = True
    layer = open_raw(store)
    buffer = bytearray(1024)
    read_extents(store, layer.extents(3, 2), memoryview(buffer))
    assert buffer == pattern(4096)[1536:2560]
    assert (layer.size_bytes, layer.writable, layer.unowned) == (4096, False, ExtentKind.ZERO)


@pytest.mark.parametrize(("size", "disk"), [(1, 512), (511, 512), (512, 512), (513, 1024)])
def test_a_partial_last_sector_is_filled_with_zeros(size: int, disk: int) -> None:
    """The disk is rounded up to whole sectors, the rest of the last one is zeros, and a note says so."""
    store = _store(b"x" * size)
    layer = open_raw(store)
    assert layer.size_bytes == disk
    buffer = bytearray(b"?" * disk)
    read_extents(store, layer.extents(0, disk // 512), memoryview(buffer))
    assert buffer == (b"x" * size).ljust(disk, b"\0")
    findings = examine_raw(store)
    assert [one.severity for one in findings] == ([] if size == disk else [Severity.NOTE])


def test_a_partial_last_sector_of_a_real_file_is_data(tmp_path: Path) -> None:
    """The file's data ends inside the sector; the sector is data all the same."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"x" * 513)
    with FileStore.open(path) as store:
        layer = open_raw(store)
        assert list(layer.extents(0, 2)) == [Extent(0, 2, ExtentKind.DATA, 0, 0)]


def test_an_empty_file_is_not_a_disk() -> None:
    """A disk has at least one sector."""
    with pytest.raises(InvalidArgument, match="empty"):
        open_raw(MemStore())


def test_a_new_raw_image_is_a_single_hole() -> None:
    """A new image has its size and no data; after a write it has one run of data."""
    store = MemStore()
    create_raw(store, MIB)
    layer = open_raw(store, writable=True)
    assert list(layer.extents(0, 2048)) == [Extent(0, 2048, ExtentKind.ZERO)]
    layer.write(8, memoryview(pattern(512)))
    layer.flush()
    assert list(layer.extents(8, 1)) == [Extent(8, 1, ExtentKind.DATA, 0, 4096)]
    assert store.size() == MIB
