# SPDX-License-Identifier: Apache-2.0
"""A raw NBD client for the tests, and a server in a thread for it to connect to.

The client speaks simple, structured and extended headers, and sends illegal requests as readily as legal ones. Numbers
and layouts are repeated here from the protocol document, so that a mistake in `nbd.wire` shows.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import ssl
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from vhdkit.serve.nbd.export import Export
from vhdkit.serve.nbd.options import TlsMode
from vhdkit.serve.nbd.server import NbdServer

PATIENCE_SECONDS = 60.0  # nothing here takes longer on any machine
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META, EXTENDED = (
    1,
    2,
    3,
    5,
    6,
    7,
    8,
    9,
    10,
    11,
)
ACK, REP_SERVER, REP_INFO, REP_META = 1, 2, 3, 4
UNSUP, POLICY, INVALID, TLS_REQD, UNKNOWN, SHUTDOWN, TOO_BIG, EXT_REQD = (
    (1 << 31) + number for number in (1, 2, 3, 5, 6, 7, 9, 10)
)
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(6))
HAS_FLAGS, READ_ONLY, CAN_FLUSH, CAN_FUA, _ROTATIONAL, CAN_TRIM, CAN_ZERO, CAN_DF, MULTI_CONN = (
    1 << bit for bit in range(9)
)
CAN_CACHE, CAN_FAST_ZERO, STATUS_PAYLOAD = 1 << 10, 1 << 11, 1 << 12
EPERM, EIO, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN = 1, 5, 22, 28, 75, 95, 108
NONE, OFFSET_DATA, OFFSET_HOLE, BLOCK_STATUS, BLOCK_STATUS_EXT, ERROR = 0, 1, 2, 5, 6, 0x8001
OPTION_MAGIC = b"IHAVEOPT"


def text(value: str | bytes) -> bytes:
    """A string with its length before it."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack(">I", len(raw)) + raw


def option(number: int, data: bytes = b"", *, magic: bytes = OPTION_MAGIC) -> bytes:
    """An option as bytes."""
    return magic + struct.pack(">II", number, len(data)) + data


def go_data(name: str | bytes = "", infos: Sequence[int] = (3,)) -> bytes:
    """The data of GO and INFO."""
    return text(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def meta_data(queries: Sequence[str], export: str = "") -> bytes:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    return text(export) + struct.pack(">I", len(queries)) + b"".join(text(one) for one in queries)


def request(
    command: int, offset: int = 0, length: int = 0, *, cookie: int = 1, flags: int = 0, extended: bool = False
) -> bytes:
    """The header of a request."""
    if extended:
        return struct.pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length)
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length)


def option_replies(raw: bytes) -> list[tuple[int, int, bytes]]:
    """(option, kind, payload) of all replies in `raw`, which ends with one."""
    found, position = [], 0
    while position < len(raw):
        magic, number, kind, length = struct.unpack_from(">QIII", raw, position)
        assert magic == 0x3E889045565A9
        position += 20
        assert position + length <= len(raw)
        found.append((number, kind, raw[position : position + length]))
        position += length
    return found


@dataclass(slots=True)
class Answer:
    """Everything received for one request. `kinds` lists the chunks; a simple reply has none."""

    cookie: int
    error: int = 0
    simple: bool = False
    message: str = ""
    kinds: list[int] = field(default_factory=list)
    data: list[tuple[int, bytes]] = field(default_factory=list)  # (offset, bytes)
    holes: list[tuple[int, int]] = field(default_factory=list)
    statuses: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # context id: (length, flags)

    def content(self, offset: int, length: int) -> bytes:
        """The content of a read's answer, assembled: every byte exactly once."""
        covered = bytearray(length)
        filled = bytearray(length)
        pieces = [*self.data, *((start, bytes(size)) for start, size in self.holes)]
        for start, raw in pieces:
            assert raw and offset <= start and start + len(raw) <= offset + length, "row 34: outside the request"
            begin = start - offset
            assert not any(filled[begin : begin + len(raw)]), "row 34: overlapping"
            covered[begin : begin + len(raw)] = raw
            filled[begin : begin + len(raw)] = b"\1" * len(raw)
        assert all(filled), "row 34: not all of the range was answered"
        return bytes(covered)


class HungUp(Exception):
    """The server closed the connection."""


class Client:
    """One connection. Any wait longer than PATIENCE_SECONDS raises TimeoutError."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(PATIENCE_SECONDS)
        self.structured = self.extended = False
        self.contexts: dict[int, str] = {}
        self.size = self.flags = 0
        self._cookies = itertools.count(1)
        self._asked: dict[int, tuple[int, int, int]] = {}  # cookie: (command, offset, length)
        self._partial: dict[int, Answer] = {}

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.sock.close()

    # -- bytes --------------------------------------------------------------------------------------------------

    def send_bytes(self, raw: bytes) -> None:
        """Send the bytes as they are."""
        self.sock.sendall(raw)

    def take(self, size: int) -> bytes:
        """Exactly that many bytes. Raises HungUp."""
        pieces = []
        while size:
            try:
                piece = self.sock.recv(min(size, 1 << 20))
            except (ConnectionError, ssl.SSLError) as error:
                raise HungUp from error
            if not piece:
                raise HungUp
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    def is_hung_up(self) -> bool:
        """True if the server closes the connection; False if it sends something."""
        try:
            self.take(1)
        except HungUp:
            return True
        return False

    # -- handshake ----------------------------------------------------------------------------------------------

    def greet(self, flags: int = 3) -> None:
        """Receive the greeting and answer it."""
        assert self.take(18) == b"NBDMAGICIHAVEOPT\0\3"
        self.send_bytes(struct.pack(">I", flags))

    def option(self, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; returns (kind, payload) of its replies, the last one ACK or an error."""
        self.send_bytes(option(number, data))
        return self.option_replies(number)

    def option_replies(self, number: int) -> list[tuple[int, bytes]]:
        """The replies to an option that was sent."""
        replies = []
        while True:
            magic, echoed, kind, length = struct.unpack(">QIII", self.take(20))
            assert (magic, echoed) == (0x3E889045565A9, number)
            replies.append((kind, self.take(length)))
            if kind == ACK or kind >> 31:
                return replies

    def start(self, *, structured: bool = False, extended: bool = False, contexts: Sequence[str] = ()) -> Client:
        """Greet and negotiate; the client stays in the option phase."""
        self.greet()
        if structured or contexts:
            assert self.option(STRUCTURED) == [(ACK, b"")]
            self.structured = True
        if extended:
            assert self.option(EXTENDED) == [(ACK, b"")]
            self.structured = self.extended = True
        return self

    def go(self, name: str = "", *, contexts: Sequence[str] = ()) -> Client:
        """Choose contexts and the export."""
        if contexts:
            replies = self.option(SET_META, meta_data(contexts, name))
            assert replies.pop() == (ACK, b"")
            self.contexts = {struct.unpack_from(">I", raw)[0]: raw[4:].decode() for _, raw in replies}
        replies = self.option(GO, go_data(name))
        assert replies[-1] == (ACK, b""), replies
        info = next(raw for kind, raw in replies if kind == REP_INFO and raw[:2] == b"\0\0")
        self.size, self.flags = struct.unpack(">QH", info[2:])
        return self

    # -- transmission -------------------------------------------------------------------------------------------

    def send(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b"") -> int:
        """Send a request; returns its cookie. A WRITE's length is its payload's."""
        cookie = 0xC0FFEE << 40 | next(self._cookies)
        self._asked[cookie] = (command, offset, length)
        if command == WRITE:
            length = len(payload)
        if self.extended and payload:
            flags |= PAYLOAD_LEN
            length = len(payload)
        self.send_bytes(request(command, offset, length, cookie=cookie, flags=flags, extended=self.extended) + payload)
        return cookie

    def call(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b"") -> Answer:
        """Send a request and receive its answer, the only one outstanding."""
        cookie = self.send(command, offset, length, flags=flags, payload=payload)
        answer = self.answer()
        assert answer.cookie == cookie
        return answer

    def read(self, offset: int, length: int, flags: int = 0) -> bytes:
        """The bytes of a read that must succeed."""
        answer = self.call(READ, offset, length, flags=flags)
        assert answer.error == 0, answer
        return answer.content(offset, length)

    def answers(self, count: int) -> dict[int, Answer]:
        """The next `count` answers, by cookie."""
        found = {}
        for _ in range(count):
            answer = self.answer()
            found[answer.cookie] = answer
        return found

    def answer(self) -> Answer:
        """The next complete answer. Raises HungUp."""
        while True:
            (magic,) = struct.unpack(">I", self.take(4))
            if magic == 0x67446698:
                return self._simple()
            assert magic == (0x6E8A278C if self.extended else 0x668E33EF), hex(magic)
            answer = self._chunk()
            if answer is not None:
                return answer

    def _simple(self) -> Answer:
        assert not self.extended
        error, cookie = struct.unpack(">IQ", self.take(12))
        command, offset, length = self._asked.pop(cookie)
        assert cookie not in self._partial
        answer = Answer(cookie, error, simple=True)
        if command == READ:
            assert not self.structured, "row 15: a READ's answer must be structured"
            if not error and length:
                answer.data.append((offset, self.take(length)))
        return answer

    def _chunk(self) -> Answer | None:
        if self.extended:
            flags, kind, cookie, offset, length = struct.unpack(">HHQQQ", self.take(28))
            assert offset == self._asked[cookie][1]
        else:
            assert self.structured
            flags, kind, cookie, length = struct.unpack(">HHQI", self.take(16))
        assert flags in (0, 1)
        answer = self._partial.setdefault(cookie, Answer(cookie))
        answer.kinds.append(kind)
        self._take_payload(answer, kind, self.take(length))
        if not flags & 1:
            return None
        self._asked.pop(cookie)
        return self._partial.pop(cookie)

    def _take_payload(self, answer: Answer, kind: int, raw: bytes) -> None:
        if kind == NONE:
            assert not raw
        elif kind == OFFSET_DATA:
            answer.data.append((struct.unpack_from(">Q", raw)[0], raw[8:]))
        elif kind == OFFSET_HOLE:
            answer.holes.append(struct.unpack(">QI", raw))
        elif kind == BLOCK_STATUS:
            assert not self.extended
            numbers = struct.unpack(f">{len(raw) // 4}I", raw)
            assert numbers[0] not in answer.statuses
            answer.statuses[numbers[0]] = list(zip(numbers[1::2], numbers[2::2], strict=True))
        elif kind == BLOCK_STATUS_EXT:
            assert self.extended
            context, count, *pairs = struct.unpack(f">II{(len(raw) - 8) // 8}Q", raw)
            assert len(pairs) == 2 * count and context not in answer.statuses
            answer.statuses[context] = list(zip(pairs[::2], pairs[1::2], strict=True))
        else:
            assert kind == ERROR, kind
            error, size = struct.unpack_from(">IH", raw)
            assert error and size == len(raw) - 6
            answer.error, answer.message = error, raw[6:].decode()


class Running:
    """A server in its thread."""

    def __init__(self, server: NbdServer) -> None:
        self.server = server
        self.failure: BaseException | None = None
        self._clients: list[socket.socket] = []
        self._thread = threading.Thread(target=self._run, name="nbd server", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.server.run()
        except BaseException as failure:
            self.failure = failure

    def connect(self) -> Client:
        """A new client, before its greeting."""
        ours, theirs = socket.socketpair()
        self._clients.append(ours)
        self.server.loop.post(lambda: self.server.adopt(theirs, "test"))
        return Client(ours)

    def dial(self, path: str) -> Client:
        """A new client of the unix socket at `path`, before its greeting."""
        sock = socket.socket(socket.AF_UNIX)
        self._clients.append(sock)
        sock.connect(path)
        return Client(sock)

    def client(
        self, name: str = "", *, structured: bool = False, extended: bool = False, contexts: Sequence[str] = ()
    ) -> Client:
        """A new client in its transmission phase."""
        client = self.connect().start(structured=structured or bool(contexts), extended=extended)
        return client.go(name, contexts=contexts)

    def on_loop(self) -> None:
        """Return when the loop has run the callbacks posted before."""
        done = threading.Event()
        self.server.loop.post(done.set)
        assert done.wait(PATIENCE_SECONDS)

    def end(self) -> None:
        """Stop the server and wait for its end."""
        self.server.stop()
        self.join()

    def join(self) -> None:
        """Wait for the server's end."""
        self._thread.join(PATIENCE_SECONDS)
        assert not self._thread.is_alive(), "the server does not end"

    def drop_all(self) -> None:
        """Disconnect all clients."""
        for sock in self._clients:
            sock.close()

    def close(self) -> None:
        """Disconnect all clients, then stop."""
        self.drop_all()
        self.end()


@contextlib.contextmanager
def serving(
    *exports: Export,
    tls_context: ssl.SSLContext | None = None,
    tls_mode: TlsMode = TlsMode.OFF,
    exit_last: bool = False,
) -> Iterator[Running]:
    """A running server; an error of its last flush fails the test unless `failure` was examined and cleared."""
    running = Running(NbdServer(exports, tls_context=tls_context, tls_mode=tls_mode, exit_last=exit_last))
    try:
        yield running
    finally:
        running.close()
    if running.failure is not None:
        raise running.failure
