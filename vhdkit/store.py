# SPDX-License-Identifier: Apache-2.0
"""Bytes at offsets: how the content of a file is read and written.

Decides how bytes reach the operating system (`pread`, `pwrite`, `fdatasync`, hole punching, sparse runs), and that a
file is held only while its name leads to it. Must not know what the bytes mean. There is no shared position: every
call names its offset. Which locks keep other programs away is decided in `locks`.

`INV-NAME-HELD`: a lock is given only on the file to which its name leads *after* it was locked, and nothing is stacked
on a name, moved or removed by it, unless it still leads to the file that is open.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, Self, TypeAlias, TypeVar

from vhdkit import errors, locks
from vhdkit.arguments import AnyPath
from vhdkit.descriptor import Descriptor, close_owned, held, opened
from vhdkit.transfer import Transfer, kept_elsewhere
from vhdkit.units import MIB, SECTOR_SIZE, round_up
from vhdkit.wording import translate as translate
from vhdkit.wording import translated as translated

Buffer: TypeAlias = bytes | bytearray | memoryview

_FALLOC_KEEP_SIZE = 0x01
_FALLOC_PUNCH_HOLE = 0x02
_OPENINGS = 20  # of a name that leads to another file each time
_ZEROS = bytes(MIB)
_CLOSERS = 8  # files closed at once
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}

_preadv = os.preadv

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Store(Protocol):
    """Bytes at offsets. `FileStore` is the real one; tests bring stores in memory that fail and lose power.

    Offsets and sizes are bytes. Every method may raise `IoFailed`, the writing ones `NoSpace`, `sync` `SyncFailed`.
    """

    @property
    def name(self) -> str:
        """The path, for messages and for telling two stores apart."""
        ...

    def size(self) -> int:
        """The current length in bytes."""
        ...

    def pread(self, offset_bytes: int, size_bytes: int) -> bytes:
        """Up to `size_bytes` bytes; fewer only at the end of the store."""
        ...

    def pread_into(self, offset_bytes: int, buffer: memoryview) -> None:
        """Fill `buffer`; what lies past the end of the store reads as zeros."""
        ...

    def try_pread_into(self, offset_bytes: int, buffer: memoryview) -> bool:
        """Fill `buffer` when that needs no waiting for a device; False (and `buffer` undefined) when it may."""
        ...

    def pwrite(self, offset_bytes: int, data: Buffer) -> None:
        """Write all of `data`, growing the store when it reaches past the end."""
        ...

    def punch(self, offset_bytes: int, size_bytes: int) -> None:
        """Make a range inside the store read as zeros, giving its space back where that is possible."""
        ...

    def punches(self) -> bool:
        """True when `punch` gives space back; False when it writes zeros."""
        ...

    def reserve(self, offset_bytes: int, size_bytes: int) -> None:
        """Grow the store over a fresh range that reads as zeros and has its space set aside."""
        ...

    def copy_from(self, source: Store, source_offset_bytes: int, offset_bytes: int, size_bytes: int) -> None:
        """Write here what `source` (or this store itself, not overlapping) holds there, without changing it.

        The range lies inside the source. The kernel does the copying, or shares the space, where it can.
        """
        ...

    def truncate(self, size_bytes: int) -> None:
        """Cut or extend (with zeros) to `size_bytes`."""
        ...

    def sync(self) -> None:
        """Return only when everything written so far is on the device."""
        ...

    def data_runs(self, offset_bytes: int, size_bytes: int) -> Iterator[tuple[int, int, bool]]:
        """The range as (offset, size, may hold data) runs, in order, without gaps; False runs read as zeros."""
        ...

    def close(self) -> None:
        """Let go of the store and of its locks. Closing twice is fine."""
        ...


def copy_bytes(
    source: Store, source_offset_bytes: int, destination: Store, offset_bytes: int, size_bytes: int
) -> None:
    """Copy between any two stores, in pieces of at most 1 MiB. Raises what reading and writing raise."""
    while size_bytes > 0:
        piece = source.pread(source_offset_bytes, min(size_bytes, MIB))
        if not piece:
            raise _ended(source)
        destination.pwrite(offset_bytes, piece)
        source_offset_bytes += len(piece)
        offset_bytes += len(piece)
        size_bytes -= len(piece)


def _ended(source: Store) -> errors.IoFailed:
    return errors.IoFailed("the file ended while it was copied", path=source.name)


def _fallocate(fd: int, mode: int, offset_bytes: int, size_bytes: int) -> None:
    if _libc.fallocate(fd, mode, offset_bytes, size_bytes) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


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


class FileStore(Descriptor):
    """A `Store` over a regular file or a block device. After `close` every method raises DiskClosed."""

    def __init__(self, owned: list[int], path: str, *, writable: bool) -> None:
        """Take over the descriptor in the list. Use `FileStore.open` or `NewFile` instead."""
        super().__init__(owned, path, writable=writable)
        self._place = path  # where it lies, for now
        self._no_wait = os.RWF_NOWAIT
        self._transfer: Transfer | None = None
        self._has_lost_pages = False

    @classmethod
    def open(cls, path: AnyPath, *, writable: bool = False, follow_links: bool = True) -> FileStore:
        """Open an existing regular file or block device.

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
            return cls(owned, name, writable=writable)
        except OSError as error:
            close_owned(owned)
            if error.errno == errno.EISDIR:
                raise errors.InvalidArgument("is a folder, not a disk image", path=name) from error
            raise translate(error, name, "open for writing" if writable else "open") from error
        except ValueError as error:
            raise errors.InvalidArgument("is not a file name: it holds a zero byte", path=name) from error
        except BaseException:
            close_owned(owned)
            raise

    @classmethod
    def open_held(
        cls, path: AnyPath, *, writable: bool = False, writer: bool = True, follow_links: bool = True
    ) -> FileStore:
        """Open the file and hold it, as a writer unless told otherwise; another file's if it is replaced meanwhile.

        What is read from it afterwards is what the lock protects. Raises what `open` and `lock` raise.
        """

        def once() -> FileStore:
            store = cls.open(path, writable=writable, follow_links=follow_links)
            try:
                store.lock(writer=writer)
            except BaseException:
                store.close()
                raise
            return store

        return opened_again(once)

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
    def size(self) -> int:
        """Length in bytes (of a device, its capacity)."""
        with translated(self._path, "find the size"):
            return os.lseek(self._fd, 0, os.SEEK_END)

    @held
    def allocated_bytes(self) -> int:
        """Bytes the file takes on its file system (holes do not count)."""
        return os.fstat(self._fd).st_blocks * SECTOR_SIZE

    @held
    def is_remote(self) -> bool:
        """True for a file that is kept on a server, or by a program: when it was written to is for them to say."""
        return kept_elsewhere(self._fd)

    @held
    def modified_ns(self) -> int:
        """When it was last written to, in nanoseconds since 1970."""
        return os.fstat(self._fd).st_mtime_ns

    @held
    def label(self, name: str) -> bytes | None:
        """The value of a label of this file (a user's extended attribute); None without one, or where there are none.

        Copies of the file, and what takes its place under its name, do not have it.
        """
        try:
            return os.getxattr(self._fd, f"user.vhdkit.{name}")
        except OSError:
            return None

    @held
    def set_label(self, name: str, value: bytes | None) -> bool:
        """Give the file a label, or with None take it away; False where that cannot be."""
        try:
            if value is None:
                os.removexattr(self._fd, f"user.vhdkit.{name}")
            else:
                os.setxattr(self._fd, f"user.vhdkit.{name}", value)
        except OSError as error:
            return value is None and error.errno == errno.ENODATA
        return True

    def pread(self, offset_bytes: int, size_bytes: int) -> bytes:
        """See `Store.pread`."""
        pieces, inside = [], self.inside
        try:
            inside.append(None)
            while size_bytes > 0:
                piece = os.pread(self._fd, size_bytes, offset_bytes)
                if not piece:
                    break
                pieces.append(piece)
                offset_bytes += len(piece)
                size_bytes -= len(piece)
        except OSError as error:
            raise self._failed(error, "read", offset_bytes) from error
        finally:
            inside.pop()
            if self._fd < 0:
                self.let_go()
        return b"".join(pieces)

    def pread_into(self, offset_bytes: int, buffer: memoryview) -> None:
        """See `Store.pread_into`."""
        inside = self.inside
        try:
            inside.append(None)
            done = os.preadv(self._fd, (buffer,), offset_bytes)
            wanted = buffer.nbytes
            while done < wanted:
                rest = buffer.cast("B")[done:]
                got = os.preadv(self._fd, (rest,), offset_bytes + done)
                if got == 0:
                    rest[:] = bytes(len(rest))
                    return
                done += got
        except OSError as error:
            raise self._failed(error, "read", offset_bytes) from error
        finally:
            inside.pop()
            if self._fd < 0:
                self.let_go()

    def try_pread_into(self, offset_bytes: int, buffer: memoryview) -> bool:
        """See `Store.try_pread_into`: the page cache has it, or the file system has no device to wait for."""
        inside = self.inside
        try:
            inside.append(None)
            return _preadv(self._fd, (buffer,), offset_bytes, self._no_wait) == buffer.nbytes
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in _UNSUPPORTED and self._no_wait:
                self._no_wait = 0  # tmpfs, for one, has no such flag and never waits
                return self.try_pread_into(offset_bytes, buffer)
            raise self._failed(error, "read", offset_bytes) from error
        finally:
            inside.pop()
            if self._fd < 0:
                self.let_go()

    def pwrite(self, offset_bytes: int, data: Buffer) -> None:
        """See `Store.pwrite`."""
        inside = self.inside
        try:
            inside.append(None)
            done = os.pwrite(self._fd, data, offset_bytes)
            if done != len(data):
                rest = memoryview(data).cast("B")
                while done < len(rest):
                    done += os.pwrite(self._fd, rest[done:], offset_bytes + done)
        except OSError as error:
            raise self._failed(error, "write", offset_bytes) from error
        finally:
            inside.pop()
            if self._fd < 0:
                self.let_go()

    @held
    def punch(self, offset_bytes: int, size_bytes: int) -> None:
        """See `Store.punch`. Where the file system cannot punch, zeros are written."""
        if size_bytes <= 0:
            return
        try:
            _fallocate(self._fd, _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, offset_bytes, size_bytes)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise self._failed(error, "punch a hole", offset_bytes) from error
            self._write_zeros(offset_bytes, min(size_bytes, max(self.size() - offset_bytes, 0)))

    @held
    def punches(self) -> bool:
        """See `Store.punches`."""
        try:  # behind the end there is nothing to lose
            _fallocate(self._fd, _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, round_up(self.size(), MIB), MIB)
        except OSError:
            return False
        return True

    @held
    def reserve(self, offset_bytes: int, size_bytes: int) -> None:
        """See `Store.reserve`. Where the file system cannot reserve, zeros are written."""
        if size_bytes <= 0:
            return
        try:
            _fallocate(self._fd, 0, offset_bytes, size_bytes)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise self._failed(error, "reserve space", offset_bytes) from error
            self._write_zeros(offset_bytes, size_bytes)

    def _write_zeros(self, offset_bytes: int, size_bytes: int) -> None:
        zeros = memoryview(_ZEROS)
        while size_bytes > 0:
            piece = zeros[: min(size_bytes, len(zeros))]
            self.pwrite(offset_bytes, piece)
            offset_bytes += len(piece)
            size_bytes -= len(piece)

    @held
    def copy_from(self, source: Store, source_offset_bytes: int, offset_bytes: int, size_bytes: int) -> None:
        """See `Store.copy_from`: `transfer` says how."""
        if not isinstance(source, FileStore):
            copy_bytes(source, source_offset_bytes, self, offset_bytes, size_bytes)
        elif source._copied_to(self, source_offset_bytes, offset_bytes, size_bytes) < size_bytes:
            raise _ended(source)

    @held
    def _copied_to(self, target: FileStore, own_offset_bytes: int, offset_bytes: int, size_bytes: int) -> int:
        """Copy to the target, which is held; how much of the range there was."""
        if target._transfer is None:
            target._transfer = Transfer(target._fd)
        try:
            return target._transfer.copy(self._fd, own_offset_bytes, offset_bytes, size_bytes)
        except OSError as error:
            raise target._failed(error, f"copy from {errors.printable(self.name)}", offset_bytes) from error

    @held
    def truncate(self, size_bytes: int) -> None:
        """See `Store.truncate`."""
        with translated(self._path, f"set the size to {size_bytes} bytes"):
            os.ftruncate(self._fd, size_bytes)

    @held
    def sync(self) -> None:
        """See `Store.sync`. Once it has failed it fails for ever: the kernel forgets the pages it could not write."""
        try:
            if self._has_lost_pages:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            os.fdatasync(self._fd)
        except OSError as error:
            self._has_lost_pages = True  # first of all: an exception out of a signal handler may come next
            raise errors.SyncFailed(
                f"flush to the device failed: {os.strerror(error.errno or errno.EIO)}",
                path=self._path,
                hint="what was written since the last flush may be lost; close the disk, look at the device, reopen",
            ) from error

    def data_runs(self, offset_bytes: int, size_bytes: int) -> Iterator[tuple[int, int, bool]]:
        """See `Store.data_runs`. Where the file system cannot tell, everything may hold data."""
        end = offset_bytes + size_bytes
        while offset_bytes < end:
            data = self._seek(offset_bytes, os.SEEK_DATA, end)
            if data > offset_bytes:
                yield offset_bytes, data - offset_bytes, False
            if data >= end:
                return
            hole = self._seek(data, os.SEEK_HOLE, end)
            yield data, hole - data, True
            offset_bytes = hole

    @held
    def _seek(self, offset_bytes: int, whence: int, end: int) -> int:
        try:
            return min(os.lseek(self._fd, offset_bytes, whence), end)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole from here to the end of the file
                return end
            if error.errno in _UNSUPPORTED:
                return offset_bytes if whence == os.SEEK_DATA else end
            raise self._failed(error, "look for holes", offset_bytes) from error

    # -- the name and the locks ---------------------------------------------------------------------------------

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
    def inherit_lock(self, holder: FileStore) -> None:
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

    def close(self) -> None:
        """See `Store.close`."""
        if self._transfer is not None:
            self._transfer.close()
        with translated(self._path, "close"):
            self.close_descriptor()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _failed(self, error: OSError, doing: str, offset_bytes: int) -> errors.VhdkitError:
        if self._fd < 0:
            return self.closed_error()
        failure = translate(error, self._path, doing)
        failure.offset_bytes = offset_bytes
        failure.structure = "file"
        return failure


_T = TypeVar("_T")


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


def close_all(stores: Iterable[Store]) -> None:
    """Close several stores side by side. Closing the last descriptor of a file without a name gives its space back
    there and then, and a device that is told of it (`discard`) takes its time."""
    with ThreadPoolExecutor(_CLOSERS, thread_name_prefix="vhdkit-close") as pool:
        for closing in [pool.submit(store.close) for store in stores]:
            closing.result()
