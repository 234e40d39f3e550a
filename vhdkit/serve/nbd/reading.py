# SPDX-License-Identifier: Apache-2.0
"""One client's long reads, which are answered in pieces.

Decides how each piece is sent: without a copy (`direct`), copied at once, or by a job if that may wait; and what
follows if a piece cannot be read. Must not know which requests are long reads (`serving`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from vhdkit import errors
from vhdkit.serve.nbd.answering import Answering
from vhdkit.serve.nbd.channel import Channel
from vhdkit.serve.nbd.direct import Direct
from vhdkit.serve.nbd.export import Export, error_reply
from vhdkit.serve.nbd.host import Host
from vhdkit.serve.nbd.jobs import Job
from vhdkit.serve.nbd.loop import Lane
from vhdkit.serve.nbd.misses import Misses
from vhdkit.serve.nbd.pieces import LongRead, whole_part
from vhdkit.serve.nbd.protocol import Request, Transmission
from vhdkit.serve.nbd.wire import Command
from vhdkit.units import SECTOR_SIZE

_READ = int(Command.READ)


class Reading(Answering):
    """The part of `Serving` that sends long reads. All methods run on the loop's thread."""

    misses: Misses

    def __init__(
        self,
        host: Host,
        channel: Channel,
        rules: Transmission,
        export: Export,
        *,
        peer: str,
        proceed: Callable[[], None],
    ) -> None:
        """See `Answering`."""
        super().__init__(host, channel, rules, export, peer=peer, proceed=proceed)
        self.queues: dict[Lane, deque[Job]] = {}
        self._loop = host.loop
        self._memory = host.memory
        self._direct = Direct(host, channel, rules)
        self._waiting = False  # for a job that must finish before anything more can be served

    def _continue_long_read(self, reading: LongRead) -> None:
        """Send the next piece: at once if that needs no waiting, otherwise when a worker has read it."""
        rules, export, limits = self._rules, self.export, self._memory.limits
        request, offset = reading.request, reading.offset
        if offset == reading.end:
            self._end_long_read(rules.done(request) if reading.in_chunks else b"")
            return
        if self._direct.is_possible and self._send_directly(reading):
            return
        is_new = offset == reading.chunk_end  # else the rest of a chunk is due, without a header
        end = reading.end if is_new else reading.chunk_end
        size = whole_part(offset, end, limits.piece_bytes if self._channel.is_secure else limits.offer_bytes)
        head = rules.data_chunk(request, offset, size) if is_new else b""
        reply = self._host.replies[: len(head) + size]
        try:
            has_holes = is_new and export.disk.has_known_holes(offset, size)
            if not has_holes and export.disk.try_read_flat(offset, reply[len(head) :]):
                reply[: len(head)] = head
                reading.chunk_end = max(reading.chunk_end, offset + size)
                to_sector = min(-offset % SECTOR_SIZE, size)  # so that no sector is read in two parts
                reading.offset = offset + self._channel.offer(reply, len(head) + to_sector) - len(head)
                self.misses.read_ahead(offset, max(reading.offset - offset, 1))
                self._host.stats.served(self, 0, reading.began)
                return
        except errors.VhdkitError as problem:
            self._fail_long_read(reading, problem)
            return
        self._read_in_job(reading, is_new, whole_part(offset, offset + size, limits.piece_bytes))

    def _begin_directly(self, cookie: int, offset: int, length: int, before: memoryview) -> bool:
        """Send `before`, then begin a read without a copy in our memory.

        False, and nothing is sent, if it must be copied. If it does not become the long read, its data are sent, and
        the chunk that ends it is left to the caller.
        """
        if not self._direct.is_possible or length < self._direct.least_bytes(time.perf_counter_ns()):
            return False
        reading = LongRead(Request(0, _READ, 0, cookie, offset, length, 0), in_chunks=True)
        if not self._send_directly(reading, before):
            return False
        if reading.offset < reading.end or self._channel.unsent:
            self._long_read = reading
        else:
            self._host.stats.batch(1, time.perf_counter_ns() - reading.began)
        return True

    def _send_directly(self, reading: LongRead, before: memoryview | bytes = b"") -> bool:
        """Send the next part without a copy, after `before`; False, and nothing is sent, if it must be copied."""
        offset = reading.offset
        if not self._direct.send(self.export.disk, reading, before):
            return False
        if offset in self.misses.marks:
            self.misses.read_ahead(offset, max(reading.offset - offset, 1))
        self._loop.relaxed = True
        self._host.stats.served(self, 0, reading.began)
        return True

    def _read_in_job(self, reading: LongRead, is_new: bool, size: int) -> None:
        """Let a worker read the next piece: chunks of their own, or the rest of one."""
        rules, export = self._rules, self.export
        request, offset = reading.request, reading.offset
        self.misses.read_ahead(offset, size)
        self._waiting = True
        self._job_begins(size)

        def done(result: bytes | BaseException) -> None:
            self._job_ends(size)
            self._waiting = False
            if isinstance(result, BaseException):
                self._fail_long_read(reading, result)
            else:
                reading.offset = offset + size
                reading.chunk_end = max(reading.chunk_end, reading.offset)
                self._channel.send(result)
            self._proceed()

        lane = Lane.PARTS if (offset | size) % SECTOR_SIZE else Lane.WORK
        self._host.jobs.add(
            self,
            lambda: export.run_read_piece(rules, request, offset, size, in_chunks=is_new),
            done,
            lane,
            must_run=False,
        )

    def _fail_long_read(self, reading: LongRead, problem: BaseException) -> None:
        """Rows 33 and 34: no chunk is cut short, and an error follows it; where none can, the connection ends."""
        rules, request = self._rules, reading.request
        self._log_failure(request, problem)
        left = reading.chunk_end - reading.offset
        if reading.in_chunks or not left:
            self._channel.send(bytes(left))
            self._end_long_read(error_reply(rules, request, problem))
        else:
            self._channel.close()

    def _end_long_read(self, last: bytes) -> None:
        if self._long_read is not None:
            self._host.stats.batch(1, time.perf_counter_ns() - self._long_read.began)
        self._long_read = None
        self._channel.send(last)
        self._send_late()
