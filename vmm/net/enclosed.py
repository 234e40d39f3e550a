# SPDX-License-Identifier: Apache-2.0
"""Starts a program that guests talk to: without the host's files, as a user of its own. Then calls exec.

Decides what a guest can reach after it has taken over one of a switch's helpers (its user-mode network, its DHCP and
name server). Imports nothing of ours: it runs as an isolated script, behind the system call filter of
`vmm/host/confined.py`.

    python -I -S enclosed.py [OPTION...] -- COMMAND...
        --parent PID          it ends with this process (PR_SET_PDEATHSIG)
        --read PATH           can be read, and nothing else; repeatable
        --folder PATH         its own: it may create and remove files there; also seen as /own
    as root alone:
        --user N --group N    the user and group that it runs as
        --keep CAPABILITY     the number of a capability that it keeps (capabilities(7)); repeatable
        --root PATH           an empty folder, in which its root is built, in a mount namespace of its own
        --file PATH=NAME      a file of its own, seen as /NAME

As root it gets mounts, a host name and System V IPC of its own; its root contains only the named paths, read-only and
without devices; it has only the named capabilities. Other users' helpers keep their starter's user, and Landlock (if
the kernel has it) denies them everything that is not named, including connections to abstract sockets and signals to
other processes.

Sources: mount(2), pivot_root(2), capabilities(7), landlock(7), PR_SET_PDEATHSIG(2const); landlock.h of
include/uapi/linux.

`INV-ENCLOSED`: as root, the helper sees no file but those named, and has no capability but those named; otherwise, if
the kernel has Landlock, it opens no file but those named.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

USER_NAME = "vmm"  # the user and group that a helper with a root of its own finds in its files
# mount(2)
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _SLAVE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 19
_DETACH = 2
_PIVOT_ROOT = {"x86_64": 155}  # 41 on all newer architectures
_NEWNS, _NEWUTS, _NEWIPC = 0x20000, 0x4000000, 0x8000000
# prctl(2)
_PDEATHSIG, _KEEPCAPS, _CAPBSET_DROP, _NO_NEW_PRIVS, _CAP_AMBIENT = 1, 8, 24, 38, 47
_AMBIENT_RAISE, _AMBIENT_CLEAR = 2, 4
_CAPABILITY_VERSION_3 = 0x20080522
# landlock(7); the numbers are the same on all architectures
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF, _VERSION = 444, 445, 446, 1
_LANDLOCK_EXECUTE, _LANDLOCK_WRITE, _LANDLOCK_READ, _LANDLOCK_LIST = 1, 2, 4, 8
_LANDLOCK_RIGHTS = (13, 13, 14, 15, 15, 16)  # the number of rights in each version, from 1 on
_LANDLOCK_OF_FILES = 0x7 | 1 << 14 | 1 << 15
_LANDLOCK_FOLDER = 0x1FFF & ~(1 << 6) & ~(1 << 11)  # all rights of version 1 except creating devices

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


# -- capabilities ---------------------------------------------------------------------------------------------------


def limit_capabilities(kept: Iterable[int], user: int | None = None, group: int | None = None) -> None:
    """Keep only these capabilities, for good and also as another user; set no-new-privs. Raises OSError."""
    wanted = set(kept)
    mask = sum(1 << one for one in wanted)
    for one in range(64):
        if not mask >> one & 1 and _libc.prctl(_CAPBSET_DROP, one, 0, 0, 0) != 0:
            if ctypes.get_errno() != errno.EINVAL:
                _check(-1, "limit what can be gained")
            break  # the kernel has no further ones
    _libc.prctl(_CAP_AMBIENT, _AMBIENT_CLEAR, 0, 0, 0)
    if user is not None:
        _check(_libc.prctl(_KEEPCAPS, 1, 0, 0, 0), "keep capabilities")
        os.setgroups([])
        os.setresgid(*[user if group is None else group] * 3)
        os.setresuid(user, user, user)
    head = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    # They are inherited only by a process that becomes another program as another user.
    inherited = (low, high) if user is not None else (0, 0)
    data = struct.pack("=6I", low, low, inherited[0], high, high, inherited[1])
    _check(_libc.capset(head, data), "set capabilities")
    if user is not None:
        for one in wanted:
            _check(_libc.prctl(_CAP_AMBIENT, _AMBIENT_RAISE, one, 0, 0), "keep a capability")
    _check(_libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), "set no-new-privs")


# -- a root of its own ------------------------------------------------------------------------------------------------


def _bind(source: str, target: str, *, flags: int) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "xb"):
            pass
    _check(_libc.mount(source.encode(), target.encode(), None, _BIND | _REC, None), f"show {source}")
    _check(_libc.mount(None, target.encode(), None, _BIND | _REMOUNT | flags, None), f"protect {source}")


def enter_root(
    root: str, read: Sequence[str], folder: str | None, files: Sequence[tuple[str, str]], user: int
) -> None:
    """Replace our file system with one that contains only these paths. Raises OSError."""
    _check(_libc.unshare(_NEWNS | _NEWUTS | _NEWIPC), "have mounts of its own")
    _check(_libc.mount(None, b"/", None, _REC | _SLAVE, None), "keep mounts to itself")
    _check(
        _libc.mount(b"vmm", root.encode(), b"tmpfs", _NOSUID | _NODEV | _NOEXEC, b"mode=0755,size=256k,nr_inodes=256"),
        "make a file system",
    )
    for path in read:
        inside = root + path
        if os.path.islink(path) and os.path.dirname(path) == "/":  # such as /lib, which is a link into /usr
            os.symlink(os.readlink(path), inside)
        elif os.path.exists(path):
            is_device = path.startswith("/dev/")
            _bind(path, inside, flags=_NOSUID | (0 if is_device else _NODEV | _RDONLY))
    if folder is not None:
        _bind(folder, f"{root}/own", flags=_NOSUID | _NODEV | _NOEXEC)
        os.makedirs(f"{root}/etc", exist_ok=True)
        os.symlink("/own/resolv.conf", f"{root}/etc/resolv.conf")
    for path, name in files:
        _bind(path, f"{root}/{name}", flags=_NOSUID | _NODEV | _NOEXEC)
    os.makedirs(f"{root}/etc", exist_ok=True)
    for name, line in (("passwd", f"{USER_NAME}:x:{user}:{user}::/:/\n"), ("group", f"{USER_NAME}:x:{user}:\n")):
        with open(f"{root}/etc/{name}", "w", encoding="ascii") as file:
            file.write(line)
    os.mkdir(f"{root}/.old")
    os.chdir(root)
    if _libc.syscall(ctypes.c_long(_PIVOT_ROOT.get(os.uname().machine, 41)), b".", b".old") == 0:
        os.chdir("/")
        _check(_libc.umount2(b"/.old", _DETACH), "leave the host's files")
        os.rmdir("/.old")
    else:  # our own root is not a mount, as in a plain chroot; leaving the new one takes CAP_SYS_CHROOT
        os.chroot(".")
    _check(
        _libc.mount(None, b"/", None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV | _NOEXEC, None),
        "protect the root",
    )


# -- Landlock ----------------------------------------------------------------------------------------------------


def landlock(read: Sequence[str], folders: Sequence[str]) -> str | None:
    """Restrict opening files to these paths from now on; None on success, otherwise the reason."""
    version = _libc.syscall(ctypes.c_long(_CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint(_VERSION))
    if version < 1:
        return f"this kernel does not support Landlock: {os.strerror(ctypes.get_errno())}"
    handled = (1 << _LANDLOCK_RIGHTS[min(version, len(_LANDLOCK_RIGHTS)) - 1]) - 1
    words = struct.pack("=QQQ", handled, 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _libc.syscall(ctypes.c_long(_CREATE_RULESET), words, ctypes.c_size_t(size), ctypes.c_uint(0))
    if ruleset < 0:
        return f"Landlock does not accept rules: {os.strerror(ctypes.get_errno())}"
    reading = _LANDLOCK_EXECUTE | _LANDLOCK_READ | _LANDLOCK_LIST
    wanted = [(path, reading | (_LANDLOCK_WRITE if path.startswith("/dev/") else 0)) for path in read]
    for path, rights in [*wanted, *((path, _LANDLOCK_FOLDER) for path in folders)]:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        allowed = rights & handled & (-1 if os.path.isdir(path) else _LANDLOCK_OF_FILES)
        rule = struct.pack("=Qi", allowed, place)
        done = _libc.syscall(ctypes.c_long(_ADD_RULE), ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint(0))
        os.close(place)
        if done != 0:
            return f"Landlock does not accept {path}: {os.strerror(ctypes.get_errno())}"
    _check(_libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), "set no-new-privs")
    if _libc.syscall(ctypes.c_long(_RESTRICT_SELF), ctypes.c_int(ruleset), ctypes.c_uint(0)) != 0:
        return f"Landlock cannot be enforced: {os.strerror(ctypes.get_errno())}"
    os.close(ruleset)
    return None


# -- the process -------------------------------------------------------------------------------------------------


def end_with(parent: int, number: int) -> None:
    """Get this signal when the process that started us ends. Raises OSError."""
    _check(_libc.prctl(_PDEATHSIG, number, 0, 0, 0), "end with its starter")
    if os.getppid() != parent:
        raise OSError(errno.ESRCH, "its starter has ended")


def main() -> None:
    """Entry point: becomes the command."""
    end = sys.argv.index("--")
    options: dict[str, list[str]] = {}
    for name, value in zip(sys.argv[1:end:2], sys.argv[2:end:2], strict=True):
        options.setdefault(name, []).append(value)
    command = sys.argv[end + 1 :]
    read, folders = options.get("--read", []), options.get("--folder", [])
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    try:
        if "--user" in options:
            user, group = (int(options[name][0]) for name in ("--user", "--group"))
            files = [(path, name) for path, _, name in (one.rpartition("=") for one in options.get("--file", []))]
            before = os.umask(0o022)  # a worker's umask is 077: the helper's user could not enter folders of its root
            enter_root(options["--root"][0], read, folders[0] if folders else None, files, user)
            os.umask(before)
            limit_capabilities(map(int, options.get("--keep", [])), user, group)
        else:
            problem = landlock(read, folders)
            if problem is not None:
                os.write(2, f"vmm: warning: {problem}\n".encode())
        if "--parent" in options:
            end_with(int(options["--parent"][0]), signal.SIGTERM)
        os.execve(command[0], command, environment)
    except OSError as error:
        _end(f"vmm: {command[0]} cannot be enclosed: {error.strerror or error}")


def _end(words: str) -> NoReturn:  # host/confined has the same: neither script imports anything of ours
    """Exit without starting anything. Our standard error is the log, whose last line is reported."""
    os.write(2, f"{words}\n".encode())
    os.execvp("false", ["false"])


if __name__ == "__main__":
    main()
