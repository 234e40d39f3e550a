# SPDX-License-Identifier: Apache-2.0
"""Returning to a snapshot: the machine gets the snapshot's configuration, disks and memory.

The disks are new leaves on the images that the snapshot froze, so the snapshot stays, and another snapshot taken now
begins a branch. If the snapshot has memory, the machine is saved afterwards and continues from it at its next start;
otherwise it is off. Whatever the present state wrote since its last snapshot is dropped. The machine keeps its name,
id and folders: they say which machine it is and where, not what state it is in.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import vhdkit
from vmm.model.events import add_event
from vmm.snapshots.dependents import images_of
from vmm.snapshots.preflight import look_before_apply
from vmm.snapshots.recovery import settle, taken_back
from vmm.snapshots.steps import (
    Tidied,
    commit,
    options_to_change,
    pivoted,
    tidy,
)
from vmm.store.registry import Changing
from vmm.store.snapshots.journal import NO_VARIABLES, Apply, PutInPlace
from vmm.store.snapshots.memory import SnapshotFolder
from vmm.store.snapshots.store import Held, holding
from vmm.store.snapshots.tree import Snapshot
from vmm.store.state import note_clean, note_unclean


@dataclass(frozen=True, slots=True)
class Applied:
    """The result. `state` is the machine's state now: "saved" if the snapshot has memory, else "off"."""

    snapshot: Snapshot
    state: str
    tidied: Tidied


def apply(machine: Changing, word: str) -> Applied:
    """Return the machine to a snapshot; it is off or saved, and the caller holds its lock. The present state is lost.

    Raises NotFound, Refused if part of the snapshot is missing, InUse, NoSpace, StoreFailed; the machine is then
    unchanged.
    """
    with holding(machine.paths, machine.name) as held:
        machine = settle(held)
        snapshot = held.find(word)
        folder = SnapshotFolder(snapshot.folder)
        frozen, pivots = look_before_apply(machine, held.tree, snapshot)
        spec = pivoted(frozen, pivots)
        _keep_whole_disks(held, machine)
        held.begin(Apply(tuple(pivots)))
        with taken_back(held, "apply the snapshot"):
            options = options_to_change(replace(machine, spec=frozen))
            for one in pivots:
                kind = vhdkit.FormatName(one.format)  # as recorded in the tree; the guest may have written anything
                vhdkit.create_child(one.child, one.frozen, options=replace(options, format_name=kind))
            if snapshot.memory_bytes is not None:
                folder.prepare_saved(machine.paths, spec)
            for one in pivots:
                held.tree.grow(one.frozen, one.child, one.format, child_id=vhdkit.image_id(one.child))
            held.tree.now = snapshot.id
            uefi = None
            if spec.firmware == "uefi":
                uefi = folder.uefi_variables if os.path.exists(folder.uefi_variables) else NO_VARIABLES
            note_unclean(machine.paths)
            held.go_on(PutInPlace.of(spec, saved="put" if snapshot.memory_bytes is not None else "drop", uefi=uefi))
        commit(held)
        if snapshot.consistent and snapshot.memory_bytes is None:
            note_clean(machine.paths)
        tidied = tidy(held)
    add_event(machine.paths.events, "snapshot-applied", snapshot=snapshot.name)
    return Applied(snapshot, "saved" if snapshot.memory_bytes is not None else "off", tidied)


def _keep_whole_disks(held: Held, machine: Changing) -> None:
    """A disk of which no snapshot has any state is not the snapshots' to drop: its image stays, as it does when the
    disk is removed, even if a backup has given it a new leaf.
    """
    for path in images_of(machine.spec).values():
        if held.tree.is_in_no_snapshot(path):
            held.tree.let_go(path)
