# SPDX-License-Identifier: Apache-2.0
"""Jobs: which client's work runs next on the workers, and when work must rest so that others are served.

Decides the order of jobs (clients take turns, slice by slice), how many run at once, that none of a held export
begins, and how long a worker rests after a slice. Must not know what a job does or how it is answered.

A job that has not begun waits here and not in a worker's queue, so a hold (`NbdServer.hold`) waits only for the slices
that are running, however many jobs there are. `Export.jobs` counts those slices (and flushes); a job of a held export
waits in `Export.parked`.

    add --> the client's queue --its turn--> a slice on a worker --> done
                  ^                                 |
                  `----------- more is left --------'

Most slices of the lanes in `_REST` are Python code, for which they take the interpreter from the loop, or hold the
disk's lock against writers. While other clients are served on the loop, a worker of such a lane rests after each slice
for a multiple of the time that the slice took. The clients on the loop thus keep most of the time, and a client that
is alone has all of it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeAlias

from vhdkit.serve.nbd.export import Export
from vhdkit.serve.nbd.loop import Lane, Loop
from vhdkit.serve.nbd.stats import Stats

Answer: TypeAlias = bytes | bytearray
# A slice of a job returns the answer, or None if more is left to do. Any other result is for the job's own `done`.
Slice: TypeAlias = Callable[[], Any]
Done: TypeAlias = Callable[[Any], None]

_REST = {Lane.LISTING: 6, Lane.PARTS: 16, Lane.BULK: 15}  # times the slice: five times, for each thread of the lane
_LOOP_NS = 100_000  # that a slice costs the loop, added to its own time
_MAX_REST_SECONDS = 0.02  # a slice that waited for a device took none of the others' time
_RECENT_NS = 5_000_000  # others count as being served this long after their last request
_RESTED = object()


class Client(Protocol):
    """Whose jobs they are."""

    export: Export
    queues: dict[Lane, deque[Job]]  # kept here, for `Jobs` alone

    def is_gone(self) -> bool:
        """True when it has been disconnected: no answer reaches it."""
        ...


class Job:
    """The rest of one request's work."""

    __slots__ = ("done", "must_run", "takes_lock", "work")

    def __init__(self, work: Slice, done: Done, *, must_run: bool, takes_lock: bool) -> None:
        """`must_run`: also for a client that has gone, whose other jobs are neither begun nor continued.

        `takes_lock`: its slices hold the disk's lock against writers.
        """
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
        self._turns: dict[Lane, deque[Client]] = {lane: deque() for lane in Lane}
        self._running = dict.fromkeys(Lane, 0)
        self._excluded: list[tuple[Client, Lane]] = []  # whose next slice takes a lock that another one has

    def add(
        self, client: Client, work: Slice, done: Done, lane: Lane = Lane.WORK, *,
        must_run: bool = True, takes_lock: bool = False,
    ) -> None:  # fmt: skip
        """Run `work` on a worker, again while it returns None, then `done` with its result or what it raised.

        `done` gets b"" if the client has gone before that, unless `must_run`: what a client has written is
        written, also if it did not wait for the answer. While a slice of a job that `takes_lock` runs, the callbacks
        in `Export.after_bulk` wait for its end.
        """
        self._put(client, lane, Job(work, done, must_run=must_run, takes_lock=takes_lock), first=False)
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
        turns = self._turns[lane]
        while turns and self._running[lane] < lane.value:
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
            self._running[lane] += 1
            export.jobs += 1
            export.bulk += job.takes_lock
            self._loop.submit(
                partial(self._run_slice, client, lane, job), partial(self._ended, client, lane, job), lane
            )

    def _resume(self, client: Client, lane: Lane) -> None:
        """The client's export is not held any more."""
        self._turns[lane].append(client)
        self._start(lane)

    def _run_slice(self, client: Client, lane: Lane, job: Job) -> Any:
        """On a worker: run one slice; if a rest follows, deliver the result before it."""
        factor = _REST.get(lane)
        if factor is None:
            return job.work()
        began = time.perf_counter_ns()
        try:
            result = job.work()
        except BaseException as error:  # every exception must reach the code that waits for the result
            result = error
        now = time.perf_counter_ns()
        if not self._stats.others_since(client, now - _RECENT_NS):
            if isinstance(result, BaseException):
                raise result
            return result
        self._loop.post(partial(self._settle_early, client, lane, job, result))
        rest = factor * (now - began + _LOOP_NS) / 1e9
        time.sleep(min(rest, _MAX_REST_SECONDS))  # which leaves the time to others
        return _RESTED

    def _ended(self, client: Client, lane: Lane, job: Job, result: Any) -> None:
        """The worker is free."""
        self._running[lane] -= 1
        if result is not _RESTED:
            self._settle(client, lane, job, result)
        self._start(lane)

    def _settle_early(self, client: Client, lane: Lane, job: Job, result: Any) -> None:
        """A slice has ended, and its worker rests."""
        self._settle(client, lane, job, result)
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
