# SPDX-License-Identifier: Apache-2.0
"""Garbage collection: no file that may be needed is removed, and no image loses its parent."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

import vhdkit
from tests.harness.killing import killings, recorded
from tests.harness.vhd_builder import MIB, Vhd, child, put
from vhdkit import GarbageKind, OpenOptions, errors, folder, unfinished
from vhdkit.chain.names.marks import record_path
from vhdkit.chain.records.intent import KIND, Intent, Named, Phase


def make_tree(home: Path) -> dict[str, Path]:
    """base <- a <- a1 <- a2, base <- b <- b1, and a disk without relations."""
    paths = {name: home / f"{name}.avhd" for name in ("a", "a1", "a2", "b", "b1")}
    paths |= {"base": home / "base.vhd", "alone": home / "alone.vhd"}
    for name in ("base", "alone"):
        vhdkit.create_image(paths[name], 2 * MIB)
    for name, parent in (("a", "base"), ("a1", "a"), ("a2", "a1"), ("b", "base"), ("b1", "b")):
        vhdkit.create_child(paths[name], paths[parent])
    return paths


def removable(home: Path, keep: Sequence[Path], **options: object) -> list[str]:
    """The names of the files that would be removed, children first."""
    found = vhdkit.collect_garbage(home, keep, **options)  # type: ignore[arg-type]
    return [os.path.basename(one.path) for one in found if one.kept is None]


def reason(home: Path, keep: Sequence[Path], path: Path) -> str | None:
    """Why this file is kept."""
    (item,) = [one for one in vhdkit.collect_garbage(home, keep) if one.path == str(path)]
    return item.kept


def test_unreachable_images_are_only_listed(tmp_path: Path) -> None:
    """Without `delete` files are only listed; children come before their parents, with their sizes."""
    tree = make_tree(tmp_path)
    before = sorted(os.listdir(tmp_path))
    assert set(removable(tmp_path, [tree["b1"]])) == {"a2.avhd", "a1.avhd", "a.avhd", "alone.vhd"}
    order = [name for name in removable(tmp_path, [tree["b1"]]) if name != "alone.vhd"]
    assert order == ["a2.avhd", "a1.avhd", "a.avhd"]
    assert all(one.size_bytes > 0 for one in vhdkit.collect_garbage(tmp_path, [tree["b1"]]))
    assert sorted(os.listdir(tmp_path)) == before


def test_delete_removes_what_was_listed(tmp_path: Path) -> None:
    """With `delete` the listed files are removed, and the leaves that were kept still open."""
    tree = make_tree(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "disk.raw").write_bytes(bytes(MIB))
    (tmp_path / "link.vhd").symlink_to("alone.vhd")
    items = vhdkit.collect_garbage(tmp_path, [tree["a1"]], delete=True)
    assert {os.path.basename(one.path) for one in items if one.removed} == {
        "a2.avhd",
        "b1.avhd",
        "b.avhd",
        "alone.vhd",
    }
    left = ["a.avhd", "a1.avhd", "base.vhd", "disk.raw", "link.vhd", "notes.txt"]
    assert sorted(os.listdir(tmp_path)) == left
    vhdkit.open_disk(tree["a1"], writable=True).close()
    assert vhdkit.collect_garbage(tmp_path, [tree["a1"]]) == []


def test_an_incomplete_chain_prevents_deletion(tmp_path: Path) -> None:
    """Remove vhd with missing or multiple ancestors: what a leaf without its parent needs is unknown."""
    tree = make_tree(tmp_path)
    tree["a"].rename(tmp_path / "hidden.bin")
    with pytest.raises(errors.ParentMissing):
        vhdkit.collect_garbage(tmp_path, [tree["a2"]], delete=True)
    assert len(os.listdir(tmp_path)) == 7


def test_orphans_go_and_ancestors_by_another_name_stay(tmp_path: Path) -> None:
    """Remove vhd with missing or multiple ancestors: an orphan is garbage, both copies of a parent are not."""
    tree = make_tree(tmp_path)
    tree["base"].unlink()
    (tmp_path / "copy.vhd").write_bytes(tree["alone"].read_bytes())
    vhdkit.create_child(tmp_path / "needs.avhd", tree["alone"])
    assert set(removable(tmp_path, [tree["alone"]])) == {"needs.avhd", "copy.vhd"} | {
        f"{n}.avhd" for n in ("a", "a1", "a2", "b", "b1")
    }
    assert (
        reason(tmp_path, [tmp_path / "needs.avhd"], tmp_path / "copy.vhd")
        == f"the parent of {tmp_path}/needs.avhd, which is kept"
    )


def test_images_in_use_and_their_parents_are_kept(tmp_path: Path) -> None:
    """An open image and all its ancestors are kept, whether it is read or written."""
    tree = make_tree(tmp_path)
    for writable in (False, True):
        with vhdkit.open_disk(tree["a1"] if not writable else tree["a2"], writable=writable):
            assert "base.vhd" not in removable(tmp_path, [tree["alone"]])
            assert "a.avhd" not in removable(tmp_path, [tree["alone"]], delete=False)
            assert reason(tmp_path, [tree["alone"]], tree["a1"]) in (
                "in use",
                f"the parent of {tree['a2']}, which is kept",
            )
    assert "a.avhd" in removable(tmp_path, [tree["alone"]])


def test_damaged_images_and_their_parents_are_kept(tmp_path: Path) -> None:
    """A damaged image is listed and kept, and so is the parent it names; one that names none prevents deletion."""
    tree = make_tree(tmp_path)
    raw = tree["a1"].read_bytes()
    tree["a1"].write_bytes(raw[:-512] + bytes(512))
    tree["a1"].write_bytes(put(tree["a1"].read_bytes(), 600, b"?"))  # now its header's checksum is wrong
    assert (reason(tmp_path, [tree["b1"]], tree["a1"]) or "").startswith("damaged: checksum wrong")
    assert removable(tmp_path, [tree["b1"]], delete=True) == ["a2.avhd", "alone.vhd"]
    assert tree["a"].exists() and tree["a1"].exists()
    nothing = tmp_path / "nothing.vhd"
    nothing.write_bytes(b"no image at all" * 100)
    assert "its parent is unknown" not in (reason(tmp_path, [tree["b1"]], nothing) or "")
    with pytest.raises(errors.CorruptImage, match="nothing is removed"):
        vhdkit.collect_garbage(tmp_path, [tree["base"]], delete=True)
    assert tree["a"].exists()


def test_records_of_unfinished_work_keep_an_image(tmp_path: Path) -> None:
    """An image with a merge record or an undo log beside it is kept, and so are its parents."""
    tree = make_tree(tmp_path)
    record = Path(folder.sidecar_path(tree["a1"], "merge"))
    record.write_text("{}")
    assert "unfinished change" in (reason(tmp_path, [tree["b1"]], tree["a1"]) or "")
    assert removable(tmp_path, [tree["b1"]]) == ["a2.avhd", "alone.vhd"]
    long = tmp_path / ("n" * 245 + ".vhd")
    vhdkit.create_image(long, MIB)
    assert long.name in removable(tmp_path, [tree["b1"]])
    Path(folder.sidecar_path(long, "undo")).touch()
    assert long.name not in removable(tmp_path, [tree["b1"]])


def test_parents_of_images_in_other_folders_are_kept(tmp_path: Path) -> None:
    """Images in the parent folder, in subfolders and in given folders keep their parents in this folder."""
    home, far = tmp_path / "home", tmp_path / "else" / "far"
    (home / "below").mkdir(parents=True)
    far.mkdir(parents=True)
    tree = make_tree(home)
    vhdkit.create_child(home / "below" / "x.avhd", tree["a"])
    vhdkit.create_child(tmp_path / "y.avhd", tree["b"])
    vhdkit.create_child(far / "z.avhd", tree["alone"])
    assert "alone.vhd" not in removable(home, [tree["base"]]), "it is marked"
    Path(record_path(str(tree["alone"]))).unlink()  # as if another program had made the child
    assert removable(home, [tree["base"]]) == ["a2.avhd", "alone.vhd", "b1.avhd", "a1.avhd"]
    assert "alone.vhd" not in removable(home, [tree["base"]], options=OpenOptions(parent_dirs=(str(far),)))
    assert sorted(os.listdir(home / "below")) == ["x.avhd"]


def test_the_parent_of_a_child_of_a_raw_disk(tmp_path: Path) -> None:
    """Such a child records only a name: an image of that name is kept, as it is uncertain which file was opened."""
    vhdkit.create_image(tmp_path / "base.vhd", MIB)
    child("base.vhd", parent_id=bytes(16)).build().write(tmp_path / "c.avhd")
    (tmp_path / ".c.avhd.vhdkit-merge").touch()
    vhdkit.create_image(tmp_path / "keep.vhd", MIB)
    assert removable(tmp_path, [tmp_path / "keep.vhd"]) == []


def test_files_of_dead_makers_are_removed(tmp_path: Path) -> None:
    """A partial file is removed if its maker is dead, and kept while it lives. Other hidden files are left alone."""
    vhdkit.create_image(tmp_path / "keep.vhd", MIB)
    dead = tmp_path / ".vhdkit-0123456789abcdef.part"
    dead.write_bytes(b"half")
    (tmp_path / ".vhdkit-notes").touch()
    with folder.NewFile(tmp_path / "new.vhd"):
        items = vhdkit.collect_garbage(tmp_path, [tmp_path / "keep.vhd"], delete=True)
        assert {one.kind for one in items} == {GarbageKind.PART}
        assert [one.removed for one in items if one.path == str(dead)] == [True]
        assert [one.kept for one in items if one.path != str(dead)] == ["in use by a running program"]
        assert len(list(unfinished.parts(str(tmp_path)))) == 1


def test_killed_at_any_call_no_child_loses_its_parent(tmp_path: Path) -> None:
    """INV-PARENT-ID: killed at any call, each remaining image opens, and a second run completes the work."""
    counts = set()
    home = tmp_path / "home"
    home.mkdir()
    tree = make_tree(home)
    kept = {path.name: path.read_bytes() for path in home.iterdir()}
    for _ in killings(lambda: vhdkit.collect_garbage(home, [tree["alone"]], delete=True)):
        left = sorted(os.listdir(home))
        counts.add(len(left))
        for name in left:
            vhdkit.open_disk(home / name).close()
        vhdkit.collect_garbage(home, [tree["alone"]], delete=True)
        assert os.listdir(home) == ["alone.vhd"]
        for name, raw in kept.items():
            (home / name).write_bytes(raw)
    assert counts >= {1, 2, 4, 6, 7}


def test_generations_are_synced_one_by_one(tmp_path: Path) -> None:
    """A parent's name is removed only after the removal of its children's names is on the device."""
    tree = make_tree(tmp_path)
    calls = recorded(lambda: vhdkit.collect_garbage(tmp_path, [tree["b1"]], delete=True))
    order = [
        os.path.basename(path) if call == "unlink" else call for call, path in calls if call in ("unlink", "fsync")
    ]
    for before, after in (("a2.avhd", "a1.avhd"), ("a1.avhd", "a.avhd")):
        assert "fsync" in order[order.index(before) : order.index(after)]
    assert order[-1] == "fsync"


def test_hostile_folders(tmp_path: Path) -> None:
    """INV-BOUNDED: with loops, self-parents, pipes, links, folders and empty files nothing hangs; loops are kept."""
    one, two = b"\x01" * 16, b"\x02" * 16
    child("two.avhd", unique_id=one, parent_id=two).build().write(tmp_path / "one.avhd")
    child("one.avhd", unique_id=two, parent_id=one).build().write(tmp_path / "two.avhd")
    child("self.avhd", unique_id=b"\x03" * 16, parent_id=b"\x03" * 16).build().write(tmp_path / "self.avhd")
    vhdkit.create_image(tmp_path / "keep.vhd", MIB)
    os.mkfifo(tmp_path / "pipe.vhd")
    (tmp_path / "folder.vhd").mkdir()
    (tmp_path / "empty.vhd").touch()
    (tmp_path / "dev.vhd").symlink_to("/dev/zero")
    Vhd(block_size=1 << 31).build().write(tmp_path / "odd.vhd")
    assert removable(tmp_path, [tmp_path / "keep.vhd"], delete=True) == ["self.avhd"]
    assert {"one.avhd", "two.avhd", "pipe.vhd", "empty.vhd", "dev.vhd", "odd.vhd"} <= set(os.listdir(tmp_path))


def test_invalid_arguments(tmp_path: Path) -> None:
    """No leaves, no folder, or a missing leaf is refused."""
    tree = make_tree(tmp_path)
    with pytest.raises(errors.InvalidArgument, match="every image would be removed"):
        vhdkit.collect_garbage(tmp_path, [])
    with pytest.raises(errors.NotFound):
        vhdkit.collect_garbage(tree["a"], [tree["a"]])
    with pytest.raises(errors.NotFound):
        vhdkit.collect_garbage(tmp_path, [tmp_path / "gone.vhd"])


def test_orphaned_records_of_merges_are_removed(tmp_path: Path) -> None:
    """Cleans orphan merge states: a record is removed if none of its files exists, and kept while one does."""
    tree = make_tree(tmp_path)
    gone = tmp_path / "gone.vhd"
    sources = (Named(str(tmp_path / "leaf.avhd"), b"l" * 16), Named(str(tmp_path / "middle.avhd"), b"m" * 16))
    intent = Intent(Phase.COPY, Named(str(gone), b"t" * 16), sources, False)
    record = Path(folder.sidecar_path(gone, KIND))
    record.write_bytes(intent.encode())
    torn = Path(folder.sidecar_path(tmp_path / "torn.vhd", KIND))
    torn.write_bytes(intent.encode()[:-1])
    for name in ("gone.vhd", "leaf.avhd", "middle.avhd"):
        (tmp_path / name).write_bytes(b"")
        kinds = {one.kind for one in vhdkit.collect_garbage(tmp_path, list(tree.values()), delete=True)}
        assert GarbageKind.RECORD not in kinds and record.exists()
        (tmp_path / name).unlink()
    (listed,) = vhdkit.collect_garbage(tmp_path, list(tree.values()))
    assert (listed.kind, listed.path, listed.removed) == (GarbageKind.RECORD, str(record), False) and record.exists()
    (removed,) = vhdkit.collect_garbage(tmp_path, list(tree.values()), delete=True)
    assert removed.removed and not record.exists() and torn.exists()
