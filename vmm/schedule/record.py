# SPDX-License-Identifier: Apache-2.0
"""What became of a schedule's runs: the last one, as a document, and all of them, as events.

Decides what is recorded before a run begins and after it has ended, so that a run that was killed is known as one that
has not ended. The document is durable; events are for people.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from vmm.model.errors import VmmError
from vmm.model.events import add_event
from vmm.model.paths import write_whole
from vmm.schedule.places import SchedulePaths

MAX_RECORD_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class LastRun:
    """The last run: when it began and ended, in UTC; None if it has not. `problems`: why a job failed, by its name;
    `problem`: why the run did apart from its jobs.
    """

    began: datetime
    ended: datetime | None = None
    done: tuple[str, ...] = ()
    problems: Mapping[str, str] = field(default_factory=dict)
    problem: str | None = None

    @property
    def is_good(self) -> bool:
        """True if it has ended and nothing failed."""
        return self.ended is not None and not self.problems and self.problem is None

    @property
    def reason(self) -> str:
        """Why it failed, in words; empty if nothing has."""
        words = [self.problem] if self.problem else []
        return "; ".join([*words, *(f"{job}: {why}" for job, why in self.problems.items())])


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    began: datetime
    ended: datetime | None = None
    done: tuple[str, ...] = ()
    problems: dict[str, str] = {}
    problem: str | None = None


def read_last(place: SchedulePaths) -> LastRun | None:
    """The last run; None if there was none, or its record cannot be read."""
    try:
        with open(place.last, "rb") as file:
            found = _Document.model_validate_json(file.read(MAX_RECORD_BYTES))
        return LastRun(
            _utc(found.began), None if found.ended is None else _utc(found.ended), found.done, found.problems,
            found.problem,
        )  # fmt: skip
    except (OSError, ValidationError, ValueError):
        return None


def _utc(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise ValueError("the time lacks its zone")
    return moment.astimezone(UTC)


def write_last(place: SchedulePaths, run: LastRun) -> None:
    """Record the last run, durably. Raises NoSpace, AccessDenied."""
    document = _Document(
        began=run.began, ended=run.ended, done=run.done, problems=dict(run.problems), problem=run.problem
    )
    write_whole(place.last, document.model_dump_json(indent=2).encode() + b"\n")


def try_write_last(place: SchedulePaths, run: LastRun) -> VmmError | None:
    """The same; returns what prevents it, such as a full disk: work goes on all the same."""
    try:
        write_last(place, run)
    except VmmError as error:
        return error
    return None


def tell(place: SchedulePaths, event: str, **details: Any) -> None:
    """Append an event of the schedule."""
    add_event(place.events, event, **details)
