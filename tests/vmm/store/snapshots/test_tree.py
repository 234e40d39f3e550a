# SPDX-License-Identifier: Apache-2.0
"""The tree as a value: searched, walked, cut, written and read; and documents that are not trees."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest

from vmm.model.errors import NotFound, VmmError
from vmm.store.snapshots.journal import Delete
from vmm.store.snapshots.tree import Image, Snapshot, Tree, read_tree


def grown() -> Tree:
    """a <- b <- c, a <- d <- now."""
    tree = Tree()
    for number, (name, parent) in enumerate((("a", None), ("b", "a"), ("c", "b"), ("d", "a"))):
        tree.now = None if parent is None else tree.find(parent).id
        one = str(uuid.UUID(int=(number + 1) << 100))
        snapshot = Snapshot(one, name, float(number), tree.now, f"/s/{one}", {"disk-0": f"/{name}"}, "off")
        tree.add(snapshot)
        tree.grow(f"/{name}", f"/{name}-child", "vhd")
    return tree


def names(snapshots: list[Snapshot]) -> list[str]:
    """The names of the snapshots."""
    return [one.name for one in snapshots]


def test_snapshots_are_found_by_name_and_id() -> None:
    """By name, by id, or by the beginning of an id if it is unique."""
    tree = grown()
    a = tree.find("a")
    assert tree.find(a.id) is a and tree.find(a.id[:8].upper()) is a
    for word in ("0000", "zz", "", a.id[:3]):
        with pytest.raises(NotFound):
            tree.find(word)


def test_walking_and_cutting_the_tree() -> None:
    """A subtree lists parents first; children of a removed snapshot, and now, move to its parent."""
    tree = grown()
    a, b, d = (tree.find(name) for name in ("a", "b", "d"))
    assert names(tree.subtree(a.id)) == ["a", "b", "d", "c"] and names(tree.children(None)) == ["a"]
    tree.remove([b])
    assert names(tree.children(a.id)) == ["c", "d"]
    tree.remove([d])
    assert tree.now == a.id
    tree.remove(tree.subtree(a.id))
    assert not tree.snapshots and tree.now is None


def test_a_tree_reads_back() -> None:
    """A written tree reads back unchanged."""
    tree = grown()
    tree.journal = Delete((f"/somewhere/{uuid.uuid4()}",))
    assert read_tree(tree.to_json(), "x") == tree


def test_a_merge_renames_images() -> None:
    """What the merged image had frozen is in the target from then on, and its children are the target's."""
    tree = Tree(images={"/t": Image(None, ours=False), "/m": Image("/t", ours=True), "/n": Image("/m", ours=True),
                        "/o": Image("/n", ours=True)})  # fmt: skip
    tree.add(Snapshot(str(uuid.uuid4()), "a", 0.0, None, "/s", {"disk-0": "/n"}, "off"))
    tree.merged("/t", ["/n", "/m"])
    assert tree.find("a").disks == {"disk-0": "/t"} and tree.images == {
        "/t": Image(None, ours=False), "/o": Image("/t", ours=True),
    }  # fmt: skip


def _spoil(path: tuple[Any, ...], value: object) -> bytes:
    document = json.loads(grown().to_json())
    place = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        _spoil(("schema_version",), 2),
        _spoil(("now",), "unknown"),
        _spoil(("limit",), "many"),
        _spoil(("journal",), 7),
        _spoil(("images", "/a"), 7),
        _spoil(("images", "/a-child"), {"parent": "relative", "ours": True, "format": "vhd"}),
        _spoil(("images", "/a-child"), {"parent": "/a", "ours": "yes", "format": "vhd"}),
        _spoil(("images", "/a-child"), {"parent": "/a-child", "ours": True, "format": "vhd"}),
        _spoil(("images", "/a-child"), {"parent": "/a", "ours": True, "format": "qcow2"}),
        _spoil(("snapshots", 0, "id"), "../../etc"),
        _spoil(("snapshots", 0, "disks"), {"disk-0": "relative"}),
        _spoil(("snapshots", 0, "taken_in"), "dreaming"),
        _spoil(("snapshots", 0, "folder"), "x\0"),
        _spoil(("snapshots", 0, "folder"), "/home/user"),
        _spoil(("snapshots", 0, "folder"), f"/s/../etc/{uuid.UUID(int=1 << 100)}"),
        _spoil(("snapshots", 0, "mode"), 7),
        _spoil(("snapshots", 0, "disks"), 7),
        _spoil(("images", "/a-child"), {"parent": "/a", "ours": True, "format": "vhd", "id": 7}),
        _spoil(("snapshots", 0, "created"), "yesterday"),
        _spoil(("snapshots", 0, "colour"), "red"),
        _spoil(("snapshots", 1, "parent"), str(uuid.uuid4())),
        _spoil(("snapshots", 0, "parent"), str(uuid.UUID(int=2 << 100))),
    ],
)
def test_documents_that_are_not_trees(content: bytes) -> None:
    """They are refused with the file's name, and nothing is guessed."""
    with pytest.raises(VmmError) as failure:
        read_tree(content, "/home/x/snapshots.json")
    assert failure.value.path == "/home/x/snapshots.json"
