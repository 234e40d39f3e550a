# SPDX-License-Identifier: Apache-2.0
"""Reports about several machines of a repository, where the damage of one hides nothing about the others.

Decides what is reported of a machine whose records cannot be read. Must not know what the reports say (`reports`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TypeVar

from vhdkit import errors
from vhdkit.backup.documents import DamagedRepository
from vhdkit.backup.reports import SavedStatus, VerifyReport, report_status
from vhdkit.backup.repository import MachineFolder, Repository

_T = TypeVar("_T")


def _of_each(
    repository: Repository, words: Sequence[str], look: Callable[[MachineFolder], _T], unread: Callable[[str, str], _T]
) -> list[_T]:
    """What `look` finds in each machine, by names and ids, or in all; damage of one hides nothing about the others."""
    found = []
    for machine_id in [repository.find_machine(one) for one in words] or repository.machine_ids():
        try:
            with repository.machine(machine_id) as machine:
                found.append(look(machine))
        except (DamagedRepository, errors.InvalidArgument, errors.UnsupportedFormat) as error:
            found.append(unread(machine_id, str(error)))
    return found


def report_statuses(
    repository: Repository, machines: Sequence[str], *, since: datetime, now: datetime
) -> list[SavedStatus]:
    """The status of each of these machines, or of all. Raises NotFound, InvalidArgument for a word."""
    return _of_each(
        repository,
        machines,
        lambda machine: report_status(machine, since=since, now=now),
        lambda id, why: SavedStatus(id, id, False, None, None, None, {}, None, (), False, why),
    )


def report_verifications(
    repository: Repository, machines: Sequence[str], look: Callable[[MachineFolder], VerifyReport]
) -> list[VerifyReport]:
    """What `look` finds in each of these machines, or in all. Raises NotFound, InvalidArgument for a word."""
    return _of_each(repository, machines, look, lambda id, why: VerifyReport(id, id, (), (), (), 0, False, (), why))
