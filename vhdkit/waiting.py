# SPDX-License-Identifier: Apache-2.0
"""How to wait for what no event announces: by looking, until a deadline.

Decides when to look, and that the last look begins after the deadline: a process that did not run for a while (a busy
host, a suspended laptop) still looks once after it, so nothing that came true in time is missed. Must not know what is
waited for. Where an event exists (a pidfd, a condition, a socket), wait for that instead.

Any other sleep in the package gives its reason on its line, and so does an interval of its own (tests/test_tidy.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Final

LOOK_SECONDS: Final = 0.02  # short for a user, long for a processor


def looks(timeout_seconds: float = math.inf, *, every_seconds: float = LOOK_SECONDS) -> Iterator[bool]:
    """The moments at which to look: at once, then at intervals, then once more at the deadline, which counts from now.

    Yields whether this look is the last.
    """
    return _looks(time.monotonic() + timeout_seconds, every_seconds)


def _looks(deadline: float, every_seconds: float) -> Iterator[bool]:
    while deadline - time.monotonic() > 0:
        yield False
        time.sleep(max(0.0, min(every_seconds, deadline - time.monotonic())))
    yield True


def becomes(
    condition: Callable[[], object], timeout_seconds: float = math.inf, *, every_seconds: float = LOOK_SECONDS
) -> bool:
    """True as soon as the condition holds; False if it still does not when it is evaluated after the deadline."""
    return any(condition() for _ in looks(timeout_seconds, every_seconds=every_seconds))
