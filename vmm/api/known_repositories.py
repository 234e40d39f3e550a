# SPDX-License-Identifier: Apache-2.0
"""In which repository a night may be written: the one that has been at its path so far, or a new one.

Decides by which paths a repository is known, and when one may be made: only where neither the machine nor its schedule
knows any (`INV-TARGET-KNOWN`). So a disk that is not mounted is a failure, and not a new repository in its empty mount
point. A repository that was moved is known under its new path after its first night there. A path may have several
repositories in turn, such as disks that are carried away: each of them is accepted once.

Must not know how a night is written. The repository's file system may hang: the caller's process may be stopped then.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection

from vhdkit import backups
from vmm.model.errors import Refused, VmmError
from vmm.model.paths import MachinePaths
from vmm.store.snapshots.store import load_tree

NEW = "--new-repository"  # the option that accepts what is at the path now


def names_of(path: str) -> tuple[str, ...]:
    """The paths by which a repository is known: as it was given, and where that leads now."""
    return tuple(dict.fromkeys((os.path.abspath(path), os.path.realpath(path))))


def known_to_machine(machine: MachinePaths, path: str) -> set[str]:
    """The ids of the repositories at this path in which the machine has nights. Raises VmmError."""
    return load_tree(machine).repositories_at(names_of(path))


def repository_for_night(
    name: str, path: str, known: Collection[str], *, accepts_new: bool = False, schedule: str | None = None
) -> backups.Repository:
    """Open the repository at a path, of which these ids are known. Make it if none is, or with `accepts_new`.

    `name` is the machine that is saved, `schedule` the schedule for which it is. Raises Refused if the repository is
    not a known one.
    """
    if accepts_new or not known:
        return backups.create_repository(path)
    try:
        return backups.open_known(path, known)
    except backups.UnexpectedRepository as error:
        words = ("run", name, path) if schedule is None else ("schedule", "run", schedule)
        raise Refused(
            error.problem,
            machine=name,
            path=error.path,
            hint=f"mount it, or accept what is there now: {shlex.join(('vmm', 'backup', *words, NEW))}",
        ) from error


def known_here(machine: MachinePaths | None, path: str, ids: Collection[str]) -> set[str]:
    """These ids, and those that the machine knows at this path, as far as its record can be read."""
    try:
        return set(ids) | (set() if machine is None else known_to_machine(machine, path))
    except VmmError:
        return set(ids)
