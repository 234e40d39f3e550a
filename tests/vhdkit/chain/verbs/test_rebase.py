# SPDX-License-Identifier: Apache-2.0
"""Repointing a child to its moved parent."""

from __future__ import annotations

from pathlib import Path

import pytest

import vhdkit
from tests.harness.killing import killings
from vhdkit import errors
from vhdkit.chain.verbs.describe import describe_image
from vhdkit.descriptor import close_all
from vhdkit.formats.vhd.dynamic import DynamicImage

MIB = 1 << 20


@pytest.fixture
def moved(tmp_path: Path) -> tuple[Path, Path]:
    """A child with content, and the new place of its parent, in a subfolder."""
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
    """After a rebase the chain opens without options, for reading and writing, with its old content."""
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
    """INV-PARENT-ID: an image with another id is refused, and no byte of the child changes."""
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


def test_rebase_applies_the_notes_of_a_killed_server(moved: tuple[Path, Path], tmp_path: Path) -> None:
    """INV-ANSWERED-SURVIVES: a rebase with the folder of notes keeps the writes that a killed server had answered."""
    child, parent = moved
    (tmp_path / "notes").mkdir()
    options = vhdkit.OpenOptions(notes_folder=tmp_path / "notes")
    vhdkit.rebase(child, parent)
    disk = vhdkit.open_disk(child, writable=True, options=options)
    disk.write(MIB, b"answered" * 64)
    leaf = disk.chain.leaf
    assert isinstance(leaf, DynamicImage) and leaf._commit._notes is not None
    leaf._commit._notes.leave()  # killed: nothing is flushed
    close_all(layer.store for layer in disk.chain.layers)
    assert list((tmp_path / "notes").iterdir())
    vhdkit.rebase(child, parent, options=options)
    with vhdkit.open_disk(child) as disk:
        assert disk.read(MIB, 512) == b"answered" * 64
    assert not list((tmp_path / "notes").iterdir())


def test_rebase_refuses_images_without_a_parent(moved: tuple[Path, Path]) -> None:
    """A dynamic image has nothing to repoint; an image cannot be its own parent."""
    child, parent = moved
    with pytest.raises(errors.InvalidArgument, match="has no parent"):
        vhdkit.rebase(parent, child)
    with pytest.raises(errors.InvalidArgument, match="its own parent"):
        vhdkit.rebase(child, child)


def test_rebase_onto_a_raw_disk_needs_permission(tmp_path: Path) -> None:
    """INV-PARENT-ID: without a recorded id any raw file would fit, so the user must allow it."""
    (tmp_path / "base.raw").write_bytes(b"r" * MIB)
    child = tmp_path / "child.avhd"
    vhdkit.create_child(child, tmp_path / "base.raw")
    moved = (tmp_path / "base.raw").rename(tmp_path / "moved.raw")
    with pytest.raises(errors.ParentRefused, match="--allow-raw-parent"):
        vhdkit.rebase(child, moved)
    vhdkit.rebase(child, moved, options=vhdkit.OpenOptions(allow_raw_parent=True))
    with vhdkit.open_disk(child, options=vhdkit.OpenOptions(allow_raw_parent=True)) as disk:
        assert disk.read(0, 1) == b"r"


def test_another_id_needs_the_same_content(moved: tuple[Path, Path], tmp_path: Path) -> None:
    """INV-PARENT-ID: a copy with another id is accepted only if every sector read through the parent is equal."""
    child, parent = moved
    options = vhdkit.OpenOptions(parent_dirs=(str(parent.parent),))
    copy = tmp_path / "copy.vhd"
    vhdkit.convert(parent, copy, vhdkit.DiskFormat.FIXED)
    with vhdkit.open_disk(copy, writable=True) as disk:
        disk.write(3 * MIB, b"hidden by..the")  # where the child has its own data: never read
        disk.write(2 * MIB, b"!")
    before = child.read_bytes()
    with pytest.raises(errors.ParentMismatch, match=r"1 sectors, first at byte 0x200000"):
        vhdkit.rebase(child, copy, unsafe_new_id=True, options=options)
    with pytest.raises(errors.ParentMismatch, match="--unsafe-new-id"):
        vhdkit.rebase(child, copy, options=options)
    assert child.read_bytes() == before
    with vhdkit.open_disk(copy, writable=True) as disk:
        disk.write_zeroes(2 * MIB, 512)
    vhdkit.rebase(child, copy, unsafe_new_id=True, options=options, dry_run=True)
    assert child.read_bytes() == before
    vhdkit.rebase(child, copy, unsafe_new_id=True, options=options)
    parent.unlink()
    with vhdkit.open_disk(child, writable=True) as disk:
        assert disk.read(0, 13) == b"from the base"
        assert disk.read(3 * MIB, 14) == b"from the child"
    assert [finding for finding in vhdkit.check(child) if finding.severity > vhdkit.Severity.NOTE] == []


def test_without_the_old_parent_nothing_can_be_compared(moved: tuple[Path, Path], tmp_path: Path) -> None:
    """Without the recorded parent another one is refused, unless the child reads nothing through it."""
    child, parent = moved
    parent.unlink()
    other = tmp_path / "other.vhd"
    vhdkit.create_image(other, 4 * MIB)
    before = child.read_bytes()
    with pytest.raises(errors.ParentMissing, match="nothing to compare") as caught:
        vhdkit.rebase(child, other, unsafe_new_id=True)
    assert caught.value.exit_code == 6 and child.read_bytes() == before
    whole = tmp_path / "whole.avhd"
    gone = tmp_path / "gone.vhd"
    vhdkit.create_image(gone, MIB)
    vhdkit.create_child(whole, gone)
    with vhdkit.open_disk(whole, writable=True) as disk:
        disk.write(0, b"w" * MIB)
    gone.unlink()
    vhdkit.rebase(whole, other, unsafe_new_id=True)
    with vhdkit.open_disk(whole) as disk:
        assert disk.read(0, MIB) == b"w" * MIB


def test_an_image_cannot_become_its_own_ancestor(moved: tuple[Path, Path], tmp_path: Path) -> None:
    """CHAIN_LOOP cannot arise: a child of the image is refused as its parent, whatever its content."""
    child, parent = moved
    vhdkit.rebase(child, parent)
    grandchild = tmp_path / "grandchild.avhd"
    vhdkit.create_child(grandchild, child)
    with pytest.raises(errors.VhdkitError):
        vhdkit.rebase(child, grandchild, unsafe_new_id=True)
    with vhdkit.open_disk(grandchild) as disk:
        assert disk.read(0, 13) == b"from the base"


def test_a_raw_disk_as_another_parent(moved: tuple[Path, Path], tmp_path: Path) -> None:
    """A raw copy has no id to record: the user must also allow a raw parent, then and on the way back."""
    child, parent = moved
    raw = tmp_path / "copy.raw"
    vhdkit.convert(parent, raw, vhdkit.DiskFormat.RAW)
    near = vhdkit.OpenOptions(parent_dirs=(str(parent.parent),))
    with pytest.raises(errors.ParentRefused, match="--allow-raw-parent"):
        vhdkit.rebase(child, raw, unsafe_new_id=True, options=near)
    trusting = vhdkit.OpenOptions(parent_dirs=(str(parent.parent),), allow_raw_parent=True)
    vhdkit.rebase(child, raw, unsafe_new_id=True, options=trusting)
    with vhdkit.open_disk(child, options=trusting) as disk:
        assert disk.read(0, 13) == b"from the base"
    vhdkit.rebase(child, parent, unsafe_new_id=True, options=trusting)
    with vhdkit.open_disk(child, options=near) as disk:
        assert disk.read(0, 13) == b"from the base"


def test_killed_at_any_call_it_has_the_old_parent_or_the_new(moved: tuple[Path, Path], tmp_path: Path) -> None:
    """INV-PARENT-ID: killed at any call, the chain opens with its old or its new parent, and reads the same."""
    child, parent = moved
    options = vhdkit.OpenOptions(parent_dirs=(str(parent.parent),))
    copy = tmp_path / "copy.vhd"
    vhdkit.convert(parent, copy, vhdkit.DiskFormat.DYNAMIC)
    vhdkit.rebase(child, parent)
    before, seen = child.read_bytes(), set()
    for _ in killings(lambda: vhdkit.rebase(child, copy, unsafe_new_id=True, options=options)):
        parents = describe_image(child, options=options).parent
        assert parents is not None
        seen.add(parents.path)
        with vhdkit.open_disk(child, writable=True, options=options) as disk:
            assert (disk.read(0, 13), disk.read(3 * MIB, 14)) == (b"from the base", b"from the child")
        child.write_bytes(before)
    assert seen == {str(parent), str(copy)}


def test_a_size_without_an_id(tmp_path: Path) -> None:
    """A size is accepted only together with the parent's id; alone it would be ignored."""
    with pytest.raises(vhdkit.InvalidArgument, match="requires accept_parent_id"):
        vhdkit.rebase(tmp_path / "child.vhd", tmp_path / "parent.vhd", accept_parent_size_bytes="4M")
