# SPDX-License-Identifier: Apache-2.0
"""A range of a disk as a file: the semantics of reading, writing, seeking and punching holes in it.

Decides the errno of operations that a file of fixed size cannot support, how many of its bytes count as allocated, and
when the disk of an older layer is opened. Must not know FUSE, names or mounts.

    read, write     inside the range; a write that extends past the end is short, one that begins there gets ENOSPC,
                    as on a block device
    zero            both modes of `fallocate` that we support make zeros, which hide the parents' data
    seek            the chain's extents, and the holes in its files
    close           everything written is on the device when the file is closed, since the server may be killed
"""

from __future__ import annotations

import errno
import threading
import time
from collections import OrderedDict
from typing import Protocol

from vhdkit.chain.engine.chain import Chain
from vhdkit.disk import Disk
from vhdkit.image import ExtentKind
from vhdkit.units import MIB

SEEK_DATA, SEEK_HOLE = 3, 4  # of lseek(2) on Linux
FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE = 0x01, 0x02, 0x10  # of fallocate(2)
MAX_OPEN_LAYERS = 8  # maps of older layers that are kept: for a large disk, one can take 40 MiB
MAX_COUNTED_BLOCKS = 1 << 10  # of a disk whose bytes are counted exactly: each block may cost a read of its bitmap
_COUNT_RARELY = 20  # while the disk is being written to, wait this multiple of the last count's duration
_MAX_ZERO_BYTES = 64 * MIB  # in one step, so that other writers get their turn


class Source(Protocol):
    """The source of a view's bytes."""

    written_ns: int  # when it, or the image, was last written to
    changes: int  # number of writes while mounted

    def disk(self) -> Disk:
        """The disk, which stays open as long as it is referenced."""
        ...


class LiveSource:
    """The mounted disk, including what is written to it."""

    def __init__(self, disk: Disk, written_ns: int) -> None:
        self._disk = disk
        self.written_ns = written_ns
        self.changes = 0

    def disk(self) -> Disk:
        """See `Source`."""
        return self._disk

    def touch(self) -> None:
        """Record a write."""
        self.changes += 1
        self.written_ns = time.time_ns()


class LayerDisks:
    """The disk as of each layer of a chain, leaf first: opened on first use, over files that are open already.

    A few that were used last are kept. None is ever closed: the files belong to the mounted chain.
    """

    def __init__(self, chain: Chain) -> None:
        self._layers = chain.layers
        self._kept: OrderedDict[int, Disk] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, index: int) -> Disk:
        """The disk that begins at that layer; read-only. Raises IoFailed, CorruptImage."""
        with self._lock:
            disk = self._kept.pop(index, None)
            if disk is None:
                disk = Disk(Chain(self._layers[index:]))
            self._kept[index] = disk
            while len(self._kept) > MAX_OPEN_LAYERS:
                self._kept.popitem(last=False)
            return disk


class LayerSource:
    """The disk as of one layer."""

    def __init__(self, disks: LayerDisks, index: int, written_ns: int) -> None:
        self._disks, self._index = disks, index
        self.written_ns = written_ns
        self.changes = 0

    def disk(self) -> Disk:
        """See `Source`."""
        return self._disks.get(self._index)


class View:
    """A file: `size_bytes` bytes of a disk from `offset_bytes` on. Only a view of a `LiveSource` can be `writable`."""

    def __init__(
        self, source: Source, size_bytes: int, *, offset_bytes: int = 0, writable: bool = False, settled: bool = False
    ) -> None:
        """`settled`: its content cannot change while mounted, so the kernel may cache it."""
        self.source = source
        self.offset_bytes = offset_bytes
        self.size_bytes = size_bytes
        self.writable = writable
        self.settled = settled
        self._counted = -1
        self._counted_at = -1  # number of changes
        self._count_again = 0.0

    def open(self, *, write: bool) -> Handle:
        """An open file. Raises PermissionError (EACCES) for writing to a read-only view, and what opening raises."""
        if write and not self.writable:
            raise PermissionError(errno.EACCES, "is read-only")
        return Handle(self, self.source.disk(), writable=write)

    def allocated_bytes(self) -> int:
        """How many bytes are allocated: those of its blocks if the disk has many pieces, else exactly its data."""
        now = time.monotonic()
        if self._counted < 0 or (self._counted_at != self.source.changes and now >= self._count_again):
            changes = self.source.changes
            self._counted = count_allocated(self.source.disk(), self.offset_bytes, self.size_bytes)
            self._counted_at = changes
            self._count_again = now + _COUNT_RARELY * (time.monotonic() - now)
        return self._counted

    def truncate(self, size_bytes: int) -> None:
        """Do nothing if it has that size; else raise EPERM, as ftruncate(2) specifies for such file systems."""
        if size_bytes != self.size_bytes:
            raise OSError(errno.EPERM, "a disk has a fixed size")


def count_allocated(disk: Disk, offset_bytes: int, size_bytes: int) -> int:
    """The bytes of a range for which some layer holds data."""
    if size_bytes == 0:
        return 0
    blocks = [size for _, size, is_hole in disk.known_holes(offset_bytes, size_bytes) if not is_hole]
    if sum(blocks) > MAX_COUNTED_BLOCKS * disk.chain.map.grain_bytes:
        return sum(blocks)
    runs = disk.extents(offset_bytes, size_bytes, find_holes=True)
    return min(sum(run.size_bytes for run in runs if run.kind is ExtentKind.DATA), size_bytes)


class Handle:
    """An open file. Offsets count from the start of the view. Usable from any thread."""

    __slots__ = ("_base", "_disk", "_read", "_size", "_unflushed", "node", "settled", "writable")

    def __init__(self, view: View, disk: Disk, *, writable: bool) -> None:
        self.node = view
        self._disk = disk
        self._base = view.offset_bytes
        self._size = view.size_bytes
        self._read = disk.read_into
        self._unflushed = False
        self.writable = writable
        self.settled = view.settled

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer`; returns the number of bytes, fewer than requested only at the end. Raises IoFailed."""
        size = len(buffer)
        if offset + size > self._size:
            size = max(self._size - offset, 0)
            if size == 0:
                return 0
            buffer = buffer[:size]
        self._read(self._base + offset, buffer)
        return size

    def write(self, offset: int, data: memoryview) -> int:
        """Write the part inside the view. Raises OSError (EBADF, ENOSPC), NoSpace, IoFailed, SyncFailed."""
        self._check_writable()
        size = len(data)
        if offset + size > self._size:
            size = self._size - offset
            if size <= 0:
                raise OSError(errno.ENOSPC, "the range ends past the end of the disk")
            data = data[:size]
        try:
            self._disk.write(self._base + offset, data)
        finally:
            self._touch()
        return size

    def zero(self, mode: int, offset: int, size: int) -> None:
        """`fallocate`: punch a hole or zero a range. Raises OSError (EOPNOTSUPP, ENOSPC, EBADF), and as `write`."""
        self._check_writable()
        if mode not in (
            FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE,
            FALLOC_ZERO_RANGE,
            FALLOC_ZERO_RANGE | FALLOC_KEEP_SIZE,
        ):
            raise OSError(errno.EOPNOTSUPP, "this mode of fallocate is not supported")
        end = offset + size
        if end > self._size and not mode & FALLOC_KEEP_SIZE:
            raise OSError(errno.ENOSPC, "the range ends past the end of the disk")
        try:
            for start in range(offset, min(end, self._size), _MAX_ZERO_BYTES):
                piece = min(_MAX_ZERO_BYTES, min(end, self._size) - start)
                self._disk.write_zeroes(self._base + start, piece)
        finally:
            self._touch()

    def seek(self, offset: int, whence: int) -> int:
        """The offset of the next data or hole. Raises OSError (ENXIO, EINVAL), IoFailed."""
        if whence not in (SEEK_DATA, SEEK_HOLE):
            raise OSError(errno.EINVAL, "this kind of seek is not supported")
        if not 0 <= offset < self._size:
            raise OSError(errno.ENXIO, "past the end")
        first = self._base + offset
        for extent in self._disk.extents(first, self._size - offset, find_holes=True):
            if (extent.kind is ExtentKind.DATA) == (whence == SEEK_DATA):
                return max(extent.offset_bytes, first) - self._base
        if whence == SEEK_DATA:
            raise OSError(errno.ENXIO, "only a hole up to the end")
        return self._size

    def flush(self) -> None:
        """Return when everything written is on the device. Raises SyncFailed, NoSpace, IoFailed."""
        if self._disk.writable:
            self._unflushed = False
            try:
                self._disk.flush()
            except BaseException:
                self._unflushed = True  # so that the next close reports it, too
                raise

    def closing(self) -> None:
        """A descriptor of the file is closed: `flush` if something was written through this handle."""
        if self._unflushed:
            self.flush()

    def truncate(self, size_bytes: int) -> None:
        """See `View.truncate`."""
        self.node.truncate(size_bytes)

    def _check_writable(self) -> None:
        if not self.writable:
            raise OSError(errno.EBADF, "was not opened for writing")

    def _touch(self) -> None:
        source = self.node.source
        assert isinstance(source, LiveSource)
        source.touch()
        self._unflushed = True  # set after the write: a flush that began during it does not cover it
