# SPDX-License-Identifier: Apache-2.0
"""The serial number by which a guest identifies a disk, kept with the image or device.

Guests find a disk by it (`/dev/disk/by-id` on Linux), so an image that is removed from a machine and added again, or
given to another machine, keeps its number. It is kept in an extended attribute of the image, on file systems that
have those; the number of a device comes from the device's identity.

Anybody who can write to an image can write its attribute: it is believed only if it could be a serial
number, and never twice in one machine.
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
    """Let the images of disks bear their serial numbers. Where one cannot, the next machine gives it another."""
    for disk in disks:
        if disk.is_image and disk.path is not None:
            with contextlib.suppress(OSError):
                os.setxattr(disk.path, ATTRIBUTE, disk.serial.encode())


def kept_serial(path: str, taken: Iterable[str]) -> str | None:
    """What an image bears; None where it bears none, or one that the machine has already."""
    try:
        content = os.getxattr(path, ATTRIBUTE)
    except OSError:
        return None
    if not _SERIAL.fullmatch(content):
        return None
    serial = content.decode()
    return None if serial in set(taken) else serial


def serial_of_device(identity: str | None, taken: Iterable[str]) -> str | None:
    """That of a device or LUN, which is the same whenever it is given to a machine; None where it is not known."""
    if identity is None:
        return None
    import hashlib  # takes long, and only a new disk needs it

    serial = hashlib.sha256(identity.encode()).hexdigest()[:MAX_SERIAL_CHARACTERS]
    return None if serial in set(taken) else serial
