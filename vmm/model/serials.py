# SPDX-License-Identifier: Apache-2.0
"""The serial number by which a guest identifies a disk, kept with the image or device.

Guests identify a disk by it (`/dev/disk/by-id` on Linux), so an image that is removed from a machine and added again,
or moved to another machine, keeps its number. It is kept in an extended attribute of the image, on file systems that
support them; the number of a device is derived from the device's identity.

Anyone who can write to an image can write its attribute: it is used only if it is a valid serial number, and never
twice in one machine.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable

from vmm.model.spec import MAX_SERIAL_CHARACTERS, DiskSpec

ATTRIBUTE = "user.vmm.serial"
_SERIAL = re.compile(rb"[A-Za-z0-9_-]{1,%d}" % MAX_SERIAL_CHARACTERS)


def keep_serials(disks: Iterable[DiskSpec]) -> None:
    """Store the disks' serial numbers with their images; an image that cannot store one gets a new one next time."""
    for disk in disks:
        if disk.is_image and disk.path is not None:
            with contextlib.suppress(OSError):
                os.setxattr(disk.path, ATTRIBUTE, disk.serial.encode())


def kept_serial(path: str, taken: Iterable[str]) -> str | None:
    """The serial number stored with an image; None if it has none, or one that the machine already uses."""
    try:
        content = os.getxattr(path, ATTRIBUTE)
    except OSError:
        return None
    if not _SERIAL.fullmatch(content):
        return None
    serial = content.decode()
    return None if serial in set(taken) else serial


def serial_of_device(identity: str | None, taken: Iterable[str]) -> str | None:
    """The serial number of a device or LUN, always the same; None if the identity is unknown or the number taken."""
    if identity is None:
        return None
    import hashlib  # slow to import, and only a new disk needs it

    serial = hashlib.sha256(identity.encode()).hexdigest()[:MAX_SERIAL_CHARACTERS]
    return None if serial in set(taken) else serial
