# SPDX-License-Identifier: Apache-2.0
"""The files of an untrusted folder, reached without ever leaving it.

Decides that a file belongs to the folder: its name leads there through real folders only, from a descriptor of the
folder that was opened once; it is a regular file, of the stated size, and not a second name of a file elsewhere.
The file that is opened is the one that was checked, so no other can be substituted in between. Must not know what the
files mean.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from types import TracebackType
from typing import Self

from vmm.model.errors import InvalidSpec, NotFound, Refused, of_os_error
from vmm.store.snapshots.memory import copy_open

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
MAX_DEPTH = 8  # of folders in a name


class Inside:
    """A folder held open. Names are relative to it, with "/" between folders. Every error names the file."""

    def __init__(self, folder: str) -> None:
        """The folder itself may be reached by links. Raises NotFound, AccessDenied."""
        self.root = os.path.realpath(folder)
        try:
            self._fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise NotFound("no such folder", path=folder) from error
        except NotADirectoryError as error:
            raise NotFound("is not an export: it contains no vmm-export.json", path=folder) from error
        except OSError as error:
            raise of_os_error(error, "open the folder", path=folder) from error
        self._owner = os.fstat(self._fd).st_uid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def open(self, name: str) -> int:
        """A descriptor of a regular file, for reading. Raises NotFound, InvalidSpec, Refused, AccessDenied."""
        path = os.path.join(self.root, name)
        handle = self._walk(name)
        try:
            facts = os.fstat(handle)
            if not stat.S_ISREG(facts.st_mode):
                raise InvalidSpec(f"is {_kind_of(facts.st_mode)}: an import holds files and folders only", path=path)
            if facts.st_nlink > 1 and facts.st_uid != self._owner:
                raise Refused("is a hard link to another user's file", path=path)
            # The kernel's own link to the file that was checked: no other file, and never a device, is opened.
            return os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise of_os_error(error, "read the file", path=path) from error
        finally:
            os.close(handle)

    def _walk(self, name: str) -> int:
        """A descriptor that only names the file, of whatever type."""
        path = os.path.join(self.root, name)
        *folders, last = name.split("/")
        if len(folders) > MAX_DEPTH or any(part in ("", ".", "..") or "\0" in part for part in (*folders, last)):
            raise InvalidSpec(f"names a file outside the folder: {name!r}", path=self.root)
        here = self._fd
        try:
            for folder in folders:
                deeper = os.open(folder, _FOLDER, dir_fd=here)
                if here != self._fd:
                    os.close(here)
                here = deeper
            return os.open(last, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
        except (FileNotFoundError, ValueError) as error:
            raise NotFound("is missing from the import", path=path) from error
        except NotADirectoryError as error:  # or a link
            raise NotFound("is missing from the import: a part of its path is not a folder", path=path) from error
        except OSError as error:
            raise of_os_error(error, "read the file", path=path) from error
        finally:
            if here != self._fd:
                os.close(here)

    def size(self, name: str) -> int:
        """Bytes in a file. Raises as `open`."""
        descriptor = self.open(name)
        try:
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)

    def read(self, name: str, limit_bytes: int) -> bytes:
        """All of a small file. Raises as `open`, InvalidSpec for a longer one."""
        path = os.path.join(self.root, name)
        with os.fdopen(self.open(name), "rb") as file:
            try:
                content = file.read(limit_bytes + 1)
            except OSError as error:
                raise of_os_error(error, "read the file", path=path) from error
        if len(content) > limit_bytes:
            raise InvalidSpec(f"has more than {limit_bytes} bytes", path=path)
        return content

    def has(self, name: str) -> bool:
        """True if a file of that name exists."""
        try:
            os.close(self._walk(name))
        except NotFound:
            return False
        return True

    def copy(
        self, name: str, target: str, size_bytes: int, did: Callable[[int], None] = lambda size_bytes: None
    ) -> None:
        """A copy of a file of that size, ours alone. Raises as `open`, InvalidSpec, OSError."""
        descriptor = self.open(name)
        try:
            if os.fstat(descriptor).st_size != size_bytes:
                raise InvalidSpec("changed while it was imported", path=os.path.join(self.root, name))
            copy_open(descriptor, target, did)
        finally:
            os.close(descriptor)

    def room(self, name: str) -> int:
        """Bytes that a file occupies. Raises as `open`."""
        descriptor = self.open(name)
        try:
            return os.fstat(descriptor).st_blocks * 512
        finally:
            os.close(descriptor)

    def refuse_strangers(self, names: list[str]) -> None:
        """Raise Refused unless only we, or root, can change these files, or put others in their place.

        For files that are used permanently where they are.
        """
        seen: set[str] = set()
        for name in names:
            path = os.path.join(self.root, name)
            facts = os.lstat(path)
            if facts.st_nlink > 1 and name.startswith("disks/"):
                raise Refused(
                    "has a second name (hard link): writing to it would change that other file", path=path, hint=_COPY
                )
            while path not in seen:
                seen.add(path)
                _refuse_stranger(path)
                path = os.path.dirname(path)


_COPY = "import a copy: without --register"


def _refuse_stranger(path: str) -> None:
    facts = os.lstat(path)
    if facts.st_uid not in (0, os.geteuid()):
        raise Refused("belongs to another user, who could change it at any time", path=path, hint=_COPY)
    is_sticky = stat.S_ISDIR(facts.st_mode) and facts.st_mode & stat.S_ISVTX
    by_group = facts.st_mode & stat.S_IWGRP and facts.st_gid not in (0, os.getegid())
    if not is_sticky and (facts.st_mode & stat.S_IWOTH or by_group):
        raise Refused("can be written to by other users", path=path, hint=_COPY)


def _kind_of(mode: int) -> str:
    if stat.S_ISLNK(mode):
        return "a link"
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a device" if stat.S_ISBLK(mode) or stat.S_ISCHR(mode) else "a pipe or socket"
