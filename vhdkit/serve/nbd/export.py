# SPDX-License-Identifier: Apache-2.0
"""The operations of one export: NBD's commands on a `Disk`.

Decides what each command means for a disk, how a disk's errors are reported, which metadata contexts there are, and
that a single flush at a time serves every client that waits for one. Must not know sockets. Functions named `run_` may
wait for devices and belong on worker threads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

from vhdkit import errors
from vhdkit.chain.records.pending import file_of
from vhdkit.disk import Disk
from vhdkit.readahead import Budget
from vhdkit.serve.nbd import wire
from vhdkit.serve.nbd.loop import Lane, Loop
from vhdkit.serve.nbd.options import ExportInfo
from vhdkit.serve.nbd.protocol import Request, Transmission
from vhdkit.serve.nbd.slices import (
    ALLOCATION,
    DEPTH,
    DIRTY,
    MAX_DESCRIPTORS,
    STATUS_RUNS,
    Listing,
    Ranged,
    StatusRuns,
)
from vhdkit.serve.nbd.wire import Command, CommandFlag, TransmissionFlag, WireErrno, wire_errno
from vhdkit.uncached import KEPT_BYTES
from vhdkit.units import KIB, MIB, SECTOR_SIZE, edges

PIECE_BYTES = MIB  # the most that is read or written at once
HOLE_WORTH_BYTES = 64 * KIB  # reads of at least this size are checked for holes
MAX_CACHE_BYTES = 16 * MIB  # read ahead for one CACHE request
_ZEROS = memoryview(bytes(PIECE_BYTES))


class Export:
    """A disk under a name. While the export is held, `disk` may be replaced by another view of the same bytes."""

    def __init__(self, name: str, disk: Disk, *, description: str = "", read_only: bool = False) -> None:
        """Take over an open disk. Raises InvalidArgument for a name or description that NBD cannot transmit."""
        check_text("name", name)
        check_text("description", description)
        self.name = name
        self.description = description
        self.disk = disk
        self.read_only = read_only or not disk.writable
        self.held = False  # new requests wait
        self.jobs = 0  # on worker threads or waiting for a flush
        self.parked: list[Callable[[], None]] = []  # work to resume when the export is released
        self.bulk = 0  # slices of long changes on worker threads: one of them may have the disk's lock
        self.after_bulk: list[Callable[[], None]] = []  # called when the next of them ends
        self._flush_waiters: list[Callable[[BaseException | None], None]] = []
        self._flushing = False
        self._kept: Budget | None = None

    def info(self) -> ExportInfo:
        """What clients may learn. All connections share one `Disk`, so a flush covers them all: MULTI_CONN."""
        flags = TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_FUA | TransmissionFlag.CAN_MULTI_CONN
        flags |= TransmissionFlag.SEND_CACHE
        if self.read_only:
            flags |= TransmissionFlag.READ_ONLY
        else:
            flags |= TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO
        dirty = [DIRTY + name for name in dict.fromkeys(self.disk.layer_ids) if name is not None]
        contexts = (ALLOCATION, DEPTH, *dirty)
        least = self.least_request_bytes
        return ExportInfo(self.name, self.description, self.disk.size_bytes, flags, contexts, least)

    @property
    def least_request_bytes(self) -> int:
        """The smallest request that clients should make: a sector that is larger than 512 bytes, else a byte."""
        return 1 if self.disk.unit_bytes == SECTOR_SIZE else self.disk.unit_bytes

    def read_ahead(self, shared: Budget) -> Budget:
        """What all readers of this disk may have prefetched, of what those of all disks may.

        Of a disk that is kept out of the page cache no more is left in there until it is read.
        """
        file = file_of(self.disk.chain.leaf.store)
        if file is None or file.uncached is None:
            return shared
        if self._kept is None:
            self._kept = Budget(KEPT_BYTES, within=shared)
        return self._kept

    # -- flushing -----------------------------------------------------------------------------------------------

    def flush(self, loop: Loop, done: Callable[[BaseException | None], None]) -> None:
        """Call `done` once everything answered so far is durable. On the loop's thread.

        Requests that arrive during a flush wait for the next one: a flush covers only writes made before it began.
        """
        self._flush_waiters.append(done)
        if not self._flushing:
            self._start_flush(loop)

    def _start_flush(self, loop: Loop) -> None:
        waiters, self._flush_waiters = self._flush_waiters, []
        self._flushing = True

        def finished(result: object) -> None:
            self._flushing = False
            if self._flush_waiters:
                self._start_flush(loop)
            for waiter in waiters:
                waiter(result if isinstance(result, BaseException) else None)

        loop.submit(self.disk.flush, finished, Lane.FLUSH)

    # -- commands, on worker threads ----------------------------------------------------------------------------

    def work_of(
        self,
        rules: Transmission,
        request: Request,
        payload: bytes | None = None,
        *,
        descriptors: int = MAX_DESCRIPTORS,
    ) -> tuple[Lane, Callable[[], bytes | bytearray | None]]:
        """What a worker does for a request: a function to be called until it returns the answer, and its lane.

        The caller handles FUA. The function raises VhdkitError, which the caller reports to the client.
        `descriptors`: the most in an answer to BLOCK_STATUS.
        """
        command, offset, length = request.command, request.offset, request.length
        if command == Command.BLOCK_STATUS:
            return Lane.LISTING, self._listing(rules, request, payload, descriptors)
        if command in (Command.WRITE_ZEROES, Command.TRIM, Command.CACHE):
            return Lane.BULK, self._ranged(rules, request)
        unit = self.disk.unit_bytes if command == Command.WRITE else SECTOR_SIZE
        lane = Lane.PARTS if (offset | length) % unit else Lane.WORK
        if command == Command.READ:
            return lane, lambda: self._run_read(rules, request)
        assert command == Command.WRITE

        def write() -> bytes:
            self.disk.write(offset, payload or b"")  # no payload means no bytes, not a wrong size (row 29)
            return rules.done(request)

        return lane, write

    def attempt_of(
        self, rules: Transmission, request: Request, payload: bytes | None
    ) -> Callable[[], bytes | bytearray | None] | None:
        """What the loop does for a request for parts of sectors if that needs no waiting; None for other requests.

        The function returns the answer, or None and has done nothing. It raises VhdkitError.
        """
        offset, length = request.offset, request.length
        if request.command == Command.WRITE and (offset | length) % self.disk.unit_bytes and payload:
            data = memoryview(payload)
            return lambda: rules.done(request) if self.disk.try_write_parts(offset, data) else None
        if request.command == Command.READ and (offset | length) % SECTOR_SIZE:
            return lambda: self._try_read(rules, request)
        return None

    def ask(self, loop: Loop, request: Request, told: Callable[[], None]) -> bool:
        """Call `told` when the last part of a sector in the request's range is in memory; False without that word."""
        edge = edges(request.offset, request.offset + request.length, self.disk.unit_bytes)[-1][0]
        with contextlib.suppress(errors.VhdkitError):  # the request itself reports it
            return loop.ask(partial(self.disk.chain.ask, edge // SECTOR_SIZE), told)
        return False

    def _try_read(self, rules: Transmission, request: Request) -> bytearray | None:
        size = rules.read_header_size
        reply = bytearray(size + request.length)
        rules.put_read_header(memoryview(reply), 0, request.cookie, request.offset, request.length)
        return reply if self.disk.try_read_flat(request.offset, memoryview(reply)[size:]) else None

    def _run_read(self, rules: Transmission, request: Request) -> bytes | bytearray:
        if not request.length:
            return rules.done(request)
        may_split = rules.structured and request.length >= HOLE_WORTH_BYTES and not request.flags & CommandFlag.DF
        if may_split and self.disk.has_known_holes(request.offset, request.length):
            chunks = self.run_read_piece(rules, request, request.offset, request.length, in_chunks=True)
            return chunks + rules.done(request)
        size = rules.read_header_size
        reply = bytearray(size + request.length)
        rules.put_read_header(memoryview(reply), 0, request.cookie, request.offset, request.length)
        self.disk.read_into(request.offset, memoryview(reply)[size:])
        return reply

    def run_read_piece(
        self, rules: Transmission, request: Request, offset: int, length: int, *, in_chunks: bool
    ) -> bytes:
        """A part of a read: bytes, or content chunks, which do not transmit sectors that no layer owns."""
        if not in_chunks:
            return self.disk.read(offset, length)
        pieces = []
        for start, size, is_hole in self.disk.known_holes(offset, length):
            if is_hole:
                pieces.append(rules.hole_chunk(request, start, size))
            else:
                pieces.append(rules.data_chunk(request, start, size))
                pieces.append(self.disk.read(start, size))
        return b"".join(pieces)

    # -- long commands ------------------------------------------------------------------------------------------

    def _ranged(self, rules: Transmission, request: Request) -> Ranged:
        command, length = request.command, request.length
        grain = self.disk.chain.leaf.block_size_bytes or PIECE_BYTES
        run: Callable[[int, int], None] = partial(self._zero, request.flags)
        if command == Command.TRIM:
            run = self._trim
        elif command == Command.CACHE:
            run, length, grain = self._cache, min(length, MAX_CACHE_BYTES), PIECE_BYTES
        elif request.flags & CommandFlag.NO_HOLE:
            grain = PIECE_BYTES
        return Ranged(run, request.offset, length, grain, rules.done(request))

    def _trim(self, offset: int, length: int) -> None:
        self.disk.trim(offset, length)

    def _zero(self, flags: int, offset: int, length: int) -> None:
        no_hole = bool(flags & CommandFlag.NO_HOLE)
        if flags & CommandFlag.FAST_ZERO and (no_hole or not self.disk.zeroes_are_fast()):  # row 39
            raise _NotFast("writing zeros here would not be faster than data")
        if not no_hole:
            self.disk.write_zeroes(offset, length)
            return
        end = offset + length
        while offset < end:
            size = min(end - offset, PIECE_BYTES - offset % SECTOR_SIZE)
            self.disk.write(offset, _ZEROS[:size])
            offset += size

    def _cache(self, offset: int, length: int) -> None:
        scratch = memoryview(bytearray(min(length, PIECE_BYTES)))
        end = offset + length
        while offset < end:
            size = min(end - offset, len(scratch))
            self.disk.read_into(offset, scratch[:size])
            offset += size

    def _listing(
        self, rules: Transmission, request: Request, payload: bytes | None, descriptors: int
    ) -> Callable[[], bytes | None]:
        chosen = tuple(number for number, _ in rules.session.contexts)
        if payload is not None:
            narrowed = rules.status_filter(payload, request.offset)
            if narrowed is None:
                text = "the payload does not name contexts of this session"
                return lambda: rules.error(request, WireErrno.EINVAL, text)
            request, chosen = request._replace(length=narrowed[0]), narrowed[1]
        contexts = [(number, name) for number, name in rules.session.contexts if number in chosen]
        return Listing(lambda: self.disk, contexts, request, rules, descriptors=descriptors)

    def status_runs(
        self, context: str, offset: int, length: int, *, extended: bool, limit: int | None = None
    ) -> list[tuple[int, int]]:
        """(length, flags) of the range in one context: neighbours differ, the sum does not pass the range."""
        runs = StatusRuns(context, offset, length, extended=extended, limit=limit or STATUS_RUNS)
        while not runs.collect(self.disk):
            pass
        return list(zip(runs.lengths, runs.flags, strict=True))


def check_text(what: str, text: str) -> None:
    """Raise InvalidArgument unless `text`, an export's name or description, can be sent to a client (row 13)."""
    try:
        raw = text.encode()
    except UnicodeEncodeError as error:
        raise errors.InvalidArgument(f"the export's {what} {errors.printable(text)!r} is not UTF-8 text") from error
    if b"\0" in raw or len(raw) > wire.MAX_STRING_BYTES:
        raise errors.InvalidArgument(f"the {what} of an export has at most {wire.MAX_STRING_BYTES} bytes, none zero")


class _NotFast(errors.VhdkitError):
    errno = wire.WireErrno.ENOTSUP


def error_reply(rules: Transmission, request: Request, error: BaseException) -> bytes:
    """The error reply for a failed command; it never contains file names."""
    text = error.problem if isinstance(error, errors.VhdkitError) else "the server failed to do this"
    return rules.error(request, error_number(error), text)


def error_number(error: BaseException) -> WireErrno:
    """The NBD error number for a failed command."""
    return wire_errno(error.errno) if isinstance(error, errors.VhdkitError) else WireErrno.EIO
