# SPDX-License-Identifier: Apache-2.0
"""The commands `vhdkit` and `vmm` without the cost of starting: a process that has loaded them forks one for each
call.

A shell finds programs of these names in `WarmCommands.bin`; each passes its arguments, folder, environment, standard
streams, umask and namespaces (network and mounts) to the loaded process, waits for the exit code of the copy that runs
them, and forwards signals to it; if it is killed, so is the copy. The copy runs what the installed command runs, as a
separate process. A user or a group other than the loaded process's is refused.

For tests of what a command does. A test of the process itself (its start, its terminal, its death) starts the real
command. `warm("vmm")` gives the words to use in place of `[sys.executable, "-m", "vmm"]`, and `warm(PYTHON)` those in
place of Python for `-m MODULE`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NoReturn

from tests.support import ROOT
from tests.waiting import becomes, wait_until

COMMANDS = ("vhdkit", "vmm")
PYTHON = "python"  # with both packages loaded, for `-m MODULE`
SECONDS = 60.0
_LIBC = ctypes.CDLL(None, use_errno=True)

# Without the site packages it starts in 15 ms.
_CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
if os.environ.get("LISTEN_PID") == str(os.getpid()):  # sockets were passed to this process, which cannot pass them on
    os.execv({python!r}, [{python!r}, "-P", "-m", os.path.basename(sys.argv[0]), *sys.argv[1:]])
link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
link.connect({address!r})
umask = os.umask(0)
os.umask(umask)
who = [os.getresuid(), os.getresgid()]
call = [os.path.basename(sys.argv[0]), sys.argv[1:], os.getcwd(), dict(os.environ), umask, who]
words = json.dumps(call).encode()
spaces = [os.open("/proc/self/ns/" + name, os.O_RDONLY) for name in ("mnt", "net")]
socket.send_fds(link, [len(words).to_bytes(4, "big")], [0, 1, 2, *spaces])
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
        for name in (*COMMANDS, PYTHON):
            program = self.bin / name
            program.write_text(_CLIENT.format(python=sys.executable, address=address), encoding="utf-8")
            program.chmod(0o755)
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "tests.warm_commands", address], cwd=ROOT, start_new_session=True,
            stdin=subprocess.PIPE,  # it ends when this process does, however that ends
        )  # fmt: skip
        wait_until(
            lambda: os.path.exists(address) or self._process.poll() is not None, "the commands are loaded", SECONDS
        )
        assert self._process.returncode is None, "the process that loads the commands ended"

    def close(self) -> None:
        """SIGTERM to all that run, which ends servers in order; after a while SIGKILL."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                break
            if becomes(self._has_ended, 10.0):
                break
        self._process.wait(SECONDS)
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _has_ended(self) -> bool:
        """True if no process of the group is left."""
        self._process.poll()
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return True
        return False


@contextlib.contextmanager
def warm_commands(*prefix: str) -> Iterator[WarmCommands]:
    """Both commands, loaded; ended afterwards without a trace."""
    folder = Path(tempfile.mkdtemp(prefix="warm-", dir="/tmp"))  # sockets need short names, whatever TMPDIR is
    try:
        with contextlib.closing(WarmCommands(folder / "w", *prefix)) as commands:
            yield commands
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@cache
def _shared() -> tuple[contextlib.ExitStack, WarmCommands]:
    stack = contextlib.ExitStack()
    return stack, stack.enter_context(warm_commands())


def warm(name: str) -> list[str]:
    """The words that run `vhdkit`, `vmm` or Python; the loaded process lives as long as these tests."""
    return [str(_shared()[1].bin / name)]


def end_shared() -> None:
    """End the loaded process of `warm`, if there is one; the end of a test session calls it."""
    if _shared.cache_info().currsize:
        _shared()[0].close()
        _shared.cache_clear()


def _load() -> None:
    """Import every verb of both commands, and what they import when they are used."""
    for package in ("vhdkit", "vmm"):
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            if not module.name.endswith((".__main__", "nbdkit.plugin")):
                importlib.import_module(module.name)
    gc.collect()
    gc.freeze()  # the copies share it


def _serve(address: str) -> NoReturn:
    _load()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"{address}.new")
    listener.listen(64)
    os.rename(f"{address}.new", address)
    ready = select.epoll()
    ready.register(listener, select.EPOLLIN)
    ready.register(sys.stdin, select.EPOLLHUP)
    pairs: dict[int, tuple[socket.socket, int]] = {}  # of a caller and its copy, by the descriptor of either
    while True:
        events = [fd for fd, _ in ready.poll()]
        if sys.stdin.fileno() in events:  # the process that started this one is gone
            os.killpg(0, signal.SIGTERM)
        for fd in events:
            if fd in pairs:  # one of the two has ended, so the other must end, too
                link, copy = pairs[fd]
                del pairs[copy], pairs[link.fileno()]
                _end(copy, link)
                ready.unregister(copy)
                ready.unregister(link)  # by hand: it stays as long as a copy of another caller has it open
                link.close()
                os.close(copy)
        if listener.fileno() in events:  # last: it may get a number that is in `events`
            link, _ = listener.accept()
            if (new := _copy(link, [listener, ready, *(one for one, _ in pairs.values())])) is None:
                link.close()
                continue
            pairs |= dict.fromkeys((link.fileno(), new), (link, new))
            ready.register(link, select.EPOLLRDHUP)  # what can be read is the copy's
            ready.register(new, select.EPOLLIN)


def _copy(link: socket.socket, ours: Sequence[socket.socket | select.epoll]) -> int | None:
    """Fork the copy that runs a call, without `ours`; returns its process's descriptor, or None if the caller is
    gone."""
    head, fds, _, _ = socket.recv_fds(link, 4, 5)
    if not head:
        return None
    pid = os.fork()
    if pid == 0:
        for one in ours:
            one.close()
        _run(link, int.from_bytes(head, "big"), fds)
    for fd in fds:
        os.close(fd)
    return os.pidfd_open(pid)


def _end(copy: int, link: socket.socket) -> None:
    """Kill the copy if it still runs, and report its exit code to the caller if that still exists."""
    signal.pidfd_send_signal(copy, signal.SIGKILL)  # one that has ended is not yet waited for
    ended = os.waitid(os.P_PIDFD, copy, os.WEXITED)
    assert ended is not None
    code = ended.si_status if ended.si_code == os.CLD_EXITED else 128 + ended.si_status
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        link.sendall(b"%d\n" % code)


def _enter(namespaces: list[int]) -> None:
    """Enter the caller's mounts and network."""
    for name, fd in zip(("mnt", "net"), namespaces, strict=True):
        if os.fstat(fd).st_ino != os.stat(f"/proc/self/ns/{name}").st_ino and _LIBC.setns(fd, 0) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the caller's namespace of {name}")
        os.close(fd)


def _run(link: socket.socket, size: int, fds: list[int]) -> NoReturn:
    """The copy: become the command that was called."""
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with link.makefile("rb") as lines:
            name, words, folder, environment, umask, who = json.loads(lines.read(size))
        for target, fd in enumerate(fds[:3]):
            os.dup2(fd, target)
            os.close(fd)
        assert who == [list(os.getresuid()), list(os.getresgid())], "another user starts the real command"
        _enter(fds[3:])
        os.umask(umask)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        link.sendall(b"%d\n" % os.getpid())
        link.close()
        _become(name, words)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _become(name: str, words: list[str]) -> None:
    if name != PYTHON:
        sys.argv = [name, *words]
        importlib.import_module(f"{name}.cli.main").main()
    else:
        option, program, *rest = words
        assert option == "-m", "a program in words starts the real Python"
        sys.argv = [program, *rest]
        runpy.run_module(program, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
