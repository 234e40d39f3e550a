# SPDX-License-Identifier: Apache-2.0
"""Unreferenced layers in a folder: found, reported, and removed on request.

Decides what is garbage and in which order it is removed. It is conservative: whatever might be needed stays.

    reached from the given leaves                     stays, and is not listed
    damaged, in use, with a record of unfinished work stays, and so does every parent of it
    the parent of an image in a nearby folder         stays
    every other VHD in the folder                     removed, children before parents, with the folder synced between

So after a power cut no child is without its parent. Only regular files directly in the folder are considered, no link
is followed, and anything but a VHD (a raw disk, for example) is never touched. A half-made file is removed if its
maker is dead, the record of a merge if neither its target nor any of its sources exists: as long as one does, the
record identifies that file.
"""

from __future__ import annotations

import contextlib
import ntpath
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from vhdkit import errors, formats
from vhdkit.arguments import AnyPath, Several, checked
from vhdkit.chain.names import marks
from vhdkit.chain.names.children import Dependent, children_of, drop_stale_marks
from vhdkit.chain.names.opening import open_layers
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.records import pending, references
from vhdkit.chain.records.intent import KIND, intents_about, read_intent
from vhdkit.errors import CorruptImage, CorruptReason, printable
from vhdkit.folder import (
    exists,
    is_folder,
    real_path,
    regular_files,
    subfolders,
    sync_directory,
    unlink,
)
from vhdkit.image import NULL_ID, ParentRef
from vhdkit.local_volume import LOCAL
from vhdkit.named import leads_to
from vhdkit.store import FileStore
from vhdkit.unfinished import parts


class GarbageKind(StrEnum):
    """The kinds of garbage."""

    IMAGE = "image"
    PART = "part"  # a file under construction whose maker died
    RECORD = "record"  # of a merge, of children or of backups, all of whose files are gone


@dataclass(frozen=True, slots=True)
class GarbageItem:
    """One file that no chain reaches. `kept` says why it stays; None if it will be removed, or was (`removed`)."""

    path: str
    kind: GarbageKind
    size_bytes: int
    allocated_bytes: int
    kept: str | None
    removed: bool = False


@dataclass(slots=True)
class _Node:
    """An image in the folder. `parent_ids` is empty if it has no parent; `problem` is why it stays."""

    path: str
    identity: tuple[int, int]
    size_bytes: int
    allocated_bytes: int
    linkage_id: bytes = NULL_ID
    parent_ids: frozenset[bytes] = frozenset()
    parent_names: frozenset[str] = frozenset()
    knows_parent: bool = True
    problem: str | None = None
    removed: bool = False

    def may_be_child_of(self, other: _Node) -> bool:
        """True if `other` may be its parent. A child of a raw disk records only the parent's name."""
        if not self.parent_ids or self is other:
            return False
        if NULL_ID in self.parent_ids:
            return os.path.basename(other.path).casefold() in self.parent_names
        return other.linkage_id in self.parent_ids


@dataclass(slots=True)
class _Scan:
    """The scanned folder."""

    directory: str
    neighbours: tuple[str, ...]
    kept: tuple[str, ...]  # the names of the leaves, which may now lead to other files
    options: OpenOptions
    nodes: list[_Node] = field(default_factory=list)


@checked
def collect_garbage(
    directory: AnyPath,
    keep: Several[AnyPath],
    *,
    delete: bool = False,
    options: OpenOptions | None = None,
) -> list[GarbageItem]:
    """Find the images directly in `directory` that none of the leaves in `keep` reaches; with `delete` remove them.

    Children come before their parents. Other folders that may hold children of these images are the folder above, the
    folders below, and those of the options. Raises NotFound, InvalidArgument, and what opening the chains of the
    leaves raises: if one of them is incomplete, it is unknown what it needs. With `delete` also CorruptImage
    if the parent of a damaged image in the folder is unknown.
    """
    options = options or OpenOptions()
    place = real_path(directory)
    if not is_folder(place):
        problem = "is not a folder" if exists(place) else "no such folder"
        raise errors.NotFound(problem, path=os.fsdecode(directory))
    if not keep:
        raise errors.InvalidArgument("name the leaves to keep: without any, every image would be removed")
    reached = _reached([os.fsdecode(leaf) for leaf in keep], place, options)
    scan = _scanned(place, tuple(map(os.fsdecode, keep)), options)
    doomed = _doomed(scan, reached)
    if delete:
        _refuse_unknown(scan, reached)
        _remove(scan, doomed)
        _tidy(scan)
    items = [_item(node) for node in _children_first([one for one in scan.nodes if one.identity not in reached])]
    items += [_part(path, delete=delete) for path in parts(place)]
    return items + [_record(path, delete=delete) for path in _orphaned_records(place)]


def _reached(leaves: Sequence[str], place: str, options: OpenOptions) -> set[tuple[int, int]]:
    """The files of the leaves' chains, including the leaves. Nothing is locked: they may well be in use."""
    reached = set()
    look = replace(options, parent_dirs=(*options.parent_dirs, place), lock=False)
    for leaf in leaves:
        layers = open_layers(leaf, options=look)
        for layer in layers:
            file = pending.file_of(layer.store)
            assert file is not None
            reached.add(file.identity)
            layer.close()
    return reached


def _scanned(place: str, kept: tuple[str, ...], options: OpenOptions) -> _Scan:
    near = [os.path.dirname(place), *subfolders(place), *(real_path(folder) for folder in options.parent_dirs)]
    scan = _Scan(place, tuple(one for one in dict.fromkeys(near) if one != place), kept, options)
    for path in LOCAL.siblings(place):
        try:
            with LOCAL.open_regular(path, follow_links=False) as store:
                node = _node(store)
        except errors.VhdkitError as error:
            node = _Node(
                path, (-1, len(scan.nodes)), 0, 0, knows_parent=False, problem=f"cannot be read: {error.problem}"
            )
            if formats.by_suffix(path) is None:
                continue
        if node is not None:
            scan.nodes.append(node)
    return scan


def _node(store: FileStore) -> _Node | None:
    """The relevant facts about one file; None if it is not an image, or a raw disk."""
    if store.size() == 0:
        return None
    image_format = formats.probed(store)
    if image_format.is_plain:
        image_format = formats.by_suffix(store.name) or image_format
    if image_format.is_plain:
        return None
    node = _Node(store.name, store.identity, store.size(), store.allocated_bytes())
    view = pending.view(store)
    try:
        facts = image_format.facts(view)
    except CorruptImage as error:
        node.problem = f"damaged: {error.problem}"
        claimed, node.knows_parent = image_format.claimed_parent(view)
        node.parent_ids = frozenset() if claimed is None else frozenset((claimed,))
        return node
    node.linkage_id = facts.linkage_id or NULL_ID
    if facts.parent is not None:
        node.parent_ids = frozenset(facts.parent.linkage_ids or (NULL_ID,))
        node.parent_names = _names(facts.parent)
    try:
        image_format.open(view)
    except CorruptImage as error:
        node.problem = f"damaged: {error.problem}"
    records = marks.other_records(store.name)
    if records:
        node.problem = f"has a record of an unfinished change: {printable(records[0])}"
    elif intents_about(store.name, (os.path.dirname(store.name),)):
        node.problem = "is part of an unfinished merge"
    return node


def _names(parent: ParentRef) -> frozenset[str]:
    return frozenset(ntpath.basename(one.text).casefold() for one in parent.names)


def _doomed(scan: _Scan, reached: set[tuple[int, int]]) -> list[_Node]:
    """The images to remove: those with no reason to stay, and no child that stays. Sets the others' reason."""
    doubtful = [node for node in scan.nodes if node.identity not in reached]
    for node in doubtful:
        if node.problem is None and _is_held(node.path):
            node.problem = "in use"
    for node, others in _children_of(scan, [one for one in doubtful if one.problem is None]):
        elsewhere = [one for one in others if os.path.dirname(one.path) != scan.directory or one.problem]
        node.problem = f"the parent of {elsewhere[0]}" if elsewhere else None
    staying = [node for node in scan.nodes if node.identity in reached or node.problem is not None]
    while staying:
        child = staying.pop()
        for node in doubtful:
            if node.problem is None and child.may_be_child_of(node):
                node.problem = f"the parent of {printable(child.path)}, which is kept"
                staying.append(node)
    return [node for node in doubtful if node.problem is None]


def _children_of(scan: _Scan, nodes: Sequence[_Node]) -> Iterator[tuple[_Node, list[Dependent]]]:
    """Each of these images with its children."""
    known = [node for node in nodes if node.linkage_id != NULL_ID]
    images = [(node.linkage_id, node.path) for node in known]
    yield from zip(known, children_of(images, scan.options, folders=scan.neighbours), strict=True)


def _is_held(path: str) -> bool:
    """True if any program has the file open, or if that cannot be determined."""
    try:
        FileStore.open_held(path, follow_links=False).close()
    except errors.VhdkitError:
        return True
    return False


def _refuse_unknown(scan: _Scan, reached: set[tuple[int, int]]) -> None:
    for node in scan.nodes:
        if not node.knows_parent and node.identity not in reached:
            raise CorruptImage(
                CorruptReason.NO_FOOTER,
                f"{node.problem}; its parent is unknown, so nothing is removed from its folder",
                path=node.path,
                hint="repair it (`vhdkit check --repair`), or move it away",
            )


def _children_first(nodes: Sequence[_Node]) -> list[_Node]:
    """The nodes with every child before its parent; a loop of hostile images comes last, in any order."""
    return [node for generation in _generations(nodes) for node in generation]


def _generations(nodes: Sequence[_Node]) -> Iterator[list[_Node]]:
    left = list(nodes)
    while left:
        first = [node for node in left if not any(other.may_be_child_of(node) for other in left)] or left
        yield first
        left = [node for node in left if node not in first]


def _remove(scan: _Scan, doomed: list[_Node]) -> None:
    """Remove generation after generation; an image that is now in use stays, with everything below it."""
    for generation in _generations(doomed):
        for node in generation:
            node.problem = _removed(scan, node, doomed)
            node.removed = node.problem is None
        if any(node.removed for node in generation):
            sync_directory(scan.directory)


def _reason_by_now(scan: _Scan, node: _Node, doomed: Sequence[_Node]) -> str | None:
    """Why a node stays after all: a child that was not removed, or that was created since."""
    staying = [printable(one.path) for one in doomed if not one.removed and one.may_be_child_of(node)]
    if not staying:
        staying = [str(child) for _, others in _children_of(scan, [node]) for child in others]
    return f"the parent of {staying[0]}, which is kept" if staying else None


def _removed(scan: _Scan, node: _Node, doomed: Sequence[_Node]) -> str | None:
    """Remove the file while no program can open it; returns a reason if it stays. A program that makes a child of it
    holds it, so children are searched after it is locked."""
    try:
        with FileStore.open_held(node.path, follow_links=False) as store:
            if store.identity != node.identity:
                return "replaced by another file"
            if any(leads_to(path, node.identity) for path in scan.kept):
                return "now one of the leaves to keep"
            reason = _reason_by_now(scan, node, doomed)
            if reason is None:
                store.require_name()
                unlink(node.path)
                marks.forget(node.path)
                references.forget_marks(node.path)
            return reason
    except errors.VhdkitError as error:
        return error.problem


def _tidy(scan: _Scan) -> None:
    """Drop the marks of removed children, here and nearby. An image in use keeps its marks."""
    for folder in (scan.directory, *scan.neighbours):
        for path in marks.marked_images(folder):
            with contextlib.suppress(errors.VhdkitError), FileStore.open_held(path, follow_links=False):
                drop_stale_marks(path, scan.options)


def _item(node: _Node) -> GarbageItem:
    return GarbageItem(node.path, GarbageKind.IMAGE, node.size_bytes, node.allocated_bytes, node.problem, node.removed)


def _part(path: str, *, delete: bool) -> GarbageItem:
    """A half-made file: listed, and removed unless its maker, or another program, holds it."""
    size = allocated = 0
    kept: str | None = None
    removed = False
    try:
        with FileStore.open(path, follow_links=False) as store:
            size, allocated = store.size(), store.allocated_bytes()
            store.lock(writer=True)
            if delete:
                unlink(path)
                removed = True
    except errors.ImageInUse:
        kept = "in use by a running program"
    except errors.VhdkitError as error:
        kept = error.problem
    return GarbageItem(path, GarbageKind.PART, size, allocated, kept, removed)


def _orphaned_records(directory: str) -> Iterator[str]:
    """The records of merges whose target and sources are all gone, and of children of images that are gone."""
    for path in regular_files(directory):
        if path.endswith(f".vhdkit-{KIND}"):
            intent = read_intent(path, (os.sep,))  # only to check whether its files exist
            if intent is not None and not any(exists(one.path) for one in (intent.target, *intent.sources)):
                yield path
    yield from marks.orphans(directory)
    yield from references.orphans(directory)


def _record(path: str, *, delete: bool) -> GarbageItem:
    with FileStore.open(path, follow_links=False) as store:
        size, allocated = store.size(), store.allocated_bytes()
    if delete:
        unlink(path)
    return GarbageItem(path, GarbageKind.RECORD, size, allocated, None, delete)
