# SPDX-License-Identifier: Apache-2.0
"""How a machine's QEMU gets the right to write-protect its guest's memory (userfaultfd) during a capture.

Decides which of three ways a machine with background capture uses, the one with the fewest privileges first:

    everybody     vm.unprivileged_userfaultfd is 1: QEMU needs nothing
    device        /dev/userfaultfd, a node of the machine's own, for a QEMU that supports it (8.0 and newer)
    capability    CAP_SYS_PTRACE, with which the kernel would let QEMU into every process of the host; `confined`
                  blocks the system calls for that

Must not know how a right is granted. Sources: userfaultfd(2); Linux's Documentation/admin-guide/mm/userfaultfd.rst;
QEMU's util/userfaultfd.c.
"""

from __future__ import annotations

import fcntl
import os
from enum import StrEnum

from vmm.kvm import program
from vmm.model.errors import VmmError

DEVICE = "/dev/userfaultfd"
UNPRIVILEGED = "/proc/sys/vm/unprivileged_userfaultfd"
FIRST_QEMU_WITH_DEVICE = (8, 0)
_USERFAULTFD_IOC_NEW = 0xAA00


class Way(StrEnum):
    """The way in which QEMU gets the right."""

    EVERYBODY = "everybody"
    DEVICE = "device"
    CAPABILITY = "capability"


def best_way(version: str | None = None, *, device: str = DEVICE, unprivileged: str = UNPRIVILEGED) -> Way:
    """The way that this host and this QEMU support; `version` None: queries the installed QEMU."""
    if is_for_everybody(unprivileged):
        return Way.EVERYBODY
    if works(device) and knows_device(_installed() if version is None else version):
        return Way.DEVICE
    return Way.CAPABILITY


def is_for_everybody(path: str = UNPRIVILEGED) -> bool:
    """True if unprivileged programs may have such a userfaultfd."""
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip() == "1"
    except (OSError, ValueError):
        return False


def works(device: str = DEVICE) -> bool:
    """True if the device gives us a userfaultfd."""
    try:
        node = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.close(fcntl.ioctl(node, _USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError:
        return False
    finally:
        os.close(node)
    return True


def knows_device(version: str | None) -> bool:
    """True for a QEMU ("8.2.1") that opens the device by itself."""
    if version is None:
        return False
    numbers = tuple(int(part) for part in version.split(".") if part.isdecimal())
    return numbers >= FIRST_QEMU_WITH_DEVICE


def _installed() -> str | None:
    try:
        return program.inspect(program.find()).version
    except VmmError:
        return None
