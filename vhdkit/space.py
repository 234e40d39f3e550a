# SPDX-License-Identifier: Apache-2.0
"""Space in files: punching and finding holes, and reserving space.

Decides how the system is asked, and which errors mean "this file system cannot". Must not know what the bytes mean.
Every function takes an open descriptor and raises OSError.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable

from vhdkit.units import MIB, round_up

UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
_KEEP_SIZE = 0x01
_PUNCH_HOLE = 0x02


@functools.cache
def _system_call() -> Callable[[int, int, int, int], int]:
    """`fallocate` of the C library, which returns an errno. Loaded for the first file that is written to."""
    import ctypes

    call = ctypes.CDLL(None, use_errno=True).fallocate
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return lambda *arguments: ctypes.get_errno() if call(*arguments) else 0


def _fallocate(fd: int, mode: int, offset_bytes: int, size_bytes: int) -> None:
    if code := _system_call()(fd, mode, offset_bytes, size_bytes):
        raise OSError(code, os.strerror(code))


def punch(fd: int, offset_bytes: int, size_bytes: int) -> bool:
    """Punch a hole over the range, which must not be empty; False if the file system has no holes."""
    return _is_done(fd, _PUNCH_HOLE | _KEEP_SIZE, offset_bytes, size_bytes)


def reserve(fd: int, offset_bytes: int, size_bytes: int) -> bool:
    """Reserve space for the range, which must not be empty, extending the file over it; False where that is not
    possible.
    """
    return _is_done(fd, 0, offset_bytes, size_bytes)


def _is_done(fd: int, mode: int, offset_bytes: int, size_bytes: int) -> bool:
    try:
        _fallocate(fd, mode, offset_bytes, size_bytes)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return False
        raise
    return True


def punches(fd: int) -> bool:
    """True if the file system can punch holes. Tried past the end of the file, where nothing can be lost."""
    try:
        return punch(fd, round_up(os.lseek(fd, 0, os.SEEK_END), MIB), MIB)
    except OSError:
        return False


def next_data(fd: int, offset_bytes: int, end: int) -> int:
    """Where data begins at or after an offset, at most `end`. If the file system cannot say, all of it counts."""
    return _seek(fd, offset_bytes, os.SEEK_DATA, end, offset_bytes)


def next_hole(fd: int, offset_bytes: int, end: int) -> int:
    """Where the data at an offset ends, at most `end`."""
    return _seek(fd, offset_bytes, os.SEEK_HOLE, end, end)


def _seek(fd: int, offset_bytes: int, whence: int, end: int, unsupported: int) -> int:
    try:
        return min(os.lseek(fd, offset_bytes, whence), end)
    except OSError as error:
        if error.errno == errno.ENXIO:  # only a hole from here to the end of the file
            return end
        if error.errno in UNSUPPORTED:
            return unsupported
        raise
