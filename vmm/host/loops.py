# SPDX-License-Identifier: Apache-2.0
"""The file behind a loop device, identified by inode, because a file may have several names or none.

Decides only how it is found: from the kernel through the device if we may open it, otherwise by the name that the
kernel reports. Must not know what the answer is used for. Source: loop(4).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct

LOOP_MAJOR = 7
_LOOP_GET_STATUS64 = 0x4C05
_INFO_BYTES = 232  # struct loop_info64; its first two fields are the file's device and inode

Inode = tuple[int, int]  # device, number


def inode_behind(device: str, file: str | None = None) -> Inode | None:
    """The inode of the file behind a loop device, or None. `file`: its name, used if the device cannot be queried."""
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
    """The inode of a file, or of the file behind a loop device; None if there is none."""
    try:
        facts = os.stat(path)
    except OSError:
        return None
    if stat.S_ISBLK(facts.st_mode):
        return inode_behind(path)
    return facts.st_dev, facts.st_ino
