# SPDX-License-Identifier: Apache-2.0
"""What all kinds of merges share: their layers and files, how these are named, and what a plan amounts to.

Decides by which ids the record of a merge names its files, and the wording of errors that merges share.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

from vhdkit import errors, formats
from vhdkit.arguments import AnyPath
from vhdkit.chain.names.children import Dependent, has_children
from vhdkit.chain.names.opening import open_layers
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.records import pending
from vhdkit.chain.records.intent import Named, intent_of
from vhdkit.chain.verbs.merge_plan import Moves
from vhdkit.descriptor import close_all
from vhdkit.folder import real_path
from vhdkit.image import NULL_ID, Layer
from vhdkit.store import FileStore


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


def index_of_layer(layers: Sequence[Layer], path: AnyPath, *, itself: str) -> int:
    """The index of the ancestor at `path` in an open chain. Raises InvalidArgument for another file.

    For the leaf the error says `itself`. Raises NotFound, AccessDenied.
    """
    leaf = layers[0].store.name
    with FileStore.open(path) as store:
        for index, layer in enumerate(layers):
            if file_of_layer(layer).identity == store.identity:
                if index == 0:
                    raise errors.InvalidArgument(itself, path=leaf)
                return index
    raise errors.InvalidArgument(f"is not an ancestor of {errors.printable(leaf)}", path=os.fsdecode(path))


def named(layer: Layer) -> Named:
    """A layer as named in the record of a merge: by the id that it has now. A raw disk has none.

    An id that may change is read from the file: the layer may have been written to, through itself or through another
    opening, since it was opened.
    """
    store, facts = file_of_layer(layer), layer.facts
    present = facts.present_id if facts.file_id is not None else formats.of(layer).linkage_id(layer.store)
    return Named(real_path(store.name), present or NULL_ID)


def named_target(target: Layer) -> Named:
    """The target of a merge, open for writing, as named in the record: by its present id and by its next one.

    An earlier attempt may have changed the id, perhaps not yet durably. So if that attempt left a record about this
    file, the ids in the record are used.
    """
    one, renewed = named(target), formats.of(target).renewed_id(target)
    if target.facts.file_id is not None or renewed is None:
        return one
    earlier = intent_of(one.path, (os.sep,))  # only its ids are used
    if earlier is not None and earlier.target.renewed_id is not None and earlier.target.is_same_file(one):
        return earlier.target
    return replace(one, renewed_id=renewed)


def refuse_sectors(layers: Sequence[Layer]) -> None:
    """Refuse layers, the target last, whose sectors are smaller than the target's. Raises InvalidArgument."""
    target = layers[-1]
    for layer in layers[:-1]:
        if layer.sector_bytes < target.sector_bytes:
            raise errors.InvalidArgument(
                f"has sectors of {target.sector_bytes} bytes, and {errors.printable(layer.store.name)} has sectors of"
                f" {layer.sector_bytes} bytes",
                path=target.store.name,
                hint="merge to a new file with --to",
            )


def seen_through(layers: Sequence[Layer]) -> int:
    """Bytes of the disk that can be seen through these layers, the topmost first."""
    return layers[0].size_bytes if layers else 0


def amount(plan: Moves) -> tuple[int, int]:
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
