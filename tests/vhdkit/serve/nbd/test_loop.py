# SPDX-License-Identifier: Apache-2.0
"""The event loop: posts, timers, jobs and their order."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable
from functools import partial

import pytest

from vhdkit import arrival
from vhdkit.serve.nbd import loop as loop_module
from vhdkit.serve.nbd.loop import READABLE, Lane, Loop

pytestmark = pytest.mark.timeout(60)


def test_jobs_run_on_workers_and_report_to_the_loop() -> None:
    """The result or exception of a job, whichever it is, is delivered on the loop's thread."""
    loop, seen = Loop(), list[object]()

    def fail() -> None:
        raise KeyboardInterrupt

    def done(result: object) -> None:
        seen.append((type(result), threading.current_thread()))
        if len(seen) == 2:
            loop.stop()

    loop.submit(fail, done)
    loop.submit(threading.current_thread, done)
    loop.call_later(20, loop.stop)
    loop.run()
    here = threading.current_thread()
    assert sorted(str(one) for one in seen) == sorted(
        str(one) for one in [(KeyboardInterrupt, here), (threading.Thread, here)]
    )
    loop.close()


def test_lanes_do_not_wait_for_one_another() -> None:
    """Jobs that fill one lane do not block the others."""
    loop, gate, seen = Loop(), threading.Event(), list[str]()

    def flushed(result: object) -> None:
        seen.append("flush")
        gate.set()

    def worked(result: object) -> None:
        seen.append("work")
        if seen.count("work") == 3 * Lane.WORK.value:
            loop.stop()

    for _ in range(3 * Lane.WORK.value):
        loop.submit(gate.wait, worked)
    loop.submit(bool, flushed, Lane.FLUSH)
    loop.call_later(20, loop.stop)
    loop.run()
    assert seen == ["flush", *["work"] * 3 * Lane.WORK.value]
    loop.close()


def test_timers_run_in_order() -> None:
    """Timers run by their time, those with the same time in the order they were set."""
    loop, seen = Loop(), list[int]()
    loop.call_later(0.02, lambda: seen.append(3))
    loop.call_later(0.0, lambda: seen.append(1))
    loop.call_later(0.0, lambda: seen.append(2))
    loop.call_later(0.03, loop.stop)
    loop.run()
    assert seen == [1, 2, 3]
    loop.close()


def test_posts_from_many_threads() -> None:
    """No post is lost, from however many threads; after the end a post is harmless."""
    loop, seen = Loop(), list[int]()

    def post(number: int) -> None:
        for _ in range(500):
            loop.post(lambda: seen.append(number))

    threads = [threading.Thread(target=post, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()

    def look() -> None:
        if len(seen) == 2000:
            loop.stop()
        else:
            loop.call_later(0.005, look)

    loop.call_later(0, look)
    loop.run()
    for thread in threads:
        thread.join()
    assert len(seen) == 2000
    loop.close()
    loop.post(lambda: None)


class Eventless:
    """Work that becomes ready without an event, at a certain look."""

    def __init__(self, loop: Loop, ready_at: int) -> None:
        self.looks = self.sleeps = 0
        self._loop = loop
        self._ready_at = ready_at
        loop.waiters.present[self] = None

    def is_small(self) -> bool:
        """Many reads wait."""
        return False

    def look(self) -> bool:
        """Ready at last: then the loop may end."""
        self.looks += 1
        if self.looks < self._ready_at:
            return False
        self._loop.waiters.present.clear()
        self._loop.stop()
        return True

    def before_sleep(self) -> None:
        """As a job would, end the sleep."""
        self.sleeps += 1
        self._loop.post(lambda: None)


@pytest.fixture
def no_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system gives no word of data that has arrived."""
    monkeypatch.setattr(arrival.Arrivals, "open", lambda: None)


@pytest.mark.usefixtures("no_word")
@pytest.mark.parametrize("ready_at", [1, 5, 2000])
def test_waiters_are_looked_at_before_sleeping(ready_at: int) -> None:
    """The loop looks a limited number of times between polls, and before it sleeps lets jobs be started."""
    loop = Loop()
    work = Eventless(loop, ready_at)
    loop.run()
    loop.close()
    assert work.looks == ready_at and (work.sleeps > 0) == (ready_at > 1000)


@pytest.mark.usefixtures("no_word")
def test_waiters_are_looked_at_beside_events() -> None:
    """While events keep the loop from sleeping, it looks in each round, and after some rounds lets jobs be started."""
    loop = Loop()
    work = Eventless(loop, 40)
    reader, writer = socket.socketpair()
    writer.send(b"x")  # never read, so there is always an event
    loop.watch(reader.fileno(), READABLE, lambda events: None)
    loop.run()
    loop.close()
    reader.close()
    writer.close()
    assert work.looks == 40 and work.sleeps >= 4


def test_waiters_take_turns() -> None:
    """Each look is another waiter's."""
    loop = Loop()
    works = [Eventless(loop, 10) for _ in range(3)]
    for _ in range(9):
        assert not loop.waiters.look()
    assert [work.looks for work in works] == [3, 3, 3]
    loop.close()


class Word:
    """In place of `Arrivals`: the answers come when the test says so."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self.event, self.questions, self.is_closed = self._reader.fileno(), 0, False

    def come(self, *numbers: int) -> None:
        """These questions are answered."""
        self._writer.send(bytes(numbers))

    def take(self) -> list[int]:
        """As `Arrivals.take`, with word of nothing at times."""
        try:
            return list(self._reader.recv(100))
        except BlockingIOError:
            return []

    def close(self) -> None:
        """As `Arrivals.close`."""
        self.is_closed = True
        self._reader.close()
        self._writer.close()


def test_word_of_data_ends_a_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked for is called once, when word of it comes; the end of the loop forgets the rest."""
    word, seen, loop = Word(), list[int](), Loop()
    monkeypatch.setattr(arrival.Arrivals, "open", lambda: word)
    assert not loop.ask(lambda arrivals: 1, lambda: None), "it does not run yet"

    def begin() -> None:
        for number in range(3):
            assert loop.ask(lambda arrivals, number=number: number, partial(told, number))  # type: ignore[misc]
        assert not loop.ask(lambda arrivals: None, lambda: None)
        word.come(2)

    def told(number: int) -> None:
        seen.append(number)
        if number == 2:
            assert loop.ask(lambda arrivals: 2, partial(told, 12))
            word.come(2, 0)
        else:
            assert number == 12 or seen == [2, 12, 0]
        if number == 0:
            loop.stop()

    loop.post(begin)
    loop.run()
    assert seen == [2, 12, 0] and word.is_closed
    assert not loop.ask(lambda arrivals: 1, lambda: None)
    loop.close()


def test_word_of_several_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question asked when word comes may have the number of one that was answered with it: each gets its own."""
    word, seen, loop = Word(), list[str](), Loop()
    monkeypatch.setattr(arrival.Arrivals, "open", lambda: word)

    def ask(number: int, told: Callable[[], None]) -> None:
        assert loop.ask(lambda arrivals: number, told)

    def first() -> None:
        seen.append("first")
        ask(1, third)

    def second() -> None:
        seen.append("second")
        word.come(1)

    def third() -> None:
        seen.append("third")
        loop.stop()

    def begin() -> None:
        ask(0, first)
        ask(1, second)
        word.come(0, 1)

    loop.post(begin)
    loop.call_later(20, loop.stop)
    loop.run()
    loop.close()
    assert seen == ["first", "second", "third"]


class Patient:
    """A waiter that can go on only after a while, and sets a timer for that when the loop would sleep."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        loop.waiters.present[self] = None

    def is_small(self) -> bool:
        """Many reads wait."""
        return False

    def look(self) -> bool:
        """Never ready."""
        return False

    def before_sleep(self) -> None:
        """Once."""
        self._loop.waiters.present.clear()
        self._loop.call_later(0.01, self._loop.stop)


class Adding(Patient):
    """A waiter whose job has another client's read wait, too."""

    def before_sleep(self) -> None:
        """The other one can go on after a while."""
        self._loop.waiters.present.clear()
        Patient(self._loop)


@pytest.mark.parametrize("has_word", [False, True])
@pytest.mark.parametrize("kind", [Patient, Adding])
def test_what_waiters_begin_before_a_sleep(
    monkeypatch: pytest.MonkeyPatch, kind: type[Patient], has_word: bool
) -> None:
    """Their jobs may have to wait for their share of the time, and others' reads may begin to wait: the loop sleeps
    neither past the timer of the former, nor before the latter have asked for word."""
    word, loop = Word(), Loop()
    monkeypatch.setattr(arrival.Arrivals, "open", lambda: word if has_word else None)
    kind(loop)
    loop.call_later(3600, lambda: None)
    waker, began = threading.Timer(20, loop.stop), time.monotonic()
    waker.daemon = True
    waker.start()
    loop.run()
    waker.cancel()
    loop.close()
    word.close()
    assert time.monotonic() - began < 15


class Sleeper:
    """A waiter that asks for word before a sleep, and is ready at a certain look, if at all."""

    def __init__(self, loop: Loop, word: Word, ready_at: int = 0) -> None:
        self._loop, self._word, self.sleeps, self.looks, self._ready_at = loop, word, 0, 0, ready_at
        loop.waiters.present[self] = None

    def is_small(self) -> bool:
        """A single read waits, if it can be ready at all."""
        return self._ready_at > 0

    def look(self) -> bool:
        """See `ready_at`; then the loop may end."""
        self.looks += 1
        if self.looks != self._ready_at:
            return False
        self._loop.waiters.present.clear()
        self._loop.stop()
        return True

    def before_sleep(self) -> None:
        """Ask, and get word at once."""
        self.sleeps += 1
        assert self._loop.ask(lambda arrivals: 1, self._told)
        self._word.come(1)

    def _told(self) -> None:
        if self.sleeps == 5:
            self._loop.stop()


def test_waiters_that_get_word_are_not_looked_at_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system gives word, the loop sleeps until it comes, and neither polls nor looks meanwhile."""
    word, loop = Word(), Loop()
    monkeypatch.setattr(arrival.Arrivals, "open", lambda: word)
    polls, sleeper = Polls(loop, lambda: None), Sleeper(loop, word)
    loop.run()
    loop.close()
    assert sleeper.looks == sleeper.sleeps == 5 and len(polls.waits) <= 20


@pytest.mark.parametrize("ready_at", [1, loop_module._BRIEF_LOOKS, loop_module._BRIEF_LOOKS + 1, 1000])
def test_a_read_that_waits_alone_is_looked_at_briefly(monkeypatch: pytest.MonkeyPatch, ready_at: int) -> None:
    """It may be there before word of it could come. Where it never is, the loop soon asks at once nearly always."""
    word, loop = Word(), Loop()
    monkeypatch.setattr(arrival.Arrivals, "open", lambda: word)
    sleeper = Sleeper(loop, word, ready_at)
    loop.run()
    loop.close()
    if ready_at <= loop_module._BRIEF_LOOKS + 1:  # the last one when word comes
        assert sleeper.looks == ready_at and sleeper.sleeps == (ready_at > loop_module._BRIEF_LOOKS)
    else:
        assert sleeper.sleeps == 5 and sleeper.looks <= 4 * (loop_module._BRIEF_LOOKS + 1) + 1


class Polls:
    """An epoll that records how long each call may wait, and has clients ask when the loop sleeps."""

    def __init__(self, loop: Loop, ask: Callable[[], None]) -> None:
        self._epoll, self._ask = loop._epoll, ask
        self.waits: list[float | None] = []
        loop._epoll = self  # type: ignore[assignment]  # the loop uses only these of its methods
        self.register, self.unregister, self.close = self._epoll.register, self._epoll.unregister, self._epoll.close

    def poll(self, timeout: float | None = None) -> list[tuple[int, int]]:
        """As epoll's."""
        self.waits.append(timeout)
        if timeout is None:
            self._ask()
        return self._epoll.poll(timeout)


@pytest.mark.parametrize("relaxed", list(itertools.product([False, True], repeat=2)))
def test_it_sleeps_at_once_after_a_round_of_relaxed_clients(relaxed: tuple[bool, bool]) -> None:
    """The loop polls before it sleeps, unless no client of the last round waits for one answer at a time."""
    pairs = [socket.socketpair() for _ in relaxed]
    rounds: list[int] = []

    def ask() -> None:
        for _, writer in pairs:
            writer.send(b"x")

    def answer(reader: socket.socket, is_relaxed: bool, events: int) -> None:
        assert reader.recv(1) and events == READABLE
        rounds.append(len(polls.waits))
        loop.relaxed = is_relaxed
        if len(rounds) == 4:
            loop.stop()

    loop = Loop()
    polls = Polls(loop, ask)
    for (reader, _), is_relaxed in zip(pairs, relaxed, strict=True):
        loop.watch(reader.fileno(), READABLE, partial(answer, reader, is_relaxed))
    loop.run()
    assert polls.waits[rounds[1] : rounds[2]] == [*([] if all(relaxed) else [0] * loop_module._SPINS), None]
    loop.close()
    for sock in itertools.chain(*pairs):
        sock.close()


def test_posts_that_post_again_leave_descriptors_their_turn() -> None:
    """A callback that posts itself again and again does not keep the loop from ready descriptors."""
    loop = Loop()
    ours, theirs = socket.socketpair()
    rounds = 0

    def again() -> None:
        nonlocal rounds
        rounds += 1
        if rounds < 1000:
            loop.post(again)
        else:
            loop.stop()

    with ours, theirs:
        loop.watch(ours.fileno(), READABLE, lambda events: loop.stop())
        theirs.send(b"x")
        loop.post(again)
        loop.run()
        assert rounds < 10
        loop.close()
