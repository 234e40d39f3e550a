# SPDX-License-Identifier: Apache-2.0
"""Identifies the process that makes a file: a word for the file's name, and whether that process is dead.

The word is `BOOT-NAMESPACE-PID-TICKS`: this boot of this host, the PID namespace in which the process id is valid, the
process id, and the start time of the process. Decides only what follows from the word and from the file system of the
file; who owns the file and who holds it are questions for the caller.

    this boot, this PID namespace       dead if no process has that id, or the one that has it started later
    this boot, another PID namespace    unknown
    another boot, a local file system   dead if the file is from before this boot: this host has restarted, and no
                                        other host writes there. A container may have a boot id of its own
    another boot, any other             unknown: a file server or a cluster file system may hold another host's file

A file system counts as local if its type is one that a single host mounts at a time (`_LOCAL`) and the kernel mounts
it from a block device. A cluster file system (OCFS2, GFS2) is on a block device too, so the device alone says nothing.
"""

from __future__ import annotations

import os
import re
import time
from functools import cache

_BOOT_CHARACTERS = 12
MAKER_PATTERN = rf"[0-9a-f]{{{_BOOT_CHARACTERS}}}-[0-9]{{1,20}}-[0-9]{{1,10}}-[0-9]{{1,20}}"
_LOCAL = {
    *("bcachefs", "exfat", "ext2", "ext3", "ext4", "f2fs", "hfsplus", "jfs"),
    *("msdos", "nilfs2", "ntfs", "ntfs3", "reiserfs", "udf", "vfat", "xfs"),
}
_STATE_FIELD, _START_FIELD = 0, 19  # of /proc/PID/stat after the process's name (proc(5)), which may contain anything


def maker_word() -> str | None:
    """The word for this process; None if the host does not provide the parts."""
    pid = os.getpid()
    place, ticks = _place(pid), _start_ticks(pid)
    return None if place is None or ticks is None else f"{place[0]}-{place[1]}-{pid}-{ticks}"


def is_maker_dead(word: str, facts: os.stat_result) -> bool:
    """True if the process that the word identifies cannot be alive.

    `word`: as returned by `maker_word`, but from an untrusted name. `facts`: lstat of the file with that name.
    """
    here = _place(os.getpid())
    if here is None or re.fullmatch(MAKER_PATTERN, word) is None:
        return False
    boot, *numbers = word.split("-")
    namespace, pid, ticks = map(int, numbers)
    if boot != here[0]:
        return facts.st_ctime < _booted_unix_seconds() and _is_local(facts.st_dev)
    if namespace != here[1] or not 0 < pid < 1 << 31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    started = _start_ticks(pid)
    return started is not None and started != ticks


def _booted_unix_seconds() -> float:
    """When this host started, by the present clock."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def _is_local(device: int) -> bool:
    """True if no other host can write to the file system with this device number. Source: proc_pid_mountinfo(5)."""
    number = f"{os.major(device)}:{os.minor(device)}".encode()
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            lines = file.read().splitlines()
    except OSError:
        return False
    types = set()
    for line in lines:
        fields = line.split()
        if len(fields) > 6 and fields[2] == number and b"-" in fields[6:-1]:
            types.add(os.fsdecode(fields[fields.index(b"-", 6) + 1]))
    return os.major(device) != 0 and bool(types) and types <= _LOCAL


@cache
def _place(pid: int) -> tuple[str, int] | None:
    """This boot of this host and the PID namespace of `pid`, which is our process; None if either is unknown."""
    try:
        if os.readlink("/proc/self") != str(pid):
            return None  # /proc belongs to another PID namespace (`unshare --pid`): its ids mean other processes
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = re.sub(r"[^0-9a-f]", "", file.read())[:_BOOT_CHARACTERS]
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except (OSError, ValueError):
        return None
    return (boot, namespace) if len(boot) == _BOOT_CHARACTERS else None


def _start_ticks(pid: int) -> int | None:
    """The start time of a process; 0 for a zombie, None if unknown."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            content = file.read()
        fields = content[content.rindex(b")") + 1 :].split()
        return 0 if fields[_STATE_FIELD] in (b"Z", b"X") else int(fields[_START_FIELD])
    except (OSError, ValueError, IndexError):
        return None
