# SPDX-License-Identifier: Apache-2.0
"""One thread's event loop and the worker threads beside it.

Decides when a callback runs on the loop's thread: when a descriptor is ready, when another thread posted it, or when
a job is done. Must not know what is served. Everything that may wait for a device or a disk runs as a job.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import queue
import select
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Protocol, TypeVar

from vhdkit.arrival import Arrivals

T = TypeVar("T")
READABLE, WRITABLE, HANGUP = select.EPOLLIN, select.EPOLLOUT, select.EPOLLHUP | select.EPOLLERR
_SWITCH_SECONDS = 0.0005  # how long a worker that runs Python code may keep the loop waiting
_SPINS = 300  # polls before sleeping, half a microsecond each
_SPINS_AFTER_WORD = 60  # the same when a client got what a device had delivered: it gains a tenth at most
_LOOK_SPINS = 5  # polls that a look at a waiter takes as long as
_BUSY_ROUNDS = 8  # rounds full of events after which waiters are treated as before a sleep
_BUSY_ROUNDS_ASKING = 2  # the same where that starts no job
_BRIEF_LOOKS = 8  # at a read that waits alone, before word of it is asked for
_MAX_SPIN_CREDIT, _SPIN_LOSS = 8, 2  # polling continues while two of three attempts find something


class Lane(Enum):
    """Kinds of jobs that do not wait for one another. The value is the number of threads for each."""

    WORK = 8
    FLUSH = 4  # waits for devices, while clients wait for it
    LISTING = 1  # mostly Python code: more threads would only slow down the loop
    PARTS = 2  # requests for parts of sectors
    BULK = 3  # long commands; the number differs from the others', as Enum makes equal values one member


class Waiter(Protocol):
    """Has work that becomes ready without an event."""

    def is_small(self) -> bool:
        """Whether so little waits that it may be there before word of it could come."""
        ...

    def look(self) -> bool:
        """Look at a little of it; True if something was ready."""
        ...

    def before_sleep(self) -> None:
        """The loop may sleep now: ask for word (`Loop.ask`), or start a job, whose end wakes it."""
        ...


class Waiters:
    """All of them, on the loop's thread."""

    def __init__(self) -> None:
        self.present: dict[Waiter, None] = {}

    def look(self) -> bool:
        """Let one of them look, each time another; True if something was ready."""
        one = next(iter(self.present))
        if len(self.present) > 1:
            del self.present[one]
            self.present[one] = None
        return one.look()

    def before_sleep(self) -> bool:
        """Let each start a job; False if meanwhile others began to wait, so that the loop must not sleep yet."""
        present = list(self.present)
        for one in present:
            one.before_sleep()
        return list(self.present) == present


class Loop:
    """Runs callbacks on one thread. `post` and `submit` may be called from any thread, the rest from the loop's."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._posted: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_numbers = itertools.count()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._running = False
        self.waiters = Waiters()
        self._arrivals: Arrivals | None = None  # while the loop runs, if the system has them
        self._asked: dict[int, Callable[[], None]] = {}
        self._rounds = 0  # without sleep
        self._spin_credit = _MAX_SPIN_CREDIT
        self._spins = _SPINS  # the next time
        self._look_credit = _MAX_SPIN_CREDIT
        self.relaxed = False  # set by a callback whose client does not wait for one answer at a time
        self._is_relaxed = False  # so were all callbacks of the last round: polling would only find less at once
        self._lanes: dict[Lane, queue.SimpleQueue[Callable[[], None] | None]] = {}
        self._workers: list[threading.Thread] = []
        self.watch(self._wake_reader.fileno(), READABLE, self._woken)

    # -- descriptors, timers and posts --------------------------------------------------------------------------

    def watch(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Call `callback(events)` whenever `fd` is ready."""
        self._callbacks[fd] = callback
        self._epoll.register(fd, events)

    def change(self, fd: int, events: int) -> None:
        """Watch a watched `fd` for different events."""
        self._epoll.modify(fd, events)

    def unwatch(self, fd: int) -> None:
        """Stop watching `fd`; call this before it is closed."""
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call `callback` once, after that time."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._timer_numbers), callback))

    def post(self, callback: Callable[[], None]) -> None:
        """Let the loop's thread call `callback` soon. From any thread, and from signal handlers."""
        self._posted.append(callback)
        with contextlib.suppress(OSError):  # full: the loop is awake anyway; closed: it has ended
            self._wake_writer.send(b"\0")

    def _woken(self, events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_reader.recv(4096)
        for _ in range(len(self._posted)):  # what these post is for the next round: descriptors have their turn
            self._posted.popleft()()

    def _run_posted(self) -> None:
        while self._posted:
            self._posted.popleft()()

    # -- word of data -------------------------------------------------------------------------------------------

    def ask(self, ask: Callable[[Arrivals], int | None], told: Callable[[], None]) -> bool:
        """Call `told` when what `ask` asks about has arrived; False if the system gives no word of it."""
        number = None if self._arrivals is None else ask(self._arrivals)
        if number is None:
            return False
        self._asked[number] = told
        return True

    def _told(self, events: int) -> None:
        self._spins = _SPINS_AFTER_WORD
        if len(self.waiters.present) == 1:  # usually the one that asked: its client gets the data before all else
            self.waiters.look()
        if self._arrivals is not None:
            # All at once: what one of them asks may get the number of another that was answered with it.
            for told in [self._asked.pop(number) for number in self._arrivals.take()]:
                told()

    @contextlib.contextmanager
    def _hearing(self) -> Iterator[None]:
        arrivals = self._arrivals = Arrivals.open()
        if arrivals is None:
            yield
            return
        self.watch(arrivals.event, READABLE, self._told)
        try:
            yield
        finally:
            self._arrivals = None
            self.unwatch(arrivals.event)
            arrivals.close()
            self._asked.clear()

    # -- jobs ---------------------------------------------------------------------------------------------------

    def submit(self, work: Callable[[], T], done: Callable[[T | BaseException], None], lane: Lane = Lane.WORK) -> None:
        """Run `work` on a worker thread, then `done` with its result, or what it raised, on the loop's thread."""
        if lane not in self._lanes:
            self._start_workers(lane)

        def job() -> None:
            result: T | BaseException
            try:
                result = work()
            except BaseException as error:  # every exception must reach the code that waits for the result
                result = error
            self.post(lambda: done(result))

        self._lanes[lane].put(job)

    def _start_workers(self, lane: Lane) -> None:
        self._lanes[lane] = queue.SimpleQueue()
        for number in range(lane.value):
            name = f"{lane.name.lower()}-{number}"
            worker = threading.Thread(target=_work, args=(self._lanes[lane],), name=name, daemon=True)
            worker.start()
            self._workers.append(worker)

    # -- running ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run until `stop`."""
        self._running = True
        before = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_SECONDS)
        try:
            with self._hearing():
                self._run()
        finally:
            sys.setswitchinterval(before)

    def _run(self) -> None:
        waiting, poll, can_hear = self.waiters.present, self._epoll.poll, self._arrivals is not None
        while self._running:
            if self._timers:
                self._run_timers()
            if waiting and can_hear:
                found = self._look_briefly()
            else:
                found = self._spin() if waiting or not self._is_relaxed else None
            may_sleep = not waiting or self._attend_to_waiters(found)
            if found is None and not (found := poll(self._until_timer() if may_sleep else 0)):
                continue  # a timer is due
            self._is_relaxed = bool(found)
            for fd, events in found:
                callback = self._callbacks.get(fd)
                if callback is not None:  # an earlier callback of this round may have unwatched it
                    self.relaxed = False
                    callback(events)
                    self._is_relaxed &= self.relaxed

    def _look_briefly(self) -> list[tuple[int, int]] | None:
        """Poll, and look some times at a read that waits alone: it may be there before word of it could come.

        Returns the events, or an empty list if something was ready; None if word should be asked for.
        """
        waiters, poll = self.waiters.present, self._epoll.poll
        events = poll(0)
        if events or len(waiters) > 1 or not next(iter(waiters)).is_small():
            return events or None
        if self._look_credit <= 0:
            self._look_credit += 1
            return None
        for _ in range(_BRIEF_LOOKS):
            if self.waiters.look():
                self._look_credit = min(self._look_credit + 1, _MAX_SPIN_CREDIT)
                return events
            if events := poll(0):
                return events
        self._look_credit -= _SPIN_LOSS
        return None

    def _attend_to_waiters(self, events: list[tuple[int, int]] | None) -> bool:
        """Before sleeping (`events` None), and now and then while events keep the loop busy.

        False if the loop must not sleep yet. A timer may have been set.
        """
        self._rounds += 1
        if events is None or self._rounds >= (_BUSY_ROUNDS if self._arrivals is None else _BUSY_ROUNDS_ASKING):
            self._rounds = 0
            return self.waiters.before_sleep()
        if events and self._arrivals is None:
            self.waiters.look()
        return True

    def _spin(self) -> list[tuple[int, int]] | None:
        """Poll a few times without sleeping: a client that waits for each answer asks again within microseconds.

        Sleeping and being woken would take longer than serving it. Polling stops soon where it does not pay. Returns
        the events; None if the loop should sleep until there are any.
        """
        if self._spin_credit <= 0:
            self._spin_credit += 1
            return None
        waiters, spins, self._spins = self.waiters, self._spins, _SPINS
        while spins > 0:
            spins -= 1
            events = self._epoll.poll(0)
            if events or (waiters.present and waiters.look()):
                self._spin_credit = min(self._spin_credit + 1, _MAX_SPIN_CREDIT)
                return events
            if waiters.present:
                spins -= _LOOK_SPINS
        self._spin_credit -= _SPIN_LOSS
        return None

    def _run_timers(self) -> None:
        """Run the timers that are due."""
        while self._timers and self._timers[0][0] <= time.monotonic():
            heapq.heappop(self._timers)[2]()

    def _until_timer(self) -> float | None:
        """The seconds until the next timer is due; None if none is set."""
        return max(self._timers[0][0] - time.monotonic(), 0) if self._timers else None

    def stop(self) -> None:
        """End `run` after the current round."""
        self._running = False
        self.post(lambda: None)

    def close(self) -> None:
        """End the workers when their queued jobs are done, and close the descriptors."""
        for lane, jobs in self._lanes.items():
            for _ in range(lane.value):
                jobs.put(None)
        for worker in self._workers:
            worker.join()
        self._run_posted()
        self._callbacks.clear()  # a later `unwatch` then finds nothing to do
        self._epoll.close()
        self._wake_reader.close()
        self._wake_writer.close()


def _work(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    """The body of a worker thread: run one job after the other, until the job is None."""
    while (job := jobs.get()) is not None:
        job()
