# SPDX-License-Identifier: Apache-2.0
"""Which file is behind a loop device, by its inode: a file may have several names, or none any more.

Decides only how this is asked: from the kernel, through the device, if we may open it; otherwise by the name that the
kernel reports. Must not know what follows. Source: loop(4).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct

LOOP_MAJOR = 7
_LOOP_GET_STATUS64 = 0x4C05
_INFO_BYTES = 232  # struct loop_info64, which begins with the device and the inode of the file

Inode = tuple[int, int]  # device, number


def inode_behind(device: str, file: str | None = None) -> Inode | None:
    """Of the file behind a loop device; None for what is none. `file`: its name, where the device cannot be asked."""
    with contextlib.suppress(OSError):
        descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            facts = os.fstat(descriptor)
            if stat.S_ISBLK(facts.st_mode) and os.major(facts.st_rdev) == LOOP_MAJOR:
                info = fcntl.ioctl(descriptor, _LOOP_GET_STATUS64, bytes(_INFO_BYTES))
                return struct.unpack_from("=QQ", info)
        finally:
            os.close(descriptor)
    return None if file is None else inode_of(file)


def inode_of(path: str) -> Inode | None:
    """Of a file, or of the one behind a loop device; None where there is none."""
    try:
        facts = os.stat(path)
    except OSError:
        return None
    if stat.S_ISBLK(facts.st_mode):
        return inode_behind(path)
    return facts.st_dev, facts.st_ino
