# SPDX-License-Identifier: Apache-2.0
"""Disks that are added, removed or enlarged while the machine runs, and a copy of all of them at one moment.

Decides what may be changed in a running machine (disks on SCSI; those on virtio can grow), and in which order the
change reaches QEMU, the running definition and the stored one. A disk is recorded before the guest can use it, so that
it is served again whichever process is killed, and removed from the definitions after the guest has released it. Which
commands QEMU gets is decided in `kvm.drives`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
from typing import Any

from vmm.host.proc import HeldLock
from vmm.kvm import drives, tray
from vmm.kvm.cmdline import Device, Medium, file_node
from vmm.model.errors import InvalidSpec, NotFound, StoreFailed, VmmError, WrongState
from vmm.model.spec import DiskSpec, MachineSpec, make_disk
from vmm.processes.rpc import Method, Progress, parameter
from vmm.processes.supervisor import export_of
from vmm.store import registry
from vmm.store.known_images import known_images
from vmm.store.media import is_device, known_by, open_in_drive
from vmm.store.snapshots.store import Held, holding
from vmm.worker.running import Running
from vmm.worker.states import Verb

CHANGE_MEDIUM = "disk-change"  # the operation


class Plugging:
    """The disks of a running machine."""

    def __init__(self, running: Running) -> None:
        self._running = running

    def methods(self) -> dict[str, Method]:
        """The methods of the control socket that concern disks."""
        return {
            "disk-add": self._add,
            "disk-remove": self._remove,
            "disk-change": self._change,
            "disk-resize": self._resize,
            "disk-status": self._status,
        }

    def _disk(self, params: dict[str, Any]) -> DiskSpec:
        disk_id = parameter(params, "disk", str, "")
        disk = self._running.spec.disk(disk_id)
        if disk is None:
            known = ", ".join(one.id for one in self._running.spec.disks) or "none"
            raise NotFound(f"has no disk {disk_id!r}; its disks: {known}")
        return disk

    async def _add(self, params: dict[str, Any], progress: Progress) -> object:
        """Add a disk; {"disk": a disk's settings}."""
        disk = make_disk(**parameter(params, "disk", dict, {}))
        self._running.need(Verb.ADD_DISK)
        if disk.kind == "iso":
            raise WrongState(
                "is running: a drive on ide can be added only while it is off",
                hint="shut the machine down first; to change the medium in an existing drive: vmm disk change",
            )
        if disk.controller != "scsi":
            raise WrongState(
                f"is running: a disk on {disk.controller} can be added only while it is off",
                hint="add it on scsi, or shut the machine down first",
            )
        used = {one.controller_index for one in self._running.spec.disks if one.controller == "scsi"} | {0}
        if disk.controller_index not in used:
            raise WrongState(
                f"is running without SCSI controller {disk.controller_index}",
                hint="use controller 0, which always exists",
            )
        before = self._running.spec
        after = before.changed(disks=[*before.disks, disk])
        with self._running.busy("disk-add"), self._held() as held:
            self.write_down(held, after)
            try:
                await self._plug_in(disk)
            except BaseException:
                self.write_down(held, before)
                raise
        add = json.loads(disk.model_dump_json())
        self._running.tell("disk-added", disk=disk.id, path=disk.path)
        return {"disk": add}

    async def _plug_in(self, disk: DiskSpec) -> None:
        qmp, server, socket = self._running.qmp, self._running.server, self._running.runtime.nbd
        if disk.is_image:
            export = export_of(json.loads(disk.model_dump_json()), follow_leaf=False)
            export["known_images"] = await asyncio.to_thread(known_images)
            await drives.add_disk(qmp, server, disk, socket, export=export, medium=None)
            return
        from vmm.store.devices import medium_of

        number = await drives.free_set(qmp)
        medium = await asyncio.to_thread(
            medium_of, self._running.spec, disk, give_set=lambda ours: (number, ours), give_secret=_secret
        )
        try:
            await drives.add_disk(qmp, server, disk, socket, export={}, medium=medium)
        finally:
            for _, ours in medium.descriptors:
                os.close(ours)

    async def _remove(self, params: dict[str, Any], progress: Progress) -> object:
        """Remove a disk; {"disk": id}."""
        disk = self._disk(params)
        self._running.need(Verb.REMOVE_DISK)
        if disk.controller != "scsi":
            raise WrongState(
                f"is running: a disk on {disk.controller} can be removed only while it is off",
                hint="shut the machine down first",
            )
        before = self._running.spec
        after = before.changed(disks=[one for one in before.disks if one.id != disk.id])
        with self._running.busy("disk-remove"), self._held() as held:
            await drives.remove_disk(self._running.qmp, self._running.server, disk)
            self.write_down(held, after)
        self._running.tell("disk-removed", disk=disk.id, path=disk.path)
        return {"disk": disk.id}

    async def _change(self, params: dict[str, Any], progress: Progress) -> object:
        """Change a drive's medium; {"disk": id, "path": its file or None, "force": even if its tray is locked}."""
        drive = self._disk(params)
        path = parameter(params, "path", str)
        self._running.need(Verb.CHANGE_MEDIUM)
        if drive.kind != "iso":
            raise WrongState(
                f"{drive.id} is a disk: only the medium in a drive can be changed while the machine is running"
            )
        changed = make_disk(**{**drive.model_dump(), "path": path})
        if path is not None:
            os.close(await asyncio.to_thread(open_in_drive, self._running.spec, changed))
        before = self._running.spec
        with self._running.busy(CHANGE_MEDIUM), self._held() as held:
            note = self._running.note
            note.details |= {"drive": drive.id, "drive_had": drive.path}
            self._running.write_note()  # recorded for the next worker before anything changes
            try:
                await tray.open_tray(self._running.qmp, drive.id, force=bool(parameter(params, "force", bool, False)))
                try:
                    self.write_down(held, _with_disk(before, changed))
                    await self._put_in(changed)
                except BaseException:
                    await self._note_what_is_in(held, before, changed)
                    raise
            finally:
                del note.details["drive"], note.details["drive_had"]
        self._running.tell("medium-changed", drive=drive.id, path=path)
        return {"disk": json.loads(changed.model_dump_json())}

    async def _put_in(self, drive: DiskSpec) -> None:
        """Put the medium that this definition names into its drive, whose tray is open."""
        running = self._running
        if drive.path is None:
            await tray.change_medium(running.qmp, drive.id, None)
            running.media[drive.id] = None
            return
        opened = await asyncio.to_thread(open_in_drive, running.spec, drive)
        try:
            identity = await asyncio.to_thread(known_by, opened, drive.path)
            number, name = await drives.free_set(running.qmp), await tray.free_node(running.qmp)
            node = file_node(name, number, read_only=True, is_device=is_device(opened))
            await tray.change_medium(running.qmp, drive.id, Medium(node, ((number, opened),)))
        finally:
            os.close(opened)
        running.media[drive.id] = identity

    async def _note_what_is_in(self, held: Held, before: MachineSpec, changed: DiskSpec) -> None:
        """Record what a failed change has left in the drive: the old medium, or none."""
        old = before.disk(changed.id)
        assert old is not None
        with contextlib.suppress(VmmError):
            if (await tray.look(self._running.qmp, changed.id)).node is None:
                old = make_disk(**{**old.model_dump(), "path": None})
                self._running.media[changed.id] = None
            elif old.path is not None:
                await self._running.qmp.execute("blockdev-close-tray", id=changed.id)
        self.write_down(held, _with_disk(before, old))

    async def finish_interrupted(self) -> None:
        """Finish a change of medium that a killed worker began, as the stored definition, written first, says."""
        running = self._running
        if running.note.operation != CHANGE_MEDIUM:
            return
        details = running.note.details
        drive_id, had = str(details.pop("drive", "")), details.pop("drive_had", None)
        drive: DiskSpec | None = None
        try:
            drive = registry.read_definition(running.machine.definition).disk(drive_id)
            if drive is not None and drive.kind == "iso":
                await running.wait_reachable()
                found = await tray.look(running.qmp, drive_id)
                if drive.path == had and (found.node is not None or had is None):
                    if found.node is not None:  # only the tray was opened
                        await running.qmp.execute("blockdev-close-tray", id=drive_id)
                else:
                    await tray.open_tray(running.qmp, drive.id, force=True)
                    await self._put_in(drive)
                    running.redefine(_with_disk(running.spec, drive))
        except VmmError as error:
            running.tell("medium-not-changed", drive=drive_id, problem=str(error))
            if drive is not None:
                before = _with_disk(running.spec, make_disk(**{**drive.model_dump(), "path": had}))
                with contextlib.suppress(VmmError), self._held() as held:
                    await self._note_what_is_in(held, before, drive)
        running.note.operation = None
        running.write_note()

    async def _resize(self, params: dict[str, Any], progress: Progress) -> object:
        """Enlarge a disk; {"disk": id, "size_bytes"}. A disk that a guest uses is never shrunk."""
        disk = self._disk(params)
        size_bytes = parameter(params, "size_bytes", int, 0)
        if size_bytes <= 0:
            raise InvalidSpec("the size must be a positive number of bytes")
        self._running.need(Verb.RESIZE_DISK)
        if not disk.is_image or disk.read_only:
            raise WrongState("only a writable image can be resized")
        if disk.controller == "ide":
            raise WrongState(
                "is running: a disk on ide can be enlarged only while it is off", hint="shut the machine down first"
            )
        with self._running.busy("disk-resize"):
            await self._refuse_shrinking(disk, size_bytes)
            result = await drives.resize_disk(self._running.qmp, self._running.server, disk, size_bytes)
        self._running.tell("disk-resized", disk=disk.id, size_bytes=result["size_bytes"])
        return result

    async def _refuse_shrinking(self, disk: DiskSpec, size_bytes: int) -> None:
        """Raise WrongState if the disk is larger than `size_bytes`, StoreFailed if its size is unknown."""
        status = await self._running.server.call("status", timeout_seconds=5)
        sizes = [int(one["size_bytes"]) for one in status["exports"] if one["name"] == disk.id]
        if not sizes:
            raise StoreFailed(f"{disk.id} is not served", hint="vmm disk list shows what is wrong with it")
        if size_bytes < sizes[0]:
            raise WrongState(
                f"is {self._running.state.value}: {disk.id}, of {sizes[0]} bytes, can be shrunk only while it is off",
                hint=f"shut the machine down, then: vmm disk resize {self._running.spec.name} {disk.id} SIZE --shrink",
            )

    async def _status(self, params: dict[str, Any], progress: Progress) -> object:
        """The sizes and layers of the disks, as reported by the disk server."""
        return await self._running.server.call("status", timeout_seconds=5)

    def _held(self) -> contextlib.AbstractContextManager[Held]:
        """Hold the snapshot tree, so that no snapshot is taken while disks are added or removed. Raises InUse."""
        return holding(self._running.machine, self._running.spec.name)

    def write_down(self, lock: HeldLock, spec: MachineSpec) -> None:
        """Write the running definition, which the supervisor reads, and its disks to the stored one.

        Raises InUse, NoSpace.
        """
        registry.update(lock, lambda stored: stored.changed(disks=list(spec.disks)))
        self._running.redefine(spec)


def _with_disk(spec: MachineSpec, changed: DiskSpec) -> MachineSpec:
    return spec.changed(disks=[changed if one.id == changed.id else one for one in spec.disks])


def _secret(secret_id: str, content: bytes) -> Device:
    """The QEMU object for a secret; its content is sent over the monitor's private socket."""
    return {"qom-type": "secret", "id": secret_id, "format": "base64", "data": base64.b64encode(content).decode()}
