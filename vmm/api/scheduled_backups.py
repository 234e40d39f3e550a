# SPDX-License-Identifier: Apache-2.0
"""Backups on a schedule: which commands save its machines, and whether there are the nights that there should be.

Decides what the work of a schedule of the kind "backup" consists of, and what counts as late. Must not know when a
schedule is due, nor how a run goes (`vmm.schedule`).

    a machine's job     save it -> prune its nights, if there are rules -> verify a sample, if that was requested

A machine is late if its newest whole night was taken before the schedule's last due moment, once the grace has passed.
So a timer that was never enabled, a run that failed and a host that was off look alike, and a night that was saved by
hand counts as well. The reason is looked up in the record of the last run.

A schedule knows its repository by its id: as it is found when the schedule is added, or after the first night. While
another one is at its path, or none, its machines are not saved (`known_repositories`), and none of them is good.
"""

from __future__ import annotations

import contextvars
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import vhdkit
from vhdkit import backups
from vmm.api.known_repositories import NEW, known_here
from vmm.model.complaints import words_of
from vmm.model.errors import InvalidSpec, TimedOut, VmmError, store_error
from vmm.model.paths import MachinePaths
from vmm.schedule import store
from vmm.schedule.definition import Schedule, make_schedule
from vmm.schedule.places import schedule_paths
from vmm.schedule.record import read_last
from vmm.schedule.running import JobStep, ScheduledJob, is_running
from vmm.schedule.timer import installed
from vmm.store import registry

_T = TypeVar("_T")
KIND: Final = "backup"
ANSWER_SECONDS = 60.0  # for a slow disk with many nights; a file server that is away may never answer
KEEP_RULES: Final = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
_DAMAGED, _BUSY = 3, 5  # exit codes of `vmm backup verify`
State = Literal["good", "late", "new", "damaged", "missing", "unknown"]
"""Of a machine: it has the night that it should have, lacks it, was not due yet, has a damaged one, its repository is
not where it is known to be, or it is unknown."""
_MAX_IDS = 16  # of repositories that take turns, such as disks that are carried away


class BackupWork(BaseModel):
    """What a schedule saves: machines by name, none for all that there are when it runs, into a repository. `ids` are
    the ids of the machines when the schedule was made, by name: one that was renamed is still meant.

    `keep` are the rules of the prune after each night, none to keep all; days begin in the schedule's zone.
    `sample_percent` of the images are verified after that. `repository_ids` are those of the repositories that are
    known at the path, the newest last.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    machines: tuple[str, ...] = ()
    ids: dict[str, str] = {}
    repository: str
    repository_ids: tuple[str, ...] = Field(default=(), max_length=_MAX_IDS)
    consistent: bool = False
    with_memory: bool = False
    compare: bool = False
    full_every: int | None = Field(default=None, ge=1)
    keep_free_bytes: int = Field(default=0, ge=0)
    max_rate_bytes: int | None = Field(default=None, ge=1024)
    keep: dict[Literal["last", "hourly", "daily", "weekly", "monthly", "yearly"], int] = {}
    sample_percent: int | None = Field(default=None, ge=1, le=100)


@dataclass(frozen=True, slots=True)
class MachineNights:
    """A machine of a schedule: its state, in words why, and its newest whole night if the repository has one."""

    machine: str
    state: State
    words: str
    newest_whole: int | None = None
    taken: str | None = None
    age_seconds: int | None = None


@dataclass(frozen=True, slots=True)
class ScheduleStatus:
    """A schedule and its machines. Times are UTC; `needed_since` is when a night must have been taken, at the latest.

    `problem` is why nothing is known about it. `last_problem`: why the last run failed, or that it did not end.
    """

    name: str
    repository: str | None
    when: str
    zone: str
    next_due: datetime | None
    needed_since: datetime | None
    timer: str | None
    is_running: bool
    last_began: datetime | None
    last_ended: datetime | None
    last_problem: str | None
    machines: tuple[MachineNights, ...]
    problem: str | None = None

    @property
    def is_good(self) -> bool:
        """True if nothing is late, damaged or unknown."""
        return self.problem is None and all(one.state in ("good", "new") for one in self.machines)

    @property
    def is_damaged(self) -> bool:
        """True if a night of one of its machines is damaged."""
        return any(one.state == "damaged" for one in self.machines)


def make_backup_schedule(
    work: Mapping[str, object], replaced: Schedule | None = None, /, **fields: object
) -> Schedule:
    """A new schedule for backups, in place of the one `replaced`; `fields` are those of `Schedule`.

    Raises InvalidSpec, NotFound for a machine.
    """
    try:
        found = BackupWork.model_validate(work)
    except ValidationError as error:
        raise InvalidSpec(words_of(error)) from error
    ids = {name: registry.load(name).spec.id for name in found.machines}
    path = os.path.abspath(found.repository)
    known = () if replaced is None else _ids_in(replaced, path)
    found = found.model_copy(update={"repository": path, "ids": ids, "repository_ids": known or _ids_at(path)})
    return make_schedule(kind=KIND, work=found.model_dump(mode="json", exclude_defaults=True), **fields)


def work_of(schedule: Schedule) -> BackupWork:
    """What a schedule saves. Raises InvalidSpec for a schedule of another kind."""
    if schedule.kind != KIND:
        raise InvalidSpec(f"schedule {schedule.name!r} is for something else: {schedule.kind}")
    try:
        return BackupWork.model_validate(schedule.work)
    except ValidationError as error:
        raise InvalidSpec(f"schedule {schedule.name!r} cannot be used: {words_of(error)}") from error


def _ids_in(schedule: Schedule, path: str) -> tuple[str, ...]:
    """The ids that a schedule knows at a path."""
    work = work_of(schedule)
    return work.repository_ids if _is_same(work.repository, path) else ()


def _is_same(path: str, other: str) -> bool:
    return path == os.path.abspath(other) or os.path.realpath(path) == os.path.realpath(other)


def _ids_at(path: str) -> tuple[str, ...]:
    """The id of the repository that is at a path now; empty if there is none, or it does not answer."""

    def look() -> tuple[str, ...]:
        with backups.open_repository(path) as repository:
            return (repository.id,)

    try:
        return _in_time(look, path)
    except (vhdkit.VhdkitError, TimedOut):
        return ()


def known_ids(schedule: str, path: str) -> set[str]:
    """The ids of the repositories that a schedule knows at a path. Raises NotFound, InvalidSpec."""
    return set(_ids_in(store.load(schedule), path))


def note_repository(schedule: str, path: str, repository_id: str) -> None:
    """Record durably that a repository was found where the schedule has it. Raises NotFound, NoSpace, AccessDenied."""

    def changed(stored: Schedule) -> Schedule:
        work = work_of(stored)
        if not _is_same(work.repository, path) or work.repository_ids[-1:] == (repository_id,):
            return stored
        ids = (*(one for one in work.repository_ids if one != repository_id), repository_id)[-_MAX_IDS:]
        return stored.model_copy(update={"work": {**stored.work, "repository_ids": list(ids)}})

    store.change(schedule, changed)


def machines_of(work: BackupWork) -> list[str]:
    """The machines that are saved now, by their present names; one that is gone by the name that it had."""
    if not work.machines:
        return registry.names()
    present = {one.spec.id: one.name for one in registry.load_all()[0]}
    return list(dict.fromkeys(present.get(work.ids.get(name, ""), name) for name in work.machines))


def jobs_of(schedule: Schedule, command: Sequence[str], *, accepts_new: bool = False) -> list[ScheduledJob]:
    """A job for each machine; `command` runs vmm. `accepts_new`: another repository than the known one is accepted.

    Raises InvalidSpec.
    """
    work, words = work_of(schedule), tuple(command)
    return [
        ScheduledJob(name, tuple(_steps(schedule, work, name, words, accepts_new=accepts_new)))
        for name in machines_of(work)
    ]


def _steps(
    schedule: Schedule, work: BackupWork, name: str, command: tuple[str, ...], *, accepts_new: bool
) -> list[JobStep]:
    options = [NEW] if accepts_new else []
    flags = (work.consistent, "--consistent"), (work.with_memory, "--with-memory"), (work.compare, "--compare")
    options += [word for given, word in flags if given]
    if work.full_every is not None:
        options += ["--full-every", str(work.full_every)]
    if work.keep_free_bytes:
        options += ["--keep-free", str(work.keep_free_bytes)]
    if work.max_rate_bytes is not None:
        options += ["--limit", str(work.max_rate_bytes)]
    words = ("backup", "run", "--schedule", schedule.name, "--json", *options, "--", name, work.repository)
    steps = [JobStep("backup", (*command, *words))]
    in_repository = _id_of(name) or name
    if work.keep:
        rules = [word for rule, count in work.keep.items() for word in (f"--keep-{rule}", str(count))]
        words = ("backup", "prune", "--json", *rules, "--zone", schedule.zone, "--", work.repository, in_repository)
        steps.append(JobStep("prune", (*command, *words)))
    if work.sample_percent is not None:
        words = ("backup", "verify", "--json", "--sample", str(work.sample_percent), "--", work.repository)
        meanings = {
            _DAMAGED: f"a night is damaged: vmm backup status {work.repository} names it",
            _BUSY: "an image was in use",
        }
        steps.append(JobStep("verify", (*command, *words, in_repository), meanings))
    return steps


def _paths_of(name: str) -> MachinePaths | None:
    """The files of a machine of this host; None if it does not exist or cannot be read."""
    try:
        return registry.load(name).paths
    except VmmError:
        return None


def _id_of(name: str) -> str | None:
    """The id of a machine of this host, by which the repository knows it; None if there is no such machine."""
    try:
        return registry.load(name).spec.id
    except VmmError:
        return None


# -- did it work? ---------------------------------------------------------------------------------------------------


def status(now: datetime, names: Sequence[str] = ()) -> list[ScheduleStatus]:
    """All schedules of backups, or those with these names. Raises NotFound; what cannot be judged is in the result."""
    found = []
    for name in names or store.names():
        try:
            schedule = store.load(name)
        except VmmError as error:
            if names:
                raise
            found.append(_unreadable(name, error))
            continue
        if schedule.kind == KIND:
            found.append(_status(schedule, now))
    return found


def _unreadable(name: str, error: VmmError) -> ScheduleStatus:
    return ScheduleStatus(name, None, "", "", None, None, None, False, None, None, None, (), str(error))


def _status(schedule: Schedule, now: datetime) -> ScheduleStatus:
    last, going = read_last(schedule_paths(schedule.name)), is_running(schedule.name)
    since = schedule.needed_since(now)
    repository, machines, problem = None, list[MachineNights](), None
    last_problem = None if last is None else last.reason or None
    if last is not None and last.ended is None and not going:
        last_problem = "the run did not end: its process was killed, or the host went down"
    try:
        work = work_of(schedule)
        repository = work.repository
        machines = _in_time(lambda: _machines(schedule, work, since, now), work.repository)
    except VmmError as error:
        problem = str(error)
    return ScheduleStatus(
        schedule.name, repository, schedule.when, schedule.zone, schedule.calendar.next_due(now), since,
        installed(schedule.name), going, None if last is None else last.began, None if last is None else last.ended,
        last_problem, tuple(machines), problem,
    )  # fmt: skip


def _in_time(look: Callable[[], _T], repository: str) -> _T:
    """What `look` returns. Raises TimedOut if the repository's file system does not answer: a status always ends."""
    answers: queue.SimpleQueue[tuple[_T] | BaseException] = queue.SimpleQueue()
    context = contextvars.copy_context()  # the folders in use

    def ask() -> None:
        try:
            answers.put((context.run(look),))
        except BaseException as error:
            answers.put(error)

    threading.Thread(target=ask, name="status of a repository", daemon=True).start()
    try:
        found = answers.get(timeout=ANSWER_SECONDS)
    except queue.Empty:
        raise TimedOut(f"does not answer within {ANSWER_SECONDS:.0f} s", path=repository) from None
    if isinstance(found, BaseException):
        raise found
    return found[0]


def _machines(schedule: Schedule, work: BackupWork, since: datetime | None, now: datetime) -> list[MachineNights]:
    def expected(name: str) -> set[str]:
        return known_here(_paths_of(name), work.repository, work.repository_ids)

    def judged(name: str) -> MachineNights:
        """A machine, in the repository that it should be in."""
        if not (known := expected(name)):
            opened = backups.open_repository(work.repository)
        else:
            opened = backups.open_known(work.repository, known)
        with opened as repository:
            return _machine(repository, schedule, name, since, now)

    found = []
    for name in machines_of(work):
        try:
            found.append(judged(name))
        except backups.UnexpectedRepository as error:
            words = f"{error.path} {error.problem}" + _why_gone(schedule, name, since)
            found.append(MachineNights(name, "missing", words))
        except vhdkit.NotFound:
            if since is None:  # the first run makes it
                found.append(MachineNights(name, "new", "not due yet"))
            else:
                words = f"no night, and no repository at {work.repository}" + _why_gone(schedule, name, since)
                found.append(MachineNights(name, "late", words))
        except vhdkit.VhdkitError as error:
            raise store_error(error) from error
    return found


def _machine(
    repository: backups.Repository, schedule: Schedule, name: str, since: datetime | None, now: datetime
) -> MachineNights:
    """The state of one machine in an open repository."""
    try:
        machine_id = _id_of(name)
        if machine_id is None or machine_id not in repository.machine_ids():
            machine_id = repository.find_machine(name)
        with repository.machine(machine_id) as machine:
            found = backups.report_status(machine, since=since or now - timedelta(days=36_500), now=now)
    except vhdkit.NotFound:
        if since is None:
            return MachineNights(name, "new", "not due yet")
        return MachineNights(name, "late", "no night" + _why(schedule, name))
    except vhdkit.VhdkitError as error:
        return MachineNights(name, "unknown", str(error))
    state: State
    if found.damaged_nights:
        state, words = "damaged", "; ".join([found.words, *found.notes])
    elif found.is_good:
        state, words = "good", found.words
    elif since is None and found.newest_whole is None:
        state, words = "new", "not due yet"
    else:
        state, words = "late", found.words + _why(schedule, name)
    return MachineNights(name, state, words, found.newest_whole, found.taken, found.age_seconds)


def _why_gone(schedule: Schedule, name: str, since: datetime | None) -> str:
    """As `_why`, where the repository is missing: a hook may have mounted it for the run alone."""
    last = read_last(schedule_paths(schedule.name))
    if last is not None and name in last.done and (since is None or last.began >= since):
        return f"; the run at {last.began:%Y-%m-%d %H:%M} UTC saved it: is the repository mounted?"
    return _why(schedule, name)


def _why(schedule: Schedule, name: str) -> str:
    """Why the last run did not save a machine, to complete a sentence; empty if that is not known."""
    last = read_last(schedule_paths(schedule.name))
    if last is None:
        return "; the schedule has never run"
    reason = last.problems.get(name) or last.problem
    return f"; the run at {last.began:%Y-%m-%d %H:%M} UTC failed: {reason}" if reason else ""
