# SPDX-License-Identifier: Apache-2.0
"""Formats whose files have their own id, apart from the one that children record and that may change with a write.

The format is `tests.harness.sparse_format`, with children that accept two ids of their parent.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest

import vhdkit
from tests.harness.sparse_format import SPARSE
from vhdkit import errors, formats
from vhdkit.chain.names.children import drop_stale_marks
from vhdkit.chain.names.lineage import record_parents
from vhdkit.chain.names.marks import mark_child, read_record
from vhdkit.formats.format import CreateRequest
from vhdkit.image import ImageFacts, ParentRef
from vhdkit.store import FileStore
from vhdkit.units import MIB, PAGE_SIZE

OTHER_ID = b"renewed id......"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The format is added to the list of formats, and nowhere else."""
    monkeypatch.setattr(formats, "FORMATS", (SPARSE, *formats.FORMATS))


def facts_of(path: Path) -> ImageFacts:
    """The image's metadata."""
    with FileStore.open(path) as store:
        return SPARSE.facts(store)


def base_in(folder: Path) -> Path:
    """An empty image."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "base.sparse"
    path.touch()
    with FileStore.open(path, writable=True) as store:
        SPARSE.create(store, CreateRequest(MIB, "sparse"))
    return path


def child_in(folder: Path, base: Path, *, present_first: bool) -> Path:
    """An empty child that accepts the present id of `base` and another one."""
    folder.mkdir(parents=True, exist_ok=True)
    path, present = folder / "leaf.sparse", facts_of(base).linkage_id
    assert present is not None
    ids = (present, OTHER_ID) if present_first else (OTHER_ID, present)
    relative = ".\\" + os.path.relpath(base, folder).replace("/", "\\")
    names = ParentRef.of_paths(present, 0, relative=relative, absolute="\\gone", name=base.name).names
    path.touch()
    with FileStore.open(path, writable=True) as store:
        SPARSE.create_child(store, MIB, ParentRef(ids, 0, names), block_size_bytes=PAGE_SIZE)
    return path


def test_image_id_is_that_of_the_file(tmp_path: Path) -> None:
    """Records identify an image by the id that no write changes, not by the one that its children record."""
    base = base_in(tmp_path)
    facts = facts_of(base)
    assert facts.file_id is not None and facts.file_id != facts.linkage_id
    assert vhdkit.image_id(base) == str(uuid.UUID(bytes=facts.file_id))
    with vhdkit.open_disk(base) as disk:
        assert disk.layer_ids == (vhdkit.image_id(base),)


@pytest.mark.parametrize("present_first", [True, False])
def test_marks_of_a_child_with_two_ids_protect_its_parent(tmp_path: Path, present_first: bool) -> None:
    """INV-PARENT-READ-ONLY: a child in another folder counts, whichever of its two ids the parent has now."""
    base = base_in(tmp_path / "bases")
    leaf = child_in(tmp_path / "vm", base, present_first=present_first)
    with FileStore.open(leaf) as store:
        assert mark_child(str(leaf), store, str(base)) is None
    marks = read_record(str(base)).marks
    assert {mark.parent_id for mark in marks} == {OTHER_ID, facts_of(base).linkage_id}
    assert {mark.path for mark in marks} == {str(leaf)}
    drop_stale_marks(str(base))
    assert read_record(str(base)).marks == marks  # the parent may get the other id with its next write
    with pytest.raises(errors.HasChildren, match="leaf"):
        vhdkit.open_disk(base, writable=True)
    leaf.unlink()
    vhdkit.open_disk(base, writable=True).close()
    assert not read_record(str(base)).marks


@pytest.mark.parametrize("present_first", [True, False])
def test_moved_or_repaired_child_accepts_the_same_ids(tmp_path: Path, present_first: bool) -> None:
    """New names for a parent do not change the ids that the child accepts."""
    base = base_in(tmp_path / "vm")
    leaf = child_in(tmp_path / "vm", base, present_first=present_first)
    ids = facts_of(leaf).parent
    moved = tmp_path / "moved"
    moved.mkdir()
    vhdkit.relocate(leaf, moved)
    found = facts_of(moved / leaf.name).parent
    assert ids is not None and found is not None
    assert found.linkage_ids == ids.linkage_ids and found.names != ids.names
    (moved / base.name).rename(moved / "renamed.sparse")
    vhdkit.repair(moved / leaf.name)
    found = facts_of(moved / leaf.name).parent
    assert found is not None and found.linkage_ids == ids.linkage_ids
    assert [name.text for name in found.names][-1] == "renamed.sparse"
    with vhdkit.open_disk(moved / leaf.name) as disk:
        assert disk.read(0, PAGE_SIZE) == bytes(PAGE_SIZE)


@pytest.mark.parametrize("present_first", [True, False])
def test_written_parent_is_noticed_by_any_of_its_ids(tmp_path: Path, present_first: bool) -> None:
    """A parent that was written to after its child was made is reported, whichever of its ids the note names."""
    base = base_in(tmp_path)
    leaf = child_in(tmp_path, base, present_first=present_first)
    record_parents(str(leaf), str(base), facts_of(base).linkage_id or b"")
    with vhdkit.open_disk(leaf) as disk:
        assert not disk.findings
    with FileStore.open(base, writable=True) as store:
        store.truncate(store.size() + PAGE_SIZE)
    with vhdkit.open_disk(leaf) as disk:
        assert [finding.code for finding in disk.findings] == ["parent-written"]
