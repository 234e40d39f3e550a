# SPDX-License-Identifier: Apache-2.0
"""Merging layers of a chain into one of them, or into a new file beside it.

Decides in which order files change, so that the leaf reads the same at every moment (`INV-MERGE-PRESERVES`). What is
moved is `merge_plan`'s decision, how a block takes it in is its format's.

    1  record: copy        the target changes only in sectors that the leaf sees in a source
    2  record: relink      when asked for: children of the leaf are repointed to the target, which is complete
    3  record: remove      the leaf is removed, then the others
    4  no record

Each step is on the device before the next one begins. Whatever stops it, `resume_merge` goes on: copying may be done
again any number of times.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from vhdkit import errors
from vhdkit.arguments import checked
from vhdkit.chain import pending
from vhdkit.chain.chain import Chain, Progress
from vhdkit.chain.create import DiskFormat, link_to, require_names, write_empty
from vhdkit.chain.intent import KIND, Intent, Named, Phase, intent_of, intents_about
from vhdkit.chain.merge_plan import MergePlan
from vhdkit.chain.merge_steps import (
    RealNames,
    carry_out,
    drop_earlier_try,
    fill_target,
    fold,
    is_complete,
    remove_sources,
)
from vhdkit.chain.resolve import (
    NULL_ID,
    OpenOptions,
    allowed_folders,
    find_children_of,
    folders_of_children,
    open_layers,
    parent_format,
    unique_id,
)
from vhdkit.folder import NewFile, is_regular, real_path, remove_file, sidecar_path
from vhdkit.formats.probe import FormatName, open_layer
from vhdkit.formats.vhd.create import check_size, create_differencing
from vhdkit.formats.vhd.dynamic import DynamicImage, open_dynamic
from vhdkit.formats.vhd.fixed import FixedImage
from vhdkit.formats.vhd.relink import relink
from vhdkit.image import Layer
from vhdkit.store import FileStore, close_all


@dataclass(frozen=True, slots=True)
class Merge:
    """What a merge does, or has done. Paths are absolute; sizes are bytes.

    `removed` are the layers that went (or, with `to`, none), leaf first; `relinked` the images that stand on `target`
    now. `data_bytes` are copied, `zero_bytes` become holes.
    """

    target: str
    merged: tuple[str, ...]
    removed: tuple[str, ...]
    relinked: tuple[str, ...]
    size_bytes: int
    data_bytes: int
    zero_bytes: int
    block_count: int


@checked
def merge(
    leaf: str | os.PathLike[str],
    *,
    into: str | os.PathLike[str] | None = None,
    to: str | os.PathLike[str] | None = None,
    relink_children: bool = False,
    dry_run: bool = False,
    options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> Merge:
    """Fold `leaf` and the layers below it down to its ancestor `into` (its parent when None) into that ancestor.

    The ancestor then has the leaf's content and size, and the others are removed. With `to` the result is a new file
    and the chain stays. Every image of the chain is held meanwhile. `relink_children` repoints the leaf's children to
    the result; no other image may stand on any of the files that change. `dry_run` only tells what would be done.

    Raises InvalidArgument, HasChildren, ImageInUse, NoSpace, IoFailed and what opening raises. On error every image
    reads as before; `resume_merge`, or the same call, goes on.
    """
    options = options or OpenOptions()
    layers = open_layers(leaf, options=options)
    with _closing(layers):
        index = _index_of(layers, into)
        if to is not None:
            if relink_children:
                raise errors.InvalidArgument("with a new file as the result nothing is repointed to it")
            return _merge_to(layers, index, os.fsdecode(to), dry_run, progress)
        return _InPlace(layers, index, relink_children, options).run(dry_run, progress)


@checked
def resume_merge(
    path: str | os.PathLike[str], *, options: OpenOptions | None = None, progress: Progress | None = None
) -> Merge:
    """Finish the merge that was interrupted and has the image at `path` as its leaf, its target or in between.

    Raises InvalidArgument when there is none, and what `merge` raises.
    """
    options = options or OpenOptions()
    folders = allowed_folders(os.fsdecode(path), options.parent_dirs)
    found = intents_about(os.fsdecode(path), folders)
    if not found:
        raise errors.InvalidArgument("no interrupted merge of this image is known", path=os.fsdecode(path))
    return finish(found[0], options, progress)


@checked
def merge_under_way(path: str | os.PathLike[str], *, options: OpenOptions | None = None) -> str | None:
    """The target of an interrupted merge that has the image at `path` as its leaf, its target or in between."""
    folders = allowed_folders(os.fsdecode(path), (options or OpenOptions()).parent_dirs)
    found = intents_about(os.fsdecode(path), folders)
    return found[0].target.path if found else None


def finish(
    intent: Intent, options: OpenOptions, progress: Progress | None = None, *, only_compare: bool = False
) -> Merge:
    """Do what is left of a merge. What was copied is compared, and copied again where it is not there.

    With `only_compare` that raises InvalidArgument instead.
    """
    if not is_regular(intent.leaf.path):
        if intent.phase is Phase.REMOVE:
            return _remove_rest(intent, options)
        raise errors.NotFound(
            "is the leaf of an interrupted merge and is not there",
            path=intent.leaf.path,
            hint=f"put it back: {errors.printable(intent.target.path)} alone holds a part of it only",
        )
    layers = open_layers(intent.leaf.path, options=options)
    with _closing(layers):
        index = len(intent.sources)
        if [named(layer) for layer in layers[: index + 1]] != [*intent.sources, intent.target]:
            raise errors.InvalidArgument(
                "the chain is not the one whose merge was interrupted", path=intent.leaf.path, hint="merge it anew"
            )
        merging = _InPlace(layers, index, intent.relink, options, intent.phase)
        if only_compare and merging.phase is Phase.COPY:
            raise errors.InvalidArgument(
                "does not hold what its merge record says", path=intent.target.path, hint="`vhdkit check` says more"
            )
        return merging.run(False, progress)


def settle_merge_into(path: str | os.PathLike[str], options: OpenOptions) -> None:
    """Before the image at `path` is opened for writing: finish a merge into it whose data is complete.

    That is compared first: a record alone removes nothing. Raises ImageInUse for a target that is not whole or whose
    rest cannot be compared, and what `merge` raises.
    """
    image = real_path(path)
    intent = intent_of(image, options.parent_dirs)
    if intent is None:
        return
    if any(is_regular(one.path) for one in intent.sources):
        _finish_complete(intent, image, options)
    elif intent.phase is Phase.REMOVE:
        remove_file(sidecar_path(image, KIND))
    else:
        raise _interrupted(intent, image)


def settle_merge_of(layers: Sequence[Layer], options: OpenOptions) -> bool:
    """After the chain `layers` was opened for writing: finish merges into its lower layers whose data is complete.

    True where the layers were closed for that: the chain is to be opened again. A merge that was still copying does
    not matter to the leaf. One of layers below the leaf (a server's, that died) is finished if it can be: the leaf
    reads the same without that. Raises NotFound where the leaf was merged and is gone then; whatever is raised, the
    layers are closed.
    """
    paths = [real_path(_file(layer).name) for layer in layers]
    with contextlib.ExitStack() as closing:
        for layer in layers:
            closing.callback(layer.close)
        for below in paths[1:]:
            intent = intent_of(below, options.parent_dirs)
            if intent is None or intent.phase is Phase.COPY:
                continue
            closing.close()
            if paths[0] in [one.path for one in intent.sources]:
                _finish_complete(intent, paths[0], options)
                raise errors.NotFound(f"was merged into {errors.printable(below)}: open that", path=paths[0])
            with contextlib.suppress(errors.VhdkitError):
                finish(intent, options, only_compare=True)
            return True
        closing.pop_all()
    return False


def _finish_complete(intent: Intent, image: str, options: OpenOptions) -> None:
    if intent.phase is Phase.COPY or not is_regular(intent.leaf.path):
        raise _interrupted(intent, image)
    finish(intent, options, only_compare=True)


def _interrupted(intent: Intent, image: str) -> errors.ImageInUse:
    return errors.ImageInUse(
        f"a merge of {errors.printable(intent.leaf.path)} into it was interrupted",
        path=image,
        hint=f"finish it first: vhdkit merge --resume {shlex.quote(errors.printable(image))}",
    )


def _remove_rest(intent: Intent, options: OpenOptions) -> Merge:
    """The target is complete and the leaf is gone: remove the layers in between."""
    with contextlib.ExitStack() as held:
        rest: dict[str, FileStore] = {}
        target = held.enter_context(FileStore.open_held(intent.target.path))
        for one in intent.sources:
            if not is_regular(one.path):
                continue
            store = held.enter_context(FileStore.open_held(one.path, follow_links=False))
            rest[one.path] = store
            if unique_id(store) != one.unique_id:
                raise errors.InvalidArgument("is not the image that was merged", path=one.path)
        if unique_id(target) != intent.target.unique_id:
            raise errors.InvalidArgument("is not the image that was merged into", path=intent.target.path)
        folders = (*allowed_folders(intent.target.path, options.parent_dirs), *map(os.path.dirname, rest))
        for one in (one for one in intent.sources if one.path in rest):
            (family,) = find_children_of([(one.unique_id, one.path)], folders)
            children = [path for path in family if real_path(path) not in rest]
            if children:
                raise has_children(one.path, children, False)
        size = open_layer(target).size_bytes
        remove_sources(intent, RealNames(intent.target.path, rest))
    removed = tuple(rest)
    merged = tuple(one.path for one in intent.sources)
    return Merge(intent.target.path, merged, removed, (), size, 0, 0, 0)


class _InPlace:
    """A merge into a layer of the chain itself."""

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
            _file(layer).lock(writer=True)
            if _file(layer).is_device:
                raise errors.InvalidArgument("is a device: it cannot be merged", path=_file(layer).name)
        self._plan = MergePlan(self._sources, self._target, below_bytes=_seen(self._below))
        self._size = self._sources[0].size_bytes
        self.phase = phase
        if phase is not Phase.COPY and not self._is_complete(layers, index):
            self.phase = Phase.COPY  # the leaf was written to since, or the record is not true
        self._children = self._find_children()
        self._check_size()

    def _is_complete(self, layers: list[Layer], index: int) -> bool:
        same_size = self._target.size_bytes == self._size
        return same_size and is_complete(self._plan, Chain(layers), Chain(layers[index:]))

    def _check_size(self) -> None:
        """A size that the target cannot get is found out before anything changes."""
        if isinstance(self._target, DynamicImage | FixedImage):
            check_size(self._size, fixed=isinstance(self._target, FixedImage))
        if self._target.size_bytes < min(self._size, _seen(self._below)):
            raise errors.InvalidArgument(
                "is smaller than its parent and than the leaf: what its parent has behind its end would appear",
                path=self._names[-1].path,
                hint="merge to a new file with --to",
            )

    def _find_children(self) -> list[str]:
        """The leaf's children, to be relinked. Raises HasChildren for any image that the merge would break."""
        inside = {one.path for one in self._names[:-1]}
        folders = [
            folder
            for layer in (*self._sources, self._target)
            for folder in folders_of_children(layer.store.name, self._options.parent_dirs)
        ]
        families = find_children_of([(one.unique_id, one.path) for one in self._names], folders)
        for number, (one, family) in enumerate(zip(self._names, families, strict=True)):
            outside = [path for path in family if real_path(path) not in inside]
            if number == len(self._names) - 1 and self.phase is not Phase.COPY:
                continue  # they were repointed to it, and it will not change any more
            if outside and not (number == 0 and self._relink):
                raise has_children(one.path, outside, number == 0)
        return [path for path in families[0] if real_path(path) not in inside]

    def run(self, dry_run: bool, progress: Progress | None) -> Merge:
        if dry_run:
            return self._result(_count(self._plan))
        intent = Intent(self.phase, self._names[-1], tuple(self._names[:-1]), self._relink)
        require_names([*self._sources, self._target])
        files = {one.path: _file(layer) for one, layer in zip(self._names, self._sources, strict=False)}
        names = RealNames(intent.target.path, files)
        with contextlib.ExitStack() as held:
            children = [held.enter_context(_held_child(path)) for path in self._children]
            store = self._open_target(held)

            def fill() -> tuple[int, int]:
                return fill_target(self._sources, partial(self._opened, store), _seen(self._below), progress)

            done = carry_out(intent, names, fill, [partial(self._repoint, child) for child in children])
        return self._result(done)

    def _open_target(self, held: contextlib.ExitStack) -> FileStore:
        """The target's file, open for writing; the lock stays with the descriptor that has it."""
        store = held.enter_context(FileStore.open(self._names[-1].path, writable=True, follow_links=False))
        if store.identity != _file(self._target).identity:
            raise errors.Replaced("was replaced while it was opened", path=store.name)
        pending.settle(store)
        if self.phase is Phase.COPY:
            image = self._opened(store)  # what cannot be written to is found out before anything changes
            if intent_of(store.name) is not None:
                drop_earlier_try(image)
        return store

    def _opened(self, store: FileStore) -> Layer:
        child = self._sources[-1]
        assert isinstance(child, DynamicImage)
        name = parent_format(child.metadata)
        return open_layer(store, format_name=name, writable=True, ignore_bitmaps=self._options.ignore_bitmaps)

    def _repoint(self, store: FileStore) -> None:
        target, timestamp = self._names[-1], 0
        if isinstance(self._target, DynamicImage | FixedImage):
            timestamp = self._target.metadata.footer.timestamp
        relink(open_dynamic(store, writable=True), link_to(store.name, target.path, target.unique_id, timestamp))

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
    """The layers down to `index` as a new file of that one's kind, standing on its parent if it has one."""
    sources, below = layers[: index + 1], layers[index + 1 :]
    merged = tuple(real_path(_file(layer).name) for layer in sources)
    with NewFile(path) as new:
        _write_empty_like(sources[-1], below, sources[0].size_bytes, new)
        name = FormatName.VHD if isinstance(sources[-1], DynamicImage | FixedImage) else FormatName.RAW
        target = open_layer(new.store, format_name=name, writable=True)
        plan = MergePlan(sources, target, below_bytes=_seen(below), fresh=True)
        if dry_run:
            counted = _count(plan)
        else:
            counted = fold(plan, target, progress)
            target.flush()
            new.commit()
    return Merge(real_path(path), merged, (), (), sources[0].size_bytes, *counted, len(plan.units))


def _write_empty_like(ancestor: Layer, below: Sequence[Layer], size_bytes: int, new: NewFile) -> None:
    if below:
        assert isinstance(ancestor, DynamicImage) and ancestor.metadata.header is not None
        header = ancestor.metadata.header
        link = link_to(new.path, _file(below[0]).name, header.parent_unique_id, header.parent_timestamp)
        create_differencing(new.store, size_bytes, link, block_size_bytes=ancestor.block_size_bytes)
    elif isinstance(ancestor, DynamicImage):
        write_empty(new.store, size_bytes, DiskFormat.DYNAMIC, block_size_bytes=ancestor.block_size_bytes)
    else:
        kind = DiskFormat.FIXED if isinstance(ancestor, FixedImage) else DiskFormat.RAW
        write_empty(new.store, size_bytes, kind)


# -- small things -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _closing(layers: Sequence[Layer]) -> Iterator[None]:
    try:
        yield
    finally:
        close_all(layer.store for layer in layers)


@contextlib.contextmanager
def _held_child(path: str) -> Iterator[FileStore]:
    """A child that will be repointed, held as a writer."""
    with FileStore.open_held(path, writable=True, follow_links=False) as store:
        pending.settle(store)
        yield store


def _file(layer: Layer) -> FileStore:
    file = pending.file_of(layer.store)
    assert file is not None
    return file


def named(layer: Layer) -> Named:
    """A layer as a merge's record names it."""
    store = _file(layer)
    return Named(real_path(store.name), unique_id(store) if isinstance(layer, DynamicImage | FixedImage) else NULL_ID)


def _seen(layers: Sequence[Layer]) -> int:
    """How much of the disk these layers, the topmost first, can answer for."""
    return layers[0].size_bytes if layers else 0


def _index_of(layers: Sequence[Layer], into: str | os.PathLike[str] | None) -> int:
    """Where in the chain the ancestor is."""
    leaf = layers[0].store.name
    if len(layers) == 1:
        raise errors.InvalidArgument("has no parent: there is nothing to merge it into", path=leaf)
    if into is None:
        return 1
    with FileStore.open(into) as store:
        for index, layer in enumerate(layers):
            if _file(layer).identity == store.identity:
                if index == 0:
                    raise errors.InvalidArgument("cannot be merged into itself", path=leaf)
                return index
    raise errors.InvalidArgument(f"is no ancestor of {errors.printable(leaf)}", path=os.fsdecode(into))


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


def has_children(path: str, children: Sequence[str], of_leaf: bool = False) -> errors.HasChildren:
    """The error for a file that a merge would change or remove while others stand on it."""
    others = f" and {len(children) - 1} more" if len(children) > 1 else ""
    return errors.HasChildren(
        f"is the parent of {errors.printable(children[0])}{others}, which the merge would break",
        path=path,
        hint="to repoint it to the result say --relink" if of_leaf else "merge or move that image first",
    )
