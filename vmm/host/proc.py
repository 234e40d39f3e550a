# SPDX-License-Identifier: Apache-2.0
"""Processes that outlive the process that started them: identified by pid and start time, watched by pidfd, detached.

Decides when a recorded pid still means the same process, and how our programs are started so that they neither end
with the process that started them nor get signals from its terminal. Must not know what the programs do. Light: the
command line imports it, and so does the supervisor, which must stay small.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vmm.model.errors import InUse, of_os_error
from vmm.model.folders import in_use
from vmm.model.paths import MachinePaths
from vmm.model.waiting import becomes, looks

_STATE_FIELD, _START_FIELD = 0, 19  # of /proc/PID/stat, counted after the name, which can contain any character

BUSY_SECONDS = 1.0  # for another command or a cleanup to finish
_MAX_COMMAND_BYTES = 1 << 20  # longer than any of our command lines


@dataclass(frozen=True, slots=True)
class ProcessRef:
    """A process: its pid, and its start time in clock ticks since boot, because the kernel reuses pids."""

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> ProcessRef | None:
        """The living process with this pid; None if there is none, or only a zombie."""
        fields = _stat(pid)
        return None if fields is None else cls(pid, int(fields[_START_FIELD]))

    @classmethod
    def of_self(cls) -> ProcessRef:
        """This process."""
        me = cls.of(os.getpid())
        assert me is not None
        return me

    @classmethod
    def from_document(cls, document: object) -> ProcessRef | None:
        """Parse what `to_document` wrote; None for anything else."""
        match document:
            case {"pid": int(pid), "start_ticks": int(ticks)} if pid > 1:
                return cls(pid, ticks)
        return None

    def to_document(self) -> dict[str, Any]:
        """As JSON."""
        return {"pid": self.pid, "start_ticks": self.start_ticks}

    def is_alive(self) -> bool:
        """True while the process runs; a zombie counts as ended."""
        return ProcessRef.of(self.pid) == self

    def open_pidfd(self) -> int | None:
        """A descriptor that becomes readable when the process ends; None if it has ended."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except (ProcessLookupError, PermissionError):
            return None
        if not self.is_alive():  # checked after opening: from here on the pid cannot be reused unnoticed
            os.close(descriptor)
            return None
        return descriptor

    def send(self, number: int) -> bool:
        """Send a signal to exactly this process; False if it has ended."""
        descriptor = self.open_pidfd()
        if descriptor is None:
            return False
        try:
            signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(descriptor)
        return True

    def wait(self, timeout_seconds: float) -> bool:
        """Wait for the process to end; False if it is still running after the timeout."""
        descriptor = self.open_pidfd()
        if descriptor is None:
            return True
        try:
            return bool(select.select([descriptor], [], [], timeout_seconds)[0])
        finally:
            os.close(descriptor)

    def end(self, grace_seconds: float, number: int = signal.SIGTERM) -> None:
        """Ask the process to end, wait, and kill it if it does not."""
        if self.send(number) and not self.wait(grace_seconds):
            self.kill()

    def kill(self) -> None:
        """Kill the process and wait until it is dead (at most 10 s)."""
        if self.send(signal.SIGKILL):
            self.wait(10.0)


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name; None for a missing process or a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            content = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = content[content.rindex(b")") + 1 :].decode().split()
    return None if fields[_STATE_FIELD] in ("Z", "X", "x") else fields


def command_words(pid: int) -> list[str]:
    """The command line of a process, as words; empty for a process that has ended.

    Between execve and the setup of the new program's stack the kernel shows an empty command line, and a caller that
    waited for the program to start may read it just then (proc_pid_cmdline(5)), so an empty one is read again.
    """
    with contextlib.suppress(OSError):
        for _ in looks(BUSY_SECONDS):
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                content = file.read(_MAX_COMMAND_BYTES)
            if content:
                return [os.fsdecode(word) for word in content.removesuffix(b"\0").split(b"\0")]
            os.readlink(f"/proc/{pid}/exe")  # fails for kernel threads and ended processes, which have none
    return []


# -- starting ------------------------------------------------------------------------------------------------------


def python_command(module: str, *arguments: str) -> list[str]:
    """The command that runs one of our modules with this Python, whatever the working directory contains."""
    return [sys.executable, "-P", "-m", module, *arguments]


def python_environment() -> dict[str, str]:
    """Our environment plus the folders in use, with the folder of our packages first on Python's path."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    rest = os.environ.get("PYTHONPATH", "")
    return {**os.environ, **in_use().environment(), "PYTHONPATH": f"{root}{os.pathsep}{rest}" if rest else root}


def spawn_detached(
    command: Sequence[str],
    *,
    log_path: str,
    environment: Mapping[str, str] | None = None,
    descriptors: Mapping[int, int] | None = None,
    blocked_signals: Sequence[int] = (),
) -> int:
    """Start a program in a session of its own, with empty input and its output appended to a log; returns its pid.

    `descriptors`: number in the program -> our descriptor. No other descriptor is inherited. `blocked_signals` stay
    blocked unless the program unblocks them. Raises OSError.
    """
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    # First moved above all target numbers; otherwise one could be overwritten before it is copied.
    wanted = {0: null, 1: log, 2: log, **(descriptors or {})}
    first_free = max(wanted) + 1
    moved = {number: fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, first_free) for number, ours in wanted.items()}
    closed = [(os.POSIX_SPAWN_CLOSE, number) for number in _inheritable()]  # such as a lock that the shell passed on
    try:
        return os.posix_spawnp(
            command[0],
            list(command),
            dict(os.environ if environment is None else environment),
            file_actions=[*closed, *((os.POSIX_SPAWN_DUP2, ours, number) for number, ours in moved.items())],
            setsid=True,
            setsigdef=[signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE],
            setsigmask=blocked_signals,
        )
    finally:
        for descriptor in (log, null, *moved.values()):
            os.close(descriptor)


def _inheritable() -> list[int]:
    """Descriptors that a program started by us would inherit without being given them."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if int(name) > 2 and os.get_inheritable(int(name)):
                found.append(int(name))
    return found


# -- locks ---------------------------------------------------------------------------------------------------------


class Lock:
    """A lock (flock) that the kernel releases when its holder dies. `release` leaves the file at `path` in place."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor: int | None = None

    def try_take(self) -> bool:
        """Try to take the lock; False if another process, or another `Lock` of this one, holds it. Raises OSError."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except BlockingIOError:
            os.close(descriptor)
            return False
        except FileNotFoundError:
            same = False
        except BaseException:
            os.close(descriptor)
            raise
        if not same:  # the folder was removed and recreated meanwhile
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    @property
    def descriptor(self) -> int:
        """For a process that is started and must hold the lock as well. Call while the lock is held."""
        assert self._descriptor is not None
        return self._descriptor

    def is_current(self) -> bool:
        """True while we hold the lock and its path still leads to it: its folder was neither removed nor recreated."""
        with contextlib.suppress(OSError):
            return self._descriptor is not None and os.path.samestat(os.fstat(self._descriptor), os.stat(self.path))
        return False

    def release(self) -> None:
        """Release the lock; releasing it twice is fine."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Hold an exclusive lock on this path while the block runs; waits for it. Raises VmmError."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise of_os_error(error, "lock", path=path) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


class HeldLock:
    """Proof that the lock of a machine, or of its snapshots, is held. Functions that change state require it and read
    the state themselves, so that no decision is based on what was read before the lock was taken.
    """

    def __init__(self, folder: str, name: str) -> None:
        self.folder = folder
        self.name = name
        self.is_held = True


@contextlib.contextmanager
def machine_lock(folder: str, name: str, *, patience_seconds: float = BUSY_SECONDS) -> Iterator[HeldLock]:
    """Hold the lock of the machine in that folder: no other process changes the machine while the block runs.

    Waits briefly for another holder: cleaning up after a dead machine, or beginning a background merge, is quick.
    Raises InUse if the lock stays taken.
    """
    lock = Lock(MachinePaths(folder).lock)
    try:
        if not becomes(lock.try_take, patience_seconds):
            raise InUse("another vmm command is working on this machine", machine=name, hint="wait for it to end")
    except OSError as error:
        raise of_os_error(error, "lock the machine", machine=name, path=lock.path) from error
    held = HeldLock(folder, name)
    try:
        yield held
    finally:
        held.is_held = False
        lock.release()


def is_locked(path: str) -> bool:
    """True while any process holds the lock."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
    return False
