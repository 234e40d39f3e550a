# SPDX-License-Identifier: Apache-2.0
"""The files of a schedule, and which names schedules may have.

home/schedules/NAME.json  NAME.last.json  NAME.events.jsonl  NAME.lock
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from vmm.model.errors import InvalidSpec
from vmm.model.paths import schedules_folder

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,47}")  # also part of the names of files and units


@dataclass(frozen=True, slots=True)
class SchedulePaths:
    """The files of one schedule. Made by `schedule_paths`."""

    name: str

    def _path(self, ending: str) -> str:
        return os.path.join(schedules_folder(), f"{self.name}.{ending}")

    @property
    def document(self) -> str:
        """The schedule as JSON (`vmm.schedule.definition`)."""
        return self._path("json")

    @property
    def last(self) -> str:
        """What became of the last run (`vmm.schedule.record`)."""
        return self._path("last.json")

    @property
    def events(self) -> str:
        """What happened, one JSON object per line."""
        return self._path("events.jsonl")

    @property
    def lock(self) -> str:
        """Held (flock) by a run and by the commands that it has started."""
        return self._path("lock")


def schedule_paths(name: str) -> SchedulePaths:
    """The files of a schedule. Raises InvalidSpec for what cannot be its name."""
    if not _NAME.fullmatch(name):
        raise InvalidSpec(
            f"{name!r} cannot be the name of a schedule: use at most 48 of a-z, A-Z, 0-9, '_' and '-',"
            " a letter or digit first"
        )
    return SchedulePaths(name)
