# SPDX-License-Identifier: Apache-2.0
"""Going back to a snapshot: its configuration, its disks and its memory are the machine's again.

The disks are new leaves on the images that the snapshot froze, so the snapshot stays, and another one taken now
begins a branch. With memory the machine is saved then, and goes on from there when it is started; else it is off.
What the present state had written since its last snapshot is dropped. The name, the id and the folders of the machine
stay as they are: they say what and where it is, not how it was.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import vhdkit
from vmm import registry
from vmm.errors import Refused
from vmm.events import add_event
from vmm.registry import Changing
from vmm.snapshots.memory import SnapshotFolder
from vmm.snapshots.settle import settle, taken_back
from vmm.snapshots.steps import (
    Tidied,
    check_chains,
    commit,
    commit_document,
    options_of_all,
    pivoted,
    pivots_for,
    prepare_document,
    tidy,
)
from vmm.snapshots.store import holding
from vmm.snapshots.tree import Snapshot
from vmm.spec import MachineSpec

_KEPT = ("id", "name", "paths")


@dataclass(frozen=True, slots=True)
class Applied:
    """What is the machine's state now: "saved" where there is memory, else "off"."""

    snapshot: Snapshot
    state: str
    tidied: Tidied


def definition_of(snapshot: Snapshot, present: MachineSpec | None = None) -> MachineSpec:
    """The configuration of a snapshot, with its images as they are called now. Raises NotFound, InvalidSpec."""
    spec = registry.read_definition(SnapshotFolder(snapshot.folder).definition)
    disks = [
        disk.model_copy(update={"path": snapshot.disks[disk.id]}) if disk.id in snapshot.disks else disk
        for disk in spec.disks
    ]
    kept = {} if present is None else {name: getattr(present, name) for name in _KEPT}
    return spec.changed(disks=disks, **kept)


def apply(machine: Changing, word: str) -> Applied:
    """Make the machine, which is off or saved and whose lock the caller holds, what it was. The present state goes.

    Raises NotFound, Refused when something of the snapshot is missing, InUse, NoSpace, StoreFailed; then the machine
    is as it was.
    """
    with holding(machine.paths, machine.name) as held:
        machine = settle(held)
        snapshot = held.tree.find(word)
        folder = SnapshotFolder(snapshot.folder)
        frozen = definition_of(snapshot, machine.spec)
        check_chains(frozen, snapshot.disks)
        if snapshot.memory_bytes is not None and _size_of(folder.memory) != snapshot.memory_bytes:
            raise Refused(
                "the snapshot's memory is missing or damaged", machine=machine.name, path=folder.memory,
                hint=f"vmm snapshot forget-memory {machine.name} {snapshot.id[:8]} keeps its disks",
            )  # fmt: skip
        pivots = pivots_for(frozen, held.tree, snapshot.disks)
        spec = pivoted(frozen, pivots)
        registry.check_disks(spec)
        held.note(prepare_document("apply", None, pivots))
        with taken_back(held, "apply the snapshot"):
            options = options_of_all(frozen)
            for one in pivots:
                vhdkit.create_child(one.child, one.frozen, options=options)
            if snapshot.memory_bytes is not None:
                folder.prepare_saved(machine.paths, spec)
            for one in pivots:
                held.tree.grow(one.frozen, one.child, one.format)
            held.tree.now = snapshot.id
            uefi = folder.uefi_variables if os.path.exists(folder.uefi_variables) else None
            held.note(commit_document(spec, saved="put" if snapshot.memory_bytes is not None else "drop", uefi=uefi))
        commit(held)
        tidied = tidy(held)
    add_event(machine.paths.events, "snapshot-applied", snapshot=snapshot.name)
    return Applied(snapshot, "saved" if snapshot.memory_bytes is not None else "off", tidied)


def _size_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
