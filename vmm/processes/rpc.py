# SPDX-License-Identifier: Apache-2.0
"""Both ends of the worker's control socket: JSON-RPC 2.0, one message a line.

Decides how many clients there may be, how long a line may be, and that an accepted request is carried out even if the
client disconnects. Progress is sent as notifications {"method": "progress"} before the result. Errors are those of
`vmm.model.errors` on both sides. How lines are split and messages encoded is decided in `vhdkit.jsonrpc`. Must not
know what the methods do.

The client is synchronous and imports little (the command line uses it); asyncio is imported only by the server.
"""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Awaitable, Callable
from types import UnionType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from vhdkit import jsonrpc
from vmm.model.errors import AccessDenied, InvalidSpec, NotFound, TimedOut, VmmError, from_document, to_document

if TYPE_CHECKING:
    import asyncio

MAX_LINE_BYTES = 4 << 20
MAX_CLIENTS = 64
ANSWER_SECONDS = 30.0
_MAX_ANSWER_BYTES = 4 * MAX_LINE_BYTES
FAILED, BAD_REQUEST, NO_METHOD, BAD_PARAMS, INTERNAL = (
    jsonrpc.FAILED, jsonrpc.INVALID_REQUEST, jsonrpc.NO_METHOD, jsonrpc.INVALID_PARAMS, jsonrpc.INTERNAL,
)  # fmt: skip
# What workers of earlier releases accepted, and the error codes with which they refused requests.
_DIALECT = jsonrpc.Dialect(needs_version=False, not_json=BAD_REQUEST, bad_method=NO_METHOD)
_PIECE_BYTES = 1 << 16
_LAST_WORDS_SECONDS = 2.0

Progress: TypeAlias = Callable[[dict[str, Any]], None]
Method: TypeAlias = Callable[[dict[str, Any], Progress], Awaitable[object]]


class ControlServer:
    """Answer requests on a listening socket. Each method takes its parameters and a function that reports progress."""

    def __init__(self, methods: dict[str, Method], on_crash: Callable[[str], None] = lambda text: None) -> None:
        self.methods = methods
        self._on_crash = on_crash
        self._server: asyncio.Server | None = None
        self._calls: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._clients: set[asyncio.Task[None]] = set()

    async def start(self, sock: socket.socket) -> None:
        """Accept clients on a listening socket, which is closed with the server."""
        import asyncio

        def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            client = asyncio.create_task(self._serve(reader, writer))
            self._clients.add(client)
            client.add_done_callback(self._clients.discard)

        self._server = await asyncio.start_unix_server(take, sock=sock, limit=_PIECE_BYTES)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        import asyncio

        if len(self._writers) >= MAX_CLIENTS:
            writer.close()
            return
        self._writers.add(writer)
        lines = jsonrpc.LineBuffer(MAX_LINE_BYTES)
        try:
            while (line := await _next_line(reader, lines)) is not None:
                call = asyncio.create_task(self._answer(line, writer))
                self._calls.add(call)
                call.add_done_callback(self._calls.discard)
                await asyncio.wait({call})  # one call at a time; it continues if the client disconnects
        except ConnectionError:
            pass
        except jsonrpc.LineTooLong as problem:
            _send(writer, jsonrpc.encode_failure(None, BAD_REQUEST, str(problem)))
        finally:
            self._writers.discard(writer)
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            writer.close()

    async def _answer(self, line: bytes, writer: asyncio.StreamWriter) -> None:
        try:
            request = jsonrpc.parse_request(line, _DIALECT)
            method = self.methods.get(request.method)
            if method is None:
                text = f"unknown method; the methods are {', '.join(self.methods)}"
                raise jsonrpc.RefusedRequest(NO_METHOD, text, request.id)
        except jsonrpc.RefusedRequest as problem:
            _send(writer, problem.answer())
            return

        def report(document: dict[str, Any]) -> None:
            _send(writer, jsonrpc.encode_notification("progress", document))

        try:
            result = await method(request.params, report)
            _send(writer, jsonrpc.encode_result(request.id, result))
        except VmmError as error:
            _send(writer, jsonrpc.encode_failure(request.id, FAILED, str(error), to_document(error)))
        except Exception as error:  # a bug in vmm: the machine keeps running
            import traceback

            self._on_crash(traceback.format_exc())
            text = f"internal error: {type(error).__name__}: {error}"
            _send(writer, jsonrpc.encode_failure(request.id, INTERNAL, text))

    async def close(self) -> None:
        """Stop accepting clients, finish the calls in progress within a short time, and disconnect."""
        import asyncio

        if self._server is not None:
            self._server.close()
        if self._calls:
            await asyncio.wait(set(self._calls), timeout=_LAST_WORDS_SECONDS)
        for writer in list(self._writers):
            with contextlib.suppress(ConnectionError, TimeoutError):
                await asyncio.wait_for(writer.drain(), _LAST_WORDS_SECONDS)
            writer.close()
        if self._clients:
            await asyncio.wait(set(self._clients), timeout=_LAST_WORDS_SECONDS)


def parameter(params: dict[str, Any], name: str, kind: type | UnionType, default: object = None) -> Any:
    """A parameter of type `kind`; the default if it is absent or null. Raises InvalidSpec for another type."""
    value = params.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InvalidSpec(f"the parameter {name!r} is not of type {getattr(kind, '__name__', kind)}")
    if isinstance(value, float) and math.isnan(value):  # a NaN as a timeout would never expire
        raise InvalidSpec(f"the parameter {name!r} is not a number")
    return value


async def _next_line(reader: asyncio.StreamReader, lines: jsonrpc.LineBuffer) -> bytes | None:
    """The client's next line; None after it disconnected. Raises ConnectionError, LineTooLong."""
    while (line := lines.next_line()) is None:
        piece = await reader.read(_PIECE_BYTES)
        if not piece:
            return None
        lines.feed(piece)
    return line


def _send(writer: asyncio.StreamWriter, line: bytes) -> None:
    if not writer.is_closing():
        writer.write(line)


# -- the other end --------------------------------------------------------------------------------------------------


class ControlClient:
    """A connection to a worker. Usable as a context manager."""

    def __init__(self, path: str, *, machine: str | None = None) -> None:
        """Connect. Raises NotFound if no worker is listening, AccessDenied."""
        self.path = path
        self.machine = machine
        self._caller = jsonrpc.Caller(_MAX_ANSWER_BYTES)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            if isinstance(error, PermissionError):
                raise AccessDenied("you may not control this machine", machine=machine, path=path) from error
            raise NotFound("no worker is listening", machine=machine, path=path) from error

    def call(
        self,
        method: str,
        *,
        timeout_seconds: float | None = ANSWER_SECONDS,
        progress: Progress | None = None,
        **params: object,
    ) -> Any:
        """The method's result. Raises the error that the worker reported, TimedOut, or VmmError if the connection is
        lost.

        `timeout_seconds` is the longest silence between two messages; None waits forever.
        """
        request = self._caller.request(method, params)
        try:
            self._socket.settimeout(timeout_seconds)  # the full time again, not what an earlier call left of it
            self._socket.sendall(request)
            while isinstance(message := self._next_message(method, timeout_seconds), jsonrpc.Notification):
                if message.method == "progress" and progress is not None:
                    progress(message.params)
            return self._result(message)
        except TimeoutError as error:
            raise TimedOut(
                f"the worker did not answer {method} within {timeout_seconds:g} s", machine=self.machine
            ) from error
        except OSError as error:
            raise VmmError(f"the connection to the worker was lost during {method}", machine=self.machine) from error
        except jsonrpc.ProtocolError as error:
            raise VmmError("no worker answers there", machine=self.machine, path=self.path) from error

    def _result(self, answer: jsonrpc.Answer) -> Any:
        failure = answer.failure
        if failure is None:
            return answer.result
        error = from_document(failure.data if isinstance(failure.data, dict) else {"problem": failure.message})
        if error.machine is None:
            error.machine = self.machine
        raise error

    def _next_message(self, method: str, timeout_seconds: float | None) -> jsonrpc.Answer | jsonrpc.Notification:
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while (message := self._caller.next_message()) is None:
            self._socket.settimeout(None if deadline is None else max(0.001, deadline - time.monotonic()))
            piece = self._socket.recv(_PIECE_BYTES)
            if not piece:
                raise VmmError(f"the worker ended during {method}", machine=self.machine)
            self._caller.feed(piece)
        return message

    def close(self) -> None:
        """Disconnect."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
