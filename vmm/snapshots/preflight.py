# SPDX-License-Identifier: Apache-2.0
"""Checks that can be made before anything is destroyed: before a guest is powered off or its memory is discarded.

Decides what must be present for a snapshot to be applied, and for a machine to start without its saved memory. The
checks change nothing and take no locks, so the code that acts afterwards checks again under its own locks. Use by the
machine itself does not count, because it will have ended by then.

INV-LOOK-FIRST: a verb that destroys something first refuses for every reason that can be known beforehand.

Must not know how a machine is stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import vhdkit
from vmm.kvm import memory_file, program
from vmm.model.errors import NoSpace, Refused, VmmError, of_os_error
from vmm.model.spec import MachineSpec
from vmm.snapshots.steps import check_chains, format_of, options_of_all, pivoted, pivots_for, store_problem
from vmm.store import registry, saved
from vmm.store.images import look_at
from vmm.store.media import look_at_files
from vmm.store.registry import Machine
from vmm.store.snapshots.journal import Pivot
from vmm.store.snapshots.memory import SnapshotFolder
from vmm.store.snapshots.tree import Snapshot, Tree

MIN_FREE_BYTES = 1 << 20  # for the new leaves, definitions and journals
_FS_IOC_GETFLAGS, _FS_IMMUTABLE_FL, _FS_APPEND_FL = 0x80086601, 0x10, 0x20  # linux/fs.h
_MAX_DESCRIPTION_BYTES = 8 << 20
_KEPT = ("id", "name", "paths")


def definition_of(snapshot: Snapshot, present: MachineSpec | None = None) -> MachineSpec:
    """The configuration of a snapshot, with the current paths of its images. Raises NotFound, InvalidSpec."""
    spec = registry.read_definition(SnapshotFolder(snapshot.folder).definition)
    disks = [
        disk.model_copy(update={"path": snapshot.disks[disk.id]}) if disk.id in snapshot.disks else disk
        for disk in spec.disks
    ]
    kept = {} if present is None else {name: getattr(present, name) for name in _KEPT}
    return spec.changed(disks=disks, **kept)


def look_before_apply(machine: Machine, tree: Tree, snapshot: Snapshot) -> tuple[MachineSpec, list[Pivot]]:
    """(the snapshot's configuration, the new leaves that applying it needs), if nothing prevents applying it.

    Raises NotFound, InvalidSpec, Refused if part of the snapshot is missing or damaged, InUse for an image of another
    machine, NoSpace, AccessDenied.
    """
    frozen = definition_of(snapshot, machine.spec)
    check_chains(frozen, tree, snapshot.disks)
    _open_all(frozen, tree, snapshot.disks)
    if snapshot.memory_bytes is not None:
        _check_memory(machine, snapshot)
    folder = SnapshotFolder(snapshot.folder)
    if os.path.lexists(folder.uefi_variables):
        _check_readable(folder.uefi_variables)
    pivots = pivots_for(frozen, tree, snapshot.disks)
    registry.check_disks(pivoted(frozen, pivots))
    for place in {machine.paths.folder, *(os.path.dirname(one.child) for one in pivots)}:
        _check_room(place, MIN_FREE_BYTES)
    return frozen, pivots


def look_before_discarding(machine: Machine) -> None:
    """Raise whatever would prevent the machine from starting without its saved memory, as far as its files show."""
    program.find()
    for disk in machine.spec.disks:
        if disk.is_image and disk.path is not None:
            look_at(disk, writable=not disk.read_only, notes_folder=machine.runtime.notes_left)
    look_at_files(machine.spec)


def removal_problem(path: str) -> str | None:
    """Why we cannot remove this file; None if we can, or if it does not exist."""
    folder = os.path.dirname(path) or "."
    try:
        facts, around = os.lstat(path), os.stat(folder)
        if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
            return f"its folder {folder} is not writable"
        owners = (facts.st_uid, around.st_uid)
        if around.st_mode & stat.S_ISVTX and os.geteuid() != 0 and os.geteuid() not in owners:
            return f"in {folder} only the owner of a file may remove it"
        if _is_fixed(path, facts) or _is_fixed(folder, around):
            return "it or its folder is immutable (lsattr)"
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"it cannot be examined: {error.strerror}"
    return None


def _is_fixed(path: str, facts: os.stat_result) -> bool:
    """True for a file or folder marked immutable or append-only; these marks bind root as well."""
    if not (stat.S_ISREG(facts.st_mode) or stat.S_ISDIR(facts.st_mode)):
        return False
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        flags = struct.unpack("@l", fcntl.ioctl(descriptor, _FS_IOC_GETFLAGS, bytes(struct.calcsize("@l"))))[0]
    except OSError:
        return False  # this file system does not support the marks
    finally:
        os.close(descriptor)
    return bool(flags & (_FS_IMMUTABLE_FL | _FS_APPEND_FL))


def _open_all(spec: MachineSpec, tree: Tree, disks: Mapping[str, str]) -> None:
    """Open the images of a snapshot completely, not only their headers. Raises StoreFailed, NotFound."""
    options = options_of_all(spec)
    for disk in spec.disks:
        if disk.id in disks:
            kind = vhdkit.FormatName(format_of(tree, disks[disk.id], disk))
            try:
                vhdkit.open_disk(disks[disk.id], options=replace(options, format_name=kind)).close()
            except vhdkit.ImageInUse:
                pass  # used by the guest that is about to end, or by a merge that will stop
            except vhdkit.VhdkitError as error:
                raise store_problem(error, "open the image") from error


def _check_memory(machine: Machine, snapshot: Snapshot) -> None:
    """Raise Refused if the snapshot's memory could not be restored here, NoSpace if a copy of it would not fit."""
    folder = SnapshotFolder(snapshot.folder)
    hint = f"vmm snapshot forget-memory {machine.name} {snapshot.id[:8]} keeps its disks"
    assert snapshot.memory_bytes is not None
    try:
        with open(folder.memory, "rb") as file:
            facts = os.fstat(file.fileno())
            problem = memory_file.problem_of(file.fileno(), facts.st_size)
        if problem is None and facts.st_size != snapshot.memory_bytes:
            problem = f"the file has {facts.st_size} bytes instead of {snapshot.memory_bytes}"
        if problem is None:
            problem = _description_problem(_document(folder.description))
    except OSError as error:
        problem = error.strerror or str(error)
    if problem is not None:
        raise Refused(
            f"the snapshot's memory is missing or damaged: {problem}", machine=machine.name, path=folder.memory,
            hint=hint,
        )  # fmt: skip
    if facts.st_dev != os.stat(machine.paths.folder).st_dev:  # on one file system, a hard link is enough
        _check_room(machine.paths.folder, facts.st_blocks * 512 + MIN_FREE_BYTES)


def _document(path: str) -> dict[str, Any] | None:
    with open(path, "rb") as file:
        try:
            document = json.loads(file.read(_MAX_DESCRIPTION_BYTES))
        except (ValueError, RecursionError):
            return None
    return document if isinstance(document, dict) else None


def _description_problem(document: dict[str, Any] | None) -> str | None:
    if document is None or not isinstance(document.get("definition"), dict):
        return "its description is damaged"
    with contextlib.suppress(VmmError):  # without QEMU the versions cannot be compared
        here = program.inspect(program.find()).version
        return saved.version_problem(str(document.get("qemu_version")), here)
    return None


def _check_readable(path: str) -> None:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK))
    except OSError as error:
        raise of_os_error(error, "read the file", path=path) from error


def _check_room(folder: str, size_bytes: int) -> None:
    """Raise NoSpace or AccessDenied if a new file of that size cannot be created."""
    try:
        facts = os.statvfs(folder)
        if facts.f_bavail * facts.f_frsize < size_bytes or (facts.f_files and not facts.f_favail):
            raise NoSpace(f"not enough space for {size_bytes >> 20} MiB", path=folder)
        if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
            raise PermissionError(13, os.strerror(13))
    except OSError as error:
        raise of_os_error(error, "create files", path=folder) from error
