# SPDX-License-Identifier: Apache-2.0
"""From the path of a leaf to its open layers.

Decides in which order the files of a chain are opened, locked and examined. Where a parent is searched is decided in
`parents`, which images stand on an image in `children`. Must not know blocks or bitmaps.

- `INV-PARENT-READ-ONLY`: only the leaf is opened for writing, and only if no image stands on it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from vhdkit.arguments import AnyPath
from vhdkit.chain.names import lineage
from vhdkit.chain.names.children import refuse_with_children
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.names.parents import (
    allowed_folders,
    find_parent,
    parent_format,
)
from vhdkit.chain.records import pending
from vhdkit.errors import CorruptImage, CorruptReason
from vhdkit.formats.probe import open_layer
from vhdkit.image import ImageFacts, Layer
from vhdkit.named import opened_again
from vhdkit.store import FileStore, Store
from vhdkit.units import MIB

MAX_TABLE_BYTES = 64 * MIB  # BATs in memory, of all read-only layers: three of the largest
MAX_CHAIN_DEPTH = 254  # one owner byte per sector, with one value for "no layer"


def open_layers(
    path: AnyPath,
    *,
    writable: bool = False,
    options: OpenOptions | None = None,
    danger: str | None = "writing to it would corrupt that image",
) -> list[Layer]:
    """Open a leaf and all its parents, leaf first; only the leaf is writable.

    A writable leaf has no children: `danger` is what would happen to them. Pass None if the content will not change.

    Raises NotFound, AccessDenied, CorruptImage (also for loops and too deep chains), UnsupportedFormat,
    ImageInUse, HasChildren, ParentMissing, ParentMismatch, ParentRefused. On error nothing stays open.
    """
    return opened_again(lambda: _opened_once(os.fsdecode(path), writable, options or OpenOptions(), danger))


def _opened_once(leaf_path: str, writable: bool, options: OpenOptions, danger: str | None) -> list[Layer]:
    """`open_layers`; raises `Replaced` if a file of the chain was replaced before it was locked."""
    layers: list[Layer] = []
    store = FileStore.open(leaf_path, writable=writable)
    try:
        _hold(store, writable, options)
        if writable and danger is not None:
            refuse_with_children(store, options, danger, tidy=options.lock)
        layers.append(_open_leaf(pending.view(store), False, options))
        _open_parents(layers, store, options)
        if writable:  # last: only now is the chain known to be complete, and this may mend the file
            pending.settle(store)
            said = layers[0].findings
            layers[0] = _open_leaf(store, True, options)
            layers[0].findings.extend(one for one in said if one.code == lineage.WRITTEN)
    except BaseException:
        store.close()
        for layer in layers:
            layer.store.close()
        raise
    return layers


def _open_leaf(store: Store, writable: bool, options: OpenOptions) -> Layer:
    return open_layer(store, format_name=options.format_name, writable=writable, ignore_bitmaps=options.ignore_bitmaps)


def limit_tables(layers: Sequence[Layer]) -> None:
    """Keep the tables of the first layers in memory, as many as fit, and read the others from their files.

    A table has up to 4 Mi entries, a chain up to 254 layers.
    """
    left = MAX_TABLE_BYTES
    for layer in layers:
        if layer.table_bytes:
            left -= layer.table_bytes
            if left < 0:
                layer.leave_table()
                left = 0


def _hold(store: FileStore, writer: bool, options: OpenOptions) -> None:
    store.notes_folder = options.notes_folder
    if not options.lock:
        return
    if not writer:
        pending.write_noted(store)  # a writer does this itself when it opens the image
    store.lock(writer=writer)


def _open_parents(layers: list[Layer], leaf: FileStore, options: OpenOptions) -> None:
    folders = allowed_folders(leaf.name, options.parent_dirs)
    seen = {leaf.identity}
    while (child := layers[-1].facts).parent is not None:
        if len(layers) >= MAX_CHAIN_DEPTH:
            raise CorruptImage(
                CorruptReason.CHAIN_DEPTH,
                f"the chain has more than {MAX_CHAIN_DEPTH} layers",
                path=leaf.name,
            )
        store = find_parent(child, folders, options)
        try:
            if store.identity in seen:
                raise CorruptImage(
                    CorruptReason.CHAIN_LOOP,
                    "the chain of parents leads back to itself",
                    path=child.path,
                )
            seen.add(store.identity)
            _hold(store, False, options)
            layers.append(_open_parent(store, child, options))
            limit_tables(layers)
            written = lineage.finding_of(layers[-2].store, child, store)
            layers[-2].findings.extend([] if written is None else [written])
        except BaseException:
            store.close()
            raise


def _open_parent(store: FileStore, child: ImageFacts, options: OpenOptions) -> Layer:
    return parent_format(child).open(pending.view(store), ignore_bitmaps=options.ignore_bitmaps)
