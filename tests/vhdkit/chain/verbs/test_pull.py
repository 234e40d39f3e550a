# SPDX-License-Identifier: Apache-2.0
"""Filling images of real files: independent clones, layers left out, refusals, kills, failures, power cuts."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

import vhdkit
from tests.harness.folder_power import Cut, FolderPower, files_of, fill, repeatable
from tests.harness.killing import killings
from tests.harness.sparse_format import SPARSE
from tests.support import daily_or_nightly
from tests.vhdkit.chain.verbs.test_copy_layers import formats, make_source, write_some
from tests.vhdkit.chain.verbs.test_merge import FAMILIES, Family, content
from tests.vhdkit.test_disk_full import small_tmpfs
from vhdkit import DiskFormat, OpenOptions, errors
from vhdkit import formats as all_formats
from vhdkit.chain.names.marks import record_path
from vhdkit.units import MIB

__all__ = ["small_tmpfs"]


def make_chain(folder: Path, family: Family, *, child: bool = True) -> list[Path]:
    """A chain of four, leaf first; with a `child` the image that is pulled into, the second, has one."""
    paths = make_source(folder, family, 4 if child else 3, random.Random(family.base))
    return paths if child else [folder / "none", *paths]


def sound(path: Path) -> bool:
    """Whether `check` finds nothing at all wrong."""
    assert [one for one in vhdkit.check(path) if one.severity is not vhdkit.Severity.NOTE] == []
    return True


@formats
def test_an_independent_image_needs_no_parent(family: Family, tmp_path: Path) -> None:
    """A clone becomes a disk of its own: the parents can go, its child still finds it, and a resize, a compaction and
    a merge work on it as on any dynamic disk."""
    child, image, middle, base = make_chain(tmp_path / "chain", family)
    before, above = content(image), content(child)
    kept = {path: path.read_bytes() for path in (middle, base, child)}
    told: list[tuple[int, int]] = []
    planned = vhdkit.pull(image, independent=True, dry_run=True)
    assert planned.parent is None and planned.data_bytes > 0 and vhdkit.chain_paths(image)[1:]
    done = vhdkit.pull(image, independent=True, progress=lambda *now: told.append(now))
    assert done == planned and done.pulled == (str(middle), str(base)) and told[-1][0] == told[-1][1]
    assert {path: path.read_bytes() for path in kept} == kept
    assert content(image) == before and sound(image)
    middle.unlink()
    base.unlink()
    assert content(image) == before and content(child) == above and sound(child)
    assert vhdkit.chain_paths(image) == [str(image)]
    assert vhdkit.pull(image, independent=True) == vhdkit.Pull(str(image), (), None, len(before), 0, 0)
    vhdkit.merge(child, into=image)
    vhdkit.compact(image)
    vhdkit.resize(image, 8 * MIB)
    assert content(image) == above.ljust(8 * MIB, b"\0") and sound(image)


@formats
def test_pulling_fills_and_keeps_the_parents(family: Family, tmp_path: Path) -> None:
    """Without more the image keeps its parent; what it showed of the pulled layers it owns, and pulling again copies
    nothing."""
    child, image, middle, base = make_chain(tmp_path / "chain", family)
    before, above = content(image), content(child)
    done = vhdkit.pull(image, to=middle)
    assert (done.pulled, done.parent) == ((str(middle),), str(middle)) and done.data_bytes > 0
    with vhdkit.open_disk(image) as disk:
        assert all(one.layer_index != 1 for one in disk.extents())
    assert vhdkit.pull(image, to=middle).data_bytes == 0
    assert vhdkit.pull(image).pulled == (str(middle), str(base))
    with vhdkit.open_disk(image) as disk:
        assert {one.layer_index for one in disk.extents() if one.kind is vhdkit.ExtentKind.DATA} == {0}
    assert vhdkit.chain_paths(child) == [str(one) for one in (child, image, middle, base)]
    assert content(image) == before and content(child) == above and sound(child)


@formats
def test_layers_are_left_out(family: Family, tmp_path: Path) -> None:
    """Relinked, the image stands on the layer below the pulled ones, in another folder, which has its mark; the layer
    that was left out keeps its other child."""
    elsewhere = tmp_path / "elsewhere"
    chain = make_source(elsewhere, family, 2, random.Random(3))
    options = OpenOptions(parent_dirs=(elsewhere,))
    folder = tmp_path / "chain"
    folder.mkdir()
    middle, image, other, child = (folder / family.child(name) for name in ("middle", "image", "other", "child"))
    vhdkit.create_child(middle, chain[0], options=options)
    write_with(middle, options, 1)
    vhdkit.clone(middle, [image, other], options=options)
    write_with(image, options, 2)
    vhdkit.create_child(child, image, options=options)
    before = content_with(image, options)
    done = vhdkit.pull(image, to=middle, relink=True, options=options)
    assert (done.pulled, done.parent) == ((str(middle),), str(chain[0]))
    assert vhdkit.chain_paths(child, options=options) == [str(one) for one in (child, image, *chain)]
    assert str(image) in Path(record_path(str(chain[0]))).read_text(encoding="utf-8")
    assert content_with(image, options) == before == content_with(child, options)
    assert content_with(other, options) == content_with(middle, options)
    with pytest.raises(errors.HasChildren):
        vhdkit.open_disk(chain[0], writable=True)
    other.unlink()
    middle.unlink()
    assert content_with(child, options) == before and not vhdkit.check(child, options=options)


def write_with(path: Path, options: OpenOptions, seed: int) -> None:
    """Write data and zeros."""
    rng = random.Random(seed)
    with vhdkit.open_disk(path, writable=True, options=options) as disk:
        for _ in range(5):
            disk.write(rng.randrange(disk.size_bytes - 90_000), rng.randbytes(90_000))
            disk.write_zeroes(rng.randrange(disk.size_bytes - 90_000), 90_000)


def content_with(path: Path, options: OpenOptions) -> bytes:
    """The whole disk."""
    with vhdkit.open_disk(path, options=options) as disk:
        return disk.read(0, disk.size_bytes)


def test_a_clone_of_a_raw_disk_becomes_independent(tmp_path: Path) -> None:
    """So does a child of a raw disk, which ends inside a sector."""
    base, image = tmp_path / "base.img", tmp_path / "image.avhd"
    base.write_bytes(os.urandom(3 * MIB + 700))
    options = OpenOptions(allow_raw_parent=True)
    vhdkit.create_child(image, base, options=options)
    write_with(image, options, 4)
    before = content_with(image, options)
    assert vhdkit.pull(image, independent=True, options=options).pulled == (str(base),)
    base.unlink()
    assert content(image) == before and sound(image)


@formats
def test_a_larger_child_and_a_smaller_one(family: Family, tmp_path: Path) -> None:
    """What lies past the end of a pulled layer, and of the image itself, stays zeros."""
    chain = make_source(tmp_path / "chain", family, 3, random.Random(2), growing=True)
    before = content(chain[0])
    vhdkit.pull(chain[0], to=chain[1], relink=True)
    assert content(chain[0]) == before
    vhdkit.pull(chain[0], independent=True)
    shutil.copy(chain[0], tmp_path)
    assert content(tmp_path / chain[0].name) == before and sound(chain[0])


def test_what_is_refused(tmp_path: Path) -> None:
    """An image without a parent, a layer that is not below, an image that is open, an interrupted merge."""
    child, image, middle, base = make_chain(tmp_path / "chain", FAMILIES["vhd"])
    with pytest.raises(errors.InvalidArgument, match="no parent"):
        vhdkit.pull(base)
    with pytest.raises(errors.InvalidArgument, match="not an ancestor"):
        vhdkit.pull(image, to=child)
    with pytest.raises(errors.InvalidArgument, match="itself"):
        vhdkit.pull(image, to=image)
    with pytest.raises(errors.InvalidArgument, match="leave out"):
        vhdkit.pull(image, to=base, independent=True)
    before = files_of(tmp_path)
    with vhdkit.open_disk(child), pytest.raises(errors.ImageInUse):
        vhdkit.pull(image, independent=True)
    assert files_of(tmp_path) == before

    def stop(done: int, total: int) -> None:
        raise errors.Cancelled("enough")

    with pytest.raises(errors.Cancelled):
        vhdkit.merge(child, into=middle, progress=stop)
    for one in (child, image):
        with pytest.raises(errors.ImageInUse, match="interrupted"):
            vhdkit.pull(one, independent=True)
    expected = content(child)
    vhdkit.resume_merge(child)
    vhdkit.pull(middle, independent=True)
    assert content(middle) == expected


@pytest.mark.parametrize("relink", [False, True])
@formats
def test_killed_at_every_call(family: Family, relink: bool, tmp_path: Path) -> None:
    """INV-PULL-PRESERVES: killed before any call that changes a file, the image and its child read as before, and the
    pull, repeated, completes."""
    master, work = tmp_path / "master", tmp_path / "work"
    names = [path.name for path in make_chain(master, family)]
    shutil.copytree(master, work)
    child, image, middle, base = (work / name for name in names)
    before, above, seen = content(image), content(child), set()

    def work_on() -> None:
        vhdkit.pull(image, to=middle if relink else None, relink=relink, independent=not relink)

    for _ in killings(work_on, step=daily_or_nightly(29, 1)):
        assert content(image) == before and content(child) == above
        seen.add(len(vhdkit.chain_paths(image)))
        work_on() if not relink or len(vhdkit.chain_paths(image)) == 3 else None
        assert len(vhdkit.chain_paths(image)) == (2 if relink else 1)
        assert content(image) == before and content(child) == above
        # As after every killed change of a header, it may lie behind the blocks; `check --repair` puts it back.
        found = {one.code for one in vhdkit.check(child) if one.severity is not vhdkit.Severity.NOTE}
        assert found <= {"footers-differ", "behind-blocks", "leaked-space", "log-not-replayed"}
        shutil.rmtree(work)
        shutil.copytree(master, work)
    assert seen == {3, 2 if relink else 1}
    assert base.exists()


@pytest.mark.parametrize(
    ("name", "relink"),
    [
        ("vhd", False),
        pytest.param("vhdx", False, marks=pytest.mark.nightly),  # test_pull_power.py cuts it every day
        pytest.param("vhd", True, marks=pytest.mark.nightly),
        pytest.param("vhdx", True, marks=pytest.mark.nightly),
    ],
)
def test_every_power_cut(name: str, relink: bool, tmp_path: Path) -> None:
    """INV-PULL-PRESERVES: after a power cut the image and its child read as before, and the pull can be repeated."""
    family, work, found = FAMILIES[name], tmp_path / "work", tmp_path / "found"
    with repeatable("pull"):
        names = [path.name for path in make_chain(work, family)]
        child, image, middle = (work / one for one in names[:3])
        before, above, states = content(image), content(child), set()

        def judge(cut: Cut) -> None:
            fill(found, cut.files)
            assert content(found / names[1]) == before and content(found / names[0]) == above
            states.add(len(vhdkit.chain_paths(found / names[1])))
            if random.Random(cut.boundary).random() < 0.2:
                if not relink:
                    vhdkit.pull(found / names[1], independent=True)
                elif len(vhdkit.chain_paths(found / names[1])) == 3:
                    vhdkit.pull(found / names[1], to=found / names[2], relink=True)
                assert content(found / names[1]) == before and content(found / names[0]) == above

        FolderPower(work, "pull", judge=judge, every=daily_or_nightly(3, 1)).run(
            lambda: vhdkit.pull(image, to=middle if relink else None, relink=relink, independent=not relink)
        )
    assert states == {3, 2 if relink else 1}


def test_a_full_disk_and_ctrl_c(small_tmpfs: Path, tmp_path: Path) -> None:
    """On a full file system, and after Ctrl-C, the disk reads as before; with space the same call completes."""
    base, image = tmp_path / "base.vhd", small_tmpfs / "image.avhd"
    vhdkit.create_image(base, 64 * MIB)
    with vhdkit.open_disk(base, writable=True) as disk:
        for number in range(4):
            disk.write(number * 9 * MIB, os.urandom(300_000))
    options = OpenOptions(parent_dirs=(tmp_path,))
    vhdkit.create_child(image, base, options=options)
    before = content_with(image, options)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vhdkit.pull(image, independent=True, options=options, progress=stop)
    assert content_with(image, options) == before
    (small_tmpfs / "ballast").write_bytes(bytes(1_200_000))
    with pytest.raises(errors.NoSpace):
        vhdkit.pull(image, independent=True, options=options)
    assert content_with(image, options) == before
    (small_tmpfs / "ballast").unlink()
    assert 0 < vhdkit.pull(image, independent=True, options=options).data_bytes < 4 * 300_032
    base.unlink()
    assert content(image) == before and sound(image)


def test_children_of_a_format_with_fixed_images(tmp_path: Path) -> None:
    """A child of a fixed image becomes a dynamic one."""
    base, image = tmp_path / "base.vhdx", tmp_path / "image.avhdx"
    vhdkit.create_image(base, 4 * MIB, disk_format=DiskFormat.VHDX_FIXED, sector_bytes=4096)
    write_some(base, random.Random(1), 5)
    vhdkit.create_child(image, base)
    write_some(image, random.Random(2), 5)
    before = content(image)
    vhdkit.pull(image, independent=True)
    base.unlink()
    assert content(image) == before and sound(image)


def test_a_format_that_is_only_in_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a format whose images get another id with a write, it stays: the child still finds the image."""
    monkeypatch.setattr(all_formats, "FORMATS", (SPARSE, *all_formats.FORMATS))
    base, middle, image, child = paths = [
        tmp_path / f"{name}.asparse" for name in ("base", "middle", "image", "child")
    ]
    vhdkit.create_image(base, 2 * MIB, disk_format="sparse")
    for number, path in enumerate(paths):
        if number:
            vhdkit.create_child(path, paths[number - 1])
        write_some(path, random.Random(number), 3)
    before = content(child)
    vhdkit.pull(image, to=middle, relink=True)
    assert vhdkit.chain_paths(child) == [str(child), str(image), str(base)]
    vhdkit.pull(image, independent=True)
    base.unlink()
    middle.unlink()
    assert content(child) == before and vhdkit.chain_paths(child) == [str(child), str(image)]
