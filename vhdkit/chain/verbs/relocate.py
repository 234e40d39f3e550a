# SPDX-License-Identifier: Apache-2.0
"""Moves a whole chain to another folder.

Decides which chains may move and the order in which names appear and disappear, so that at every moment the chain
opens in its old place or in its new one (`INV-CHAIN-SOMEWHERE`). How names reach a header is decided
by the format.

    one file system    second names, base first -> folder synced -> old names away, leaf first -> synced
                       -> locators rewritten (until then every parent is found by its bare name beside its child)
    several            copies under temporary names, with new locators, synced -> named, base first -> folder synced
                       -> the new chain opened and compared by its ids -> old names away, leaf first -> synced

A move within one file system that was killed is finished by the same command: a new name that leads to the file itself
is there already, and if the leaf's old name is gone, the other old names follow.

All layers are locked against readers and writers meanwhile, and no image outside the chain may depend on any of them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from vhdkit import errors, formats
from vhdkit.arguments import AnyPath, checked
from vhdkit.chain.engine.chain import Progress
from vhdkit.chain.names.children import children_of, drop_stale_marks, has_children
from vhdkit.chain.names.lineage import record_parents, was_written_since
from vhdkit.chain.names.marks import forget, other_records
from vhdkit.chain.names.opening import open_layers
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.names.parents import allowed_folders, bare_names, candidates, parent_of
from vhdkit.chain.records import pending, references
from vhdkit.chain.records.intent import intents_about
from vhdkit.chain.verbs.create import names_of
from vhdkit.errors import printable
from vhdkit.folder import (
    NewFile,
    commit_all,
    exists,
    is_folder,
    is_within,
    real_path,
    sync_directory,
    unlink,
)
from vhdkit.hard_links import are_two_names, hard_link
from vhdkit.image import NULL_ID, ImageFacts
from vhdkit.local_volume import LOCAL
from vhdkit.store import FileStore, Store
from vhdkit.units import MIB

_PIECE_BYTES = 64 * MIB  # copied between two progress reports


@dataclass(frozen=True, slots=True)
class Move:
    """One layer's old and new path; the same path if it was in the folder already."""

    old_path: str
    new_path: str


@checked
def relocate(
    leaf: AnyPath,
    directory: AnyPath,
    *,
    options: OpenOptions | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
) -> list[Move]:
    """Move the chain of `leaf`, all its layers, into the folder `directory`; returns the moves, leaf first.

    Names stay; relative and absolute locators are rewritten. After an error the chain is where it was, except for an
    error while locators are written, which reports that the chain has moved. Raises AlreadyExists, NotFound,
    InvalidArgument (two layers of one name, a device, an unfinished change), HasChildren for an image with other
    children, ImageInUse, NoSpace, and what opening the chain raises.
    """
    options = options or OpenOptions()
    place = real_path(directory)
    if not is_folder(place):
        problem = "is not a folder" if exists(place) else "no such folder"
        raise errors.NotFound(problem, path=os.fsdecode(directory))
    path = os.fsdecode(leaf)
    try:
        paths = _paths_of(path, options)
    except errors.NotFound as error:
        return _continued(path, place, options, error, dry_run=dry_run)
    with _held(paths, options, dry_run=dry_run) as stores:
        moves = [Move(path, os.path.join(place, os.path.basename(path))) for path in paths]
        _check(moves, stores, options)
        if dry_run or all(move.old_path == move.new_path for move in moves):
            return moves
        fine, nights = _unwritten(stores), [references.marks_of(store) for store in stores]
        by_name = _is_found_by_name(moves, stores)
        staying = [index for index, move in enumerate(moves) if move.old_path == move.new_path]
        if staying and not by_name:
            raise errors.InvalidArgument(
                "is already in the folder, and records another name for its parent",
                path=moves[staying[0]].old_path,
                hint="rewrite the names first: vhdkit check FILE --repair",
            )
        if by_name and _second_names(moves, stores, options):
            _take_away(moves, stores)
            _rewrite_names(moves, stores, range(len(moves) - 1))
        else:
            _copy(moves, stores, options, progress)
            _take_away(moves, stores)
            _rewrite_names(moves, stores, [index for index in staying if index + 1 < len(moves)])
        _settle_records(moves, staying, fine, nights)
    return moves


@contextlib.contextmanager
def _held(paths: Sequence[str], options: OpenOptions, *, dry_run: bool) -> Iterator[list[FileStore]]:
    """The files of the chain, held exclusively, with unfinished changes undone."""
    with contextlib.ExitStack() as stack:
        stores = [
            stack.enter_context(FileStore.open_held(path, writable=not dry_run, follow_links=False)) for path in paths
        ]
        for store in stores:
            if not dry_run:
                pending.settle(store, content_stays=True)
        if _paths_of(paths[0], replace(options, lock=False)) != paths:
            raise errors.ImageInUse("the chain changed while it was about to move", path=paths[0])
        yield stores


def _settle_records(
    moves: Sequence[Move],
    staying: Iterable[int],
    fine: Iterable[tuple[int, bytes]],
    nights: Iterable[tuple[references.NightMark, ...]],
) -> None:
    """Renew what lies beside the images, and what children note of the state of their parents."""
    for index in staying:
        drop_stale_marks(moves[index].new_path)
    for move, marks in zip(moves, nights, strict=True):
        references.put_back(move.new_path, marks)
    for index, parent_id in fine:
        record_parents(moves[index].new_path, moves[index + 1].new_path, parent_id)


def _continued(leaf: str, place: str, options: OpenOptions, missing: errors.NotFound, *, dry_run: bool) -> list[Move]:
    """Finish a move that was interrupted while the old names were removed, the leaf's first.

    Raises `missing` unless the chain is in its new place and an old name of one of its files still exists.
    """
    new_leaf = os.path.join(place, os.path.basename(leaf))
    if exists(real_path(leaf)) or not exists(new_leaf):
        raise missing
    inside = replace(options, parent_dirs=())  # a parent's old name may still be found
    paths = _paths_of(new_leaf, inside)
    with _held(paths, inside, dry_run=dry_run) as stores:
        moves = [Move(old, new) for old, new in zip(_old_names(leaf, paths, stores, options), paths, strict=True)]
        if all(move.old_path == move.new_path for move in moves):
            missing.hint = f"{printable(new_leaf)} exists: it may have been moved there already (`vhdkit check`)"
            raise missing
        _check(moves, stores, options)
        if not dry_run:
            fine, nights = _unwritten(stores), [references.marks_at(move.old_path) for move in moves]
            _take_away(moves, stores)
            _rewrite_names(moves, stores, range(len(moves) - 1))
            _settle_records(moves, range(len(moves)), fine, nights)
    return moves


def _old_names(leaf: str, paths: Sequence[str], stores: Sequence[FileStore], options: OpenOptions) -> list[str]:
    """For each file of a chain that was moved: its old name, if it still has it, else the present one."""
    found = []
    folders = allowed_folders(leaf, options.parent_dirs)
    for index, path in enumerate(paths):
        names = [os.path.join(folders[0], os.path.basename(path))]
        if index:
            names += candidates(_facts_of(stores[index - 1]), folders)
        real = [real_path(one) for one in names]
        old = [one for one in real if is_within(one, folders) and are_two_names(one, path)]
        found.append(old[0] if old else path)
    return found


def _paths_of(leaf: str, options: OpenOptions) -> list[str]:
    """The real paths of the chain's files, leaf first; raises unless the chain opens."""
    layers = open_layers(real_path(leaf), options=options)
    try:
        files = [pending.file_of(layer.store) for layer in layers]
        if any(file is None or file.is_device for file in files):
            raise errors.InvalidArgument("is a device: it cannot be moved to a folder", path=leaf)
        return [real_path(file.name) for file in files if file is not None]
    finally:
        for layer in layers:
            layer.close()


def _check(moves: Sequence[Move], stores: Sequence[FileStore], options: OpenOptions) -> None:
    """Raise if the chain must not move, or cannot move to that place."""
    seen = set()
    for move in moves:
        if move.new_path in seen:
            name = printable(os.path.basename(move.new_path))
            raise errors.InvalidArgument(f"two layers of the chain are named {name}; rename one", path=move.old_path)
        seen.add(move.new_path)
        is_free = move.old_path == move.new_path or not exists(move.new_path)
        if not is_free and not are_two_names(move.old_path, move.new_path):
            raise errors.AlreadyExists(
                "already exists", path=move.new_path, hint="move it away, or choose another folder"
            )
    folders = [os.path.dirname(path) for move in moves for path in (move.old_path, move.new_path)]
    folders += [real_path(folder) for folder in options.parent_dirs]
    own = {store.identity for store in stores}
    for store in stores:
        if other_records(store.name) or intents_about(store.name, tuple(dict.fromkeys(folders))):
            raise errors.InvalidArgument(
                "has a record of an unfinished change beside it", path=store.name, hint="`vhdkit check` describes it"
            )
    images = [(formats.linkage_id(store) or NULL_ID, store.name) for store in stores]
    for store, family in zip(stores, children_of(images, options, folders=folders), strict=True):
        outside = [child for child in family if child.problem is not None or _identity(child.path) not in own]
        if outside:
            hint = "move that chain too, or merge it first"
            raise has_children(store.name, outside, ", which does not move with it", hint)


def _identity(path: str) -> tuple[int, int]:
    with LOCAL.open_regular(path, follow_links=False) as store:
        return store.identity


def _facts_of(store: Store) -> ImageFacts:
    return formats.probed(store).facts(store)


def _unwritten(stores: Sequence[FileStore]) -> list[tuple[int, bytes]]:
    """(index, id of its parent) of the children whose parent was not written to after they were made."""
    found = []
    for index, (child, parent) in enumerate(itertools.pairwise(stores)):
        recorded = parent_of(_facts_of(child))
        if not was_written_since(child, parent, recorded):
            found.append((index, recorded.linkage_id))
    return found


def _is_found_by_name(moves: Sequence[Move], stores: Sequence[FileStore]) -> bool:
    """True if every child finds its parent by its bare name alone, whatever its other locators say."""
    for store, parent in zip(stores, moves[1:], strict=False):
        names = {name.casefold() for name in bare_names(_facts_of(store))}
        if os.path.basename(parent.new_path).casefold() not in names:
            return False
    return True


def _second_names(moves: Sequence[Move], stores: Sequence[FileStore], options: OpenOptions) -> bool:
    """Give every layer its new name beside the old one; False, without new names, if the file systems cannot."""
    made: list[str] = []
    try:
        for move in reversed(moves):
            if move.old_path != move.new_path and not are_two_names(move.old_path, move.new_path):
                if not hard_link(move.old_path, move.new_path):
                    _forget(made)
                    return False
                made.append(move.new_path)
        sync_directory(os.path.dirname(moves[0].new_path))
        _check_new(moves, stores, options, same_files=True)
    except BaseException:  # Ctrl-C too
        _forget(made)
        raise
    return True


def _forget(made: Sequence[str]) -> None:
    for path in reversed(made):
        with contextlib.suppress(errors.VhdkitError):
            unlink(path)


def _check_new(moves: Sequence[Move], stores: Sequence[FileStore], options: OpenOptions, *, same_files: bool) -> None:
    """Raise unless the chain opens in its new place and consists of the layers that moved."""
    wanted = replace(options, parent_dirs=(), lock=False)
    layers = open_layers(moves[0].new_path, options=wanted)
    try:
        files = [pending.file_of(layer.store) for layer in layers]
        found = [(pending.id_of(file), file.identity if same_files else None) for file in files if file is not None]
        if found != [(pending.id_of(store), store.identity if same_files else None) for store in stores]:
            raise errors.IoFailed("does not lead to the layers that should move with it", path=moves[0].new_path)
    finally:
        for layer in layers:
            layer.close()


def _take_away(moves: Sequence[Move], stores: Sequence[FileStore]) -> None:
    """Remove the old names, leaf first, and sync their folders. A name that now leads to another file stays."""
    for move, store in zip(moves, stores, strict=True):
        if move.old_path != move.new_path:
            store.require_name()
            unlink(move.old_path)
            forget(move.old_path)
            references.forget_marks(move.old_path)
    for folder in dict.fromkeys(os.path.dirname(move.old_path) for move in moves):
        sync_directory(folder)


def _rewrite_names(moves: Sequence[Move], stores: Sequence[FileStore], children: Iterable[int]) -> None:
    """Rewrite the locators of these children; the chain opens even without that."""
    for index in children:
        try:
            _relink(stores[index], moves[index].new_path, moves[index + 1].new_path)
        except errors.VhdkitError as error:
            error.problem = f"the chain was moved and opens there, but not all names are rewritten: {error.problem}"
            error.path = moves[index].new_path
            error.hint = f"rewrite them later: vhdkit check {errors.quoted(moves[index].new_path)} --repair"
            raise


def _relink(store: Store, path: str, parent_path: str) -> None:
    facts = _facts_of(store)
    parent = parent_of(facts)
    names = names_of(path, parent_path, parent.linkage_id, parent.timestamp)
    names = replace(names, linkage_ids=parent.linkage_ids)
    formats.named(facts.format_name).relink(store, names)


def _copy(moves: Sequence[Move], stores: Sequence[FileStore], options: OpenOptions, progress: Progress | None) -> None:
    """Copy the layers that are elsewhere, with new locators, and name the copies; on an error none is left."""
    total, done = sum(store.size() for store in stores), 0
    with contextlib.ExitStack() as stack:
        files = []
        for index in reversed(range(len(moves))):
            move, store = moves[index], stores[index]
            if move.old_path == move.new_path:
                continue
            new = stack.enter_context(NewFile(move.new_path, like=store))
            new.store.truncate(store.size())
            for offset, size, is_data in store.data_runs(0, store.size()):
                for position in range(offset, offset + size, _PIECE_BYTES) if is_data else ():
                    piece = min(_PIECE_BYTES, offset + size - position)
                    new.store.copy_from(store, position, position, piece)
                    if progress is not None:
                        progress(done + position + piece, total)
            done += store.size()
            if index + 1 < len(moves):
                _relink(new.store, move.new_path, moves[index + 1].new_path)
            files.append(new)
        commit_all(files)
    named = [file.path for file in files]
    try:
        _check_new(moves, stores, options, same_files=False)
    except BaseException:
        _forget(named)
        raise
