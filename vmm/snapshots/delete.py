# SPDX-License-Identifier: Apache-2.0
"""Deleting snapshots: they leave the tree and their memory is removed at once, whatever the machine is doing.

The delete rule decides what happens to the images; merges wait until the machine is off (`background_merge`) or until
the user requests them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vmm.model.errors import AccessDenied, Refused, WrongState
from vmm.model.events import add_event
from vmm.snapshots.dependents import images_of, judge, parent_folders
from vmm.snapshots.preflight import removal_problem
from vmm.snapshots.recovery import discard, settle
from vmm.snapshots.steps import Tidied, tidy
from vmm.store import registry
from vmm.store.registry import Changing, Machine
from vmm.store.removal import refuse_needed_folder
from vmm.store.snapshots.journal import Delete
from vmm.store.snapshots.memory import SnapshotFolder
from vmm.store.snapshots.proof import is_stood_on
from vmm.store.snapshots.snapshot import Snapshot
from vmm.store.snapshots.store import Held, holding, load_tree
from vmm.store.snapshots.tree import Tree


@dataclass(frozen=True, slots=True)
class Deleted:
    """The deleted snapshots, and what happened to their images."""

    snapshots: tuple[Snapshot, ...]
    tidied: Tidied


def delete(held: Held, word: str, *, subtree: bool = False) -> Deleted:
    """Delete a snapshot, with `subtree` also its descendants, in any state of the machine.

    No interrupted operation may be left to settle. Raises NotFound, InUse, VmmError.
    """
    snapshot = held.find(word)
    gone = tuple(held.tree.subtree(snapshot.id) if subtree else [snapshot])
    _take_away(held, gone)
    tidied = tidy(held)
    for one in gone:
        add_event(held.machine.events, "snapshot-deleted", snapshot=one.name)
    return Deleted(gone, tidied)


def _take_away(held: Held, gone: Sequence[Snapshot]) -> None:
    """Remove snapshots from the tree, then their folders. Raises InUse if another machine has files in one of them."""
    judge(registry.load_for_change(held), held.tree)  # raises if the dependants cannot be determined
    for one in gone:
        refuse_needed_folder(one.folder, held)
        if (problem := removal_problem(one.folder)) is not None:
            raise AccessDenied(f"{one.name} cannot be removed: {problem}", machine=held.name, path=one.folder)
    held.tree.remove(gone)
    held.begin(Delete(tuple(one.folder for one in gone)))
    for one in gone:
        discard(held, one.folder)
    held.done()


def forget_memory(held: Held, word: str) -> Snapshot:
    """Drop a snapshot's memory; keep its disks and configuration. Raises NotFound, WrongState, Refused, InUse."""
    held.need_settled()
    snapshot = held.find(word)
    if snapshot.memory_bytes is None:
        raise WrongState(f"{snapshot.name} has no memory", machine=held.name)
    refuse_needed_folder(snapshot.folder, held)
    held.tree.snapshots[snapshot.id] = replace(snapshot, memory_bytes=None)
    held.save()
    left = SnapshotFolder(snapshot.folder).discard_memory()
    if left:
        raise Refused(
            "the snapshot no longer has memory, but the memory's file stays: it is not a regular file",
            machine=held.name,
            path=left[0],
        )
    return held.tree.snapshots[snapshot.id]


def images_to_delete(machine: Machine) -> list[str]:
    """The images to remove when a machine is deleted with its disks, children before parents.

    These are the images made for its snapshots and its own frozen images; images that other files stand on or that
    other machines use stay.
    """
    tree = load_tree(machine.paths)
    leaves = [*(path for path, one in tree.images.items() if one.ours), *images_of(machine.spec).values()]
    folders = parent_folders(machine.spec)
    own = {path for path, one in tree.images.items() if not one.ours and is_stood_on(path, leaves, folders)}
    images = {path: replace(one, ours=one.ours or path in own) for path, one in tree.images.items()}
    bare = Machine(machine.spec.changed(disks=[]), machine.paths, machine.runtime)
    return list(judge(bare, Tree(images=images), proved=own).unlink)


def delete_all(machine: Changing) -> None:
    """Delete all snapshots of a machine that is to be deleted, and the images that only they need. Raises VmmError."""
    with holding(machine.paths, machine.name) as held:
        settle(held)
        _take_away(held, tuple(held.tree.snapshots.values()))
        tidy(held)


def hidden_images(machine: Machine) -> dict[str, str]:
    """Images that belong to no snapshot but stay: path -> reason. Raises VmmError."""
    tree = load_tree(machine.paths)
    live = set(images_of(machine.spec).values())
    return {path: why for path, why in judge(machine, tree).kept.items() if path not in live}
