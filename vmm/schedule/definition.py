# SPDX-License-Identifier: Apache-2.0
"""What a schedule is: its name, when it is due, how many jobs run at once, its hooks, and its work. Pure.

Decides the fields of a schedule's document. `kind` and `work` belong to the room that knows what is done, such as
`vmm.api.scheduled_backups`; nothing here looks into them. A hook is an argument vector, never a line for a shell.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vmm.model.complaints import words_of
from vmm.model.errors import InvalidSpec
from vmm.schedule.calendar import Calendar, parse
from vmm.schedule.places import schedule_paths

MAX_JOBS: Final = 64
MAX_HOOKS: Final = 32
GRACE: Final = timedelta(hours=6)  # from the time when a run is due until its work is missed
_AN_HOUR = 3600

Words = tuple[str, ...]


class Schedule(BaseModel):
    """A schedule. `when` and `zone` are as in `calendar`, `created` is UTC.

    `before` is run before the jobs, which are not begun if it fails; `after` in any case once `before` has begun;
    `on_failure` when anything failed. `late_after_seconds`: how long after it was due the work may still be missing,
    None for the usual time.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    name: str
    kind: str = Field(pattern=r"^[a-z-]{1,32}$")
    when: str = Field(max_length=200)
    zone: str = Field(default="UTC", max_length=64)
    created: datetime
    jobs: int = Field(default=1, ge=1, le=MAX_JOBS)
    before: tuple[Words, ...] = Field(default=(), max_length=MAX_HOOKS)
    after: tuple[Words, ...] = Field(default=(), max_length=MAX_HOOKS)
    on_failure: tuple[Words, ...] = Field(default=(), max_length=MAX_HOOKS)
    late_after_seconds: int | None = Field(default=None, ge=60, le=366 * 24 * _AN_HOUR)
    work: dict[str, Any]

    @field_validator("created")
    @classmethod
    def _has_zone(cls, created: datetime) -> datetime:
        if created.tzinfo is None:
            raise ValueError("the time lacks its zone")
        return created.astimezone(UTC)

    @field_validator("before", "after", "on_failure")
    @classmethod
    def _are_commands(cls, hooks: tuple[Words, ...]) -> tuple[Words, ...]:
        for one in hooks:
            if not one or not one[0] or any("\0" in word for word in one):
                raise ValueError("a hook is a program and its arguments")
        return hooks

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        try:
            schedule_paths(self.name)
            _ = self.calendar
        except InvalidSpec as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def calendar(self) -> Calendar:
        """When it is due."""
        return parse(self.when, self.zone, now=self.created)

    def grace(self, now: datetime) -> timedelta:
        """How long after it was due its work may still be missing: half of the time between two runs at most."""
        if self.late_after_seconds is not None:
            return timedelta(seconds=self.late_after_seconds)
        calendar = self.calendar
        last = calendar.last_due(now)
        following = calendar.next_due(now)
        period = GRACE * 2 if last is None or following is None else following - last
        return min(GRACE, period / 2)

    def needed_since(self, now: datetime) -> datetime | None:
        """When the work must have been done, at the latest, for nothing to be late; None if nothing was due yet."""
        due = self.calendar.last_due(now - self.grace(now))
        return None if due is None or due < self.created else due

    def document(self) -> bytes:
        """As it is stored."""
        return self.model_dump_json(indent=2).encode() + b"\n"


def read_schedule(content: bytes, path: str) -> Schedule:
    """The schedule in a document. Raises InvalidSpec."""
    try:
        return Schedule.model_validate_json(content)
    except ValidationError as error:
        raise InvalidSpec(f"is not a schedule: {words_of(error)}", path=path) from error


def make_schedule(**fields: object) -> Schedule:
    """A new schedule. Raises InvalidSpec."""
    try:
        return Schedule.model_validate(fields)
    except ValidationError as error:
        raise InvalidSpec(words_of(error)) from error
