# SPDX-License-Identifier: Apache-2.0
"""Repointing a child to its moved parent."""

from __future__ import annotations

from pathlib import Path

import pytest

import vhdkit
from vhdkit import errors

MIB = 1 << 20


@pytest.fixture
def moved(tmp_path: Path) -> tuple[Path, Path]:
    """A child with content and the new place of its parent, in a folder below."""
    base, child = tmp_path / "base.vhd", tmp_path / "child.avhd"
    vhdkit.create_image(base, 4 * MIB)
    with vhdkit.open_disk(base, writable=True) as disk:
        disk.write(0, b"from the base")
    vhdkit.create_child(child, base)
    with vhdkit.open_disk(child, writable=True) as disk:
        disk.write(3 * MIB, b"from the child")
    (tmp_path / "a b").mkdir()
    return child, base.rename(tmp_path / "a b" / "bäse.vhd")


def test_rebase_finds_the_moved_parent_again(moved: tuple[Path, Path]) -> None:
    """After a rebase the chain opens by itself, for reading and writing, with its old content."""
    child, parent = moved
    with pytest.raises(errors.ParentMissing, match=r"vhdkit rebase .*child\.avhd --parent PARENT"):
        vhdkit.open_disk(child)
    vhdkit.rebase(child, parent)
    with vhdkit.open_disk(child, writable=True) as disk:
        assert disk.read(0, 13) == b"from the base"
        assert disk.read(3 * MIB, 14) == b"from the child"
        disk.write(MIB, b"more")
    assert [finding for finding in vhdkit.check(child) if finding.severity > vhdkit.Severity.NOTE] == []


def test_rebase_refuses_another_disk(moved: tuple[Path, Path], tmp_path: Path) -> None:
    """INV-PARENT-ID: an image with another id is refused, and the child is not changed by a byte."""
    child, _ = moved
    before = child.read_bytes()
    other = tmp_path / "other.vhd"
    vhdkit.create_image(other, 4 * MIB)
    with pytest.raises(errors.ParentMismatch):
        vhdkit.rebase(child, other)
    assert child.read_bytes() == before


def test_rebase_refuses_an_image_in_use(moved: tuple[Path, Path]) -> None:
    """A child that is open is not repointed under its reader."""
    child, parent = moved
    vhdkit.rebase(child, parent)
    with vhdkit.open_disk(child), pytest.raises(errors.ImageInUse):
        vhdkit.rebase(child, parent)


def test_rebase_refuses_images_without_a_parent(moved: tuple[Path, Path]) -> None:
    """A dynamic image has nothing to repoint; an image is not its own parent."""
    child, parent = moved
    with pytest.raises(errors.InvalidArgument, match="has no parent"):
        vhdkit.rebase(parent, child)
    with pytest.raises(errors.InvalidArgument, match="its own parent"):
        vhdkit.rebase(child, child)


def test_rebase_onto_a_raw_disk_needs_permission(tmp_path: Path) -> None:
    """INV-PARENT-ID: where no id was recorded any raw file would fit, so the user has to say so."""
    (tmp_path / "base.raw").write_bytes(b"r" * MIB)
    child = tmp_path / "child.avhd"
    vhdkit.create_child(child, tmp_path / "base.raw")
    moved = (tmp_path / "base.raw").rename(tmp_path / "moved.raw")
    with pytest.raises(errors.ParentRefused, match="--allow-raw-parent"):
        vhdkit.rebase(child, moved)
    vhdkit.rebase(child, moved, options=vhdkit.OpenOptions(allow_raw_parent=True))
    with vhdkit.open_disk(child, options=vhdkit.OpenOptions(allow_raw_parent=True)) as disk:
        assert disk.read(0, 1) == b"r"
