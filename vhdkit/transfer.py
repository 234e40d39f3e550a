# SPDX-License-Identifier: Apache-2.0
"""How bytes are moved from one file to another: shared, copied by a file server, or copied through memory.

Decides which of the three ways a range takes. Must not know what the bytes mean. Errors leave this module as OSError;
`store` translates them.

    pages at the same place within a page  --> FICLONERANGE      where the file system can share: no data moves
    files on a server                      --> copy_file_range   the server copies: no data travels
    everything else                        --> preadv, pwrite    through a buffer that stays in the processor's cache

Measured: between two local files `copy_file_range` splices page by page and takes 1.3 to 1.6 times as long as the
buffer (ext4, tmpfs; Linux 6.18). Small ranges are not shared: cloning them costs more than copying.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import struct

from vhdkit.space import file_system, is_quicker_reserved, reserve_inside
from vhdkit.units import KIB, PAGE_SIZE, round_down, round_up
from vhdkit.write_behind import WriteBehind

BUFFER_BYTES = 256 * KIB  # for longer writes Linux looks for contiguous memory: see `unnamed`
_MIN_RESERVED_BYTES = 256 * KIB  # a range of this size is worth another call to the kernel
MIN_SHARED_BYTES = 64 * KIB
_FICLONERANGE = 0x4020940D
_CLONE_RANGE = struct.Struct("=qQQQ")  # struct file_clone_range: source, its offset, length, offset here
_CANNOT_SHARE = {errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EXDEV, errno.EBADF, errno.ETXTBSY, errno.EPERM}
_NO_KERNEL_COPY = {*_CANNOT_SHARE, errno.EINVAL}
# Magic numbers of statfs(2) for file systems that may copy without moving data here: NFS, SMB (two), Ceph, FUSE.
_KEPT_ELSEWHERE = {0x6969, 0xFE534D42, 0xFF534D42, 0x00C36400, 0x65735546}
# And for those that can share space between files: XFS, Btrfs, OCFS2, bcachefs, ZFS.
_SHARING = {0x58465342, 0x9123683E, 0x7461636F, 0xCA451A4E, 0x2FC12FC1}


class Transfer:
    """Copies into one open file, whose descriptor remains the caller's. Used by one thread at a time."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._kept_elsewhere: bool | None = None  # not yet known
        self._not_shared: set[int] = set()  # devices of sources that cannot share space with this file
        self._buffer: memoryview | None = None
        self._reserves: bool | None = None  # not yet known whether writing is quicker then
        self.behind = WriteBehind(fd)  # the device starts writing while more is copied

    def copy(self, source_fd: int, source_offset_bytes: int, offset_bytes: int, size_bytes: int) -> int:
        """Copy a range that does not overlap its source; returns how many bytes of it existed. Raises OSError."""
        head, shared = self._share(source_fd, source_offset_bytes, offset_bytes, size_bytes)
        if not shared:
            return self._move(source_fd, source_offset_bytes, offset_bytes, size_bytes)
        tail = size_bytes - head - shared
        done = self._move(source_fd, source_offset_bytes, offset_bytes, head)
        behind = head + shared
        return done + shared + self._move(source_fd, source_offset_bytes + behind, offset_bytes + behind, tail)

    # -- shared -------------------------------------------------------------------------------------------------

    def _share(self, source_fd: int, source_offset: int, offset: int, size: int) -> tuple[int, int]:
        """Share the whole pages inside the range: (bytes before them, bytes shared, or 0 if that is not possible)."""
        head = round_up(offset, PAGE_SIZE) - offset
        inner = round_down(offset + size, PAGE_SIZE) - offset - head
        if inner < MIN_SHARED_BYTES or (source_offset - offset) % PAGE_SIZE:
            return 0, 0
        is_shared = self._clone(source_fd, source_offset + head, offset + head, inner)
        return (head, inner) if is_shared else (0, 0)

    def _clone(self, source_fd: int, source_offset: int, offset: int, size: int) -> bool:
        device = os.fstat(source_fd).st_dev
        if device in self._not_shared:
            return False
        try:
            fcntl.ioctl(self._fd, _FICLONERANGE, _CLONE_RANGE.pack(source_fd, source_offset, size, offset))
        except OSError as error:
            if error.errno in _CANNOT_SHARE:
                self._not_shared.add(device)
            elif error.errno != errno.EINVAL:  # EINVAL concerns this range: blocks larger than a page, end of file
                raise
            return False
        return True

    def shares_with(self, source_fd: int) -> bool:
        """Whether space can be shared with another open file: tried past the end of this file, then undone.

        Only for a new file, which no other process uses: its size changes meanwhile. Raises OSError.
        """
        size = os.fstat(self._fd).st_size
        if os.fstat(source_fd).st_size < MIN_SHARED_BYTES:
            return False
        try:
            return self._clone(source_fd, 0, round_up(size, MIN_SHARED_BYTES), MIN_SHARED_BYTES)
        finally:
            os.ftruncate(self._fd, size)

    # -- moved --------------------------------------------------------------------------------------------------

    def _move(self, source_fd: int, source_offset: int, offset: int, size: int) -> int:
        done = 0
        if self._kept_elsewhere is None:
            self._kept_elsewhere = kept_elsewhere(self._fd)
        if self._kept_elsewhere:
            done = self._copy_there(source_fd, source_offset, offset, size)
        if size - done >= _MIN_RESERVED_BYTES:
            self._reserve(offset + done, size - done)
        while done < size:
            piece = self._buffered()[: min(size - done, BUFFER_BYTES)]
            got = os.preadv(source_fd, (piece,), source_offset + done)
            if got == 0:
                break
            written = 0
            while written < got:
                written += os.pwrite(self._fd, piece[written:got], offset + done + written)
            done += got
            self.behind.wrote(got)
        return done

    def _reserve(self, offset: int, size: int) -> None:
        """Reserve what is written next, where that is quicker. Only a hint: the write itself reports what is wrong."""
        if self._reserves is None:
            self._reserves = is_quicker_reserved(self._fd)
        if self._reserves:
            with contextlib.suppress(OSError):
                self._reserves = reserve_inside(self._fd, offset, size)

    def _copy_there(self, source_fd: int, source_offset: int, offset: int, size: int) -> int:
        done = 0
        while done < size:
            try:
                got = os.copy_file_range(source_fd, self._fd, size - done, source_offset + done, offset + done)
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
                self._kept_elsewhere = False
                break
            if got == 0:
                break
            done += got
        return done

    def _buffered(self) -> memoryview:
        if self._buffer is None:
            self._buffer = memoryview(mmap.mmap(-1, BUFFER_BYTES))  # on a page boundary
        return self._buffer

    def close(self) -> None:
        """Wait for pending work; call this before closing the descriptor."""
        self.behind.close()


def kept_elsewhere(fd: int) -> bool:
    """True for a file on a server or of a user-space program, which may be able to copy by itself."""
    return file_system(fd) in _KEPT_ELSEWHERE


def may_share(fd: int) -> bool:
    """True for a file on a file system that can share space between files, unless it was made without that."""
    return file_system(fd) in _SHARING
