# SPDX-License-Identifier: Apache-2.0
"""What mounting needs from the system: the kernel's tables and switches, programs, and the server of a mount.

Decides how each of these is asked; `mounting` decides what for, and the command line starts processes. Opens no image:
only files of /proc and /sys, for which `store` is not made. Other programs get an argument list, never a shell, and an
empty standard input.
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

log = logging.getLogger(__name__)

FUSE_DEVICE = "/dev/fuse"
PROGRAM_SECONDS = 120.0  # replaying a journal may take a while
_TOOL_FOLDERS = ("/usr/sbin", "/sbin")
_PR_SET_IO_FLUSHER = 57
_UNLIMITED_BYTES = 1 << 62  # from here on a memory group's limit is none
_READ_AHEAD_KIB = MIB // KIB
_CREDENTIALS = struct.Struct("3i")
_MAX_TOLD = 64 * KIB  # of what a program says
_MAX_WAITING = 256  # at once, for one server to end
_LEAVING_SECONDS = 5.0  # to take somebody in, or to leave: both take no time
_MAX_LINES = 2  # some programs go on with their manual


def read_text(path: str) -> str:
    """A file of the kernel's; empty where there is none or none for us."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:  # names may hold "\r"
            return file.read()
    except OSError:
        return ""


def read_json(path: str) -> dict[str, Any]:
    """A JSON document of ours; empty where there is none."""
    try:
        found = json.loads(read_text(path))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def mounts() -> list[table.Mount]:
    """What is mounted, as this process sees it."""
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
    """True when a loop device goes past the page cache."""
    return read_text(f"/sys/block/{os.path.basename(device)}/loop/dio").strip() == "1"


def loop_writes_are_safe() -> bool:
    """False where a server that is written to by a loop device could come to wait for itself.

    That happens when it needs memory, its memory group is full of pages waiting to be written through the loop
    device, and the kernel has it wait for those. Groups of cgroup version 2, and no group, never wait so; a limited
    group of version 1 does, unless the server is known as one that writes for others, which takes CAP_SYS_RESOURCE.
    Seen: without this rule a copy into an ext4 in a group of 160 MiB stood still for good.
    """
    return _limit_of_old_memory_group() >= _UNLIMITED_BYTES or _may_be_flusher()


def _limit_of_old_memory_group() -> int:
    for line in read_text("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            for mount in mounts():
                if mount.file_system == "cgroup" and "memory" in mount.options:
                    return _hierarchical_limit(f"{mount.mountpoint}{path}/memory.stat")
            return 0  # it is there and cannot be looked at
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
    """Let the kernel read further ahead than 128 KiB; only root may, and nothing depends on it."""
    with contextlib.suppress(OSError), open(f"/sys/class/bdi/{device}/read_ahead_kb", "w", encoding="ascii") as file:
        file.write(str(_READ_AHEAD_KIB))


def is_root() -> bool:
    """True when we may do what only root may."""
    return os.geteuid() == 0


def check_fuse() -> None:
    """Raise NotFound or AccessDenied when this system, or this user, has no FUSE."""
    try:
        mode = os.stat(FUSE_DEVICE).st_mode
    except OSError as error:
        raise NotFound(
            "is not there: this system cannot mount with FUSE", path=FUSE_DEVICE,
            hint="load the kernel's module (modprobe fuse); in a container, pass the device in (--device /dev/fuse)",
        ) from error  # fmt: skip
    if not stat.S_ISCHR(mode):
        raise NotFound("is not a device: this system cannot mount with FUSE", path=FUSE_DEVICE)
    if not os.access(FUSE_DEVICE, os.R_OK | os.W_OK):
        raise AccessDenied(
            "may not be opened by you", path=FUSE_DEVICE,
            hint="it is usually open to everybody: have root run `chmod 666 /dev/fuse`, or mount as root",
        )  # fmt: skip
    if os.geteuid() != 0 and find_program("fusermount3") is None:
        raise NotFound("fusermount3 is not installed, without which only root mounts", hint="install Debian's fuse3")


def kind_of_place(path: str) -> str:
    """What is at a mount point: "folder", "file", "other", "missing", or "dead", a mount whose server is gone."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            return "dead"
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return "missing"
        with translated(path, "look at the mount point"):
            raise
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def is_empty(folder: str) -> bool:
    """True for a folder with nothing in it. Raises AccessDenied."""
    with translated(folder, "look into the mount point"), os.scandir(folder) as entries:
        return next(entries, None) is None


def remove_folder(path: str) -> None:
    """Remove an empty folder that we made."""
    with contextlib.suppress(OSError):
        os.rmdir(path)


# -- programs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Told:
    """How a program ended, and what it said."""

    code: int
    text: str


def find_program(name: str) -> str | None:
    """Its path, also where an ordinary user's search path does not lead."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), *_TOOL_FOLDERS]))


def run(command: Sequence[str]) -> Told:
    """Run a program to its end. Raises NotFound, IoFailed."""
    program = find_program(command[0])
    if program is None:
        raise NotFound(f"the program {command[0]} is not installed")
    try:
        # In a file, not a pipe: what a driver leaves running in the background would hold a pipe open.
        with open(os.memfd_create("told"), "w+b") as told:
            done = subprocess.run(
                [program, *command[1:]], stdin=subprocess.DEVNULL, stdout=told, stderr=told, check=False,
                timeout=PROGRAM_SECONDS, env={**os.environ, "LC_ALL": "C"},
            )  # fmt: skip
            told.seek(0)
            said = told.read(_MAX_TOLD).decode("utf-8", "replace")
    except (OSError, subprocess.SubprocessError) as error:
        raise IoFailed(f"cannot be run: {error}", path=program) from error
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return Told(done.returncode, "; ".join(lines[:_MAX_LINES]))


def users_of(mountpoint: str) -> list[str]:
    """Who keeps a mount busy, as far as we may see: "bash (process 4711)"."""
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
    """The process that answers a mount."""

    def __init__(self, pid: int, sock: socket.socket | None = None) -> None:
        self.pid = pid
        self._sock = sock

    def wait(self) -> str | None:
        """Wait until it has ended; what went wrong when it closed the image, if anything did."""
        if self._sock is None:
            return None
        told = bytearray()
        with self._sock as sock, contextlib.suppress(OSError):
            while piece := sock.recv(KIB):
                told += piece
        return told.decode("utf-8", "replace") or None

    def close(self) -> None:
        """Do not wait."""
        if self._sock is not None:
            self._sock.close()


def find_server(mount: table.Mount) -> Server | None:
    """The server of a mount of ours, or None when it is dead. To be asked while it is still mounted."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _connect(sock, table.server_address(mount.device))
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    except OSError:
        sock.close()
        return None
    pid, user, _ = _CREDENTIALS.unpack(raw)
    if mount.owner_id is not None and user != mount.owner_id:  # anybody could take such a name
        sock.close()
        return None
    return Server(pid, sock)


def _connect(sock: socket.socket, address: str) -> None:
    """Not for ever: the queue of a server that hangs may be full."""
    deadline = time.monotonic() + _LEAVING_SECONDS
    sock.setblocking(False)
    while True:
        try:
            sock.connect(address)
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            pause()
    sock.setblocking(True)


class Presence:
    """The server's end: whoever connects sees when the process is gone, and is told what went wrong at the end.

    A thread takes them in: those who only look would fill the queue one day, and the next would wait for ever. Only
    the same user and root can unmount, and so only they are kept.
    """

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._waiting: list[socket.socket] = []
        self._thread: threading.Thread | None = None

    def show(self, mountpoint: str) -> None:
        """From now on we are found. Called while the kernel waits for us: the mount itself must not be touched."""
        mount = table.top_at(mounts(), mountpoint)
        with contextlib.suppress(OSError):  # then nobody can wait for us, no more
            if mount is not None:
                self._bind(table.server_address(mount.device))
                self._sock.listen()
                self._thread = threading.Thread(target=self._take_in, name="presence", daemon=True)
                self._thread.start()

    def _bind(self, address: str) -> None:
        """Device numbers are used again at once: the server that had ours may not have left yet."""
        deadline = time.monotonic() + _LEAVING_SECONDS
        while True:
            try:
                self._sock.bind(address)
                return
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() >= deadline:
                    raise
                pause()

    def _take_in(self) -> None:
        while True:
            try:
                client, _ = self._sock.accept()
            except OSError as error:
                if error.errno in (errno.ECONNABORTED, errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                    pause()
                    continue
                return  # we are leaving
            _, user, _ = _CREDENTIALS.unpack(
                client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            )
            self._waiting = [one for one in self._waiting if not _is_gone(one)]
            if user in (0, os.geteuid()) and len(self._waiting) < _MAX_WAITING:
                self._waiting.append(client)
            else:
                client.close()

    def leave(self) -> None:
        """The mount is gone: its device's number, and so our name, may be another's; who waits for us still does."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes the thread, which takes in those who came before
        if self._thread is not None:
            self._thread.join()
        self._sock.close()

    def tell(self, problem: str) -> None:
        """Tell all who wait, and wait no more. After `leave`."""
        for client in self._waiting:
            with client, contextlib.suppress(OSError):  # some will have gone
                client.sendall(problem.encode("utf-8", "replace"))

    def close(self) -> None:
        """Not found any more, and nobody waits."""
        self.leave()
        for client in self._waiting:
            client.close()


def _is_gone(client: socket.socket) -> bool:
    try:
        if client.recv(1, socket.MSG_DONTWAIT):
            return False  # it has nothing to say, but is there
    except BlockingIOError:
        return False
    except OSError:
        pass
    client.close()
    return True


@dataclass(slots=True)
class Child:
    """A process of ours that serves. `said` is what it, or libfuse, wrote before it was ready."""

    pid: int
    is_ready: bool
    said: str

    def wait(self) -> int:
        """Its exit code."""
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)


def become_flusher() -> None:
    """Say that this process writes for others, where we may: see `loop_writes_are_safe`. Its threads inherit it."""
    ctypes.CDLL(None).prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)


def pause() -> None:
    """A moment, between two looks."""
    time.sleep(0.05)
