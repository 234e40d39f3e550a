# SPDX-License-Identifier: Apache-2.0
"""Waiting by looking, in threads and coroutines, by a clock that the test moves."""

from __future__ import annotations

import asyncio
import inspect
import itertools
from collections.abc import Awaitable, Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.clocks import FakeClock
from vmm.model import waiting

SECONDS = st.integers(0, 1000)
EVERY = st.integers(1, 100)
WAYS = ("thread", "coroutine")


def each_look(way: str, timeout: float, every: float, look: Callable[[bool], None]) -> None:
    """Call `look` at each look, with whether it is the last."""
    if way == "thread":
        for is_last in waiting.looks(timeout, every_seconds=every):
            look(is_last)
        return

    async def run() -> None:
        async for is_last in waiting.async_looks(timeout, every_seconds=every):
            look(is_last)

    asyncio.run(run())


def becomes(way: str, condition: Callable[[], object], timeout: float) -> bool:
    """The answer of `becomes` or `async_becomes`."""
    if way == "thread":
        return waiting.becomes(condition, timeout)
    return asyncio.run(waiting.async_becomes(condition, timeout))


@pytest.mark.parametrize("way", WAYS)
@given(timeout=SECONDS, every=EVERY, taken=st.lists(SECONDS, max_size=5))
def test_only_the_last_look_begins_after_the_deadline(way: str, timeout: int, every: int, taken: list[int]) -> None:
    """The first look is at once, and however long each takes, the last one begins after the deadline. No sleep is
    longer than the interval, and all of them together are no longer than the time."""
    clock = FakeClock()
    begun = []

    def look(is_last: bool) -> None:
        begun.append((clock.now, is_last))
        clock.now += taken[len(begun) - 1] if len(begun) <= len(taken) else 0.0

    with pytest.MonkeyPatch.context() as patch:
        clock.install(patch, waiting)
        each_look(way, timeout, every, look)
    assert begun[0][0] == clock.began
    assert [is_last for _, is_last in begun] == [False] * (len(begun) - 1) + [True]
    assert all((moment >= clock.began + timeout) == is_last for moment, is_last in begun)
    assert all(seconds <= every for seconds in clock.slept) and sum(clock.slept) <= timeout


@pytest.mark.parametrize("way", WAYS)
def test_a_condition_is_evaluated_once_more_after_the_deadline(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was suspended beyond the deadline while it looked still sees what came true meanwhile."""
    clock = FakeClock()
    clock.install(monkeypatch, waiting)
    answers = iter([False, True])

    def suspended() -> bool:
        clock.now += 3600
        return next(answers)

    assert becomes(way, suspended, 5)


@pytest.mark.parametrize("way", WAYS)
def test_a_condition_that_never_holds(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is False at the deadline; without any time, after exactly one look."""
    clock = FakeClock()
    clock.install(monkeypatch, waiting)
    began, looks = clock.now, itertools.count()
    assert not becomes(way, lambda: next(looks) < 0, 5)
    assert clock.now == began + 5 and next(looks) > 5 / waiting.LOOK_SECONDS
    looks = itertools.count()
    assert not becomes(way, lambda: next(looks) < 0, 0)
    assert next(looks) == 1


def test_a_condition_may_be_a_coroutine_function() -> None:
    """Its answer is awaited; the coroutine itself, which is always true, does not count."""

    def answering(answers: Iterator[bool]) -> Callable[[], Awaitable[bool]]:
        async def answer() -> bool:
            await asyncio.sleep(0)
            return next(answers)

        return answer

    assert asyncio.run(waiting.async_becomes(answering(iter([False, True])), 60))
    assert not asyncio.run(waiting.async_becomes(answering(iter([False])), 0))


def test_cancelling_ends_the_wait() -> None:
    """A coroutine that waits without a limit ends at once when it is cancelled, and looks no more."""
    looks = 0

    def never() -> bool:
        nonlocal looks
        looks += 1
        return False

    async def run() -> int:
        task = asyncio.create_task(waiting.async_becomes(never))
        while looks < 2:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return looks

    assert asyncio.run(run()) == looks


def test_leaving_early_leaves_nothing_to_finish() -> None:
    """A loop over `async_looks` that is left early needs no task that finishes it, as an async generator would."""
    assert not inspect.isasyncgen(waiting.async_looks())
