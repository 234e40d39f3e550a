# SPDX-License-Identifier: Apache-2.0
"""What all kinds of merges share: their layers and files, how these are named, and what a plan amounts to.

Decides nothing but the wording of one error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from vhdkit import errors, formats
from vhdkit.arguments import AnyPath
from vhdkit.chain.names.children import Dependent, has_children
from vhdkit.chain.names.opening import open_layers
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.records import pending
from vhdkit.chain.records.intent import Named
from vhdkit.chain.verbs.merge_plan import MergePlan
from vhdkit.folder import real_path
from vhdkit.image import NULL_ID, Layer
from vhdkit.store import FileStore, close_all


@contextlib.contextmanager
def opened(leaf: AnyPath, options: OpenOptions) -> Iterator[list[Layer]]:
    """The layers of a chain, leaf first, open for reading while the block runs. Raises what `open_layers` raises."""
    layers = open_layers(leaf, options=options)
    try:
        yield layers
    finally:
        close_all(layer.store for layer in layers)


def file_of_layer(layer: Layer) -> FileStore:
    """The file from which a layer was opened."""
    file = pending.file_of(layer.store)
    assert file is not None
    return file


def named(layer: Layer) -> Named:
    """A layer as named in the record of a merge."""
    store = file_of_layer(layer)
    return Named(real_path(store.name), layer.facts.file_id or NULL_ID)


def refuse_without_id(layers: Sequence[Layer]) -> None:
    """Refuse images that the record of an interrupted merge could not name. Raises InvalidArgument.

    The record decides which files are removed, so it names images by an id that never changes. A raw disk has no id,
    and its path has to do.
    """
    for layer in layers:
        if layer.facts.file_id is None and not formats.of(layer).is_plain:
            raise errors.InvalidArgument(
                f"is a {layer.facts.title}, which cannot be merged in place",
                path=layer.store.name,
                hint="merge to a new file with --to",
            )


def seen_through(layers: Sequence[Layer]) -> int:
    """Bytes of the disk that can be seen through these layers, the topmost first."""
    return layers[0].size_bytes if layers else 0


def amount(plan: MergePlan) -> tuple[int, int]:
    """(bytes of data, bytes of zeros) that a plan moves."""
    data = zeros = 0
    for pieces in plan.blocks():
        for piece in pieces:
            if piece.source is None:
                zeros += piece.size_bytes
            else:
                data += piece.size_bytes
    return data, zeros


def merge_would_break(path: str, children: Sequence[Dependent], *, of_leaf: bool = False) -> errors.HasChildren:
    """The error for a file that a merge would change or remove although it has children."""
    hint = "to make it a child of the result, add --relink" if of_leaf else "merge or move that image first"
    return has_children(path, children, ", which the merge would break", hint)
