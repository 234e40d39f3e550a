# SPDX-License-Identifier: Apache-2.0
"""One client's transmission phase: which requests are served at once, and which become jobs.

The hot path takes every complete request from one batch of received bytes, serves reads and writes that need not wait
directly from and into shared buffers, and answers with one `send`. Must not know what the other commands do (`export`)
or how they are encoded (`nbd.protocol`).

Payloads reach the disk in pieces as they arrive, and long reads are sent in pieces, so no memory allocation depends on
a size that a client chooses. How large pieces are, and how much a client may have in jobs, is decided in `memory`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from vhdkit import errors
from vhdkit.disk import Disk
from vhdkit.serve.nbd.channel import Channel
from vhdkit.serve.nbd.export import HOLE_WORTH_BYTES, PIECE_BYTES, Export, error_number, error_reply
from vhdkit.serve.nbd.host import Host
from vhdkit.serve.nbd.memory import MISS_BYTES
from vhdkit.serve.nbd.misses import WAITS, Misses
from vhdkit.serve.nbd.pieces import LongRead, Payload
from vhdkit.serve.nbd.protocol import Request, Transmission
from vhdkit.serve.nbd.reading import Reading
from vhdkit.serve.nbd.scans import LARGE_BYTES, Scan
from vhdkit.serve.nbd.slices import STATUS_RUNS
from vhdkit.serve.nbd.wire import Command, CommandFlag
from vhdkit.units import KIB, SECTOR_MASK, SECTOR_SIZE, round_down

MAX_JOBS = 64  # of one client at once
_LAST_HEADER_BYTES = 64  # the longest header before data
_RELAXING_BYTES = 64 * KIB  # of answers in a batch: its client does not wait for one small answer at a time
_WORTH_WRITING_BYTES = 16 * KIB  # a longer payload is collected up to this size before each write
_CHANGING = frozenset({Command.WRITE, Command.WRITE_ZEROES, Command.TRIM})
_STATUS_BYTES = 16  # of a descriptor, in the answer and while it is collected
_READ, _WRITE = int(Command.READ), int(Command.WRITE)
_log = logging.getLogger(__name__)


class Serving(Reading):
    """One client's requests. All methods run on the loop's thread."""

    def __init__(
        self, host: Host, channel: Channel, rules: Transmission, export: Export,
        *, peer: str, proceed: Callable[[], None],
    ) -> None:  # fmt: skip
        """`proceed` is called when a job is done: more can be served, or the connection can end."""
        super().__init__(host, channel, rules, export, peer=peer, proceed=proceed)
        self.ended = False  # the client sent DISC
        self.payload: Payload | None = None  # written as it arrives
        self.scan = Scan(host.scans)
        self.misses = Misses(self, host, channel, rules, proceed)
        self._replies, self._served = host.replies, host.stats.served
        self._usual = (  # what each batch needs
            *(rules.unpack, rules.magic, rules.request_size, rules.size_bytes),
            *(rules.put_read_header, rules.put_done, rules.write_flags, rules.read_header_size),
        )
        self._hole_worth = HOLE_WORTH_BYTES if rules.structured else PIECE_BYTES + 1  # examined for holes from then on

    @property
    def kept_bytes(self) -> int:
        """Of jobs, of reads that wait for a device, and of answers that wait."""
        return self._job_bytes + self._late_bytes + self.misses.count * MISS_BYTES

    def in_progress(self) -> int:
        """How many jobs and reads are not done."""
        return self.jobs + self.misses.count + (self._long_read is not None)

    def is_idle(self) -> bool:
        """True if no request is in progress."""
        return not (self.jobs or self.misses.count or self._long_read or self.payload or self._waiting)

    def drop(self) -> None:
        """The client is gone: forget what it was to get."""
        self._forget_late()
        self.misses.drop()

    def has_enough_jobs(self) -> bool:
        """True while no further requests are accepted because of the jobs in progress."""
        return self.jobs >= MAX_JOBS or self._job_bytes >= self._memory.limits.jobs_bytes

    def blocked(self) -> bool:
        """True while no further requests are accepted."""
        return bool(
            self._channel.unsent
            or (self.misses.count and self.misses.is_full())
            or self._waiting
            or self.ended
            or (self.jobs and self.has_enough_jobs())
            or self._long_read is not None
            or self.export.held
        )

    def may_answer(self) -> bool:
        """See `misses.Reader`."""
        return not (self._channel.unsent or self.export.held or self._long_read or self._channel.is_closed())

    def step(self) -> bool:
        """Continue a long read; False if there is none, or it cannot continue now."""
        reading = self._long_read
        if reading is None or self._channel.unsent or self._waiting or self.export.held:
            return False
        began, position = time.perf_counter_ns(), reading.offset
        if self._rests(began):
            return False
        self._continue_long_read(reading)
        self.scan.end(began, reading.offset - position)
        return True

    def _rests(self, now: int) -> bool:
        """Before large reads: let our input wait if this is a scan that has to rest beside others."""
        if self.scan.must_rest(now):
            self._waiting = True
            self._host.scans.rest(self.scan, self._wait_ended)
            return True
        self.scan.begin(now)
        return False

    def serve(self, buffer: memoryview, end: int) -> int:
        """Serve requests before `end`; returns where the unserved input begins."""
        position = 0
        if self.payload is not None:
            position = self._take_payload(buffer, 0, end)
        while not self._must_wait():
            position = self._serve_usual(buffer, position, end)
            if position == end or self._must_wait():
                break
            request = self._rules.next_request(buffer, position, end)
            if request is None:
                break
            if position + self._rules.request_size + min(request.payload_bytes, self._memory.limits.kept_bytes) > end:
                break  # keep it until it is complete, or until there is enough of it to write in pieces
            if self.export.bulk and self._is_common_write(request):
                self._wait_for_bulk()
                break
            position = self._begin(request, buffer, position + self._rules.request_size, end)
            if self.payload is not None:
                position = self._take_payload(buffer, position, end)
        if self.misses.count:
            self.misses.serve()
        return position

    def _serve_usual(self, buffer: memoryview, position: int, end: int) -> int:
        """The hot path: plain reads and writes that need no waiting. Returns where the first other request begins."""
        unpack, magic, request_size, size_bytes, put_read_header, put_done, write_flags, header_size = self._usual
        hole_worth, scan = self._hole_worth, self.scan
        disk, limits, replies, misses = self.export.disk, self._memory.limits, self._replies, self.misses
        try_read, try_write = disk.try_read_whole, disk.try_write_flat
        room, longest, marks = limits.reply_bytes - _LAST_HEADER_BYTES, limits.piece_bytes, misses.marks
        began, filled, served, large = time.perf_counter_ns(), 0, 0, 0
        try:
            while end - position >= request_size:
                found, flags, command, cookie, offset, length = unpack(buffer, position)
                if found != magic or not 0 < length <= longest or offset + length > size_bytes:
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
                    if length >= LARGE_BYTES:
                        if not large and self._rests(began):
                            break
                        large += length
                        if length >= hole_worth and disk.has_known_holes(offset, length):
                            break
                        if self._begin_directly(cookie, offset, length, replies[:filled]):
                            position += request_size
                            filled = 0
                            if self._long_read is not None:
                                break
                            filled = self._rules.put_end(replies, 0, cookie, offset)
                            continue
                    if not try_read(offset, replies[start:stop]):
                        if misses.is_full() or (offset | length) & SECTOR_MASK:
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
        if large:
            scan.end(began, large)
        elif served:
            scan.served(served, began)
        if served:
            self._served(self, served, began)
            self._loop.relaxed = served > 1 or filled > _RELAXING_BYTES
        return position

    def _is_common_write(self, request: Request) -> bool:
        """True for a write that only a writer at work can have kept from being served at once."""
        return (
            request.command == Command.WRITE
            and not request.error
            and request.payload_bytes <= self._memory.limits.kept_bytes
            and not (request.offset | request.length) % self.export.disk.unit_bytes
        )

    def _wait_for_bulk(self) -> None:
        """Let our input wait for the end of a slice that has the disk's lock, which takes about a millisecond.

        As a job, a write would wait longer: for the interpreter, and it would then have the lock in turn.
        """
        self._waiting = True
        self.export.after_bulk.append(self._wait_ended)

    def _wait_ended(self) -> None:
        self._waiting = False
        self._proceed()

    def _must_wait(self) -> bool:
        """True if the next request cannot be examined yet."""
        return self.payload is not None or self.blocked()

    def _begin(self, request: Request, buffer: memoryview, start: int, end: int) -> int:
        """Start a request that is not served at once; returns where the next one begins."""
        rules, limits = self._rules, self._memory.limits
        if request.command == Command.DISC:  # row 31
            self.ended = True
            return end
        stop = start + request.payload_bytes
        if request.payload_bytes > limits.kept_bytes or stop > end:
            self.payload = Payload(request)
            return start
        if request.error:
            self._channel.send(rules.error(request, request.error))
        elif request.command == Command.READ and request.length > limits.piece_bytes:
            self._long_read = LongRead(request, in_chunks=rules.structured and not request.flags & CommandFlag.DF)
            if not self._long_read.in_chunks:
                self._channel.send(rules.begin_whole_read(request))
        elif request.command == Command.FLUSH:
            self._flush_then(rules.done(request), request)
        else:
            self.submit(request, bytes(buffer[start:stop]) if request.payload_bytes else None)
        return stop

    # -- jobs ---------------------------------------------------------------------------------------------------

    def submit(self, request: Request, payload: bytes | None, after: Callable[[], None] | None = None) -> None:
        """Let a worker execute it, then answer; with FUA, when it is durable (row 31). `after`: see `Reader`."""
        rules = self._rules
        descriptors = self._memory.limits.descriptors
        size = request.length if request.command in (Command.READ, Command.WRITE) else 0
        if request.command == Command.BLOCK_STATUS:
            size = _STATUS_BYTES * min(descriptors, STATUS_RUNS * len(rules.session.contexts))
        self._job_begins(size)
        began = time.perf_counter_ns()

        def done(answer: bytes | bytearray | BaseException) -> None:
            if answer is WAITS:
                self._job_ends(size)
                self._proceed()
                return
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

        lane, work = self.export.work_of(rules, request, payload, descriptors=descriptors)
        if request.command == Command.READ:
            work = self.scan.noting(work)
        takes_lock = request.command in (Command.WRITE_ZEROES, Command.TRIM)
        attempt = None if after is not None else self.export.attempt_of(rules, request, payload)
        if attempt is not None and request.command == Command.READ:
            attempt = self.misses.or_wait(attempt, request, began)
        is_write = request.command == Command.WRITE
        ask = partial(self.export.ask, self._loop, request) if attempt is not None and is_write else None
        self._host.jobs.add(self, work, done, lane, must_run=is_write, takes_lock=takes_lock, attempt=attempt, ask=ask)

    def run_beside(self, work: Callable[[Disk], object], done: Callable[[], None]) -> None:
        """See `misses.Reader`."""
        self._job_begins()

        def ended(result: object) -> None:
            self._job_ends()
            done()
            self._proceed()

        noted = self.scan.noting(lambda: (work(self.export.disk), True))
        self._host.jobs.add(self, noted, ended, must_run=False)

    # -- payloads that arrive in pieces -------------------------------------------------------------------------

    def _take_payload(self, buffer: memoryview, position: int, end: int) -> int:
        """Process the received part of the payload; returns where the rest begins."""
        payload = self.payload
        assert payload is not None
        request = payload.request
        size = min(payload.left, end - position)
        if request.error:  # row 25: drained
            payload.left -= size
        else:
            if size < payload.left:  # in whole pages: one written in two parts is read first, or waits for the device
                size = round_down(payload.offset + size, self._memory.limits.kept_bytes) - payload.offset
                if size < min(payload.left, _WORTH_WRITING_BYTES):
                    return position
            size = min(size, PIECE_BYTES)
            size = self._write_piece(payload, buffer[position : position + size])
        if not payload.left and not self._waiting:
            self._end_payload(payload)
        return position + size

    def _write_piece(self, payload: Payload, piece: memoryview) -> int:
        """Write at once or in a job; returns how much of the piece that was, nothing while a slice has the lock."""
        export = self.export
        offset = payload.offset
        problem = None
        try:
            is_done = export.disk.try_write_flat(offset, piece)
        except errors.VhdkitError as error:
            is_done, problem = True, error
        if not is_done and export.bulk and not (offset | len(piece)) % export.disk.unit_bytes:
            self._wait_for_bulk()
            return 0
        if not is_done and len(piece) > self._memory.limits.piece_bytes:  # the rest is kept as input
            piece = piece[: round_down(offset + self._memory.limits.piece_bytes, SECTOR_SIZE) - offset]
        payload.offset += len(piece)
        payload.left -= len(piece)
        if problem is not None:
            self._fail_payload(payload, problem)
        if is_done:
            self._loop.relaxed = True
            self._host.stats.served(self, 0, payload.began)
            return len(piece)
        data = bytes(piece)
        self._waiting = True
        self._job_begins(len(data))

        def done(result: object) -> None:
            self._waiting = False
            if isinstance(result, BaseException):
                self._fail_payload(payload, result)
            if not payload.left:
                self._end_payload(payload)
            self._job_ends(len(data))
            self._proceed()

        def write() -> bool:
            export.disk.write(offset, data)
            return True

        self._host.jobs.add(self, write, done)
        return len(data)

    def _fail_payload(self, payload: Payload, problem: BaseException) -> None:
        """Drain the rest; the answer is the first error."""
        self._log_failure(payload.request, problem)
        payload.request = payload.request._replace(error=error_number(problem))

    def _end_payload(self, payload: Payload) -> None:
        rules, request = self._rules, payload.request
        self.payload = None
        if self._channel.is_closed():
            return
        self._host.stats.batch(1, time.perf_counter_ns() - payload.began)
        if request.error:
            self._channel.send(rules.error(request, request.error))
        elif request.flags & CommandFlag.FUA:
            self._flush_then(rules.done(request), request)
        else:
            self._channel.send(rules.done(request))
