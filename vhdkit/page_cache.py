# SPDX-License-Identifier: Apache-2.0
"""The system's page cache: asking for pages before they are needed.

Decides how the kernel is asked. Must not know what the bytes mean, nor when asking pays.
Every function takes an open descriptor.
"""

from __future__ import annotations

import contextlib
import os

from vhdkit.units import KIB

AT_ONCE_BYTES = 128 * KIB  # the kernel ignores what goes beyond a device's own read-ahead, which is usually this size

_fadvise, _WILLNEED = os.posix_fadvise, os.POSIX_FADV_WILLNEED


def prefetch(fd: int, offset_bytes: int, size_bytes: int) -> None:
    """Let the kernel begin to read what is not in the cache. Only a hint: the read itself reports what is wrong."""
    with contextlib.suppress(OSError):
        while size_bytes > AT_ONCE_BYTES:
            _fadvise(fd, offset_bytes, AT_ONCE_BYTES, _WILLNEED)
            offset_bytes += AT_ONCE_BYTES
            size_bytes -= AT_ONCE_BYTES
        _fadvise(fd, offset_bytes, size_bytes, _WILLNEED)
