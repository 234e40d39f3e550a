# SPDX-License-Identifier: Apache-2.0
"""How tests wait: until a condition holds, and no longer than they say."""

from __future__ import annotations

import asyncio

import pytest

from tests.waiting import becomes, until, wait_until


def test_a_condition_that_becomes_true_is_returned() -> None:
    """The condition is called until it is true, and its result is returned."""
    answers = iter([None, "", "here"])
    assert wait_until(lambda: next(answers), "something comes") == "here"
    later = iter([False, True])
    assert becomes(lambda: next(later))
    now = iter([False, True])
    asyncio.run(until(lambda: next(now), "something comes"))


def test_a_condition_that_stays_false_fails_with_its_description() -> None:
    """After the deadline the test fails with the description; if that is a function, it is called only then."""
    seen: list[int] = []
    with pytest.raises(AssertionError, match=r"not within 0\.05 s: 3 come: 0$"):
        wait_until(lambda: len(seen) == 3, lambda: f"3 come: {len(seen)}", 0.05)
    with pytest.raises(AssertionError, match=r"not within 0\.05 s: one comes"):
        asyncio.run(until(lambda: bool(seen), "one comes", 0.05))
    assert not becomes(lambda: bool(seen), 0.05)
