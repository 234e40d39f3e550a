# SPDX-License-Identifier: Apache-2.0
"""A saved machine: its memory and devices in a folder that exists whole or not at all.

    saved/memory.bin    what QEMU wrote (its migration stream)
    saved/state.json    our description: QEMU, machine type, CPU, accelerator, the definition, the size of memory.bin
    saved/disks.json    the state of the disks after the last write to them (`_looks_of`); written last

Decides what belongs to a saved state, what is compared before it is restored, and the order in which it is made and
removed: it is renamed to `saved` only when it is complete and synced, and removed before the guest runs again, because
memory and disks that do not belong together destroy file systems. Must not know QEMU's commands.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from vmm.kvm import memory_file
from vmm.model.errors import NotFound, Refused, VmmError, WrongState, of_os_error
from vmm.model.paths import MachinePaths, sync_folder, write_whole
from vmm.store.media import Media, refuse_other_media

if TYPE_CHECKING:
    from vmm.model.spec import MachineSpec

FORMAT = 1
MIB = 1 << 20
Tell = Callable[..., None]  # tell(event, **details)
MAX_DESCRIPTION_BYTES = 8 << 20
# The guest's memory page by page, and the state of screen, firmware and devices.
_PAGES_FACTOR, _OTHER_BYTES = 1.01, 64 * MIB


@dataclass(frozen=True, slots=True)
class Description:
    """The content of `state.json`."""

    qemu_version: str
    accelerator: str
    was_running: bool
    memory_file_bytes: int
    definition: dict[str, Any]
    saved_at: float
    media: Media | None = None  # the media that the guest had; None if they were not recorded
    accepted: Media = field(default_factory=dict)  # the media that the user has inserted since
    had_kernel: bool = False  # QEMU was started with a kernel
    mtus: dict[str, int] = field(default_factory=dict)  # adapter -> `host_mtu` of its device; 0: not announced


def folder_while_saving(machine: MachinePaths) -> str:
    """The folder in which a state is written until it is complete."""
    return f"{machine.saved}.part"


def is_saved(machine: MachinePaths) -> bool:
    """True if there is a complete saved state."""
    return os.path.isdir(machine.saved)


def open_memory_file(machine: MachinePaths, spec: MachineSpec) -> int:
    """A new file for the memory, with all its space allocated beforehand. Raises NoSpace, AccessDenied."""
    folder = folder_while_saving(machine)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        os.mkdir(folder, 0o700)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(os.path.join(folder, "memory.bin"), flags, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, int(spec.memory_bytes * _PAGES_FACTOR) + _OTHER_BYTES)
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:
        discard_part(machine)
        raise of_os_error(error, "reserve space for the machine's memory", path=folder) from error
    return descriptor


def complete(
    machine: MachinePaths,
    descriptor: int,
    spec: MachineSpec,
    *,
    qemu_version: str,
    accelerator: str,
    was_running: bool,
    media: Media,
    mtus: Mapping[str, int],
) -> None:
    """All memory is written: truncate the file to what was written, sync, describe and rename it.

    Raises VmmError; no saved state exists then, and the machine can continue.
    """
    folder = folder_while_saving(machine)
    try:
        size = os.lseek(descriptor, 0, os.SEEK_CUR)  # QEMU's position: it shares our open file description
        if (problem := memory_file.problem_of(descriptor, size)) is not None:
            raise VmmError(f"the memory was not saved: {problem}", path=folder)
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)
        document = {
            "format": FORMAT,
            "saved_at": time.time(),
            "qemu_version": qemu_version,
            "accelerator": accelerator,
            "was_running": was_running,
            "memory_file_bytes": size,
            **machine_document(spec, media, mtus),
        }
        write_whole(os.path.join(folder, "state.json"), json.dumps(document, indent=2).encode() + b"\n")
        os.rename(folder, machine.saved)
        sync_folder(machine.folder)
    except OSError as error:
        raise of_os_error(error, "store the saved state", path=folder) from error


def note_disks(machine: MachinePaths, spec: MachineSpec) -> None:
    """Record the state of the disks' files, which are complete and closed. Raises VmmError."""
    if is_saved(machine):
        write_whole(os.path.join(machine.saved, "disks.json"), json.dumps(_looks_of(spec)).encode() + b"\n")


def read_description(machine: MachinePaths) -> Description:
    """Read `state.json`. Raises NotFound, and VmmError if it is damaged."""
    path = os.path.join(machine.saved, "state.json")
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_DESCRIPTION_BYTES)
    except OSError as error:
        raise of_os_error(error, "read the saved state", path=path) from error
    return description_of(content, path)


def description_of(content: bytes, path: str) -> Description:
    """Parse the content of `state.json`, which need not be trusted; `path` is for messages. Raises VmmError."""
    try:
        document = json.loads(content)
        if document["format"] != FORMAT:
            raise VmmError("was saved by another version of vmm", path=path)
        return Description(
            str(document["qemu_version"]),
            str(document["accelerator"]),
            document["was_running"] is True,
            int(document["memory_file_bytes"]),
            dict(document["definition"]),
            float(document["saved_at"]),
            _media_in(document["media"]) if document.get("media") is not None else None,
            _media_in(document.get("accepted", {})),
            had_kernel(document),
            _mtus_in(document.get("mtus", {})),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise VmmError("is damaged: it does not describe a saved state", path=path) from error


def machine_document(spec: MachineSpec, media: Media, mtus: Mapping[str, int]) -> dict[str, Any]:
    """The part of a description that is about the machine whose memory it is.

    A guest keeps the MTUs that its adapters announced when it started: QEMU does not restore an adapter that announced
    one into an adapter that announces none.
    """
    return {
        "definition": json.loads(spec.to_json()),
        "media": dict(media),
        "had_kernel": spec.kernel is not None,
        "mtus": dict(mtus),
    }


def had_kernel(document: Mapping[str, Any]) -> bool:
    """True if QEMU was started with a kernel; states saved by 0.1.0 show it only in their definition."""
    return bool(document.get("had_kernel", document["definition"].get("kernel") is not None))


def _mtus_in(value: Mapping[str, object]) -> dict[str, int]:
    """Raises TypeError, AttributeError."""
    found = {}
    for adapter, mtu_bytes in value.items():
        if type(mtu_bytes) is not int or not 0 <= mtu_bytes < 1 << 16:
            raise TypeError("mtu")
        found[adapter] = mtu_bytes
    return found


def _media_in(value: Mapping[str, object]) -> Media:
    """Raises TypeError, AttributeError."""
    media = {}
    for drive, identity in value.items():
        if not (identity is None or isinstance(identity, str)):
            raise TypeError("identity")
        media[str(drive)] = identity
    return media


def restored_problem(description: Description, spec: MachineSpec) -> str | None:
    """Why a machine whose images were restored to other paths cannot continue from this memory; None if it can."""
    if description.had_kernel != (spec.kernel is not None):
        return "it was started with a kernel, or is now"
    paths = {disk.id: disk.path for disk in spec.disks}
    try:
        before = [dict(one) for one in description.definition.get("disks", [])]
        for one in before:
            name = str(one.get("id"))
            if one.get("kind") == "iso" and one.get("path") != paths.get(name):
                return f"the medium in {name} is another one"
            if one.get("path") is not None and one.get("kind") != "pass-through":
                one["path"] = paths.get(name)
        return _definition_problem(replace(description, definition={**description.definition, "disks": before}), spec)
    except (TypeError, ValueError, AttributeError, KeyError):
        return "its description is damaged"


def put(machine: MachinePaths, spec: MachineSpec, memory: str, description: Description) -> None:
    """Make a machine that is not visible yet a saved one: its memory is the file `memory`, which is moved.

    Raises VmmError.
    """
    document = {
        "format": FORMAT,
        "saved_at": description.saved_at,
        "qemu_version": description.qemu_version,
        "accelerator": description.accelerator,
        "was_running": description.was_running,
        "memory_file_bytes": description.memory_file_bytes,
        "definition": json.loads(spec.to_json()),
        "media": None if description.media is None else dict(description.media),
        "accepted": dict(description.accepted),
        "had_kernel": description.had_kernel,
        "mtus": description.mtus,
    }
    try:
        os.mkdir(machine.saved, 0o700)
        shutil.move(memory, os.path.join(machine.saved, "memory.bin"))
        descriptor = os.open(os.path.join(machine.saved, "memory.bin"), os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)  # it may have been copied from another file system
        finally:
            os.close(descriptor)
        write_whole(os.path.join(machine.saved, "state.json"), json.dumps(document, indent=2).encode() + b"\n")
    except OSError as error:
        raise of_os_error(error, "store the saved state", path=machine.saved) from error
    note_disks(machine, spec)


def accept_media(machine: MachinePaths, media: Media) -> None:
    """Record the media that the user has inserted into drives of a saved machine. Raises VmmError."""
    description = read_description(machine)
    path = os.path.join(machine.saved, "state.json")
    try:
        with open(path, "rb") as file:
            document = json.loads(file.read(MAX_DESCRIPTION_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise VmmError("is damaged: it does not describe a saved state", path=path) from error
    document["accepted"] = {**description.accepted, **media}
    write_whole(path, json.dumps(document, indent=2).encode() + b"\n")


def open_saved_memory(
    machine: MachinePaths, spec: MachineSpec, qemu_version: str, *, tell: Tell = lambda event, **details: None
) -> tuple[int, Description]:
    """(descriptor of the memory file, its description) after all comparisons. Raises Refused, naming the mismatch.

    `tell` receives an event for each disk that could not be compared.
    """
    description = read_description(machine)
    hint = f"vmm start {spec.name} --discard-saved starts without the saved memory, as after a power cut"
    problem = (
        _definition_problem(description, spec)
        or version_problem(description.qemu_version, qemu_version)
        or _disks_problem(machine, spec, tell)
    )
    if problem is not None:
        raise Refused(f"the saved state does not fit: {problem}", machine=spec.name, hint=hint)
    refuse_other_media(spec, description.media, description.accepted)
    path = os.path.join(machine.saved, "memory.bin")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise of_os_error(error, "open the saved memory", path=path) from error
    found = os.fstat(descriptor).st_size
    damage = memory_file.problem_of(descriptor, found)
    if found != description.memory_file_bytes:
        damage = f"{found} bytes of memory instead of {description.memory_file_bytes}"
    if damage is not None:
        os.close(descriptor)
        raise Refused(f"the saved state is damaged: {damage}", machine=spec.name, path=path, hint=hint)
    return descriptor, description


def _definition_problem(description: Description, spec: MachineSpec) -> str | None:
    """The first difference in hardware since the machine was saved, or None."""
    now = json.loads(spec.to_json())
    for name in ("id", "memory_bytes", "cpu_count", "machine_type", "cpu_model", "firmware", "screen"):
        if description.definition.get(name) != now[name]:
            return f"{name} was {description.definition.get(name)} and is now {now[name]}"

    def places(definition: dict[str, Any]) -> list[list[object]]:
        rows = []
        for disk in definition.get("disks", []):
            path = disk.get("path") if disk.get("kind") != "iso" else None  # media have a rule of their own
            if isinstance(path, str) and disk.get("kind") != "pass-through":
                path = os.path.realpath(path)
            keys = ("id", "kind", "controller", "controller_index", "unit", "serial")
            sectors = [disk.get(key, 512) for key in ("sector_bytes", "physical_sector_bytes")]
            rows.append([path, *(disk.get(key) for key in keys), *sectors])
        return rows

    if places(description.definition) != places(now):
        return "its disks were changed"
    adapters = [[one.get(key) for key in ("id", "kind", "mac")] for one in description.definition.get("adapters", [])]
    if adapters != [[one[key] for key in ("id", "kind", "mac")] for one in now["adapters"]]:
        return "its network adapters were changed"
    return None


def version_problem(saved: str, present: str) -> str | None:
    """Why this QEMU should not restore it: an older QEMU may be unable to read what a newer one wrote."""

    def numbers(version: str) -> list[int]:
        return [int(part) for part in version.split(".") if part.isdecimal()][:2]

    if numbers(saved) > numbers(present):
        return f"QEMU {saved} wrote it and this is {present}"
    return None


def _disks_problem(machine: MachinePaths, spec: MachineSpec, tell: Tell) -> str | None:
    try:
        with open(os.path.join(machine.saved, "disks.json"), "rb") as file:
            then = json.loads(file.read(MAX_DESCRIPTION_BYTES))
    except FileNotFoundError:
        return None  # the host went down just after saving, before a disk could be changed in an orderly way
    except (OSError, ValueError, RecursionError):
        then = None
    if not isinstance(then, dict):
        return "the record of the state of its disks is damaged"
    now = _looks_of(spec)
    for disk in spec.disks:
        before, after = then.get(disk.id), now.get(disk.id)
        if disk.is_image and before != after:
            return f"{disk.path} was changed since"
        if disk.kind == "pass-through" and (before is None or after is None):
            tell("saved-disk-not-compared", disk=disk.id, path=disk.path)
        # Writes to a device are counted from each boot of the host.
        if isinstance(before, list) and isinstance(after, list) and disk.kind == "pass-through":
            is_same_boot = before[:1] == after[:1]
            if is_same_boot and before != after:
                return f"{disk.path} was changed since"
    return None


def _looks_of(spec: MachineSpec) -> dict[str, object]:
    """Disk id -> a value that changes when the disk is written to."""
    from vmm.store.devices import look_of  # slow to import, and a plain start does not need it

    looks: dict[str, object] = {}
    for disk in spec.disks:
        if disk.is_image and disk.path is not None:
            with contextlib.suppress(OSError):
                facts = os.stat(disk.path)
                looks[disk.id] = [facts.st_ino, facts.st_size, facts.st_mtime_ns]
        elif disk.kind == "pass-through":
            looks[disk.id] = look_of(disk, spec.id)
    return looks


def use_up(machine: MachinePaths) -> None:
    """Remove the saved state, because the guest is about to run with its memory. Raises VmmError."""
    try:
        os.rename(machine.saved, f"{machine.saved}.used")
        sync_folder(machine.folder)
    except OSError as error:
        raise of_os_error(error, "remove the saved state", path=machine.saved) from error
    shutil.rmtree(f"{machine.saved}.used", ignore_errors=True)


def discard(machine: MachinePaths) -> None:
    """Discard the saved state. Raises NotFound if there is none."""
    if not is_saved(machine):
        raise NotFound("the machine has no saved state", path=machine.saved)
    use_up(machine)


def discard_part(machine: MachinePaths) -> None:
    """Remove what an interrupted save or restore left."""
    for folder in (folder_while_saving(machine), f"{machine.saved}.used"):
        shutil.rmtree(folder, ignore_errors=True)


def refuse_when_saved(machine: MachinePaths, name: str, what: str) -> None:
    """Raise WrongState if there is a saved state, which `what` would make useless."""
    if is_saved(machine):
        raise WrongState(
            f"is saved, and {what} would make its saved memory useless",
            machine=name,
            hint=f"start it first, or discard the memory: vmm start {name} --discard-saved",
        )
