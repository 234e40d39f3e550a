# SPDX-License-Identifier: Apache-2.0
"""The locks that keep other programs away from an image: those of QEMU's file driver.

Decides which bytes of a file a reader and a writer lock, and which locks of other programs exclude them. Must not know
who holds a file, nor its name.

They are shared open-file-description locks on single bytes. A lock on byte 100+i means "I use permission i", one on
byte 200+i "no one else may use permission i"; permission 0 is consistent read, 1 write, 3 resize. So `qemu-img`
and vhdkit keep each other out, each with its own message. Source: the permission bytes of QEMU's file driver.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Sequence

from vhdkit import errors

_F_OFD_GETLK, _F_OFD_SETLK = 36, 37
_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid
_HELD_BY_READER = (100, 201, 203)
_HELD_BY_WRITER = (100, 101, 103, 201, 203)
_MORE_OF_WRITER = (101, 103)
_REFUSED_TO_READER = (101, 103)
_REFUSED_TO_WRITER = (101, 103, 201, 203)
_FIRST, _COUNT = 100, 104  # the range in which all of these bytes lie


MISSING = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}  # errors of a file system without locks


def hold(fd: int, path: str, *, writer: bool) -> None:
    """Hold the file as a reader or a writer; calling again changes the role. Raises ImageInUse, OSError.

    After ImageInUse the file is not held at all.
    """
    # Lock first, check afterwards: of two programs that start together, at least one sees the other.
    held = _HELD_BY_WRITER if writer else _HELD_BY_READER
    for byte in held:
        _set(fd, path, fcntl.F_RDLCK, byte)
    refused = _refused(fd, _REFUSED_TO_WRITER if writer else _REFUSED_TO_READER)
    if refused is not None:
        release(fd, path)
        raise _in_use(path, refused)
    if not writer:
        become_reader(fd, path)


def become_writer(fd: int, path: str) -> None:
    """Change a reader's locks to a writer's. Raises ImageInUse when another program holds the file; the reader's
    locks are kept then.
    """
    inherit(fd, path)
    refused = _refused(fd, _REFUSED_TO_WRITER)
    if refused is not None:
        become_reader(fd, path)
        raise _in_use(path, refused)


def inherit(fd: int, path: str) -> None:
    """Take a writer's locks without a check: the writer they come from releases its own afterwards."""
    for byte in _HELD_BY_WRITER:
        _set(fd, path, fcntl.F_RDLCK, byte)


def become_reader(fd: int, path: str) -> None:
    """Change a writer's locks to a reader's without a gap in which another writer could get in."""
    for byte in _MORE_OF_WRITER:
        _set(fd, path, fcntl.F_UNLCK, byte)


def release(fd: int, path: str) -> None:
    """Release every lock of this open file."""
    _set(fd, path, fcntl.F_UNLCK, _FIRST, _COUNT)


def are_missing(fd: int) -> bool:
    """True where the file system has no locks."""
    try:
        _refused(fd, _REFUSED_TO_READER[:1])
    except OSError as error:
        return error.errno in MISSING
    return False


def is_written(fd: int) -> bool:
    """True when another open file of this inode is held for writing."""
    try:
        return _refused(fd, _REFUSED_TO_READER[:1]) is not None
    except OSError:
        return False


def is_held(fd: int) -> bool:
    """True when another open file of this inode is held at all."""
    try:
        return _refused(fd, _HELD_BY_READER[:1]) is not None
    except OSError:
        return False


def _refused(fd: int, bytes_: Sequence[int]) -> int | None:
    """The first of these bytes that another open file has locked."""
    for byte in bytes_:
        answer = fcntl.fcntl(fd, _F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
        if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
            return byte
    return None


def _in_use(path: str, byte: int) -> errors.ImageInUse:
    doing = "writing to" if byte in _REFUSED_TO_READER else "using"
    return errors.ImageInUse(
        f"another program is {doing} this image",
        path=path,
        hint="close it there first (`vhdkit info`, `vhdkit chain` and `vhdkit dump` still work)",
    )


def _set(fd: int, path: str, kind: int, byte: int, count: int = 1) -> None:
    try:
        fcntl.fcntl(fd, _F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, count, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise errors.ImageInUse("another program holds this image exclusively", path=path) from error
        if kind == fcntl.F_UNLCK and error.errno in MISSING:
            return  # there are none to release
        raise
