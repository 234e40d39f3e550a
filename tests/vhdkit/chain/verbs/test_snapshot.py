# SPDX-License-Identifier: Apache-2.0
"""Snapshots and linked clones: one, a set, all or none."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
from pathlib import Path

import pytest

import vhdkit
from tests.harness.killing import killings, recorded
from tests.harness.vhd_builder import Vhd
from vhdkit import OpenOptions, errors, folder
from vhdkit.chain.verbs.snapshot import MAX_SET, default_name
from vhdkit.formats.vhd.create import create_dynamic
from vhdkit.store import FileStore
from vhdkit.units import MIB


def make(path: Path, word: bytes) -> Path:
    """A dynamic image that begins with `word`."""
    vhdkit.create_image(path, 3 * MIB)
    with vhdkit.open_disk(path, writable=True) as disk:
        disk.write(MIB, word)
    return path


def word_of(path: Path) -> bytes:
    """What `make` wrote, read through the chain."""
    with vhdkit.open_disk(path) as disk:
        return disk.read(MIB, 5).rstrip(b"\0")


def names(place: Path) -> list[str]:
    """Every name in the folder."""
    return sorted(one.name for one in place.iterdir())


def test_a_snapshot_freezes_the_leaf(tmp_path: Path) -> None:
    """INV-PARENT-READ-ONLY: the leaf keeps its bytes and takes no writes; the child takes them."""
    leaf = make(tmp_path / "disk.vhd", b"one")
    before = leaf.read_bytes()
    child = vhdkit.snapshot(leaf)
    assert child == str(tmp_path / "disk.avhd")
    with vhdkit.open_disk(child, writable=True) as disk:
        disk.write(MIB, b"two")
    assert (word_of(Path(child)), word_of(leaf)) == (b"two", b"one")
    assert leaf.read_bytes() == before
    with pytest.raises(errors.HasChildren):
        vhdkit.open_disk(leaf, writable=True)


@pytest.mark.parametrize(
    ("leaf", "taken", "expected"),
    [
        ("disk.vhd", [], "disk.avhd"),
        ("disk.vhd", ["disk.avhd"], "disk-1.avhd"),
        ("disk.avhd", [], "disk-1.avhd"),
        ("disk-1.avhd", [], "disk-2.avhd"),
        ("disk-9.avhd", ["disk-10.avhd"], "disk-11.avhd"),
        ("DISK.VHD", [], "DISK.avhd"),
        ("disk", [], "disk.avhd"),
        ("a=b c.vhd", ["a=b c.avhd"], "a=b c-1.avhd"),
        (".vhd", [], ".vhd.avhd"),
    ],
)
def test_default_names(tmp_path: Path, leaf: str, taken: list[str], expected: str) -> None:
    """The default name is the leaf's, as an .avhd with the next free number; a dead link counts as taken."""
    for name in taken:
        (tmp_path / name).symlink_to("nowhere")
    assert default_name(str(tmp_path / leaf), ".avhd") == str(tmp_path / expected)


def test_snapshots_of_snapshots_form_a_chain(tmp_path: Path) -> None:
    """Each snapshot is taken of the leaf; one of an inner image is refused, and the error explains clones."""
    leaf = str(make(tmp_path / "disk.vhd", b"one"))
    for _ in range(4):
        leaf = vhdkit.snapshot(leaf)
    assert os.path.basename(leaf) == "disk-3.avhd" and word_of(Path(leaf)) == b"one"
    with pytest.raises(errors.HasChildren, match="vhdkit clone"):
        vhdkit.snapshot(tmp_path / "disk.vhd", tmp_path / "other.avhd")


def test_a_frozen_vhdx_has_no_log_to_replay(tmp_path: Path) -> None:
    """A leaf whose writer died is frozen with its log replayed, so that programs that ignore logs read it right; one
    that has a child already, and the base of clones, stay as they are."""
    leaf, child = tmp_path / "disk.vhdx", tmp_path / "child.avhdx"
    vhdkit.create_image(leaf, 4 * MIB, disk_format="vhdx")
    if (writer := os.fork()) == 0:
        disk = vhdkit.open_disk(leaf, writable=True)
        disk.write(MIB, b"flushed" * 100)
        disk.flush()
        os._exit(0)
    os.waitpid(writer, 0)
    before = leaf.read_bytes()
    assert has_log(leaf)
    vhdkit.clone(leaf, [tmp_path / "clone.avhdx"])
    with pytest.raises(errors.HasChildren):
        vhdkit.snapshot(leaf, child)
    vhdkit.snapshot(tmp_path / "clone.avhdx", child, dry_run=True)
    assert leaf.read_bytes() == before
    (tmp_path / "clone.avhdx").unlink()
    vhdkit.snapshot(leaf, child, dry_run=True)
    assert leaf.read_bytes() == before
    vhdkit.snapshot(leaf, child)
    assert not has_log(leaf)
    with vhdkit.open_disk(child) as disk:
        assert disk.read(MIB, 700) == b"flushed" * 100


def has_log(path: Path) -> bool:
    """True if the image's log has entries that were not replayed."""
    return any(one.code == "log-not-replayed" for one in vhdkit.check(path))


def test_a_busy_leaf_is_refused(tmp_path: Path) -> None:
    """A leaf that is being written to, or whose killed footer says so, gets no snapshot; one that is read does."""
    leaf = make(tmp_path / "disk.vhd", b"one")
    with vhdkit.open_disk(leaf, writable=True), pytest.raises(errors.ImageInUse):
        vhdkit.snapshot(leaf)
    killed = tmp_path / "killed.vhd"
    Vhd(tail=b"\xc7" * 512).build().write(killed)
    with pytest.raises(errors.ImageInUse, match="0xC7"):
        vhdkit.snapshot(killed)
    assert names(tmp_path) == ["disk.vhd", "killed.vhd"]
    with vhdkit.open_disk(leaf):
        vhdkit.snapshot(leaf)


def test_a_set_is_all_or_none(tmp_path: Path) -> None:
    """If one disk of a set cannot be frozen, or one name is taken, no child of the set is left."""
    leaves = [make(tmp_path / f"{number}.vhd", b"w%d" % number) for number in range(3)]
    before = names(tmp_path)
    with vhdkit.open_disk(leaves[2], writable=True), pytest.raises(errors.ImageInUse):
        vhdkit.snapshot_many([(leaf, None) for leaf in leaves])
    taken = tmp_path / "taken.avhd"
    taken.write_bytes(b"mine")
    with pytest.raises(errors.AlreadyExists):
        vhdkit.snapshot_many([(leaves[0], None), (leaves[1], None), (leaves[2], taken)])
    assert taken.read_bytes() == b"mine"
    taken.unlink()
    assert names(tmp_path) == before
    made = vhdkit.snapshot_many([(leaf, None) for leaf in leaves])
    assert [word_of(Path(one)) for one in made] == [b"w0", b"w1", b"w2"]


@pytest.mark.parametrize("strike", ["link", "fsync"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_failing_set_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strike: str, at: int) -> None:
    """test_vhd_util_snapshot_enospc: a failure at any name or folder flush, or Ctrl-C, removes every name again."""
    places = [tmp_path / str(number) for number in range(3)]
    for place in places:
        place.mkdir()
    leaves = [make(place / "disk.vhd", b"x") for place in places]
    real, calls = getattr(os, strike), [0]

    def failing(*args: object) -> object:
        calls[0] += 1
        if calls[0] == at:
            raise KeyboardInterrupt if at == 3 else OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, strike, failing)
    with pytest.raises((errors.NoSpace, KeyboardInterrupt)):
        vhdkit.snapshot_many([(leaf, None) for leaf in leaves])
    assert [names(place) for place in places] == [["disk.vhd"]] * 3


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """test_vhd_util_snapshot_enospc: ENOSPC at the n-th write, for every n, leaves the folder unchanged."""
    leaves = [make(tmp_path / name, b"x") for name in ("a.vhd", "b.vhd")]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real, left = os.pwrite, [0]

    def failing(*args: object) -> object:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(28, "No space left on device")
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pwrite", failing)
    for at in itertools.count(1):
        left[0] = at
        try:
            vhdkit.snapshot_many([(leaf, None) for leaf in leaves])
        except errors.NoSpace as error:
            assert error.exit_code == 7
        else:
            break
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert at > 6 and len(names(tmp_path)) == 4


def test_killed_at_any_call_every_disk_reads_as_before(tmp_path: Path) -> None:
    """INV-SET-HARMLESS: killed at any call, leaves keep their bytes, children are empty, a second run completes."""
    home, kept = tmp_path / "home", tmp_path / "kept"
    kept.mkdir()
    leaves = [make(kept / f"{number}.vhd", b"w%d" % number) for number in range(3)]
    bytes_of = {leaf.name: leaf.read_bytes() for leaf in leaves}
    pairs = [(home / leaf.name, home / f"{leaf.stem}.avhd") for leaf in leaves]
    seen = set()
    shutil.copytree(kept, home)
    for number in killings(lambda: vhdkit.snapshot_many(pairs)):
        found = [child for _, child in pairs if child.exists()]
        seen.add(len(found))
        for leaf, child in pairs:
            assert leaf.read_bytes() == bytes_of[leaf.name]
            assert word_of(leaf) == b"w" + leaf.stem.encode()
            if child in found:
                assert word_of(child) == word_of(leaf)
        if number > 0:
            if len(found) < len(pairs):
                assert vhdkit.snapshot_many(pairs) == [str(child) for _, child in pairs]
            assert all(word_of(child) == word_of(leaf) for leaf, child in pairs)
        shutil.rmtree(home)
        shutil.copytree(kept, home)
    assert seen == {0, 1, 2, 3}


def test_names_lost_by_a_power_cut(tmp_path: Path) -> None:
    """INV-SET-HARMLESS: whichever new names reached the device, the disks read the same, a second run completes."""
    for kept in itertools.product((False, True), repeat=3):
        place = tmp_path / "".join("ny"[one] for one in kept)
        place.mkdir()
        pairs = [(make(place / f"{number}.vhd", b"same"), place / f"{number}.avhd") for number in range(3)]
        vhdkit.snapshot_many(pairs)
        for (leaf, child), stays in zip(pairs, kept, strict=True):
            if not stays:
                child.unlink()
            assert word_of(child if stays else leaf) == b"same"
        if not all(kept):
            vhdkit.snapshot_many(pairs)
        else:
            with pytest.raises(errors.AlreadyExists):
                vhdkit.snapshot_many(pairs)
        assert all(word_of(child) == b"same" for _, child in pairs)


def test_a_child_with_data_is_not_treated_as_left_over(tmp_path: Path) -> None:
    """Repeating a set does not touch children that have been written to, nor other files."""
    pairs = [(make(tmp_path / f"{number}.vhd", b"x"), tmp_path / f"{number}.avhd") for number in range(2)]
    vhdkit.snapshot_many(pairs)
    with vhdkit.open_disk(pairs[0][1], writable=True) as disk:
        disk.write(0, b"work")
    pairs[1][1].unlink()
    with pytest.raises(errors.AlreadyExists):
        vhdkit.snapshot_many(pairs)
    assert not pairs[1][1].exists()


def test_children_are_durable_before_they_have_names(tmp_path: Path) -> None:
    """INV-DATA-BEFORE-METADATA, for names: every file is synced before the first name, every folder after the last."""
    leaves = [make(tmp_path / f"{number}.vhd", b"x") for number in range(2)]
    calls = [
        (call, os.path.basename(path))
        for call, path in recorded(lambda: vhdkit.snapshot_many([(leaf, None) for leaf in leaves]))
    ]
    order = [call for call, _ in calls if call in ("fdatasync", "link", "fsync")]
    assert order == ["fdatasync", "fdatasync", "link", "link", "fsync"]
    assert [path for call, path in calls if call == "link"] == ["0.avhd", "1.avhd"]
    last_write = max(index for index, (call, _) in enumerate(calls) if call == "pwrite")
    assert last_write < [call for call, _ in calls].index("fdatasync")


def test_invalid_sets(tmp_path: Path) -> None:
    """A leaf or name given twice, a child under its leaf's name, an empty set, too many: no file is made."""
    leaf, other = make(tmp_path / "a.vhd", b"x"), make(tmp_path / "b.vhd", b"x")
    new = tmp_path / "new.avhd"
    for pairs in (
        [],
        [(leaf, None), (tmp_path / "." / "a.vhd", new)],
        [(leaf, new), (other, new)],
        [(leaf, leaf)],
        [(leaf, None)] * (MAX_SET + 1),
    ):
        with pytest.raises(errors.InvalidArgument):
            vhdkit.snapshot_many(pairs)
    (tmp_path / "link.vhd").symlink_to("a.vhd")
    with pytest.raises(errors.InvalidArgument, match="twice"):
        vhdkit.snapshot_many([(leaf, None), (tmp_path / "link.vhd", new)])
    assert names(tmp_path) == ["a.vhd", "b.vhd", "link.vhd"]


def test_dry_runs_make_no_file(tmp_path: Path) -> None:
    """A dry run reports the names, and finds what would prevent the snapshot."""
    leaf = make(tmp_path / "a.vhd", b"x")
    assert vhdkit.snapshot(leaf, dry_run=True) == str(tmp_path / "a.avhd")
    assert vhdkit.clone(leaf, [tmp_path / "c.avhd"], dry_run=True) == [str(tmp_path / "c.avhd")]
    (tmp_path / "b.vhd").write_bytes(b"taken")
    with pytest.raises(errors.AlreadyExists):
        vhdkit.snapshot(leaf, tmp_path / "b.vhd", dry_run=True)
    with pytest.raises(errors.NotFound):
        vhdkit.snapshot(leaf, tmp_path / "no" / "child.avhd", dry_run=True)
    assert names(tmp_path) == ["a.vhd", "b.vhd"]


def test_clones_share_their_base(tmp_path: Path) -> None:
    """Linked clones start as their base, in any folder, and do not see each other's writes."""
    base = make(tmp_path / "base.vhd", b"gold")
    (tmp_path / "far").mkdir()
    paths = [tmp_path / "one.avhd", tmp_path / "two.avhd", tmp_path / "far" / "three.avhd"]
    assert vhdkit.clone(base, paths) == [str(path) for path in paths]
    with vhdkit.open_disk(paths[0], writable=True) as disk:
        disk.write(MIB, b"mine")
    assert word_of(paths[1]) == b"gold"
    with vhdkit.open_disk(paths[2], options=OpenOptions(parent_dirs=(str(tmp_path),))) as disk:
        assert disk.read(MIB, 4) == b"gold"
    vhdkit.clone(base, [tmp_path / "four.avhd"])
    ids = {path.read_bytes()[68:84] for path in tmp_path.glob("*.avhd")}
    assert len(ids) == 3


def test_killed_clones_are_empty_children(tmp_path: Path) -> None:
    """INV-SET-HARMLESS: clones killed at any call are the first few, empty, and their base is unchanged."""
    base = make(tmp_path / "base.vhd", b"gold")
    before = base.read_bytes()
    paths = [tmp_path / f"{number}.avhd" for number in range(3)]
    seen = set()
    for _ in killings(lambda: vhdkit.clone(base, paths)):
        assert base.read_bytes() == before
        found = [path for path in paths if path.exists()]
        assert found == paths[: len(found)]
        seen.add(len(found))
        for path in found:
            assert word_of(path) == b"gold"
            path.unlink()
    assert seen == {0, 1, 2, 3}


def test_files_under_construction_are_locked(tmp_path: Path) -> None:
    """A partial file is locked by its maker, so that it can be distinguished from one that a dead process left."""
    with folder.NewFile(tmp_path / "new.vhd") as new:
        (part,) = tmp_path.glob(".vhdkit-*.part")
        with pytest.raises(errors.ImageInUse), FileStore.open(part) as store:
            store.lock(writer=True)
        create_dynamic(new.store, MIB)
        new.commit()
        vhdkit.open_disk(tmp_path / "new.vhd", writable=True).close()


@pytest.mark.parametrize("named", [True, False])
def test_two_snapshots_at_once(tmp_path: Path, named: bool) -> None:
    """Of several snapshots of one leaf that start together exactly one is made; the others report the reason."""
    leaf = tmp_path / "leaf.vhd"
    vhdkit.create_image(leaf, 1 << 20)
    for _ in range(5):
        start = threading.Barrier(4)
        made: list[str] = []
        refused: list[str] = []

        def take(
            number: int,
            start: threading.Barrier = start,
            made: list[str] = made,
            refused: list[str] = refused,
        ) -> None:
            start.wait()
            try:
                made.append(vhdkit.snapshot(leaf, tmp_path / f"new-{number}.avhd" if named else None))
            except errors.HasChildren as error:
                refused.append(str(error))

        threads = [threading.Thread(target=take, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == 1 and len(refused) == 3, (made, refused)
        os.unlink(made[0])
