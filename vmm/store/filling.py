# SPDX-License-Identifier: Apache-2.0
"""The record of a machine that was started from a night before its disks were copied: what is still to be filled.

    O (the guest writes) -> B (being filled) -> the night's images, in the repository

Decides its fields, and that it says the truth whatever is killed: it is written before the machine is visible, a disk
leaves it when its B needs the night no longer, and the lease ends before the record does. While a disk is in it, its B
is neither merged into nor removed. Light: a worker reads it. Must not know how a disk is filled.

The record is not trusted more than the definition beside it: it names images, of which none is removed because of it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vmm.model.errors import VmmError, WrongState, of_os_error, store_error
from vmm.model.paths import MachinePaths, sync_folder, write_whole
from vmm.store.snapshots.snapshot import absolute_path

_FORMAT = "vmm filling 1"
_MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Filling:
    """What is filled from where. `disks`: the id of a disk -> its image B, which still needs the night.

    `machine_id` and `machine_name` are those in the repository. `lease`: the id of the night's lease, None where none
    could be made. `marks`: a whole image is marked as that night. `max_rate_bytes`: the most that is copied in a
    second. `checks`: what a disk is read from is compared with its sums before it is filled.
    """

    repository: str
    repository_id: str
    machine_id: str
    machine_name: str
    night: int
    night_id: str
    disks: Mapping[str, str]
    lease: str | None = None
    marks: bool = False
    max_rate_bytes: int | None = None
    checks: bool = False

    @property
    def source(self) -> str:
        """The night, for people."""
        return f"{self.machine_name}@{self.night} in {self.repository}"

    def without(self, disk_id: str) -> Filling:
        """The record once a disk is whole."""
        return replace(self, disks={one: path for one, path in self.disks.items() if one != disk_id})

    def encoded(self) -> bytes:
        """The file."""
        names = (name for name in Filling.__dataclass_fields__ if name != "disks")
        document = {"format": _FORMAT, **{name: getattr(self, name) for name in names}, "disks": dict(self.disks)}
        return json.dumps(document, indent=1).encode() + b"\n"


def filling_path(machine: MachinePaths) -> str:
    """The path of the record."""
    return os.path.join(machine.folder, "filling.json")


def read_filling(machine: MachinePaths) -> Filling | None:
    """What is still to be filled; None for a machine with whole disks. Raises VmmError for a damaged record."""
    path = filling_path(machine)
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise of_os_error(error, "read what is still to be filled", path=path) from error
    try:
        return _parsed(json.loads(content[:_MAX_BYTES]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise VmmError(
            "is damaged: it should say which disks are still filled from a backup", path=path,
            hint="if every disk opens without the backup's repository (vhdkit chain), remove the file",
        ) from error  # fmt: skip


def _parsed(document: Any) -> Filling:
    if document["format"] != _FORMAT:
        raise ValueError("format")
    kinds: dict[str, Any] = {
        "repository": str, "repository_id": str, "machine_id": str, "machine_name": str, "night": int, "night_id": str,
        "lease": str | None, "marks": bool, "max_rate_bytes": int | None, "checks": bool,
    }  # fmt: skip
    fields = {name: {"checks": False, **document}[name] for name in kinds}
    if not all(isinstance(fields[name], kind) for name, kind in kinds.items()):
        raise TypeError("a field")
    disks = {str(disk): absolute_path(path) for disk, path in document["disks"].items()}
    return Filling(**fields, disks=disks)


def write_filling(machine: MachinePaths, filling: Filling) -> None:
    """Replace the record, durably. Raises NoSpace, AccessDenied."""
    write_whole(filling_path(machine), filling.encoded())


def remove_filling(machine: MachinePaths) -> None:
    """Remove the record, durably. Raises AccessDenied."""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(filling_path(machine))
        sync_folder(machine.folder)
    except OSError as error:
        raise of_os_error(error, "remove the record", path=filling_path(machine)) from error


def source_of_disks(machine: MachinePaths) -> str | None:
    """The night from which disks of the machine are still filled, for people; None if all are whole."""
    with contextlib.suppress(VmmError):
        if (filling := read_filling(machine)) is not None:
            return filling.source
    return None


def size_while_filled(machine: MachinePaths, disk_id: str, path: str | None) -> int | None:
    """The size in bytes of a disk that is still filled, whose newest image this is; None for any other disk.

    Its parents are not opened: whoever waits for a repository that hangs can hardly be killed. Raises VmmError.
    """
    filling = read_filling(machine)
    if path is None or filling is None or disk_id not in filling.disks:
        return None
    import vhdkit

    try:
        return vhdkit.backups.size_without_parents(path)
    except vhdkit.VhdkitError as error:
        raise store_error(error) from error


def images_being_filled(machine: MachinePaths) -> frozenset[str]:
    """The images that still need a night: they are neither merged into nor removed. Raises VmmError."""
    filling = read_filling(machine)
    return frozenset() if filling is None else frozenset(filling.disks.values())


def refuse_while_filled(machine: MachinePaths, name: str, doing: str, disk_id: str | None = None) -> None:
    """Raise WrongState if a disk, or this one, is still being filled. Raises VmmError."""
    filling = read_filling(machine)
    if filling is None or (disk_id is not None and disk_id not in filling.disks):
        return
    which = disk_id or ", ".join(filling.disks)
    raise WrongState(
        f"{doing} is not possible yet: {which} is still being filled from {filling.source}", machine=name,
        hint=f"vmm show {name} shows how far it is; it is filled while the machine runs",
    )  # fmt: skip
