# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C for work that may hang in the kernel, such as writing to a file server that does not answer.

A process that waits for a hung file system may notice no signal, and some cannot even be killed. So the work is done
in a child process, and this one only waits for it: after Ctrl-C it passes the signal on, waits some seconds, kills the
child, and ends. Decides how long the work may take to end by itself, and that it does not outlive this process. Must
not know what the work is; what it leaves then must be what a kill leaves.

    this process    waits, passes Ctrl-C on                     the child    a process group of its own, so that
                    holds the end of a pipe                                  Ctrl-C reaches it once; dies with the pipe
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable

from vmm.cli import entry
from vmm.cli.common import print_aside
from vmm.cli.failure import EXIT_INTERRUPTED
from vmm.model.waiting import becomes

PATIENCE_SECONDS = 10.0  # for the work to end, and to tidy up, after Ctrl-C


def exit_code_of_child(words: Callable[[], str]) -> int | None:
    """Go on in a child process: None there, and its exit code here, once it has ended.

    If it does not end after Ctrl-C, `words()` are printed. None, too, in a program that calls the command: that may
    have threads, and work of its own.
    """
    if not entry.is_own_process or threading.active_count() > 1:
        return None
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    reading, writing = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # it writes to the terminal of another group
        os.close(writing)
        threading.Thread(target=_die_with, args=(reading,), name="vmm-parent", daemon=True).start()
        return None
    os.close(reading)
    with contextlib.closing(os.fdopen(writing, "wb")):
        return _waited(child, words)


def _die_with(reading: int) -> None:
    """End this process when the other end of the pipe is closed."""
    os.read(reading, 1)
    os.kill(os.getpid(), signal.SIGKILL)


def _waited(child: int, words: Callable[[], str]) -> int:
    try:
        return _code(os.waitpid(child, 0)[1])
    except KeyboardInterrupt:
        os.kill(child, signal.SIGINT)
    found: list[int] = []

    def has_ended() -> bool:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            found.append(_code(status))
        return bool(pid)

    if becomes(has_ended, PATIENCE_SECONDS):
        return found[0]
    os.kill(child, signal.SIGKILL)
    print_aside(f"vmm: interrupted: {words()}")
    return EXIT_INTERRUPTED


def _code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
