# SPDX-License-Identifier: Apache-2.0
"""Finds the newest image of a line: the one that a server had moved on to, whatever it was doing when it died.

Decides which image follows which. A merge whose data is complete (its record says relink or remove) makes one image
of its target and its sources: a child of any of them follows the target, and the sources themselves
follow no image. So a layer that was about to be removed does not count as a second leaf, and is not served if others
have overtaken it. A merge that was still copying makes no difference here. Must not change anything: opening the
newest image finishes such a merge.
"""

from __future__ import annotations

import itertools
import os

from vhdkit import errors
from vhdkit.arguments import AnyPath
from vhdkit.chain.names.children import find_children, folders_of_children
from vhdkit.chain.names.opening import MAX_CHAIN_DEPTH
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.names.parents import allowed_folders, linkage_id_of
from vhdkit.chain.records.intent import Intent, Phase, intent_of, intents_about
from vhdkit.chain.verbs.merge_recovery import is_child_of, is_there, linkages_of_named
from vhdkit.folder import is_regular, real_path
from vhdkit.store import FileStore


def newest_leaf(path: AnyPath, options: OpenOptions) -> str:
    """The newest descendant of this image; the path itself if it has no children.

    Searches where a writable open searches for children. The image may be gone if a record names its merge target.
    Raises NotFound, and HasChildren if an image has two children, naming both.
    """
    newest = os.fsdecode(path)
    for _ in range(MAX_CHAIN_DEPTH):
        passed_by = _merge_of(newest, options)
        if passed_by is not None:
            newest = passed_by.target.path
        followers = _followers(newest, options)
        if not followers:
            return newest
        if len(followers) > 1:
            names = " and ".join(errors.printable(child) for child in followers[:2])
            more = f" and {len(followers) - 2} more" if len(followers) > 2 else ""
            raise errors.HasChildren(
                f"{names}{more} are its children, so the newest leaf is ambiguous",
                path=newest,
                hint="name the one that is meant",
            )
        newest = followers[0]
    raise errors.HasChildren(f"its line of descendants has more than {MAX_CHAIN_DEPTH} images", path=os.fsdecode(path))


def _merge_of(path: str, options: OpenOptions) -> Intent | None:
    """The completed merge that has this image as one of its sources."""
    place, is_file = real_path(path), is_regular(path)
    for intent in intents_about(path, allowed_folders(path, options.parent_dirs)):
        chain = [*intent.sources, intent.target] if intent.phase is not Phase.COPY else []
        for one, below in itertools.pairwise(chain):
            is_it = is_there(one) and is_child_of(one, below) if is_file else intent.phase is Phase.REMOVE
            if one.path == place and is_it:
                return intent
    return None


def _followers(path: str, options: OpenOptions) -> list[str]:
    """The children of this image, and those of images that were merged into it and still exist."""
    folders = folders_of_children(path, options.parent_dirs)
    with FileStore.open(path) as store:
        found = find_children(linkage_id_of(store), folders, apart_from=store.identity, raw_parent=real_path(path))
    intent = intent_of(path, allowed_folders(path, options.parent_dirs))
    if intent is None or intent.phase is Phase.COPY:
        return found
    sources = [one for one in intent.sources if is_there(one)]
    for one in sources:
        for linkage_id in linkages_of_named(one):
            found += find_children(linkage_id, (*folders, os.path.dirname(one.path)))
    gone = {one.path for one in sources}
    return list({real_path(child): child for child in found if real_path(child) not in gone}.values())
