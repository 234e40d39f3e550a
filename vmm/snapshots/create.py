# SPDX-License-Identifier: Apache-2.0
"""Taking a snapshot: when it is refused, and the whole operation for a machine that is not running.

    off      new leaves for all disks, a copy of the configuration
    saved    the same; the saved memory also becomes the snapshot's, and the machine stays saved

Running machines are handled by `capture`, in their worker; the shared steps are here.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

import vhdkit
from vmm.model.errors import InvalidSpec
from vmm.model.events import add_event
from vmm.model.formats import IMAGE_FORMATS
from vmm.model.spec import MachineSpec
from vmm.snapshots.dependents import images_of, refuse_older
from vmm.snapshots.recovery import settle, taken_back
from vmm.snapshots.steps import check_chains, commit, options_of_all, pivoted, pivots_for
from vmm.store import saved
from vmm.store.devices import refuse_passed_through
from vmm.store.registry import Changing
from vmm.store.snapshots.journal import CreateOff, Pivot, PutInPlace
from vmm.store.snapshots.memory import SnapshotFolder, folder_of
from vmm.store.snapshots.store import Held, holding
from vmm.store.snapshots.tree import MAX_NOTES_CHARACTERS, Snapshot, TakenIn
from vmm.store.state import is_clean


@dataclass(frozen=True, slots=True)
class SnapshotRequest:
    """Parameters of a snapshot. `name` None: named after the time.

    `consistent`: the guest agent freezes the file systems of a running guest meanwhile. `mode`: how memory is captured
    (`kvm.background.Mode`); None: the best mode that the host allows.
    """

    name: str | None = None
    notes: str = ""
    consistent: bool = False
    mode: str | None = None


def begin(held: Held, spec: MachineSpec, request: SnapshotRequest, taken_in: TakenIn) -> tuple[Snapshot, list[Pivot]]:
    """The snapshot to take and the new leaves that it needs; nothing is created yet.

    Raises Refused, AlreadyExists, InvalidSpec.
    """
    refuse_passed_through(spec, "a snapshot")
    tree, now = held.tree, time.time()
    name = request.name if request.name is not None else tree.free_name(now)
    tree.check_new(name)
    if len(request.notes) > MAX_NOTES_CHARACTERS:
        raise InvalidSpec(f"notes have at most {MAX_NOTES_CHARACTERS} characters")
    images = images_of(spec)
    snapshot_id = str(uuid.uuid4())
    snapshot = Snapshot(
        id=snapshot_id, name=name, created=now, parent=tree.now, folder=folder_of(spec, snapshot_id), disks=images,
        taken_in=taken_in, notes=request.notes,
    )  # fmt: skip
    return snapshot, pivots_for(spec, tree, images)


def create(machine: Changing, request: SnapshotRequest) -> Snapshot:
    """Take a snapshot of a machine that is off or saved, whose lock the caller holds.

    Raises Refused, AlreadyExists, InvalidSpec, NoSpace, InUse, StoreFailed; no snapshot exists then.
    """
    with holding(machine.paths, machine.name) as held:
        machine = settle(held)
        refuse_older(machine, held.tree)
        is_saved = saved.is_saved(machine.paths)
        snapshot, pivots = begin(held, machine.spec, request, "saved" if is_saved else "off")
        snapshot = replace(snapshot, consistent=is_clean(machine.paths) and not is_saved)
        check_chains(machine.spec, held.tree, snapshot.disks)
        folder = SnapshotFolder(snapshot.folder)
        held.begin(CreateOff(snapshot.folder, tuple(pivots)))
        with taken_back(held, "take the snapshot"):
            folder.begin(machine.spec)
            folder.copy_uefi(machine.paths, machine.spec)
            if is_saved:
                snapshot = replace(snapshot, memory_bytes=folder.take_saved(machine.paths))
            freeze(machine, pivots)
            folder.finish()
            add(held, snapshot, pivots)
            held.go_on(PutInPlace.of(pivoted(machine.spec, pivots), saved="adapt" if is_saved else None))
        commit(held)
    add_event(machine.paths.events, "snapshot-created", snapshot=snapshot.name)
    return snapshot


def add(held: Held, snapshot: Snapshot, pivots: Sequence[Pivot]) -> None:
    """Add the snapshot and its images to the tree in memory; the caller saves it."""
    held.tree.add(snapshot)
    for one in pivots:
        held.tree.grow(one.frozen, one.child, one.format, child_id=vhdkit.image_id(one.child))


def freeze(machine: Changing, pivots: Sequence[Pivot]) -> None:
    """Create the new leaves, all or none for each format. Raises VhdkitError.

    The machine is off, so its images need no notes of a killed disk server any more: its guest was cut off, too.
    """
    options = replace(options_of_all(machine.spec), notes_folder=machine.runtime.notes)
    for kind in IMAGE_FORMATS:
        pairs = [(one.frozen, one.child) for one in pivots if one.format == kind]
        if pairs:
            vhdkit.snapshot_many(pairs, options=replace(options, format_name=vhdkit.FormatName(kind)))
