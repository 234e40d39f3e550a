# SPDX-License-Identifier: Apache-2.0
"""Signals that end a process by default although their senders do not want that, and what a server does about them.

`kill -USR1` asks many programs for their progress (dd, for example), timers send SIGALRM, and the default action of
all of these signals ends the process: what clients wrote and did not flush yet would be lost (signal(7)).
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

UNMEANT_SIGNALS = (
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGVTALRM,
    signal.SIGPROF,
    signal.SIGIO,
    signal.SIGPWR,
    *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
)


def ignore_unmeant() -> dict[int, object]:
    """Ignore these signals in this process and the programs that it starts; returns the previous handlers."""
    return {one: signal.signal(one, signal.SIG_IGN) for one in UNMEANT_SIGNALS}


@contextlib.contextmanager
def unmeant_ignored() -> Iterator[None]:
    """Ignore these signals while the block runs. Outside the main thread, which alone sets handlers, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = ignore_unmeant()
    try:
        yield
    finally:
        for one, handler in before.items():
            if handler is not None:  # None: set by C code, and out of Python's reach
                signal.signal(one, handler)  # type: ignore[arg-type]  # what signal.signal itself has returned
