# SPDX-License-Identifier: Apache-2.0
"""Tap interfaces: opened for QEMU with one descriptor per queue, and the kernel's vhost beside them if available.

Decides the flags (always with a vnet header, several queues on request) and the error if the host lacks a feature. A
tap made here lives as long as its descriptors: it disappears when QEMU ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct

from vmm.model import errors

_TUNSETIFF = 0x400454CA
_TAP, _NO_PI, _VNET_HDR, _MULTI_QUEUE = 0x0002, 0x1000, 0x4000, 0x0100
_REQUEST = struct.Struct("16sH22x")
TUN_PATH, VHOST_PATH = "/dev/net/tun", "/dev/vhost-net"


def open_tap(name: str, queues: int) -> list[int]:
    """The descriptors of a new tap, one per queue. Raises Unsupported, AccessDenied, InUse, VmmError."""
    flags = _TAP | _NO_PI | _VNET_HDR | (_MULTI_QUEUE if queues > 1 else 0)
    opened: list[int] = []
    try:
        for _ in range(queues):
            opened.append(os.open(TUN_PATH, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
            fcntl.ioctl(opened[-1], _TUNSETIFF, _REQUEST.pack(name.encode(), flags))
    except OSError as error:
        close_all(opened)
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            raise errors.Unsupported("this host has no tap interfaces", path=TUN_PATH, hint="modprobe tun") from error
        if error.errno in (errno.EPERM, errno.EACCES):
            raise errors.AccessDenied(
                "a tap interface needs root", path=TUN_PATH, hint="use root, or a switch with the user back end"
            ) from error
        raise errors.of_os_error(error, f"make the tap interface {name}", path=TUN_PATH) from error
    return opened


def open_vhost(queues: int) -> list[int]:
    """One descriptor of the kernel's vhost per queue; none if the host has no vhost."""
    opened: list[int] = []
    try:
        for _ in range(queues):
            opened.append(os.open(VHOST_PATH, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        close_all(opened)
        return []
    return opened


def close_all(descriptors: list[int]) -> None:
    """Close the descriptors."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
