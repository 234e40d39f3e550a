# SPDX-License-Identifier: Apache-2.0
"""The upper layers of a chain as a child of another image: content, sizes, refusals, failures and power cuts."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

import vhdkit
from tests.harness.folder_power import Cut, FolderPower, files_of, fill, repeatable
from tests.harness.killing import killings
from tests.support import daily_or_nightly
from tests.vhdkit.chain.verbs.test_merge import FAMILIES, Family, content
from tests.vhdkit.test_disk_full import small_tmpfs
from vhdkit import DiskFormat, OpenOptions, errors
from vhdkit.chain.names import opening
from vhdkit.units import KIB, MIB, SECTOR_SIZE

__all__ = ["small_tmpfs"]
SIZE = 4 * MIB
formats = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def write_some(path: Path, rng: random.Random, count: int) -> None:
    """Write data and zeros at random places of the disk."""
    with vhdkit.open_disk(path, writable=True) as disk:
        for _ in range(count):
            size = rng.choice((SECTOR_SIZE, 5000, 70_000, 600 * KIB))
            offset = rng.randrange(disk.size_bytes - size)
            if rng.random() < 0.3:
                disk.write_zeroes(offset, size)
            else:
                disk.write(offset, rng.randbytes(size))


def make_source(folder: Path, family: Family, depth: int, rng: random.Random, *, growing: bool = False) -> list[Path]:
    """A chain, leaf first, each layer with data and zeros; if it is `growing`, each is larger than the one below."""
    folder.mkdir()
    paths = [folder / family.child(f"layer{number}") for number in range(depth - 1)] + [folder / family.base]
    vhdkit.create_image(paths[-1], SIZE, disk_format=family.kind, block_size_bytes=family.block_size_bytes)
    write_some(paths[-1], rng, 6)
    for number in reversed(range(depth - 1)):
        vhdkit.create_child(paths[number], paths[number + 1])
        if growing:
            vhdkit.resize(paths[number], SIZE + (depth - number) * 300 * KIB)
        write_some(paths[number], rng, 4)
    return paths


def make_twin(folder: Path, path: Path, kind: DiskFormat | str = DiskFormat.DYNAMIC) -> Path:
    """An image elsewhere that reads like the one at `path`."""
    folder.mkdir(exist_ok=True)
    twin = folder / f"night.{ {DiskFormat.VHDX: 'vhdx', DiskFormat.RAW: 'img'}.get(DiskFormat(kind), 'vhd') }"
    vhdkit.convert(path, twin, kind)
    return twin


@pytest.mark.parametrize("growing", [pytest.param(False, marks=pytest.mark.nightly), True])
@formats
def test_a_chain_of_copies_reads_like_its_source(family: Family, growing: bool, tmp_path: Path) -> None:
    """Night after night the layers above the last night's are copied to a child of that night's image: each reads as
    the disk did, holds only what its layers own, and needs nothing of the source."""
    rng = random.Random(f"{family.base} {growing}")
    source = make_source(tmp_path / "source", family, 6, rng, growing=growing)
    before = files_of(tmp_path / "source")
    repository = tmp_path / "repository"
    nights = [make_twin(repository, source[-1], family.kind)]
    expected = [content(source[-1])]
    told: list[tuple[int, int]] = []
    for upper, lower in ((3, 5), (2, 3), (0, 2)):
        new = repository / family.child(f"night{upper}")
        told.clear()
        found = vhdkit.copy_layers(
            source[upper], new, above=source[lower], parent=nights[-1], progress=lambda *now: told.append(now)
        )
        assert found.copied == tuple(str(one) for one in source[upper:lower])
        assert (found.path, found.parent) == (str(new), str(nights[-1]))
        assert told[-1][0] == told[-1][1] > 0
        assert os.stat(new).st_blocks * 512 < found.data_bytes + found.block_count * 8 * KIB + 6 * MIB
        nights.append(new)
        expected.append(content(source[upper]))
        assert found.size_bytes == len(expected[-1])
    assert files_of(tmp_path / "source") == before
    shutil.rmtree(tmp_path / "source")
    assert [content(one) for one in nights] == expected
    assert [one for night in nights for one in vhdkit.check(night) if one.severity is vhdkit.Severity.ERROR] == []
    with vhdkit.open_disk(nights[-1], writable=True) as disk:
        disk.write(0, b"restored")


def simple(folder: Path, family: Family) -> tuple[list[Path], Path]:
    """A chain of three, and in another folder an image that reads like its base."""
    source = make_source(folder / "source", family, 3, random.Random(1))
    return source, make_twin(folder / "repository", source[-1], family.kind)


@pytest.mark.parametrize(
    ("base", "kind", "block_size", "found"),
    [
        ("vhd", DiskFormat.VHDX, None, 2 * MIB),  # 512 KiB, which a VHDX cannot have: that of the parent
        ("vhdx", DiskFormat.DYNAMIC, None, MIB),
        ("vhd", DiskFormat.FIXED, None, 512 * KIB),
        ("vhd", DiskFormat.RAW, 4 * MIB, 4 * MIB),
    ],
)
def test_other_formats_and_block_sizes(
    base: str, kind: DiskFormat, block_size: int | None, found: int, tmp_path: Path
) -> None:
    """The copy is a child of its parent's format, in blocks of the requested size, by default those of the layers."""
    source = make_source(tmp_path / "source", FAMILIES[base], 3, random.Random(base))
    options = OpenOptions(allow_raw_parent=True)
    parent = make_twin(tmp_path / "repository", source[-1], kind)
    new = parent.with_name("new.avhdx" if kind is DiskFormat.VHDX else "new.avhd")
    vhdkit.copy_layers(source[0], new, above=source[-1], parent=parent, block_size_bytes=block_size, options=options)
    assert content(new) == content(source[0])
    with vhdkit.open_disk(new, options=options) as disk:
        assert disk.chain.leaf.block_size_bytes == found and len(disk.chain.layers) == 2


@formats
def test_what_is_refused(family: Family, tmp_path: Path) -> None:
    """A wrong layer, a parent that does not read alike, a name that is taken: nothing is made."""
    source, parent = simple(tmp_path, family)
    new = parent.with_name(family.child("new"))
    with pytest.raises(errors.InvalidArgument, match="not an ancestor"):
        vhdkit.copy_layers(source[0], new, above=parent, parent=parent)
    with pytest.raises(errors.InvalidArgument, match="itself"):
        vhdkit.copy_layers(source[0], new, above=source[0], parent=parent)
    with pytest.raises(errors.ParentMismatch, match="does not read like"):
        vhdkit.copy_layers(source[0], new, above=source[1], parent=parent)
    with pytest.raises(errors.AlreadyExists):
        vhdkit.copy_layers(source[0], parent, above=source[2], parent=parent)
    with vhdkit.open_disk(parent, writable=True), pytest.raises(errors.ImageInUse):
        vhdkit.copy_layers(source[0], new, above=source[2], parent=parent)
    with vhdkit.open_disk(source[0], writable=True), pytest.raises(errors.ImageInUse):
        vhdkit.copy_layers(source[0], new, above=source[2], parent=parent)
    vhdkit.resize(parent, SIZE + MIB)
    with pytest.raises(errors.ParentMismatch, match="another size"):
        vhdkit.copy_layers(source[0], new, above=source[2], parent=parent)
    assert os.listdir(parent.parent) == [parent.name]


def test_a_copy_that_could_not_be_opened_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy is refused where it would be one layer too many."""
    source, parent = simple(tmp_path, FAMILIES["vhd"])
    lower, new = tmp_path / "lower.vhd", tmp_path / "new.avhd"
    vhdkit.create_child(lower, parent, options=OpenOptions(parent_dirs=(parent.parent,)))
    monkeypatch.setattr(opening, "MAX_CHAIN_DEPTH", 2)
    options = OpenOptions(parent_dirs=(parent.parent,))
    with pytest.raises(errors.InvalidArgument, match="its chain would have 3 layers"):
        vhdkit.copy_layers(source[1], new, above=source[2], parent=lower, parent_options=options)
    assert not new.exists()


def test_an_image_whose_merge_was_interrupted_is_refused(tmp_path: Path) -> None:
    """The target of a merge that was still copying is a mixture, and the images of a merge may be removed."""
    source, parent = simple(tmp_path, FAMILIES["vhd"])
    new, other = tmp_path / "new.avhd", tmp_path / "other.avhd"

    def stop(done: int, total: int) -> None:
        raise errors.Cancelled("enough")

    with pytest.raises(errors.Cancelled):
        vhdkit.merge(source[0], into=source[1], progress=stop)
    for leaf, above, below in ((source[1], source[2], parent), (source[0], source[2], source[1])):
        with pytest.raises(errors.ImageInUse, match="was interrupted"):
            vhdkit.copy_layers(leaf, new, above=above, parent=below, same_parent=True)
    vhdkit.copy_layers(source[0], other, above=source[2], parent=parent, options=OpenOptions((parent.parent,)))
    assert content_of(other, parent.parent) == content(source[0]) and not new.exists()


def content_of(path: Path, folder: Path) -> bytes:
    """The whole disk, whose parent lies in that folder."""
    with vhdkit.open_disk(path, options=OpenOptions((folder,))) as disk:
        return disk.read(0, disk.size_bytes)


def test_a_layer_with_smaller_sectors_than_the_parent_is_refused(tmp_path: Path) -> None:
    """Sectors of 512 bytes cannot be owned by a child with sectors of 4096."""
    source = make_source(tmp_path / "source", FAMILIES["vhdx"], 2, random.Random(1))
    parent = tmp_path / "parent.vhdx"
    vhdkit.create_image(parent, SIZE, disk_format=DiskFormat.VHDX, sector_bytes=4096)
    with pytest.raises(errors.InvalidArgument, match="sectors of 512 bytes"):
        vhdkit.copy_layers(source[0], tmp_path / "new.avhdx", above=source[1], parent=parent)


def test_a_caller_who_knows_the_parents_has_them_not_compared(tmp_path: Path) -> None:
    """With `same_parent` the parents are not read: only what the layers own is."""
    family = FAMILIES["vhd"]
    source, parent = simple(tmp_path, family)
    write_some(parent, random.Random(3), 1)  # the caller is wrong
    new = parent.with_name(family.child("new"))
    with pytest.raises(errors.ParentMismatch):
        vhdkit.copy_layers(source[0], new, above=source[2], parent=parent)
    vhdkit.copy_layers(source[0], new, above=source[2], parent=parent, same_parent=True)
    assert content(new) != content(source[0])


@formats
def test_killed_at_every_call(family: Family, tmp_path: Path) -> None:
    """Killed before any call that changes a file, the copy is there as a whole or not at all; then it can be made."""
    source, parent = simple(tmp_path, family)
    new, before = parent.with_name(family.child("new")), files_of(tmp_path)
    expected, seen = content(source[0]), set()
    for _ in killings(
        lambda: vhdkit.copy_layers(source[0], new, above=source[2], parent=parent), step=daily_or_nightly(23, 1)
    ):
        seen.add(new.exists())
        if new.exists():
            assert content(new) == expected
            new.unlink()
        vhdkit.copy_layers(source[0], new, above=source[2], parent=parent)
        assert content(new) == expected
        new.unlink()
        assert {name: raw for name, raw in files_of(tmp_path).items() if ".vhdkit-" not in name} == before
    assert seen == {False, True}


@pytest.mark.parametrize("name", ["vhd", pytest.param("vhdx", marks=pytest.mark.nightly)])
def test_every_power_cut(name: str, tmp_path: Path) -> None:
    """INV-MERGE-PRESERVES: after a power cut the source and the parent are as before, and the copy, if it has its
    name, is complete."""
    family, work, found = FAMILIES[name], tmp_path / "work", tmp_path / "found"
    work.mkdir()
    with repeatable("copy"):
        source, parent = simple(work, family)
        expected, kept = content(source[0]), files_of(work)
        states = set()

        def judge(cut: Cut) -> None:
            fill(found, cut.files)
            assert {name: cut.files[name] for name in kept} == kept
            new = found / "repository" / family.child("new")
            states.add(new.exists())
            if new.exists():
                assert content(new) == expected

        new = parent.with_name(family.child("new"))
        FolderPower(work, "copy", judge=judge).run(
            lambda: vhdkit.copy_layers(source[0], new, above=source[2], parent=parent)
        )
    assert states == {False, True}


def test_a_full_disk_and_ctrl_c_leave_nothing(small_tmpfs: Path, tmp_path: Path) -> None:
    """If the file system is full, or the caller stops it, the copy is dropped whole."""
    base, leaf = tmp_path / "base.vhd", tmp_path / "leaf.avhd"
    vhdkit.create_image(base, 64 * MIB)
    vhdkit.create_child(leaf, base)
    parent, new = small_tmpfs / "night.vhd", small_tmpfs / "new.avhd"
    vhdkit.convert(base, parent, DiskFormat.DYNAMIC)
    with vhdkit.open_disk(leaf, writable=True) as disk:
        disk.write(0, os.urandom(MIB))
        disk.write(8 * MIB, os.urandom(3 * MIB))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vhdkit.copy_layers(leaf, new, above=base, parent=parent, same_parent=True, progress=stop)
    assert os.listdir(small_tmpfs) == [parent.name]
    with pytest.raises(errors.NoSpace):
        vhdkit.copy_layers(leaf, new, above=base, parent=parent)
    assert os.listdir(small_tmpfs) == [parent.name]
