# SPDX-License-Identifier: Apache-2.0
"""Going back to a snapshot: the machine gets its configuration, its disks and its memory.

The disks are new leaves on the images that the snapshot froze, so the snapshot stays, and another one taken now
begins a branch. If the snapshot has memory, the machine is saved afterwards and continues from it when it is started;
otherwise it is off. What the present state had written since its last snapshot is dropped. The name, the id and the
folders of the machine stay as they are: they say what and where it is, not how it was.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import vhdkit
from vmm.model.events import add_event
from vmm.snapshots.preflight import look_before_apply
from vmm.snapshots.recovery import settle, taken_back
from vmm.snapshots.steps import (
    Tidied,
    commit,
    options_of_all,
    pivoted,
    tidy,
)
from vmm.store.registry import Changing
from vmm.store.snapshots.journal import NO_VARIABLES, Apply, PutInPlace
from vmm.store.snapshots.memory import SnapshotFolder
from vmm.store.snapshots.store import holding
from vmm.store.snapshots.tree import Snapshot
from vmm.store.state import note_clean, note_unclean


@dataclass(frozen=True, slots=True)
class Applied:
    """What is the machine's state now: "saved" where there is memory, else "off"."""

    snapshot: Snapshot
    state: str
    tidied: Tidied


def apply(machine: Changing, word: str) -> Applied:
    """Make the machine, which is off or saved and whose lock the caller holds, what it was. The present state goes.

    Raises NotFound, Refused when something of the snapshot is missing, InUse, NoSpace, StoreFailed; then the machine
    is as it was.
    """
    with holding(machine.paths, machine.name) as held:
        machine = settle(held)
        snapshot = held.find(word)
        folder = SnapshotFolder(snapshot.folder)
        frozen, pivots = look_before_apply(machine, held.tree, snapshot)
        spec = pivoted(frozen, pivots)
        held.begin(Apply(tuple(pivots)))
        with taken_back(held, "apply the snapshot"):
            options = options_of_all(frozen)
            for one in pivots:
                kind = vhdkit.FormatName(one.format)  # as the tree knows it: a guest may have written anything into it
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
