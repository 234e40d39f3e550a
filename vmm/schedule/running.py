# SPDX-License-Identifier: Apache-2.0
"""One run of a schedule: hooks, then its jobs, several at once, and what became of them.

    lock taken, or the run is skipped and that is reported
      -> record: begun    a run that was killed has no end in it, and the next one reports that
      -> before           if it fails, no job is begun
      -> jobs             each a list of commands, the next one only if the one before succeeded
      -> on failure, after
      -> record: ended    times that were due meanwhile are reported as skipped

Decides this order, what counts as failed, and what a hook is told (`VMM_SCHEDULE`, `VMM_RESULT`, `VMM_REASON`). Each
command is a process of its own, so a job that fails, or hangs and is killed, does not affect the others. The processes
of jobs inherit the lock: after this process was killed no other run begins while one of them still works. Those of
hooks do not, because one may stay, such as that of a mount. Must not know what jobs do. The time is given.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice
from typing import IO, Final

from vmm.host.proc import BUSY_SECONDS, Lock, is_locked
from vmm.model.errors import InUse, of_os_error, printable
from vmm.model.events import read_events
from vmm.model.folders import in_use
from vmm.model.waiting import becomes
from vmm.schedule.definition import Schedule, Words
from vmm.schedule.places import SchedulePaths, schedule_paths
from vmm.schedule.record import LastRun, read_last, tell, try_write_last

PATIENCE_SECONDS = BUSY_SECONDS  # `is_running`, for a status, takes the lock for a moment, too
HOOK_SECONDS: Final = 3600.0  # enough to mount anything; a hook that waits for ever would stop every later run
_GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL, for a hook
_SAID_BYTES = 64 << 10  # of what a command says; its last part has the reason
_MAX_REASON_CHARACTERS = 1000
_MOST_REPORTED = 100  # skipped times of one run


@dataclass(frozen=True, slots=True)
class CommandFailure:
    """How a command failed: its exit code, None if it did not end by itself, and what it said."""

    code: int | None
    said: str


@dataclass(frozen=True, slots=True)
class JobStep:
    """A command, as an argument vector, and what it does in words; `meanings` of exit codes after which it prints no
    reason.
    """

    doing: str
    words: Words
    meanings: Mapping[int, str] = field(default_factory=dict)

    def reason_of(self, failure: CommandFailure) -> str:
        """Why it failed."""
        return failure.said if failure.code is None else self.meanings.get(failure.code, failure.said)


@dataclass(frozen=True, slots=True)
class ScheduledJob:
    """A job: its name, and the commands that do it, one after the other."""

    name: str
    steps: tuple[JobStep, ...]


Report = Callable[[str, str | None], None]
"""Called when a job has ended, in the main thread: its name, and why it failed or None."""


def now_utc() -> datetime:
    """The present time."""
    return datetime.now(UTC)


def is_running(name: str) -> bool:
    """True while a run of the schedule is under way."""
    return is_locked(schedule_paths(name).lock)


def run(
    schedule: Schedule,
    jobs: Sequence[ScheduledJob],
    *,
    now: Callable[[], datetime] = now_utc,
    report: Report = lambda job, problem: None,
) -> LastRun:
    """Do the jobs of a schedule once. Failures of jobs and hooks are in the result.

    Raises InUse, after recording it, while the last run is still going. KeyboardInterrupt is raised after the commands
    that it interrupted have ended.
    """
    place = schedule_paths(schedule.name)
    with _only_run(place, now) as lock:
        before = read_last(place)
        if before is not None and before.ended is None:
            tell(place, "lost", began=_word(before.began), reason="its process was killed, or the host went down")
        begun = LastRun(now())
        problem = try_write_last(place, begun)
        tell(place, "begun", jobs=[one.name for one in jobs], problem=None if problem is None else str(problem))
        work = _ScheduledRun(schedule, lock, report)
        try:
            found = work.do(begun, jobs)
        except BaseException:
            _end(schedule, place, replace(begun, ended=now(), problem="it was interrupted"))
            raise
        return _end(schedule, place, replace(found, ended=now()))


@contextlib.contextmanager
def _only_run(place: SchedulePaths, now: Callable[[], datetime]) -> Iterator[Lock]:
    """The lock of the schedule's runs. Raises InUse."""
    lock = Lock(place.lock)
    try:
        taken = becomes(lock.try_take, PATIENCE_SECONDS)
    except OSError as error:
        raise of_os_error(error, "lock the schedule", path=place.lock) from error
    if not taken:
        last = read_last(place)
        since = None if last is None else _word(last.began)
        tell(place, "skipped", due=_word(now()), reason="the last run is still going", began=since)
        raise InUse(
            f"the last run of schedule {place.name!r} is still going" + ("" if since is None else f", since {since}"),
            hint="this one is skipped",
        )
    try:
        yield lock
    finally:
        lock.release()


def _end(schedule: Schedule, place: SchedulePaths, found: LastRun) -> LastRun:
    """Record the end of a run, and what it was in the way of."""
    assert found.ended is not None
    ended = found.ended
    problem = try_write_last(place, found)
    if problem is not None and found.problem is None:
        found = replace(found, problem=f"its end could not be recorded: {problem}")
    if found.is_good:
        tell(place, "done", jobs=list(found.done))
    else:
        tell(place, "failed", jobs=list(found.problems), done=list(found.done), reason=found.reason)
    for due in _unreported(schedule, place, found.began, ended):
        reason = "the run that began before was still going"
        tell(place, "skipped", due=_word(due), reason=reason, began=_word(found.began))
    return found


def _unreported(schedule: Schedule, place: SchedulePaths, began: datetime, ended: datetime) -> Iterator[datetime]:
    """The times that were due while a run was going, and for which no other run began that has reported it."""
    calendar = schedule.calendar
    skipped = {str(one.details.get("due")) for one in read_events(place.events) if one.name == "skipped"}
    for due in islice(calendar.due_between(began, ended), _MOST_REPORTED):
        following = calendar.next_due(due)
        until = _word(following) if following is not None else "9"
        if not any(_word(due) <= one < until for one in skipped):
            yield due


class _ScheduledRun:
    """One run under way."""

    def __init__(self, schedule: Schedule, lock: Lock, report: Report) -> None:
        self._schedule, self._lock, self._report = schedule, lock, report
        self._guard = threading.Lock()
        self._is_over = False  # from then on no command is begun
        self._children: set[subprocess.Popen[bytes]] = set()

    def do(self, begun: LastRun, jobs: Sequence[ScheduledJob]) -> LastRun:
        """Hooks and jobs. What fails is in the result; an interruption is raised when the last hooks have ended."""
        try:
            found = self._worked(begun, jobs)
        except BaseException:
            self._is_over = False
            self._finished(replace(begun, problem="it was interrupted"))
            raise
        return self._finished(found)

    def _worked(self, found: LastRun, jobs: Sequence[ScheduledJob]) -> LastRun:
        problem = self._hooks("before", self._schedule.before, found)
        if problem is not None:
            return replace(found, problem=f"nothing was begun, because {problem}")
        done, problems = [], {}
        with contextlib.closing(self._ended(jobs)) as ended:  # if the report fails, commands end before the last hooks
            for job, why in ended:
                if why is None:
                    done.append(job.name)
                else:
                    problems[job.name] = why
                self._report(job.name, why)
        return replace(found, done=tuple(done), problems=problems)

    def _finished(self, found: LastRun) -> LastRun:
        has_failed = found.problem is not None or bool(found.problems)
        last = (("on-failure", self._schedule.on_failure if has_failed else ()), ("after", self._schedule.after))
        for name, hooks in last:
            if (problem := self._hooks(name, hooks, found)) is not None:
                found = replace(found, problem=problem if found.problem is None else f"{found.problem}; {problem}")
        return found

    def _ended(self, jobs: Sequence[ScheduledJob]) -> Generator[tuple[ScheduledJob, str | None]]:
        """Each job, and why it failed, as it ends."""
        with ThreadPoolExecutor(self._schedule.jobs) as pool:
            left: dict[Future[str | None], ScheduledJob] = {pool.submit(self._job, one): one for one in jobs}
            try:
                while left:
                    ended, _ = wait(left, return_when=FIRST_COMPLETED)
                    for one in ended:
                        yield left.pop(one), one.result()
            except BaseException:
                self._interrupt()
                raise

    def _job(self, job: ScheduledJob) -> str | None:
        for step in job.steps:
            problem = self._problem_of(step.words, seconds=None)
            if problem is not None:
                return f"{step.doing}: {step.reason_of(problem)}"
        return None

    def _interrupt(self) -> None:
        """Have every command that runs end as after a Ctrl-C; begin no other."""
        with self._guard:
            self._is_over = True
            for one in self._children:
                _signal(one, signal.SIGINT)

    def _hooks(self, name: str, hooks: Sequence[Words], found: LastRun) -> str | None:
        """Run hooks, one after the other, until one fails; returns why."""
        has_failed = found.problem is not None or bool(found.problems)
        environment = {
            "VMM_SCHEDULE": self._schedule.name,
            "VMM_RESULT": "begun" if name == "before" else "failed" if has_failed else "done",
            "VMM_REASON": found.reason,
        }
        for words in hooks:
            problem = self._problem_of(words, seconds=HOOK_SECONDS, environment=environment)
            if problem is not None:
                return f"the hook {words[0]} ({name}) failed: {problem.said}"
        return None

    def _problem_of(
        self, words: Words, *, seconds: float | None, environment: Mapping[str, str] | None = None
    ) -> CommandFailure | None:
        """Run one command of a job, or a hook, which has an environment; None if it succeeded."""
        with tempfile.TemporaryFile() as said:
            try:
                with self._guard:
                    if self._is_over:
                        return CommandFailure(None, "it was not begun: the run was interrupted")
                    child = subprocess.Popen(
                        words,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=said,
                        env={**os.environ, **in_use().environment(), **(environment or {})},
                        pass_fds=(self._lock.descriptor,) if environment is None else (),
                        start_new_session=True,  # it gets no Ctrl-C from a terminal, but our one signal
                    )
                    self._children.add(child)
            except OSError as error:
                return CommandFailure(None, f"{words[0]} could not be started: {error.strerror}")
            try:
                code = child.wait(seconds)
            except subprocess.TimeoutExpired:
                _end_group(child)
                return CommandFailure(None, f"it did not end within {seconds:.0f} s, and was killed")
            except BaseException:
                _signal(child, signal.SIGINT)
                if seconds is not None:  # a hook; a job takes back what it began, however long that takes
                    _end_group(child, after=_GRACE_SECONDS)
                child.wait()
                raise
            finally:
                with self._guard:
                    self._children.discard(child)
            return None if code == 0 else CommandFailure(code, _reason(said, code))


def _signal(child: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if child.poll() is None:
            os.killpg(child.pid, number)


def _end_group(child: subprocess.Popen[bytes], *, after: float = 0) -> None:
    """End a command that has not ended by itself `after` some seconds."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(after)
        return
    _signal(child, signal.SIGTERM)
    try:
        child.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        _signal(child, signal.SIGKILL)
        child.wait()


def _reason(said: IO[bytes], code: int) -> str:
    """What a command that failed said last; the message of an error that was printed as JSON."""
    said.seek(max(0, said.seek(0, os.SEEK_END) - _SAID_BYTES))
    lines = [line for line in said.read(_SAID_BYTES).decode(errors="replace").splitlines() if line.strip()]
    if not lines:
        return f"it was ended by signal {-code}" if code < 0 else f"exit code {code}"
    words = lines[-1].strip()
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        words = str(json.loads(words)["error"]["message"])
    return printable(words)[:_MAX_REASON_CHARACTERS]


def _word(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
