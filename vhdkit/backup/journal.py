# SPDX-License-Identifier: Apache-2.0
"""The journal of a prune or a deletion: what is under way, or was when it was interrupted (`prune.json`).

Decides what the journal says, how it is read, and what is known without it: a merging that has changed files has a
record of its own (`chain.records.intent`), so a damaged journal does not stop the prune that wrote it, nor make nights
look damaged. Must not know what follows from it (`pruning`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from vhdkit import errors
from vhdkit.backup.documents import MAX_DOCUMENT_BYTES, DamagedRepository, encoded, parsed
from vhdkit.backup.names import IMAGES, ImagePlace, is_name, night_word
from vhdkit.backup.prune import ImageMerge
from vhdkit.backup.repository import MAX_FILES, PRUNE_FILE, MachineFolder
from vhdkit.chain.records.intent import intent_of, record_of

_MAX_STEPS = 2 * 32_768


@dataclass(frozen=True, slots=True)
class PruneJournal:
    """What is under way: the nights that go, images that are removed, and the merging that has begun."""

    nights: tuple[int, ...]
    removals: tuple[ImagePlace, ...]
    merging: ImageMerge | None


def write_journal(machine: MachineFolder, journal: PruneJournal) -> None:
    """Write it, durably, in place of an earlier one. Raises NoSpace."""
    merging = journal.merging
    document = {
        "format": 1,
        "nights": [night_word(one) for one in journal.nights],
        "removals": [one.text for one in journal.removals],
        "merging": None
        if merging is None
        else {
            "target": merging.target.text,
            "between": [one.text for one in merging.between],
            "leaf": merging.leaf.text,
        },
    }
    machine.folder.write(PRUNE_FILE, encoded(document), replace=True)


def read_journal(machine: MachineFolder) -> PruneJournal | None:
    """The journal; None without one. Raises DamagedRepository: what it was about must not be guessed."""
    path = os.path.join(machine.path, PRUNE_FILE)
    try:
        fields = parsed(machine.folder.read(PRUNE_FILE, MAX_DOCUMENT_BYTES), path)
    except errors.NotFound:
        return None
    inner = fields.optional_object("merging")
    merging = None
    if inner is not None:
        merging = ImageMerge(
            inner.converted("target", ImagePlace.of_text),
            tuple(_places(inner.texts("between", _MAX_STEPS), path)),
            inner.converted("leaf", ImagePlace.of_text),
        )
        if len({one.disk_id for one in (merging.target, *merging.gone)}) != 1:
            raise inner.damaged("target", "is an image of another disk")
    nights = fields.texts("nights", _MAX_STEPS)
    if not all(one.isdecimal() and one.isascii() and len(one) < 10 for one in nights):
        raise fields.damaged("nights")
    return PruneJournal(
        tuple(int(one) for one in nights), tuple(_places(fields.texts("removals", _MAX_STEPS), path)), merging
    )


def journal_problem(machine: MachineFolder) -> str | None:
    """What is wrong with the journal; None if nothing is, and without one."""
    try:
        read_journal(machine)
    except DamagedRepository as error:
        return error.problem
    return None


def journal_or_rest(machine: MachineFolder) -> PruneJournal | None:
    """The journal; of a damaged one what the files themselves say: the merging that has begun. No night is dropped for
    it but those that are marked, and no image is removed but those that no manifest needs.
    """
    try:
        return read_journal(machine)
    except DamagedRepository:
        return PruneJournal((), (), _recorded_merging(machine))


def _recorded_merging(machine: MachineFolder) -> ImageMerge | None:
    """The merging of which there is a record beside its target."""
    with contextlib.suppress(errors.NotFound), machine.folder.folder(IMAGES) as images:
        for disk_id in filter(is_name, images.names(MAX_FILES)):
            with machine.images(disk_id) as folder:
                for name in folder.names(MAX_FILES):
                    intent = intent_of(os.path.join(folder.path, name), (folder.path,))
                    names = [] if intent is None else [os.path.basename(one.path) for one in intent.sources]
                    places = [ImagePlace.of_text(f"{IMAGES}/{disk_id}/{one}") for one in (name, *names)]
                    target, leaf, *between = places if len(places) > 1 and all(places) else (None, None)
                    if target is not None and leaf is not None:
                        return ImageMerge(target, tuple(one for one in between if one is not None), leaf)
    return None


def _places(texts: tuple[str, ...], path: str) -> Iterator[ImagePlace]:
    for text in texts:
        place = ImagePlace.of_text(text)
        if place is None or place.disk_id is None:
            raise DamagedRepository(f"names {errors.printable(text)}, which is not an image of the machine", path=path)
        yield place


def remove_journal(machine: MachineFolder) -> None:
    """Remove it, durably: nothing is under way any more."""
    if machine.folder.remove(PRUNE_FILE):
        machine.folder.sync()


def images_in_merge(machine: MachineFolder) -> frozenset[ImagePlace]:
    """The images of a merging that has changed some of them: these differ from their sums until it is finished."""
    merging = merging_under_way(machine)
    return frozenset() if merging is None else frozenset({merging.target, *merging.gone})


def merging_under_way(machine: MachineFolder) -> ImageMerge | None:
    """The merging that has begun to change files, and is not known to be finished."""
    with contextlib.suppress(errors.VhdkitError):
        journal = journal_or_rest(machine)
        merging = None if journal is None else journal.merging
        if merging is not None:
            with machine.folder_of(merging.target) as folder:
                record = os.path.basename(record_of(os.path.join(folder.path, merging.target.name)))
                if folder.exists(record) or not folder.exists(merging.leaf.name):
                    return merging
    return None
