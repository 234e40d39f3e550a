# SPDX-License-Identifier: Apache-2.0
"""Deleting a machine.

Decides which of its disks go with it and which stay, with the reason, and what is refused before anything is removed.
Must not know how snapshots are deleted (`snapshots.delete`), nor whether an image may be removed (`store.removal`).
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace

import vhdkit
from vmm.api import machines
from vmm.model.errors import AccessDenied, Refused, VmmError, WrongState
from vmm.model.serials import keep_serials
from vmm.processes.worker_connection import MachineRef
from vmm.snapshots.delete import delete_all, images_to_delete
from vmm.snapshots.preflight import removal_problem
from vmm.store import known_images, registry
from vmm.store.filling import Filling, images_being_filled, read_filling
from vmm.store.images import look_at
from vmm.store.registry import Machine
from vmm.store.removal import images_inside, remove_image
from vmm.store.snapshots.store import has_tree, load_tree


@dataclass(frozen=True, slots=True)
class KeptDisk:
    """A disk that stays when its machine is deleted, with the reason."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Deletion:
    """What deleting a machine removes, and which of its disks stay."""

    folder: str
    disks: tuple[str, ...]
    kept: tuple[KeptDisk, ...]


def plan_delete(machine: Machine, *, with_disks: bool, with_snapshots: bool) -> Deletion:
    """What `delete` would remove. Raises WrongState while the machine runs or has snapshots, InUse."""
    name = machine.name
    machines.refuse_running(MachineRef(machine.name, machine.paths, machine.runtime), "delete it")
    if (count := len(load_tree(machine.paths).snapshots)) and not with_snapshots:
        raise WrongState(
            f"has {count} snapshot{'s' if count > 1 else ''}, which would be deleted with it", machine=name,
            hint=f"to delete them, too: vmm delete {name} --with-snapshots",
        )  # fmt: skip
    disks, kept = [], []
    unread = known_images.look().unread
    for disk in machine.spec.disks:
        if disk.path is None:
            continue
        if not disk.is_image or disk.read_only:
            kept.append((disk.path, "it is not the machine's own" if disk.is_image else f"it is {disk.kind}"))
        elif not with_disks:
            kept.append((disk.path, "disks stay unless --with-disks is given"))
        elif not os.path.exists(disk.path):
            kept.append((disk.path, "it does not exist"))
        elif unread:
            kept.append((disk.path, f"the machine {unread[0]} cannot be read, and may need it"))
        elif (other := registry.other_user_of(disk, name)) is not None:
            kept.append((disk.path, f"it is also a disk of the machine {other}"))
        else:
            try:
                look_at(disk, writable=True, notes_folder=machine.runtime.notes_left)
            except VmmError as error:
                kept.append((disk.path, error.problem))
                continue
            if (problem := removal_problem(disk.path)) is not None:
                kept.append((disk.path, f"it cannot be removed: {problem}"))
            else:
                disks.append(disk.path)
    if (problem := removal_problem(machine.paths.folder)) is not None:
        raise AccessDenied(f"cannot be removed: {problem}", machine=name, path=machine.paths.folder)
    if with_disks:
        named = {os.path.realpath(path) for path in (*disks, *(path for path, _ in kept))}
        disks += [path for path in images_to_delete(machine) if os.path.realpath(path) not in named]
        kept += [(path, "it is not whole, and what it needs cannot be read")
                 for path in images_being_filled(machine.paths) if path not in disks]  # fmt: skip
    going = {os.path.realpath(path) for path in disks}
    for one in images_inside(machine.paths.folder):
        if os.path.realpath(one.path) not in going:
            raise Refused(
                f"its folder holds an image that would be lost with it: {one.who} needs it", machine=name,
                path=one.path, hint="move the image out of the machine's folder first",
            )  # fmt: skip
    return Deletion(machine.paths.folder, tuple(disks), tuple(KeptDisk(*one) for one in kept))


def delete(name: str, *, with_disks: bool = False, with_snapshots: bool = False) -> Deletion:
    """Remove a machine, its saved state and logs; on request also its images and snapshots.

    Parents that are not the machine's own always stay. Raises WrongState, before anything is removed, while it
    runs or, unless `with_snapshots`, has snapshots.
    """
    with machines.open_stopped(name, "delete it") as opened:
        machine = opened.opened
        plan = plan_delete(machine, with_disks=with_disks, with_snapshots=with_snapshots)
        disks, kept = plan.disks, {one.path: one.reason for one in plan.kept}
        if has_tree(machine.paths):
            delete_all(machine)
            machine = registry.load_for_change(machine.lock)  # an unfinished merge may have moved its disks
            again = plan_delete(machine, with_disks=with_disks, with_snapshots=True)
            disks, kept = again.disks, kept | {one.path: one.reason for one in again.kept}
        filling = read_filling(machine.paths)
        registry.remove(machine)
        keep_serials([disk for disk in machine.spec.disks if disk.path not in disks])
        for path in disks:
            try:
                remove_image(path, machine.lock)
            except VmmError as error:
                kept[path] = error.problem
    if filling is not None and not any(os.path.lexists(path) for path in filling.disks.values()):
        end_lease(filling)
    gone = tuple(path for path in dict.fromkeys((*plan.disks, *disks)) if not os.path.lexists(path))
    stays = tuple(KeptDisk(path, reason) for path, reason in kept.items() if path not in gone)
    return replace(plan, disks=gone, kept=stays)


def end_lease(filling: Filling) -> None:
    """End the lease on a night from which nothing is filled any more. One that cannot be ended stays: the backup's
    status shows it.
    """
    from vhdkit import backups

    if filling.lease is not None:
        with contextlib.suppress(vhdkit.VhdkitError), backups.open_repository(filling.repository) as opened:
            if opened.id == filling.repository_id:
                backups.release(opened.root, filling.lease)
