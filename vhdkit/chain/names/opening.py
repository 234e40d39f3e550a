# SPDX-License-Identifier: Apache-2.0
"""From the path of a leaf to its open layers.

Decides in which order the files of a chain are opened, locked and examined. Where a parent is searched is decided in
`parents`, which images are its children in `children`. Must not know blocks or bitmaps.

- `INV-PARENT-READ-ONLY`: only the leaf is opened for writing, and only if it has no children.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from vhdkit.arguments import AnyPath
from vhdkit.chain.names import lineage
from vhdkit.chain.names.children import refuse_with_children
from vhdkit.chain.names.noted import refuse_unwritten, settle_noted, write_noted
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.names.parents import (
    allowed_folders,
    find_parent,
    other_sectors,
    parent_format,
    require_parent,
)
from vhdkit.chain.records import pending, tracking
from vhdkit.errors import CorruptImage, CorruptReason, InvalidArgument
from vhdkit.formats.probe import open_layer
from vhdkit.image import ImageFacts, Layer
from vhdkit.local_volume import LOCAL
from vhdkit.named import opened_again
from vhdkit.store import FileStore, Store
from vhdkit.uncached import CacheMode, Sweeper
from vhdkit.units import MIB
from vhdkit.volume import Volume, VolumeFile

MAX_TABLE_BYTES = 64 * MIB  # BATs in memory, of all read-only layers: three of the largest
MAX_CHAIN_DEPTH = 254  # one owner byte per sector, with one value for "no layer"


def open_layers(
    path: AnyPath,
    *,
    writable: bool = False,
    options: OpenOptions | None = None,
    danger: str | None = "writing to it would corrupt that image",
    volume: Volume = LOCAL,
) -> list[Layer]:
    """Open a leaf and all its parents, leaf first; only the leaf is writable.

    A writable leaf has no children: `danger` is what would happen to them. Pass None if the content will not change.

    Raises NotFound, AccessDenied, CorruptImage (also for loops and too deep chains), UnsupportedFormat,
    ImageInUse, HasChildren, ParentMissing, ParentMismatch, ParentRefused. On error nothing stays open.
    """
    leaf = os.fsdecode(path)
    if writable:
        return opened_again(lambda: _opened_for_writing(leaf, options or OpenOptions(), danger, volume))
    return opened_again(lambda: _opened_for_reading(leaf, options or OpenOptions(), volume))


def _opened_for_reading(leaf: str, options: OpenOptions, volume: Volume) -> list[Layer]:
    """`open_layers`; raises `Replaced` if a file of the chain was replaced before it was locked."""
    layers: list[Layer] = []
    store = volume.open(leaf)
    try:
        _hold(store, False, options, Sweeper())
        layers.append(_open_leaf(pending.view(store, volume), False, options))
        _open_parents(layers, store, options, volume)
    except BaseException:
        _close_all(store, layers)
        raise
    return layers


def _opened_for_writing(leaf: str, options: OpenOptions, danger: str | None, volume: Volume) -> list[Layer]:
    """The same with a writable leaf."""
    layers: list[Layer] = []
    store = volume.open_for_writing(leaf)
    try:
        _hold(store, True, options, Sweeper())
        if danger is not None:
            refuse_with_children(store, options, danger, tidy=options.lock)
        layers.append(_open_leaf(pending.view(store), False, options))
        _open_parents(layers, store, options, volume)
        refuse_unwritten(layers[1:])
        # Last: only now is the chain known to be complete, and this may repair the file.
        pending.settle(store)
        settle_noted(store, options)
        findings = layers[0].findings
        layers[0] = _open_leaf(store, True, options)
        layers[0].findings.extend(one for one in findings if one.code == lineage.WRITTEN)
        tracked = tracking.finding_of(store)
        layers[0].findings.extend([] if tracked is None else [tracked])
    except BaseException:
        _close_all(store, layers)
        raise
    return layers


def _close_all(leaf: VolumeFile, layers: Sequence[Layer]) -> None:
    leaf.close()
    for layer in layers:
        layer.store.close()


def _open_leaf(store: Store, writable: bool, options: OpenOptions) -> Layer:
    return open_layer(store, format_name=options.format_name, writable=writable, ignore_bitmaps=options.ignore_bitmaps)


def refuse_more_layers(count: int, path: str) -> None:
    """Raise InvalidArgument if a chain of `count` layers, one of them `path`, could not be opened."""
    if count > MAX_CHAIN_DEPTH:
        raise InvalidArgument(
            f"its chain would have {count} layers, and one of more than {MAX_CHAIN_DEPTH} cannot be opened",
            path=path,
            hint="merge some of them first: vhdkit merge",
        )


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


def _hold(
    store: VolumeFile, writer: bool, options: OpenOptions, sweeper: Sweeper, child_path: str | None = None
) -> None:
    if isinstance(store, FileStore):  # notes and the page cache are about files of the file system
        store.notes_folder = options.notes_folder
        if options.cache is CacheMode.NONE:
            store.keep_out_of_cache(sweeper)
        if options.lock and not writer:
            write_noted(store, options, child_path)  # a writer does this itself when it opens the image
    if options.lock:
        store.lock(writer=writer)


def _open_parents(layers: list[Layer], leaf: VolumeFile, options: OpenOptions, volume: Volume) -> None:
    folders = allowed_folders(leaf.name, options.parent_dirs, volume)
    seen = {leaf.identity}
    own = leaf.uncached if isinstance(leaf, FileStore) else None
    sweeper = Sweeper() if own is None else own.sweeper  # one for all files of a chain
    while (child := layers[-1].facts).parent is not None:
        if len(layers) >= MAX_CHAIN_DEPTH:
            raise CorruptImage(
                CorruptReason.CHAIN_DEPTH,
                f"the chain has more than {MAX_CHAIN_DEPTH} layers",
                path=leaf.name,
            )
        store = find_parent(child, folders, options, volume)
        try:
            if store.identity in seen:
                raise CorruptImage(
                    CorruptReason.CHAIN_LOOP,
                    "the chain of parents is circular",
                    path=child.path,
                )
            seen.add(store.identity)
            _hold(store, False, options, sweeper, child.path)
            layers.append(_open_parent(store, child, options, volume))
            different = other_sectors(child, layers[-1].facts)
            if different is not None:
                raise different
            limit_tables(layers)
            written = lineage.finding_of(layers[-2].store, child, store)
            layers[-2].findings.extend([] if written is None else [written])
        except BaseException:
            store.close()
            raise


def _open_parent(store: VolumeFile, child: ImageFacts, options: OpenOptions, volume: Volume) -> Layer:
    """Open the parent, which is held, in the format that the child records."""
    view = pending.view(store, volume)
    require_parent(child, view)
    return parent_format(child).open(view, ignore_bitmaps=options.ignore_bitmaps)
