# SPDX-License-Identifier: Apache-2.0
"""The notes of a killed server (`formats.remember`) in view of the chain: which of them may still be written.

Decides that notes are not written into an image once a child of it owns sectors: that child was made, and written to,
by a program that did not know what the notes hold, so the noted writes would appear under content that was written
without them. Such notes are set aside (`INV-ANSWERED-SURVIVES`). None of a server's own notes are: the leaf that it
serves is flushed before its new child is written to, and so is the target of a merge before its children are
repointed. The images that are merged into the target own sectors, but they hide what is copied, and go (`intent`).

Also decides that an image with notes in a folder that the caller did not name gets no child, and that nothing is
written above it. Must not know what a note says, nor which notes belong to the file as it is (both in `formats`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from vhdkit import errors, formats
from vhdkit.chain.names.children import children_of, has_children
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.names.parents import linkage_id_of
from vhdkit.chain.records import pending
from vhdkit.chain.records.intent import intent_of
from vhdkit.formats import recall, remember
from vhdkit.image import Layer
from vhdkit.store import FileStore


def refuse_unwritten(layers: Sequence[Layer]) -> None:
    """Raise NotesUnwritten if one of these layers may have notes in a folder that the caller did not name."""
    for file in pending.files_of(layers):
        remember.refuse_unwritten(file)


def write_noted(store: FileStore, options: OpenOptions, child_path: str | None = None) -> None:
    """Write to the image, which is not locked yet, the changes that a killed server had noted, before it is read.

    Such a server may have died after giving its leaf a child and before flushing that leaf, which is a parent from
    then on and never opened for writing again. `child_path` is the child through which the image was found. Does
    nothing for a file without a folder of notes. Raises ImageInUse while another program holds the image, what
    `settle_noted` raises, and what opening it for writing raises.
    """
    if not remember.has_notes(store, pending.id_of(pending.view(store))):
        return
    with FileStore.open(store.name, writable=True) as own:
        if own.identity != store.identity:
            raise errors.Replaced("was replaced while it was opened", path=store.name)
        own.notes_folder = store.notes_folder
        own.lock(writer=True)
        pending.settle(own)
        settle_noted(own, options, child_path)
        formats.probed(own).open(own, writable=True).close()


def settle_noted(store: FileStore, options: OpenOptions, child_path: str | None = None) -> None:
    """Set the notes of an image aside if a child of it owns sectors. The caller holds the image's writer's lock.

    Raises HasChildren for a child that cannot be examined, NotesUnwritten, AccessDenied, IoFailed.
    """
    unique_id = pending.id_of(pending.view(store))
    if not remember.has_notes(store, unique_id) or not recall.recalled(store, unique_id):
        return
    known = options.known_images if child_path is None else (*options.known_images, child_path)
    (family,) = children_of([(linkage_id_of(store), store.name)], replace(options, known_images=known))
    intent = intent_of(store.name, (os.sep,))  # only its names are compared
    merged = () if intent is None else [one.path for one in intent.sources]
    for child in family:
        if child.path in merged:
            continue
        if child.problem is not None:
            danger = "a killed server's notes cannot be written to it unless that image is empty"
            raise has_children(store.name, [child], danger, child.hint)
        if _owns_sectors(child.path):
            problem = f"its child {errors.printable(child.path)} has been written to without them"
            recall.give_up(store, unique_id, problem)
            return


def _owns_sectors(path: str) -> bool:
    """Whether an image owns anything of its disk, by its file alone."""
    with FileStore.open(path, follow_links=False) as store:
        view = pending.view(store)
        layer = formats.probed(view).open(view)
        return bool(layer.allocated_blocks().any() or layer.zero_blocks().any())
