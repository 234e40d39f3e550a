# SPDX-License-Identifier: Apache-2.0
"""Freezes leaves by giving them children: one, several at once, or several children of one base.

Decides the names of the new children, which images may be frozen, and that a set of children is created whole or
not at all (`INV-SET-HARMLESS`). The content of a child is decided in `chain.verbs.create`, how a set of files gets its
names in `folder`.

    all chains open and locked -> every child written under a temporary name, all synced
                               -> named one after the other -> folders synced

After an error or Ctrl-C anywhere the names are removed again. A power cut (or `kill -9`) between two names leaves the
first few children of the set. They are empty, so every disk reads as before, through its leaf and through its child,
and no record is needed: the same command, repeated, adopts them and finishes the set. Clones are not adopted like
this, because an empty clone may already be in use.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from vhdkit import errors, formats
from vhdkit.arguments import AnyPath, Several, checked
from vhdkit.chain.names.children import refuse_with_children
from vhdkit.chain.names.marks import marked
from vhdkit.chain.names.noted import refuse_unwritten
from vhdkit.chain.names.opening import open_layers, refuse_more_layers
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.names.parents import allowed_folders
from vhdkit.chain.records import pending
from vhdkit.chain.records.intent import Phase, intent_of
from vhdkit.chain.verbs.create import child_size, require_names, write_child
from vhdkit.chain.verbs.merge_recovery import settle_merge_into
from vhdkit.folder import NewFile, commit_all, exists, real_path
from vhdkit.folder_lock import folders_held
from vhdkit.formats import remember
from vhdkit.formats.probe import format_of
from vhdkit.image import Layer
from vhdkit.store import FileStore

MAX_SET = 64  # children made at once: each holds its whole chain open, and a process may open about a thousand files
_LOG_NOT_REPLAYED = "log-not-replayed"  # a finding
_NUMBERED = re.compile(r"(.*)-(\d{1,9})")
_MAX_NUMBER = 1_000_000


_Note: TypeAlias = Callable[[FileStore, bytes], None]


@dataclass(frozen=True, slots=True, eq=False)
class _NewChild:
    """A child to create, and the open chain of its parent, leaf first."""

    parent: str
    path: str
    layers: tuple[Layer, ...]


@checked
def snapshot(
    leaf: AnyPath, new: AnyPath | None = None, *, options: OpenOptions | None = None, dry_run: bool = False
) -> str:
    """Freeze `leaf`: create an empty child that takes all further writes; returns the child's path.

    Without `new` the child lies beside the leaf under the next free name (`default_name`). The child is on the device
    when this returns. With `dry_run` everything is checked and nothing is created.
    Raises HasChildren if `leaf` has children, ImageInUse if a program is writing to it, NotesUnwritten if a killed
    server's notes of an image of the chain are in another folder than that of the options, AlreadyExists, NoSpace, and
    what opening the chain raises.
    """
    return snapshot_many([(leaf, new)], options=options, dry_run=dry_run)[0]


@checked
def snapshot_many(
    pairs: Several[tuple[AnyPath, AnyPath | None]], *, options: OpenOptions | None = None, dry_run: bool = False
) -> list[str]:
    """Freeze several leaves, all or none: (leaf, new) pairs as for `snapshot`; returns the children's paths.

    If a power cut left the set half-made, the same call finishes it. Raises what `snapshot` raises, and
    InvalidArgument for a set that names something twice.
    """
    options = options or OpenOptions()
    if not all(map(_is_pair, pairs)):
        raise errors.InvalidArgument("each pair must be (leaf, new), where new may be None")
    leaves = [os.fsdecode(leaf) for leaf, _ in pairs]
    # Of two snapshots of one leaf, the second starts its checks when the first has made its child.
    with folders_held(os.path.dirname(real_path(leaf)) for leaf in leaves):
        return _snapshot_set(leaves, [new for _, new in pairs], options, dry_run)


def snapshot_noted(leaf: str, note: _Note, options: OpenOptions) -> str:
    """`snapshot`, which calls `note` with the leaf's file, held as a reader, and the id of the child, before that has
    its name: whoever finds what it records knows by the id whether this was the freeze.
    """
    with folders_held([os.path.dirname(real_path(leaf))]):
        return _snapshot_set([leaf], [None], options, False, note)[0]


def _snapshot_set(
    leaves: list[str], names: list[AnyPath | None], options: OpenOptions, dry_run: bool, note: _Note | None = None
) -> list[str]:
    """`snapshot_many`, with the folders locked."""
    pairs = zip(leaves, names, strict=True)
    named = [(leaf, os.fsdecode(new) if new is not None else _default_name(leaf, options)) for leaf, new in pairs]
    check_names([leaf for leaf, _ in named], [new for _, new in named])
    with _prepare(named, options, dry_run=dry_run) as children:
        _run(_plan(children, options), dry_run=dry_run, note=note)
    return [new for _, new in named]


def _plan(children: Sequence[_NewChild], options: OpenOptions) -> list[_NewChild]:
    """The children that must be made: all but those that an interrupted run of the set has left. Changes nothing.

    Raises HasChildren, ImageInUse, AlreadyExists.
    """
    left_over = [one for one in children if _is_left_over(one)]
    if len(left_over) == len(children):
        left_over = []  # all of them exist, so the set is not unfinished: its names are taken
    for one in children:
        if one not in left_over:
            NewFile.check(one.path)
    for one in children:
        _refuse_to_freeze(one, options, apart_from=one.path if one in left_over else None)
    return [one for one in children if one not in left_over]


@checked
def clone(
    base: AnyPath, paths: Several[AnyPath], *, options: OpenOptions | None = None, dry_run: bool = False
) -> list[str]:
    """Create several empty children of one base, all or none; returns their paths.

    The base may have children already. Raises ImageInUse if a program is writing to it, NotesUnwritten as `snapshot`
    does, AlreadyExists, NoSpace, InvalidArgument, and what opening the chain raises.
    """
    options = options or OpenOptions()
    parent, names = os.fsdecode(base), [os.fsdecode(path) for path in paths]
    check_names([parent], names)
    with folders_held([os.path.dirname(real_path(parent))]):
        layers = open_layers(parent, options=options)
        try:
            _refuse_foreign_writer(layers[0])
            refuse_unwritten(layers)
            _run([_NewChild(parent, name, tuple(layers)) for name in names], dry_run=dry_run)
        finally:
            for layer in layers:
                layer.close()
    return names


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


def _default_name(leaf: str, options: OpenOptions) -> str:
    with FileStore.open(leaf) as store:
        return default_name(leaf, format_of(pending.view(store), options.format_name).child_suffix)


def default_child(leaf: Layer) -> str:
    """`default_name` for the next child of an open leaf."""
    return default_name(leaf.store.name, formats.of(leaf).child_suffix)


def default_name(leaf: str, suffix_of_children: str) -> str:
    """The next free name for a child beside `leaf`: disk.vhd, disk.avhd, disk-1.avhd, disk-2.avhd, ..."""
    folder, name = os.path.split(leaf)
    stem, suffix = os.path.splitext(name)
    number = 0
    if suffix.lower() == suffix_of_children:
        numbered = _NUMBERED.fullmatch(stem)
        stem, number = (numbered[1], int(numbered[2]) + 1) if numbered else (stem, 1)
    for one in range(number, number + _MAX_NUMBER):
        path = os.path.join(folder, f"{stem}-{one}{suffix_of_children}" if one else stem + suffix_of_children)
        if not exists(path):
            return path
    raise errors.AlreadyExists("every name for a child is taken", path=leaf, hint="give it a name")


def check_names(leaves: Sequence[str], children: Sequence[str]) -> None:
    """Raise InvalidArgument for an invalid set."""
    if not children or len(children) > MAX_SET:
        raise errors.InvalidArgument(f"a set must have 1 to {MAX_SET} images, not {len(children)}")
    seen: dict[str, str] = {}
    for path in [*leaves, *children]:
        real = real_path(path)
        if real in seen:
            raise errors.InvalidArgument("is named twice", path=path)
        seen[real] = path


@contextlib.contextmanager
def _prepare(named: Sequence[tuple[str, str]], options: OpenOptions, *, dry_run: bool) -> Iterator[list[_NewChild]]:
    """All chains of the set, open and locked against writers."""
    with contextlib.ExitStack() as stack:
        children = []
        for leaf, new in named:
            if not dry_run:
                _settle(leaf, options)
            layers = _opened_to_freeze(leaf, options)
            if not dry_run and _needs_opening(layers[0]):
                _close_all(layers)
                _open_once(leaf, options)
                layers = _opened_to_freeze(leaf, options)
            stack.callback(_close_all, layers)
            children.append(_NewChild(leaf, new, tuple(layers)))
        yield children


def _settle(leaf: str, options: OpenOptions) -> None:
    """Finish or undo an unfinished change: once frozen, the leaf is never opened for writing again.

    If a merge into the leaf has complete data, only names remain to be removed. If other programs read the leaf, that
    has to wait, and the leaf can be frozen as it is.
    """
    intent = intent_of(leaf, allowed_folders(leaf, options.parent_dirs))
    is_complete = intent is not None and intent.phase is not Phase.COPY
    with contextlib.suppress(*(errors.ImageInUse, errors.HasChildren) if is_complete else ()):
        settle_merge_into(leaf, options)
    with FileStore.open(leaf) as store:
        if pending.view(store) is store:
            return
    with FileStore.open_held(leaf, writable=True) as store:
        store.notes_folder = options.notes_folder
        pending.settle(store)


def _opened_to_freeze(leaf: str, options: OpenOptions) -> list[Layer]:
    layers = open_layers(leaf, options=options)
    try:
        refuse_unwritten(layers)
    except BaseException:
        _close_all(layers)
        raise
    return layers


def _close_all(layers: Sequence[Layer]) -> None:
    for layer in layers:
        layer.close()


def _needs_opening(leaf: Layer) -> bool:
    """True for an image whose writer died, leaving a log with what it flushed last, or a label of notes now gone."""
    file = pending.file_of(leaf.store)
    has_log = any(one.code == _LOG_NOT_REPLAYED for one in leaf.facts.findings)
    return has_log or (file is not None and remember.are_gone(file))


def _open_once(leaf: str, options: OpenOptions) -> None:
    """Replay the leaf's log in its file, because a frozen image is only read, and some programs ignore its log.

    An image that has children already, or is in use, stays as it is.
    """
    with contextlib.suppress(errors.HasChildren, errors.ImageInUse):
        _close_all(open_layers(leaf, writable=True, options=options))


def _refuse_to_freeze(one: _NewChild, options: OpenOptions, *, apart_from: str | None) -> None:
    """Raise for an image that is not a leaf any more, or that another program may be writing to."""
    store = pending.file_of(one.layers[0].store)
    assert store is not None
    _refuse_foreign_writer(one.layers[0])
    refuse_with_children(
        store,
        options,
        "it is not a leaf, and a snapshot of it would start a second branch",
        apart_from=apart_from,
        hint=f"take the snapshot of the leaf, or start a branch with `vhdkit clone {errors.quoted(one.parent)} NEW`",
    )


def _refuse_foreign_writer(leaf: Layer) -> None:
    """Raise ImageInUse if the image is marked as in use by a program without our locks."""
    formats.of(leaf).refuse_foreign_writer(leaf)


def _is_left_over(one: _NewChild) -> bool:
    """True for an empty child of this parent under the requested name: left by an interrupted run of the set."""
    parent = one.layers[0]
    if not exists(one.path):
        return False
    try:
        with FileStore.open(one.path, follow_links=False) as store:
            child = formats.for_children_of(parent).open(store)
            recorded = child.facts.parent
            if recorded is None or child.size_bytes != parent.size_bytes:
                return False
            owns = child.allocated_blocks().any() or child.zero_blocks().any()
            return parent.unique_id in recorded.linkage_ids and not owns
    except errors.VhdkitError:
        return False


def _run(children: Sequence[_NewChild], *, dry_run: bool, note: _Note | None = None) -> None:
    """Create the children, all or none. Raises InvalidArgument for a chain that would become too deep to be opened."""
    for one in children:
        refuse_more_layers(len(one.layers) + 1, one.path)
    with contextlib.ExitStack() as stack:
        files = []
        for one in children:
            size = child_size(one.path, one.layers[0], None)
            if dry_run:
                NewFile.check(one.path)
                continue
            new = stack.enter_context(NewFile(one.path, like=pending.files_of(one.layers[:1])))
            write_child(new.store, one.path, one.layers[0], size)
            if note is not None and (file := pending.file_of(one.layers[0].store)) is not None:
                note(file, pending.id_of(new.store))
            files.append(new)
        for one in children:
            require_names(one.layers[:1])
        parents = [one.layers[0].store.name for one in children[: len(files)]]
        with marked([(new.path, new.store, parent) for new, parent in zip(files, parents, strict=True)]):
            commit_all(files)
