# SPDX-License-Identifier: Apache-2.0
"""An open file and its name: which file a name leads to, and that a file is held only while its name leads to it.

Decides when two openings are the same file, and when a lock may be taken, changed and released; and answers what the
file system records beside a file's bytes. Must not know what is read from the file or written to it (`store`). Which
locks keep other programs away is decided in `locks`.

`INV-NAME-HELD`: a lock counts only on the file to which its name leads *after* the lock was taken, and nothing is
stacked on a name, or moved or removed by name, unless the name still leads to the open file.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import TypeVar

from vhdkit import errors, locks
from vhdkit.arguments import AnyPath
from vhdkit.descriptor import Descriptor, close_owned, held, opened
from vhdkit.transfer import kept_elsewhere
from vhdkit.units import SECTOR_SIZE
from vhdkit.wording import translate, translated

_OPENINGS = 20  # attempts when the name leads to another file each time
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


def opened_file(path: AnyPath, *, writable: bool, follow_links: bool) -> tuple[list[int], str]:
    """A new descriptor, in the list that owns it, of an existing regular file or block device; and the path.

    Raises NotFound, AccessDenied, InvalidArgument (a directory, a pipe, a character device).
    """
    name = os.fsdecode(path)
    # O_NONBLOCK: opening a named pipe must fail by its type below, not wait for a writer.
    flags = os.O_CLOEXEC | os.O_NONBLOCK | (os.O_RDWR if writable else os.O_RDONLY)
    if not follow_links:
        flags |= os.O_NOFOLLOW
    owned: list[int] = []
    try:
        owned = opened(name, flags)
        mode = os.fstat(owned[0]).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            what = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or character device"
            raise errors.InvalidArgument(f"is {what}, not a disk image", path=name)
        return owned, name
    except OSError as error:
        close_owned(owned)
        if error.errno == errno.EISDIR:
            raise errors.InvalidArgument("is a folder, not a disk image", path=name) from error
        raise translate(error, name, "open for writing" if writable else "open") from error
    except ValueError as error:
        raise errors.InvalidArgument("is not a file name: it contains a NUL byte", path=name) from error
    except BaseException:
        close_owned(owned)
        raise


def opened_again(once: Callable[[], _T]) -> _T:
    """The result of `once`, which is retried a limited number of times while files are replaced under it.

    Raises what `once` raises; `Replaced` only if the name led to another file each time.
    """
    for _ in range(_OPENINGS - 1):
        try:
            return once()
        except errors.Replaced:
            continue
    return once()


class NamedFile(Descriptor):
    """A descriptor and the name by which the file was opened. After `close` every method raises DiskClosed."""

    def __init__(self, owned: list[int], path: str, *, writable: bool) -> None:
        """Take over the descriptor in the list, which `descriptor.opened` made."""
        super().__init__(owned, path, writable=writable)
        self._place = path  # where it lies at present

    @property
    def name(self) -> str:
        """The path by which it was opened."""
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
        """The descriptor, for code that passes it to the kernel."""
        return self._fd

    @held
    def allocated_bytes(self) -> int:
        """Bytes the file takes on its file system (holes do not count)."""
        return os.fstat(self._fd).st_blocks * SECTOR_SIZE

    @held
    def is_remote(self) -> bool:
        """True for a file kept on a server or by a user-space program, which then decide its modification time."""
        return kept_elsewhere(self._fd)

    @held
    def modified_ns(self) -> int:
        """When the file was last written to, in nanoseconds since 1970."""
        return os.fstat(self._fd).st_mtime_ns

    @held
    def label(self, name: str) -> bytes | None:
        """The value of a label of this file (a user extended attribute); None if there is none or none are supported.

        Copies of the file, and a file that takes over its name, do not inherit the label.
        """
        try:
            return os.getxattr(self._fd, f"user.vhdkit.{name}")
        except OSError:
            return None

    @held
    def set_label(self, name: str, value: bytes | None) -> bool:
        """Set a label, or remove it with None; False if that is not possible."""
        try:
            if value is None:
                os.removexattr(self._fd, f"user.vhdkit.{name}")
            else:
                os.setxattr(self._fd, f"user.vhdkit.{name}", value)
        except OSError as error:
            return value is None and error.errno == errno.ENODATA
        return True

    @held
    def still_named(self) -> bool:
        """True while the name by which the file was opened leads to it. Raises AccessDenied, IoFailed."""
        with translated(self._path, "check whether the name still leads to this file"):
            try:
                found = os.stat(self._place)
            except (FileNotFoundError, NotADirectoryError):
                return False
            return (found.st_dev, found.st_ino) == identity_of(self._fd)

    def require_name(self) -> None:
        """Raise `Replaced` unless the name still leads to this file.

        Called with the lock held, before anything is stacked on the name or done to it.
        """
        if not self.still_named():
            raise errors.Replaced(
                "was moved, removed or replaced by another file while it was open",
                path=self._path,
                hint="put the file back under this name, or close it everywhere and find out which one is right",
            )

    @held
    def lock(self, *, writer: bool) -> None:
        """Hold the file as a reader or a writer until it is closed; calling again changes the role.

        Raises ImageInUse when another program holds it, and `Replaced`, unlocked, if by then the file has no name or
        its name leads to another file: writes to it would be lost. `open_held` then retries. On a file system without
        locks a reader holds nothing (`lacks_locks`), and a writer is refused: Unprotected.
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
        """Change a reader's locks to a writer's.

        Raises ImageInUse when another program holds the file, and `Replaced`; the reader's locks are kept then.
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
        """Take the writer's locks of `holder`, another opening of the file, which may be closed afterwards."""
        assert self.identity == holder.identity
        with translated(self._path, "lock"):
            locks.inherit(self._fd, self._path)

    @held
    def become_reader(self) -> None:
        """Change a writer's locks to a reader's without a gap in which another writer could get in."""
        with translated(self._path, "lock"):
            locks.become_reader(self._fd, self._path)

    @held
    def unlock(self) -> None:
        """Release every lock of this store."""
        with translated(self._path, "unlock"):
            locks.release(self._fd, self._path)

    @held
    def lacks_locks(self) -> bool:
        """True on a file system without locks: nothing keeps other programs from writing to the file."""
        return locks.are_missing(self._fd)

    def _unprotected(self) -> errors.Unprotected:
        return errors.Unprotected(
            "its file system has no locks, so another program could write to it at the same time",
            path=self._path,
            hint="copy it to another file system; a program that ensures this itself can pass OpenOptions(lock=False)",
        )

    @held
    def in_use(self) -> bool:
        """True when another program, or another open disk of this one, holds the file for writing."""
        return locks.is_written(self._fd)

    @held
    def is_shared(self) -> bool:
        """True when another program, or another open disk of this one, holds the file, be it only for reading."""
        return locks.is_held(self._fd)
