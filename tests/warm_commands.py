# SPDX-License-Identifier: Apache-2.0
"""The commands `vhdkit` and `vmm` without their start: a process that has them loaded forks one for each call.

A shell finds programs of these names in `WarmCommands.bin`; each hands its words, folder, environment and standard
streams to the loaded process, waits for the exit code of the copy that runs them, and passes signals on to it. What
the copy runs is what the installed command runs, in a process of its own. For tests that type many commands.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from tests.support import ROOT

COMMANDS = ("vhdkit", "vmm")
SECONDS = 60.0

# Without the site packages it starts in 15 ms.
_CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
link.connect({address!r})
words = json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(link, [len(words).to_bytes(4, "big")], [0, 1, 2])
link.sendall(words)
lines = link.makefile("rb")
pid = int(lines.readline() or b"0")
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
sys.exit(int(lines.readline() or b"137"))  # killed
"""


class WarmCommands:
    """The loaded process and the folder with the programs; `close` ends it and every command that still runs."""

    def __init__(self, folder: Path, *prefix: str) -> None:
        """Start it in a new `folder` with a short name. `prefix` is a command that runs it, such as `unshare`."""
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        address = str(folder / "warm.sock")
        for name in COMMANDS:
            program = self.bin / name
            program.write_text(_CLIENT.format(python=sys.executable, address=address), encoding="utf-8")
            program.chmod(0o755)
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "tests.warm_commands", address], cwd=ROOT, start_new_session=True,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + SECONDS
        while not os.path.exists(address):
            assert self._process.poll() is None and time.monotonic() < deadline, "the commands were not loaded"
            time.sleep(0.01)

    def close(self) -> None:
        """SIGTERM to all that run, which ends servers in order; after a while SIGKILL."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                break
            self._wait_for_the_group(10.0)
        self._process.wait(SECONDS)

    def _wait_for_the_group(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._process.poll()
            try:
                os.killpg(self._process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.01)


@contextlib.contextmanager
def warm_commands(*prefix: str) -> Iterator[WarmCommands]:
    """Both commands, loaded; ended and without a trace afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="warm-", dir="/tmp"))  # sockets have short names, whatever TMPDIR is
    try:
        with contextlib.closing(WarmCommands(folder / "w", *prefix)) as commands:
            yield commands
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _load() -> None:
    """Import every verb of both commands, and what they import when they are used."""
    for package in ("vhdkit", "vmm"):
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            if not module.name.endswith((".__main__", "nbdkit.plugin")):
                importlib.import_module(module.name)


def _serve(address: str) -> NoReturn:
    _load()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the copies: their callers get the exit code
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"{address}.new")
    listener.listen(64)
    os.rename(f"{address}.new", address)
    while True:
        link, _ = listener.accept()
        head, fds, _, _ = socket.recv_fds(link, 4, 3)
        if os.fork() == 0:
            listener.close()
            _run(link, int.from_bytes(head, "big"), fds)
        link.close()
        for fd in fds:
            os.close(fd)


def _run(link: socket.socket, size: int, fds: list[int]) -> NoReturn:
    """The copy: become the command that was called, and tell its end."""
    code = 1
    try:
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with link.makefile("rb") as lines:
            name, words, folder, environment = json.loads(lines.read(size))
        for target, fd in enumerate(fds):
            os.dup2(fd, target)
            os.close(fd)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        sys.argv = [name, *words]
        link.sendall(b"%d\n" % os.getpid())
        importlib.import_module(f"{name}.cli.main").main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        code = 130
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        link.sendall(b"%d\n" % code)
        os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1])
