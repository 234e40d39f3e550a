# SPDX-License-Identifier: Apache-2.0
"""Moving chains: they always open in the old or the new place, and no parent of another image moves with them."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import vhdkit
from tests.harness.killing import killings
from tests.harness.vhd_builder import Block, Vhd, pattern
from tests.support import daily_or_nightly, sample
from vhdkit import OpenOptions, Severity, errors
from vhdkit.chain.verbs import relocate as relocate_module
from vhdkit.folder import sidecar_path
from vhdkit.formats.vhd.metadata import read_metadata
from vhdkit.store import FileStore
from vhdkit.units import MIB


def make_chain(home: Path, *, bases: Path | None = None, suffix: str = ".vhd") -> tuple[Path, bytes]:
    """base <- middle <- leaf, each with data; the base may be in another folder. Returns leaf and content."""
    home.mkdir(exist_ok=True)
    base, middle, leaf = (
        (bases or home) / f"base{suffix}",
        home / f"middle.a{suffix[1:]}",
        home / f"leaf.a{suffix[1:]}",
    )
    base.parent.mkdir(exist_ok=True)
    options = OpenOptions(parent_dirs=(str(base.parent),))
    vhdkit.create_image(base, 3 * MIB, disk_format="vhdx" if suffix == ".vhdx" else "dynamic")
    write(base, 0, b"base", options)
    vhdkit.create_child(middle, base)
    write(middle, MIB, b"middle", options)
    vhdkit.create_child(leaf, middle, options=options)
    write(leaf, 2 * MIB, b"leaf", options)
    return leaf, read(leaf, options)


def write(path: Path, offset: int, data: bytes, options: OpenOptions) -> None:
    """Write to a disk."""
    with vhdkit.open_disk(path, writable=True, options=options) as disk:
        disk.write(offset, data)


def read(path: Path, options: OpenOptions | None = None) -> bytes:
    """The hash of the whole disk."""
    with vhdkit.open_disk(path, options=options) as disk:
        return hashlib.sha256(disk.read(0, disk.size_bytes)).digest()


def opens(path: Path, options: OpenOptions | None, content: bytes) -> bool:
    """Whether the chain opens there; if so, its content must be this."""
    try:
        found = read(path, options)
    except errors.VhdkitError:
        return False
    assert found == content
    return True


def by_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Move by copying, as between two file systems."""
    monkeypatch.setattr(relocate_module, "hard_link", lambda path, new_path: False)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_a_chain_moves_completely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: bool, apart: bool) -> None:
    """Every layer is in the new folder, finds its parent there by its locators, and is gone from the old one."""
    bases = tmp_path / "bases" if apart else None
    leaf, content = make_chain(tmp_path / "old", bases=bases)
    options = OpenOptions(parent_dirs=(str(bases),)) if bases else None
    ids = {path.name: path.read_bytes()[68:84] for path in leaf.parent.iterdir()}
    new = tmp_path / "new ö"
    new.mkdir()
    if copied:
        by_copy(monkeypatch)
    planned = vhdkit.relocate(leaf, new, options=options, dry_run=True)
    assert sorted(os.listdir(new)) == [] and read(leaf, options) == content
    moves = vhdkit.relocate(leaf, new, options=options)
    assert moves == planned
    assert [os.path.basename(one.new_path) for one in moves] == [
        "leaf.avhd",
        "middle.avhd",
        "base.vhd",
    ]
    assert sorted(os.listdir(new)) == ["base.vhd", "leaf.avhd", "middle.avhd"]
    assert os.listdir(leaf.parent) == [] and (bases is None or os.listdir(bases) == [])
    assert read(new / "leaf.avhd") == content
    assert [one for one in vhdkit.check(new / "leaf.avhd") if one.severity > Severity.NOTE] == []
    assert all((new / name).read_bytes()[68:84] == known for name, known in ids.items())
    assert vhdkit.relocate(new / "leaf.avhd", new) and read(new / "leaf.avhd") == content


@pytest.mark.parametrize("suffix", [".vhd", pytest.param(".vhdx", marks=pytest.mark.nightly)])
@pytest.mark.parametrize(
    ("apart", "copied"),
    [
        (False, False),
        (True, True),
        pytest.param(False, True, marks=pytest.mark.nightly),
        pytest.param(True, False, marks=pytest.mark.nightly),
    ],
)
def test_killed_at_any_call_it_opens_somewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: bool, apart: bool, suffix: str
) -> None:
    """INV-CHAIN-SOMEWHERE: killed at any call, the chain opens in its old folder or the new one."""
    kept = tmp_path / "kept"
    kept.mkdir()
    make_chain(kept / "old", bases=kept / "bases" if apart else None, suffix=suffix)
    (kept / "new").mkdir()
    work = tmp_path / "work"
    kept.rename(work)  # so that the locators match the place
    shutil.rmtree(work)
    leaf, content = make_chain_in(work, apart, suffix)
    shutil.copytree(work, kept)
    options = OpenOptions(parent_dirs=(str(work / "bases"),)) if apart else None
    if copied:
        by_copy(monkeypatch)
    seen = set()
    for _ in killings(lambda: vhdkit.relocate(leaf, work / "new", options=options), step=daily_or_nightly(3, 1)):
        found = opens(leaf, options, content), opens(work / "new" / leaf.name, None, content)
        assert any(found)
        seen.add(found)
        shutil.rmtree(work)
        shutil.copytree(kept, work)
    assert {(True, False), (False, True)} <= seen


def names_in(folders: list[Path]) -> list[str]:
    """The names of images in these folders. A record of children whose image is gone may be left (`vhdkit gc`)."""
    return [name for one in folders for name in os.listdir(one) if not name.startswith(".")]


@pytest.mark.parametrize("suffix", [".vhd", pytest.param(".vhdx", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_the_same_command_finishes_a_killed_one(tmp_path: Path, apart: bool, suffix: str) -> None:
    """INV-CHAIN-SOMEWHERE: killed at any call within one file system, the move is completed by the same command. Once
    the last old name is gone, it says that the chain is in its new place."""
    work, kept = tmp_path / "work", tmp_path / "kept"
    leaf, content = make_chain_in(work, apart, suffix)
    shutil.copytree(work, kept)
    options = OpenOptions(parent_dirs=(str(work / "bases"),)) if apart else None
    new, old = work / "new", [leaf.parent, *([work / "bases"] if apart else [])]
    seen = set()
    for number in killings(lambda: vhdkit.relocate(leaf, new, options=options), step=daily_or_nightly(2, 1)):
        there = names_in(old)
        seen.add((leaf.exists(), (new / leaf.name).exists()))
        if there:
            planned = vhdkit.relocate(leaf, new, options=options, dry_run=True)
            assert vhdkit.relocate(leaf, new, options=options) == planned and len(planned) == 3
        elif number > 0:
            with pytest.raises(errors.NotFound, match="moved there already"):
                vhdkit.relocate(leaf, new, options=options)
            for name in os.listdir(new):
                vhdkit.repair(new / name)
        assert names_in(old) == [] and len(os.listdir(new)) == 3
        assert read(new / leaf.name) == content
        assert number < 0 or not [one for one in vhdkit.check(new / leaf.name) if one.severity > Severity.NOTE]
        if not there and daily_or_nightly(1, 0):
            break  # what follows changes only what the images record
        shutil.rmtree(work)
        shutil.copytree(kept, work)
    assert seen == {(True, False), (True, True), (False, True)}


def test_a_continued_move_respects_other_children(tmp_path: Path) -> None:
    """If the parent that still has its old name got another child there, the name stays."""
    leaf, _ = make_chain_in(tmp_path / "work", False)
    new = tmp_path / "work" / "new"
    for name in ("base.vhd", "middle.avhd", "leaf.avhd"):
        os.link(leaf.parent / name, new / name)
    leaf.unlink()
    vhdkit.create_child(leaf.parent / "other.avhd", leaf.parent / "base.vhd")
    with pytest.raises(errors.HasChildren, match=r"other\.avhd"):
        vhdkit.relocate(leaf, new)
    assert sorted(os.listdir(leaf.parent)) == ["base.vhd", "middle.avhd", "other.avhd"]


def make_chain_in(work: Path, apart: bool, suffix: str = ".vhd") -> tuple[Path, bytes]:
    """Make the folders of a move, and the chain in the old one."""
    work.mkdir()
    (work / "new").mkdir()
    return make_chain(work / "old", bases=work / "bases" if apart else None, suffix=suffix)


@pytest.mark.parametrize("copied", [False, True])
def test_names_lost_by_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: bool) -> None:
    """INV-CHAIN-SOMEWHERE: new names are on the device before the first old one is removed; old ones may come back."""
    leaf, content = make_chain(tmp_path / "old")
    new = tmp_path / "new"
    new.mkdir()
    old = {path.name: path for path in leaf.parent.iterdir()}
    spare = tmp_path / "spare"
    shutil.copytree(leaf.parent, spare)
    if copied:
        by_copy(monkeypatch)
    vhdkit.relocate(leaf, new)
    for back in itertools.product((False, True), repeat=3):
        for name, comes in zip(sorted(old), back, strict=True):
            if comes:
                shutil.copy(spare / name, old[name])
        assert read(new / "leaf.avhd") == content
        for path in old.values():
            path.unlink(missing_ok=True)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("call", ["link", "unlink", "pwrite", "fsync", "fdatasync", "ftruncate"])
def test_faults_at_any_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, copied: bool) -> None:
    """INV-CHAIN-SOMEWHERE: EIO or ENOSPC at the n-th call, for every n, is a typed error, and the chain opens. Every
    day each second call of the frequent ones fails."""
    if copied:
        by_copy(monkeypatch)
    real, left = getattr(os, call), [0]

    def failing(*args: object, **options: object) -> object:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(28 if call in ("pwrite", "link") else 5, "simulated")
        return real(*args, **options)

    monkeypatch.setattr(os, call, failing)
    for at in itertools.count(1, 2 if call in ("pwrite", "fdatasync") and daily_or_nightly(1, 0) else 1):
        work = tmp_path / str(at)
        leaf, content = make_chain_in(work, False)
        left[0] = at
        try:
            vhdkit.relocate(leaf, work / "new")
        except errors.VhdkitError as error:
            left[0] = 0
            moved = opens(work / "new" / "leaf.avhd", None, content)
            assert opens(leaf, None, content) or moved, error
            assert not [one for one in os.listdir(work / "new") if one.endswith(".part")]
        else:
            left[0] = 0
            break
        shutil.rmtree(work)
    assert opens(work / "new" / "leaf.avhd", None, content)


def other_child(tmp_path: Path) -> None:
    vhdkit.create_child(tmp_path / "old" / "other.avhd", tmp_path / "old" / "base.vhd")


def name_taken(tmp_path: Path) -> None:
    (tmp_path / "new" / "middle.avhd").write_bytes(b"mine")


def record(tmp_path: Path) -> None:
    Path(sidecar_path(tmp_path / "old" / "middle.avhd", "merge")).write_text("{}")


@pytest.mark.parametrize(
    ("trouble", "kind", "said"),
    [
        (other_child, errors.HasChildren, "other.avhd"),
        (name_taken, errors.AlreadyExists, "already exists"),
        (record, errors.InvalidArgument, "unfinished change"),
    ],
)
def test_chains_that_must_not_move(
    tmp_path: Path, trouble: Callable[[Path], None], kind: type[errors.VhdkitError], said: str
) -> None:
    """Another child of a layer, a taken name, unfinished work: the refusal names it, and nothing changes."""
    leaf, _ = make_chain(tmp_path / "old")
    (tmp_path / "new").mkdir()
    trouble(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(kind, match=said):
        vhdkit.relocate(leaf, tmp_path / "new")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_invalid_places(tmp_path: Path) -> None:
    """No folder, a file, a chain in use, two layers of the same name, a middle layer."""
    leaf, _ = make_chain(tmp_path / "old")
    with pytest.raises(errors.NotFound):
        vhdkit.relocate(leaf, tmp_path / "nowhere")
    with pytest.raises(errors.NotFound):
        vhdkit.relocate(leaf, leaf)
    (tmp_path / "new").mkdir()
    with pytest.raises(errors.HasChildren):
        vhdkit.relocate(tmp_path / "old" / "middle.avhd", tmp_path / "new")
    with vhdkit.open_disk(leaf), pytest.raises(errors.ImageInUse):
        vhdkit.relocate(leaf, tmp_path / "new")
    (tmp_path / "twin").mkdir()
    twin = tmp_path / "twin" / "base.vhd"
    vhdkit.create_child(twin, leaf)
    with pytest.raises(errors.InvalidArgument, match="two layers of the chain"):
        vhdkit.relocate(twin, tmp_path / "new", options=OpenOptions(parent_dirs=(str(leaf.parent),)))
    assert os.listdir(tmp_path / "new") == []


def test_layers_already_in_the_folder_stay(tmp_path: Path) -> None:
    """A layer that is already in the folder is left there, and its names lead to the parent that was moved."""
    leaf, content = make_chain(tmp_path / "old", bases=tmp_path / "bases")
    options = OpenOptions(parent_dirs=(str(tmp_path / "bases"),))
    moves = vhdkit.relocate(leaf, tmp_path / "old", options=options)
    assert [one.old_path == one.new_path for one in moves] == [True, True, False]
    assert read(leaf) == content and vhdkit.check(leaf) == []


def test_a_parent_found_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a child calls its parent by the name of a link, the chain is copied: second names would not be enough."""
    home = tmp_path / "old"
    home.mkdir()
    vhdkit.create_image(home / "real.vhd", MIB)
    write(home / "real.vhd", 0, b"base", OpenOptions())
    vhdkit.create_child(home / "leaf.avhd", home / "real.vhd")
    (home / "real.vhd").rename(home / "other.vhd")
    (home / "real.vhd").symlink_to("other.vhd")
    (tmp_path / "new").mkdir()
    content = read(home / "leaf.avhd")
    vhdkit.relocate(home / "leaf.avhd", tmp_path / "new")
    assert sorted(os.listdir(tmp_path / "new")) == ["leaf.avhd", "other.vhd"]
    assert read(tmp_path / "new" / "leaf.avhd") == content


def test_a_raw_base_moves_too(tmp_path: Path) -> None:
    """A raw base needs the user's permission, as everywhere, and moves with its chain."""
    home, new = tmp_path / "old", tmp_path / "new"
    home.mkdir()
    new.mkdir()
    (home / "base.raw").write_bytes(b"r" * MIB)
    vhdkit.create_child(home / "leaf.avhd", home / "base.raw")
    with pytest.raises(errors.ParentRefused):
        vhdkit.relocate(home / "leaf.avhd", new)
    trusting = OpenOptions(allow_raw_parent=True)
    vhdkit.relocate(home / "leaf.avhd", new, options=trusting)
    with vhdkit.open_disk(new / "leaf.avhd", options=trusting) as disk:
        assert disk.read(0, 1) == b"r"


@pytest.mark.parametrize("copied", [False, True])
def test_a_real_chain_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: bool) -> None:
    """A differencing disk made by Windows, on a parent with its id: snapshot, clone and move keep the disk's hash."""
    home, new = tmp_path / "old", tmp_path / "new"
    home.mkdir()
    new.mkdir()
    if copied:
        by_copy(monkeypatch)
    path = home / "fat-differential.vhd"
    path.write_bytes(gzip.decompress(sample("dfvfs/fat-differential.vhd.gz").read_bytes()))
    header = read_metadata_of(path)
    Vhd(size=header.size_bytes, unique_id=header.parent_id, blocks={0: Block(pattern(4 * MIB // 2))}).build().write(
        home / header.parent_name
    )
    content = read(path)
    child = vhdkit.snapshot(path)
    assert read(Path(child)) == content
    vhdkit.relocate(child, new)
    moved = new / os.path.basename(child)
    assert read(moved) == content and os.listdir(home) == []
    clones = vhdkit.clone(moved, [new / "one.avhd", new / "two.avhd"])
    assert [read(Path(one)) for one in clones] == [content, content]


@dataclass
class _Known:
    size_bytes: int
    parent_id: bytes
    parent_name: str


def read_metadata_of(path: Path) -> _Known:
    """What a real child records about itself and its parent."""
    with FileStore.open(path) as store:
        metadata = read_metadata(store)
    assert metadata.header is not None
    name = metadata.parent_name.replace("\\", "/").rsplit("/", 1)[-1]
    return _Known(metadata.size_bytes, metadata.header.parent_unique_id, name)
