# SPDX-License-Identifier: Apache-2.0
"""The images of a machine as they are while a prune is unfinished: the manifests, corrected by its journal.

Decides which image stands on which while a merging has changed files, and whose sums cannot be known then. Changes
nothing, so it is for what reads a repository that it may not write to. Without a merging under way the manifests alone
count.

A merging replaces manifests one by one, so for a while some describe the images before it and some after it:

    the leaf is there, and described     it reads right, on whatever the manifests say; a child of it may already have
                                         been pointed to the target, which its own file says
    the leaf is gone, or not described   the target is complete and has taken its place for all that stand on it
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import replace

from vhdkit import errors, formats
from vhdkit.backup.graph import Images
from vhdkit.backup.journal import merging_under_way
from vhdkit.backup.names import ImagePlace
from vhdkit.backup.prune import ImageMerge
from vhdkit.backup.repository import MachineFolder, Night
from vhdkit.chain.names.parents import linkage_id_of
from vhdkit.chain.records import pending


def images_now(machine: MachineFolder, nights: Iterable[Night]) -> Images:
    """The images that these nights describe, as their files are now; `changing` are those whose sums are not known."""
    manifests = [one.manifest for one in nights if one.manifest is not None]
    merging = merging_under_way(machine)
    if merging is None:
        return Images(manifests)
    children = _children(Images(manifests), merging)
    changing = {merging.target, merging.gone[-1], *children}  # the other sources are only read
    # Manifests of dropped nights are replaced last: they are the ones that are out of date.
    images = Images(sorted(manifests, key=lambda one: one.dropped), changing)
    records = images.records
    if merging.leaf not in records or not _exists(machine, merging.leaf):
        if merging.target in records:
            records[merging.leaf] = records[merging.target]
        return images
    for place in children:
        if records[place].parent == merging.leaf and _stands_on(machine, place, merging.target):
            records[place] = replace(records[place], parent=merging.target)
    return images


def _children(images: Images, merging: ImageMerge) -> list[ImagePlace]:
    """The images that stand, or will stand, on the target, and are not merged."""
    standing = images.children()
    on = [*standing.get(merging.leaf, ()), *standing.get(merging.target, ())]
    return [one for one in dict.fromkeys(on) if one != merging.target and one not in merging.gone]


def _exists(machine: MachineFolder, place: ImagePlace) -> bool:
    with contextlib.suppress(errors.NotFound), machine.folder_of(place) as folder:
        return folder.exists(place.name)
    return False


def _stands_on(machine: MachineFolder, place: ImagePlace, parent: ImagePlace) -> bool:
    """Whether the file names that image as its parent; False if it cannot be read."""
    with contextlib.suppress(errors.VhdkitError), machine.folder_of(place) as folder:
        with folder.file(parent.name) as store:
            expected = linkage_id_of(store)
        with folder.file(place.name) as store:
            view = pending.view(store)
            facts = formats.probed(view).facts(view)
        return facts.parent is not None and expected in facts.parent.linkage_ids
    return False
