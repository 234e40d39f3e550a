# SPDX-License-Identifier: Apache-2.0
"""An open file under its name: to which file a name leads, and that a file is held only while its name leads to it.

Decides what makes two openings the same file, and when a lock may be taken, changed and given up. Must not know what
is read from the file or written to it (`store`). Which locks keep other programs away is decided in `locks`.

`INV-NAME-HELD`: a lock is given only on the file to which its name leads *after* it was locked, and nothing is stacked
on a name, moved or removed by it, unless it still leads to the file that is open.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import TypeVar

from vhdkit import errors, locks
from vhdkit.descriptor import Descriptor, held
from vhdkit.wording import translate, translated

_OPENINGS = 20  # of a name that leads to another file each time
_T = TypeVar("_T")


def identity_of(fd: int) -> tuple[int, int]:
    """Device and inode of an open file: the same for every name and descriptor of it. Raises OSError."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def leads_to(path: str, identity: tuple[int, int]) -> bool:
    """True when the path leads to the file of this device and inode now."""
    try:
        found = os.stat(path)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == identity


def opened_again(once: Callable[[], _T]) -> _T:
    """What `once` opens; from the beginning when files were replaced under it, but not for ever.

    Raises what it raises: `Replaced` only where the name led to another file each time.
    """
    for _ in range(_OPENINGS - 1):
        try:
            return once()
        except errors.Replaced:
            continue
    return once()


class NamedFile(Descriptor):
    """A descriptor and the name that the file was opened by. After it was closed every method raises DiskClosed."""

    def __init__(self, owned: list[int], path: str, *, writable: bool) -> None:
        """Take over the descriptor in the list, which `descriptor.opened` made."""
        super().__init__(owned, path, writable=writable)
        self._place = path  # where it lies, for now

    @property
    def name(self) -> str:
        """The path it was opened by."""
        return self._path

    @property
    @held
    def identity(self) -> tuple[int, int]:
        """Device and inode: the same for every name of one file."""
        return identity_of(self._fd)

    @property
    @held
    def is_device(self) -> bool:
        """True for a block device."""
        return stat.S_ISBLK(os.fstat(self._fd).st_mode)

    def fileno(self) -> int:
        """The descriptor, for code that hands it to the kernel."""
        return self._fd

    @held
    def still_named(self) -> bool:
        """True while the name that the file was opened by leads to it. Raises AccessDenied, IoFailed."""
        with translated(self._path, "check whether the name still leads to this file"):
            try:
                found = os.stat(self._place)
            except (FileNotFoundError, NotADirectoryError):
                return False
            return (found.st_dev, found.st_ino) == identity_of(self._fd)

    def require_name(self) -> None:
        """Raise `Replaced` unless the name still leads to this file.

        Called with the lock held, before anything is stacked on the name or is done to it.
        """
        if not self.still_named():
            raise errors.Replaced(
                "was moved, removed or replaced by another file while it was open",
                path=self._path,
                hint="put the file back under this name, or close it everywhere and look which of the two is right",
            )

    @held
    def lock(self, *, writer: bool) -> None:
        """Hold the file as a reader or a writer until it is closed; calling again changes the role.

        Raises ImageInUse when another holds it, and `Replaced`, unlocked, when it had no name, or another's, by then:
        what would be written to it would be lost. `open_held` tries again then. On a file system without locks a
        reader holds nothing (`lacks_locks`), and a writer is refused: Unprotected.
        """
        try:
            locks.hold(self._fd, self._path, writer=writer)
        except OSError as error:
            if error.errno not in locks.MISSING:
                raise translate(error, self._path, "lock") from error
            if writer:
                raise self._unprotected() from error
        try:
            self.require_name()
        except BaseException:
            self.unlock()
            raise

    @held
    def become_writer(self) -> None:
        """From a reader's locks to a writer's. Raises ImageInUse when another holds the file, and `Replaced`; who
        called stays a reader then.
        """
        try:
            locks.become_writer(self._fd, self._path)
        except OSError as error:
            raise (
                self._unprotected() if error.errno in locks.MISSING else translate(error, self._path, "lock")
            ) from error
        try:
            self.require_name()
        except BaseException:
            self.become_reader()
            raise

    @held
    def inherit_lock(self, holder: NamedFile) -> None:
        """Have the writer's locks that `holder`, another opening of the file, has; it may be closed then."""
        assert self.identity == holder.identity
        with translated(self._path, "lock"):
            locks.inherit(self._fd, self._path)

    @held
    def become_reader(self) -> None:
        """From a writer's locks to a reader's, with none given up in between: nobody else can come in as a writer."""
        with translated(self._path, "lock"):
            locks.become_reader(self._fd, self._path)

    @held
    def unlock(self) -> None:
        """Give up every lock of this store."""
        with translated(self._path, "unlock"):
            locks.release(self._fd, self._path)

    @held
    def lacks_locks(self) -> bool:
        """True on a file system that has none: nothing keeps another program from writing to the file."""
        return locks.are_missing(self._fd)

    def _unprotected(self) -> errors.Unprotected:
        return errors.Unprotected(
            "its file system has no locks: nothing would keep another program from writing to it at the same time",
            path=self._path,
            hint="copy it to another file system; a program that sees to it itself says OpenOptions(lock=False)",
        )

    @held
    def in_use(self) -> bool:
        """True when another program, or another open disk of this one, holds the file for writing."""
        return locks.is_written(self._fd)
