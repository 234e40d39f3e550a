# SPDX-License-Identifier: Apache-2.0
"""The operations of one export: NBD's commands on a `Disk`.

Decides what each command means for a disk, how a disk's errors are reported, which metadata contexts there are, and
that a single flush at a time serves every client that waits for one. Must not know sockets. Functions named `run_` may
wait for devices and belong on worker threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from vhdkit import errors
from vhdkit.disk import Disk
from vhdkit.image import Extent, ExtentKind
from vhdkit.serve.nbd import wire
from vhdkit.serve.nbd.loop import Lane, Loop
from vhdkit.serve.nbd.options import ExportInfo
from vhdkit.serve.nbd.protocol import Request, Transmission
from vhdkit.serve.nbd.wire import Command, CommandFlag, TransmissionFlag, WireErrno, wire_errno
from vhdkit.units import KIB, MIB, PAGE_SIZE, SECTOR_SIZE

ALLOCATION = "base:allocation"
DEPTH = "qemu:allocation-depth"
DIRTY = "qemu:dirty-bitmap:"
PIECE_BYTES = MIB  # the most that is read or written at once
HOLE_WORTH_BYTES = 64 * KIB  # reads of at least this size are checked for holes
MAX_CACHE_BYTES = 16 * MIB  # read ahead for one CACHE request
_STATUS_RUNS = 1 << 13  # descriptors of one context in an answer; the protocol allows more, and clients ask again
_STATUS_EXTENTS = 1 << 15  # examined for one answer; equal neighbours become one descriptor
_EXTENTS_AT_ONCE = 32
_COMPACT_RUN_BYTES = (1 << 32) - PAGE_SIZE  # the longest run of whole pages that 32 bits can express
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
        self._flush_waiters: list[Callable[[BaseException | None], None]] = []
        self._flushing = False

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

    def run(self, rules: Transmission, request: Request, payload: bytes | None = None) -> bytes | bytearray:
        """Execute `request` and return the bytes of the answer. The caller handles FUA.

        Raises VhdkitError, which the caller reports to the client.
        """
        disk, offset, length = self.disk, request.offset, request.length
        if request.command == Command.READ:
            return self._run_read(rules, request)
        if request.command == Command.BLOCK_STATUS:
            return self._run_status(rules, request, payload)
        if request.command == Command.WRITE:
            disk.write(offset, payload or b"")  # no payload means no bytes, not a wrong size (row 29)
        elif request.command == Command.TRIM:
            disk.trim(offset, length)
        elif request.command == Command.WRITE_ZEROES:
            self._run_write_zeroes(request)
        elif request.command == Command.CACHE:
            self._run_cache(offset, length)
        return rules.done(request)

    def _run_read(self, rules: Transmission, request: Request) -> bytes | bytearray:
        if not request.length:
            return rules.done(request)
        may_split = rules.structured and request.length >= HOLE_WORTH_BYTES and not request.flags & CommandFlag.DF
        if may_split and self.disk.has_known_holes(request.offset, request.length):
            chunks = self.run_read_piece(rules, request, request.offset, request.length)
            return chunks + rules.done(request)
        size = rules.read_header_size
        reply = bytearray(size + request.length)
        rules.put_read_header(memoryview(reply), 0, request.cookie, request.offset, request.length)
        self.disk.read_into(request.offset, memoryview(reply)[size:])
        return reply

    def run_read_piece(self, rules: Transmission, request: Request, offset: int, length: int) -> bytes:
        """A part of a read: bytes, or content chunks, which do not transmit sectors that no layer owns."""
        if not rules.structured:
            return self.disk.read(offset, length)
        pieces = []
        for start, size, is_hole in self.disk.known_holes(offset, length):
            if is_hole:
                pieces.append(rules.hole_chunk(request, start, size))
            else:
                pieces.append(rules.data_chunk(request, start, size))
                pieces.append(self.disk.read(start, size))
        return b"".join(pieces)

    def _run_write_zeroes(self, request: Request) -> None:
        no_hole = bool(request.flags & CommandFlag.NO_HOLE)
        if request.flags & CommandFlag.FAST_ZERO and (no_hole or not self.disk.zeroes_are_fast()):  # row 39
            raise _NotFast("writing zeros here would not be faster than data")
        if not no_hole:
            self.disk.write_zeroes(request.offset, request.length)
            return
        position, end = request.offset, request.offset + request.length
        while position < end:
            size = min(end - position, PIECE_BYTES - position % SECTOR_SIZE)
            self.disk.write(position, _ZEROS[:size])
            position += size

    def _run_cache(self, offset: int, length: int) -> None:
        scratch = memoryview(bytearray(min(length, PIECE_BYTES)))
        end = offset + min(length, MAX_CACHE_BYTES)
        while offset < end:
            size = min(end - offset, len(scratch))
            self.disk.read_into(offset, scratch[:size])
            offset += size

    # -- block status -------------------------------------------------------------------------------------------

    def _run_status(self, rules: Transmission, request: Request, payload: bytes | None) -> bytes:
        length, chosen = request.length, tuple(number for number, _ in rules.session.contexts)
        if payload is not None:
            narrowed = rules.status_filter(payload, request.offset)
            if narrowed is None:
                return rules.error(request, WireErrno.EINVAL, "the payload does not name contexts of this session")
            length, chosen = narrowed
        contexts = [(number, name) for number, name in rules.session.contexts if number in chosen]
        chunks = []
        for place, (number, name) in enumerate(contexts, 1):
            one = bool(request.flags & CommandFlag.REQ_ONE)
            runs = self.status_runs(name, request.offset, length, extended=rules.extended, limit=1 if one else None)
            chunks.append(rules.status(request, number, runs, last=place == len(contexts)))
        return b"".join(chunks)

    def status_runs(
        self, context: str, offset: int, length: int, *, extended: bool, limit: int | None = None
    ) -> list[tuple[int, int]]:
        """(length, flags) of the range in one context: neighbours differ, the sum does not pass the range."""
        limit = limit or _STATUS_RUNS
        longest = length if extended else _COMPACT_RUN_BYTES
        flags_of = self._flags_of(context)
        runs: list[tuple[int, int]] = []
        extents = self.disk.extents(offset, length, find_holes=context == ALLOCATION)
        for number, (_, size, extent) in enumerate(_clipped(extents, offset, length)):
            if number == _STATUS_EXTENTS:
                break
            if number % _EXTENTS_AT_ONCE == 0:
                time.sleep(0)  # gives the interpreter to the loop
            flags = flags_of(extent)
            if runs and runs[-1][1] == flags:
                size += runs.pop()[0]
            elif len(runs) == limit:
                break
            runs.append((min(size, longest), flags))
            if size > longest:
                break
        return runs

    def _flags_of(self, context: str) -> Callable[[Extent], int]:
        """The flags of an extent in a context (rows 38 and 40)."""
        if context == ALLOCATION:
            return lambda extent: wire.STATE_HOLE | wire.STATE_ZERO if extent.kind is ExtentKind.ZERO else 0
        if context == DEPTH:  # 0: no layer owns it, 1: the leaf, n: the n-th layer
            return lambda extent: extent.layer_index + 1
        ids = self.disk.layer_ids
        wanted = context.removeprefix(DIRTY)
        # After a snapshot the layer is one lower in the chain, but its id is still its name.
        depth = ids.index(wanted) if wanted in ids else len(ids)
        return lambda extent: int(0 <= extent.layer_index <= depth)


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


def _clipped(extents: Iterator[Extent], offset: int, length: int) -> Iterator[tuple[int, int, Extent]]:
    """(offset, size, extent) in bytes, clipped to the requested range."""
    end = offset + length
    for extent in extents:
        start = max(extent.offset_bytes, offset)
        stop = min(extent.offset_bytes + extent.size_bytes, end)
        if stop > start:
            yield start, stop - start, extent


def error_reply(rules: Transmission, request: Request, error: BaseException) -> bytes:
    """The error reply for a failed command; it never contains file names."""
    text = error.problem if isinstance(error, errors.VhdkitError) else "the server failed to do this"
    return rules.error(request, error_number(error), text)


def error_number(error: BaseException) -> WireErrno:
    """The NBD error number for a failed command."""
    return wire_errno(error.errno) if isinstance(error, errors.VhdkitError) else WireErrno.EIO
