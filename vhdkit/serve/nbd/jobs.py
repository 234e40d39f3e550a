# SPDX-License-Identifier: Apache-2.0
"""Jobs: which client's work runs next on the workers, and when work must wait so that others are served.

Decides the order of jobs (clients take turns, slice by slice), how many run at once, and that none of a held export
begins. Must not know what a job does or how it is answered.

A job that has not begun waits here and not in a worker's queue, so a hold (`NbdServer.hold`) waits only for the slices
that are running, however many jobs there are. `Export.jobs` counts those slices (and flushes); a job of a held export
waits in `Export.parked`.

    add --> the client's queue --its turn--> a slice on a worker --> done
                  ^                                 |
                  `----------- more is left --------'

Most slices of the lanes in `_UNCOMMON` are Python code, for which they take the interpreter from the loop, or hold the
disk's lock against writers. While other clients are served on the loop, one of them runs at a time, and the next
begins when their `Share` of the time allows it. The clients on the loop thus keep most of the time, and a client that
is alone has all of it.

A job may have an `attempt`, which the loop makes when it is the job's turn: work that needs no waiting costs less
there than the switches to a worker and back. If it would have to wait for a device, and word of that can be had
(`Loop.ask`), the attempt is made once more when word comes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeAlias

from vhdkit.serve.nbd.export import Export
from vhdkit.serve.nbd.loop import Lane, Loop
from vhdkit.serve.nbd.share import Share
from vhdkit.serve.nbd.stats import Stats

Answer: TypeAlias = bytes | bytearray
# A slice of a job returns the answer, or None if more is left to do. Any other result is for the job's own `done`.
Slice: TypeAlias = Callable[[], Any]
Done: TypeAlias = Callable[[Any], None]
# Have something called when what an attempt lacked is there; False if that is not possible.
Ask: TypeAlias = Callable[[Callable[[], None]], bool]

_UNCOMMON = (Lane.LISTING, Lane.PARTS, Lane.BULK)
_LOOP_NS = 100_000  # that a slice on a worker costs the loop, added to its own time
_ATTEMPT_LOOP_NS = 20_000  # the same for one on the loop
_ATTEMPTS_NS = 1_000_000  # made in a row
_RECENT_NS = 5_000_000  # others count as being served this long after their last request


class Client(Protocol):
    """Whose jobs they are."""

    export: Export
    queues: dict[Lane, deque[Job]]  # kept here, for `Jobs` alone

    def is_gone(self) -> bool:
        """True when it has been disconnected: no answer reaches it."""
        ...


class Job:
    """The rest of one request's work."""

    __slots__ = ("ask", "attempt", "done", "must_run", "takes_lock", "work")

    def __init__(
        self, work: Slice, done: Done, *, must_run: bool, takes_lock: bool, attempt: Slice | None, ask: Ask | None
    ) -> None:
        """`must_run`: also for a client that has gone, whose other jobs are neither begun nor continued.

        `takes_lock`: its slices hold the disk's lock against writers.
        """
        self.attempt = attempt
        self.ask = ask
        self.work = work
        self.done = done
        self.must_run = must_run
        self.takes_lock = takes_lock


class Jobs:
    """The jobs of all clients of one server. All methods run on the loop's thread."""

    def __init__(self, loop: Loop, stats: Stats, drained: Callable[[Export], None]) -> None:
        """`drained` is called when no slice of a held export runs any more."""
        self._loop = loop
        self._stats = stats
        self._drained = drained
        self._share = Share()
        self._turns: dict[Lane, deque[Client]] = {lane: deque() for lane in Lane}
        self._running = dict.fromkeys(Lane, 0)
        self._starting: set[Lane] = set()
        self._latest = Lane.BULK  # of the uncommon ones, which had its turn last
        self._opens_later = False  # a timer runs until the next uncommon slice may begin
        self._excluded: list[tuple[Client, Lane]] = []  # whose next slice takes a lock that another one has

    def add(
        self, client: Client, work: Slice, done: Done, lane: Lane = Lane.WORK, *,
        must_run: bool = True, takes_lock: bool = False, attempt: Slice | None = None,
        ask: Ask | None = None,
    ) -> None:  # fmt: skip
        """Run `work` on a worker, again while it returns None, then `done` with its result or what it raised.

        Before that the loop calls `attempt`, which does all of it and returns the result, or does nothing and returns
        None; in the latter case once more if `ask` promises word.

        `done` gets b"" if the client has gone before that, unless `must_run`: what a client has written is
        written, also if it did not wait for the answer. While a slice of a job that `takes_lock` runs, the callbacks
        in `Export.after_bulk` wait for its end.
        """
        job = Job(work, done, must_run=must_run, takes_lock=takes_lock, attempt=attempt, ask=ask)
        self._put(client, lane, job, first=False)
        self._start(lane)

    def _put(self, client: Client, lane: Lane, job: Job, *, first: bool) -> None:
        queue = client.queues.setdefault(lane, deque())
        if not queue:  # else it has a turn already, or is parked
            self._turns[lane].append(client)
        if first:
            queue.appendleft(job)
        else:
            queue.append(job)

    def _start(self, lane: Lane) -> None:
        """Let workers of the lane that are free take the next turns."""
        if lane in self._starting:  # called by the end of a job there, which goes on
            return
        self._starting.add(lane)
        try:
            self._start_some(lane)
        finally:
            self._starting.discard(lane)

    def _start_some(self, lane: Lane) -> None:
        turns, began = self._turns[lane], time.perf_counter_ns()
        while turns and self._running[lane] < lane.value:
            if lane in _UNCOMMON:
                if not self._may_begin(turns[0]):
                    break
                self._latest = lane
            client = turns.popleft()
            export = client.export
            if export.held:
                export.parked.append(partial(self._resume, client, lane))
                continue
            queue = client.queues[lane]
            if export.bulk and queue[0].takes_lock:
                self._excluded.append((client, lane))
                continue
            job = queue.popleft()
            if queue:
                turns.append(client)
            if client.is_gone() and not job.must_run:
                job.done(b"")
                continue
            if job.attempt is not None and self._is_done_here(client, job, job.attempt):
                if time.perf_counter_ns() - began > _ATTEMPTS_NS:
                    self._loop.post(partial(self._start, lane))
                    break
                continue
            if self._waits_for_word(client, lane, job):
                continue
            self._running[lane] += 1
            export.jobs += 1
            export.bulk += job.takes_lock
            self._loop.submit(partial(self._run_slice, lane, job), partial(self._ended, client, lane, job), lane)

    def _may_begin(self, client: Client) -> bool:
        """Whether an uncommon slice may begin now; if not, it is begun later."""
        now = time.perf_counter_ns()
        if not self._stats.others_since(client, now - _RECENT_NS):
            return True
        if any(self._running[lane] for lane in _UNCOMMON):  # whose end begins the next
            return False
        left = self._share.left_ns(now)
        if left and not self._opens_later:
            self._opens_later = True
            self._loop.call_later(left / 1e9, self._open)
        return not left

    def _open(self) -> None:
        self._opens_later = False
        self._start_uncommon()

    def _start_uncommon(self) -> None:
        """The lane that had its turn last is asked last."""
        first = _UNCOMMON.index(self._latest) + 1
        for lane in _UNCOMMON[first:] + _UNCOMMON[:first]:
            self._start(lane)

    def _is_done_here(self, client: Client, job: Job, attempt: Slice) -> bool:
        """Do it on the loop if that needs no waiting."""
        began = time.perf_counter_ns()
        try:
            result = attempt()
        except Exception as error:  # as on a worker
            result = error
        if result is None:
            return False
        job.done(result)
        now = time.perf_counter_ns()
        self._charge(client, now, now - began + _ATTEMPT_LOOP_NS + _sending_ns(result))
        return True

    def _waits_for_word(self, client: Client, lane: Lane, job: Job) -> bool:
        ask, job.ask, export = job.ask, None, client.export

        def told() -> None:
            export.jobs -= 1
            if export.held and not export.jobs:
                self._drained(export)
            self._put(client, lane, job, first=True)
            self._start(lane)

        if ask is None or not ask(told):
            return False
        export.jobs += 1  # a hold waits for it, because a question holds a file
        return True

    def _charge(self, client: Client, now: int, cost: int) -> None:
        if self._stats.others_since(client, now - _RECENT_NS):
            self._share.charge(now, cost)

    def _resume(self, client: Client, lane: Lane) -> None:
        """The client's export is not held any more."""
        self._turns[lane].append(client)
        self._start(lane)

    def _run_slice(self, lane: Lane, job: Job) -> tuple[Any, int]:
        """On a worker: run one slice; (result or what it raised, its cost in nanoseconds)."""
        if lane not in _UNCOMMON:
            return job.work(), 0
        # A slice that has no lock takes only processor time from others.
        clock = time.perf_counter_ns if job.takes_lock else time.thread_time_ns
        began = clock()
        try:
            result = job.work()
        except BaseException as error:  # every exception must reach the code that waits for the result
            result = error
        return result, clock() - began + _LOOP_NS

    def _ended(self, client: Client, lane: Lane, job: Job, outcome: tuple[Any, int] | BaseException) -> None:
        """The worker is free."""
        result, cost = (outcome, 0) if isinstance(outcome, BaseException) else outcome
        self._running[lane] -= 1
        if cost:
            self._charge(client, time.perf_counter_ns(), cost + _sending_ns(result))
        self._settle(client, lane, job, result)
        if lane in _UNCOMMON:
            self._start_uncommon()
        else:
            self._start(lane)

    def _settle(self, client: Client, lane: Lane, job: Job, result: Any) -> None:
        """A slice has ended: queue the rest, or deliver the result."""
        export = client.export
        if result is None:
            self._put(client, lane, job, first=True)
        else:
            job.done(result)
        export.jobs -= 1  # after `done`, which may begin a flush: a held export must not seem to be drained before
        if export.held and not export.jobs:
            self._drained(export)
        if job.takes_lock:
            export.bulk -= 1
            waiting, export.after_bulk = export.after_bulk, []
            for go_on in waiting:  # before the next slice begins
                go_on()
            excluded, self._excluded = self._excluded, []
            for other, its_lane in excluded:
                self._turns[its_lane].append(other)


def _sending_ns(result: object) -> int:
    """What it costs the loop to send an answer, in several parts if it is long: about a nanosecond for each byte."""
    return len(result) if isinstance(result, bytes | bytearray) else 0
