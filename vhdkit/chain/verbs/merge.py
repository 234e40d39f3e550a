# SPDX-License-Identifier: Apache-2.0
"""Merges layers of a chain into one of them, or into a new file beside it.

Decides in which order files change, so that the leaf reads the same at every moment (`INV-MERGE-PRESERVES`). What is
moved is decided in `merge_plan`, how a block receives it by its format.

    1  record: copy        the target changes only in sectors that the leaf sees in a source
    2  record: relink      if requested: children of the leaf are repointed to the target, which is complete
    3  record: remove      the leaf is removed, then the others
    4  no record

Each step is on the device before the next one begins. After any interruption, `merge_recovery` continues: copying can
be repeated any number of times.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from vhdkit import errors, formats
from vhdkit.arguments import AnyPath, checked
from vhdkit.attributes import check_removable
from vhdkit.chain.engine.chain import Chain, Progress
from vhdkit.chain.names.children import Dependent, drop_stale_marks, has_children, standing_on
from vhdkit.chain.names.lineage import record_parent, record_parents, same_content
from vhdkit.chain.names.marks import mark_child, marked
from vhdkit.chain.names.opening import open_layers
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.names.parents import allowed_folders
from vhdkit.chain.records import pending
from vhdkit.chain.records.intent import Intent, Named, Phase, intent_of, refuse_sources
from vhdkit.chain.verbs.create import link_to, linkage_of, names_of, require_names
from vhdkit.chain.verbs.merge_plan import MergePlan
from vhdkit.chain.verbs.merge_steps import (
    RealNames,
    carry_out,
    check_size,
    drop_earlier_try,
    fill_target,
    fold,
    is_complete,
)
from vhdkit.folder import NewFile, real_path
from vhdkit.formats.format import DEFAULT_BLOCK_SIZE, CreateRequest
from vhdkit.image import NULL_ID, Layer
from vhdkit.store import FileStore, close_all


@dataclass(frozen=True, slots=True)
class Merge:
    """What a merge does, or has done. Paths are absolute; sizes are bytes.

    `removed` are the removed layers (with `to`, none), leaf first; `relinked` the images that stand on `target`
    now. `data_bytes` are copied, `zero_bytes` become holes. `left` are files named like layers that were to be
    removed; they stay, because they are not provably those layers.
    """

    target: str
    merged: tuple[str, ...]
    removed: tuple[str, ...]
    relinked: tuple[str, ...]
    size_bytes: int
    data_bytes: int
    zero_bytes: int
    block_count: int
    left: tuple[str, ...] = ()


@checked
def merge(
    leaf: AnyPath,
    *,
    into: AnyPath | None = None,
    to: AnyPath | None = None,
    relink_children: bool = False,
    dry_run: bool = False,
    options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> Merge:
    """Merge `leaf`, and the layers between it and its ancestor `into` (if None, its parent), into that ancestor.

    The ancestor then has the leaf's content and size, and the others are removed. With `to` the result is a new file
    and the chain stays. Every image of the chain is held meanwhile. `relink_children` repoints the leaf's children to
    the result; no other image may stand on any of the files that change. `dry_run` only reports what would be done.

    Raises InvalidArgument, HasChildren, ImageInUse, NoSpace, IoFailed and what opening raises. On error every image
    reads as before; `resume_merge`, or the same call, continues.
    """
    options = options or OpenOptions()
    layers = open_layers(leaf, options=options)
    with closing(layers):
        index = _index_of(layers, into)
        if to is not None:
            if relink_children:
                raise errors.InvalidArgument("children cannot be repointed to a new file: leave out --to or --relink")
            return _merge_to(layers, index, os.fsdecode(to), dry_run, progress)
        return InPlace(layers, index, relink_children, options).run(dry_run, progress)


class InPlace:
    """A merge into a layer of the chain itself; `phase` is the progress found in a record."""

    def __init__(
        self,
        layers: list[Layer],
        index: int,
        relink_children: bool,
        options: OpenOptions,
        phase: Phase = Phase.COPY,
    ) -> None:
        self._sources, self._target = layers[:index], layers[index]
        self._below = layers[index + 1 :]
        self._options = options
        self._names = [named(layer) for layer in layers[: index + 1]]
        self._relink = relink_children
        for layer in layers[: index + 1]:
            file_of_layer(layer).lock(writer=True)
            if file_of_layer(layer).is_device:
                raise errors.InvalidArgument("is a device: it cannot be merged", path=file_of_layer(layer).name)
        for one in self._names[:-1]:
            check_removable(one.path)
        self._refuse_sources_of_another()
        self._plan = MergePlan(self._sources, self._target, below_bytes=_seen(self._below))
        self._size = self._sources[0].size_bytes
        self.phase = phase
        if phase is not Phase.COPY and not self._is_complete(layers, index):
            self.phase = Phase.COPY  # the leaf was written to since, or the record is wrong
        self._children = self._find_children()
        self._check_size()

    def _refuse_sources_of_another(self) -> None:
        """Raise ImageInUse for an image that another merge, whose data is complete, is about to remove."""
        allowed = allowed_folders(self._names[0].path, self._options.parent_dirs)
        below = [one.path for one in self._names[1:]] + [real_path(file_of_layer(one).name) for one in self._below]
        found = [intent for intent in (intent_of(path, allowed) for path in below) if intent is not None]
        refuse_sources(self._names, [one for one in found if [*one.sources, one.target] != self._names])

    def _is_complete(self, layers: list[Layer], index: int) -> bool:
        same_size = self._target.size_bytes == self._size
        return same_size and is_complete(self._plan, Chain(layers), Chain(layers[index:]))

    def _check_size(self) -> None:
        """Detect a size that the target cannot have before anything changes."""
        check_size(self._target, self._size)
        if self._target.size_bytes < min(self._size, _seen(self._below)):
            raise errors.InvalidArgument(
                "is smaller than its parent and than the leaf: what its parent has behind its end would appear",
                path=self._names[-1].path,
                hint="merge to a new file with --to",
            )

    def _find_children(self) -> list[str]:
        """The leaf's children, to be relinked. Raises HasChildren for any image that the merge would break."""
        inside = {one.path for one in self._names[:-1]}
        # Also by the names under which the layers were found, which may be links.
        folders = [real_path(os.path.dirname(layer.store.name)) for layer in (*self._sources, self._target)]
        layers = (*self._sources, self._target)
        images = [(linkage_of(layer), one.path) for layer, one in zip(layers, self._names, strict=True)]
        families = standing_on(images, self._options, folders=folders)
        for number, (one, family) in enumerate(zip(self._names, families, strict=True)):
            outside = [child for child in family if child.path not in inside]
            if number == len(self._names) - 1 and self.phase is not Phase.COPY:
                continue  # they were repointed to it, and it no longer changes
            if outside and not (number == 0 and self._relink and not any(child.problem for child in outside)):
                raise merge_would_break(one.path, outside, of_leaf=number == 0)
        return [child.path for child in families[0] if child.path not in inside]

    def run(self, dry_run: bool, progress: Progress | None) -> Merge:
        if dry_run:
            return self._result(_count(self._plan))
        intent = Intent(self.phase, self._names[-1], tuple(self._names[:-1]), self._relink)
        require_names([*self._sources, self._target])
        files = {one.path: file_of_layer(layer) for one, layer in zip(self._names, self._sources, strict=False)}
        names = RealNames(intent.target.path, files)
        with contextlib.ExitStack() as held:
            children = [held.enter_context(_held_child(path, self._options.notes_folder)) for path in self._children]
            store = self._open_target(held)

            def fill() -> tuple[int, int]:
                return fill_target(self._sources, partial(self._opened, store), _seen(self._below), progress)

            done = carry_out(intent, names, fill, [partial(self._repoint, child) for child in children])
            drop_stale_marks(intent.target.path)
            for child in children:
                record_parents(child.name, intent.target.path, linkage_of(self._target))
        return self._result(done)

    def _open_target(self, held: contextlib.ExitStack) -> FileStore:
        """The target's file, open for writing; the lock stays with the descriptor that holds it."""
        store = held.enter_context(FileStore.open(self._names[-1].path, writable=True, follow_links=False))
        store.notes_folder = self._options.notes_folder
        if store.identity != file_of_layer(self._target).identity:
            raise errors.Replaced("was replaced while it was opened", path=store.name)
        pending.settle(store)
        if self.phase is Phase.COPY:
            image = self._opened(store)  # an unwritable target is detected before anything changes
            if intent_of(store.name) is not None:
                drop_earlier_try(image)
        return store

    def _opened(self, store: FileStore) -> Layer:
        return formats.reopened(self._target, writable=True, store=store)

    def _repoint(self, store: FileStore) -> None:
        target = self._names[-1]
        mark_child(store.name, store, target.path, linkage_of(self._target))
        with same_content(store.name):
            formats.for_children_of(self._target).relink(store, link_to(store.name, target.path, self._target))

    def _result(self, counted: tuple[int, int]) -> Merge:
        merged = tuple(one.path for one in self._names[:-1])
        return Merge(
            target=self._names[-1].path,
            merged=merged,
            removed=merged,
            relinked=tuple(self._children),
            size_bytes=self._size,
            data_bytes=counted[0],
            zero_bytes=counted[1],
            block_count=len(self._plan.units),
        )


def _merge_to(layers: list[Layer], index: int, path: str, dry_run: bool, progress: Progress | None) -> Merge:
    """Merge the layers down to `index` into a new file of that layer's kind, on the parent of that layer, if any."""
    sources, below = layers[: index + 1], layers[index + 1 :]
    merged = tuple(real_path(file_of_layer(layer).name) for layer in sources)
    with NewFile(path, like=pending.files_of(sources)) as new:
        _write_empty_like(sources[-1], below, sources[0].size_bytes, new)
        target = formats.of(sources[-1]).open(new.store, writable=True)
        plan = MergePlan(sources, target, below_bytes=_seen(below), fresh=True)
        if dry_run:
            counted = _count(plan)
        else:
            counted = fold(plan, target, progress)
            target.flush()
            if below:
                record_parent(new.store, below[0].store, linkage_of(below[0]))
            with marked([(path, new.store, file_of_layer(below[0]).name)] if below else []):
                new.commit()
    return Merge(real_path(path), merged, (), (), sources[0].size_bytes, *counted, len(plan.units))


def _write_empty_like(ancestor: Layer, below: Sequence[Layer], size_bytes: int, new: NewFile) -> None:
    image_format, facts = formats.of(ancestor), ancestor.facts
    if below:
        assert facts.parent is not None
        parent = names_of(new.path, file_of_layer(below[0]).name, facts.parent.linkage_id, facts.parent.timestamp)
        image_format.create_child(new.store, size_bytes, parent, block_size_bytes=ancestor.block_size_bytes)
        return
    block_size_bytes = ancestor.block_size_bytes or DEFAULT_BLOCK_SIZE
    image_format.create(new.store, CreateRequest(size_bytes, facts.kind, block_size_bytes))


# -- small things -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def closing(layers: Sequence[Layer]) -> Iterator[None]:
    """Close the layers' files at the end of the block."""
    try:
        yield
    finally:
        close_all(layer.store for layer in layers)


@contextlib.contextmanager
def _held_child(path: str, notes_folder: str | None) -> Iterator[FileStore]:
    """A child that will be repointed, held as a writer."""
    with FileStore.open_held(path, writable=True, follow_links=False) as store:
        store.notes_folder = notes_folder
        pending.settle(store)
        yield store


def file_of_layer(layer: Layer) -> FileStore:
    """The file from which a layer was opened."""
    file = pending.file_of(layer.store)
    assert file is not None
    return file


def named(layer: Layer) -> Named:
    """A layer as named in the record of a merge."""
    store = file_of_layer(layer)
    return Named(real_path(store.name), layer.facts.file_id or NULL_ID)


def _seen(layers: Sequence[Layer]) -> int:
    """How much of the disk can be seen through these layers, the topmost first."""
    return layers[0].size_bytes if layers else 0


def _index_of(layers: Sequence[Layer], into: AnyPath | None) -> int:
    """The index of the ancestor in the chain."""
    leaf = layers[0].store.name
    if len(layers) == 1:
        raise errors.InvalidArgument("has no parent: there is nothing to merge it into", path=leaf)
    if into is None:
        return 1
    with FileStore.open(into) as store:
        for index, layer in enumerate(layers):
            if file_of_layer(layer).identity == store.identity:
                if index == 0:
                    raise errors.InvalidArgument("cannot be merged into itself", path=leaf)
                return index
    raise errors.InvalidArgument(f"is not an ancestor of {errors.printable(leaf)}", path=os.fsdecode(into))


def _count(plan: MergePlan) -> tuple[int, int]:
    """(bytes of data, bytes of zeros) of a plan."""
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
    hint = "to repoint it to the result say --relink" if of_leaf else "merge or move that image first"
    return has_children(path, children, ", which the merge would break", hint)
