# SPDX-License-Identifier: Apache-2.0
"""dissect.hypervisor reads our fixed and dynamic images as we do. It does not support differencing ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.disks import (
    DYNAMIC_SHAPES,
    FIXED_SHAPES,
    MIB,
    SECTOR,
    Shape,
    content_of,
    create_with_content,
    grow_chain,
)
from tests.support import require_module
from vhdkit import DiskFormat, convert

pytestmark = pytest.mark.interop


def _dissect(path: Path) -> bytes:
    """dissect's content of the image."""
    require_module("dissect.hypervisor")
    from dissect.hypervisor.disk.vhd import VHD

    with path.open("rb") as file:
        disk = VHD(file)
        content: bytes = disk.read(disk.size)
    return content


@pytest.mark.parametrize("shape", FIXED_SHAPES + DYNAMIC_SHAPES, ids=str)
def test_what_we_create_reads_the_same_in_dissect(tmp_path: Path, shape: Shape) -> None:
    """Size and content of fixed and dynamic images agree; dissect ignores bitmaps, so sectors never written must be
    zeros."""
    path = tmp_path / "ours.vhd"
    expected = create_with_content(path, shape)
    assert content_of(path) == expected
    assert _dissect(path) == expected


@pytest.mark.parametrize("disk_format", [DiskFormat.FIXED, DiskFormat.DYNAMIC])
def test_a_converted_chain_reads_the_same_in_dissect(tmp_path: Path, disk_format: DiskFormat) -> None:
    """dissect reads the image made from a chain of three as the chain's disk."""
    path = tmp_path / "flat.vhd"
    contents = grow_chain(tmp_path, Shape(DiskFormat.DYNAMIC, 5 * MIB + SECTOR), 2)
    convert(tmp_path / "2.vhd", path, disk_format, sync=False)
    assert _dissect(path) == contents[2]
