# SPDX-License-Identifier: Apache-2.0
"""The paths of a chain, and the children of images.

Decides nothing itself: where a parent is searched is decided in `parents`, and what counts as a child in
`children`. Nothing is locked or changed, so images in use can be queried.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import replace

from vhdkit.arguments import AnyPath, Several, checked
from vhdkit.chain.names.children import children_of, find_children_of, folders_of_children
from vhdkit.chain.names.marks import mark_child
from vhdkit.chain.names.opening import open_layers
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.names.parents import format_id, linkage_id_of
from vhdkit.chain.records import pending
from vhdkit.errors import InvalidArgument, quoted
from vhdkit.finding import Finding, Severity
from vhdkit.folder import real_path
from vhdkit.image import NULL_ID
from vhdkit.store import FileStore


@checked
def chain_paths(path: AnyPath, *, options: OpenOptions | None = None) -> list[str]:
    """The real paths of an image and all its ancestors, leaf first. Raises what opening the chain raises."""
    layers = open_layers(path, options=replace(options or OpenOptions(), lock=False))
    try:
        files = [pending.file_of(layer.store) for layer in layers]
        return [real_path(file.name) for file in files if file is not None]
    finally:
        for layer in layers:
            layer.close()


@checked
@contextlib.contextmanager
def chain_held(path: AnyPath, *, options: OpenOptions | None = None) -> Iterator[list[str]]:
    """The real paths of an image and all its ancestors, leaf first; none is written to during the block.

    For programs that copy the files as they are. Raises InvalidArgument if a change to one of them is unfinished,
    so that the file alone does not have the image's content, ImageInUse, and what opening the chain raises.
    """
    layers = open_layers(path, options=options)
    try:
        files = [file for layer in layers if (file := pending.file_of(layer.store)) is not None]
        for layer, file in zip(layers, files, strict=True):
            if layer.store is not file:
                raise InvalidArgument(
                    "an unfinished change to it must be undone with its undo log: the file alone is damaged",
                    path=file.name,
                    hint=f"first undo the change: vhdkit check {quoted(file.name)} --repair",
                )
        yield [real_path(file.name) for file in files]
    finally:
        for layer in layers:
            layer.close()


@checked
def image_id(path: AnyPath) -> str | None:
    """The id of an image's file, 8-4-4-4-12, by which records refer to it; None if it has none.

    It stays the same as long as the image exists. What children record of their parent is another id in some formats.

    Raises NotFound and what reading the image raises.
    """
    with FileStore.open(path) as store:
        found = pending.id_of(pending.view(store))
    return None if found == NULL_ID else format_id(found)


@checked
def mark_parents(path: AnyPath, *, options: OpenOptions | None = None) -> list[Finding]:
    """Leave a mark for each image of a chain whose parent is in another folder, as when a child is made.

    For programs that take over other programs' images: afterwards vhdkit does not change the parents. Returns
    what could not be marked. Raises what opening the chain raises.
    """
    layers = open_layers(path, options=options)
    found = []
    try:
        for child, parent in itertools.pairwise(layers):
            problem = mark_child(child.store.name, child.store, parent.store.name)
            if problem is not None:
                found.append(Finding(Severity.WARNING, "child-not-marked", problem, child.store.name))
    finally:
        for layer in layers:
            layer.close()
    return found


@checked
def find_children(
    paths: Several[AnyPath],
    *,
    folders: Several[AnyPath] = (),
    everywhere: bool = False,
    options: OpenOptions | None = None,
) -> dict[str, list[str]]:
    """For each image, by the path given, the real paths of its children.

    They are searched beside each image and in `folders`; each file is examined once, and damaged ones are skipped.
    With `everywhere` the search is the one made before an image is opened for writing: also above it, among those
    that `options` names, and wherever children left marks; a marked child that cannot be examined then counts.
    Raises NotFound and what reading the images raises.
    """
    names = [os.fsdecode(path) for path in paths]
    parents = []
    places = [os.fsdecode(folder) for folder in folders]
    for name in names:
        with FileStore.open(name) as store:
            parents.append((linkage_id_of(store), real_path(name)))
        places += folders_of_children(name, ())
    if everywhere:
        images = [(unique_id, name) for (unique_id, _), name in zip(parents, names, strict=True)]
        families = children_of(images, options or OpenOptions(), folders=places)
        return {name: [one.path for one in family] for name, family in zip(names, families, strict=True)}
    return dict(zip(names, find_children_of(parents, places), strict=True))
