# SPDX-License-Identifier: Apache-2.0
"""Folders in which one program of ours works at a time, because a name it makes depends on what lies there.

Decides how a folder is locked, and for how long one waits. Must not know what is made in it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterable, Iterator

from vhdkit import errors
from vhdkit.descriptor import close_owned, opened
from vhdkit.folder import real_path

_TRIES, _LONG_TRIES, _TRY_SECONDS = 250, 3000, 0.02  # 5 s, a minute


@contextlib.contextmanager
def folders_held(directories: Iterable[str]) -> Iterator[None]:
    """No other program of ours makes names in these folders meanwhile that depend on what lies there.

    A folder that cannot be locked stops no one. Raises ImageInUse when another program takes too long.
    """
    with contextlib.ExitStack() as stack:
        for directory in sorted({real_path(directory or os.curdir) for directory in directories}):
            if not stack.enter_context(folder_held(directory, _LONG_TRIES)):
                raise errors.ImageInUse(
                    "another program is making images in this folder", path=directory, hint="wait until it has ended"
                )
        yield


@contextlib.contextmanager
def folder_held(directory: str, tries: int = _TRIES) -> Iterator[bool]:
    """No other program of ours is here in this folder at the same time; False after so many tries.

    A folder that cannot be locked stops no one.
    """
    try:
        owned = opened(directory or os.curdir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # one may write to it but not read it, or it is not there: that is for others to say
        yield True
        return
    try:
        for _ in range(tries):
            try:
                fcntl.flock(owned[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno != errno.EWOULDBLOCK:
                    break
                time.sleep(_TRY_SECONDS)
        else:
            yield False
            return
        yield True
    finally:
        close_owned(owned)
