# SPDX-License-Identifier: Apache-2.0
"""Merges that stopped at any step: what the files show then, how they are resumed, and what an attempt leaves."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import vhdkit
from tests.vhdkit.chain.verbs.test_merge import (
    Stopped,
    content,
    each_format,
    family,
    files,
    make_chain,
    stop_at,
    stopped,
    write,
)
from vhdkit import errors
from vhdkit.chain.records.intent import KIND
from vhdkit.chain.verbs import merge_steps
from vhdkit.folder import sidecar_path
from vhdkit.formats.vhd.dynamic import DynamicImage
from vhdkit.image import Layer, Piece
from vhdkit.units import MIB

__all__ = ["each_format"]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("empty", [False, True])
def test_resuming_leaves_the_names_of_the_targets_parent(empty: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The space that is freed ends behind the locators, which a relinked image has behind its blocks, and one without
    blocks behind its table."""
    if empty:
        names = ["leaf.avhd", *make_chain(1)]
        names.insert(1, "middle.avhd")
        for child, parent in ((1, 2), (0, 1)):
            vhdkit.create_child(names[child], names[parent])
        write(names[0], 5)
    else:
        names = make_chain(3)
        os.rename(names[2], "moved.vhd")
        names[2] = "moved.vhd"
        vhdkit.rebase(names[1], names[2])
    before = content(names[0])

    def copy_in(self: DynamicImage, pieces: Sequence[Piece]) -> None:
        raise errors.IoFailed("stopped")  # before there is anything behind the names

    with monkeypatch.context() as patch, pytest.raises(errors.IoFailed):
        patch.setattr(DynamicImage, "copy_in", copy_in)
        vhdkit.merge(names[0])
    with monkeypatch.context() as patch, pytest.raises(errors.IoFailed):
        patch.setattr(DynamicImage, "copy_in", copy_in)
        vhdkit.resume_merge(names[1])
    assert content(names[0]) == before
    vhdkit.resume_merge(names[1])
    assert [one for one in vhdkit.check(names[1]) if one.severity >= vhdkit.Severity.WARNING] == []
    assert content(names[1]) == before


def test_the_record_of_a_stopped_merge_goes_with_its_target() -> None:
    """If the target of a stopped merge is itself merged further down, its record is removed with it."""
    names = make_chain(3)
    before = content(names[0])

    def stop(done: int, total: int) -> None:
        raise errors.Cancelled("enough")

    with pytest.raises(errors.Cancelled):
        vhdkit.merge(names[0], into=names[1], progress=stop)
    assert vhdkit.merge_under_way(names[1]) is not None
    vhdkit.merge(names[0], into=names[2])
    assert content(names[2]) == before
    assert os.listdir() == [names[2]]


# -- stopped at each step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(1, 8))
@pytest.mark.usefixtures("each_format")
def test_can_resume_after_each_step(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-MERGE-PRESERVES: stopped before any step (SM's fist points coalescing_VHD_data, before_create_relink,
    before_delete, after_delete, before_remove_j; XO 'can resume a simple merge', 'can resume a multiple merge', 'can
    resume a failed renaming'), the leaf or the target reads as before, and the merge can be completed."""
    names = make_chain(4)
    before = content(names[0])
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        try:
            vhdkit.merge(names[0], into=names[3])
            assert step == 7, "the merge has more steps than the test stopped"
        except Stopped:
            assert step < 7
    assert content(names[0] if os.path.exists(names[0]) else names[3]) == before
    if step == 1:
        assert vhdkit.merge_under_way(names[0]) is None
        with pytest.raises(errors.InvalidArgument, match="no interrupted merge"):
            vhdkit.resume_merge(names[0])
        vhdkit.merge(names[0], into=names[3])
    elif step < 7:
        assert vhdkit.merge_under_way(names[step % 4]) == os.path.realpath(names[3])
        vhdkit.resume_merge(names[step % 4])
    assert files() == [names[3]] and content(names[3]) == before


@pytest.mark.parametrize("step", range(2, 6))
@pytest.mark.usefixtures("each_format")
def test_can_resume_a_merge_that_relinks(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SM's fist point relinking_grandchildren: children of the leaf read the same wherever the merge stopped."""
    names = make_chain(2)
    for child in (family().child("child1"), family().child("child2")):
        vhdkit.create_child(child, names[0])
        write(child, 4)
    before = content(family().child("child1"))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, step)
        vhdkit.merge(names[0], relink_children=True)
    assert content(family().child("child1")) == content(family().child("child2")) == before
    vhdkit.resume_merge(names[1])
    assert files() == [family().base, family().child("child1"), family().child("child2")]
    assert content(family().child("child1")) == content(family().child("child2")) == before


@pytest.mark.parametrize("block", [0, 1, 5])
@pytest.mark.usefixtures("each_format")
def test_can_resume_in_the_middle_of_the_data(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """XO 'mergeRemoteDisk resumes after interruption': later writes to the leaf are merged, too."""
    names = make_chain(3)
    seen = 0
    honest: Callable[[Layer, Sequence[Piece]], None] = family().layer_class.copy_in  # type: ignore[assignment]

    def copy_in(self: Layer, pieces: Sequence[Piece]) -> None:
        nonlocal seen
        seen += 1
        if seen > block:
            raise errors.NoSpace("full")
        honest(self, pieces)

    before = content(names[0])
    with monkeypatch.context() as patch, pytest.raises(errors.NoSpace):
        patch.setattr(family().layer_class, "copy_in", copy_in)
        vhdkit.merge(names[0], into=names[2])
    assert content(names[0]) == before
    write(names[0], 77)
    before = content(names[0])
    vhdkit.resume_merge(names[2])
    assert files() == [names[2]] and content(names[2]) == before


@pytest.mark.usefixtures("each_format")
def test_a_child_made_after_the_interruption_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the leaf got a child before the merge was resumed, resuming is refused, and the child reads as before."""
    names = make_chain(2)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 3)
        vhdkit.merge(names[0])
    vhdkit.create_child(family().child("new"), names[0])
    before = content(family().child("new"))
    with pytest.raises(errors.HasChildren, match="new"):
        vhdkit.resume_merge(names[0])
    assert content(family().child("new")) == before


@pytest.mark.usefixtures("each_format")
def test_an_untrusted_record_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """For torn or foreign records, XO's 'currentBlock = -1' among them, and for ids that differ from those of the
    files, no file is removed."""
    names = make_chain(3)
    before = content(names[0])
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 4)  # the leaf is gone
        vhdkit.merge(names[0], into=names[2])
    record = Path(sidecar_path(names[2], KIND))
    good = record.read_bytes()
    for raw in (good[:50], b"", b'{"currentBlock": -1}\n', good.replace(b"remove", b"copy  "), good + b"x"):
        record.write_bytes(raw)
        assert vhdkit.merge_under_way(names[2]) is None or raw == good + b"x"
    record.write_bytes(good)
    os.rename(names[1], family().child("kept"))
    vhdkit.create_child(names[1], names[2])
    done = vhdkit.resume_merge(names[2])
    assert done.left == (os.path.realpath(names[1]),) and done.removed == ()
    assert names[1] in files() and family().child("kept") in files() and not record.exists()
    assert content(names[2]) == content(names[1]) == before


@pytest.mark.usefixtures("each_format")
def test_a_failing_folder_leaves_a_merge_that_can_be_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the layers cannot be removed, the target is complete, the error says so, and a retry removes them."""
    names = make_chain(2)
    before = content(names[0])

    def refuse(path: str) -> None:
        raise errors.AccessDenied("cannot remove", path=path)

    with monkeypatch.context() as patch, pytest.raises(errors.AccessDenied):
        patch.setattr(merge_steps, "remove_file", refuse)
        vhdkit.merge(names[0])
    assert content(names[0]) == before
    vhdkit.resume_merge(names[0])
    assert files() == [names[1]] and content(names[1]) == before


def codes(path: str) -> list[str]:
    """The codes of `check`'s findings about the chain."""
    return [finding.code for finding in vhdkit.check(path)]


@pytest.mark.usefixtures("each_format")
def test_a_source_of_a_copying_merge_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the record says copy, the leaf is fully usable; check describes the state of the folder, and the target
    alone is not opened for writing, even if the leaf is elsewhere."""
    names = make_chain(3)
    stopped(monkeypatch, names, 2)
    assert "merge-unfinished" in codes(names[0]) and "merge-unfinished" in codes(names[2])
    write(names[0], 5)
    before = content(names[0])
    os.mkdir("away")
    for name in names[:2]:
        os.rename(name, f"away/{name}")
    with pytest.raises(errors.ImageInUse, match="interrupted"):
        vhdkit.open_disk(names[2], writable=True)
    for name in names[:2]:
        os.rename(f"away/{name}", name)
    vhdkit.resume_merge(names[1])
    assert content(names[2]) == before and codes(names[2]) == []


@pytest.mark.parametrize("opened", [0, 2])
@pytest.mark.usefixtures("each_format")
def test_a_writable_open_completes_a_merge(opened: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the data in place a writable open of leaf or target removes the merged layers: the target opens, and for
    the leaf the error says that it was merged into the target. A read-only open changes nothing."""
    names = make_chain(3)
    stopped(monkeypatch, names, 3)
    before, there = content(names[0]), files()
    assert content(names[opened]) and files() == there
    assert "merge-unfinished" in codes(names[opened])
    if opened == 2:
        vhdkit.open_disk(names[2], writable=True).close()
    else:
        with pytest.raises(errors.NotFound, match="was merged into"):
            vhdkit.open_disk(names[opened], writable=True)
    assert files() == [names[2]] and content(names[2]) == before


@pytest.mark.usefixtures("each_format")
def test_a_false_record_removes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a record falsely says complete, the open that would complete the merge refuses, and all files stay."""
    names = make_chain(3)
    stopped(monkeypatch, names, 3)
    with vhdkit.open_disk(names[0]) as disk:
        places = [one.store_offset_bytes for one in disk.extents() if one.layer_index == 0]
    with open(names[0], "r+b") as leaf:  # as another program would
        leaf.seek(next(place for place in places if place is not None))
        leaf.write(b"changed behind our back")
    there, before = files(), content(names[0])
    with pytest.raises(errors.InvalidArgument, match="is not a complete copy"):
        vhdkit.open_disk(names[2], writable=True)
    assert files() == there and content(names[0]) == before
    vhdkit.resume_merge(names[0])
    assert files() == [names[2]] and content(names[2]) == before


@pytest.mark.usefixtures("each_format")
def test_an_open_does_not_remove_left_over_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the leaf nothing can be compared: the user must say --resume. With all gone the record is removed."""
    names = make_chain(3)
    stopped(monkeypatch, names, 4)
    before = content(names[2])
    with pytest.raises(errors.ImageInUse, match="resume"):
        vhdkit.open_disk(names[2], writable=True)
    os.unlink(names[1])
    vhdkit.open_disk(names[2], writable=True).close()
    assert files() == [names[2]] and content(names[2]) == before


@pytest.mark.usefixtures("each_format")
def test_interrupted_attempts_do_not_pile_up_in_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed merge copied without making it reachable is freed by the next attempt."""
    kind, block = family().kind, family().block_size_bytes
    vhdkit.create_image(family().base, 6 * MIB, disk_format=kind, block_size_bytes=block)
    vhdkit.create_child(family().child("leaf"), family().base, block_size_bytes=block)
    write(family().child("leaf"), 1)

    def killed(self: Layer) -> None:
        raise KeyboardInterrupt

    for _ in range(4):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(family().layer_class, "close", killed)
            vhdkit.merge(family().child("leaf"))
    leaked = os.path.getsize(family().base)
    vhdkit.merge(family().child("leaf"))
    assert os.path.getsize(family().base) <= leaked and not vhdkit.check(family().base)
