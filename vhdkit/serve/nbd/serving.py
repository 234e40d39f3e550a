# SPDX-License-Identifier: Apache-2.0
"""One client's transmission phase: which requests are served at once, and which become jobs.

The hot path takes every complete request from one batch of received bytes, serves reads and writes that need not wait
directly from and into shared buffers, and answers with one `send`. Must not know what the other commands do (`export`)
or how they are encoded (`nbd.protocol`).

Payloads reach the disk in pieces as they arrive, and long reads are sent in pieces, so no memory allocation depends on
a size that a client chooses. A client has at most `MAX_JOBS` small jobs and one batch of answers that it has not read.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from vhdkit import errors
from vhdkit.disk import Disk
from vhdkit.serve.nbd.channel import Channel
from vhdkit.serve.nbd.export import HOLE_WORTH_BYTES, PIECE_BYTES, Export, error_number, error_reply
from vhdkit.serve.nbd.host import Host
from vhdkit.serve.nbd.jobs import Job
from vhdkit.serve.nbd.loop import Lane
from vhdkit.serve.nbd.misses import LARGE_BYTES, Misses
from vhdkit.serve.nbd.pieces import LongRead, Payload
from vhdkit.serve.nbd.protocol import Request, Transmission
from vhdkit.serve.nbd.wire import Command, CommandFlag
from vhdkit.units import KIB, MIB, SECTOR_SIZE, round_down

MAX_JOBS = 64  # of one client at once
MAX_JOB_BYTES = 4 * MIB  # of data in one client's jobs
MAX_ALL_JOB_BYTES = 64 * MIB  # in all clients' jobs; beyond that, each client has one job at a time
_LAST_HEADER_BYTES = 64  # the longest header before data
_KEPT_BYTES = 64 * KIB  # payloads up to this size are processed when they are complete
_WORTH_WRITING_BYTES = 16 * KIB  # a longer payload is collected up to this size before each write
_CHANGING = frozenset({Command.WRITE, Command.WRITE_ZEROES, Command.TRIM})
_SLOW = frozenset({Command.BLOCK_STATUS, Command.CACHE})
_READ, _WRITE = int(Command.READ), int(Command.WRITE)
_log = logging.getLogger(__name__)


class Serving:
    """One client's requests. All methods run on the loop's thread."""

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
        """`proceed` is called when a job is done: more can be served, or the connection can end."""
        self.export = export
        self.ended = False  # the client sent DISC
        self.jobs = 0
        self.queues: dict[Lane, deque[Job]] = {}
        self._job_bytes = 0
        self._host = host
        self._loop = host.loop
        self._channel = channel
        self._rules = rules
        self._peer = peer
        self._proceed = proceed
        self._late: list[bytes | bytearray] = []  # answers that wait for the end of a long read
        self._payload: Payload | None = None
        self._long_read: LongRead | None = None
        self.misses = Misses(self, host, channel, rules, proceed)
        self._waiting = False  # for a job that must finish before anything more can be served

    def blocked(self) -> bool:
        """True while no further requests are accepted."""
        return bool(
            self._channel.unsent
            or self.misses.is_full()
            or self._waiting
            or self.ended
            or self.jobs >= MAX_JOBS
            or self._job_bytes >= MAX_JOB_BYTES
            or (self.jobs and self._host.job_bytes >= MAX_ALL_JOB_BYTES)
            or self._long_read is not None
            or self.export.held
        )

    def may_answer(self) -> bool:
        """See `misses.Reader`."""
        return not (self._channel.unsent or self.export.held or self._long_read or self._channel.is_closed())

    def step(self) -> bool:
        """Continue a long read; False if there is none, or it cannot continue now."""
        if self._long_read is None or self._channel.unsent or self._waiting or self.export.held:
            return False
        self._continue_long_read(self._long_read)
        return True

    def serve(self, buffer: memoryview, end: int) -> int:
        """Serve requests before `end`; returns where the unserved input begins."""
        position = 0
        if self._payload is not None:
            position = self._take_payload(buffer, 0, end)
        while not self._must_wait():
            position = self._serve_usual(buffer, position, end)
            if self._channel.unsent or self.misses.is_full():
                break
            request = self._rules.next_request(buffer, position, end)
            if request is None:
                break
            if position + self._rules.request_size + min(request.payload_bytes, _KEPT_BYTES) > end:
                break  # keep it until it is complete, or until there is enough of it to write in pieces
            if self.export.bulk and self._is_common_write(request):
                self._wait_for_bulk()
                break
            position = self._begin(request, buffer, position + self._rules.request_size, end)
            if self._payload is not None:
                position = self._take_payload(buffer, position, end)
        self.misses.serve()
        return position

    def _serve_usual(self, buffer: memoryview, position: int, end: int) -> int:
        """The hot path: plain reads and writes that need no waiting. Returns where the first other request begins."""
        rules, disk = self._rules, self.export.disk
        unpack, magic, request_size, size_bytes = rules.unpack, rules.magic, rules.request_size, rules.size_bytes
        try_read, try_write, has_holes = disk.try_read_flat, disk.try_write_flat, disk.has_known_holes
        put_read_header, put_done, write_flags = rules.put_read_header, rules.put_done, rules.write_flags
        header_size, hole_worth = rules.read_header_size, HOLE_WORTH_BYTES if rules.structured else PIECE_BYTES + 1
        replies, room = self._host.replies, len(self._host.replies) - _LAST_HEADER_BYTES
        misses, marks, try_large = self.misses, self.misses.marks, self.misses.try_large
        began, filled, served = time.perf_counter_ns(), 0, 0
        try:
            while end - position >= request_size:
                found, flags, command, cookie, offset, length = unpack(buffer, position)
                if found != magic or not 0 < length <= PIECE_BYTES or offset + length > size_bytes:
                    break
                if command == _READ and flags == 0:
                    start = filled + header_size
                    stop = start + length
                    if stop > room:
                        self._channel.send(replies[:filled])
                        filled = 0
                        if self._channel.unsent:
                            break
                        continue
                    if offset in marks:
                        misses.read_ahead(offset, length)
                    if length >= hole_worth and has_holes(offset, length):
                        break
                    if not (try_large if length > LARGE_BYTES and misses.cold else try_read)(
                        offset, replies[start:stop]
                    ):
                        if misses.is_full():
                            break
                        misses.add(disk, cookie, offset, length, began)
                        position += request_size
                        continue
                    put_read_header(replies, filled, cookie, offset, length)
                    filled = stop
                    position += request_size
                elif command == _WRITE and flags == write_flags:
                    start = position + request_size
                    stop = start + length
                    if stop > end or filled > room or not try_write(offset, buffer[start:stop]):
                        break
                    filled += put_done(replies, filled, cookie, offset)
                    position = stop
                else:
                    break
                served += 1
        except errors.VhdkitError as problem:  # the request is repeated as a job, which reports the error
            _log.debug("%s: %s", self._peer, problem)
        self._channel.send(replies[:filled])
        if served:
            self._host.stats.served(self, served, began)
            self._loop.relaxed = served > 1 or filled > _KEPT_BYTES
        return position

    def _is_common_write(self, request: Request) -> bool:
        """True for a write that only a writer at work can have kept from being served at once."""
        return (
            request.command == Command.WRITE
            and not request.error
            and request.payload_bytes <= _KEPT_BYTES
            and not (request.offset | request.length) % self.export.disk.unit_bytes
        )

    def _wait_for_bulk(self) -> None:
        """Let our input wait for the end of a slice that has the disk's lock, which takes about a millisecond.

        As a job, a write would wait longer: for the interpreter, and it would then have the lock in turn.
        """
        self._waiting = True
        self.export.after_bulk.append(self._bulk_ended)

    def _bulk_ended(self) -> None:
        self._waiting = False
        self._proceed()

    def _must_wait(self) -> bool:
        """True if the next request cannot be examined yet."""
        return self._payload is not None or self.blocked()

    def _begin(self, request: Request, buffer: memoryview, start: int, end: int) -> int:
        """Start a request that is not served at once; returns where the next one begins."""
        rules = self._rules
        if request.command == Command.DISC:  # row 31
            self.ended = True
            return end
        stop = start + request.payload_bytes
        if request.payload_bytes > _KEPT_BYTES:
            self._payload = Payload(request)
            return start
        if request.error:
            self._channel.send(rules.error(request, request.error))
        elif request.command == Command.READ and request.length > PIECE_BYTES:
            self._long_read = LongRead(request)
            if not rules.structured:
                self._channel.send(rules.begin_simple_read(request))
        elif request.command == Command.FLUSH:
            self._flush_then(rules.done(request), request)
        else:
            self.submit(request, bytes(buffer[start:stop]) if request.payload_bytes else None)
        return stop

    # -- jobs ---------------------------------------------------------------------------------------------------

    def submit(self, request: Request, payload: bytes | None, after: Callable[[], None] | None = None) -> None:
        """Let a worker execute it, then answer; with FUA, when it is durable (row 31). `after` precedes the answer."""
        rules, size = self._rules, request.length if request.command in (Command.READ, Command.WRITE) else 0
        if request.command in _SLOW:
            size = MAX_JOB_BYTES // 2  # so that each client has at most two of them at once
        self._job_begins(size)
        began = time.perf_counter_ns()

        def done(answer: bytes | bytearray | BaseException) -> None:
            self._host.stats.batch(1, time.perf_counter_ns() - began)
            if isinstance(answer, BaseException):
                self._log_failure(request, answer)
                answer = error_reply(rules, request, answer)
            elif request.flags & CommandFlag.FUA and request.command in _CHANGING:
                self._flush_then(answer, request)
                self._job_ends(size)
                return
            self._job_ends(size)
            if after is not None:
                after()
            self._answer(answer)

        lane, work = self.export.work_of(rules, request, payload)
        takes_lock = request.command in (Command.WRITE_ZEROES, Command.TRIM)
        self._host.jobs.add(self, work, done, lane, must_run=request.command == Command.WRITE, takes_lock=takes_lock)

    def run_beside(self, work: Callable[[Disk], object], done: Callable[[], None]) -> None:
        """See `misses.Reader`."""
        self._job_begins()

        def ended(result: object) -> None:
            self._job_ends()
            done()
            self._proceed()

        self._host.jobs.add(self, lambda: (work(self.export.disk), True), ended, must_run=False)

    def _flush_then(self, answer: bytes | bytearray, request: Request) -> None:
        """Send `answer` when everything written so far is durable."""
        rules, export = self._rules, self.export
        self._job_begins()
        export.jobs += 1
        began = time.perf_counter_ns()

        def done(failure: BaseException | None) -> None:
            self._job_ends()
            export.jobs -= 1
            if export.held and not export.jobs:
                self._host.drained(export)
            if request.command == Command.FLUSH:
                self._host.stats.batch(1, time.perf_counter_ns() - began)
            if failure is not None:
                self._log_failure(request, failure)
            self._answer(answer if failure is None else error_reply(rules, request, failure))

        export.flush(self._loop, done)

    def _job_begins(self, size_bytes: int = 0) -> None:
        self._job_bytes += size_bytes
        self._host.job_bytes += size_bytes
        self.jobs += 1

    def _job_ends(self, size_bytes: int = 0) -> None:
        self._job_bytes -= size_bytes
        self._host.job_bytes -= size_bytes
        self.jobs -= 1

    def is_gone(self) -> bool:
        """True when the client has been disconnected."""
        return self._channel.is_closed()

    def _answer(self, answer: bytes | bytearray) -> None:
        """Send an answer from a job, but never inside the chunk of a long read."""
        if self._channel.is_closed():
            return
        if self._long_read is not None:
            self._late.append(answer)
        else:
            self._channel.send(answer)
        self._proceed()

    # -- payloads that arrive in pieces -------------------------------------------------------------------------

    def _take_payload(self, buffer: memoryview, position: int, end: int) -> int:
        """Process the received part of the payload; returns where the rest begins."""
        payload = self._payload
        assert payload is not None
        request = payload.request
        size = min(payload.left, end - position)
        if request.error:  # row 25: drained
            payload.left -= size
        else:
            if size < payload.left:  # in whole pages: one written in two parts is read first, or waits for the device
                size = round_down(payload.offset + size, _KEPT_BYTES) - payload.offset
                if size < min(payload.left, _WORTH_WRITING_BYTES):
                    return position
            size = min(size, PIECE_BYTES)
            if not self._write_piece(payload, buffer[position : position + size]):
                return position
        if not payload.left and not self._waiting:
            self._end_payload(payload)
        return position + size

    def _write_piece(self, payload: Payload, piece: memoryview) -> bool:
        """Write at once or in a job; False if the piece must be kept until a slice that has the lock ends."""
        export = self.export
        offset = payload.offset
        problem = None
        try:
            is_done = export.disk.try_write_flat(offset, piece)
        except errors.VhdkitError as error:
            is_done, problem = True, error
        if not is_done and export.bulk and not (offset | len(piece)) % export.disk.unit_bytes:
            self._wait_for_bulk()
            return False
        payload.offset += len(piece)
        payload.left -= len(piece)
        if problem is not None:
            self._fail_payload(payload, problem)
        if is_done:
            self._loop.relaxed = True
            return True
        data = bytes(piece)
        self._waiting = True
        self._job_begins()

        def done(result: object) -> None:
            self._waiting = False
            if isinstance(result, BaseException):
                self._fail_payload(payload, result)
            if not payload.left:
                self._end_payload(payload)
            self._job_ends()
            self._proceed()

        def write() -> bool:
            export.disk.write(offset, data)
            return True

        self._host.jobs.add(self, write, done)
        return True

    def _fail_payload(self, payload: Payload, problem: BaseException) -> None:
        """Drain the rest; the answer is the first error."""
        self._log_failure(payload.request, problem)
        payload.request = payload.request._replace(error=error_number(problem))

    def _end_payload(self, payload: Payload) -> None:
        rules, request = self._rules, payload.request
        self._payload = None
        if self._channel.is_closed():
            return
        self._host.stats.batch(1, time.perf_counter_ns() - payload.began)
        if request.error:
            self._channel.send(rules.error(request, request.error))
        elif request.flags & CommandFlag.FUA:
            self._flush_then(rules.done(request), request)
        else:
            self._channel.send(rules.done(request))

    # -- long reads ---------------------------------------------------------------------------------------------

    def _continue_long_read(self, reading: LongRead) -> None:
        """Send the next piece: at once if that needs no waiting, otherwise when a worker has read it."""
        rules, export = self._rules, self.export
        request, offset = reading.request, reading.offset
        if offset == reading.end:
            self._end_long_read(rules.done(request) if rules.structured else b"")
            return
        size = min(reading.end - offset, PIECE_BYTES)
        self.misses.read_ahead(offset, size)
        reading.offset += size
        head = rules.data_chunk(request, offset, size) if rules.structured else b""
        reply = self._host.replies[: len(head) + size]
        try:
            has_holes = rules.structured and export.disk.has_known_holes(offset, size)
            if not has_holes and export.disk.try_read_flat(offset, reply[len(head) :]):
                reply[: len(head)] = head
                self._channel.send(reply)
                return
        except errors.VhdkitError as problem:
            self._fail_long_read(request, problem)
            return
        self._waiting = True
        self._job_begins()

        def done(result: bytes | BaseException) -> None:
            self._job_ends()
            self._waiting = False
            if isinstance(result, BaseException):
                self._fail_long_read(request, result)
            else:
                self._channel.send(result)
            self._proceed()

        lane = Lane.PARTS if (offset | size) % SECTOR_SIZE else Lane.WORK
        self._host.jobs.add(
            self, lambda: export.run_read_piece(rules, request, offset, size), done, lane, must_run=False
        )

    def _fail_long_read(self, request: Request, problem: BaseException) -> None:
        """Rows 33 and 34: no chunk is cut short, and a simple reply that promised success ends the connection."""
        rules = self._rules
        self._log_failure(request, problem)
        if rules.structured:
            self._end_long_read(error_reply(rules, request, problem))
        else:
            self._channel.close()

    def _end_long_read(self, last: bytes) -> None:
        if self._long_read is not None:
            self._host.stats.batch(1, time.perf_counter_ns() - self._long_read.began)
        self._long_read = None
        self._channel.send(last)
        late, self._late = self._late, []
        for answer in late:
            self._channel.send(answer)

    def _log_failure(self, request: Request, problem: BaseException) -> None:
        self._host.stats.errors += 1
        name = Command(request.command).name if request.command in list(Command) else str(request.command)
        _log.warning("%s: %s of %d bytes at byte %d: %s", self._peer, name, request.length, request.offset, problem)
