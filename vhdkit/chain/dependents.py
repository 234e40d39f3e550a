# SPDX-License-Identifier: Apache-2.0
"""Who stands on an image: the one place that answers that.

Decides where children of an image are looked for, and what counts as one. Whoever opens an image for writing, changes,
moves, replaces or removes it asks here first (`INV-PARENT-READ-ONLY`). Changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from vhdkit import errors
from vhdkit.chain import pending
from vhdkit.chain.options import OpenOptions
from vhdkit.chain.parents import NULL_ID, allowed_folders, names_lead_to, recorded_parent_id, unique_id
from vhdkit.folder import real_path, regular_files
from vhdkit.formats.vhd.metadata import Metadata, read_footers, read_metadata
from vhdkit.store import FileStore


def folders_of_children(path: str, parent_dirs: Sequence[str]) -> tuple[str, ...]:
    """The real folders in which children of an image are looked for: those parents may lie in, and the one of the
    name it was given by, which may be a link: who made a child through that name put it there.
    """
    here = real_path(os.path.dirname(path) or os.curdir)
    return tuple(dict.fromkeys((*allowed_folders(path, parent_dirs), here)))


def find_children(
    parent_id: bytes,
    folders: Sequence[str],
    *,
    apart_from: tuple[int, int] | None = None,
    raw_parent: str | None = None,
) -> list[str]:
    """Paths of the differencing images in `folders` whose parent has this id. Damaged files are passed over.

    Children of raw disks record no id; with `raw_parent` those count whose names lead to that path.
    """
    children = []
    for folder in dict.fromkeys(real_path(folder) for folder in folders):
        for path in regular_files(folder):
            if _child_of(path, parent_id, apart_from, raw_parent):
                children.append(path)
    return children


def _child_of(path: str, parent_id: bytes, apart_from: tuple[int, int] | None, raw_parent: str | None) -> bool:
    child = _differencing(path, apart_from)
    return child is not None and _stands_on(child, parent_id, raw_parent)


def _differencing(path: str, apart_from: tuple[int, int] | None = None) -> Metadata | None:
    """What the file at `path` says of itself when it is a sound differencing image, else None."""
    try:
        with FileStore.open(path) as store:
            if store.identity == apart_from:
                return None
            image = pending.view(store)
            # The cookie is looked at first: a folder may hold many files that are no images at all.
            if not any(place.state.usable for place in read_footers(image)):
                return None
            metadata = read_metadata(image)
    except errors.VhdkitError:
        return None
    return metadata if metadata.is_differencing else None


def _stands_on(child: Metadata, parent_id: bytes, raw_parent: str | None) -> bool:
    if recorded_parent_id(child) != parent_id:
        return False
    if parent_id != NULL_ID:
        return True
    return raw_parent is not None and names_lead_to(child, raw_parent)


def find_children_of(parents: Sequence[tuple[bytes, str]], folders: Sequence[str]) -> list[list[str]]:
    """For each parent, (unique id, real path), what `find_children` finds; every file is looked at once."""
    families: list[list[str]] = [[] for _ in parents]
    for folder in dict.fromkeys(real_path(folder) for folder in folders):
        for path in regular_files(folder):
            child = _differencing(path)
            for (parent_id, parent_path), family in zip(parents, families, strict=True):
                if child is not None and path != parent_path and _stands_on(child, parent_id, parent_path):
                    family.append(path)
    return families


def refuse_with_children(
    store: FileStore,
    options: OpenOptions,
    danger: str,
    *,
    apart_from: str | None = None,
    hint: str = "work on the child instead: it may hold what was written last",
) -> None:
    """Raise HasChildren when an image in the file's folder, or in those the user named, stands on this one.

    `danger` says what would happen to it, `hint` what to do; the child at `apart_from` does not count.
    """
    folders = folders_of_children(store.name, options.parent_dirs)
    own_id, own_path = unique_id(store), real_path(store.name)
    children = find_children(own_id, folders, apart_from=store.identity, raw_parent=own_path)
    known = [one for one in options.known_images if _child_of(one, own_id, store.identity, own_path)]
    children += [one for one in known if real_path(one) not in children]
    if apart_from is not None:
        children = [one for one in children if real_path(one) != real_path(apart_from)]
    if children:
        others = f" and {len(children) - 1} more" if len(children) > 1 else ""
        raise errors.HasChildren(
            f"is the parent of {errors.printable(children[0])}{others}; {danger}",
            path=store.name,
            hint=hint,
        )
