# SPDX-License-Identifier: Apache-2.0
"""Predicts whether a file can be removed or created, without trying.

Decides what prevents a removal: permissions, sticky folders, file attributes, read-only file systems. Must not know
why a file is to be removed.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import stat

from vhdkit import errors
from vhdkit.descriptor import close_owned, opened
from vhdkit.store import translated

_FS_IOC_GETFLAGS = 0x80086601
_MAX_PATH_BYTES, _MAX_NAME_BYTES = 4096, 255  # PATH_MAX, its zero byte counted, and NAME_MAX of Linux
_IMMUTABLE, _APPEND_ONLY = 0x10, 0x20


def check_removable(path: str) -> None:
    """Raise AccessDenied if removing the file at `path` would fail. A missing file is fine."""
    folder = os.path.dirname(path) or os.curdir
    with translated(path, "examine"):
        try:
            status, around = os.lstat(path), os.stat(folder)
        except FileNotFoundError:
            return
    problem = None
    if _flags_of(path) & (_IMMUTABLE | _APPEND_ONLY):
        problem = "is marked immutable or append-only (see `lsattr`)"
    elif _flags_of(folder) & (_IMMUTABLE | _APPEND_ONLY):
        problem = "is in a folder that is marked immutable or append-only (see `lsattr -d`)"
    elif not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        problem = "is in a folder without write permission"
    elif around.st_mode & stat.S_ISVTX and os.geteuid() not in (0, status.st_uid, around.st_uid):
        problem = "belongs to another user, in a folder where only owners may remove files"
    if problem is not None:
        raise errors.AccessDenied(
            f"{problem}: it could not be removed at the end, so the operation is not started",
            path=path,
            hint="first get the permission to remove it",
        )


def check_folder(folder: str, path: str) -> None:
    """Check that a file can be created in `folder` under the name in `path`, found there again, and removed.

    Raises AccessDenied if nothing there can be renamed or removed, and InvalidArgument if the folder is so deep that
    the full path of a file, or of the records beside it, would exceed the limit: its children could not find it.
    """
    with translated(path, "find the folder of"):
        folder_bytes = len(os.fsencode(os.path.realpath(folder or os.curdir)))
    if folder_bytes + 1 + _MAX_NAME_BYTES >= _MAX_PATH_BYTES:
        raise errors.InvalidArgument(
            f"the path of its folder has {folder_bytes} bytes, which leaves no space for a file name: a path may"
            f" have at most {_MAX_PATH_BYTES}",
            path=path,
            hint="choose a folder with a shorter path",
        )
    if _flags_of(folder or os.curdir) & (_IMMUTABLE | _APPEND_ONLY):
        raise errors.AccessDenied(
            "its folder is marked immutable or append-only, so no file in it can be removed (see `lsattr -d`)",
            path=path,
            hint="choose another folder",
        )


def _flags_of(path: str) -> int:
    """The attributes that `lsattr` shows; 0 if there are none or they cannot be read."""
    with contextlib.suppress(OSError):
        owned = opened(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            raw = array.array("L", [0])
            fcntl.ioctl(owned[0], _FS_IOC_GETFLAGS, raw)
            return raw[0] & 0xFFFFFFFF
        finally:
            close_owned(owned)
    return 0
