# SPDX-License-Identifier: Apache-2.0
"""New images under a name, and children of existing images."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import vhdkit
from vhdkit import DiskFormat, OpenOptions, errors
from vhdkit.chain.verbs.describe import describe_image
from vhdkit.units import GIB, KIB, MIB


@pytest.mark.parametrize("disk_format", list(DiskFormat))
def test_new_images_are_zeros(tmp_path: Path, disk_format: DiskFormat) -> None:
    """A new image has the requested size, reads as zeros, takes hardly any space and is sound."""
    path = tmp_path / "new.img"
    assert vhdkit.create_image(path, 20 * MIB, disk_format=disk_format) == 20 * MIB
    with vhdkit.open_disk(path) as disk:
        assert disk.read(0, disk.size_bytes) == bytes(20 * MIB)
    log = MIB if disk_format in (DiskFormat.VHDX, DiskFormat.VHDX_FIXED) else 0  # has its space from the beginning
    assert path.stat().st_blocks * 512 < (256 * KIB + log if log else 64 * KIB)
    assert vhdkit.check(path) == []


@pytest.mark.parametrize("disk_format", [DiskFormat.FIXED, DiskFormat.RAW])
def test_preallocated_images_have_their_space(tmp_path: Path, disk_format: DiskFormat) -> None:
    """With `preallocate` the space is reserved."""
    path = tmp_path / "new.img"
    vhdkit.create_image(path, 20 * MIB, disk_format=disk_format, preallocate=True)
    assert path.stat().st_blocks * 512 >= 20 * MIB
    with pytest.raises(errors.InvalidArgument, match="preallocated"):
        vhdkit.create_image(tmp_path / "no.vhd", MIB, preallocate=True)


@pytest.mark.parametrize("size", [0, -512, 1, 511, 513, 2040 * GIB + 512, 1 << 70])
@pytest.mark.parametrize("disk_format", [DiskFormat.DYNAMIC, DiskFormat.FIXED])
def test_impossible_sizes_are_refused(tmp_path: Path, size: int, disk_format: DiskFormat) -> None:
    """Sizes that a VHD cannot have are refused before a file is made."""
    with pytest.raises(errors.InvalidArgument):
        vhdkit.create_image(tmp_path / "new.vhd", size, disk_format=disk_format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("disk_format", [DiskFormat.VHDX, DiskFormat.VHDX_FIXED])
def test_a_vhdx_has_whole_pages(tmp_path: Path, disk_format: DiskFormat) -> None:
    """Windows makes no others, and 7-Zip refuses some of them: the error names the next larger size."""
    with pytest.raises(errors.InvalidArgument, match=f"multiple of 4096 bytes.*next larger size is {2 * MIB + 4096}"):
        vhdkit.create_image(tmp_path / "new.vhdx", 2 * MIB + 512, disk_format=disk_format)
    assert list(tmp_path.iterdir()) == []


def test_the_largest_disk_can_be_made(tmp_path: Path) -> None:
    """2040 GiB, the limit, works; one more sector does not (see above)."""
    for disk_format in (DiskFormat.DYNAMIC, DiskFormat.FIXED):
        path = tmp_path / f"{disk_format}.vhd"
        vhdkit.create_image(path, 2040 * GIB, disk_format=disk_format)
        with vhdkit.open_disk(path, writable=True) as disk:
            disk.write(2040 * GIB - 512, b"e" * 512)
        with vhdkit.open_disk(path) as disk:
            assert disk.read(2040 * GIB - 1024, 1024) == bytes(512) + b"e" * 512


@pytest.mark.parametrize("size", [0, 4096, 256 * KIB, 3 * MIB, 512 * MIB])
def test_impossible_block_sizes_are_refused(tmp_path: Path, size: int) -> None:
    """Block sizes are powers of two from 512 KiB to 256 MiB."""
    with pytest.raises(errors.InvalidArgument, match="block size"):
        vhdkit.create_image(tmp_path / "new.vhd", GIB, block_size_bytes=size)


def test_azure_images_are_whole_mib(tmp_path: Path) -> None:
    """The size of Azure's fixed VHD is rounded up, and the new size is returned."""
    path = tmp_path / "azure.vhd"
    size = vhdkit.create_image(path, 5 * MIB + 512, disk_format=DiskFormat.FIXED, azure=True)
    assert size == 6 * MIB and path.stat().st_size == 6 * MIB + 512


def test_existing_files_are_kept(tmp_path: Path) -> None:
    """An existing file is replaced only on request, and not while it is open or the parent of an image."""
    path = tmp_path / "a.vhd"
    vhdkit.create_image(path, MIB)
    with pytest.raises(errors.AlreadyExists):
        vhdkit.create_image(path, 2 * MIB)
    with vhdkit.open_disk(path), pytest.raises(errors.ImageInUse):
        vhdkit.create_image(path, 2 * MIB, replace=True)
    vhdkit.create_child(tmp_path / "child.avhd", path)
    with pytest.raises(errors.HasChildren):
        vhdkit.create_image(path, 2 * MIB, replace=True)
    (tmp_path / "child.avhd").unlink()
    vhdkit.create_image(path, 2 * MIB, replace=True)
    assert describe_image(path).virtual_size_bytes == 2 * MIB


def test_a_child_reads_as_its_parent(tmp_path: Path) -> None:
    """A new child reads as its parent, has its size and block size, and owns nothing."""
    base, child = tmp_path / "base.vhd", tmp_path / "child.avhd"
    vhdkit.create_image(base, 5 * MIB, block_size_bytes=MIB)
    with vhdkit.open_disk(base, writable=True) as disk:
        disk.write(3 * MIB, b"from below")
    assert vhdkit.create_child(child, base) == 5 * MIB
    info = describe_image(child)
    assert info.block_size_bytes == MIB and info.allocated_block_count == 0
    assert info.parent is not None and info.parent.path == str(base)
    with vhdkit.open_disk(child) as disk:
        assert disk.read(3 * MIB, 10) == b"from below"


@pytest.mark.parametrize("place", ["same", "below", "beside"])
def test_a_child_names_its_parent_wherever_it_is(tmp_path: Path, place: str) -> None:
    """Relative and absolute locators lead from the child to its parent, whatever folders they are in."""
    base = tmp_path / {"same": "b ä.vhd", "below": "sub/b.vhd", "beside": "../other/b.vhd"}[place]
    folder = tmp_path / "children"
    folder.mkdir()
    base = (folder / base.name) if place == "same" else (folder / "sub/b.vhd" if place == "below" else base)
    if place == "beside":
        base = tmp_path / "other/b.vhd"
    base.parent.mkdir(exist_ok=True)
    vhdkit.create_image(base, MIB)
    vhdkit.create_child(folder / "child.avhd", base)
    options = OpenOptions(parent_dirs=(str(base.parent),) if place == "beside" else ())
    vhdkit.open_disk(folder / "child.avhd", options=options).close()
    parent = describe_image(folder / "child.avhd", options=options).parent
    assert parent is not None and parent.path == str(base)
    texts = dict(parent.locators)
    assert texts["W2ku"] == str(base).replace("/", "\\")
    assert texts["W2ru"] == {"same": ".\\b ä.vhd", "below": ".\\sub\\b.vhd", "beside": "..\\other\\b.vhd"}[place]


def test_children_may_grow_but_not_shrink(tmp_path: Path) -> None:
    """A child may be larger than its parent, but not smaller."""
    base = tmp_path / "base.vhd"
    vhdkit.create_image(base, 4 * MIB)
    assert vhdkit.create_child(tmp_path / "large.avhd", base, size_bytes=9 * MIB) == 9 * MIB
    with pytest.raises(errors.InvalidArgument, match="smaller"):
        vhdkit.create_child(tmp_path / "small.avhd", base, size_bytes=2 * MIB)


def test_children_of_broken_or_busy_parents_are_refused(tmp_path: Path) -> None:
    """The whole chain below must open, and no program may be writing to it."""
    base, middle = tmp_path / "base.vhd", tmp_path / "middle.avhd"
    vhdkit.create_image(base, MIB)
    vhdkit.create_child(middle, base)
    with vhdkit.open_disk(middle, writable=True), pytest.raises(errors.ImageInUse):
        vhdkit.create_child(tmp_path / "leaf.avhd", middle)
    base.unlink()
    with pytest.raises(errors.ParentMissing):
        vhdkit.create_child(tmp_path / "leaf.avhd", middle)
    with pytest.raises(errors.NotFound):
        vhdkit.create_child(tmp_path / "leaf.avhd", tmp_path / "nothing.vhd")
    assert [one.name for one in tmp_path.iterdir()] == ["middle.avhd"]


def test_a_child_of_a_raw_disk(tmp_path: Path) -> None:
    """A raw parent has no id, so opening the child needs the user's permission."""
    raw = tmp_path / "base.raw"
    raw.write_bytes(b"r" * MIB)
    vhdkit.create_child(tmp_path / "child.avhd", raw)
    with pytest.raises(errors.ParentRefused):
        vhdkit.open_disk(tmp_path / "child.avhd")
    with vhdkit.open_disk(tmp_path / "child.avhd", options=OpenOptions(allow_raw_parent=True)) as disk:
        assert disk.read(0, 10) == b"r" * 10


def test_a_child_never_replaces_its_own_chain(tmp_path: Path) -> None:
    """Even with `replace`, a child does not take its parent's name."""
    base = tmp_path / "base.vhd"
    vhdkit.create_image(base, MIB)
    with pytest.raises(errors.InvalidArgument, match="part of the source chain"):
        vhdkit.create_child(base, base, replace=True)
    assert describe_image(base).kind == "dynamic"


def test_a_parents_name_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    """A name with bytes that are not UTF-8 cannot be stored in a VHD: a clear error, and no file is made."""
    base = os.fsencode(tmp_path) + b"/b\xff.vhd"
    vhdkit.create_image(os.fsdecode(base), MIB)
    with pytest.raises(errors.InvalidArgument, match="rename"):
        vhdkit.create_child(tmp_path / "child.avhd", os.fsdecode(base))
    assert not (tmp_path / "child.avhd").exists()


def test_parents_that_a_child_cannot_name_are_refused(tmp_path: Path) -> None:
    """With a backslash in the path, or a device as parent, the child could never be opened, so it is not made."""
    odd = tmp_path / "a\\b.vhd"
    vhdkit.create_image(odd, MIB)
    with pytest.raises(errors.InvalidArgument, match="backslash"):
        vhdkit.create_child(tmp_path / "child.avhd", odd)
    with pytest.raises(errors.InvalidArgument):
        vhdkit.create_child(tmp_path / "child.avhd", "/dev/null")
    assert not (tmp_path / "child.avhd").exists()
