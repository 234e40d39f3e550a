# SPDX-License-Identifier: Apache-2.0
"""Taking snapshots away: they leave the tree and their memory goes at once, whatever the machine does meanwhile.

What becomes of the images is the rule's decision; merges wait until the machine is off (`fold`) or somebody asks for
them.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace

from vmm.errors import WrongState
from vmm.events import add_event
from vmm.paths import sync_folder
from vmm.registry import Changing, Machine
from vmm.removal import refuse_needed_folder
from vmm.snapshots.memory import SnapshotFolder
from vmm.snapshots.settle import settle
from vmm.snapshots.steps import Tidied, store_problem, tidy
from vmm.snapshots.store import holding, load_tree
from vmm.snapshots.survey import images_of, judge
from vmm.snapshots.tree import Snapshot, Tree


@dataclass(frozen=True, slots=True)
class Deleted:
    """Which snapshots went, and what became of their images."""

    snapshots: tuple[Snapshot, ...]
    tidied: Tidied


def delete(machine: Changing, word: str, *, subtree: bool = False, is_running: bool = False) -> Deleted:
    """Take a snapshot away, with `subtree` also all that came of it. The caller holds the machine's lock.

    Raises NotFound, InUse, VmmError. A running machine's journal is its worker's, and nothing is settled for it.
    """
    with holding(machine.paths, machine.name) as held:
        if not is_running:
            settle(held)
        snapshot = held.tree.find(word)
        gone = tuple(held.tree.subtree(snapshot.id) if subtree else [snapshot])
        for one in gone:
            refuse_needed_folder(one.folder, held)
        held.tree.remove(gone)
        held.note({"op": "delete", "folders": [one.folder for one in gone]})
        for one in gone:
            SnapshotFolder(one.folder).discard()
        held.note(None)
        tidied = tidy(held)
    for one in gone:
        add_event(machine.paths.events, "snapshot-deleted", snapshot=one.name)
    return Deleted(gone, tidied)


def forget_memory(machine: Changing, word: str) -> Snapshot:
    """Keep a snapshot's disks and configuration without its memory. Raises NotFound, WrongState, InUse."""
    with holding(machine.paths, machine.name, stop_merge=False) as held:
        snapshot = held.tree.find(word)
        if snapshot.memory_bytes is None:
            raise WrongState(f"{snapshot.name} has no memory", machine=machine.name)
        held.tree.snapshots[snapshot.id] = replace(snapshot, memory_bytes=None)
        held.save()
        folder = SnapshotFolder(snapshot.folder)
        for path in (folder.memory, folder.description):
            try:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                sync_folder(folder.folder)
            except OSError as error:
                raise store_problem(error, "remove the snapshot's memory") from error
    return held.tree.snapshots[snapshot.id]


def images_to_delete(machine: Machine) -> list[str]:
    """The images that go with a machine that is deleted with its disks, those on top first.

    They are those made for its snapshots, and its own that were frozen; what somebody else stands on or uses stays.
    """
    images = {path: replace(one, ours=True) for path, one in load_tree(machine.paths).images.items()}
    bare = Machine(machine.spec.changed(disks=[]), machine.paths, machine.runtime)
    return list(judge(bare, Tree(images=images)).unlink)


def delete_all(machine: Changing) -> None:
    """All snapshots of a machine that is to be deleted, and the images that only they needed. Raises VmmError."""
    with holding(machine.paths, machine.name) as held:
        settle(held)
        gone = list(held.tree.snapshots.values())
        for one in gone:
            refuse_needed_folder(one.folder, held)
        held.tree.remove(gone)
        held.note({"op": "delete", "folders": [one.folder for one in gone]})
        for one in gone:
            SnapshotFolder(one.folder).discard()
        held.note(None)
        tidy(held)


def hidden_images(machine: Machine) -> dict[str, str]:
    """Images without a snapshot that stay, and why. Raises VmmError."""
    tree = load_tree(machine.paths)
    live = set(images_of(machine.spec).values())
    return {path: why for path, why in judge(machine, tree).kept.items() if path not in live}
