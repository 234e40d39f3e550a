# SPDX-License-Identifier: Apache-2.0
"""How to wait for what no event announces: by looking, until a deadline, in a thread or in a coroutine.

Decides when to look, and that the last look begins after the deadline: a process that did not run for a while (a busy
host, a suspended laptop) still looks once after it, so nothing that came true in time is missed. Must not know what is
waited for. Where an event exists (a pidfd, an asyncio.Event, a socket), wait for that instead.

Any other sleep in the package gives its reason on its line, and so does an interval of its own (tests/test_tidy.py).
Light: the supervisor imports it, so asyncio is imported only where a coroutine has imported it already.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Final

LOOK_SECONDS: Final = 0.02  # short for a user, long for a processor


def looks(timeout_seconds: float = math.inf, *, every_seconds: float = LOOK_SECONDS) -> Iterator[bool]:
    """The moments at which to look: at once, then at intervals, then once more at the deadline, which counts from now.

    Yields whether this look is the last.
    """
    return _looks(time.monotonic() + timeout_seconds, every_seconds)


def async_looks(timeout_seconds: float = math.inf, *, every_seconds: float = LOOK_SECONDS) -> AsyncIterator[bool]:
    """As `looks`, for a coroutine: the event loop runs in between."""
    return _AsyncLooks(time.monotonic() + timeout_seconds, every_seconds)


def becomes(
    condition: Callable[[], object], timeout_seconds: float = math.inf, *, every_seconds: float = LOOK_SECONDS
) -> bool:
    """True as soon as the condition holds; False if it still does not when it is evaluated after the deadline."""
    return any(condition() for _ in looks(timeout_seconds, every_seconds=every_seconds))


async def async_becomes(
    condition: Callable[[], object | Awaitable[object]],
    timeout_seconds: float = math.inf,
    *,
    every_seconds: float = LOOK_SECONDS,
) -> bool:
    """As `becomes`, while the event loop runs. The condition may be a coroutine function."""
    async for _ in async_looks(timeout_seconds, every_seconds=every_seconds):
        found = condition()
        if await found if isinstance(found, Awaitable) else found:
            return True
    return False


def _looks(deadline: float, every_seconds: float) -> Iterator[bool]:
    while deadline - time.monotonic() > 0:
        yield False
        time.sleep(max(0.0, min(every_seconds, deadline - time.monotonic())))
    yield True


class _AsyncLooks:
    """An iterator and not a generator: a generator that is left early is finished by a task of its own."""

    def __init__(self, deadline: float, every_seconds: float) -> None:
        self._deadline = deadline
        self._every_seconds = every_seconds
        self._has_looked = self._is_over = False

    def __aiter__(self) -> AsyncIterator[bool]:
        return self

    async def __anext__(self) -> bool:
        import asyncio

        if self._is_over:
            raise StopAsyncIteration
        if self._has_looked:
            await asyncio.sleep(max(0.0, min(self._every_seconds, self._deadline - time.monotonic())))
        self._has_looked = True
        self._is_over = time.monotonic() >= self._deadline
        return self._is_over
