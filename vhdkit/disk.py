# SPDX-License-Identifier: Apache-2.0
"""The handle that a front end holds: a disk addressed by bytes.

Decides the range check, read-only, and the handling of partial sectors: an unaligned write reads its edge sectors,
changes them and writes them back, under the lock that all writes share. A leaf with larger sectors
(`Layer.sector_bytes`) is written in units of those. Nothing below sees a partial sector. Must not know how many layers
there are or their formats.

    any thread:  read_into, read, extents     no lock
    any thread:  write, write_zeroes, trim    one at a time
    any thread:  flush                        concurrently; covers every write that returned before it began
    any thread:  close                        waits for calls in progress; later calls raise DiskClosed

`INV-FLAT-BUFFERS`: a buffer of any shape, format and strides is treated as its bytes (those of `bytes(buffer)`), or
refused. The layers below see only contiguous one-dimensional byte buffers.

After a fork the disk belongs to the parent: the child's object refuses every call (`descriptor`). A signal handler
must not use the disk: it raises an exception, and the code that catches it closes the disk.
"""

from __future__ import annotations

import io
import sys
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator
from typing import Self

from vhdkit import errors
from vhdkit.arguments import AnyPath, Size, byte_size, checked, flag
from vhdkit.buffers import flat
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.records import pending
from vhdkit.chain.verbs.merge_recovery import open_settled
from vhdkit.descriptor import when_forked
from vhdkit.finding import Finding
from vhdkit.image import Extent, KnownRun
from vhdkit.parts import ReadSectors, read_parts, units_at_edges, write_parts
from vhdkit.store import Buffer
from vhdkit.units import KIB, SECTOR_MASK, SECTOR_SIZE, covering_sectors, edges, round_down, round_up, whole_sectors

_LARGE_READ_BYTES = 256 * KIB  # from this size on, a second copy of the data costs more than avoiding it
# How long `try_write` waits for another writer. One that only needs the interpreter to finish is not worth a thread
# switch, and as each such switch delays the next write, too, one would follow the other.
_BRIEF_SECONDS = 0.0001
_disks: weakref.WeakSet[Disk] = weakref.WeakSet()


class _WriteLock:
    """A lock that knows whether this thread holds it: an exception may arrive right after the lock is taken."""

    def __init__(self) -> None:
        lock = threading.RLock()
        self.acquire = lock.acquire
        self.release = lock.release
        self.is_mine: Callable[[], bool] = lock._is_owned  # type: ignore[attr-defined]  # as threading.Condition does
        self.lock = lock


class Disk:
    """An open disk. Close it, or use it in a `with` block: closing flushes.

    If it is garbage-collected without having been closed, its files and locks are released, with a
    ResourceWarning; writes since the last flush are lost, as in a power cut.
    """

    def __init__(self, chain: Chain) -> None:
        """Take over an open chain. Callers normally use `open_disk`."""
        self.chain = chain
        self.size_bytes = chain.size_bytes
        self.writable = chain.writable
        self.unit_bytes = chain.leaf.sector_bytes  # of writes; reads are whole sectors of 512 bytes everywhere
        self._unit_mask = self.unit_bytes - 1
        self._read_sectors = chain.read_into
        self._try_read_sectors = chain.try_read_into
        self._write_in_place = chain.write_in_place
        self._flush_is_due = chain.leaf.flush_is_due
        file = pending.file_of(chain.leaf.store)
        self._sweeper = None if file is None or file.uncached is None else file.uncached.sweeper
        self._write_lock = _WriteLock()
        self._closed = False
        self._left_by_fork = False
        self._lost: errors.VhdkitError | None = None  # what an interrupted `close` could not make durable
        _disks.add(self)

    @property
    def path(self) -> str:
        """The path by which the leaf was opened."""
        return self.chain.leaf.store.name

    def read(self, offset_bytes: Size, size_bytes: Size) -> bytes:
        """`size_bytes` bytes from `offset_bytes`. Raises OutOfRange, IoFailed, InvalidArgument."""
        if type(offset_bytes) is not int or type(size_bytes) is not int:
            offset_bytes, size_bytes = byte_size("offset_bytes", offset_bytes), byte_size("size_bytes", size_bytes)
        self._check_range(offset_bytes, size_bytes)
        if size_bytes < _LARGE_READ_BYTES:
            buffer = bytearray(size_bytes)
            self.read_into(offset_bytes, buffer)
            return bytes(buffer)
        # A BytesIO hands out its buffer without a copy, so the read needs its own size in memory, not twice that.
        room = io.BytesIO()
        room.seek(size_bytes - 1)
        room.write(b"\0")
        with room.getbuffer() as view:
            self.read_into(offset_bytes, view)
        return room.getvalue()

    def read_into(self, offset_bytes: Size, buffer: bytearray | memoryview) -> None:
        """Fill the writable, contiguous `buffer` from `offset_bytes`. Raises OutOfRange, IoFailed, InvalidArgument."""
        if type(buffer) is bytearray:
            view = memoryview(buffer)
        elif (
            type(buffer) is memoryview
            and buffer.format == "B"
            and buffer.ndim == 1
            and buffer.c_contiguous
            and not buffer.readonly
        ):
            view = buffer
        else:
            view = flat(buffer, writable=True)
        size = len(view)
        if type(offset_bytes) is not int:
            offset_bytes = byte_size("offset_bytes", offset_bytes)
        if offset_bytes < 0 or offset_bytes + size > self.size_bytes or self._closed:
            self._check_range(offset_bytes, size)
        if (offset_bytes | size) & SECTOR_MASK:
            read_parts(self._read_sectors, offset_bytes, view)
        elif size:
            self._read_sectors(offset_bytes // SECTOR_SIZE, view)

    def try_read_into(self, offset_bytes: int, buffer: memoryview) -> bool:
        """Like `read_into`, if it need not wait for a device; otherwise returns False and leaves `buffer` undefined.

        Raises OutOfRange, IoFailed, InvalidArgument.
        """
        return self.try_read_flat(offset_bytes, flat(buffer, writable=True))

    def try_read_flat(self, offset_bytes: int, buffer: memoryview) -> bool:
        """`try_read_into` for performance-critical callers that pass a contiguous byte buffer."""
        if not (offset_bytes | len(buffer)) & SECTOR_MASK:
            return self.try_read_whole(offset_bytes, buffer)
        self._check_range(offset_bytes, len(buffer))
        return read_parts(self._try_read_sectors, offset_bytes, buffer)

    def try_read_whole(self, offset_bytes: int, buffer: memoryview) -> bool:
        """As `try_read_flat`, but False also where a part of a sector would be read, which costs more."""
        size = len(buffer)
        if offset_bytes < 0 or offset_bytes + size > self.size_bytes or self._closed:
            self._check_range(offset_bytes, size)
        if (offset_bytes | size) & SECTOR_MASK:
            return False
        return self._try_read_sectors(offset_bytes // SECTOR_SIZE, buffer)

    def is_settled(self, offset_bytes: int, size_bytes: int) -> bool:
        """True if it is known which files hold the range, which lies inside the disk; reads nothing."""
        first = offset_bytes // SECTOR_SIZE
        return self.chain.is_settled(first, covering_sectors(offset_bytes + size_bytes) - first)

    def prefetch(self, offset_bytes: Size, size_bytes: Size) -> bool:
        """Ask for a range to be read ahead, without waiting. False: `settle`, then call it again. Raises as `read`."""
        return self.chain.prefetch(*self._sectors_over(offset_bytes, size_bytes))

    def settle(self, offset_bytes: Size, size_bytes: Size) -> None:
        """Find out which files hold a range, as its first read would; may wait. Raises OutOfRange, IoFailed."""
        self.chain.settle(*self._sectors_over(offset_bytes, size_bytes))

    def _sectors_over(self, offset_bytes: Size, size_bytes: Size) -> tuple[int, int]:
        offset_bytes, size_bytes = byte_size("offset_bytes", offset_bytes), byte_size("size_bytes", size_bytes)
        self._check_range(offset_bytes, size_bytes)
        first = offset_bytes // SECTOR_SIZE
        return first, covering_sectors(offset_bytes + size_bytes) - first

    def write(self, offset_bytes: Size, data: Buffer, *, fua: bool = False) -> None:
        """Write `data` at `offset_bytes`; with `fua` it is on the device when this returns.

        Raises OutOfRange, ReadOnly, NoSpace, IoFailed, SyncFailed, InvalidArgument. After NoSpace the range may be
        partly written.
        """
        if type(data) is bytes or type(data) is bytearray:
            view = memoryview(data)
        elif type(data) is memoryview and data.format == "B" and data.ndim == 1 and data.c_contiguous:
            view = data
        else:
            view = flat(data)
        if type(offset_bytes) is not int:
            offset_bytes = byte_size("offset_bytes", offset_bytes)
        if fua is not False:
            flag("fua", fua)
        size, lock = len(view), self._write_lock
        if not self.writable or self._closed or offset_bytes < 0 or offset_bytes + size > self.size_bytes:
            self._check_write(offset_bytes, size)
        if lock.is_mine():
            self._refuse_reentry()
        with lock.lock:
            if (offset_bytes | size) & self._unit_mask:
                self._write_parts(offset_bytes, view, self._read_sectors)
            elif size and not self._write_in_place(offset_bytes // SECTOR_SIZE, view):
                self.chain.write(offset_bytes // SECTOR_SIZE, view)
        if fua:
            self.chain.flush()

    def try_write(self, offset_bytes: int, data: memoryview) -> bool:
        """Like `write` of whole sectors; returns False, having done nothing, if it would wait for a writer or flush.

        It does wait for a writer that is done within 0.1 ms. Raises as `write` does.
        """
        return self.try_write_flat(offset_bytes, flat(data))

    def try_write_flat(self, offset_bytes: int, data: memoryview) -> bool:
        """`try_write` for performance-critical callers that pass contiguous bytes."""
        size = len(data)
        if not self.writable or self._closed or offset_bytes < 0 or offset_bytes + size > self.size_bytes:
            self._check_write(offset_bytes, size)
        if (offset_bytes | size) & self._unit_mask:
            return False
        if self._sweeper is not None and self._sweeper.is_behind():
            return False
        lock = self._write_lock
        try:
            if not lock.acquire(False) and not lock.acquire(True, _BRIEF_SECONDS):
                return False
            if not self._write_in_place(offset_bytes // SECTOR_SIZE, data):
                if self._flush_is_due():
                    return False
                self.chain.write(offset_bytes // SECTOR_SIZE, data)
        finally:
            if lock.is_mine():
                lock.release()
        return True

    def try_write_parts(self, offset_bytes: int, data: memoryview) -> bool:
        """`try_write_flat` of any bytes: also False, having done nothing, if the rest of a sector is not in memory."""
        self._check_write(offset_bytes, len(data))
        if self._sweeper is not None and self._sweeper.is_behind():
            return False
        lock = self._write_lock
        try:
            if not lock.acquire(False) or self._flush_is_due():
                return False
            return self._write_parts(offset_bytes, data, self._try_read_sectors)
        finally:
            if lock.is_mine():
                lock.release()

    def _write_parts(self, offset: int, view: memoryview, read: ReadSectors) -> bool:
        units = units_at_edges(read, offset, offset + len(view), self.unit_bytes)
        if units is None:
            return False
        write_parts(self.chain.write, offset, view, units, self.unit_bytes)
        return True

    def write_zeroes(self, offset_bytes: Size, size_bytes: Size, *, fua: bool = False) -> None:
        """Make a range read as zeros, without writing them where possible. Raises as `write` does."""
        offset_bytes, size_bytes = byte_size("offset_bytes", offset_bytes), byte_size("size_bytes", size_bytes)
        flag("fua", fua)
        self._check_write(offset_bytes, size_bytes)
        end, unit = offset_bytes + size_bytes, self.unit_bytes
        with self._write_lock.lock:
            for first, last in edges(offset_bytes, end, unit):
                self._write_parts(first, memoryview(bytes(last - first)), self._read_sectors)
            inner_start, inner_end = round_up(offset_bytes, unit), round_down(end, unit)
            if inner_end > inner_start:
                self.chain.write_zeroes(whole_sectors(inner_start), whole_sectors(inner_end - inner_start))
        if fua:
            self.chain.flush()

    def trim(self, offset_bytes: Size, size_bytes: Size, *, fua: bool = False) -> None:
        """Discard a range: whole sectors that the leaf owns read as zeros afterwards, the rest stays.

        Raises OutOfRange, ReadOnly, IoFailed, SyncFailed, InvalidArgument.
        """
        offset_bytes, size_bytes = byte_size("offset_bytes", offset_bytes), byte_size("size_bytes", size_bytes)
        flag("fua", fua)
        self._check_write(offset_bytes, size_bytes)
        unit = self.unit_bytes
        start, end = round_up(offset_bytes, unit), round_down(offset_bytes + size_bytes, unit)
        with self._write_lock.lock:
            if end > start:
                self.chain.trim(whole_sectors(start), whole_sectors(end - start))
        if fua:
            self.chain.flush()

    def flush(self) -> None:
        """Return when every write that returned before is on the device. Raises SyncFailed, NoSpace, IoFailed."""
        if self._closed:
            raise self._closed_error()
        self._refuse_reentry()
        self.chain.flush()

    def known_holes(self, offset_bytes: int, size_bytes: int) -> list[KnownRun]:
        """The range in parts that are certainly zeros, which no layer owns, and others; reads nothing.

        Coarser than `extents`, and never waits. The range lies inside the disk and is not empty.
        """
        assert size_bytes > 0 and offset_bytes >= 0 and offset_bytes + size_bytes <= self.size_bytes
        first = offset_bytes // SECTOR_SIZE
        end = offset_bytes + size_bytes
        runs = self.chain.known_holes(first, covering_sectors(end) - first)
        clipped = []
        for index, count, is_hole in runs:
            start, stop = max(index * SECTOR_SIZE, offset_bytes), min((index + count) * SECTOR_SIZE, end)
            clipped.append(KnownRun(start, stop - start, is_hole))
        return clipped

    def has_known_holes(self, offset_bytes: int, size_bytes: int) -> bool:
        """True if `known_holes` would find one."""
        first = offset_bytes // SECTOR_SIZE
        return self.chain.has_known_holes(first, covering_sectors(offset_bytes + size_bytes) - first)

    @property
    def layer_ids(self) -> tuple[str | None, ...]:
        """The id of each layer's file as a string, leaf first; None for a raw layer. See `image_id`."""
        ids = (layer.facts.file_id for layer in self.chain.layers)
        return tuple(None if one is None else str(uuid.UUID(bytes=one)) for one in ids)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The findings from opening the images, leaf first, such as a parent written to after its child was made."""
        return tuple(one for layer in self.chain.layers for one in getattr(layer, "findings", ()))

    def zeroes_are_fast(self) -> bool:
        """True if `write_zeroes` releases space instead of writing zeros."""
        return self.chain.leaf.store.punches()

    def extents(
        self, offset_bytes: Size = 0, size_bytes: Size | None = None, *, find_holes: bool = False
    ) -> Iterator[Extent]:
        """The range (by default to the end) as runs of whole sectors that cover it, in order, without gaps.

        Each is DATA or ZERO and says which layer owns it (0 is the leaf, -1 no layer) and where it lies in that file.
        `find_holes` also looks for holes in the files. Raises OutOfRange, IoFailed.
        """
        offset_bytes = byte_size("offset_bytes", offset_bytes)
        size = self.size_bytes - offset_bytes if size_bytes is None else byte_size("size_bytes", size_bytes)
        flag("find_holes", find_holes)
        self._check_range(offset_bytes, size)
        first = offset_bytes // SECTOR_SIZE
        runs = self.chain.extents(first, covering_sectors(offset_bytes + size) - first, find_holes=find_holes)
        return self._while_open(runs)

    def _while_open(self, runs: Iterator[Extent]) -> Iterator[Extent]:
        for extent in runs:
            if self._closed:
                raise self._closed_error()
            yield extent

    def close(self) -> None:
        """Flush and close every file. Raises as `flush` does; the files are closed anyway.

        Closing again is fine, and finishes what an exception from a signal handler interrupted. A flush that such an
        exception interrupted is repeated; if that fails too, SyncFailed is raised.
        """
        if self._left_by_fork:
            return
        self._refuse_reentry()
        with self._write_lock.lock:
            self._closed = True
            failure, self._lost = self._lost, None
            if failure is not None:
                raise failure
            try:
                self.chain.close()
            except errors.VhdkitError:
                raise
            except BaseException:  # from a signal handler: close the rest anyway
                try:
                    self.chain.close()
                except errors.VhdkitError as error:
                    self._lost = error
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        try:
            self.close()
        except errors.VhdkitError as failure:
            if error is None:
                raise
            error.add_note(f"closing the disk failed, too: {failure}")  # without hiding the first error

    # -- what is refused ----------------------------------------------------------------------------------------

    def _closed_error(self) -> errors.DiskClosed:
        file = pending.file_of(self.chain.leaf.store)
        return errors.DiskClosed("the disk is closed", path=self.path) if file is None else file.closed_error()

    def _refuse_reentry(self) -> None:
        """Raise InvalidArgument in a signal handler that interrupted a call of this disk: it would deadlock."""
        frame = sys._getframe(1)
        while frame.f_back is not None:
            frame = frame.f_back
            if frame.f_code in _CHANGING and frame.f_locals.get("self") is self:
                raise errors.InvalidArgument(
                    "a signal handler uses the disk in the middle of a call of the same thread",
                    path=self.path,
                    hint="let the handler raise an exception, and close the disk where it is caught",
                )

    def _leave_to_parent(self) -> None:
        """In a forked process: refuse every call. Locks may be held by threads that do not exist here."""
        self._left_by_fork = self._closed = True
        self._write_lock = _WriteLock()

    def _check_range(self, offset_bytes: int, size_bytes: int) -> None:
        if self._closed:
            raise self._closed_error()
        if offset_bytes < 0 or size_bytes < 0 or offset_bytes + size_bytes > self.size_bytes:
            raise errors.OutOfRange(
                f"{size_bytes} bytes at byte {offset_bytes} are outside a disk of {self.size_bytes} bytes",
                path=self.path,
            )

    def _check_write(self, offset_bytes: int, size_bytes: int) -> None:
        self._check_range(offset_bytes, size_bytes)
        if not self.writable:
            raise errors.ReadOnly("the disk was opened read-only", path=self.path)
        if self._write_lock.is_mine():
            self._refuse_reentry()


_CHANGING = {
    getattr(Disk, name).__code__
    for name in ("write", "write_zeroes", "trim", "try_write_flat", "try_write_parts", "flush", "close")
}


def _forked() -> None:
    for disk in list(_disks):
        disk._leave_to_parent()


when_forked(_forked)


@checked
def open_disk(path: AnyPath, *, writable: bool = False, options: OpenOptions | None = None) -> Disk:
    """Open an image and, if it is differencing, all its parents, as one disk.

    Raises NotFound, AccessDenied, InvalidArgument, UnsupportedFormat, CorruptImage, ImageInUse, HasChildren,
    ParentMissing, ParentMismatch, ParentRefused. On error nothing stays open and nothing was changed; but a writable
    open first finishes an interrupted merge whose data is complete.
    """
    options = options or OpenOptions()
    return Disk(Chain(open_settled(path, options)) if writable else Chain.open(path, options=options))
