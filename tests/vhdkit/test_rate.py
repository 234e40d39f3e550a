# SPDX-License-Identifier: Apache-2.0
"""Rates: what is moved keeps to them, and waiting ends at once when the work is cancelled."""

from __future__ import annotations

import time

import pytest

from vhdkit import errors
from vhdkit.rate import MIN_RATE, RateLimit


def test_what_is_taken_keeps_to_the_rate() -> None:
    """However it is divided, taking takes at least as long as the rate says, less a short burst."""
    limit = RateLimit(1_000_000)
    begin = time.monotonic()
    for size in (100_000, 50_000, 200_000, 1, 50_000):
        limit.take(size)
    assert time.monotonic() - begin >= 0.29


def test_a_pause_is_no_credit() -> None:
    """After a pause the rate holds again: only a short burst is let through."""
    limit = RateLimit(1_000_000)
    limit._due = time.monotonic() - 3600
    begin = time.monotonic()
    limit.take(300_000)
    assert time.monotonic() - begin >= 0.19


def test_a_cancelled_wait_ends() -> None:
    """A wait of hours ends as soon as the work is cancelled."""
    asked = []

    def is_cancelled() -> bool:
        asked.append(True)
        return len(asked) > 3

    RateLimit(MIN_RATE, is_cancelled).take(1 << 30)
    assert len(asked) == 4


def test_progress_is_followed() -> None:
    """A progress callback takes what was moved since the last call, however much work that was."""
    taken: list[int] = []
    limit = RateLimit(1 << 40)
    limit.take = taken.append  # type: ignore[method-assign, assignment]
    shown: list[int] = []
    follow = limit.follow(lambda done, _: shown.append(done), lambda done: 3 + done // 2)
    for done in (4, 4, 12, 6, 20):
        follow(done, 20)
    assert taken == [2, 4, 7] and shown == [4, 4, 12, 6, 20]
    limit.follow(None, lambda done: done)(1, 2)
    assert taken[-1] == 1


def test_a_rate_that_cannot_be_meant() -> None:
    """A rate of nothing, or of a few bytes a second, is refused."""
    RateLimit(MIN_RATE)
    with pytest.raises(errors.InvalidArgument, match="is less than"):
        RateLimit(MIN_RATE - 1)
