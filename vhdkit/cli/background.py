# SPDX-License-Identifier: Apache-2.0
"""A background process that continues after the command has returned.

Decides how it is detached from the terminal, and how the command learns that it is ready, or why it is not. Must not
know what the process does. The command has one thread, and the new process is a copy of it: open files stay open.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn, TypeAlias

from vhdkit.cli.unmeant import ignore_unmeant
from vhdkit.descriptor import passing_on
from vhdkit.serve.mount.host import Child, become_flusher
from vhdkit.units import KIB

Body: TypeAlias = Callable[
    [Callable[[], None]], int
]  # takes the function that it calls when it is ready; returns an exit code

_MAX_OUTPUT_BYTES = 64 * KIB
_READY = b"+"


def start(body: Body, *, talks: bool) -> Child:
    """Run `body` in a background process; return when it reports that it is ready, or has ended.

    The process is detached: its own session, the root folder, no terminal. If `talks` is set, its standard error
    still goes to the command's once it is ready.
    """
    ready_end, child_ready = os.pipe()
    output_end, child_output = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # numpy has threads that wait for work and hold nothing
        with passing_on():
            pid = os.fork()
    if pid == 0:
        os.close(ready_end)
        os.close(output_end)
        _serve(body, child_ready, child_output, talks)
    os.close(child_ready)
    os.close(child_output)
    try:
        is_ready = os.read(ready_end, 1) == _READY
        output = b"" if is_ready else _rest(output_end)
    except BaseException:  # Ctrl-C: leave no process that the user does not know of
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        raise
    finally:
        os.close(ready_end)
        os.close(output_end)
    return Child(pid, is_ready, output.decode("utf-8", "replace"))


def _rest(fd: int) -> bytes:
    pieces = []
    while piece := os.read(fd, _MAX_OUTPUT_BYTES):
        pieces.append(piece)
    return b"".join(pieces)[:_MAX_OUTPUT_BYTES]


def _serve(body: Body, ready_fd: int, output_fd: int, talks: bool) -> NoReturn:
    """The new process, from its beginning to its end."""
    code = 1
    try:
        os.setsid()
        os.chdir("/")
        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(one, signal.SIG_DFL)  # libfuse then handles them and shuts down cleanly
        ignore_unmeant()
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        stderr = os.dup(2) if talks else nothing
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        os.dup2(output_fd, 2)
        os.close(output_fd)
        become_flusher()

        def ready() -> None:
            os.dup2(stderr, 2)
            os.write(ready_fd, _READY)
            os.close(ready_fd)

        code = body(ready)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode("utf-8", "replace"))
    finally:
        os._exit(code)  # skips what the command does at its end, such as flushing its buffers
