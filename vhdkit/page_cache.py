# SPDX-License-Identifier: Apache-2.0
"""The system's page cache: asking for pages before they are needed, and which of them are there.

Decides how the kernel is asked. Must not know what the bytes mean, nor when asking pays.
Every function takes an open descriptor.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

from vhdkit.units import KIB, PAGE_SIZE

AT_ONCE_BYTES = 128 * KIB  # the kernel ignores what goes beyond a device's own read-ahead, which is usually this size

_fadvise, _WILLNEED = os.posix_fadvise, os.POSIX_FADV_WILLNEED
_CACHESTAT = 451  # cachestat(2), since Linux 6.5, for which the C library has no name; on the machines below
_HAS_CACHESTAT = os.uname().machine in ("x86_64", "aarch64", "riscv64", "ppc64le", "s390x", "loongarch64")
_syscall = ctypes.CDLL(None).syscall
_Range = ctypes.c_uint64 * 2  # offset and size in bytes
_Counts = ctypes.c_uint64 * 5  # pages: in the cache, dirty, being written, evicted, evicted recently


def prefetch(fd: int, offset_bytes: int, size_bytes: int) -> None:
    """Let the kernel begin to read what is not in the cache. Only a hint: the read itself reports what is wrong."""
    with contextlib.suppress(OSError):
        while size_bytes > AT_ONCE_BYTES:
            _fadvise(fd, offset_bytes, AT_ONCE_BYTES, _WILLNEED)
            offset_bytes += AT_ONCE_BYTES
            size_bytes -= AT_ONCE_BYTES
        _fadvise(fd, offset_bytes, size_bytes, _WILLNEED)


def read_ahead_bytes(fd: int) -> int:
    """How far the kernel reads ahead of a stream of this file, at most; 0 if that is not known.

    Source: Documentation/ABI/testing/sysfs-class-bdi. A partition shares its disk's limit.
    """
    device = os.fstat(fd).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for path in (f"/sys/class/bdi/{number}", f"/sys/dev/block/{number}/../queue"):
        with contextlib.suppress(OSError, ValueError), open(f"{path}/read_ahead_kb", encoding="ascii") as file:
            return int(file.read()) * KIB
    return 0


def holds(fd: int, offset_bytes: int, size_bytes: int) -> bool:
    """True if every page of the range, which is not empty, is in the cache; some may still be being read.

    False also where the system does not say: on kernels before 6.5, and for files of other users.
    """
    if not _HAS_CACHESTAT:
        return False
    counts = _Counts()
    if _syscall(_CACHESTAT, fd, ctypes.byref(_Range(offset_bytes, size_bytes)), ctypes.byref(counts), 0):
        return False
    in_cache: int = counts[0]
    return in_cache == (offset_bytes + size_bytes - 1) // PAGE_SIZE - offset_bytes // PAGE_SIZE + 1
