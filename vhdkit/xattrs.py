# SPDX-License-Identifier: Apache-2.0
"""Metadata of a file outside its content: extended attributes, and records that several programs write.

Decides how attributes are read and written, and that a file system, or a user, without them is not a failure. Writing
an attribute changes neither the content nor the modification time; copying a file may lose it. Also decides how a
record that is replaced as a whole is locked during the replacement.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator

from vhdkit import errors
from vhdkit.descriptor import Owned, close_owned, opened
from vhdkit.store import FileStore, translated
from vhdkit.waiting import looks

_PREFIX = "user.vhdkit."
_LOCK_SECONDS = 10.0
_PRIVATE = 0o600


def read_attribute(store: FileStore, name: str, limit_bytes: int) -> bytes | None:
    """The attribute's value; None if it does not exist, is longer than the limit, or may not be read."""
    try:
        raw = os.getxattr(store.fileno(), _PREFIX + name)
    except OSError:
        return None
    return raw if len(raw) <= limit_bytes else None


def write_attribute(store: FileStore, name: str, raw: bytes) -> bool:
    """Set the attribute, replacing an earlier value; False if that is not possible."""
    try:
        os.setxattr(store.fileno(), _PREFIX + name, raw)
    except OSError:
        return False
    return True


def drop_attribute(store: FileStore, name: str) -> None:
    """Remove the attribute."""
    try:
        os.removexattr(store.fileno(), _PREFIX + name)
    except OSError:
        return


@contextlib.contextmanager
def record_held(path: str) -> Iterator[None]:
    """Keep our other processes from changing the record at `path` during the block. Creates it, empty, if missing.

    If it is empty at the end it is removed. Raises ImageInUse if another process holds it too long, AccessDenied,
    NoSpace, IoFailed, and InvalidArgument if it is not a regular file.
    """
    with translated(path, "hold"):
        owned = _held(path)
    try:
        yield
    finally:
        try:
            with contextlib.suppress(OSError):
                if _is_named(owned[0], path) and os.fstat(owned[0]).st_size == 0:
                    os.unlink(path)
        finally:
            close_owned(owned)


def _held(path: str) -> Owned:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    for _ in looks(_LOCK_SECONDS):
        owned = opened(path, flags, _PRIVATE)
        try:
            if not stat.S_ISREG(os.fstat(owned[0]).st_mode):
                raise errors.InvalidArgument("is not a regular file", path=path)
            if _locked(owned[0]) and _is_named(owned[0], path):
                return owned
        except BaseException:
            close_owned(owned)
            raise
        close_owned(owned)
    raise errors.ImageInUse("another program is using this record", path=path)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno != errno.EWOULDBLOCK  # without locks, other processes cannot be kept away
    return True


def _is_named(fd: int, path: str) -> bool:
    """True while the name leads to the open file: other processes replace the file under that name."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(status, os.fstat(fd))
