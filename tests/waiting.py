# SPDX-License-Identifier: Apache-2.0
"""How tests wait: they check a condition until it holds, and fail after a deadline that is long enough.

A test never sleeps for a fixed time in the hope that something has happened by then. If the time itself is tested
(nothing may happen for a while, a rate, a random moment for a kill), a comment beside the sleep says so.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

SECONDS = 60.0  # far longer than anything takes: it ends a test that would wait for ever
PAUSE_SECONDS = 0.02

T = TypeVar("T")


def becomes(condition: Callable[[], object], seconds: float = SECONDS, *, pause: float = PAUSE_SECONDS) -> bool:
    """True as soon as the condition holds; False if it still does not after that many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


def wait_until(
    condition: Callable[[], T],
    what: str | Callable[[], str],
    seconds: float = SECONDS,
    *,
    pause: float = PAUSE_SECONDS,
) -> T:
    """Return what the condition returns once that is true; fails after so many seconds, and says that `what` did not
    happen.

    `what` may be a function, for a description that is only known then. Give a longer `pause` for an expensive
    condition.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what if isinstance(what, str) else what()}"
        time.sleep(pause)
    return found


async def until(condition: Callable[[], object], what: str, seconds: float = SECONDS) -> None:
    """The same in a coroutine, while the event loop runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(PAUSE_SECONDS)
