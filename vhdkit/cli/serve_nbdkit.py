# SPDX-License-Identifier: Apache-2.0
"""nbdkit as the engine of `serve`: found, checked, started with our sockets, and watched until it ends.

Decides which nbdkit is used and how signals and the exit code are passed on. Its command line and environment are
decided in `serve.nbdkit.command`.

We make the sockets: they are private, replace stale ones and are removed at the end, as with our own server. nbdkit
gets them in the way a service manager passes sockets (LISTEN_FDS).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

import click

from vhdkit import IoFailed
from vhdkit.folder import exists, is_regular, remove_file
from vhdkit.serve.nbdkit.command import NbdkitLaunch, check_python, missing, nbdkit_command, nbdkit_environment
from vhdkit.sockets import PrivateFolder
from vhdkit.waiting import becomes

ARGUMENTS = "vhdkit.nbdkit.arguments"  # where the command line keeps what follows "--"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU)
_FIRST_FD = 3  # of the sockets, by systemd's convention
_DUMP_SECONDS = 30
# LISTEN_PID must be the number of the process that becomes nbdkit.
_BECOME = ("/bin/sh", "-c", 'LISTEN_PID=$$ exec "$@"', "sh")


class EngineCommand(click.Command):
    """A command in which everything after "--" is for nbdkit, when that is the engine."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take nbdkit's own arguments out before ours are parsed."""
        if "--" in args:
            place = args.index("--")
            before = args[:place]
            if "--engine=nbdkit" in before or ("--engine", "nbdkit") in itertools.pairwise(before):
                ctx.meta[ARGUMENTS] = tuple(args[place + 1 :])
                args = before
        return super().parse_args(ctx, args)


def find_nbdkit() -> str:
    """nbdkit's path. Raises NotFound without it or its python plugin, InvalidArgument for one of another Python."""
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
        program = os.path.join(folder, "nbdkit")
        if folder and is_regular(program):
            break
    else:
        raise missing("it is not")
    try:
        dumped = subprocess.run(
            [program, "python", "--dump-plugin"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=_DUMP_SECONDS,
            env=nbdkit_environment(program, os.environ),
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise IoFailed(f"cannot be run: {error}", path=program) from error
    check_python(dumped.stdout, sys.version_info[:2])
    return program


def run_nbdkit(
    program: str, launch: NbdkitLaunch, sockets: Sequence[socket.socket], ready: Callable[[], None]
) -> None:
    """Serve until nbdkit ends, which it does when we get a signal; `ready` is called when clients are served.

    Raises IoFailed when nbdkit fails, after it has printed why on standard error.
    """
    with contextlib.closing(PrivateFolder()) as folder:
        pid_file = os.path.join(folder.path, "nbdkit.pid")
        command = nbdkit_command(program, dataclasses.replace(launch, pid_file=pid_file))
        try:
            with _ended_by_signals() as child:
                child.start(command, nbdkit_environment(program, os.environ), sockets)
                becomes(lambda: exists(pid_file) or child.has_ended())
                if not child.has_ended():
                    ready()
                code = child.wait()
        finally:
            if exists(pid_file):
                remove_file(pid_file)
    if code < 0:
        raise IoFailed(f"nbdkit was ended by {signal.Signals(-code).name}")
    if code > 0:
        raise IoFailed(f"nbdkit ended with exit code {code}; its message is above")


class _Child:
    """The process that is nbdkit."""

    def __init__(self) -> None:
        self._pid = 0
        self._code: int | None = None
        self._is_stopping = False

    def start(self, command: Sequence[str], environment: dict[str, str], sockets: Sequence[socket.socket]) -> None:
        """Start nbdkit with these listening sockets."""
        environment["LISTEN_FDS"] = str(len(sockets))
        # Copy them first to numbers above those that they are to get.
        copies = [_copy_above(sock.fileno(), _FIRST_FD + len(sockets)) for sock in sockets]
        places = [(os.POSIX_SPAWN_DUP2, copy, _FIRST_FD + number) for number, copy in enumerate(copies)]
        words = [*_BECOME, *command]
        self._pid = os.posix_spawn(words[0], words, environment, file_actions=places, setsigdef=[signal.SIGPIPE])
        for copy in copies:
            os.close(copy)
        if self._is_stopping:
            self.end()

    def end(self) -> None:
        """Ask it to answer what is in flight, flush and end."""
        self._is_stopping = True
        if self._pid and self._code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGTERM)

    def has_ended(self) -> bool:
        """True when nbdkit has ended; does not wait."""
        if self._code is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code is not None

    def wait(self) -> int:
        """Its exit code, or a signal's number as a negative one."""
        if self._code is None:
            _, status = os.waitpid(self._pid, 0)
            self._code = os.waitstatus_to_exitcode(status)
        return self._code


def _copy_above(fd: int, limit: int) -> int:
    """A copy of the descriptor with a number that is not below `limit`."""
    too_low = []
    try:
        while (copy := os.dup(fd)) < limit:
            too_low.append(copy)
    finally:
        for one in too_low:
            os.close(one)
    return copy


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[_Child]:
    """A child that the first of our signals ends, and that does not outlive the block."""
    child = _Child()
    for one in _SIGNALS:
        if signal.getsignal(one) != signal.SIG_IGN:  # a signal that was ignored at our start (nohup) stays ignored
            signal.signal(one, lambda number, frame: child.end())
    try:
        yield child
    except BaseException:
        child.end()
        child.wait()
        raise
