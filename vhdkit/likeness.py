# SPDX-License-Identifier: Apache-2.0
"""Who may read a new file.

Decides mode and owner of a file under construction, from the file that it replaces or the files it is made from
(`INV-NEW-PRIVATE`). Must not know names or contents. A file system without modes is not a failure.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence

PRIVATE = 0o600


def set_mode(fd: int, mode: int) -> None:
    """Give the file this mode, regardless of the umask."""
    with contextlib.suppress(OSError):
        os.fchmod(fd, mode)


def take_over(fd: int, old: os.stat_result) -> None:
    """Give a new file the mode and, where permitted, the owner of the one it replaces, so that secrets stay secret."""
    with contextlib.suppress(OSError):
        os.fchown(fd, old.st_uid, old.st_gid)
    set_mode(fd, stat.S_IMODE(old.st_mode))


def resemble(fd: int, sources: Sequence[os.stat_result]) -> None:
    """Grant read access to a new file only to users who can read every source; its owner may also write to it.

    If all sources have one owner, the file gets that owner where permitted.
    """
    users, groups = {one.st_uid for one in sources}, {one.st_gid for one in sources}
    group_wanted = sources[0].st_gid if len(groups) == 1 else -1
    for user in (sources[0].st_uid if len(users) == 1 else -1, -1):
        with contextlib.suppress(OSError):
            os.fchown(fd, user, group_wanted)
            break
    group_id = os.fstat(fd).st_gid
    group = others = 0o6
    for one in sources:
        of_group, of_others = one.st_mode >> 3, one.st_mode
        if one.st_gid != group_id:  # each of our classes may contain members and non-members of its group
            of_group = of_others = of_group & of_others
        group, others = group & of_group, others & of_others
    set_mode(fd, PRIVATE | group << 3 | others)
