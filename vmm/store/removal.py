# SPDX-License-Identifier: Apache-2.0
"""The only code that removes images: only if nothing names the image or stands on it, and no process has it open.

Decides whether a file may be removed. An image can be named by a machine's definition, the definition with which a
machine runs, a snapshot, or the note of a backup; a process may have it open, or hold a lock on it as QEMU and vhdkit
do; a loop device may use it. All of this is checked while no definition can be written (`registry.standing_still`), so
an image that was unused at the check is unused when it is removed. Must not know why it is to be removed.

`INV-REMOVED-UNUSED`: vmm removes no image that something names, stands on or has open, whatever its caller believed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from vhdkit import backups
from vmm.host.loops import inode_behind
from vmm.host.proc import HeldLock
from vmm.model.errors import InUse, VmmError, of_os_error
from vmm.model.paths import MachinePaths, registry_folder, sync_folder
from vmm.store import registry
from vmm.store.images import children_of
from vmm.store.registry import Machine
from vmm.store.snapshots.journal import journal_document
from vmm.store.snapshots.store import has_tree, load_tree

_MAX_DOCUMENT_BYTES = 4 << 20
_MAX_TREE_BYTES = 16 << 20
_RECORDS = ("snapshots.json", "backup.json")  # a machine's other files that name images
_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, pid


@dataclass(frozen=True, slots=True)
class Use:
    """A path that is in use, and its user."""

    path: str
    who: str


def remove_image(path: str, lock: HeldLock) -> None:
    """Durably remove an image of the machine whose lock is held; a missing file is fine.

    Raises InUse, naming the user of the image, and errors of the operating system as VmmError.
    """
    try:
        facts = os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise of_os_error(error, "remove the image", path=path) from error
    with registry.standing_still():
        for use in uses(lock.folder, os.path.basename(path)):
            if _is_same(use.path, path, facts):
                raise InUse(f"is not removed: {use.who} needs it", path=path)
        holder = holder_of(path)
        if holder is not None:
            raise InUse(f"is not removed: {holder}", path=path)
        children = children_of(path)
        if children:
            raise InUse(f"is not removed: {children[0]} stands on it", path=path)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            backups.forget_marks(path)
            sync_folder(os.path.dirname(path))
        except OSError as error:
            raise of_os_error(error, "remove the image", path=path) from error


def refuse_needed_folder(folder: str, lock: HeldLock) -> None:
    """Raise InUse if a machine other than the one whose lock is held has files in a folder that is to be removed."""
    root = os.path.realpath(folder)
    for use in uses(lock.folder, os.path.basename(folder), only_others=True):
        real = os.path.realpath(use.path)
        if real == root or real.startswith(root + os.sep):
            raise InUse(f"is not removed: {use.who} needs {use.path}", path=folder)


# -- what names it ---------------------------------------------------------------------------------------------------


def images_inside(folder: str) -> list[Use]:
    """The existing images in a machine's folder that are named, also by its own definition or tree. Raises InUse."""
    root = os.path.realpath(folder)
    found = [*uses(folder, os.path.basename(folder))]
    found += [Use(path, "its tree of snapshots") for path in load_tree(MachinePaths(folder)).images]
    inside = [one for one in found if os.path.realpath(one.path).startswith(root + os.sep)]
    return [one for one in inside if os.path.lexists(one.path)]


def uses(own_folder: str, word: str, *, only_others: bool = False) -> Iterator[Use]:
    """Every path that is in use. Excludes images that only the tree of the machine in `own_folder` remembers.

    Raises InUse for a machine that cannot be read and whose files contain `word`, the last component of the path to
    remove.
    """
    for name in registry.names():
        try:
            machine = registry.load(name)
            is_own = _is_same_folder(machine.paths.folder, own_folder)
            if not (is_own and only_others):
                yield from list(_uses_of(machine, is_own=is_own))
        except VmmError as error:
            if _has_word(os.path.join(registry_folder(), name), word):
                raise InUse(
                    f"is not removed: the machine {name} cannot be read, and may need it: {error.problem}",
                    path=error.path, hint=error.hint,
                ) from error  # fmt: skip


def _has_word(folder: str, word: str) -> bool:
    """True if one of a machine's files contains the word or cannot be read."""
    spelled = json.dumps(word)[1:-1].encode()
    for path in (MachinePaths(folder).definition, *(os.path.join(folder, name) for name in _RECORDS)):
        try:
            with open(path, "rb") as file:
                if spelled in file.read(_MAX_TREE_BYTES):
                    return True
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            return True
    return False


def _uses_of(machine: Machine, *, is_own: bool) -> Iterator[Use]:
    who = f"the machine {machine.name}"
    for disk in machine.spec.disks:
        if disk.path is not None and disk.kind != "pass-through":
            yield Use(disk.path, who)
    for path in _paths_in(machine.runtime.running, ("disks",)):
        yield Use(path, f"the running machine {machine.name}")
    for path in _paths_in(os.path.join(machine.paths.folder, "backup.json"), ()):
        yield Use(path, f"a backup of {machine.name}")
    if not has_tree(machine.paths):
        return
    tree = load_tree(machine.paths)
    for snapshot in tree.snapshots.values():
        for path in snapshot.disks.values():
            yield Use(path, f"the snapshot {snapshot.name} of {machine.name}")
        if not is_own:
            yield Use(snapshot.folder, f"the snapshot {snapshot.name} of {machine.name}")
    for one in tree.kept:
        yield Use(one.image, f"the next backup of {machine.name} to {one.folder}")
    if not is_own:
        for path in tree.images:
            yield Use(path, who)
        for path in _strings_in(None if tree.journal is None else journal_document(tree.journal)):
            yield Use(path, f"an unfinished operation on {who}")


def _paths_in(path: str, keys: tuple[str, ...]) -> Iterator[str]:
    """The absolute paths in one of our JSON files; none if it does not exist. Raises VmmError for a damaged one."""
    try:
        with open(path, "rb") as file:
            document = json.loads(file.read(_MAX_DOCUMENT_BYTES))
        for key in keys:
            document = document[key]
    except FileNotFoundError:
        return
    except OSError as error:
        raise of_os_error(error, "find out which images are needed", path=path) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise VmmError("is damaged, so the images that it names are unknown", path=path) from error
    yield from _strings_in(document)


def _strings_in(document: object) -> Iterator[str]:
    if isinstance(document, str):
        if os.path.isabs(document):
            yield document
    elif isinstance(document, dict):
        for one in document.values():
            yield from _strings_in(one)
    elif isinstance(document, list):
        for one in document:
            yield from _strings_in(one)


def _is_same(named: str, path: str, facts: os.stat_result) -> bool:
    if os.path.realpath(named) == os.path.realpath(path):
        return True
    with contextlib.suppress(OSError, ValueError):  # hard links
        return facts.st_nlink > 1 and os.path.samestat(os.stat(named), facts)
    return False


def _is_same_folder(one: str, other: str) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samefile(one, other)
    return False


# -- what has it open ------------------------------------------------------------------------------------------------


def holder_of(path: str) -> str | None:
    """The program that has a file open or locked, as a clause; None if none is visible. Raises AccessDenied.

    Locks of all users' processes are visible; open descriptors only those of processes that we may read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        if os.path.islink(path):
            return None  # only the link is removed, not its target
        raise of_os_error(error, "find out which process has the image open", path=path) from error
    try:
        facts = os.fstat(descriptor)
        is_locked = _is_locked(descriptor)
    finally:
        os.close(descriptor)
    for pid in _pids():
        if _has_open(pid, facts):
            return f"the process {pid} ({_name_of(pid)}) has it open"
    if is_locked:
        return "a process holds a lock on it"
    loop = _loop_on(facts)
    return f"the loop device {loop} stands on it" if loop is not None else None


def _is_locked(descriptor: int) -> bool:
    """True if a lock is held that would exclude a writer; QEMU and vhdkit set such locks on open images."""
    wanted = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        found = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, wanted))
    except OSError:
        return False  # a file system without lock support
    return bool(found[0] != fcntl.F_UNLCK)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _has_open(pid: int, facts: os.stat_result) -> bool:
    folder = f"/proc/{pid}/fd"
    try:
        names = os.listdir(folder)
    except OSError:
        return False  # the process has ended or belongs to another user
    for name in names:
        with contextlib.suppress(OSError):
            # Only candidates are examined: a stat of a file on a dead mount would block forever.
            if not os.readlink(f"{folder}/{name}").startswith("/") or not _may_be(pid, name, facts.st_ino):
                continue
            if os.path.samestat(os.stat(f"{folder}/{name}"), facts):
                return True
    return False


def _may_be(pid: int, name: str, inode: int) -> bool:
    """False for a descriptor of another inode; older kernels do not report the inode."""
    with open(f"/proc/{pid}/fdinfo/{name}", "rb") as file:
        for line in file.read(4096).splitlines():
            if line.startswith(b"ino:"):
                return int(line[4:]) == inode
    return True


def _name_of(pid: int) -> str:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
        return file.read().strip()
    return "which has ended"


def _loop_on(facts: os.stat_result) -> str | None:
    with contextlib.suppress(OSError):
        for name in os.listdir("/sys/block"):
            if not name.startswith("loop"):
                continue
            with contextlib.suppress(OSError):
                with open(f"/sys/block/{name}/loop/backing_file", encoding="utf-8") as file:
                    backing = file.read().rstrip("\n")
                if inode_behind(f"/dev/{name}", backing) == (facts.st_dev, facts.st_ino):
                    return f"/dev/{name}"
    return None
