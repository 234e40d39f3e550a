# SPDX-License-Identifier: Apache-2.0
"""Bytes at offsets: with `transfer` (from file to file) and `folder` (names) the only file I/O in vhdkit.

Decides how bytes reach the operating system (`pread`, `pwrite`, `fdatasync`, hole punching, sparse runs), and which
locks keep other programs away. Must not know what the bytes mean. There is no shared position: every call names its
offset.

Locks are those of QEMU's file driver: open-file-description locks, shared, on single bytes. A byte 100+i
locked says "I use permission i", a byte 200+i says "I do not let others use permission i"; permission 0 is
consistent read, 1 write, 3 resize. So `qemu-img` and vhdkit keep each other out with their own messages.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, Self, TypeAlias

from vhdkit import errors
from vhdkit.transfer import Transfer
from vhdkit.units import MIB, SECTOR_SIZE, round_up

Buffer: TypeAlias = bytes | bytearray | memoryview

_FALLOC_KEEP_SIZE = 0x01
_FALLOC_PUNCH_HOLE = 0x02
_F_OFD_GETLK, _F_OFD_SETLK = 36, 37
_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid
_HELD_BY_READER = (100, 201, 203)
_HELD_BY_WRITER = (100, 101, 103, 201, 203)
_REFUSED_TO_READER = (101, 103)
_REFUSED_TO_WRITER = (101, 103, 201, 203)
_ZEROS = bytes(MIB)
_CLOSERS = 8  # files closed at once
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
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


def translate(error: OSError, path: str, doing: str) -> errors.VhdkitError:
    """The typed error for what the system said while we were `doing` something to `path`."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    kind: type[errors.VhdkitError] = errors.IoFailed
    hint = None
    if error.errno in _NO_SPACE:
        kind = errors.NoSpace
        hint = "free some space or choose another file system"
    elif error.errno in (errno.ENOENT, errno.ENOTDIR):
        kind = errors.NotFound
    elif error.errno in (errno.EACCES, errno.EPERM):
        kind = errors.AccessDenied
    elif error.errno == errno.EROFS:
        kind = errors.ReadOnly
    elif error.errno == errno.EEXIST:
        kind = errors.AlreadyExists
    elif error.errno in (errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG):
        kind = errors.InvalidArgument
    return kind(f"cannot {doing}: {reason}", path=path, hint=hint)


@contextlib.contextmanager
def translated(path: str, doing: str) -> Iterator[None]:
    """Turn any OSError of the body into the typed error."""
    try:
        yield
    except OSError as error:
        raise translate(error, path, doing) from error


def _fallocate(fd: int, mode: int, offset_bytes: int, size_bytes: int) -> None:
    if _libc.fallocate(fd, mode, offset_bytes, size_bytes) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def identity_of(fd: int) -> tuple[int, int]:
    """Device and inode of an open file: the same for every name and descriptor of it. Raises OSError."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


class FileStore:
    """A `Store` over a regular file or a block device."""

    def __init__(self, fd: int, path: str, *, writable: bool) -> None:
        """Take over `fd`. Use `FileStore.open` or `NewFile` instead."""
        self._fd = fd
        self._path = path
        self._no_wait = os.RWF_NOWAIT
        self._transfer: Transfer | None = None
        self.writable = writable

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, writable: bool = False, follow_links: bool = True) -> FileStore:
        """Open an existing regular file or block device.

        Raises NotFound, AccessDenied, InvalidArgument (a directory, a pipe, a character device).
        """
        name = os.fspath(path)
        # O_NONBLOCK: opening a named pipe must fail by its type below, not wait for a writer.
        flags = os.O_CLOEXEC | os.O_NONBLOCK | (os.O_RDWR if writable else os.O_RDONLY)
        if not follow_links:
            flags |= os.O_NOFOLLOW
        try:
            fd = os.open(name, flags)
        except OSError as error:
            if error.errno == errno.EISDIR:
                raise errors.InvalidArgument("is a directory, not a disk image", path=name) from error
            raise translate(error, name, "open for writing" if writable else "open") from error
        except ValueError as error:
            raise errors.InvalidArgument("is no file name: it holds a zero byte", path=name) from error
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            os.close(fd)
            what = "a directory" if stat.S_ISDIR(mode) else "a pipe, socket or character device"
            raise errors.InvalidArgument(f"is {what}, not a disk image", path=name)
        return cls(fd, name, writable=writable)

    @property
    def name(self) -> str:
        """The path it was opened by."""
        return self._path

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode: the same for every name of one file."""
        return identity_of(self._fd)

    @property
    def is_device(self) -> bool:
        """True for a block device."""
        return stat.S_ISBLK(os.fstat(self._fd).st_mode)

    def fileno(self) -> int:
        """The descriptor, for code that hands it to the kernel."""
        return self._fd

    def size(self) -> int:
        """Length in bytes (of a device, its capacity)."""
        with translated(self._path, "find the size"):
            return os.lseek(self._fd, 0, os.SEEK_END)

    def allocated_bytes(self) -> int:
        """Bytes the file takes on its file system (holes do not count)."""
        return os.fstat(self._fd).st_blocks * SECTOR_SIZE

    def modified_ns(self) -> int:
        """When it was last written to, in nanoseconds since 1970."""
        return os.fstat(self._fd).st_mtime_ns

    def pread(self, offset_bytes: int, size_bytes: int) -> bytes:
        """See `Store.pread`."""
        pieces = []
        while size_bytes > 0:
            try:
                piece = os.pread(self._fd, size_bytes, offset_bytes)
            except OSError as error:
                raise self._failed(error, "read", offset_bytes) from error
            if not piece:
                break
            pieces.append(piece)
            offset_bytes += len(piece)
            size_bytes -= len(piece)
        return b"".join(pieces)

    def pread_into(self, offset_bytes: int, buffer: memoryview) -> None:
        """See `Store.pread_into`."""
        try:
            done = os.preadv(self._fd, (buffer,), offset_bytes)
            wanted = len(buffer)
            while done < wanted:
                rest = buffer[done:]
                got = os.preadv(self._fd, (rest,), offset_bytes + done)
                if got == 0:
                    rest[:] = bytes(len(rest))
                    return
                done += got
        except OSError as error:
            raise self._failed(error, "read", offset_bytes) from error

    def try_pread_into(self, offset_bytes: int, buffer: memoryview) -> bool:
        """See `Store.try_pread_into`: the page cache has it, or the file system has no device to wait for."""
        try:
            return _preadv(self._fd, (buffer,), offset_bytes, self._no_wait) == len(buffer)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in _UNSUPPORTED and self._no_wait:
                self._no_wait = 0  # tmpfs, for one, has no such flag and never waits
                return self.try_pread_into(offset_bytes, buffer)
            raise self._failed(error, "read", offset_bytes) from error

    def pwrite(self, offset_bytes: int, data: Buffer) -> None:
        """See `Store.pwrite`."""
        try:
            done = os.pwrite(self._fd, data, offset_bytes)
            if done < len(data):
                rest = memoryview(data)
                while done < len(rest):
                    done += os.pwrite(self._fd, rest[done:], offset_bytes + done)
        except OSError as error:
            raise self._failed(error, "write", offset_bytes) from error

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

    def punches(self) -> bool:
        """See `Store.punches`."""
        try:  # behind the end there is nothing to lose
            _fallocate(self._fd, _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, round_up(self.size(), MIB), MIB)
        except OSError:
            return False
        return True

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

    def copy_from(self, source: Store, source_offset_bytes: int, offset_bytes: int, size_bytes: int) -> None:
        """See `Store.copy_from`: `transfer` says how."""
        if isinstance(source, FileStore):
            if self._transfer is None:
                self._transfer = Transfer(self._fd)
            try:
                done = self._transfer.copy(source._fd, source_offset_bytes, offset_bytes, size_bytes)
            except OSError as error:
                raise self._failed(error, f"copy from {errors.printable(source.name)}", offset_bytes) from error
            if done < size_bytes:
                raise _ended(source)
            return
        copy_bytes(source, source_offset_bytes, self, offset_bytes, size_bytes)

    def truncate(self, size_bytes: int) -> None:
        """See `Store.truncate`."""
        with translated(self._path, f"set the size to {size_bytes} bytes"):
            os.ftruncate(self._fd, size_bytes)

    def sync(self) -> None:
        """See `Store.sync`."""
        try:
            os.fdatasync(self._fd)
        except OSError as error:
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

    def _seek(self, offset_bytes: int, whence: int, end: int) -> int:
        try:
            return min(os.lseek(self._fd, offset_bytes, whence), end)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole from here to the end of the file
                return end
            if error.errno in _UNSUPPORTED:
                return offset_bytes if whence == os.SEEK_DATA else end
            raise self._failed(error, "look for holes", offset_bytes) from error

    def lock(self, *, writer: bool) -> None:
        """Hold the file as a reader or a writer until it is closed. Raises ImageInUse when another does.

        Calling again changes the role. Source: the permission bytes of QEMU's file driver.
        """
        # Lock first, look afterwards: of two that start together at least one sees the other.
        held = _HELD_BY_WRITER if writer else _HELD_BY_READER
        for byte in held:
            self._set_lock(fcntl.F_RDLCK, byte)
        refused = self._refused(_REFUSED_TO_WRITER if writer else _REFUSED_TO_READER)
        if refused is not None:
            self.unlock()
            raise self._in_use(refused)
        for byte in set(_HELD_BY_WRITER) - set(held):
            self._set_lock(fcntl.F_UNLCK, byte)

    def _refused(self, bytes_: Sequence[int]) -> int | None:
        """The first of these bytes that another has locked."""
        for byte in bytes_:
            request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            with translated(self._path, "look at the locks"):
                answer = fcntl.fcntl(self._fd, _F_OFD_GETLK, request)
            if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
                return byte
        return None

    def _in_use(self, byte: int) -> errors.ImageInUse:
        doing = "writing to" if byte in _REFUSED_TO_READER else "using"
        return errors.ImageInUse(
            f"another program is {doing} this image",
            path=self._path,
            hint="close it there first (`info`, `chain` and `dump` work meanwhile)",
        )

    def become_writer(self) -> None:
        """From a reader's locks to a writer's. Raises ImageInUse when another holds the file, who stays a reader."""
        more = set(_HELD_BY_WRITER) - set(_HELD_BY_READER)
        for byte in more:
            self._set_lock(fcntl.F_RDLCK, byte)
        refused = self._refused(_REFUSED_TO_WRITER)
        if refused is not None:
            for byte in more:
                self._set_lock(fcntl.F_UNLCK, byte)
            raise self._in_use(refused)

    def inherit_lock(self, holder: FileStore) -> None:
        """Have the writer's locks that `holder`, another opening of the file, has; it may be closed then."""
        assert self.identity == holder.identity
        for byte in _HELD_BY_WRITER:
            self._set_lock(fcntl.F_RDLCK, byte)

    def become_reader(self) -> None:
        """From a writer's locks to a reader's, with none given up in between: nobody else can come in as a writer."""
        for byte in set(_HELD_BY_WRITER) - set(_HELD_BY_READER):
            self._set_lock(fcntl.F_UNLCK, byte)

    def unlock(self) -> None:
        """Give up every lock of this store."""
        for byte in _HELD_BY_WRITER:
            self._set_lock(fcntl.F_UNLCK, byte)

    def in_use(self) -> bool:
        """True when another program, or another open disk of this one, holds the file for writing."""
        request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _REFUSED_TO_READER[0], 1, 0)
        try:
            answer = fcntl.fcntl(self._fd, _F_OFD_GETLK, request)
        except OSError:
            return False
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)

    def _set_lock(self, kind: int, byte: int) -> None:
        request = _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
        try:
            fcntl.fcntl(self._fd, _F_OFD_SETLK, request)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise errors.ImageInUse("another program holds this image exclusively", path=self._path) from error
            raise self._failed(error, "lock", byte) from error

    def close(self) -> None:
        """See `Store.close`."""
        if self._transfer is not None:
            self._transfer.close()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _failed(self, error: OSError, doing: str, offset_bytes: int) -> errors.VhdkitError:
        failure = translate(error, self._path, doing)
        failure.offset_bytes = offset_bytes
        failure.structure = "file"
        return failure


def close_all(stores: Iterable[Store]) -> None:
    """Close several stores side by side. Closing the last descriptor of a file without a name gives its space back
    there and then, and a device that is told of it (`discard`) takes its time."""
    with ThreadPoolExecutor(_CLOSERS, thread_name_prefix="vhdkit-close") as pool:
        for closing in [pool.submit(store.close) for store in stores]:
            closing.result()
