# SPDX-License-Identifier: Apache-2.0
"""A file system that shares space, simulated: what FICLONERANGE does, by copying."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Any

from vhdkit.units import PAGE_SIZE

FICLONERANGE = 0x4020940D
_ioctl = fcntl.ioctl


class FakeClone:
    """`fcntl.ioctl` with the FICLONERANGE of a file system with blocks of one page, simulated by copying.

    Counts the shared bytes.
    """

    def __init__(self, refusal: int | None = None) -> None:
        self.shared_bytes = 0
        self.calls = 0
        self._refusal = refusal

    def __call__(self, fd: int, request: int, argument: Any) -> Any:
        if request != FICLONERANGE:
            return _ioctl(fd, request, argument)
        self.calls += 1
        if self._refusal is not None:
            raise OSError(self._refusal, os.strerror(self._refusal))
        source, source_offset, size, offset = struct.unpack("=qQQQ", argument)
        if source_offset % PAGE_SIZE or offset % PAGE_SIZE or size % PAGE_SIZE:
            raise OSError(errno.EINVAL, "unaligned")
        if source_offset + size > os.fstat(source).st_size:
            raise OSError(errno.EINVAL, "past the end")
        os.pwrite(fd, os.pread(source, size, source_offset), offset)
        self.shared_bytes += size
        return 0
