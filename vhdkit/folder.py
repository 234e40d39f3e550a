# SPDX-License-Identifier: Apache-2.0
"""File names: new files that appear whole or not at all, and folder listings.

Decides how a new file gets its name and how names are looked up. Must not know formats or chains; where a
parent may lie is decided in `chain.names.parents`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Self

from vhdkit import errors, likeness, unfinished
from vhdkit.arguments import AnyPath
from vhdkit.attributes import check_folder
from vhdkit.descriptor import close_owned, opened
from vhdkit.hard_links import NO_HARD_LINKS
from vhdkit.named import opened_again
from vhdkit.store import FileStore, translated
from vhdkit.unnamed import UnnamedStore

_MAX_PATH_BYTES = 4096  # PATH_MAX of Linux
_MAX_NAME_BYTES = 255  # NAME_MAX of Linux
_KEPT_BYTES = 8  # of chance in the name of what is put aside


class NewFile:
    """A file under construction: `with NewFile(path) as new:` write `new.store`, then `new.commit()`.

    Until the commit the bytes live under a temporary name in the same folder; leaving the block without a
    commit (an error, Ctrl-C) removes them, so a half-written file is never seen under `path`.
    Whatever the umask is, only its owner may read it (`INV-NEW-PRIVATE`); with `like`, so may every user who can read
    all of those files, and the first of them gives the owner where permitted. A replaced file passes on its mode and
    owner. Raises AlreadyExists when `path` exists and `replace` is false, NotFound when its folder does not exist.
    With `replace` it takes the place of `old`, which the caller holds, and of no other file: a commit raises
    `Replaced` or AlreadyExists if another file has that name by then. With `whatever` it replaces any file.
    """

    def __init__(
        self,
        path: AnyPath,
        *,
        replace: bool = False,
        old: FileStore | None = None,
        whatever: bool = False,
        like: FileStore | Sequence[FileStore] = (),
        mode: int = likeness.PRIVATE,
    ) -> None:
        self.path = os.fsdecode(path)
        self._replace, self._old, self._whatever = replace or whatever, old, whatever
        self._directory = os.path.dirname(self.path) or os.curdir
        replaced = self._checked()
        self.store = opened_again(self._begun)
        self._live = True
        likes = [like] if isinstance(like, FileStore) else like
        if replaced is not None and not (likes and self._whatever):
            likeness.take_over(self.store.fileno(), replaced)
        elif likes:
            likeness.resemble(self.store.fileno(), [os.fstat(one.fileno()) for one in likes])
        else:
            likeness.set_mode(self.store.fileno(), mode)

    def _begun(self) -> UnnamedStore:
        """Create the file under a temporary name, which stays within the 255 bytes that a name may have.

        First removes the files that processes left there when they died.
        """
        unfinished.sweep(self._directory)
        self._temporary = os.path.join(self._directory, unfinished.part_name())
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with translated(self.path, "create"):
            owned = opened(self._temporary, flags, likeness.PRIVATE)
        store = UnnamedStore(owned, self.path, self._temporary)
        try:
            store.lock(writer=True)  # shows that the process that makes this file is alive: see `unfinished`
        except errors.Replaced:  # another process cleared the file away before it was locked
            store.close()
            raise
        except errors.VhdkitError:  # a file system without locks cannot show it
            pass
        return store

    @classmethod
    def check(cls, path: AnyPath) -> None:
        """Raise the errors that creating a file under this name would raise before anything is written."""
        plan = cls.__new__(cls)
        plan.path, plan._replace = os.fsdecode(path), False
        plan._directory = os.path.dirname(plan.path) or os.curdir
        plan._checked()

    def _checked(self) -> os.stat_result | None:
        name = os.path.basename(self.path)
        if not name or name in (os.curdir, os.pardir) or os.path.isdir(self.path):
            raise errors.InvalidArgument("is a folder; name a file", path=self.path)
        self._check_directory()
        return self._check_destination()

    def _check_directory(self) -> None:
        with translated(self.path, "examine the folder for the new file"):
            try:
                is_directory = stat.S_ISDIR(os.stat(self._directory).st_mode)
            except (FileNotFoundError, NotADirectoryError):
                is_directory = False
        if not is_directory:
            raise errors.NotFound("the folder for the new file does not exist", path=self.path)
        check_folder(self._directory, self.path)

    def _check_destination(self) -> os.stat_result | None:
        """Refuse a destination that must not be replaced; return the one that will be."""
        with translated(self.path, "look at"):
            try:
                status = os.lstat(self.path)
            except FileNotFoundError:
                return None
        if not self._replace:
            raise errors.AlreadyExists("already exists", path=self.path, hint="choose another name")
        if not stat.S_ISREG(status.st_mode):
            raise errors.InvalidArgument(
                "exists and is not a regular file: it is not replaced",
                path=self.path,
                hint="to write to a device, write to standard output and pipe it to dd",
            )
        return status

    def start_early(self) -> None:
        """Let the device write while more is written, so that a commit with `sync` waits less."""
        self.store.starts_early = True

    def commit(self, *, sync: bool = True) -> None:
        """Give the file its name. With `sync`, bytes and name are on the device when this returns.

        If the name cannot be flushed, the file keeps it: its content is on the device, and may have taken hours.
        """
        if sync:
            FileStore.sync(self.store)
        self._give_name()
        if sync:
            try:
                sync_directory(self._directory)
            except errors.VhdkitError as error:
                error.problem = f"is complete, but its name may not survive a power cut: {error.problem}"
                error.path, error.hint = self.path, "the system's log says what is wrong with the device"
                raise

    def _give_name(self) -> None:
        """Keep the file locked until it has its name, so that no other process clears it away first."""
        if self._old is not None:
            self._old.require_name()
        if self._whatever or self._old is not None:
            with translated(self.path, "rename the finished file"):
                os.rename(self._temporary, self.path)
        else:
            self._link_exclusively()
        self._live = False
        self.store.unlock()

    def _link_exclusively(self) -> None:
        """Rename without ever overwriting a file that was created in the meantime."""
        with translated(self.path, "name the finished file"):
            try:
                os.link(self._temporary, self.path)
            except OSError as error:
                if error.errno not in {*NO_HARD_LINKS, errno.EXDEV}:
                    raise
                if os.path.lexists(self.path):  # a file system without hard links: a check is the best available
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
                os.rename(self._temporary, self.path)
            else:
                os.unlink(self._temporary)

    def discard(self) -> None:
        """Close and, without a commit, remove what was written. In a forked process the file is the parent's."""
        self.store.close()
        if self._live and not self.store.is_left_by_fork:
            self._live = False
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.discard()


def commit_all(files: Sequence[NewFile]) -> None:
    """Give several finished files their names, in this order; if one fails, none keeps its name.

    Returns when all bytes and names are on the device. A power cut in the middle leaves the first few of them. None
    of the files may replace another, because the replaced file could not be restored.
    """
    for one in files:
        assert not one._replace
        FileStore.sync(one.store)
    named: list[NewFile] = []
    try:
        for one in files:
            named.append(one)
            one._give_name()
        for directory in dict.fromkeys(one._directory for one in files):
            sync_directory(directory)
    except BaseException:  # Ctrl-C too
        for one in reversed(named):
            if not one._live:
                with contextlib.suppress(OSError):
                    os.unlink(one.path)
        raise


def scratch_store(directory: str | None) -> FileStore:
    """A nameless file in `directory` (None: the system's folder for temporary files) that vanishes when closed."""
    if directory is None:
        with translated("temporary files", "find a folder for"):
            from tempfile import gettempdir  # imported only when needed, because the import is slow

            directory = gettempdir()
    directory = directory or os.curdir
    with translated(directory, "create a temporary file in"):
        try:
            owned = opened(directory, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
                raise
            name = os.path.join(directory, unfinished.part_name())
            owned = opened(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            os.unlink(name)
    return UnnamedStore(owned, os.path.join(directory, "(temporary file)"), f"/proc/self/fd/{owned[0]}")


def sync_directory(directory: str) -> None:
    """Return when the names in `directory` are on the device."""
    directory = directory or os.curdir
    with translated(directory, "flush the folder"):
        try:
            owned = opened(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except PermissionError:  # writable but not readable: such a folder cannot be flushed
            return
        try:
            os.fsync(owned[0])
        except OSError as error:
            # A file system that cannot flush a folder does not count as a failure.
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
        finally:
            close_owned(owned)


def remove_file(path: str) -> None:
    """Remove a file's name, durably: it is gone from the device when this returns. A missing file is fine."""
    with translated(path, "remove"), contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sync_directory(os.path.dirname(path))


def real_path(path: AnyPath) -> str:
    """The absolute path with every link followed."""
    name = os.fsdecode(path)
    with translated(name, "find the place of"):  # the working folder may be gone
        return os.path.realpath(name)


def sidecar_path(path: AnyPath, kind: str, *, is_real: bool = False) -> str:
    """Where the record of this `kind` about the image at `path` lies: a hidden file in the image's real folder.

    With `is_real`, the path is known to have no links and is not examined.
    """
    folder, name = os.path.split(os.fsdecode(path) if is_real else real_path(path))
    hidden = f".{name}.vhdkit-{kind}"
    if len(os.fsencode(hidden)) > _MAX_NAME_BYTES:
        hidden = f".{_short(name)}.vhdkit-{kind}"
    return os.path.join(folder, hidden)


def _short(name: str) -> str:
    """A stand-in for a name that is too long to be part of another."""
    return hashlib.sha256(os.fsencode(name)).hexdigest()


def read_whole(path: str, limit_bytes: int) -> bytes | None:
    """The bytes of a small regular file, links not followed; None if it does not exist or is longer than the limit.

    Raises AccessDenied, IoFailed.
    """
    try:
        store = FileStore.open(path, follow_links=False)
    except (errors.NotFound, errors.InvalidArgument):
        return None
    with store:
        return store.pread(0, limit_bytes) if store.size() <= limit_bytes and not store.is_device else None


def write_whole(
    path: str, raw: bytes, *, like: FileStore | Sequence[FileStore] = (), mode: int = likeness.PRIVATE
) -> None:
    """Replace the content of the file at `path` with `raw`, atomically and durably: a power cut leaves old or new.

    Who may read it is decided as in `NewFile`. Raises AccessDenied, NoSpace, IoFailed.
    """
    with NewFile(path, whatever=True, like=like, mode=mode) as new:
        new.store.pwrite(0, raw)
        new.commit()


def rename_aside(paths: Sequence[str]) -> list[str]:
    """Rename files to names beside their own that no program looks for, and return those; a missing file is fine.

    Raises AccessDenied, IoFailed.
    """
    ending, renamed = f".kept-{os.urandom(_KEPT_BYTES).hex()}", []
    for path in paths:
        with translated(path, "rename"), contextlib.suppress(FileNotFoundError):
            os.rename(path, path + ending)
            renamed.append(path + ending)
    return renamed


def is_within(path: str, directories: tuple[str, ...]) -> bool:
    """True when the real path `path` lies in one of the real `directories` or below it."""
    return any(os.path.commonpath((path, directory)) == directory for directory in directories)


def is_file_name(text: str) -> bool:
    """False for text that cannot name a file here: too long, with a zero byte, or letters the locale cannot write."""
    try:
        raw = os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return b"\0" not in raw and len(raw) <= _MAX_PATH_BYTES


def exists(path: str) -> bool:
    """True when the name is taken, even by a dangling link."""
    with translated(path, "look at"):
        return os.path.lexists(path)


def is_folder(path: str) -> bool:
    """True for an existing folder (links followed)."""
    return os.path.isdir(path)


def may_hold(directory: str, endings: tuple[str, ...]) -> bool:
    """False if a folder has no names with these endings, or does not exist; True also if it cannot be examined."""
    try:
        with os.scandir(directory) as entries:
            return any(entry.name.endswith(endings) for entry in entries)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError:
        return True


def subfolders(directory: str) -> list[str]:
    """The folders directly in `directory`, sorted, without links. An unreadable folder has none."""
    try:
        with os.scandir(directory or os.curdir) as entries:
            return sorted(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []


def sidecars_of(path: str) -> list[str]:
    """The records of every kind that lie beside the image at `path`."""
    folder, name = os.path.split(real_path(path))
    beginnings = tuple(os.path.join(folder, f".{one}.vhdkit-") for one in (name, _short(name)))
    return [one for one in _files(folder) if one.startswith(beginnings)]


def unlink(path: str) -> None:
    """Remove a name without syncing its folder."""
    with translated(path, "remove"):
        os.unlink(path)


def is_regular(path: str) -> bool:
    """True for an existing regular file (links followed)."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def regular_files(directory: str, limit: int | None = None) -> Iterator[str]:
    """The paths of the regular files directly in `directory`, sorted, without those under construction (`unfinished`).

    An unreadable folder has none. With a `limit`, only that many names are examined, in whatever order they come.
    """
    for path in _files(directory, limit):
        if not unfinished.is_part(os.path.basename(path)):
            yield path


def _files(directory: str, limit: int | None = None) -> Iterator[str]:
    try:
        with os.scandir(directory or os.curdir) as entries:
            names = [entry.name for entry in islice(entries, limit) if entry.is_file(follow_symlinks=False)]
    except OSError:
        return
    for name in sorted(names):
        yield os.path.join(directory, name)


def find_ignoring_case(path: str, directories: tuple[str, ...] | None = None) -> str | None:
    """An existing path that differs from `path` only in upper and lower case, or None.

    Windows names are case-insensitive. An exact match of a component takes precedence over another spelling. Only
    folders whose real path lies in one of the real `directories` are listed (None: any), as a spelling may be a link.
    """
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        return None
    found = os.sep if os.path.isabs(path) else ""
    for name in path.split(os.sep):
        if not name:
            continue
        if not os.path.lexists(os.path.join(found, name)):
            if directories is not None and not is_within(real_path(found or os.curdir), directories):
                return None
            try:
                spellings = sorted(one for one in os.listdir(found or os.curdir) if one.casefold() == name.casefold())
            except OSError:
                return None
            if not spellings:
                return None
            name = spellings[0]
        found = os.path.join(found, name)
    return found
