# SPDX-License-Identifier: Apache-2.0
"""Layers that are kept for backups, as they are recorded in the tree."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from vmm.model.errors import VmmError
from vmm.store.snapshots.kept import MAX_AT_PATH, MAX_KEPT, MAX_PATHS, Kept, kept_document, kept_of
from vmm.store.snapshots.tree import Image, Tree, read_tree

FIRST = Kept("1" * 32, "/srv/backup", "a" * 32, "disk-0", "/disks/web.vhd")
SECOND = replace(FIRST, night_id="b" * 32, image="/disks/web_00000001.avhd", maker="maker")
OTHER = replace(FIRST, repository="2" * 32, night_id="c" * 32)


def test_records_read_back() -> None:
    """A tree with kept layers reads back unchanged; without any, it is stored as before there were backups."""
    tree = Tree(images={FIRST.image: Image(None, ours=False)}, kept=(FIRST, SECOND))
    assert read_tree(tree.to_json(), "t") == tree
    assert "kept" not in json.loads(Tree().to_json())
    assert kept_of(kept_document(SECOND)) == SECOND


@pytest.mark.parametrize(
    "changes",
    [
        {"repository": "x"}, {"night_id": "../../x"}, {"image": "web.vhd"}, {"image": 7}, {"maker": 7}, {"disk": None},
        {"folder": []}, {"more": 1}, {"repository": 7},
    ],
)  # fmt: skip
def test_damaged_records_are_refused(changes: dict[str, Any]) -> None:
    """A record with other types, names or fields makes the tree a damaged one, which names its file."""
    document = json.loads(Tree().to_json())
    document["kept"] = [{**kept_document(FIRST), **changes}]
    with pytest.raises(VmmError, match=r"snapshots\.json: is damaged"):
        read_tree(json.dumps(document).encode(), "snapshots.json")


def test_there_is_a_limit() -> None:
    """A record cannot fill the memory: a tree has at most so many kept layers."""
    for count, is_good in ((MAX_KEPT, True), (MAX_KEPT + 1, False)):
        document = json.loads(Tree().to_json())
        document["kept"] = [kept_document(FIRST)] * count
        try:
            assert len(read_tree(json.dumps(document).encode(), "t").kept) == count
            assert is_good
        except VmmError:
            assert not is_good


def test_the_next_night_takes_the_place_of_the_last() -> None:
    """A night that exists ends the keeping of the repository's earlier ones, and of no other repository's; one that
    will never exist ends nothing but its own."""
    tree = Tree(kept=(FIRST, OTHER))
    tree.begin_night([SECOND])
    assert set(tree.frozen()) == {FIRST.image, SECOND.image}
    tree.end_night(SECOND.night_id, SECOND.repository, exists=False)
    assert tree.kept == (FIRST, OTHER)
    tree.begin_night([SECOND])
    tree.end_night(SECOND.night_id, SECOND.repository, exists=True)
    assert tree.kept == (OTHER, replace(SECOND, maker=None))


def test_a_kept_layer_that_is_merged_down_is_kept_under_its_new_name() -> None:
    """The image into which it is merged takes its place."""
    tree = Tree(images={SECOND.image: Image(FIRST.image, ours=True)}, kept=(SECOND,))
    tree.merged(FIRST.image, [SECOND.image])
    assert [one.image for one in tree.kept] == [FIRST.image]
    tree.images[FIRST.image] = Image(None, ours=False)
    tree.rename_users_images(lambda path: path.replace("/disks", "/elsewhere"))
    assert [one.image for one in tree.kept] == ["/elsewhere/web.vhd"]


def test_repositories_are_remembered_by_their_paths() -> None:
    """Each path has the ids of the repositories that were there, in a bounded record that reads back; a night that is
    only being written is not remembered by its layers."""
    tree = Tree(kept=(FIRST, SECOND))
    tree.note_repository(["/a", "/b"], "1" * 32)
    tree.note_repository(["/a"], "2" * 32)
    assert tree.repositories_at(["/a"]) == {"1" * 32, "2" * 32} and tree.repositories_at(["/b"]) == {"1" * 32}
    assert tree.repositories_at(["/c"]) == set() and tree.repositories_at(["/srv/backup"]) == {FIRST.repository}
    assert Tree(kept=(SECOND,)).repositories_at(["/srv/backup"]) == set()
    assert read_tree(tree.to_json(), "t") == tree
    for number in range(MAX_PATHS + 9):
        tree.note_repository([f"/{number}", "/a"], f"{number:032x}")
    assert read_tree(tree.to_json(), "t") == tree
    assert len(tree.saved_in) == MAX_PATHS and len(tree.saved_in["/a"]) == MAX_AT_PATH


@pytest.mark.parametrize(
    "record",
    [
        {"a": ["1" * 32]}, {"/a": ["x"]}, {"/a": "1" * 32}, {"/a": [7]}, {"/a": 7}, ["/a"], {"/a": ["1" * 32] * 17},
        {f"/{number}": [] for number in range(65)},
    ],
)  # fmt: skip
def test_a_damaged_record_of_repositories_is_refused(record: Any) -> None:
    """As of layers."""
    document = {**json.loads(Tree().to_json()), "saved_in": record}
    with pytest.raises(VmmError, match=r"snapshots\.json: is damaged"):
        read_tree(json.dumps(document).encode(), "snapshots.json")
