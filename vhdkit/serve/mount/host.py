# SPDX-License-Identifier: Apache-2.0
"""What mounting needs from the system: kernel tables and settings, programs, and the server process of a mount.

Decides how each of these is accessed; `mounting` decides why, and the command line starts processes. Opens no image,
only files of /proc and /sys, for which `store` is not designed. Other programs get an argument list, never a shell,
and an empty standard input.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import logging
import os
import shutil
import socket
import stat
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vhdkit.errors import AccessDenied, IoFailed, NotFound
from vhdkit.serve.mount import table
from vhdkit.store import translated
from vhdkit.units import KIB, MIB
from vhdkit.waiting import looks

log = logging.getLogger(__name__)

FUSE_DEVICE = "/dev/fuse"
PROGRAM_SECONDS = 120.0  # replaying a journal may take a while
_TOOL_FOLDERS = ("/usr/sbin", "/sbin")
_PR_SET_IO_FLUSHER = 57
_UNLIMITED_BYTES = 1 << 62  # a memory group's limit of this size or more means no limit
_READ_AHEAD_KIB = MIB // KIB
_CREDENTIALS = struct.Struct("3i")
_MAX_OUTPUT_BYTES = 64 * KIB  # of a program's output
_MAX_WAITING = 256  # at once, for one server to end
_LEAVING_SECONDS = 5.0  # to accept a client, or to leave: both are quick
_ACCEPT_AGAIN_SECONDS = 0.05  # out of descriptors or memory: to accept again at once would fail again
_MAX_LINES = 2  # some programs print their manual after the error


def read_text(path: str) -> str:
    """A kernel file; empty if it does not exist or may not be read."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:  # names may contain "\r"
            return file.read()
    except OSError:
        return ""


def read_json(path: str) -> dict[str, Any]:
    """One of our JSON documents; empty if it does not exist."""
    try:
        found = json.loads(read_text(path))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def mounts() -> list[table.Mount]:
    """The mounts that this process sees."""
    return table.parse(read_text("/proc/self/mountinfo"))


def loop_files() -> dict[str, str]:
    """The file behind each loop device in use."""
    found = {}
    with contextlib.suppress(OSError):
        for name in os.listdir("/sys/block"):
            file = read_text(f"/sys/block/{name}/loop/backing_file").removesuffix("\n")
            if file:
                found[f"/dev/{name}"] = file
    return found


def loop_is_direct(device: str) -> bool:
    """True if a loop device bypasses the page cache."""
    return read_text(f"/sys/block/{os.path.basename(device)}/loop/dio").strip() == "1"


def loop_writes_are_safe() -> bool:
    """False if a server that receives writes through a loop device could deadlock on itself.

    That happens when it needs memory while its memory group is full of pages that wait to be written through the loop
    device, and the kernel makes it wait for those. With cgroup version 2, or without a group, the kernel never waits
    like that; in a limited group of version 1 it does, unless the server is marked as an I/O flusher, which requires
    CAP_SYS_RESOURCE. Observed: without this rule a copy into an ext4 in a group of 160 MiB hung forever.
    """
    return _limit_of_old_memory_group() >= _UNLIMITED_BYTES or _may_be_flusher()


def _limit_of_old_memory_group() -> int:
    for line in read_text("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            for mount in mounts():
                if mount.file_system == "cgroup" and "memory" in mount.options:
                    return _hierarchical_limit(f"{mount.mountpoint}{path}/memory.stat")
            return 0  # the group exists, but its limit cannot be read
    return _UNLIMITED_BYTES


def _hierarchical_limit(path: str) -> int:
    for line in read_text(path).splitlines():
        name, _, value = line.partition(" ")
        if name == "hierarchical_memory_limit":
            return int(value)
    return 0


def _may_be_flusher() -> bool:
    prctl = ctypes.CDLL(None).prctl
    if prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0) != 0:
        return False
    prctl(_PR_SET_IO_FLUSHER, 0, 0, 0, 0)
    return True


def read_ahead(device: str) -> None:
    """Let the kernel read ahead further than 128 KiB; only root may, and nothing depends on it."""
    with contextlib.suppress(OSError), open(f"/sys/class/bdi/{device}/read_ahead_kb", "w", encoding="ascii") as file:
        file.write(str(_READ_AHEAD_KIB))


def is_root() -> bool:
    """True if this process has root's privileges."""
    return os.geteuid() == 0


def check_fuse() -> None:
    """Raise NotFound or AccessDenied when this system, or this user, has no FUSE."""
    try:
        mode = os.stat(FUSE_DEVICE).st_mode
    except OSError as error:
        raise NotFound(
            "does not exist: this system cannot mount with FUSE", path=FUSE_DEVICE,
            hint="load the kernel's module (modprobe fuse); in a container, pass the device in (--device /dev/fuse)",
        ) from error  # fmt: skip
    if not stat.S_ISCHR(mode):
        raise NotFound("is not a device: this system cannot mount with FUSE", path=FUSE_DEVICE)
    if not os.access(FUSE_DEVICE, os.R_OK | os.W_OK):
        raise AccessDenied(
            "you have no permission to open it", path=FUSE_DEVICE,
            hint="all users can usually open it: ask root to run `chmod 666 /dev/fuse`, or mount as root",
        )  # fmt: skip
    if os.geteuid() != 0 and find_program("fusermount3") is None:
        raise NotFound("fusermount3 is not installed: without it only root can mount", hint="install Debian's fuse3")


def kind_of_place(path: str) -> str:
    """The type of a mount point: "folder", "file", "other", "missing", or "dead", a mount whose server is gone."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            return "dead"
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return "missing"
        with translated(path, "examine the mount point"):
            raise
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def is_empty(folder: str) -> bool:
    """True for an empty folder. Raises AccessDenied."""
    with translated(folder, "read the mount point"), os.scandir(folder) as entries:
        return next(entries, None) is None


def remove_folder(path: str) -> None:
    """Remove an empty folder that we made."""
    with contextlib.suppress(OSError):
        os.rmdir(path)


# -- programs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Finished:
    """A program's exit code and output."""

    code: int
    text: str


def find_program(name: str) -> str | None:
    """The program's path, even if it is in a folder that an ordinary user's PATH omits."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), *_TOOL_FOLDERS]))


def run(command: Sequence[str]) -> Finished:
    """Run a program and wait for it. Raises NotFound, IoFailed."""
    program = find_program(command[0])
    if program is None:
        raise NotFound(f"the program {command[0]} is not installed")
    try:
        # A file, not a pipe: a driver's background process would keep a pipe open.
        with open(os.memfd_create("output"), "w+b") as output:
            done = subprocess.run(
                [program, *command[1:]], stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False,
                timeout=PROGRAM_SECONDS, env={**os.environ, "LC_ALL": "C"},
            )  # fmt: skip
            output.seek(0)
            text = output.read(_MAX_OUTPUT_BYTES).decode("utf-8", "replace")
    except (OSError, subprocess.SubprocessError) as error:
        raise IoFailed(f"cannot be run: {error}", path=program) from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return Finished(done.returncode, "; ".join(lines[:_MAX_LINES]))


def users_of(mountpoint: str) -> list[str]:
    """The processes that keep a mount busy, as far as we may see them: "bash (process 4711)"."""
    found = []
    below = mountpoint.rstrip("/") + "/"
    for number in (name for name in os.listdir("/proc") if name.isdigit()):
        for link in _links_of(number):
            if link == mountpoint or link.startswith(below):
                found.append(f"{read_text(f'/proc/{number}/comm').strip()} (process {number})")
                break
    return found


def _links_of(number: str) -> Iterator[str]:
    folder = f"/proc/{number}"
    names = ["cwd", "root"]
    with contextlib.suppress(OSError):
        names += [f"fd/{name}" for name in os.listdir(f"{folder}/fd")]
    for name in names:
        with contextlib.suppress(OSError):
            yield os.readlink(f"{folder}/{name}")


# -- the server's process -----------------------------------------------------------------------------------------


class Server:
    """The server process of a mount."""

    def __init__(self, pid: int, sock: socket.socket | None = None) -> None:
        self.pid = pid
        self._sock = sock

    def wait(self) -> str | None:
        """Wait until it has ended; returns the error that occurred when it closed the image, if any."""
        if self._sock is None:
            return None
        problem = bytearray()
        with self._sock as sock, contextlib.suppress(OSError):
            while piece := sock.recv(KIB):
                problem += piece
        return problem.decode("utf-8", "replace") or None

    def close(self) -> None:
        """Stop waiting."""
        if self._sock is not None:
            self._sock.close()


def find_server(mount: table.Mount) -> Server | None:
    """The server of one of our mounts, or None if it is dead. Call this while it is still mounted."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _connect(sock, table.server_address(mount.device))
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    except OSError:
        sock.close()
        return None
    pid, user, _ = _CREDENTIALS.unpack(raw)
    if mount.owner_id is not None and user != mount.owner_id:  # any user could bind that name
        sock.close()
        return None
    return Server(pid, sock)


def _connect(sock: socket.socket, address: str) -> None:
    """Connect with a time limit: the queue of a server that hangs may be full."""
    sock.setblocking(False)
    for is_last in looks(_LEAVING_SECONDS):
        try:
            sock.connect(address)
            break
        except BlockingIOError:
            if is_last:
                raise
    sock.setblocking(True)


class Presence:
    """The server's side: clients that connect notice when the process is gone, and receive its final error, if any.

    A thread accepts them: otherwise connections of programs that only query the server would fill the queue, and the
    next client would wait forever. Only the same user and root can unmount, so only their connections are kept.
    """

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._waiting: list[socket.socket] = []
        self._thread: threading.Thread | None = None

    def show(self, mountpoint: str) -> None:
        """Become reachable. Called while the kernel waits for us: the mount itself must not be accessed."""
        mount = table.top_at(mounts(), mountpoint)
        with contextlib.suppress(OSError):  # on failure, clients cannot wait for us, and nothing else is lost
            if mount is not None:
                self._bind(table.server_address(mount.device))
                self._sock.listen()
                self._thread = threading.Thread(target=self._take_in, name="presence", daemon=True)
                self._thread.start()

    def _bind(self, address: str) -> None:
        """Device numbers are reused at once: the server that had ours may not have left yet, so retry for a while."""
        for is_last in looks(_LEAVING_SECONDS):
            try:
                self._sock.bind(address)
                return
            except OSError as error:
                if error.errno != errno.EADDRINUSE or is_last:
                    raise

    def _take_in(self) -> None:
        while True:
            try:
                client, _ = self._sock.accept()
            except OSError as error:
                if error.errno in (errno.ECONNABORTED, errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                    time.sleep(_ACCEPT_AGAIN_SECONDS)  # for resources to be freed
                    continue
                return  # `leave` was called
            _, user, _ = _CREDENTIALS.unpack(
                client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            )
            self._waiting = [one for one in self._waiting if not _is_gone(one)]
            if user in (0, os.geteuid()) and len(self._waiting) < _MAX_WAITING:
                self._waiting.append(client)
            else:
                client.close()

    def leave(self) -> None:
        """The mount is gone: its device number, and so our name, may be reused; clients keep waiting for us."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes the thread, which accepts the clients already queued
        if self._thread is not None:
            self._thread.join()
        self._sock.close()

    def report(self, problem: str) -> None:
        """Send the problem to all waiting clients, and disconnect them. Call after `leave`."""
        for client in self._waiting:
            with client, contextlib.suppress(OSError):  # some will have disconnected
                client.sendall(problem.encode("utf-8", "replace"))

    def close(self) -> None:
        """Stop being reachable, and disconnect waiting clients."""
        self.leave()
        for client in self._waiting:
            client.close()


def _is_gone(client: socket.socket) -> bool:
    try:
        if client.recv(1, socket.MSG_DONTWAIT):
            return False  # it sent something unexpected, but it is connected
    except BlockingIOError:
        return False
    except OSError:
        pass
    client.close()
    return True


@dataclass(slots=True)
class Child:
    """Our server process. `output` is what it, or libfuse, printed before it was ready."""

    pid: int
    is_ready: bool
    output: str

    def wait(self) -> int:
        """Wait for it; returns its exit code."""
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)


def become_flusher() -> None:
    """Mark this process as an I/O flusher, if permitted: see `loop_writes_are_safe`. Its threads inherit this."""
    ctypes.CDLL(None).prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)
