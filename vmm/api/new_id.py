# SPDX-License-Identifier: Apache-2.0
"""Turning a copied machine folder into a separate machine: what it keeps, and what belongs to its original.

    id, MAC addresses          new ones
    disks                      an image that was copied with the folder is the copy's own; one that the original
                               or another machine or snapshot names is taken out of the definition, and left alone
    snapshots, saved memory    they belong to the original or fit its disks: moved to the folder `of-FORMER-ID`

Decides what a copy may keep. Removes nothing. The id changes last: if this is interrupted, the machine is still a
copy, and repeating it finishes it.
"""

from __future__ import annotations

import os
import stat
import uuid
from dataclasses import dataclass

from vmm.host.proc import HeldLock
from vmm.model.errors import VmmError, WrongState, of_os_error
from vmm.model.events import add_event
from vmm.model.paths import MachinePaths, machine_folder, make_folders, sync_folder
from vmm.model.spec import DiskSpec, MachineSpec
from vmm.store import registry
from vmm.store.copies import original_of
from vmm.store.filling import refuse_while_filled
from vmm.store.registry import Changing
from vmm.store.removal import uses
from vmm.store.snapshots.store import machine_turn

_ASIDE = ("snapshots.json", "saved", "saved.part", "saved.used", "saved.applied", "backup.json", "merging.json",
          "was-running")  # fmt: skip


@dataclass(frozen=True, slots=True)
class OwnDisk:
    """A disk that a copy keeps: its id and its file."""

    disk: str
    path: str


@dataclass(frozen=True, slots=True)
class TakenOut:
    """A disk that a copy does not keep, with the reason."""

    disk: str
    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class NewId:
    """The result for a copy. `disks` are those that it keeps; `taken_out` those that another machine needs; `aside` is
    the folder with the snapshots and memory that it had, None if it had none.
    """

    machine: str
    id: str
    original: str
    disks: tuple[OwnDisk, ...]
    taken_out: tuple[TakenOut, ...]
    aside: str | None


def give_new_id(name: str) -> NewId:
    """Turn a copy into a separate machine. Raises WrongState for a machine that is not a copy, InUse, VmmError."""
    with machine_turn(machine_folder(name), name) as lock:
        original = original_of(name)
        if original is None:
            raise WrongState("is the only machine with its id, and needs no new one", machine=name)
        machine = registry.load_for_change(lock)
        refuse_while_filled(machine.paths, name, "an id of its own")
        aside = _put_aside(machine)
        done = _renewed(machine, lock, original, aside)
    add_event(machine.paths.events, "new-id", id=done.id, former=machine.spec.id, copy_of=original)
    return done


def _put_aside(machine: Changing) -> str | None:
    """Move snapshots and memory aside; returns the folder that has them."""
    folder = machine.paths.folder
    aside = os.path.join(folder, f"of-{machine.spec.id}")
    there = [one for one in _ASIDE if os.path.lexists(os.path.join(folder, one))]
    try:
        if there:
            make_folders(aside)
        for one in there:
            os.rename(os.path.join(folder, one), _free_name(aside, one))
        if there:
            sync_folder(aside)
            sync_folder(folder)
    except OSError as error:
        raise of_os_error(error, "move the copy's snapshots aside", machine=machine.name, path=aside) from error
    return aside if os.path.isdir(aside) else None


def _free_name(folder: str, name: str) -> str:
    """A path in the folder that is free."""
    names = [name, *(f"{name}.{number}" for number in range(2, 1000))]
    return next(path for one in names if not os.path.lexists(path := os.path.join(folder, one)))


def _renewed(machine: Changing, lock: HeldLock, original: str, aside: str | None) -> NewId:
    from vmm.api.adapters import choosing_macs, with_new_macs  # here, because it imports the switches

    source = machine_folder(original)
    with choosing_macs():
        fresh = with_new_macs(machine.spec)
        kept: list[DiskSpec] = []
        taken_out: list[TakenOut] = []

        def change(spec: MachineSpec) -> MachineSpec:
            for disk in spec.disks:
                own = _own(disk, source, machine.paths)
                problem = _needed_elsewhere(own, lock)
                if problem is None:
                    kept.append(own)
                else:
                    taken_out.append(TakenOut(disk.id, str(disk.path), problem))
            return spec.changed(id=str(uuid.uuid4()), disks=kept, adapters=fresh.adapters)

        renewed = registry.update(lock, change)
    disks = tuple(OwnDisk(disk.id, disk.path) for disk in kept if disk.path is not None)
    return NewId(machine.name, renewed.spec.id, original, disks, tuple(taken_out), aside)


def _own(disk: DiskSpec, source: str, machine: MachinePaths) -> DiskSpec:
    """The disk on the file that was copied with the folder, where its image lay in the original's folder."""
    if disk.path is None or disk.kind == "pass-through":
        return disk
    inside = os.path.relpath(os.path.realpath(disk.path), source)
    copied = os.path.join(machine.folder, inside)
    if inside.startswith(os.pardir) or not _is_file(copied) or os.path.samefile(copied, machine.definition):
        return disk
    return disk.model_copy(update={"path": copied})


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def _needed_elsewhere(disk: DiskSpec, lock: HeldLock) -> str | None:
    """What else needs the image or device, as a clause; None if the copy may keep it."""
    if disk.path is None or disk.kind == "iso":
        return None
    if disk.kind == "pass-through":
        other = registry.other_user_of(disk, lock.name)
        return None if other is None else f"it is given to the machine {other}"
    if disk.read_only:
        return None  # storing the definition checks whether it may be read beside its writer
    try:
        for use in uses(lock.folder, os.path.basename(disk.path), only_others=True):
            if _is_same(use.path, disk.path):
                return f"{use.who} needs it"
    except VmmError as error:
        return error.problem
    return None


def _is_same(one: str, other: str) -> bool:
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False
