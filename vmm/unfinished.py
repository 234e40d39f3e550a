# SPDX-License-Identifier: Apache-2.0
"""Half-made and half-removed files and folders: their names, and when the process that made one is known to be dead.

The name identifies the maker: `NAME.BOOT-NAMESPACE-PID-TICKS-CHANCE.part` (or `.removed`). The maker is dead if no
process has that number, or the one that has it started at another time. A file from another boot counts as dead only
on a block device. A cluster file system on a shared LUN is a block device too, and its files may belong to a running
host: this module cannot tell. Only files of our own user that are not links are removed, and only from a folder in
which the caller is about to create something.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
from functools import cache
from itertools import islice

_BOOT_CHARACTERS = 12
_LEFT = re.compile(rf"(?:.*\.)?([0-9a-f]{{{_BOOT_CHARACTERS}}})-(\d{{1,20}})-(\d{{1,10}})-(\d{{1,20}})-[0-9a-f]{{8}}"
                   r"\.(?:part|removed)")  # fmt: skip
FILE_PATTERN = rf"\.[0-9a-f]{{{_BOOT_CHARACTERS}}}-\d+-\d+-\d+-[0-9a-f]{{8}}\.part"  # of `part_of` for a file
_MAX_LOOKED_AT = 10_000  # names in a folder
_STATE_FIELD, _START_FIELD = 0, 19  # of /proc/PID/stat after the process's name (proc(5)), which may hold anything


def part_of(path: str) -> str:
    """Where a file is made that is to replace `path`: in the same folder, under a short name of its own."""
    return os.path.join(os.path.dirname(path), f".{_token()}.part")


def folder_of(path: str, ending: str = "part") -> str:
    """Where a folder is made, or removed (`ending` "removed"), that is called `path` before or after."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.{_token()}.{ending}")


def sweep(folder: str, *, folders: bool = False) -> None:
    """Remove the files, and with `folders` also the folders, that makers who are surely dead left in `folder`.

    What resists stays.
    """
    with contextlib.suppress(OSError):
        with os.scandir(folder or os.curdir) as entries:
            names = [one.name for one in islice(entries, _MAX_LOOKED_AT) if _LEFT.fullmatch(one.name)]
        for name in names:
            path = os.path.join(folder, name)
            with contextlib.suppress(OSError):
                facts = os.lstat(path)
                if facts.st_uid != os.geteuid() or not _is_dead(name, facts):
                    continue
                if stat.S_ISREG(facts.st_mode):
                    os.unlink(path)
                elif folders and stat.S_ISDIR(facts.st_mode):
                    shutil.rmtree(path)  # follows no link


def _token() -> str:
    """Who we are, and chance. Where this host does not say the former, no name tells that we died."""
    place, pid = _place(), os.getpid()
    ticks = _start_ticks(pid)
    maker = f"{pid}" if place is None or ticks is None else f"{place[0]}-{place[1]}-{pid}-{ticks}"
    return f"{maker}-{secrets.token_hex(4)}"


def _is_dead(name: str, facts: os.stat_result) -> bool:
    found, here = _LEFT.fullmatch(name), _place()
    if found is None or here is None:
        return False
    boot, (namespace, pid, ticks) = found[1], map(int, found.groups()[1:])
    if boot != here[0]:
        return os.major(facts.st_dev) != 0  # a number of the kernel's own: a server's, or of a file system in memory
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


@cache
def _place() -> tuple[str, int] | None:
    """This boot of this host, and our namespace of processes, in which a number means one; None if not to be known."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = re.sub(r"[^0-9a-f]", "", file.read())[:_BOOT_CHARACTERS]
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except (OSError, ValueError):
        return None
    return (boot, namespace) if len(boot) == _BOOT_CHARACTERS else None


def _start_ticks(pid: int) -> int | None:
    """When a process began; 0 for one that has ended and whose parent has not looked yet, None if not to be known."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            content = file.read()
        fields = content[content.rindex(b")") + 1 :].split()
        return 0 if fields[_STATE_FIELD] in (b"Z", b"X") else int(fields[_START_FIELD])
    except (OSError, ValueError, IndexError):
        return None
