# SPDX-License-Identifier: Apache-2.0
"""A folder that is held open, and the files directly in it, reached through its descriptor and never through a link.

Decides how a name in an untrusted folder becomes an open file or a folder: the name is one component, links are
refused, and only regular files are opened (`INV-FOLDER-HELD`). What was opened stays what it is, even if another
process renames folders on the way or replaces them by links. A new file appears whole, with its bytes and its name on
the device, or not at all. Must not know what the files mean.

A file can still have a second name elsewhere (a hard link); writing into an existing file would change that, too. So
files are made anew, replaced as a whole, or removed. The exceptions are `held_lock`, which writes to a file of its
own, and `own_file`, which refuses a file with a second name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from itertools import islice
from typing import Self

from vhdkit import errors, unfinished
from vhdkit.arguments import AnyPath
from vhdkit.descriptor import Descriptor, Owned, close_owned, held, opened
from vhdkit.store import FileStore
from vhdkit.unnamed import UnnamedStore
from vhdkit.wording import translate, translated

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # opening a pipe must not wait for a writer
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OWN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LOCK = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NOT_FLUSHABLE = {errno.EINVAL, errno.EOPNOTSUPP}
_FOLDER_MODE, _FILE_MODE = 0o700, 0o600
_MAX_OWNER_BYTES = 200  # of the text in a lock file


class HeldFolder(Descriptor):
    """An open folder. `path` is where it was found, for messages and for code that works with paths.

    Names are single components. Every method may raise NotFound, AccessDenied, IoFailed, and InvalidArgument for a
    name that leads to a link or to anything but what was asked for.
    """

    def __init__(self, owned: list[int], path: str) -> None:
        """Take over the descriptor in the list. Use `open_folder` or `folder` instead."""
        super().__init__(owned, path, writable=False)
        self.path = path

    # -- folders --------------------------------------------------------------------------------------------------

    @held
    def folder(self, name: str) -> HeldFolder:
        """A folder in this one. The caller closes it."""
        path = self._path_of(name)
        try:
            return HeldFolder(opened(name, _FOLDER, dir_fd=self._fd), path)
        except OSError as error:
            raise self._refused(error, path, "open the folder") from error

    @held
    def made_folder(self, name: str) -> HeldFolder:
        """The same, made if it does not exist, private to its owner; its name is on the device then."""
        path = self._path_of(name)
        with translated(path, "create the folder"):
            try:
                os.mkdir(name, _FOLDER_MODE, dir_fd=self._fd)
            except FileExistsError:
                return self.folder(name)
        self.sync()
        return self.folder(name)

    @held
    def names(self, limit: int) -> list[str]:
        """The names in the folder, sorted. Raises InvalidArgument if there are more than `limit`.

        Hidden names are left out: files under construction, and what other programs keep.
        """
        with translated(self.path, "list the folder"):
            again = opened(os.curdir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._fd)
            try:
                with os.scandir(again[0]) as entries:
                    found = [one.name for one in islice(entries, limit + 1)]
            finally:
                close_owned(again)
        if len(found) > limit:
            raise errors.InvalidArgument(f"the folder has more than {limit} entries", path=self.path)
        return sorted(name for name in found if not name.startswith("."))

    @held
    def exists(self, name: str) -> bool:
        """True if the name is taken, by whatever."""
        path = self._path_of(name)
        with translated(path, "look at"):
            try:
                os.stat(name, dir_fd=self._fd, follow_symlinks=False)
            except FileNotFoundError:
                return False
        return True

    @held
    def is_same(self, other: HeldFolder) -> bool:
        """True if both are the same folder, however it was found."""
        with translated(self.path, "look at"):
            ours = os.fstat(self._fd)
        return other.is_folder(ours.st_dev, ours.st_ino)

    @held
    def is_folder(self, device: int, inode: int) -> bool:
        """True if this is the folder with these numbers."""
        with translated(self.path, "look at"):
            found = os.fstat(self._fd)
        return (found.st_dev, found.st_ino) == (device, inode)

    @held
    def free_bytes(self) -> int:
        """How much this user can still write to the file system."""
        with translated(self.path, "find out how much space is free"):
            found = os.fstatvfs(self._fd)
        return found.f_bavail * found.f_frsize

    @held
    def sync(self) -> None:
        """Return when the names in the folder are on the device."""
        with translated(self.path, "flush the folder"):
            try:
                os.fsync(self._fd)
            except OSError as error:
                if error.errno not in _NOT_FLUSHABLE:
                    raise

    @held
    def remove_folder(self, name: str) -> bool:
        """Remove an empty folder; False if it is missing or not empty. The removal is not flushed."""
        with translated(self._path_of(name), "remove the folder"):
            try:
                os.rmdir(name, dir_fd=self._fd)
            except FileNotFoundError:
                return False
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    return False
                raise
        return True

    # -- files ----------------------------------------------------------------------------------------------------

    @held
    def file(self, name: str) -> FileStore:
        """A regular file, open for reading. The caller closes it."""
        path = self._path_of(name)
        owned = Owned()
        try:
            owned = opened(name, _READ, dir_fd=self._fd)
            if not stat.S_ISREG(os.fstat(owned[0]).st_mode):
                raise errors.InvalidArgument("is not a regular file", path=path)
            return FileStore(owned, path, writable=False)
        except OSError as error:
            close_owned(owned)
            raise self._refused(error, path, "open") from error
        except BaseException:
            close_owned(owned)
            raise

    @held
    def own_file(self, name: str) -> FileStore:
        """A regular file, open for writing, locked as by its only writer, and made if it does not exist.

        The name of a new one is not flushed (`sync`). The caller closes it. Raises ImageInUse; and InvalidArgument for
        a file that has a second name, which a write would change, too.
        """
        path = self._path_of(name)
        owned = Owned()
        try:
            owned = opened(name, _OWN, _FILE_MODE, dir_fd=self._fd)
            facts = os.fstat(owned[0])
            if not stat.S_ISREG(facts.st_mode) or facts.st_nlink > 1:
                raise errors.InvalidArgument("is no regular file, or has a second name (a hard link)", path=path)
        except OSError as error:
            close_owned(owned)
            raise self._refused(error, path, "open for writing") from error
        except BaseException:
            close_owned(owned)
            raise
        store = FileStore(owned, path, writable=True)
        try:
            store.lock(writer=True)
        except BaseException:
            store.close()
            raise
        return store

    def read(self, name: str, limit_bytes: int) -> bytes:
        """All bytes of a small file. Raises InvalidArgument if there are more than `limit_bytes`."""
        with self.file(name) as store:
            raw = store.pread(0, limit_bytes + 1)
        if len(raw) > limit_bytes:
            raise errors.InvalidArgument(f"has more than {limit_bytes} bytes", path=store.name)
        return raw

    @contextlib.contextmanager
    def new_file(self, name: str, *, replace: bool = False) -> Iterator[FileStore]:
        """A file under construction. When the block ends, its bytes and its name are on the device.

        After an exception in the block no file is left. With `replace` it takes the place of a file of that name.
        Raises AlreadyExists, NoSpace.
        """
        path = self._path_of(name)
        part = unfinished.part_name()
        with translated(path, "create"):
            owned = opened(part, _NEW, _FILE_MODE, dir_fd=self._number())
        named = False
        store = UnnamedStore(owned, path, f"/proc/self/fd/{self._number()}/{part}")
        store.starts_early = True
        try:
            with contextlib.suppress(errors.Unprotected, errors.IoFailed):
                store.lock(writer=True)  # shows that this process is alive: see `unfinished`
            yield store
            FileStore.sync(store)
            self._give_name(part, name, path, replace=replace)
            named = True
        finally:
            store.close()
            if not named and not store.is_left_by_fork:
                with contextlib.suppress(OSError, errors.VhdkitError):
                    os.unlink(part, dir_fd=self._number())
        self.sync()

    def write(self, name: str, raw: bytes, *, replace: bool = False) -> None:
        """A small file, whole: see `new_file`."""
        with self.new_file(name, replace=replace) as store:
            store.pwrite(0, raw)

    @held
    def remove(self, name: str) -> bool:
        """Remove a file's name; False if it is missing. The removal is not flushed (`sync`)."""
        with translated(self._path_of(name), "remove"):
            try:
                os.unlink(name, dir_fd=self._fd)
            except FileNotFoundError:
                return False
        return True

    def sweep(self) -> None:
        """Remove the files under construction that dead processes left here."""
        unfinished.sweep(self.path)

    @contextlib.contextmanager
    def held_lock(self, name: str, owner: str) -> Iterator[None]:
        """Be the only process that holds this lock file. It is released by the kernel when the process dies.

        `owner` is a line of text that the file holds for the message of a process that finds it locked. Raises
        ImageInUse if another process holds it, Unprotected on a file system without locks.
        """
        path = self._path_of(name)
        while True:
            owned = self._locked(name, path)
            try:
                if not self._is_still(name, owned[0]):
                    continue  # removed by another process before it was locked here
                with translated(path, "write to"):
                    os.ftruncate(owned[0], 0)
                    os.pwrite(owned[0], owner.encode()[:_MAX_OWNER_BYTES], 0)
                yield
                return
            finally:
                close_owned(owned)

    def _locked(self, name: str, path: str) -> Owned:
        owned = Owned()
        try:
            owned = opened(name, _LOCK, _FILE_MODE, dir_fd=self._number())
            facts = os.fstat(owned[0])
            if not stat.S_ISREG(facts.st_mode) or facts.st_nlink > 1:
                raise errors.InvalidArgument("is not a lock file: it is a link or no regular file", path=path)
            fcntl.flock(owned[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with translated(path, "read"):
                raw = os.pread(owned[0], _MAX_OWNER_BYTES, 0)
            close_owned(owned)
            holder = errors.printable(raw.decode("utf-8", "replace")) or "another process"
            raise errors.ImageInUse(f"is held by {holder}", path=path, hint="wait until it has ended") from error
        except OSError as error:
            close_owned(owned)
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise errors.Unprotected(
                    "its file system has no locks, so two programs could change the folder at the same time",
                    path=path,
                    hint="use another file system",
                ) from error
            raise self._refused(error, path, "lock") from error
        except BaseException:
            close_owned(owned)
            raise
        return owned

    @held
    def _is_still(self, name: str, number: int) -> bool:
        """True while the name leads to this open file."""
        try:
            found, ours = os.stat(name, dir_fd=self._fd, follow_symlinks=False), os.fstat(number)
        except FileNotFoundError:
            return False
        return (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino)

    @held
    def _give_name(self, part: str, name: str, path: str, *, replace: bool) -> None:
        with translated(path, "name the finished file"):
            if replace:
                self._require_replaceable(name, path)
                os.rename(part, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
                return
            try:
                os.link(part, name, src_dir_fd=self._fd, dst_dir_fd=self._fd, follow_symlinks=False)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                if self.exists(name):  # a file system without hard links: a check is the best available
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
                os.rename(part, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
            else:
                os.unlink(part, dir_fd=self._fd)

    def _require_replaceable(self, name: str, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(os.stat(name, dir_fd=self._fd, follow_symlinks=False).st_mode):
                raise errors.InvalidArgument("is not a regular file: it is not replaced", path=path)

    @held
    def _number(self) -> int:
        return self._fd

    def _path_of(self, name: str) -> str:
        if not name or "/" in name or "\0" in name or name in (os.curdir, os.pardir):
            raise errors.InvalidArgument(
                "is not the name of a file in this folder", path=os.path.join(self.path, name)
            )
        return os.path.join(self.path, name)

    def _refused(self, error: OSError, path: str, doing: str) -> errors.VhdkitError:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            return errors.InvalidArgument("is a link, which is not followed here", path=path)
        if error.errno == errno.ENXIO:
            return errors.InvalidArgument("is not a regular file", path=path)
        if error.errno == errno.ENOTDIR:
            return errors.InvalidArgument("is not a folder, or is a link to one", path=path)
        return translate(error, path, doing)

    def close(self) -> None:
        """Close the folder. Closing twice is fine."""
        with translated(self.path, "close"):
            self.close_descriptor()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def open_folder(path: AnyPath) -> HeldFolder:
    """Hold a folder that the user named; links are followed on the way to it. The caller closes it."""
    name = os.fsdecode(path)
    with translated(name, "open the folder"):
        real = os.path.realpath(name)
        owned = opened(real, _FOLDER)
    return HeldFolder(owned, real)


def make_folder(path: AnyPath) -> HeldFolder:
    """Make a new folder, private to its owner, or take an existing one; its name is on the device."""
    name = os.path.realpath(os.fsdecode(path))
    with open_folder(os.path.dirname(name)) as above:
        return above.made_folder(os.path.basename(name))
