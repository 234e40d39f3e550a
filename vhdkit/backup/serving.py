# SPDX-License-Identifier: Apache-2.0
"""Opens the disks of a night so that they can be served with what changed since another night.

Decides which night is read, what is held meanwhile, and where the change of a disk comes from. Must not know servers.

The later night has a lease while its disks are open, the earlier one while it is compared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vhdkit import errors
from vhdkit.backup.choosing import chosen
from vhdkit.backup.difference import ChangedDisk, NightChange, all_of, changed_by_comparison, changed_by_layers
from vhdkit.backup.graph import Images
from vhdkit.backup.half_merged import images_now
from vhdkit.backup.layers import opened_layers
from vhdkit.backup.manifest import DiskRecord, Manifest
from vhdkit.backup.night import Stages
from vhdkit.backup.pruning import finish_interrupted
from vhdkit.backup.repository import MachineFolder
from vhdkit.chain.engine.chain import Chain
from vhdkit.image import Layer


@dataclass(frozen=True, slots=True)
class OpenChange:
    """A disk of the night `later`, open, whose allocation is what changed since `earlier`."""

    record: DiskRecord
    disk: ChangedDisk
    earlier: Manifest
    later: Manifest


@contextlib.contextmanager
def opened_changes(
    machine: MachineFolder, earlier: str, later: str, disks: Sequence[str], stage: Stages
) -> Iterator[list[OpenChange]]:
    """The disks of the night `later` (a number or a time), all of them or these, with what changed since `earlier`.

    Raises NotFound, InvalidArgument, ImageInUse, DamagedRepository, CorruptImage, IoFailed.
    """
    finish_interrupted(machine)
    live = [one.manifest for one in machine.nights() if one.manifest is not None and not one.manifest.dropped]
    numbers = [chosen(live, word, machine.name).night for word in (earlier, later)]
    with contextlib.ExitStack() as held:
        new = held.enter_context(machine.reading(numbers[1], "a server of its changes"))
        found = []
        with machine.reading(numbers[0], "a comparison with a later night") as old:
            images = images_now(machine, machine.nights())
            for record in _wanted(new, disks, machine):
                layers = held.enter_context(opened_layers(machine, images.chain(record.image)))
                change = _change_of(machine, images, old.disk(record.disk_id), record, layers, stage)
                word = f"{old.night}..{new.night}"
                found.append(OpenChange(record, ChangedDisk(Chain(layers), change, word), old, new))
        yield found


def _wanted(manifest: Manifest, disks: Sequence[str], machine: MachineFolder) -> list[DiskRecord]:
    for one in disks:
        if manifest.disk(one) is None:
            raise errors.NotFound(
                f"night {manifest.night} of {machine.name} has no disk {errors.printable(one)!r}",
                hint=f"it has {', '.join(disk.disk_id for disk in manifest.disks)}",
            )
    found = [one for one in manifest.disks if not disks or one.disk_id in disks]
    if not found:
        raise errors.NotFound(f"night {manifest.night} of {machine.name} has no disk")
    return found


def _change_of(
    machine: MachineFolder,
    images: Images,
    old: DiskRecord | None,
    new: DiskRecord,
    layers: Sequence[Layer],
    stage: Stages,
) -> NightChange:
    """What changed on a disk since the earlier night."""
    if old is None:
        return all_of(Chain(layers))
    places = [one.place for one in images.chain(new.image)]
    if old.image in places:
        return changed_by_layers(layers, places.index(old.image))
    with opened_layers(machine, images.chain(old.image)) as before:
        return changed_by_comparison(Chain(layers), Chain(before), stage(f"comparing {new.disk_id}"))
