# SPDX-License-Identifier: Apache-2.0
"""The children of an image, wherever they are, and that nothing changes an image that has children."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import vhdkit
from tests.harness.killing import killings
from vhdkit import OpenOptions, errors, folder
from vhdkit.chain.names import children, marks
from vhdkit.chain.records import pending
from vhdkit.chain.verbs import snapshot
from vhdkit.formats.undo import apply_change, plan_change
from vhdkit.formats.vhd import layout
from vhdkit.formats.vhd.metadata import read_metadata
from vhdkit.store import FileStore
from vhdkit.units import MIB
from vhdkit.volume import Volume, VolumeFile

GOLD = b"gold".ljust(512, b".")


class Farm:
    """A golden image with clones a and b, each in its own folder."""

    def __init__(self, folder: Path, *, raw: bool = False) -> None:
        self.gold = folder / ("gold/g.img" if raw else "gold/g.vhd")
        self.a, self.b = folder / "vms/a/a.avhd", folder / "vms/b/b.avhd"
        for path in (self.gold, self.a, self.b):
            path.parent.mkdir(parents=True)
        kind = vhdkit.DiskFormat.RAW if raw else vhdkit.DiskFormat.DYNAMIC
        vhdkit.create_image(self.gold, 4 * MIB, disk_format=kind)
        with vhdkit.open_disk(self.gold, writable=True) as disk:
            disk.write(0, GOLD)
        self.options = OpenOptions(parent_dirs=(str(self.gold.parent),), allow_raw_parent=raw)
        vhdkit.clone(self.gold, [self.a, self.b], options=OpenOptions(allow_raw_parent=raw))
        with vhdkit.open_disk(self.a, writable=True, options=self.options) as disk:
            disk.write(0, b"a" * 512)

    @property
    def record(self) -> Path:
        """The record that holds the marks."""
        return Path(marks.record_path(str(self.gold)))

    def marked(self) -> list[str]:
        """The children that have a mark."""
        return sorted(one.path for one in marks.read_record(str(self.gold)).marks)

    def read(self, path: Path) -> bytes:
        """The first sector of a clone."""
        with vhdkit.open_disk(path, options=self.options) as disk:
            return disk.read(0, 512)

    def write_to_gold(self, **more: object) -> None:
        """Open the golden image for writing, which must be refused while it has a clone."""
        with vhdkit.open_disk(self.gold, writable=True, options=OpenOptions(**more)) as disk:  # type: ignore[arg-type]
            disk.write(0, bytes(512))


@pytest.fixture
def farm(tmp_path: Path) -> Farm:
    """A golden image and its clones."""
    return Farm(tmp_path)


VERBS: dict[str, Callable[[Farm], object]] = {
    "open": lambda farm: farm.write_to_gold(),
    "merge": lambda farm: vhdkit.merge(farm.a, options=farm.options),
    "merge and relink": lambda farm: vhdkit.merge(farm.a, relink_children=True, options=farm.options),
    "resize": lambda farm: vhdkit.resize(farm.gold, 8 * MIB),
    "relocate": lambda farm: vhdkit.relocate(farm.gold, farm.a.parent),
    "relocate a child": lambda farm: vhdkit.relocate(farm.a, farm.gold.parent.parent, options=farm.options),
    "snapshot": lambda farm: vhdkit.snapshot(farm.gold),
    "replace": lambda farm: vhdkit.create_image(farm.gold, MIB, replace=True),
    "convert": lambda farm: vhdkit.convert(
        vhdkit_raw(farm), farm.gold, vhdkit.DiskFormat.DYNAMIC, replace=True, options=farm.options
    ),
    "create a child over it": lambda farm: vhdkit.create_child(farm.gold, vhdkit_raw(farm), replace=True),
}


def vhdkit_raw(farm: Farm) -> Path:
    """Another image, to convert."""
    path = farm.gold.parent.parent / "other.vhd"
    if not path.exists():
        vhdkit.create_image(path, MIB)
    return path


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("raw", [False, True], ids=["vhd", "raw"])
def test_nothing_changes_an_image_with_clones_in_other_folders(tmp_path: Path, verb: str, raw: bool) -> None:
    """INV-PARENT-READ-ONLY: with each clone in its own folder, every verb leaves the base alone and names a clone."""
    farm = Farm(tmp_path, raw=raw)
    before = farm.gold.read_bytes()
    with pytest.raises(errors.HasChildren) as caught:
        VERBS[verb](farm)
    assert str(farm.b) in str(caught.value) or str(farm.a) in str(caught.value)
    assert farm.gold.read_bytes() == before and farm.read(farm.b) == GOLD


def test_merge_names_the_other_clone(farm: Farm) -> None:
    """INV-PARENT-READ-ONLY: a merge of one clone into the base is refused because of the other."""
    with pytest.raises(errors.HasChildren, match=r"b\.avhd"):
        vhdkit.merge(farm.a, options=farm.options)


def test_a_child_above_its_parent_is_found_without_a_mark(tmp_path: Path) -> None:
    """INV-PARENT-READ-ONLY: a parent may be in a subfolder of its child's folder, so parent folders are searched."""
    base = tmp_path / "a/b/c/base.vhd"
    base.parent.mkdir(parents=True)
    vhdkit.create_image(base, MIB)
    vhdkit.create_child(tmp_path / "a/child.avhd", base)
    Path(marks.record_path(str(base))).unlink()
    with pytest.raises(errors.HasChildren, match=r"child\.avhd"):
        vhdkit.open_disk(base, writable=True)


def test_a_child_of_a_copy_in_a_subfolder_does_not_count(tmp_path: Path) -> None:
    """If a whole folder is copied into itself, the copied image does not have the original's children."""
    base = tmp_path / "base.vhd"
    vhdkit.create_image(base, MIB)
    vhdkit.create_child(tmp_path / "child.avhd", base)
    (tmp_path / "copy").mkdir()
    shutil.copy(base, tmp_path / "copy/base.vhd")
    vhdkit.open_disk(tmp_path / "copy/base.vhd", writable=True).close()
    with pytest.raises(errors.HasChildren):
        vhdkit.open_disk(base, writable=True)


def test_the_search_of_parent_folders_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a parent folder, which may hold anything, only a limited number of names is examined."""
    monkeypatch.setattr(children, "MAX_FILES_ELSEWHERE", 10)
    base = tmp_path / "below/base.vhd"
    base.parent.mkdir()
    vhdkit.create_image(base, MIB)
    for number in range(30):
        (tmp_path / f"{number}").touch()
    reads = _reads(monkeypatch)
    vhdkit.open_disk(base, writable=True).close()
    assert 5 <= len({path for path in reads if Path(path).parent == tmp_path}) <= 10


def test_images_that_the_caller_knows_count(tmp_path: Path) -> None:
    """INV-PARENT-READ-ONLY: an image named in `known_images` counts wherever it is; others beside it do not."""
    farm = Farm(tmp_path)
    farm.record.unlink()
    other = vhdkit_raw(farm)
    known = (str(other), str(tmp_path / "gone.vhd"), str(tmp_path), str(farm.b))
    with pytest.raises(errors.HasChildren, match=r"b\.avhd"):
        farm.write_to_gold(known_images=known)
    farm.write_to_gold(known_images=known[:-1])


# -- marks ----------------------------------------------------------------------------------------------------------


def test_children_beside_their_parent_leave_no_mark(tmp_path: Path) -> None:
    """They are found without one: a folder with a chain holds its images and nothing else."""
    vhdkit.create_image(tmp_path / "disk.vhd", MIB)
    vhdkit.snapshot(tmp_path / "disk.vhd")
    vhdkit.clone(tmp_path / "disk.avhd", [tmp_path / "a.avhd"])
    assert sorted(os.listdir(tmp_path)) == ["a.avhd", "disk.avhd", "disk.vhd"]


@pytest.mark.parametrize("maker", ["clone", "create", "snapshot", "merge to", "rebase"])
def test_every_maker_of_children_leaves_a_mark(farm: Farm, maker: str, tmp_path: Path) -> None:
    """INV-PARENT-READ-ONLY: a child in another folder is recorded at its parent from the moment it exists."""
    new = tmp_path / "elsewhere/new.avhd"
    new.parent.mkdir()
    if maker == "clone":
        vhdkit.clone(farm.gold, [new])
    elif maker == "create":
        vhdkit.create_child(new, farm.gold)
    elif maker == "snapshot":
        base = vhdkit_raw(farm)
        vhdkit.snapshot(base, new)
        farm.gold = base
    elif maker == "merge to":
        middle = tmp_path / "vms/a/middle.avhd"
        vhdkit.snapshot(farm.a, middle, options=farm.options)
        vhdkit.merge(middle, into=farm.a, to=new, options=farm.options)
    else:
        shutil.copy(farm.b, new)
        vhdkit.rebase(new, farm.gold, options=farm.options)
    assert str(new) in farm.marked()


def test_a_stale_mark_is_dropped(farm: Farm) -> None:
    """Children that were deleted with their folder, merged or replaced do not count, and no record is left."""
    shutil.rmtree(farm.a.parent)
    farm.b.write_bytes(b"no image any more")
    farm.write_to_gold()
    assert not farm.record.exists()


def test_a_child_rebased_away_is_forgotten(farm: Farm, tmp_path: Path) -> None:
    """A child that now has another parent does not count for the old one."""
    (tmp_path / "new").mkdir()
    shutil.copy(farm.gold, tmp_path / "new/g.vhd")
    for child in (farm.a, farm.b):
        vhdkit.rebase(child, tmp_path / "new/g.vhd", options=farm.options)
    with pytest.raises(errors.HasChildren):
        vhdkit.open_disk(tmp_path / "new/g.vhd", writable=True)
    # By its id alone the old one might still be their parent: the folder decides.
    shutil.rmtree(farm.a.parent)
    shutil.rmtree(farm.b.parent)
    farm.write_to_gold()
    assert not farm.record.exists()


def test_a_child_renamed_in_its_folder_still_counts(farm: Farm) -> None:
    """If a marked child is gone, the other files in its folder are examined."""
    shutil.rmtree(farm.a.parent)
    farm.b.rename(farm.b.parent / "renamed.avhd")
    with pytest.raises(errors.HasChildren, match=r"renamed\.avhd"):
        farm.write_to_gold()


def test_a_child_that_may_be_unmounted_counts(farm: Farm, tmp_path: Path) -> None:
    """INV-PARENT-READ-ONLY: a child on a file system that is not mounted counts, and the error names a way out."""
    shutil.rmtree(farm.a.parent)
    hidden = tmp_path / "hidden"
    (tmp_path / "vms").rename(hidden)
    (tmp_path / "vms").mkdir()  # what the folder holds when nothing is mounted on it
    document = json.loads(farm.record.read_text())
    for child in document["children"]:
        child["trail"][len(tmp_path.parts)][1] = True  # a file system was mounted there
    farm.record.write_text(json.dumps(document))
    with pytest.raises(errors.HasChildren, match="not mounted") as caught:
        farm.write_to_gold()
    assert f"rm {farm.record}" in (caught.value.hint or "")
    # One of the two is gone for good, the other comes back: following the hint keeps a record of that one.
    assert f"vhdkit rebase IMAGE --parent {farm.gold}" in (caught.value.hint or "")
    (tmp_path / "vms").rmdir()
    hidden.rename(tmp_path / "vms")
    farm.record.unlink()
    vhdkit.rebase(farm.b, farm.gold, options=farm.options)
    with pytest.raises(errors.HasChildren, match=r"b\.avhd"):
        farm.write_to_gold()


def test_a_child_that_cannot_be_examined_counts(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-PARENT-READ-ONLY: without permission to look, the child is assumed to exist."""
    real_open = os.open

    def refuse(path: str, flags: int, *rest: int, dir_fd: int | None = None) -> int:
        if str(path) in (str(farm.a), str(farm.b)):
            raise PermissionError(13, "Permission denied")
        return real_open(path, flags, *rest, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(errors.HasChildren, match="cannot be examined"):
        farm.write_to_gold()


HOSTILE = [
    b" ",
    b"no JSON",
    b"[]",
    b"{}",
    b'{"format": "vhdkit children record 1"}',
    b'{"format": "vhdkit children record 1", "parent": "/x", "children": [1]}',
    b'{"format": "vhdkit children record 1", "parent": "/x", "children": [{"path": "/a", "id": "", "parent_id": ""}]}',
    b'{"format": "vhdkit children record 1", "parent": 1, "children": []}',
    b"[" * 100_000,
    bytes(marks.MAX_RECORD_BYTES + 1),
]


@pytest.mark.parametrize("raw", HOSTILE, ids=range(len(HOSTILE)))
def test_a_damaged_record_is_an_error_with_a_way_out(farm: Farm, raw: bytes) -> None:
    """INV-PARENT-READ-ONLY: an unreadable record may name a child; the error names the record and what to do."""
    farm.record.write_bytes(raw)
    with pytest.raises(errors.HasChildren) as caught:
        farm.write_to_gold()
    assert f"rm {farm.record}" in (caught.value.hint or "")


@pytest.mark.parametrize("place", ["/dev/zero", "/dev/tty", "fifo", "/etc/passwd", "loop"])
def test_a_mark_of_a_special_file_is_not_followed(farm: Farm, tmp_path: Path, place: str) -> None:
    """A record may name anything: devices and pipes are not opened, and files that are not children do not count."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    document = json.loads(farm.record.read_text())
    for child in document["children"]:
        child["path"] = os.path.join(tmp_path, place)
    farm.record.write_text(json.dumps(document))
    farm.write_to_gold()


def test_a_record_copied_with_its_image_is_ignored(farm: Farm, tmp_path: Path) -> None:
    """The marks beside a copy of a golden image belong to the original."""
    shutil.copytree(farm.gold.parent, tmp_path / "copy")
    vhdkit.open_disk(tmp_path / "copy/g.vhd", writable=True).close()
    with pytest.raises(errors.HasChildren):
        farm.write_to_gold()


def test_a_mark_that_cannot_be_written_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the folder cannot be written to, the clone succeeds; a warning is logged once for each child."""

    def refuse(*_: object) -> None:
        raise errors.AccessDenied("cannot create: Permission denied", path="x")

    monkeypatch.setattr(marks, "_write", refuse)
    with caplog.at_level(logging.WARNING):
        farm = Farm(tmp_path)
    assert farm.read(farm.b) == GOLD and not farm.record.exists()
    assert [one.getMessage().count(".avhd") for one in caplog.records] == [1, 1]


def test_concurrent_makers_lose_no_mark(farm: Farm, tmp_path: Path) -> None:
    """Processes that clone one image at the same time keep all marks."""
    script = "import sys, vhdkit\nvhdkit.clone(sys.argv[1], sys.argv[2:])\n"
    wanted = []
    for number in range(4):
        (tmp_path / f"at-once-{number}").mkdir()
        wanted.append([str(tmp_path / f"at-once-{number}/{one}.avhd") for one in range(4)])
    running = [subprocess.Popen([sys.executable, "-c", script, str(farm.gold), *paths]) for paths in wanted]
    try:
        assert [one.wait(timeout=120) for one in running] == [0] * 4
    finally:
        for one in running:
            one.kill()
    assert set(farm.marked()) == {str(farm.a), str(farm.b), *(path for paths in wanted for path in paths)}


def test_a_failed_clone_removes_its_marks(farm: Farm, tmp_path: Path) -> None:
    """Of a set that could not be made nothing is left, not even at the parent."""
    (tmp_path / "c").mkdir()
    before = farm.record.read_bytes()
    real_link = os.link

    def fail(source: str, target: str, **options: bool) -> None:
        if target.endswith("second.avhd"):
            raise OSError(28, "No space left on device")
        real_link(source, target, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(errors.NoSpace):
        patch.setattr(os, "link", fail)
        vhdkit.clone(farm.gold, [tmp_path / "c/first.avhd", tmp_path / "c/second.avhd"])
    assert json.loads(farm.record.read_bytes()) == json.loads(before)
    assert os.listdir(tmp_path / "c") == []


def test_marks_follow_merges_and_moves(farm: Farm, tmp_path: Path) -> None:
    """A merge with --relink marks the child at its new parent; a chain that moves leaves no record behind."""
    top = tmp_path / "top/t.avhd"
    top.parent.mkdir()
    shutil.rmtree(farm.b.parent)
    vhdkit.snapshot(farm.a, top, options=farm.options)
    assert [one.path for one in marks.read_record(str(farm.a)).marks] == [str(top)]
    vhdkit.merge(farm.a, relink_children=True, options=farm.options)
    assert farm.marked() == [str(top)] and os.listdir(farm.a.parent) == []
    with pytest.raises(errors.HasChildren):
        farm.write_to_gold()
    place = tmp_path / "place"
    place.mkdir()
    vhdkit.relocate(top, place, options=farm.options)
    assert sorted(os.listdir(place)) == ["g.vhd", "t.avhd"]
    assert os.listdir(farm.gold.parent) == [] and os.listdir(top.parent) == []


def test_gc_keeps_a_marked_base_and_removes_it_without_clones(farm: Farm, tmp_path: Path) -> None:
    """A base with a clone elsewhere is kept; without clones it is removed together with its record."""
    vhdkit.create_image(farm.gold.parent / "kept.vhd", MIB)
    keep = [farm.gold.parent / "kept.vhd"]
    (item,) = vhdkit.collect_garbage(farm.gold.parent, keep, delete=True)
    assert not item.removed and "a.avhd" in (item.kept or "")
    shutil.rmtree(farm.a.parent)
    vhdkit.collect_garbage(farm.gold.parent, keep, delete=True)
    assert farm.marked() == [str(farm.b)]
    farm.b.unlink()
    vhdkit.collect_garbage(farm.gold.parent, keep, delete=True)
    assert os.listdir(farm.gold.parent) == ["kept.vhd"]


def test_gc_removes_the_record_of_a_missing_image(farm: Farm) -> None:
    """The image was removed without its record: the record is listed, and removed."""
    vhdkit.create_image(farm.gold.parent / "kept.vhd", MIB)
    farm.gold.unlink()
    (item,) = vhdkit.collect_garbage(farm.gold.parent, [farm.gold.parent / "kept.vhd"], delete=True)
    assert item.kind is vhdkit.GarbageKind.RECORD and item.removed and not farm.record.exists()


def test_find_children_everywhere(farm: Farm) -> None:
    """`find_children` searches beside the image; with `everywhere` it searches as a writable open does."""
    assert vhdkit.find_children([farm.gold]) == {str(farm.gold): []}
    assert vhdkit.find_children([farm.gold], everywhere=True) == {str(farm.gold): [str(farm.a), str(farm.b)]}


def _reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are opened or read from now on, once for each time."""
    seen: list[str] = []
    real_open, real_pread = os.open, os.pread

    def opening(path: str, flags: int, *rest: int, dir_fd: int | None = None) -> int:
        if not str(path).startswith("/proc/"):
            seen.append(str(path))
        return real_open(path, flags, *rest, dir_fd=dir_fd)

    def reading(fd: int, size: int, offset: int) -> bytes:
        seen.append(os.readlink(f"/proc/self/fd/{fd}"))
        return real_pread(fd, size, offset)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "pread", reading)
    return seen


def test_an_unrelated_image_costs_a_few_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writable open looks at every file in the folder, but only at the part that names the parent."""
    base, other = tmp_path / "base.vhd", tmp_path / "other.vhd"
    vhdkit.create_image(base, MIB)
    vhdkit.create_image(other, MIB)
    vhdkit.clone(other, [tmp_path / f"{number}.avhd" for number in range(20)])
    reads = _reads(monkeypatch)
    vhdkit.open_disk(base, writable=True).close()
    for number in range(20):
        assert reads.count(str(tmp_path / f"{number}.avhd")) == 1 + 4
    assert reads.count(str(other)) == 1 + 3


def test_an_unrelated_undo_log_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-BOUNDED: undo logs in the folder cost no more than a search for one id, unless they contain it."""
    base, other = tmp_path / "base.vhd", tmp_path / "other.vhd"
    vhdkit.create_image(base, MIB)
    vhdkit.create_image(other, MIB)
    vhdkit.clone(other, [tmp_path / "child.avhd"])
    Path(pending.undo_path(str(tmp_path / "child.avhd"))).write_bytes(b"vhdkUNDO" + bytes(MIB))
    looked: list[str] = []
    real_look = pending.look

    def look(store: VolumeFile, volume: Volume) -> pending.Look:
        looked.append(store.name)
        return real_look(store, volume)

    monkeypatch.setattr(pending, "look", look)
    vhdkit.open_disk(base, writable=True).close()
    assert looked and set(looked) == {str(base)}


def test_a_child_whose_undo_log_restores_its_parent_counts(tmp_path: Path) -> None:
    """INV-PARENT-READ-ONLY: the log of an unfinished change may hold the id of the parent: such an image is read."""
    base, child = tmp_path / "base.vhd", tmp_path / "child.avhd"
    vhdkit.create_image(base, MIB)
    vhdkit.create_child(child, base)
    with FileStore.open(child, writable=True) as store:
        metadata = read_metadata(store)
        header = layout.parse_header(store.pread(metadata.footer.data_offset, layout.HEADER_SIZE))
        raw = layout.build_header(replace(header, parent_unique_id=b"another parent.."))
        log = plan_change(store, metadata.footer.unique_id, [(metadata.footer.data_offset, raw)])
        pending.write_log(pending.undo_path(str(child)), log, like=store)
        apply_change(store, log)
    with pytest.raises(errors.HasChildren):
        vhdkit.open_disk(base, writable=True)


def test_a_killed_clone_is_marked_or_absent(tmp_path: Path) -> None:
    """INV-PARENT-READ-ONLY: wherever the maker of a child is killed, an existing child is recorded at its parent."""
    gold, new = tmp_path / "gold/g.vhd", tmp_path / "vms/new.avhd"
    gold.parent.mkdir()
    new.parent.mkdir()
    vhdkit.create_image(gold, MIB)
    seen = set()
    for _ in killings(lambda: vhdkit.clone(gold, [new])):
        seen.add(new.exists())
        if new.exists():
            with pytest.raises(errors.HasChildren):
                vhdkit.open_disk(gold, writable=True)
            new.unlink()
        vhdkit.open_disk(gold, writable=True).close()
        vhdkit.clone(gold, [new])
        assert [one.path for one in marks.read_record(str(gold)).marks] == [str(new)]
        new.unlink()
        vhdkit.open_disk(gold, writable=True).close()
        for name in (*gold.parent.iterdir(), *new.parent.iterdir()):
            if name != gold:
                name.unlink()  # partial files, and a record that is still empty
    assert seen == {False, True}


def test_a_mark_survives_a_cleanup_before_its_child_exists(farm: Farm, tmp_path: Path) -> None:
    """A cleanup that drops marks of missing children does not affect a child that is made right then."""
    new = tmp_path / "c/new.avhd"
    new.parent.mkdir()
    real_commit = folder.commit_all

    def tidied(files: Sequence[folder.NewFile]) -> None:
        children.drop_stale_marks(str(farm.gold))
        assert str(new) not in farm.marked()
        real_commit(files)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot, "commit_all", tidied)
        vhdkit.clone(farm.gold, [new])
    assert str(new) in farm.marked()


def test_a_tree_that_is_renamed_or_copied_keeps_its_children(farm: Farm, tmp_path: Path) -> None:
    """INV-PARENT-READ-ONLY: clones that are moved or copied together with their base still count."""
    tree, moved, copied = (tmp_path / name for name in ("tree", "moved", "copied"))
    tree.mkdir()
    for name in ("gold", "vms"):
        (tmp_path / name).rename(tree / name)
    tree.rename(moved)
    farm.gold = moved / "gold/g.vhd"
    with pytest.raises(errors.HasChildren, match=r"moved/vms/a/a\.avhd and 1 more"):
        farm.write_to_gold()
    (moved / "vms/c").mkdir()
    vhdkit.clone(farm.gold, [moved / "vms/c/c.avhd"])
    assert farm.marked() == [str(moved / f"vms/{one}/{one}.avhd") for one in "abc"]
    shutil.copytree(moved, copied)
    for child in "abc":
        shutil.rmtree(moved / "vms" / child)
    farm.write_to_gold()
    farm.gold = copied / "gold/g.vhd"
    with pytest.raises(errors.HasChildren, match=r"copied/vms/a/a\.avhd and 2 more"):
        farm.write_to_gold()


def test_a_base_that_was_moved_keeps_its_marks_when_it_is_cloned_again(farm: Farm, tmp_path: Path) -> None:
    """INV-PARENT-READ-ONLY: after a base was moved, a new clone of it does not displace the older ones."""
    farm.gold.parent.rename(tmp_path / "elsewhere")
    farm.gold = tmp_path / "elsewhere/g.vhd"
    (tmp_path / "vms/c").mkdir()
    vhdkit.clone(farm.gold, [tmp_path / "vms/c/c.avhd"])
    assert farm.marked() == [str(tmp_path / f"vms/{one}/{one}.avhd") for one in "abc"]
    with pytest.raises(errors.HasChildren, match="and 2 more"):
        farm.write_to_gold()


def test_a_copy_beside_the_children_is_called_a_copy(tmp_path: Path) -> None:
    """A copy is not called the parent of children that still find their base; both suggestions of the hint work."""
    base, copy, child = (tmp_path / name for name in ("base.vhd", "copy.vhd", "child.avhd"))
    vhdkit.create_image(base, 4 * MIB)
    vhdkit.create_child(child, base)
    shutil.copyfile(base, copy)
    with pytest.raises(errors.HasChildren) as failure:
        vhdkit.open_disk(copy, writable=True)
    assert failure.value.problem == f"has the same id as the parent of {child}, which is now {base}"
    assert f": vhdkit convert {copy} NEW --to " in str(failure.value.hint)
    with pytest.raises(errors.HasChildren, match=r"base\.vhd: is the parent of .*child\.avhd"):
        vhdkit.open_disk(base, writable=True)
    vhdkit.convert(copy, tmp_path / "new.vhd", "dynamic")
    vhdkit.open_disk(tmp_path / "new.vhd", writable=True).close()
    (tmp_path / "own").mkdir()
    copy.rename(tmp_path / "own" / "copy.vhd")
    vhdkit.open_disk(tmp_path / "own" / "copy.vhd", writable=True).close()
    base.unlink()
    (tmp_path / "own" / "copy.vhd").rename(copy)  # now it is the only possible parent
    with pytest.raises(errors.HasChildren, match="is the parent of"):
        vhdkit.open_disk(copy, writable=True)
