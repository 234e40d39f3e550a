# SPDX-License-Identifier: Apache-2.0
"""Files under construction: how they are called until they have their own name, and when a dead process left one.

Decides when the maker of such a file is surely dead, so that the next program that makes a file in the folder may
remove it. Its name says who makes it, `.vhdkit-BOOT-NAMESPACE-PID-TICKS-CHANCE.part`, and its maker holds it locked.
Only what both agree on goes, and only regular files of our own user: a name can be anybody's invention, a lock on a
file server may be out of sight. Everything else is left to `collect_garbage`, which people call.

    this boot, this namespace of processes   dead when no such process is there, or another one has its number
    this boot, another namespace             not known
    another boot, a disk of this host        dead: the host was restarted
    another boot, any other file system      not known: it may be another host's
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from functools import cache
from itertools import islice

from vhdkit.errors import VhdkitError
from vhdkit.store import FileStore

_CHANCE_BYTES = 8
_BOOT_CHARACTERS = 12
_PART = re.compile(
    rf"\.vhdkit-(?:([0-9a-f]{{{_BOOT_CHARACTERS}}})-([0-9]{{1,20}})-([0-9]{{1,10}})-([0-9]{{1,20}})-)?"
    rf"[0-9a-f]{{{2 * _CHANCE_BYTES}}}\.part"
)
_MAX_LOOKED_AT = 10_000  # names in a folder: making a file is not to take longer the more others there are
_STATE_FIELD, _START_FIELD = 0, 19  # of /proc/PID/stat after the process's name (proc(5)), which may hold anything


def part_name() -> str:
    """The name of a file that has none yet. Where this host does not say who we are, no name tells that we died."""
    chance = secrets.token_hex(_CHANCE_BYTES)
    pid = os.getpid()
    place, ticks = _place(), _start_ticks(pid)
    maker = "" if place is None or ticks is None else f"{place[0]}-{place[1]}-{pid}-{ticks}-"
    return f".vhdkit-{maker}{chance}.part"


def is_part(name: str) -> bool:
    """True for the name of a file under construction."""
    return _PART.fullmatch(name) is not None


def parts(directory: str, limit: int | None = None) -> Iterator[str]:
    """The paths of the files under construction in `directory`, sorted; with a `limit` among so many names."""
    try:
        with os.scandir(directory or os.curdir) as entries:
            names = [one.name for one in islice(entries, limit) if is_part(one.name)]
    except OSError:
        return
    for name in sorted(names):
        path = os.path.join(directory, name)
        with contextlib.suppress(OSError):
            if stat.S_ISREG(os.lstat(path).st_mode):
                yield path


def sweep(directory: str) -> None:
    """Remove what makers that are surely dead left in `directory`; what resists stays."""
    for path in parts(directory, _MAX_LOOKED_AT):
        with contextlib.suppress(OSError, VhdkitError):
            facts = os.lstat(path)
            if facts.st_uid != os.geteuid() or not _is_dead(os.path.basename(path), facts):
                continue
            with FileStore.open(path, follow_links=False) as store:
                store.lock(writer=True)  # it has that name still, and nobody holds it, such as a forked process
                os.unlink(path)


def _is_dead(name: str, facts: os.stat_result) -> bool:
    """True when the process that is named there cannot be alive."""
    found = _PART.fullmatch(name)
    here = _place()
    if found is None or found[1] is None or here is None:
        return False
    boot, namespace, pid, ticks = found[1], *map(int, found.groups()[1:])
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
