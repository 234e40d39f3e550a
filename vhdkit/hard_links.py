# SPDX-License-Identifier: Apache-2.0
"""Several names of one file.

Decides how a file gets a second name, and when two names are certainly names of one file, so that either may be
removed. Must not know what the file is, nor which of its names is wanted.
"""

from __future__ import annotations

import errno
import os
import stat

from vhdkit.descriptor import close_owned, opened
from vhdkit.wording import translated

NO_HARD_LINKS = frozenset((errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK))  # the file system's answers
_FDINFO = "/proc/self/fdinfo/{}"


def hard_link(path: str, new_path: str) -> bool:
    """Give a file a second name, which must be free; False if the file system cannot. The folder is not synced."""
    with translated(new_path, "name the file"):
        try:
            os.link(path, new_path, follow_symlinks=False)
        except OSError as error:
            if error.errno in {*NO_HARD_LINKS, errno.EXDEV}:
                return False
            raise
    return True


def are_two_names(path: str, other: str) -> bool:
    """True if these are two names of one regular file, of which either may be removed. The names may not be links.

    False for one name that is seen in two places, because a folder or the file itself is mounted again: each name must
    lie on the mount of its folder, and both on the same one.
    """
    try:
        file, mount = _seen(path, os.O_NOFOLLOW)
        same_file, *mounts = _seen(other, os.O_NOFOLLOW)
        folder, folder_mount = _seen(os.path.dirname(path) or os.curdir)
        other_folder, other_mount = _seen(os.path.dirname(other) or os.curdir)
    except OSError:
        return False
    if not stat.S_ISREG(file.st_mode) or not os.path.samestat(file, same_file) or file.st_nlink < 2:
        return False
    return not os.path.samestat(folder, other_folder) and {mount} == {*mounts, folder_mount, other_mount}


def _seen(path: str, flags: int = 0) -> tuple[os.stat_result, str]:
    """What a name leads to, and the number of its mount, as the kernel writes it. Raises OSError."""
    owned = opened(path, os.O_PATH | os.O_CLOEXEC | flags)
    try:
        with open(_FDINFO.format(owned[0]), encoding="utf-8") as lines:
            return os.fstat(owned[0]), next(line for line in lines if line.startswith("mnt_id:"))
    except StopIteration:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    finally:
        close_owned(owned)
