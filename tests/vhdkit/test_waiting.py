# SPDX-License-Identifier: Apache-2.0
"""Waiting by looking, by a clock that the test moves."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.clocks import FakeClock
from vhdkit import waiting

SECONDS = st.integers(0, 1000)
EVERY = st.integers(1, 100)


@given(SECONDS, EVERY, st.lists(SECONDS, max_size=5))
def test_only_the_last_look_begins_after_the_deadline(timeout: int, every: int, taken: list[int]) -> None:
    """The first look is at once, and however long each takes, the last one begins after the deadline. No sleep is
    longer than the interval, and all of them together are no longer than the time."""
    clock = FakeClock()
    begun = []
    with pytest.MonkeyPatch.context() as patch:
        clock.install(patch, waiting)
        for number, is_last in enumerate(waiting.looks(timeout, every_seconds=every)):
            begun.append((clock.now, is_last))
            clock.now += taken[number] if number < len(taken) else 0.0
    assert begun[0][0] == clock.began
    assert [is_last for _, is_last in begun] == [False] * (len(begun) - 1) + [True]
    assert all((moment >= clock.began + timeout) == is_last for moment, is_last in begun)
    assert all(seconds <= every for seconds in clock.slept) and sum(clock.slept) <= timeout


def test_a_condition_is_evaluated_once_more_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was suspended beyond the deadline while it looked still sees what came true meanwhile."""
    clock = FakeClock()
    clock.install(monkeypatch, waiting)
    answers = iter([False, True])

    def suspended() -> bool:
        clock.now += 3600
        return next(answers)

    assert waiting.becomes(suspended, 5)


def test_a_condition_that_never_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is False at the deadline; without any time, after exactly one look."""
    clock = FakeClock()
    clock.install(monkeypatch, waiting)
    began, looks = clock.now, itertools.count()
    assert not waiting.becomes(lambda: next(looks) < 0, 5)
    assert clock.now == began + 5 and next(looks) > 5 / waiting.LOOK_SECONDS
    looks = itertools.count()
    assert not waiting.becomes(lambda: next(looks) < 0, 0)
    assert next(looks) == 1


def test_without_a_limit_it_waits_for_as_long_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes true after a year is still seen."""
    clock = FakeClock()
    clock.install(monkeypatch, waiting)
    end = clock.now + 365 * 86400
    assert waiting.becomes(lambda: clock.now >= end, every_seconds=3600)
