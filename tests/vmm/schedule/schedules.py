# SPDX-License-Identifier: Apache-2.0
"""Schedules for tests, and a clock that only moves when it is told to."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from vmm.model.events import read_events
from vmm.schedule.definition import Schedule, make_schedule
from vmm.schedule.places import schedule_paths
from vmm.schedule.running import JobStep, ScheduledJob

CREATED = datetime(2026, 11, 1, 12, tzinfo=UTC)


class Clock:
    """A clock; each call of it moves it by `step`."""

    def __init__(self, moment: datetime = CREATED, step: timedelta = timedelta()) -> None:
        self.moment, self.step = moment, step

    def __call__(self) -> datetime:
        """The time."""
        moment = self.moment
        self.moment += self.step
        return moment


def made(name: str = "nightly", **changes: object) -> Schedule:
    """A schedule for 22:30 every day."""
    fields: dict[str, object] = {"name": name, "kind": "test", "when": "22:30", "created": CREATED, "work": {}}
    return make_schedule(**{**fields, **changes})


def shell(line: str) -> tuple[str, ...]:
    """The argument vector that has a shell do this."""
    return ("sh", "-c", line)


def job(name: str, *lines: str) -> ScheduledJob:
    """A job that runs lines of shell, one after the other."""
    return ScheduledJob(name, tuple(JobStep(f"step {number}", shell(line)) for number, line in enumerate(lines, 1)))


def happened(name: str = "nightly") -> Iterator[tuple[str, dict[str, object]]]:
    """The schedule's events: names and details."""
    for one in read_events(schedule_paths(name).events):
        yield one.name, dict(one.details)


def appended(path: object, word: str) -> str:
    """A line of shell that appends a word to a file."""
    return f"echo {word} >>{shlex.quote(str(path))}"
