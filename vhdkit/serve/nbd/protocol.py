# SPDX-License-Identifier: Apache-2.0
"""The server's side of NBD's transmission phase: bytes to requests, results to bytes.

Decides which requests are refused and with which error number, and how every answer is framed: simple, structured or
extended, as negotiated. Sans-IO: knows no sockets and no disks. It works on the caller's buffers and returns
plain tuples, because this is the hot path: in a batch, each small read costs a microsecond here.

Rows named in comments are those of docs/nbd-support.md.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vhdkit.serve.nbd import wire
from vhdkit.serve.nbd.options import Session
from vhdkit.serve.nbd.wire import ChunkType, Command, CommandFlag, TransmissionFlag, WireErrno

MAX_DRAINED_BYTES = 1 << 27  # of a refused payload; a longer one ends the connection
MAX_STATUS_PAYLOAD_BYTES = 4096
MAX_UNFRAGMENTED_BYTES = 1 << 20  # of a read with DF (row 16: at least 64 KiB)
_NO_END = 1 << 64
_EXTENDED_RUN_BYTES = 16
_WRITES = frozenset({Command.WRITE, Command.WRITE_ZEROES, Command.TRIM})
_KNOWN_FLAGS = {  # row 25; FUA is allowed with all of them (row 26). Plain ints: ~ of an IntFlag drops unknown bits
    Command.READ: int(CommandFlag.FUA | CommandFlag.DF),
    Command.WRITE: int(CommandFlag.FUA),
    Command.FLUSH: int(CommandFlag.FUA),
    Command.TRIM: int(CommandFlag.FUA),
    Command.CACHE: int(CommandFlag.FUA),
    Command.WRITE_ZEROES: int(CommandFlag.FUA | CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO),
    Command.BLOCK_STATUS: int(CommandFlag.FUA | CommandFlag.REQ_ONE),
}
_STATUS_PAYLOAD_FLAGS = _KNOWN_FLAGS[Command.BLOCK_STATUS] | int(CommandFlag.PAYLOAD_LEN)
_STATUS_PAYLOAD = struct.Struct(">Q")


class BrokenClient(Exception):
    """What the client sent can only be answered by closing the connection; the text says why."""


class Request(NamedTuple):
    """A request. `error` is 0, or the number to refuse it with; `payload_bytes` follow it on the wire."""

    error: int
    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    payload_bytes: int


class Transmission:
    """The rules and the framing of one session."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.size_bytes = session.export.size_bytes
        self.read_only = bool(session.export.flags & TransmissionFlag.READ_ONLY)
        self.structured = session.structured
        self.extended = session.extended
        request = wire.EXTENDED_REQUEST if self.extended else wire.REQUEST
        self.request_size = request.size
        # The hot path unpacks and handles the common requests itself, and passes all others to `next_request`.
        self.unpack = request.unpack_from  # magic, flags, command, cookie, offset, length
        self.magic = wire.EXTENDED_REQUEST_MAGIC if self.extended else wire.REQUEST_MAGIC
        write_flags = int(CommandFlag.PAYLOAD_LEN) if self.extended else 0
        self.write_flags = -1 if self.read_only else write_flags  # of a common WRITE; a common READ has none
        self.read_header_size = wire.SIMPLE_REPLY.size
        if self.extended:
            self.read_header_size = wire.EXTENDED_DATA_CHUNK.size
        elif self.structured:
            self.read_header_size = wire.DATA_CHUNK.size

    # -- requests -----------------------------------------------------------------------------------------------

    def next_request(self, buffer: memoryview, position: int, end: int) -> Request | None:
        """The request at `position`, or None if no complete header lies before `end`.

        Raises BrokenClient (row 24) if the bytes are not a request.
        """
        if end - position < self.request_size:
            return None
        magic, flags, command, cookie, offset, length = self.unpack(buffer, position)
        if magic != self.magic:
            raise BrokenClient(f"bad magic {magic:#x} where a request should begin")
        return self._judged(flags, command, cookie, offset, length)

    def _judged(self, flags: int, command: int, cookie: int, offset: int, length: int) -> Request:
        payload = length if command == Command.WRITE and not self.extended else 0
        if self.extended and flags & CommandFlag.PAYLOAD_LEN:
            payload = length
        if payload > (wire.MAX_PAYLOAD_BYTES if self.extended else MAX_DRAINED_BYTES):
            raise BrokenClient(f"a payload of {payload} bytes")
        error = 0
        if payload and command == Command.BLOCK_STATUS and length <= MAX_STATUS_PAYLOAD_BYTES:
            if flags & ~_STATUS_PAYLOAD_FLAGS or not self.session.contexts:
                error = WireErrno.EINVAL
        else:
            error = self.refusal(flags, command, offset, length)
        return Request(error, command, flags, cookie, offset, length, payload)

    def refusal(self, flags: int, command: int, offset: int, length: int) -> int:
        """The error number to refuse a request with before its data is processed, or 0 (rows 23, 25-29)."""
        known = _KNOWN_FLAGS.get(command)  # type: ignore[call-overload]  # the client may send any number
        if known is None:
            return 0 if command == Command.DISC else WireErrno.EINVAL
        if command == Command.WRITE and self.extended:
            if not flags & CommandFlag.PAYLOAD_LEN:
                return WireErrno.EINVAL
            flags &= ~int(CommandFlag.PAYLOAD_LEN)
        if flags & ~known or (flags & CommandFlag.DF and not self.structured):
            return WireErrno.EINVAL
        if command in _WRITES and self.read_only:
            return WireErrno.EPERM
        if command == Command.FLUSH:
            return WireErrno.EINVAL if offset or length else 0
        if offset + length >= _NO_END:  # row 28
            return WireErrno.EINVAL
        if command == Command.BLOCK_STATUS and not (self.session.contexts and length):
            return WireErrno.EINVAL
        if offset + length > self.size_bytes:
            return WireErrno.ENOSPC if command in (Command.WRITE, Command.WRITE_ZEROES) else WireErrno.EINVAL
        if command in (Command.READ, Command.WRITE) and length > wire.MAX_PAYLOAD_BYTES:
            large_read = command == Command.READ and self.structured
            return WireErrno.EOVERFLOW if large_read else WireErrno.EINVAL
        if flags & CommandFlag.DF and length > MAX_UNFRAGMENTED_BYTES:
            return WireErrno.EOVERFLOW
        return 0

    def status_filter(self, payload: bytes, offset: int) -> tuple[int, tuple[int, ...]] | None:
        """Effect length and context ids of a BLOCK_STATUS payload; None if it must be refused."""
        ids_size = len(payload) - _STATUS_PAYLOAD.size
        if ids_size < 4 or ids_size % 4:
            return None
        (length,) = _STATUS_PAYLOAD.unpack_from(payload)
        ids = struct.unpack_from(f">{ids_size // 4}I", payload, _STATUS_PAYLOAD.size)
        known = {number for number, _ in self.session.contexts}
        if len(set(ids)) != len(ids) or not known.issuperset(ids):
            return None
        return None if self.refusal(0, Command.BLOCK_STATUS, offset, length) else (length, ids)

    # -- answers ------------------------------------------------------------------------------------------------

    def put_read_header(self, buffer: memoryview, position: int, cookie: int, offset: int, length: int) -> None:
        """Write the header for a read answered as a whole; `length` bytes of data must follow it directly."""
        if self.extended:
            wire.EXTENDED_DATA_CHUNK.pack_into(
                buffer,
                position,
                wire.EXTENDED_CHUNK_MAGIC,
                wire.CHUNK_DONE,
                ChunkType.OFFSET_DATA,
                cookie,
                offset,
                length + 8,
                offset,
            )
        elif self.structured:
            wire.DATA_CHUNK.pack_into(
                buffer, position, wire.CHUNK_MAGIC, wire.CHUNK_DONE, 1, cookie, length + 8, offset
            )
        else:
            wire.SIMPLE_REPLY.pack_into(buffer, position, wire.SIMPLE_REPLY_MAGIC, 0, cookie)

    def _chunk(self, kind: int, flags: int, cookie: int, offset: int, length: int) -> bytes:
        """The header of a chunk; `offset` is the request's."""
        if self.extended:
            return wire.EXTENDED_CHUNK.pack(wire.EXTENDED_CHUNK_MAGIC, flags, kind, cookie, offset, length)
        return wire.CHUNK.pack(wire.CHUNK_MAGIC, flags, kind, cookie, length)

    def done(self, request: Request) -> bytes:
        """Success without data; also the end of a reply in several chunks."""
        if self.extended or (self.structured and request.command in (Command.READ, Command.BLOCK_STATUS)):
            return self._chunk(ChunkType.NONE, wire.CHUNK_DONE, request.cookie, request.offset, 0)
        return wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, request.cookie)

    def error(self, request: Request, number: int, text: str = "") -> bytes:
        """Failure. Row 15: structured for a READ if that was negotiated."""
        if self.extended or (self.structured and request.command in (Command.READ, Command.BLOCK_STATUS)):
            words = wire.text_payload(text)
            payload = struct.pack(">IH", number, len(words)) + words
            head = self._chunk(ChunkType.ERROR, wire.CHUNK_DONE, request.cookie, request.offset, len(payload))
            return head + payload
        return wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, number, request.cookie)

    def put_done(self, buffer: memoryview, position: int, cookie: int, offset: int) -> int:
        """Write the answer to a successful write; returns its size."""
        if self.extended:
            wire.EXTENDED_CHUNK.pack_into(
                buffer, position, wire.EXTENDED_CHUNK_MAGIC, wire.CHUNK_DONE, ChunkType.NONE, cookie, offset, 0
            )
            return wire.EXTENDED_CHUNK.size
        wire.SIMPLE_REPLY.pack_into(buffer, position, wire.SIMPLE_REPLY_MAGIC, 0, cookie)
        return wire.SIMPLE_REPLY.size

    def put_end(self, buffer: memoryview, position: int, cookie: int, offset: int) -> int:
        """Write the end of a reply to a read in several chunks; returns its size."""
        end = self._chunk(ChunkType.NONE, wire.CHUNK_DONE, cookie, offset, 0)
        buffer[position : position + len(end)] = end
        return len(end)

    def begin_whole_read(self, request: Request) -> bytes:
        """The header of a simple reply, or of a reply in one chunk, whose data follows in pieces."""
        header = bytearray(self.read_header_size)
        self.put_read_header(memoryview(header), 0, request.cookie, request.offset, request.length)
        return bytes(header)

    def data_chunk(self, request: Request, offset: int, length: int) -> bytes:
        """The header of one of several data chunks of a read."""
        head = self._chunk(ChunkType.OFFSET_DATA, 0, request.cookie, request.offset, length + 8)
        return head + struct.pack(">Q", offset)

    def hole_chunk(self, request: Request, offset: int, length: int) -> bytes:
        """One of several chunks of a read: zeros, which are not transmitted."""
        head = self._chunk(ChunkType.OFFSET_HOLE, 0, request.cookie, request.offset, 12)
        return head + struct.pack(">QI", offset, length)

    def status(self, request: Request, context_id: int, runs: bytes, *, last: bool) -> bytes:
        """The chunk of one context (row 37): `runs` as `status_runs` encodes them, as many as may be sent."""
        flags = wire.CHUNK_DONE if last else 0
        if self.extended:
            head = struct.pack(">II", context_id, len(runs) // _EXTENDED_RUN_BYTES)
            kind = ChunkType.BLOCK_STATUS_EXT
        else:
            head = struct.pack(">I", context_id)
            kind = ChunkType.BLOCK_STATUS
        return self._chunk(kind, flags, request.cookie, request.offset, len(head) + len(runs)) + head + runs

    def status_runs(self, lengths: Sequence[int], flags: Sequence[int]) -> bytes:
        """Runs on the wire: the length and flags of each."""
        pairs = np.empty((len(lengths), 2), dtype=">u8" if self.extended else ">u4")
        pairs[:, 0], pairs[:, 1] = lengths, flags
        return pairs.tobytes()
