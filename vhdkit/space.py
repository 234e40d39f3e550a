# SPDX-License-Identifier: Apache-2.0
"""Space in files: punching and finding holes, and reserving space.

Decides how the system is asked, which errors mean "this file system cannot", and where reserving makes writing
quicker. Must not know what the bytes mean.
Every function takes an open descriptor and raises OSError.
"""

from __future__ import annotations

import errno
import functools
import os
import struct
from collections.abc import Callable

from vhdkit.units import MIB, round_up

UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
_KEEP_SIZE = 0x01
_PUNCH_HOLE = 0x02
# Magic numbers of statfs(2) for file systems on which a large write is quicker into reserved space: ext4.
# Measured with 2 MiB at a time, Linux 6.18: ext4 takes 0.64 of the time, XFS 1.07, tmpfs 1.06, Btrfs 1.24.
_QUICKER_RESERVED = {0xEF53}
_IN_MEMORY = {0x01021994, 0x858458F6, 0x958458F6}  # likewise: tmpfs, ramfs, hugetlbfs


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


def reserve_inside(fd: int, offset_bytes: int, size_bytes: int) -> bool:
    """As `reserve`, but the size of the file stays."""
    return _is_done(fd, _KEEP_SIZE, offset_bytes, size_bytes)


def is_quicker_reserved(fd: int) -> bool:
    """True if a large write to a new range takes less time when its space was reserved just before."""
    return file_system(fd) in _QUICKER_RESERVED


def is_in_memory(fd: int) -> bool:
    """True for an open file of a file system that has no device, so that reading it need not wait for one."""
    return file_system(fd) in _IN_MEMORY


def file_system(fd: int) -> int | None:
    """The magic number of the file system of an open file, as in statfs(2); None if the system does not say."""
    raw = bytearray(256)  # struct statfs begins with it
    return struct.unpack_from("l", raw)[0] & 0xFFFFFFFF if _fstatfs()(fd, raw) == 0 else None


@functools.cache
def _fstatfs() -> Callable[[int, bytearray], int]:
    import ctypes

    call = ctypes.CDLL(None, use_errno=True).fstatfs
    call.argtypes = [ctypes.c_int, ctypes.c_void_p]
    return lambda fd, raw: int(call(fd, (ctypes.c_char * len(raw)).from_buffer(raw)))


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


def runs(fd: int, offset_bytes: int, end: int, count: int) -> list[tuple[int, int, bool]]:
    """The first runs of a range that is not empty, as (offset, size, may hold data), in order, without gaps.

    They are `count` or one more, or all. If the file system cannot say where holes are, all of it counts as data.
    """
    found: list[tuple[int, int, bool]] = []
    while offset_bytes < end and len(found) < count:
        data = _seek(fd, offset_bytes, os.SEEK_DATA, end, offset_bytes)
        if data > offset_bytes:
            found.append((offset_bytes, data - offset_bytes, False))
        if data >= end:
            break
        hole = _seek(fd, data, os.SEEK_HOLE, end, end)
        found.append((data, hole - data, True))
        offset_bytes = hole
    return found


def _seek(fd: int, offset_bytes: int, whence: int, end: int, unsupported: int) -> int:
    try:
        return min(os.lseek(fd, offset_bytes, whence), end)
    except OSError as error:
        if error.errno == errno.ENXIO:  # only a hole from here to the end of the file
            return end
        if error.errno in UNSUPPORTED:
            return unsupported
        raise
