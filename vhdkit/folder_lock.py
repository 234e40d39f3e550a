# SPDX-License-Identifier: Apache-2.0
"""Folder locks: only one of our programs at a time makes a name that depends on what the folder contains.

Decides how a folder is locked and how long a caller waits. Must not know what is made in it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterable, Iterator

from vhdkit import errors
from vhdkit.descriptor import close_owned, opened
from vhdkit.folder import real_path
from vhdkit.waiting import looks

_LOCK_SECONDS, _LONG_SECONDS = 5.0, 60.0


@contextlib.contextmanager
def folders_held(directories: Iterable[str]) -> Iterator[None]:
    """Keep our other programs from making names in these folders that depend on what they contain.

    A folder that cannot be locked excludes nothing. Raises ImageInUse when another program takes too long.
    """
    with contextlib.ExitStack() as stack:
        for directory in sorted({real_path(directory or os.curdir) for directory in directories}):
            if not stack.enter_context(folder_held(directory, _LONG_SECONDS)):
                raise errors.ImageInUse(
                    "another program is creating images in this folder", path=directory, hint="wait until it has ended"
                )
        yield


@contextlib.contextmanager
def folder_held(directory: str, timeout_seconds: float = _LOCK_SECONDS) -> Iterator[bool]:
    """Keep our other programs out of this folder; yields False if it stays locked for so long.

    A folder that cannot be locked excludes nothing.
    """
    try:
        owned = opened(directory or os.curdir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # writable but not readable, or missing: later steps report that
        yield True
        return
    try:
        for _ in looks(timeout_seconds):
            try:
                fcntl.flock(owned[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno != errno.EWOULDBLOCK:
                    break
        else:
            yield False
            return
        yield True
    finally:
        close_owned(owned)
