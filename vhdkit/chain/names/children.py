# SPDX-License-Identifier: Apache-2.0
"""Finds the children of an image: the only module that decides what they are.

Decides where children of an image are looked for, and what counts as one. Code that opens an image for writing, or
changes, moves, replaces or removes it, calls this first (`INV-PARENT-READ-ONLY`).

    its own folder, folders the user named    every image that records its id
    the folders above it                      every image that finds it from there: a parent may lie below its child
    images that the caller knows              the same
    the marks beside it (`marks`)             the same, in any folder; a child that cannot be examined counts, and if
                                              it is missing, its folder is searched for its new name

Each file is examined once, with three reads; only files that contain the wanted id are parsed as images.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from vhdkit import errors, formats
from vhdkit.chain.names import marks
from vhdkit.chain.names.marks import Mark
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.names.parents import (
    allowed_folders,
    find_parent,
    linkage_id_of,
    names_lead_to,
    parent_of,
)
from vhdkit.chain.records import pending
from vhdkit.errors import printable, quoted
from vhdkit.finding import Finding, Severity, left_by_repair
from vhdkit.folder import is_file_name
from vhdkit.image import NULL_ID, ImageFacts
from vhdkit.local_volume import LOCAL
from vhdkit.store import FileStore
from vhdkit.volume import Volume, VolumeFile

MAX_LEVELS_ABOVE = 16
_MAX_SHOWN = 8
MAX_FILES_ELSEWHERE = 4096  # examined in a folder above, or in one that a mark names


@dataclass(frozen=True, slots=True)
class Dependent:
    """A child of an image; with a `problem`, one that is recorded as a child but cannot be examined."""

    path: str
    problem: str | None = None
    hint: str | None = None

    def __str__(self) -> str:
        return printable(self.path) + (f" (which cannot be examined: {self.problem})" if self.problem else "")


@dataclass(slots=True)
class _Parent:
    """An image whose children are searched, and those found so far, by their real paths."""

    path: str
    linkage_id: bytes
    identity: Hashable | None
    children: dict[str, Dependent] = field(default_factory=dict)
    kept: list[Mark] = field(default_factory=list)  # marks that are valid, or may be
    dropped: int = 0
    marked: int = 0  # children that the record names


def folders_of_children(path: str, parent_dirs: Sequence[str], volume: Volume = LOCAL) -> tuple[str, ...]:
    """The real folders in which children of an image are searched first: those in which parents may lie, and the
    folder of the name by which it was given, which may be a link: a child made through that name lies there.
    """
    here = volume.real(os.path.dirname(path) or os.curdir)
    return tuple(dict.fromkeys(volume.real(one) for one in (*allowed_folders(path, parent_dirs, volume), here)))


def children_of(
    images: Sequence[tuple[bytes, str]],
    options: OpenOptions,
    *,
    folders: Sequence[str] = (),
    volume: Volume = LOCAL,
) -> list[list[Dependent]]:
    """For each image, (linkage id, path), its children. Nothing is changed.

    `folders` are searched as well. Raises AccessDenied and IoFailed for the images themselves.
    """
    return [list(parent.children.values()) for parent in _searched(images, options, folders, volume)]


def refuse_with_children(
    store: FileStore,
    options: OpenOptions,
    danger: str,
    *,
    apart_from: str | None = None,
    hint: str = "work on the child instead: it may hold the most recent writes",
    tidy: bool = False,
) -> None:
    """Raise HasChildren if this image has children: see `children_of`.

    `danger` is what would happen to the child, `hint` what to do; the child at `apart_from` does not count. With
    `tidy`, for callers that hold the writer's lock, marks that are no longer valid are dropped.
    """
    (parent,) = _searched([(linkage_id_of(store), store.name)], options, (), LOCAL)
    own = None if apart_from is None else LOCAL.real(apart_from)
    children = [one for one in parent.children.values() if one.path != own]
    if children:
        raise has_children(store.name, children, danger, hint)
    if tidy and parent.dropped:
        tidy_marks(parent.path, parent.kept)


def has_children(path: str, children: Sequence[Dependent], danger: str, hint: str | None) -> errors.HasChildren:
    """The error for an image that has, or may have, children; `danger` is what would happen to them."""
    original = _original(path, children[0].path)
    if original is not None:
        return errors.HasChildren(
            f"has the same id as the parent of {children[0]}, which is now {printable(original)}",
            path=path,
            hint=f"children identify their parent by its id alone, so a copy beside them cannot be changed: move it to"
            f" a folder of its own, or make an image with another id: vhdkit convert {quoted(path)} NEW --to dynamic",
        )
    others = f" and {len(children) - 1} more" if len(children) > 1 else ""
    return errors.HasChildren(
        f"is the parent of {children[0]}{others}{danger if danger.startswith(',') else f'; {danger}'}",
        path=path,
        hint=children[0].hint or hint,
    )


def _original(path: str, child_path: str) -> str | None:
    """The child's actual parent, if the file at `path` merely has the same id; else None."""
    try:
        with LOCAL.open_regular(child_path) as store:
            child = _facts_of(store, LOCAL)
        if child.parent is None:
            return None
        folders = dict.fromkeys((os.path.dirname(child.path), os.path.dirname(LOCAL.real(path))))
        with find_parent(child, tuple(folders), OpenOptions()) as found:
            return found.name if found.identity != _identity(LOCAL.real(path), LOCAL) else None
    except errors.VhdkitError:
        return None


def _advised(one: Dependent) -> str:
    """The problem with a child, and a remedy if there is one."""
    return f"{one.problem}; {one.hint}" if one.hint else str(one.problem)


def mark_findings(store: VolumeFile, options: OpenOptions, volume: Volume = LOCAL) -> tuple[Finding, ...]:
    """Findings about the marks beside an image that are worth reporting."""
    if store.is_device or not volume.exists(marks.record_path(store.name, volume)):
        return ()
    parent = _Parent(volume.real(store.name), linkage_id_of(store, volume), store.identity)
    _Search([parent], options, volume).look_at_marks(parent)
    found, seen = [], [one for one in parent.children.values() if one.problem is None]
    if seen:
        more = f" and {len(seen) - 1} more" if len(seen) > 1 else ""
        message = f"{seen[0]}{more} in other folders depend{'' if more else 's'} on it: it must not be changed"
        found.append(Finding(Severity.NOTE, "children-elsewhere", message, store.name))
    for one in [one for one in parent.children.values() if one.problem is not None][:_MAX_SHOWN]:
        message = f"{printable(one.path)} is recorded as its child and cannot be examined: {_advised(one)}"
        if one.path == marks.record_path(store.name, volume):
            message = f"its record of children {printable(one.path)} is not valid: {_advised(one)}"
        message = left_by_repair(message, "it changes only this image")
        found.append(Finding(Severity.WARNING, "children-unseen", message, store.name))
    if parent.dropped and not parent.children:
        message = "none of its recorded children depends on it any more; the next writable open removes the record"
        found.append(Finding(Severity.NOTE, "children-gone", message, store.name))
    return tuple(found)


def tidy_marks(path: str, kept: Sequence[Mark]) -> None:
    """Drop all marks beside an image except these. What cannot be written stays as it is, which does no harm."""
    try:
        marks.keep_only(path, kept)
    except errors.VhdkitError:
        return


def drop_stale_marks(path: str, options: OpenOptions | None = None) -> None:
    """Drop the marks beside an image that are no longer valid; the caller holds it as a writer."""
    if LOCAL.exists(marks.record_path(path)):
        with LOCAL.open(path) as store:
            (parent,) = _searched([(linkage_id_of(store), path)], options or OpenOptions(), (), LOCAL)
        if parent.dropped or not (parent.kept or parent.children):
            tidy_marks(path, parent.kept)


def find_children(
    parent_id: bytes,
    folders: Sequence[str],
    *,
    apart_from: Hashable | None = None,
    raw_parent: str | None = None,
    volume: Volume = LOCAL,
) -> list[str]:
    """Paths of the differencing images directly in `folders` whose parent has this id. Damaged images are skipped.

    Children of raw disks record no id; with `raw_parent` those count whose names lead to that path.
    """
    parent = _Parent(raw_parent or "", parent_id, apart_from)
    _Search([parent], OpenOptions(), volume).look_in(folders)
    return list(parent.children)


def find_children_of(
    parents: Sequence[tuple[bytes, str]], folders: Sequence[str], volume: Volume = LOCAL
) -> list[list[str]]:
    """For each parent, (linkage id, real path), the result of `find_children`; every file is examined once."""
    wanted = [_Parent(path, parent_id, _identity(path, volume)) for parent_id, path in parents]
    _Search(wanted, OpenOptions(), volume).look_in(folders)
    return [list(one.children) for one in wanted]


def _searched(
    images: Sequence[tuple[bytes, str]], options: OpenOptions, folders: Sequence[str], volume: Volume
) -> Sequence[_Parent]:
    parents = [_Parent(volume.real(path), parent_id, _identity(path, volume)) for parent_id, path in images]
    search = _Search(parents, options, volume)
    near = [*(one for _, path in images for one in folders_of_children(path, options.parent_dirs, volume)), *folders]
    search.look_in(near)
    search.look_in([above for parent in parents for above in _above(parent.path)], nearby=False)
    for path in options.known_images:
        search.look_at(path)
    for parent in parents:
        search.look_at_marks(parent)
    return parents


def _identity(path: str, volume: Volume) -> Hashable | None:
    try:
        with volume.open_regular(path) as store:
            return store.identity
    except errors.VhdkitError:
        return None


def _facts_of(store: VolumeFile, volume: Volume) -> ImageFacts:
    """The metadata of an image as it will be read. Raises CorruptImage, InvalidArgument."""
    view = pending.view(store, volume)
    return formats.probed(view).facts(view)


def _above(path: str) -> list[str]:
    """The folders above the image's own, nearest first."""
    folder = os.path.dirname(path)
    found: list[str] = []
    while folder != os.path.dirname(folder) and len(found) < MAX_LEVELS_ABOVE:
        folder = os.path.dirname(folder)
        found.append(folder)
    return found


class _Search:
    """One search for the children of some images. Files that were examined already are skipped."""

    def __init__(self, parents: Sequence[_Parent], options: OpenOptions, volume: Volume) -> None:
        self._volume = volume
        self._parents = parents
        self._ids = frozenset(parent.linkage_id for parent in parents)
        self._options = replace(options, allow_raw_parent=True)
        self._folders: set[str] = set()
        self._seen: set[str] = set()

    def look_in(self, folders: Iterable[str], *, nearby: bool = True) -> None:
        """Examine the files directly in `folders`; if not `nearby`, only files that find the image count."""
        for folder in dict.fromkeys(self._volume.real(folder) for folder in folders):
            if folder in self._folders:
                continue
            self._folders.add(folder)
            paths = list(self._volume.siblings(folder, None if nearby else MAX_FILES_ELSEWHERE))
            there = set(paths)
            for path in paths:
                if path not in self._seen:
                    self._seen.add(path)
                    self._look(path, nearby, pending.undo_path_beside(path) in there)

    def look_at(self, path: str) -> None:
        """Examine an image that the caller knows; a missing or unreadable one is ignored."""
        if is_file_name(path) and (real := self._volume.real(path)) not in self._seen:
            self._seen.add(real)
            self._look(real, False, True)

    def _look(self, path: str, nearby: bool, may_have_log: bool) -> None:
        try:
            with self._volume.open_regular(path, follow_links=False) as store:  # it was listed, or is a real path
                child = self._child(store, may_have_log)
                identity = store.identity
        except errors.VhdkitError:
            return
        if child is not None:
            self._add(child, identity, nearby)

    def _child(self, store: VolumeFile, may_have_log: bool) -> ImageFacts | None:
        """The metadata of an image that may be a child of one of the parents, else None. Raises CorruptImage."""
        found = formats.parent_ids(store)
        if (
            NULL_ID not in found
            and not self._ids & found
            and not (may_have_log and pending.log_mentions(store.name, self._ids, self._volume))
        ):
            return None
        facts = _facts_of(store, self._volume)
        return facts if facts.parent is not None else None

    def _add(self, child: ImageFacts, identity: Hashable, nearby: bool) -> bool:
        """Record the image as a child of its parents among these; True if it has one."""
        added = False
        for parent in self._parents:
            # A child of a raw disk records no id, whatever the guest has written to that disk since, even a footer.
            recorded = parent_of(child)
            if not recorded.raw_allowed and parent.linkage_id not in recorded.linkage_ids:
                continue
            if identity == parent.identity:
                continue
            if recorded.raw_allowed and nearby:
                stands = names_lead_to(child, parent.path, self._volume)
            else:
                stands = nearby or self._finds(child, parent)
            if stands:
                parent.children.setdefault(child.path, Dependent(child.path))
                added = True
        return added

    def _finds(self, child: ImageFacts, parent: _Parent) -> bool:
        """False for a child of another file with this id, a copy of the parent."""
        folders = dict.fromkeys((os.path.dirname(child.path), os.path.dirname(parent.path)))
        more = (self._volume.real(one) for one in self._options.parent_dirs)
        try:
            with find_parent(child, tuple(dict.fromkeys((*folders, *more))), self._options, self._volume) as found:
                return found.identity == parent.identity
        except errors.VhdkitError:
            return not parent_of(child).raw_allowed

    # -- marks --------------------------------------------------------------------------------------------------

    def look_at_marks(self, parent: _Parent) -> None:
        """Examine the children that left a mark beside the image. An unreadable record counts as a child."""
        try:
            found, is_of_here = marks.marks_about(parent.path, self._volume)
        except errors.VhdkitError as error:
            path = error.path or marks.record_path(parent.path, self._volume)
            parent.children[path] = Dependent(path, error.problem, error.hint)
            return
        parent.dropped += not is_of_here
        parent.marked = len({mark.path for mark in found})
        held = {mark.path for mark in found if mark.parent_id == parent.linkage_id and self._holds(mark, parent)}
        # A child that accepts several ids of its parent has a mark for each: the parent may get another one of them.
        parent.kept += [mark for mark in found if mark.path in held]
        parent.dropped += len(found) - len(parent.kept)

    def _holds(self, mark: Mark, parent: _Parent) -> bool:
        """Examine the child that a mark names; False if it is not a child of the image any more."""
        before = len(parent.children)
        try:
            with self._volume.open_regular(mark.path) as store:
                child = self._child(store, True)
                if child is None:
                    _facts_of(store, self._volume)  # raises if it is damaged: it may be repaired
                identity = store.identity
            if child is not None and self._add(child, identity, False):
                return any(one.path == mark.path for one in parent.children.values())
        except errors.NotFound:
            if self._volume.was_removed(os.path.dirname(mark.path), mark.trail):
                self.look_in([os.path.dirname(mark.path)], nearby=False)
                return len(parent.children) > before
            self._unseen(mark, parent, "it does not exist, and may be on a file system that is not mounted")
            return True
        except errors.InvalidArgument:  # the path now leads to something other than an image
            return False
        except errors.VhdkitError as error:
            self._unseen(mark, parent, error.problem)
            return True
        return False

    def _unseen(self, mark: Mark, parent: _Parent, problem: str) -> None:
        record = quoted(marks.record_path(parent.path, self._volume))
        hint = (
            f"make it readable, so that it can be examined; if it is gone permanently, remove the record: rm {record}"
        )
        if parent.marked > 1:
            hint += "; to record the other images that it names again, use `vhdkit rebase IMAGE --parent"
            hint += f" {quoted(parent.path)}`"
        parent.children.setdefault(mark.path, Dependent(mark.path, problem, hint))
