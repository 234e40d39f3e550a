# SPDX-License-Identifier: Apache-2.0
"""Bytes at offsets: how the content of a file is read and written.

Decides what a store is, for readers (`ReadStore`) and for writers (`Store`), and how the bytes of a file reach the
operating system (`pread`, `pwrite`, `fdatasync`). Must not know what the bytes mean. Openings share no position:
every call names its offset. Where a file has holes is decided in `space`; which file a name leads to, and how it is
held, in `named`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Hashable, Iterator
from typing import Protocol, Self, TypeAlias

from vhdkit import at_once, errors, page_cache, space
from vhdkit.arguments import AnyPath
from vhdkit.arrival import Arrivals
from vhdkit.descriptor import close_owned, held
from vhdkit.named import opened_again, opened_file
from vhdkit.sending import SentFile
from vhdkit.streams import LARGE_BYTES
from vhdkit.transfer import Transfer
from vhdkit.uncached import PORTION_BYTES, Sweeper, Uncached
from vhdkit.units import MIB
from vhdkit.wording import translate as translate
from vhdkit.wording import translated as translated

Buffer: TypeAlias = bytes | bytearray | memoryview

_ZEROS = bytes(MIB)
_RUNS_AT_ONCE = 16  # so that the kernel's part in looking for them is the larger one

_preadv = os.preadv


class ReadStore(Protocol):
    """Bytes at offsets, for reading: a file, or a view of one. Accept this type, not `Store`, in code that only reads.

    Offsets and sizes are bytes. Every method may raise `IoFailed`.
    """

    @property
    def name(self) -> str:
        """The path, for messages."""
        ...

    @property
    def identity(self) -> Hashable:
        """Identifies the file that holds the bytes: equal for every opening and every view of one file."""
        ...

    def size(self) -> int:
        """The current length in bytes."""
        ...

    def pread(self, offset_bytes: int, size_bytes: int) -> bytes:
        """Up to `size_bytes` bytes; fewer only at the end of the store."""
        ...

    def pread_into(self, offset_bytes: int, buffer: memoryview) -> None:
        """Fill `buffer`; bytes past the end of the store read as zeros."""
        ...

    def try_pread_into(self, offset_bytes: int, buffer: memoryview) -> bool:
        """Fill `buffer` without waiting for a device; False (and `buffer` undefined) if a wait may be needed."""
        ...

    def prefetch(self, offset_bytes: int, size_bytes: int) -> None:
        """Ask for the range to be read ahead, so that a later read of it need not wait. Only a hint."""
        ...

    def data_runs(self, offset_bytes: int, size_bytes: int) -> Iterator[tuple[int, int, bool]]:
        """The range as (offset, size, may hold data) runs, in order, without gaps; False runs read as zeros."""
        ...

    def close(self) -> None:
        """Close the store and release its locks. Closing twice is fine."""
        ...


class Store(ReadStore, Protocol):
    """Bytes at offsets. `FileStore` is the real implementation; tests use memory stores that fail and lose power.

    Every method may raise `IoFailed`, the writing ones `NoSpace`, `sync` `SyncFailed`.
    """

    def pwrite(self, offset_bytes: int, data: Buffer) -> None:
        """Write all of `data`, growing the store when it reaches past the end."""
        ...

    def punch(self, offset_bytes: int, size_bytes: int) -> None:
        """Make a range inside the store read as zeros, releasing its space where possible."""
        ...

    def punches(self) -> bool:
        """True when `punch` releases space; False when it writes zeros."""
        ...

    def reserve(self, offset_bytes: int, size_bytes: int) -> None:
        """Grow the store over a new range that reads as zeros and has its space reserved."""
        ...

    def copy_from(self, source: ReadStore, source_offset_bytes: int, offset_bytes: int, size_bytes: int) -> None:
        """Copy a range of `source` (which may be this store, if the ranges do not overlap) to this store.

        The range lies inside the source, which does not change. Where it can, the kernel copies or shares the space.
        """
        ...

    def truncate(self, size_bytes: int) -> None:
        """Cut or extend (with zeros) to `size_bytes`."""
        ...

    def sync(self) -> None:
        """Return when everything written so far is on the device."""
        ...


def copy_bytes(
    source: ReadStore, source_offset_bytes: int, destination: Store, offset_bytes: int, size_bytes: int
) -> None:
    """Copy between any two stores, in pieces of at most 1 MiB. Raises what reading and writing raise."""
    while size_bytes > 0:
        piece = source.pread(source_offset_bytes, min(size_bytes, MIB))
        if not piece:
            raise _ended(source)
        destination.pwrite(offset_bytes, piece)
        source_offset_bytes, offset_bytes = source_offset_bytes + len(piece), offset_bytes + len(piece)
        size_bytes -= len(piece)


def _ended(source: ReadStore) -> errors.IoFailed:
    return errors.IoFailed("the file became shorter while it was copied", path=source.name)


class FileStore(SentFile):
    """A `Store` over a regular file or a block device. After `close` every method raises DiskClosed."""

    def __init__(self, owned: list[int], path: str, *, writable: bool) -> None:
        """Take over the descriptor in the list. Use `FileStore.open` or `NewFile` instead."""
        super().__init__(owned, path, writable=writable)
        self.notes_folder: str | None = None  # where changes of the image are noted (`formats.remember`), if anywhere
        self.uncached: Uncached | None = None  # if the file is kept out of the page cache
        self._no_wait = os.RWF_NOWAIT
        self._transfer = Transfer(self._fd)
        self._has_lost_pages = False

    @classmethod
    def open(cls, path: AnyPath, *, writable: bool = False, follow_links: bool = True) -> FileStore:
        """Open an existing regular file or block device.

        Raises NotFound, AccessDenied, InvalidArgument (a directory, a pipe, a character device).
        """
        owned, name = opened_file(path, writable=writable, follow_links=follow_links)
        try:
            return cls(owned, name, writable=writable)
        except BaseException:
            close_owned(owned)
            raise

    @classmethod
    def open_held(
        cls, path: AnyPath, *, writable: bool = False, writer: bool = True, follow_links: bool = True
    ) -> FileStore:
        """Open the file and hold it, by default as a writer; retry if its name is given to another file meanwhile.

        Data read afterwards is protected by the lock. Raises what `open` and `lock` raise.
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

    @held
    def size(self) -> int:
        """Length in bytes (of a device, its capacity)."""
        try:
            return os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as error:
            raise translate(error, self._path, "find the size") from error

    def pread(self, offset_bytes: int, size_bytes: int) -> bytes:
        """See `ReadStore.pread`."""
        if at_once.is_required():
            return at_once.read(self, offset_bytes, size_bytes)
        pieces, inside = [], self.inside
        try:
            inside.append(None)
            while size_bytes > 0:
                piece = os.pread(self._fd, size_bytes, offset_bytes)
                if not piece:
                    break
                pieces.append(piece)
                offset_bytes, size_bytes = offset_bytes + len(piece), size_bytes - len(piece)
        except OSError as error:
            raise self._failed(error, "read", offset_bytes) from error
        finally:
            inside.pop()
            if self._fd < 0:
                self.let_go()
        data = b"".join(pieces)
        if self.uncached is not None:
            self.uncached.was_read(len(data))
        return data

    def pread_into(self, offset_bytes: int, buffer: memoryview) -> None:
        """See `ReadStore.pread_into`."""
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
                    break
                done += got
        except OSError as error:
            raise self._failed(error, "read", offset_bytes) from error
        finally:
            inside.pop()
            if self._fd < 0:
                self.let_go()
        if self.uncached is not None:
            self.uncached.was_read(wanted)

    def try_pread_into(self, offset_bytes: int, buffer: memoryview) -> bool:
        """See `ReadStore.try_pread_into`: the page cache has the data, or the file system never waits for a device."""
        if buffer.nbytes > LARGE_BYTES and (found := self.try_stream(offset_bytes, buffer)) is not None:
            return found
        inside = self.inside
        try:
            inside.append(None)
            is_there = _preadv(self._fd, (buffer,), offset_bytes, self._no_wait) == buffer.nbytes
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in space.UNSUPPORTED and self._no_wait:
                if not self.is_in_memory():  # FUSE or NFS: there is no way to know
                    return False
                self._no_wait = 0
                return self.try_pread_into(offset_bytes, buffer)
            raise self._failed(error, "read", offset_bytes) from error
        finally:
            inside.pop()
            if self._fd < 0:
                self.let_go()
        if self.uncached is not None:
            self.uncached.was_read(buffer.nbytes)
        return is_there

    @held
    def ask(self, offset_bytes: int, arrivals: Arrivals) -> int | None:
        """Ask for word when a byte is in the page cache; the number of the question, None if that is not possible."""
        return arrivals.ask(self._fd, offset_bytes)

    @held
    def prefetch(self, offset_bytes: int, size_bytes: int) -> None:
        """See `ReadStore.prefetch`."""
        if self.uncached is not None:
            self.uncached.was_asked_for(offset_bytes, size_bytes)
        if not self.is_streamed_to(offset_bytes):
            page_cache.prefetch(self._fd, offset_bytes, size_bytes)

    def pwrite(self, offset_bytes: int, data: Buffer) -> None:
        """See `Store.pwrite`."""
        if self.uncached is not None:
            self.uncached.sweeper.make_room()
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
        if self.uncached is not None:
            self.uncached.was_written(done)

    @held
    def punch(self, offset_bytes: int, size_bytes: int) -> None:
        """See `Store.punch`. Where the file system cannot punch, zeros are written."""
        if size_bytes <= 0:
            return
        try:
            is_done = space.punch(self._fd, offset_bytes, size_bytes)
        except OSError as error:
            raise self._failed(error, "punch a hole", offset_bytes) from error
        if not is_done:
            self._write_zeros(offset_bytes, min(size_bytes, max(self.size() - offset_bytes, 0)))

    @held
    def punches(self) -> bool:
        """See `Store.punches`."""
        return space.punches(self._fd)

    @held
    def reserve(self, offset_bytes: int, size_bytes: int) -> None:
        """See `Store.reserve`. Where the file system cannot reserve, zeros are written."""
        if size_bytes <= 0:
            return
        try:
            is_done = space.reserve(self._fd, offset_bytes, size_bytes)
        except OSError as error:
            raise self._failed(error, "reserve space", offset_bytes) from error
        if not is_done:
            self._write_zeros(offset_bytes, size_bytes)

    def _write_zeros(self, offset_bytes: int, size_bytes: int) -> None:
        end = offset_bytes + size_bytes
        for start in range(offset_bytes, end, len(_ZEROS)):
            self.pwrite(start, memoryview(_ZEROS)[: end - start])

    @held
    def copy_from(self, source: ReadStore, source_offset_bytes: int, offset_bytes: int, size_bytes: int) -> None:
        """See `Store.copy_from`; `transfer` decides how."""
        if not isinstance(source, FileStore):
            copy_bytes(source, source_offset_bytes, self, offset_bytes, size_bytes)
            return
        done = 0
        while done < size_bytes:
            piece = size_bytes - done
            if self.uncached is not None:
                self.uncached.sweeper.make_room()
                piece = min(piece, PORTION_BYTES)
            if source._copied_to(self, source_offset_bytes + done, offset_bytes + done, piece) < piece:
                raise _ended(source)
            if self.uncached is not None:
                self.uncached.was_written(piece)
            if source.uncached is not None:
                source.uncached.was_read(piece)
            done += piece

    @held
    def _copied_to(self, target: FileStore, own_offset_bytes: int, offset_bytes: int, size_bytes: int) -> int:
        """Copy to the target, which is held; returns how many bytes of the range existed."""
        try:
            return target._transfer.copy(self._fd, own_offset_bytes, offset_bytes, size_bytes)
        except OSError as error:
            raise target._failed(error, f"copy from {errors.printable(self.name)}", offset_bytes) from error

    @held
    def shares_with(self, new: FileStore) -> bool:
        """Whether the file system can share this file's space with a new file; tried past its end. Raises IoFailed."""
        with translated(new.name, "share space"):
            return new._transfer.shares_with(self._fd)

    @held
    def keep_out_of_cache(self, sweeper: Sweeper) -> None:
        """Have the file swept from now on: it takes little room in the page cache. Raises IoFailed, AccessDenied."""
        self.has_streams = False  # what is read ahead of them would be swept out before it is used
        with translated(self._path, "open a second time"):
            self.uncached = Uncached.open(self._fd, self._path, sweeper, self.is_shared)

    def follow(self, other: FileStore) -> None:
        """Note changes where `other` does, and keep out of the page cache if it does."""
        self.notes_folder = other.notes_folder
        if other.uncached is not None:
            self.keep_out_of_cache(other.uncached.sweeper)
            if self.uncached is not None and self.identity == other.identity:
                self.uncached.is_shared = other.uncached.is_shared  # its lock is held by the other opening

    @held
    def truncate(self, size_bytes: int) -> None:
        """See `Store.truncate`."""
        try:
            os.ftruncate(self._fd, size_bytes)
        except OSError as error:
            raise translate(error, self._path, f"set the size to {size_bytes} bytes") from error

    @held
    def sync(self) -> None:
        """See `Store.sync`. Once it has failed, it always fails: the kernel forgets the pages it could not write."""
        self._sync_by(os.fdatasync)

    @held
    def sync_times(self) -> None:
        """Like `sync`; the modification time is on the device, too. The file may be open for reading only."""
        self._sync_by(os.fsync)

    def _sync_by(self, sync: Callable[[int], None]) -> None:
        try:
            if self._has_lost_pages:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            sync(self._fd)
        except OSError as error:
            self._has_lost_pages = True  # set first: an exception from a signal handler may come next
            raise errors.SyncFailed(
                f"flush to the device failed: {os.strerror(error.errno or errno.EIO)}",
                path=self._path,
                hint="what was written since the last flush may be lost; close the disk, check the device, reopen",
            ) from error

    def data_runs(self, offset_bytes: int, size_bytes: int) -> Iterator[tuple[int, int, bool]]:
        """See `ReadStore.data_runs`. If the file system cannot say, everything may hold data."""
        end, count = offset_bytes + size_bytes, 1  # callers often want only the first
        while offset_bytes < end:
            found = self._runs(offset_bytes, end, count)
            yield from found
            offset_bytes, count = found[-1][0] + found[-1][1], _RUNS_AT_ONCE

    @held
    def _runs(self, offset_bytes: int, end: int, count: int) -> list[tuple[int, int, bool]]:
        """At least so many of the first runs of a range that is not empty, if it has them."""
        try:
            return space.runs(self._fd, offset_bytes, end, count)
        except OSError as error:
            raise self._failed(error, "look for holes", offset_bytes) from error

    def close(self) -> None:
        """See `ReadStore.close`."""
        self._transfer.close()
        with translated(self._path, "close"):
            if self.uncached is not None:
                self.uncached.close()
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
