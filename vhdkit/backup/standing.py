# SPDX-License-Identifier: Apache-2.0
"""Images outside a repository that stand on a night's image, so that a disk can be used before it is copied.

Decides how such an image names its parent, and that nothing in the repository changes: no record of the child is left
beside the night's image. A lease is what keeps the night. The chain is checked against the manifests when the image is
made; whoever opens it later names the folders in which its parents lie, and finds them by their ids there and nowhere
else. Must not know who fills the image.

    outside     new.vhd (empty) ──► 18.avhd ──► 17.vhd     the repository, read only
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from vhdkit import errors, formats
from vhdkit.arguments import AnyPath
from vhdkit.backup.half_merged import images_now
from vhdkit.backup.layers import opened_layers
from vhdkit.backup.manifest import Manifest
from vhdkit.backup.names import BASES, IMAGES
from vhdkit.backup.repository import MachineFolder
from vhdkit.chain.names.opening import MAX_CHAIN_DEPTH
from vhdkit.chain.records import pending, references
from vhdkit.chain.verbs.create import link_to
from vhdkit.folder import NewFile
from vhdkit.formats.format import DEFAULT_BLOCK_SIZE
from vhdkit.formats.probe import open_layer
from vhdkit.store import FileStore


@dataclass(frozen=True, slots=True)
class StandingImage:
    """A new image, the night's image on which it stands, and the folders in which its parents lie."""

    path: str
    parent: str
    folders: tuple[str, ...]


def stand_on_night(
    machine: MachineFolder, night: Manifest, disk_id: str, path: AnyPath, *, layers_above: int = 0
) -> StandingImage:
    """Make an empty image at `path` that reads as a disk of a night, without copying anything. It is durable.

    The caller has a lease on the night. `layers_above`: how many layers will stand on the new image. Raises NotFound,
    AlreadyExists, DamagedRepository, CorruptImage, NoSpace, and InvalidArgument if the chain would be too long.
    """
    record = night.disk(disk_id)
    if record is None:
        raise errors.NotFound(f"night {night.night} of {machine.name} has no disk {errors.printable(disk_id)!r}")
    images = images_now(machine, machine.nights())
    chain = images.chain(record.image)
    name = os.fsdecode(path)
    depth = len(chain) + 1 + layers_above
    if depth > MAX_CHAIN_DEPTH:
        raise errors.InvalidArgument(
            f"its chain would have {depth} layers, and one of more than {MAX_CHAIN_DEPTH} cannot be opened",
            path=name,
            hint="restore the night instead, as an image that stands on nothing",
        )
    with opened_layers(machine, chain) as layers, NewFile(name) as new:
        parent = layers[0]
        block_size = parent.block_size_bytes or DEFAULT_BLOCK_SIZE
        formats.for_children_of(parent).create_child(
            new.store, parent.size_bytes, link_to(name, parent), block_size_bytes=block_size, disk=parent
        )
        new.commit()
        folders = [os.path.join(machine.path, IMAGES, disk_id)]
        if any(one.place.disk_id is None for one in chain):
            folders.append(os.path.join(machine.repository.path, BASES))
        return StandingImage(name, parent.store.name, tuple(folders))


def size_without_parents(path: AnyPath) -> int:
    """The size of the disk in bytes, as its newest image alone says: a repository that hangs is not touched.

    Raises NotFound, CorruptImage, IoFailed.
    """
    with FileStore.open(path) as store:
        return open_layer(pending.view(store)).size_bytes


def mark_as_night(path: AnyPath, repository_id: str, machine_id: str, disk_id: str, night: int, night_id: str) -> None:
    """Record beside an image that it reads as a disk does in a night: the next backup saves what lies above it.

    The image is complete on the device, and nothing writes to it. Raises NotFound, AccessDenied, NoSpace, IoFailed.
    """
    with FileStore.open(path) as store:
        references.mark(store, references.SavedNight(repository_id, machine_id, disk_id, night, night_id))
