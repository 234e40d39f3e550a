# SPDX-License-Identifier: Apache-2.0
"""From a request for a disk or drive to the disk that a machine gets.

Decides the defaults (controller, place, serial), what kind of disk a file or device becomes, and which
requests are refused now because the machine could never start: QEMU has no read-only disk on IDE and none with sectors
of 4096 bytes, and an ISO image is not a hard disk. Must not know whether the machine runs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import vhdkit
from vmm.model.errors import InvalidSpec
from vmm.model.formats import ImageFormat
from vmm.model.paths import default_folders
from vmm.model.serials import kept_serial, serial_of_device
from vmm.model.spec import CacheMode, Controller, DiskSpec, MachineSpec, make_disk
from vmm.store.images import as_found, find_image, refuse_frozen
from vmm.store.media import open_medium


@dataclass(frozen=True, slots=True)
class DiskRequest:
    """A disk for a machine. `controller` None: IDE while there is room, then SCSI; `unit` None: any free one.

    A disk that IDE cannot have (read-only, or with sectors of 4096 bytes) goes on SCSI, as the first one on virtio.
    `path` None is an empty drive, only with kind "iso". `format` is the image's format if it is not to be detected:
    "raw" also for a file that holds an ISO image and is meant as a hard disk. `cache` applies to images.
    """

    path: str | None
    controller: Controller | None = None
    controller_index: int | None = None
    unit: int | None = None
    kind: Literal["vhd", "pass-through", "iso"] = "vhd"
    read_only: bool = False
    serial: str | None = None
    parent_dirs: tuple[str, ...] = ()
    allow_raw_parent: bool = False
    format: ImageFormat | None = None
    cache: CacheMode = "writeback"

    @property
    def is_image(self) -> bool:
        """As in `DiskSpec`."""
        return self.kind == "vhd"


DiskWish = DiskRequest  # its name in 0.1.0, still supported


def disk_of(request: DiskRequest, spec: MachineSpec) -> DiskSpec:
    """The disk for a request: defaults are filled in, and its image is examined.

    Raises InvalidSpec, NotFound, AccessDenied, StoreFailed, InUse, Refused.
    """
    _refuse_read_only_on_ide(request, request.controller or _usual_controller(request, spec))
    path = request.path or None
    settings: dict[str, object] = {}
    taken = [disk.serial for disk in spec.disks]
    serial = request.serial
    if path is not None and request.kind == "pass-through":
        from vmm.store import devices  # slow to import, and few machines need it

        found = devices.looked_at(path, read_only=request.read_only, machine_id=spec.id)
        path = found.pop("path")
        settings |= found
        serial = serial or serial_of_device(found.get("identity"), taken)
    elif path is not None:
        path = find_image(path, spec.paths.disks or default_folders()["disks"])
        serial = serial or (kept_serial(path, taken) if request.is_image else None)
    if serial is not None:
        settings["serial"] = serial
    folders = tuple(os.path.realpath(one) for one in request.parent_dirs)
    if request.is_image and path is not None:
        folders += _trusted_folders(path, folders)
    settings |= {"id": spec.free_disk_id(), "kind": request.kind, "path": path, "parent_dirs": folders,
                 "read_only": request.read_only or request.kind == "iso", "format": request.format,
                 "allow_raw_parent": request.allow_raw_parent, "cache": request.cache}  # fmt: skip
    if request.kind == "iso" and path is not None:
        os.close(open_medium(path))
    sector_bytes = 512
    if request.is_image:
        image = as_found(make_disk(**settings, controller="scsi"))  # where it can be depends on the sectors
        refuse_frozen(image)
        settings, sector_bytes = image.model_dump(), image.sector_bytes
    controller = request.controller or _usual_controller(request, spec, sector_bytes)
    _refuse_large_sectors_on_ide(request, controller, sector_bytes)
    return make_disk(**settings | _place(request, controller, spec))


def _place(request: DiskRequest, controller: Controller, spec: MachineSpec) -> dict[str, object]:
    index, unit = request.controller_index, request.unit
    if unit is None:
        index, unit = spec.free_place(controller) if index is None else (index, _free_unit(spec, controller, index))
    return {"controller": controller, "controller_index": index or 0, "unit": unit}


def _trusted_folders(path: str, said: tuple[str, ...]) -> tuple[str, ...]:
    """The user's permanently trusted folders that hold parents of this image.

    They are stored with the disk, because the machine's processes may run in another environment.
    """
    trusted = tuple(os.path.realpath(one) for one in vhdkit.trusted_parent_dirs().parent_dirs)
    if not trusted:
        return ()
    options = vhdkit.OpenOptions(parent_dirs=(*said, *trusted), allow_raw_parent=True)
    try:
        parents = vhdkit.chain_paths(path, options=options)[1:]
    except vhdkit.VhdkitError:
        return ()  # opening the image reports what is wrong with it
    near = (os.path.dirname(os.path.realpath(path)), *said)
    far = [one for one in parents if not _is_beneath_any(one, near)]
    return tuple(dict.fromkeys(folder for folder in trusted if any(_is_beneath_any(one, (folder,)) for one in far)))


def _is_beneath_any(path: str, folders: tuple[str, ...]) -> bool:
    return any(os.path.commonpath((path, folder)) == folder for folder in folders)


def _refuse_read_only_on_ide(request: DiskRequest, controller: Controller) -> None:
    if controller == "ide" and request.read_only and request.kind != "iso":
        raise InvalidSpec(
            "a disk on IDE cannot be read-only", path=request.path,
            hint="put it on scsi or virtio",
        )  # fmt: skip


def _refuse_large_sectors_on_ide(request: DiskRequest, controller: Controller, sector_bytes: int) -> None:
    if controller == "ide" and sector_bytes > 512:
        raise InvalidSpec(
            f"has sectors of {sector_bytes} bytes, and a disk on IDE has sectors of 512", path=request.path,
            hint="put it on scsi or virtio",
        )  # fmt: skip


def _usual_controller(request: DiskRequest, spec: MachineSpec, sector_bytes: int = 512) -> Controller:
    if request.kind == "iso":
        return "ide"
    if request.read_only or sector_bytes > 512:  # on virtio if the machine may boot from it
        return "scsi" if any(disk.kind != "iso" and disk.controller != "scsi" for disk in spec.disks) else "virtio"
    on_ide = sum(disk.controller == "ide" for disk in spec.disks)
    return "ide" if on_ide < 3 else "scsi"


def _free_unit(spec: MachineSpec, controller: Controller, index: int) -> int:
    taken = {disk.unit for disk in spec.disks if (disk.controller, disk.controller_index) == (controller, index)}
    return next(unit for unit in range(len(taken) + 1) if unit not in taken)
