# SPDX-License-Identifier: Apache-2.0
"""Freezing the disks of a machine for a backup: a snapshot without memory and without an entry in the tree.

    journal: Backup      new leaves are made
    journal: commit      the definition names them, the tree keeps the frozen layers: one step

Decides which image of a disk reads as the disk does at that moment, and that it is recorded as kept (`kept`) in the
step in which the machine goes on without it. A leaf that owns nothing needs no new one: the image below it is the one.
Here the machine is off or saved; while it runs, its worker freezes (`worker.backup`), with what is decided here. Must
not know how a night is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import vhdkit
from vmm.model.errors import InvalidSpec
from vmm.model.spec import DiskSpec, MachineSpec
from vmm.snapshots.create import freeze
from vmm.snapshots.dependents import drop_unneeded, images_of, refuse_older
from vmm.snapshots.recovery import settle, taken_back
from vmm.snapshots.steps import check_chains, commit, options_of_all, pivoted, pivots_for, store_problem
from vmm.store import saved
from vmm.store.devices import refuse_passed_through
from vmm.store.registry import Changing
from vmm.store.snapshots.journal import Backup, Pivot, PutInPlace
from vmm.store.snapshots.kept import Kept
from vmm.store.snapshots.store import Held, holding


@dataclass(frozen=True, slots=True)
class NightToCome:
    """The night for which disks are frozen: ids of the repository and the night, the repository's folder, and the
    process that writes the night.
    """

    repository: str
    folder: str
    night_id: str
    maker: str

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def of_document(cls, document: Mapping[str, Any]) -> NightToCome:
        """Parse what `document` returned. Raises InvalidSpec."""
        values = [document.get(one.name) for one in fields(cls)]
        if not all(isinstance(one, str) for one in values):
            raise InvalidSpec("the night to write is not described")
        return cls(*map(str, values))

    def keeps(self, frozen: Mapping[str, str]) -> list[Kept]:
        """The records of the layers that are frozen for it: disk id -> image."""
        return [
            Kept(self.repository, self.folder, self.night_id, disk, image, self.maker)
            for disk, image in frozen.items()
        ]


def refuse_unfreezable(spec: MachineSpec) -> None:
    """Raise Refused, naming the disk, if the machine has one that cannot have a layer under it."""
    refuse_passed_through(spec, "a backup", hint="back up those disks from inside the guest")


def freeze_files(machine: Changing, night: NightToCome) -> None:
    """Freeze the disks of a machine that is off or saved, whose lock the caller holds, and keep the frozen layers.

    Raises Refused, InUse, NoSpace, StoreFailed; then the machine is as before.
    """
    refuse_unfreezable(machine.spec)
    with holding(machine.paths, machine.name) as held:
        machine = settle(held)
        refuse_older(machine, held.tree)
        drop_unneeded(held, machine)
        frozen = _below_empty(machine.spec, held)
        rest = {disk: path for disk, path in images_of(machine.spec).items() if disk not in frozen}
        pivots = pivots_for(machine.spec, held.tree, rest)
        keeps = night.keeps(frozen | {one.disk: one.frozen for one in pivots})
        if pivots:
            _put_on(held, machine, pivots, keeps)
        elif keeps:
            held.tree.begin_night(keeps)
            held.save()


def _put_on(held: Held, machine: Changing, pivots: Sequence[Pivot], keeps: Sequence[Kept]) -> None:
    """Give the disks new leaves, and record both."""
    check_chains(machine.spec, held.tree, {one.disk: one.frozen for one in pivots})
    held.begin(Backup(tuple(pivots), live=False))
    with taken_back(held, "freeze the disks"):
        freeze(machine, pivots)
        for one in pivots:
            held.tree.grow(one.frozen, one.child, one.format, child_id=vhdkit.image_id(one.child))
        held.tree.begin_night(keeps)
        spec = pivoted(machine.spec, pivots)
        held.go_on(PutInPlace.of(spec, saved="adapt" if saved.is_saved(machine.paths) else None))
    commit(held)


def _below_empty(spec: MachineSpec, held: Held) -> dict[str, str]:
    """Disk id -> the image below its leaf, where the leaf owns nothing, so that the two read alike."""
    found, images = {}, held.tree.images
    for disk in spec.disks:
        known = images.get(disk.path or "")
        if not disk.is_writable_image or known is None or not known.ours or known.parent not in images:
            continue
        if _owns_nothing(spec, disk):
            found[disk.id] = known.parent
    return found


def _owns_nothing(spec: MachineSpec, disk: DiskSpec) -> bool:
    options = options_of_all(spec)
    if disk.format is not None:
        options = replace(options, format_name=vhdkit.FormatName(disk.format))
    assert disk.path is not None
    try:
        with vhdkit.open_disk(disk.path, options=options) as opened:
            layers = opened.chain.layers
            if len(layers) < 2 or layers[0].size_bytes != layers[1].size_bytes:
                return False
            return not any(extent.layer_index == 0 for extent in opened.extents(0, opened.size_bytes))
    except vhdkit.VhdkitError as error:
        raise store_problem(error, "read the disk") from error
