# SPDX-License-Identifier: Apache-2.0
"""Changes to a parent by another program are noticed; our own changes that keep its children's content are not."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import vhdkit
from tests.harness.killing import killings
from tests.support import daily_or_nightly
from vhdkit import DiskFormat, OpenOptions, Severity
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.names import lineage
from vhdkit.chain.verbs.live import freezing
from vhdkit.chain.verbs.live_merge import live_merge
from vhdkit.chain.verbs.live_pull import live_pull
from vhdkit.units import MIB

RAW = OpenOptions(allow_raw_parent=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that supports notes on files."""
    probe = tmp_path / "probe"
    probe.touch()
    try:
        os.setxattr(probe, "user.vhdkit.probe", b"x")
    except OSError:
        pytest.skip("no extended attributes in the folder for temporary files")
    probe.unlink()
    return tmp_path


def pair(folder: Path, disk_format: DiskFormat = DiskFormat.DYNAMIC) -> tuple[Path, Path]:
    """A base with some data, and a child of it that was written to."""
    base, child = folder / "base.vhd", folder / "child.avhd"
    if disk_format is DiskFormat.RAW:
        base = folder / "base.img"
    vhdkit.create_image(base, 4 * MIB, disk_format=disk_format)
    write(base, 0)
    vhdkit.create_child(child, base, options=RAW)
    write(child, 8192)
    return base, child


def write(path: Path, offset: int) -> None:
    """Write to a disk."""
    with vhdkit.open_disk(path, writable=True, options=RAW) as disk:
        disk.write(offset, b"x" * 4096)


def digest(path: Path) -> bytes:
    """The hash of the whole disk."""
    with vhdkit.open_disk(path, options=RAW) as disk:
        return hashlib.sha256(disk.read(0, disk.size_bytes)).digest()


def touch(path: Path) -> None:
    """Rewrite a byte of a file with the same value, at another time, as another program would."""
    with path.open("r+b") as file:
        byte = file.read(1)
        file.seek(0)
        file.write(byte)
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def codes(path: Path) -> set[str]:
    """The codes of the warnings about the chain, which `check`, `info` and `open` all report alike."""
    wanted = {"parent-written"}
    checked = {one.code for one in vhdkit.check(path, options=RAW) if one.severity >= Severity.WARNING}
    described = {one.code for one in vhdkit_info(path)}
    with vhdkit.open_disk(path, options=RAW) as disk:
        opened = {one.code for one in disk.findings}
    with vhdkit.open_disk(path, writable=True, options=RAW) as disk:
        assert {one.code for one in disk.findings} & wanted == opened & wanted
    assert checked & wanted == described & wanted == opened & wanted
    return checked


def vhdkit_info(path: Path) -> tuple[vhdkit.Finding, ...]:
    """The warnings of `info`."""
    from vhdkit.chain.verbs.describe import describe_image

    return describe_image(path, options=RAW).findings


@pytest.mark.parametrize("disk_format", [DiskFormat.RAW, DiskFormat.FIXED, DiskFormat.DYNAMIC])
def test_a_parent_that_another_program_wrote_is_noticed(folder: Path, disk_format: DiskFormat) -> None:
    """`check`, `info` and `open` warn of it until the command is run that the warning names."""
    base, child = pair(folder, disk_format)
    assert codes(child) == set()
    touch(base)
    assert codes(child) == {"parent-written"}
    (finding,) = (one for one in vhdkit.check(child, options=RAW) if one.code == "parent-written")
    assert f"vhdkit rebase {child} --parent {base}" in finding.message
    vhdkit.rebase(child, base, options=RAW)
    assert codes(child) == set()


def _compact(base: Path, child: Path) -> None:
    vhdkit.compact(base)


def _repair(base: Path, child: Path) -> None:
    with base.open("r+b") as file:
        file.seek(-512, os.SEEK_END)
        file.write(bytes(512))
    status = base.stat()
    os.utime(base, ns=(status.st_atime_ns, status.st_mtime_ns - 10**9))
    vhdkit.rebase(child, base)  # the damage was already there when the parent was last recorded
    assert vhdkit.repair(base).fixes


def _merge(base: Path, child: Path) -> None:
    top = child.with_name("top.avhd")
    vhdkit.snapshot(child, top)
    write(top, 16384)
    vhdkit.merge(child, relink_children=True)
    top.rename(child)


def _relocate(base: Path, child: Path) -> None:
    place = child.parent / "place"
    place.mkdir()
    vhdkit.relocate(child, place)
    assert codes(place / child.name) == set()
    vhdkit.relocate(place / child.name, child.parent)


def _rebase_middle(base: Path, child: Path) -> None:
    top = child.with_name("top.avhd")
    vhdkit.snapshot(child, top)
    vhdkit.rebase(child, base)
    assert codes(top) == set()
    top.unlink()


def _second_child(base: Path, child: Path) -> None:
    vhdkit.clone(base, [base.with_name("second.avhd")])
    assert codes(base.with_name("second.avhd")) == set()


OURS: dict[str, Callable[[Path, Path], None]] = {
    "compact": _compact,
    "repair": _repair,
    "merge": _merge,
    "relocate": _relocate,
    "rebase of a layer between": _rebase_middle,
    "second child": _second_child,
}


@pytest.mark.parametrize("name", OURS)
def test_our_own_changes_of_a_parent_raise_no_warning(folder: Path, name: str) -> None:
    """A change to a parent's file that its children cannot read raises no warning."""
    base, child = pair(folder)
    OURS[name](base, child)
    assert codes(child) == set()


@pytest.mark.parametrize("name", ["compact", "second child"])
def test_our_own_changes_hide_no_foreign_one(folder: Path, name: str) -> None:
    """For its old children a parent that another program wrote to stays changed."""
    base, child = pair(folder)
    touch(base)
    OURS[name](base, child)
    assert codes(child) == {"parent-written"}


def pull_live(leaf: Path) -> None:
    """Relink the middle of a chain of four to the base, as a server does."""
    chain = Chain.open(leaf, writable=True)
    with live_pull(chain, 1, 2, cuts=True) as pulling:
        pulling.copy()
        chain, problem = pulling.exchange()
        assert problem is None
    chain.close()


def is_warned(path: Path) -> bool:
    """Whether `check` says that a parent was written to."""
    return "parent-written" in {one.code for one in vhdkit.check(path)}


@pytest.mark.parametrize("suffix", ["vhd", "vhdx"])
def test_a_merge_to_a_new_file_hides_no_foreign_change(folder: Path, suffix: str) -> None:
    """The new image warns of what another program did to its parent, before or after, as the merged layers did."""
    base, lower, leaf, new = (folder / f"{name}.{suffix}" for name in ("base", "lower", "leaf", "new"))
    for touched in ("before", "after"):
        for path in (base, lower, leaf, new):
            path.unlink(missing_ok=True)
        vhdkit.create_image(base, 4 * MIB, disk_format=DiskFormat.VHDX if suffix == "vhdx" else DiskFormat.DYNAMIC)
        vhdkit.create_child(lower, base)
        vhdkit.create_child(leaf, lower)
        touch(base) if touched == "before" else None
        vhdkit.merge(leaf, into=lower, to=new)
        assert vhdkit.chain_paths(new) == [str(new), str(base)]
        assert is_warned(new) == (touched == "before")
        touch(base)
        assert is_warned(new)


@pytest.mark.parametrize("is_live", [False, True])
@pytest.mark.parametrize("suffix", ["vhd", "vhdx"])
def test_a_pull_hides_no_foreign_change(folder: Path, suffix: str, is_live: bool) -> None:
    """An image that becomes a child of the layer below warns of what another program did to it, before or after."""
    base, *children = (folder / name for name in (f"base.{suffix}", *(f"{one}.a{suffix}" for one in "lit")))
    for touched in ("before", "after"):
        for path in (base, *children):
            path.unlink(missing_ok=True)
        vhdkit.create_image(base, 4 * MIB, disk_format=DiskFormat.VHDX if suffix == "vhdx" else DiskFormat.DYNAMIC)
        for child, parent in zip(children, [base, *children], strict=False):
            vhdkit.create_child(child, parent)
        lower, image, top = children
        touch(base) if touched == "before" else None
        pull_live(top) if is_live else vhdkit.pull(image, to=lower, relink=True)
        assert vhdkit.chain_paths(image) == [str(image), str(base)]
        assert is_warned(image) == (touched == "before")
        touch(base)
        assert is_warned(image)


def test_our_interrupted_change_raises_no_warning(folder: Path) -> None:
    """Wherever a compaction of a parent is killed, also after a second run, there is no warning."""
    base, child = folder / "base.vhd", folder / "child.avhd"
    vhdkit.create_image(base, 4 * MIB, block_size_bytes=512 << 10)
    with vhdkit.open_disk(base, writable=True) as disk:
        for block in range(3):  # the first one is to go
            disk.write(block << 19, b"x" * 4096)
        disk.write(0, bytes(4096))
    vhdkit.create_child(child, base)
    before, size = digest(child), base.stat().st_size
    for _ in killings(lambda: vhdkit.compact(base)):
        assert codes(child) <= {"change-unfinished"}
    vhdkit.compact(base)
    assert codes(child) == set() and base.stat().st_size < size
    touch(base)
    assert codes(child) == {"parent-written"}
    vhdkit.rebase(child, base)

    with pytest.raises(KeyboardInterrupt), lineage.same_content(str(base)):
        touch(base)
        raise KeyboardInterrupt
    assert codes(child) == set() and digest(child) == before


def chain_over_a_killed_writer(home: Path, disk_format: DiskFormat) -> list[Path]:
    """A chain of three, leaf first, whose base was flushed by a process that was killed, and not opened since."""
    suffix = "x" if disk_format is DiskFormat.VHDX else ""
    leaf, middle, base = (home / f"{name}vhd{suffix}" for name in ("leaf.a", "middle.a", "base."))
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    vhdkit.create_image(base, 4 * MIB, disk_format=disk_format)
    if (writer := os.fork()) == 0:
        disk = vhdkit.open_disk(base, writable=True)
        disk.write(MIB, b"flushed")
        disk.flush()
        os._exit(0)
    os.waitpid(writer, 0)
    if disk_format is DiskFormat.DYNAMIC:
        with base.open("ab") as file:
            file.write(bytes(4096))  # a block that it had begun
    for child, parent in ((middle, base), (leaf, middle)):
        vhdkit.create_child(child, parent)
        write(child, 8192)
    return [leaf, middle, base]


def merge_live(leaf: Path) -> None:
    """Merge the middle of a chain of three into its base, as a server does."""
    chain = Chain.open(leaf, writable=True)
    with live_merge(chain, 1, 2) as merging:
        merging.copy()
        chain, problem = merging.exchange()
        assert problem is None
        merging.done()
    chain.close()


@pytest.mark.parametrize("disk_format", [DiskFormat.DYNAMIC, DiskFormat.VHDX])
@pytest.mark.parametrize("merge", [vhdkit.merge, merge_live], ids=["merge", "live"])
def test_a_killed_merge_raises_no_warning(
    folder: Path, disk_format: DiskFormat, merge: Callable[[Path], object]
) -> None:
    """Wherever a merge is killed, also before it has a record, no image that remains warns about the parent that the
    merge changes; afterwards, changes by other programs are noticed."""
    images = chain_over_a_killed_writer(folder / "home", disk_format)
    for number in killings(partial(merge, images[0]), step=daily_or_nightly(13, 1)):
        for image in images:
            if image.exists() and images[-1].exists():
                assert "parent-written" not in {one.code for one in vhdkit.check(image)}, (number, image)
        if number > 0:
            chain_over_a_killed_writer(folder / "home", disk_format)
    if merge is merge_live:
        touch(images[-1])
        assert codes(images[0]) == {"parent-written"}


def test_an_image_that_a_merge_does_not_know_is_warned(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """While a merge into a parent is unfinished, a child of that parent that the merge does not know is warned."""
    images = chain_over_a_killed_writer(folder / "home", DiskFormat.DYNAMIC)
    other, hidden = folder / "home" / "other.avhd", tmp_path_factory.mktemp("away") / "other.avhd"
    vhdkit.create_child(other, images[-1])
    os.rename(other, hidden)  # so that the merge does not find it
    chain = Chain.open(images[0], writable=True)
    with live_merge(chain, 1, 2) as merging:
        merging.copy()
    chain.close()
    os.rename(hidden, other)
    found = [{one.code for one in vhdkit.check(image)} for image in (images[1], other)]
    assert ["parent-written" in one for one in found] == [False, True]
    assert all("merge-unfinished" in one for one in found)


def test_a_live_snapshot_records_the_frozen_leaf(folder: Path) -> None:
    """Writes between the making of the child and the freezing of its parent raise no warning."""
    base, _ = folder / "leaf.vhd", vhdkit.create_image(folder / "leaf.vhd", 4 * MIB)
    chain = Chain.open(base, writable=True)
    with freezing([(chain, None)]) as prepared:
        chain.write(0, memoryview(b"x" * 4096))
        (grown,) = prepared.freeze()
        prepared.done()
    grown.close()
    child = Path(prepared.plan.paths[0])
    assert codes(child) == set()
    touch(base)
    assert codes(child) == {"parent-written"}


def test_copies_raise_no_warning(folder: Path) -> None:
    """A chain that was copied, or whose parent is now another file, raises no false alarm."""
    base, child = pair(folder)
    copy = folder / "copy"
    copy.mkdir()
    for path in (base, child):
        shutil.copy2(path, copy)  # including its notes
    assert codes(copy / child.name) == set()
    shutil.copy(base, folder / "again.vhd")
    (folder / "again.vhd").replace(base)
    assert codes(child) == set()


def test_a_foreign_timestamp_is_a_note(folder: Path) -> None:
    """A child of another program that records another timestamp of its parent gets a note, and no warning."""
    from tests.harness.vhd_builder import PARENT_ID, Vhd
    from tests.harness.vhd_builder import child as child_of

    Vhd(unique_id=PARENT_ID, timestamp=1000).build().write(folder / "parent.vhd")
    path = child_of(parent_timestamp=2000).build().write(folder / "child.vhd")
    assert [(one.code, one.severity) for one in vhdkit_info(path)] == [("parent-timestamp", Severity.NOTE)]
    assert "parent-timestamp" not in codes(path)
