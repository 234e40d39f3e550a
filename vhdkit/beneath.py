# SPDX-License-Identifier: Apache-2.0
"""Opening regular files by untrusted names.

Decides how a name from an image or a record is followed: component by component through folder descriptors, so that
nothing outside the allowed folders is examined, listed or opened, even if names change or become links in the
meantime (`INV-NAME-WITHIN`). Only regular files are opened, because opening a device or a pipe may have side effects.
Must not know where names come from.

A link is followed if its target lies beneath an allowed folder, which may itself be reached through links.
For a name that leads nowhere, `was_removed` decides whether the file was removed or may only be out of sight.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence

from vhdkit import errors
from vhdkit.descriptor import Owned, close_owned, opened
from vhdkit.named import identity_of
from vhdkit.store import FileStore, translate, translated
from vhdkit.volume import Outcome, Place, Trail

_MAX_LINKS = 40  # the kernel's own limit
_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}


def open_regular(path: str, *, follow_links: bool = True) -> FileStore:
    """Open a regular file for reading.

    Raises NotFound, AccessDenied, IoFailed, and InvalidArgument for any other kind of file, which is not opened.
    """
    try:
        looked = opened(path, os.O_PATH | os.O_CLOEXEC if follow_links else _LOOK)
        try:
            return _opened(looked[0], path, None)
        finally:
            close_owned(looked)
    except OSError as error:
        raise translate(error, path, "open") from error
    except ValueError as error:
        raise errors.InvalidArgument("is not a file name: it contains a NUL byte", path=path) from error


def find_beneath(path: str, folders: Sequence[str]) -> Place:
    """Follow the absolute `path`. A component that does not exist as spelled is matched ignoring case.

    `folders` are the allowed folders, absolute. The caller closes a store that is returned.
    Raises AccessDenied, IoFailed and similar errors for a file inside that cannot be opened.
    """
    links = 0
    path = os.path.normpath(path)
    while True:
        root = _root_of(path, folders)
        if root is None:
            return Place(Outcome.OUTSIDE, path)
        walk = _Walk(root)
        try:
            walk.start()
            further = walk.follow(os.path.relpath(path, root).split(os.sep), _MAX_LINKS - links)
            if isinstance(further, Place):
                return further
            path, links = further, links + walk.links
        except OSError as error:
            if error.errno in _NOT_THERE:
                return Place(Outcome.MISSING, walk.place)
            raise translate(error, walk.place, "open") from error
        finally:
            walk.close()


def _root_of(path: str, folders: Sequence[str]) -> str | None:
    """The innermost of the folders that contains `path`, which is not followed."""
    over = [folder for folder in folders if path.startswith(folder.rstrip(os.sep) + os.sep)]
    return max(over, key=len, default=None)


class _Walk:
    """Descriptors of the folders from an allowed one down to where the name has led so far."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._real_root = root
        self._folders: list[Owned] = []
        self._names: list[str] = []
        self.links = 0

    @property
    def place(self) -> str:
        """The path reached so far."""
        return os.path.join(self._real_root, *self._names)

    def start(self) -> None:
        """Open the allowed folder, following links."""
        self._folders.append(opened(self._root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        self._real_root = os.path.realpath(self._root)

    def follow(self, names: Sequence[str], links_left: int) -> Place | str:
        """Where the names lead, or the absolute path of a link's target among them. Raises OSError."""
        todo = [name for name in reversed(names) if name not in ("", os.curdir)]
        while todo:
            name = todo.pop()
            if name == os.pardir:
                if not self._names:
                    return os.path.normpath(os.path.join(self._real_root, os.pardir, *reversed(todo)))
                close_owned(self._folders.pop())
                self._names.pop()
                continue
            looked = self._look(name)
            try:
                mode = os.fstat(looked[0]).st_mode
                if stat.S_ISLNK(mode):
                    self.links += 1
                    if self.links > links_left:
                        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                    text = os.readlink("", dir_fd=looked[0])
                    self._names.pop()
                    if os.path.isabs(text):
                        return os.path.normpath(os.path.join(text, *reversed(todo)))
                    todo += [one for one in reversed(text.split(os.sep)) if one not in ("", os.curdir)]
                elif stat.S_ISDIR(mode):
                    self._folders.append(looked)
                    looked = Owned()
                elif todo:
                    raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
                elif not stat.S_ISREG(mode):
                    return Place(Outcome.SPECIAL, self.place)
                else:
                    return Place(Outcome.FOUND, self.place, _opened(looked[0], self.place, self._folders[-1][0]))
            finally:
                close_owned(looked)
        return Place(Outcome.SPECIAL, self.place)

    def _look(self, name: str) -> Owned:
        """A descriptor of the name, in another spelling if this one does not exist; recorded as the next step."""
        folder = self._folders[-1][0]
        self._names.append(name)
        try:
            return opened(name, _LOOK, dir_fd=folder)
        except FileNotFoundError:
            spellings = sorted(one for one in _listed(folder) if one.casefold() == name.casefold())
            if not spellings:
                raise
            self._names[-1] = spellings[0]
            return opened(spellings[0], _LOOK, dir_fd=folder)

    def close(self) -> None:
        """Close every folder."""
        for folder in self._folders:
            close_owned(folder)
        self._folders.clear()


def _listed(folder: int) -> list[str]:
    """The names in a folder; empty if they cannot be read."""
    try:
        owned = opened(os.curdir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
    except PermissionError:
        return []
    try:
        return os.listdir(owned[0])
    finally:
        close_owned(owned)


def _opened(looked: int, path: str, folder: int | None) -> FileStore:
    """The very file that `looked` refers to, opened for reading; it must be a regular file."""
    status = os.fstat(looked)
    if not stat.S_ISREG(status.st_mode):
        raise errors.InvalidArgument("is not a regular file", path=path)
    try:
        owned = opened(f"/proc/self/fd/{looked}", _READ)
    except FileNotFoundError:  # no /proc here: open it by name, which may now lead to another file
        owned = opened(path if folder is None else os.path.basename(path), _READ | os.O_NOFOLLOW, dir_fd=folder)
        if identity_of(owned[0]) != (status.st_dev, status.st_ino):
            close_owned(owned)
            raise
    return FileStore(owned, path, writable=False)


def trail_of(directory: str) -> Trail:
    """Identify the folders from the root down to `directory`: for each its inode, and whether a file system begins
    there.

    Raises NotFound, AccessDenied, IoFailed.
    """
    trail: list[tuple[int, bool]] = []
    device = None
    with translated(directory, "look at"):
        for folder in _from_the_root(directory):
            status = os.stat(folder)
            trail.append((status.st_ino, device is not None and status.st_dev != device))
            device = status.st_dev
    return tuple(trail)


def was_removed(directory: str, trail: Sequence[tuple[int, bool]]) -> bool:
    """True if what was in `directory` and is missing now was removed; False if it may only be out of sight.

    A file is out of sight if its file system is not mounted (here) or its folder may not be read.
    """
    device, known = None, False
    for folder, (inode, begins) in zip(_from_the_root(directory), trail, strict=False):
        try:
            status = os.stat(folder)
        except (FileNotFoundError, NotADirectoryError):
            return known
        except OSError:
            return False
        if (device is not None and status.st_dev != device) != begins:
            return False
        if status.st_ino != inode:  # created again
            return known and not begins
        device, known = status.st_dev, True
    return known


def _from_the_root(directory: str) -> list[str]:
    """The folders on the way to an absolute path, including the path itself."""
    folders = [directory]
    while folders[-1] != os.sep:
        folders.append(os.path.dirname(folders[-1]))
    return folders[::-1]
