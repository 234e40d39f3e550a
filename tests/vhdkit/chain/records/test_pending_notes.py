# SPDX-License-Identifier: Apache-2.0
"""What each verb does with an image whose server was killed, and whose notes wait for the next one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import noting
from tests.noting import foreign_child
from tests.vhdkit.formats.test_recall import without_notes
from tests.vhdkit.formats.test_remember import SIZE, image, killed, notes, opened
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.verbs.check import check
from vhdkit.chain.verbs.compact import compact
from vhdkit.chain.verbs.convert import convert
from vhdkit.chain.verbs.create import create_child
from vhdkit.chain.verbs.merge import merge
from vhdkit.chain.verbs.rebase import rebase
from vhdkit.chain.verbs.relocate import relocate
from vhdkit.chain.verbs.repair import repair
from vhdkit.chain.verbs.resize import resize
from vhdkit.chain.verbs.snapshot import clone, snapshot
from vhdkit.disk import open_disk
from vhdkit.errors import HasChildren, NotesUnwritten
from vhdkit.formats import probed
from vhdkit.store import FileStore
from vhdkit.units import SECTOR_SIZE

# A killed process closes no file: the images that stand for one are dropped.
pytestmark = pytest.mark.filterwarnings("ignore:.*was never closed:ResourceWarning")

__all__ = ["image", "notes"]
CHILDREN = pytest.mark.parametrize("image", ["differencing", "vhdx child"], indirect=True)
Verb = Callable[[Path, OpenOptions], Path]


def left_by_a_killed_server(path: Path) -> bytes:
    """Flushed data, then answered writes that were not flushed, in known and in new blocks; the whole content."""
    one, model = opened(path), bytearray(SIZE)
    for first, letter in ((5, b"f"), (2100, b"f"), (6, b"n"), (2101, b"n"), (7000, b"n")):
        if letter == b"n" and first == 6:
            one.flush()
        one.write(first, memoryview(letter * SECTOR_SIZE))
        model[first * SECTOR_SIZE : (first + 1) * SECTOR_SIZE] = letter * SECTOR_SIZE
    killed(one)
    return bytes(model)


def new_child(path: Path) -> Path:
    """The path of a child of an image."""
    suffix = path.suffix if path.suffix.startswith(".a") else f".a{path.suffix[1:]}"
    return path.with_name(f"new{suffix}")


def by_opening(path: Path, options: OpenOptions) -> Path:
    """A writable open."""
    open_disk(path, writable=True, options=options).close()
    return path


def by_snapshot(path: Path, options: OpenOptions) -> Path:
    """A child under which the image is frozen."""
    return Path(snapshot(path, new_child(path), options=options))


def by_clone(path: Path, options: OpenOptions) -> Path:
    """A child of a base."""
    return Path(clone(path, [new_child(path)], options=options)[0])


def by_create_child(path: Path, options: OpenOptions) -> Path:
    """A child that is made by `create`."""
    create_child(new_child(path), path, options=options)
    return new_child(path)


def by_compact(path: Path, options: OpenOptions) -> Path:
    """Compacting."""
    compact(path, options=options)
    return path


def by_resize(path: Path, options: OpenOptions) -> Path:
    """A larger disk."""
    resize(path, 2 * SIZE, options=options)
    return path


def by_repair(path: Path, options: OpenOptions) -> Path:
    """A repair."""
    repair(path, options=options)
    return path


def by_convert(path: Path, options: OpenOptions) -> Path:
    """A copy of the disk."""
    convert(path, path.with_name("copy.img"), "raw", options=options)
    return path.with_name("copy.img")


def by_merging_to(path: Path, options: OpenOptions) -> Path:
    """A merge to a new file."""
    new = path.with_name(f"merged{path.suffix.replace('.a', '.')}")
    merge(path, to=new, options=options)
    return new


def by_merging_a_child(path: Path, options: OpenOptions) -> Path:
    """A merge of a child into the image."""
    merge(foreign_child(path), options=options)
    return path


def by_merging(path: Path, options: OpenOptions) -> Path:
    """A merge of the image into its parent."""
    parent = next(path.parent.glob("base.*"))
    merge(path, options=options)
    return parent


def by_rebase(path: Path, options: OpenOptions) -> Path:
    """The same parent, under another name."""
    parent = next(path.parent.glob("base.*"))
    moved = parent.with_name(f"moved{parent.suffix}")
    parent.rename(moved)
    rebase(path, moved, options=options)
    return path


def by_relocate(path: Path, options: OpenOptions) -> Path:
    """The chain in another folder."""
    (path.parent / "elsewhere").mkdir()
    relocate(path, path.parent / "elsewhere", options=options)
    return path.parent / "elsewhere" / path.name


def by_merge_down(path: Path, options: OpenOptions) -> Path:
    """A merge into whatever is below."""
    return Path(merge(path, options=options).target)


def by_rebasing_onto(path: Path, options: OpenOptions) -> Path:
    """The parent of this child, named again."""
    with FileStore.open(path) as store:
        parent = probed(store).facts(store).parent
    assert parent is not None
    rebase(path, path.parent / parent.names[-1].text.rpartition("\\")[2], options=options)
    return path


VERBS = (
    by_opening, by_snapshot, by_clone, by_create_child, by_compact, by_resize, by_repair, by_convert,
    by_merging_a_child, by_relocate,
)  # fmt: skip
VERBS_OF_CHILDREN = (by_rebase, by_merging, by_merging_to)


def content_of(path: Path, options: OpenOptions | None = None) -> bytes:
    """The first bytes of a disk, as many as the images of this module have."""
    with open_disk(path, options=options or OpenOptions()) as disk:
        return bytes(disk.read(0, SIZE))


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_with_the_folder_writes_the_notes(notes: Path, image: Path, verb: Verb) -> None:
    """INV-ANSWERED-SURVIVES: a verb that is given the folder of notes loses nothing of them."""
    expected = left_by_a_killed_server(image)
    result = verb(image, noting.options())
    assert content_of(result, noting.options()) == expected
    assert not list(notes.iterdir())
    assert content_of(result) == expected


@CHILDREN
@pytest.mark.parametrize("verb", VERBS_OF_CHILDREN)
def test_a_verb_of_children_with_the_folder_writes_the_notes(notes: Path, image: Path, verb: Verb) -> None:
    """INV-ANSWERED-SURVIVES: so does a verb that changes a child."""
    test_a_verb_with_the_folder_writes_the_notes(notes, image, verb)


def test_a_verb_that_only_reads_leaves_the_notes_valid(
    notes: Path, image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """INV-ANSWERED-SURVIVES: a verb without the folder that needs to change nothing in the image leaves it, and its
    log, as the notes expect them."""
    expected, before = left_by_a_killed_server(image), image.read_bytes()
    with without_notes():
        by_convert(image, noting.options())
    assert image.read_bytes() == before
    with open_disk(image, writable=True, options=noting.options()) as disk:
        assert disk.read(0, SIZE) == expected
    assert not list(notes.iterdir()) and not caplog.records


@CHILDREN
def test_a_merge_to_a_new_file_leaves_the_notes_valid(
    notes: Path, image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """INV-ANSWERED-SURVIVES: so does a merge that leaves the chain as it is."""
    expected, before = left_by_a_killed_server(image), image.read_bytes()
    with without_notes():
        by_merging_to(image, noting.options())
    assert image.read_bytes() == before
    assert content_of(image, noting.options()) == expected
    assert not list(notes.iterdir()) and not caplog.records


def refused(path: Path, verb: Verb) -> None:
    """The verb, without the folder, refuses, and names the image, the folder and the commands that help."""
    folder = noting.folder_in_use()
    with without_notes(), pytest.raises(NotesUnwritten) as caught:
        verb(path, noting.options())
    text = str(caught.value)
    assert caught.value.path is not None and Path(caught.value.path).name in text and f"--remember {folder}" in text
    assert "--accept-data-loss" in text


@pytest.mark.parametrize(
    "verb",
    (by_opening, by_snapshot, by_clone, by_create_child, by_compact, by_resize, by_repair, by_relocate),
    ids=lambda one: one.__name__,
)
def test_a_verb_that_would_make_the_notes_void_refuses(
    notes: Path, image: Path, verb: Verb, caplog: pytest.LogCaptureFixture
) -> None:
    """INV-ANSWERED-SURVIVES: a verb without the folder neither changes the image nor gives it a child: what the server
    had acknowledged is still there for its successor."""
    expected = left_by_a_killed_server(image)
    before = {path: path.read_bytes() for path in image.parent.rglob("*") if path.is_file()}
    refused(image, verb)
    assert {path: path.read_bytes() for path in image.parent.rglob("*") if path.is_file()} == before
    assert content_of(image, noting.options()) == expected
    assert not list(notes.iterdir()) and not caplog.records


@CHILDREN
@pytest.mark.parametrize("verb", (by_rebase, by_merging), ids=lambda one: one.__name__)
def test_a_verb_that_would_change_or_remove_a_child_refuses(
    notes: Path, image: Path, verb: Verb, caplog: pytest.LogCaptureFixture
) -> None:
    """INV-ANSWERED-SURVIVES: so does a verb that repoints a child, or merges it away."""
    expected = left_by_a_killed_server(image)
    refused(image, verb)
    for moved in image.parent.glob("moved.*"):
        moved.rename(moved.with_name(f"base{moved.suffix}"))
    assert content_of(image, noting.options()) == expected
    assert not list(notes.iterdir()) and not caplog.records


def test_nothing_is_written_above_an_image_with_notes_elsewhere(notes: Path, image: Path) -> None:
    """INV-ANSWERED-SURVIVES: a child, made by another program, is not written to, merged or given a child without the
    notes of its parent, because they would change what it stands on."""
    expected = left_by_a_killed_server(image)
    with without_notes():
        child = foreign_child(image)
    for verb in (by_opening, by_snapshot, by_merge_down, by_rebasing_onto):
        refused(child, verb)
    assert content_of(child, noting.options()) == expected


@pytest.mark.parametrize("verb", (by_opening, by_compact))
def test_notes_are_not_written_below_a_child_with_sectors(
    notes: Path, image: Path, verb: Verb, caplog: pytest.LogCaptureFixture
) -> None:
    """INV-ANSWERED-SURVIVES: if another program has written to a child, the notes of the parent are set aside, with a
    finding, and the child reads as that program left it."""
    left_by_a_killed_server(image)
    with without_notes():
        child = foreign_child(image, first_sector=6)
        expected = content_of(child)
    verb(image if verb is by_compact else child, noting.options())
    assert any(child.name in record.message and "left out" in record.message for record in caplog.records)
    assert content_of(child, noting.options()) == expected
    assert all(".kept-" in path.name for path in notes.iterdir()) and list(notes.iterdir())
    assert [one.code for one in check(image) if one.code.startswith("notes-")] == ["notes-left-out"]


def test_notes_are_not_written_below_a_child_that_cannot_be_examined(notes: Path, image: Path) -> None:
    """INV-ANSWERED-SURVIVES: neither are they set aside then, as that child may be empty."""
    expected = left_by_a_killed_server(image)
    (image.parent / "elsewhere").mkdir()
    with without_notes():
        child = foreign_child(image, folder=image.parent / "elsewhere")
    opened = os.open

    def refuse(path: str, flags: int, *rest: int, dir_fd: int | None = None) -> int:
        if str(path) == str(child):
            raise PermissionError(13, "Permission denied")
        return opened(path, flags, *rest, dir_fd=dir_fd)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "open", refuse)
        with pytest.raises(HasChildren, match="cannot be examined"):
            content_of(image, noting.options())
    assert content_of(image, noting.options()) == expected


@pytest.mark.parametrize("how", ["repair", "the folder is gone", "the folder is empty"])
def test_notes_are_given_up(notes: Path, image: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    """A repair that accepts the loss gives the notes up, and so does removing them; both are reported, and what was
    noted is never written afterwards."""
    left_by_a_killed_server(image)
    kept = notes.with_name("kept")
    with without_notes():
        expected = content_of(image)
        if how == "repair":
            repair(image, accept_data_loss=True)
        else:
            notes.rename(kept)
            if how == "the folder is empty":
                notes.mkdir()
        by_opening(image, noting.options())
    assert sum("so they are lost" in record.message for record in caplog.records) == 1
    if how != "repair":
        notes.rmdir() if notes.exists() else None
        kept.rename(notes)
    assert content_of(image, noting.options()) == expected


def test_notes_in_a_third_folder(notes: Path, image: Path, tmp_path: Path) -> None:
    """INV-ANSWERED-SURVIVES: a server that is given another folder than the killed one's refuses as well."""
    expected = left_by_a_killed_server(image)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(NotesUnwritten, match=str(notes)):
        open_disk(image, writable=True, options=OpenOptions(notes_folder=other))
    link = tmp_path / "link"
    link.symlink_to(notes)
    with open_disk(image, writable=True, options=OpenOptions(notes_folder=link)) as disk:
        assert disk.read(0, SIZE) == expected
