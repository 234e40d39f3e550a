# SPDX-License-Identifier: Apache-2.0
"""Folders in which no other user can change what a name leads to.

Decides which folders count as guarded: they, and every folder above them, belong to root or to our user, and no other
user may rename or replace anything on the way. What was checked there stays true, so a name can be used repeatedly
after the check, even by code that works only with names. Must not know why a caller asks.
"""

from __future__ import annotations

import os
import stat

from vhdkit.descriptor import close_owned, opened
from vhdkit.store import translated

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH  # with an access list, the group bits are its mask


def unguarded(folder: str) -> str | None:
    """Why another user could change what names in `folder`, a real path, lead to; None if no other user can.

    Raises NotFound, AccessDenied, and InvalidArgument where a part of it is a link.
    """
    trusted = {0, os.geteuid()}
    parts = [part for part in folder.split(os.sep) if part]
    with translated(folder, "examine the folder"):
        owned = opened(os.sep, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for depth in range(len(parts) + 1):
                path = os.sep + os.sep.join(parts[:depth])
                status = os.fstat(owned[0])
                if status.st_uid not in trusted:
                    return f"{path} belongs to user {status.st_uid}"
                # In a sticky folder others cannot rename our files, but they can add files of their own.
                is_sticky = bool(status.st_mode & stat.S_ISVTX) and depth < len(parts)
                if status.st_mode & _OTHERS_WRITE and not is_sticky:
                    return f"{path} is writable by users other than its owner"
                if depth < len(parts):
                    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                    below = opened(parts[depth], flags, dir_fd=owned[0])
                    close_owned(owned)
                    owned = below
            return None
        finally:
            close_owned(owned)


def unguarded_file(path: str) -> str | None:
    """Why another user could change this file, in a guarded folder; None if no other user can. Raises NotFound."""
    with translated(path, "examine"):
        owned = opened(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status = os.fstat(owned[0])
        finally:
            close_owned(owned)
    if status.st_uid not in {0, os.geteuid()}:
        return f"it belongs to user {status.st_uid}"
    return "it is writable by users other than its owner" if status.st_mode & _OTHERS_WRITE else None
