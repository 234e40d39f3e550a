# SPDX-License-Identifier: Apache-2.0
"""Reads whose data go from the page cache to a client's socket without a copy in our memory.

Decides which parts of a read are sent so, and when the header of such a part is sent. Must not know how requests
arrive (`serving`), nor how a file reaches a socket (`sending`).

A part is sent so if it is large, lies together in one file, and is in the page cache when its header is sent. If it is
then found to be missing (the file was cut off, or a page left the cache and cannot be read any more), the rest of the
chunk is copied, or padded and followed by an error chunk. So this is only for clients that take chunks.

The socket refers to the file's pages until the client has received them, so a write that is made before that may show
in the answer, in whole or in part. That is allowed: the read was not answered when the write was requested. Nothing
else can show: a served file gives no space to other sectors (`INV-NO-REUSE`), and a merge of frozen layers overwrites
only what was written over since. Only clients on unix sockets are served so: what waits for a remote one may be sent
long after the server has ended and other programs have changed the image.
"""

from __future__ import annotations

import contextlib

from vhdkit import errors
from vhdkit.disk import Disk
from vhdkit.serve.nbd.channel import Channel
from vhdkit.serve.nbd.export import PIECE_BYTES
from vhdkit.serve.nbd.host import Host
from vhdkit.serve.nbd.pieces import LongRead
from vhdkit.serve.nbd.protocol import Transmission
from vhdkit.serve.nbd.scans import LARGE_BYTES
from vhdkit.units import MIB, SECTOR_SIZE, whole_sectors

_MAX_REFUSALS = 4  # times that nothing is sent of a file although the socket has room: its file system cannot do it
DIRECT_BYTES = MIB // 2  # smaller parts: at 256 KiB it saves no processor time, and a busy machine serves fewer
DIRECT_BESIDE_BYTES = LARGE_BYTES  # while others are served: it is then the client whose time the copy takes


class Direct:
    """One client's reads. All methods run on the loop's thread."""

    def __init__(self, host: Host, channel: Channel, rules: Transmission) -> None:
        self._host = host
        self._channel = channel
        self._rules = rules
        self.is_possible = rules.structured and channel.is_local
        self._refusals = 0  # in a row

    def least_bytes(self, now_ns: int) -> int:
        """From which size on a part is sent so."""
        return DIRECT_BESIDE_BYTES if self._host.scans.has_others(now_ns) else DIRECT_BYTES

    def send(self, disk: Disk, reading: LongRead, before: memoryview | bytes = b"") -> bool:
        """Send `before`, then the next part of a read or the rest of a chunk. Nothing may be unsent.

        False, and nothing is done, if it must be copied. If the socket does not accept all, the rest is for the next
        call, and something is unsent.
        """
        is_new = reading.offset == reading.chunk_end
        end = min(reading.end if is_new else reading.chunk_end, reading.offset + PIECE_BYTES)
        if not (self.is_possible and reading.in_chunks) or (reading.offset | end) % SECTOR_SIZE:
            return False
        try:
            run = disk.chain.file_run(whole_sectors(reading.offset), whole_sectors(end - reading.offset))
            least = self.least_bytes(reading.began) if is_new else 0
            if run is None or run[2] < least or not run[0].can_send(run[1], run[2]):
                return False
        except errors.VhdkitError:  # the disk is closed
            return False
        file, place, size = run
        if is_new:
            self._channel.send(b"".join((before, self._rules.data_chunk(reading.request, reading.offset, size))))
            reading.chunk_end += size
            if self._channel.unsent:
                return True
        sent = 0
        with contextlib.suppress(errors.VhdkitError):  # found again, and reported, when the rest is copied
            sent = self._channel.send_file(file, place, size)
        reading.offset += sent
        is_kept = sent < size and self._keep(disk, reading)
        self._refusals = 0 if sent or self._channel.unsent else self._refusals + 1
        if self._refusals == _MAX_REFUSALS:
            self.is_possible = False
        return is_new or sent > 0 or is_kept

    def _keep(self, disk: Disk, reading: LongRead) -> bool:
        """Copy a sector that the socket does not accept, so that the loop waits until it does; False if that fails."""
        size = min(-reading.offset % SECTOR_SIZE + SECTOR_SIZE, reading.chunk_end - reading.offset)
        room = self._host.replies[:size]
        try:
            if not disk.try_read_flat(reading.offset, room):
                return False
        except errors.VhdkitError:  # found again, and reported, when the rest is copied
            return False
        self._channel.send(room)
        reading.offset += size
        return True
