# SPDX-License-Identifier: Apache-2.0
"""Both ends of the worker's control socket: JSON-RPC 2.0, one message a line.

Decides how a request, its progress and its result are encoded, and that both sides are bounded. A request that was
accepted is carried out even if the client disconnects. Progress is sent in notifications {"method": "progress"} before
the result. Errors are `vmm.model.errors` on both sides. Must not know what the methods do.

The client is synchronous and light (the command line uses it); asyncio is imported only with the server.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import time
from collections.abc import Awaitable, Callable
from types import UnionType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from vmm.model.errors import AccessDenied, InvalidSpec, NotFound, TimedOut, VmmError, from_document, to_document

if TYPE_CHECKING:
    import asyncio

MAX_LINE_BYTES = 4 << 20
MAX_CLIENTS = 64
ANSWER_SECONDS = 30.0
FAILED, BAD_REQUEST, NO_METHOD, BAD_PARAMS, INTERNAL = -32000, -32600, -32601, -32602, -32603
_PIECE_BYTES = 1 << 16
_LAST_WORDS_SECONDS = 2.0

Progress: TypeAlias = Callable[[dict[str, Any]], None]
Method: TypeAlias = Callable[[dict[str, Any], Progress], Awaitable[object]]


class ControlServer:
    """Answers on a listening socket. `methods` take the parameters and a function that tells how far they are."""

    def __init__(self, methods: dict[str, Method], on_crash: Callable[[str], None] = lambda text: None) -> None:
        self.methods = methods
        self._on_crash = on_crash
        self._server: asyncio.Server | None = None
        self._calls: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._clients: set[asyncio.Task[None]] = set()

    async def start(self, sock: socket.socket) -> None:
        """Take clients from a listening socket, which is closed with the server."""
        import asyncio

        def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            client = asyncio.create_task(self._serve(reader, writer))
            self._clients.add(client)
            client.add_done_callback(self._clients.discard)

        self._server = await asyncio.start_unix_server(take, sock=sock, limit=MAX_LINE_BYTES)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        import asyncio

        if len(self._writers) >= MAX_CLIENTS:
            writer.close()
            return
        self._writers.add(writer)
        try:
            while True:
                try:
                    line = await reader.readuntil(b"\n")
                except (asyncio.IncompleteReadError, ConnectionError):
                    return
                except asyncio.LimitOverrunError:
                    _send(writer, _failure(None, BAD_REQUEST, f"a line has at most {MAX_LINE_BYTES} bytes"))
                    return
                call = asyncio.create_task(self._answer(line, writer))
                self._calls.add(call)
                call.add_done_callback(self._calls.discard)
                await asyncio.wait({call})  # one at a time; not ended with the connection
        finally:
            self._writers.discard(writer)
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            writer.close()

    async def _answer(self, line: bytes, writer: asyncio.StreamWriter) -> None:
        number: object = None
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise ValueError("a request is an object")
            number = request.get("id")
            method = self.methods.get(str(request.get("method")))
            params = request.get("params", {})
        except (ValueError, RecursionError):
            _send(writer, _failure(None, BAD_REQUEST, "a request is one JSON object on one line"))
            return
        if method is None:
            _send(writer, _failure(number, NO_METHOD, f"there is no such method; there are {', '.join(self.methods)}"))
            return
        if not isinstance(params, dict):
            _send(writer, _failure(number, BAD_PARAMS, "parameters are given by name"))
            return

        def tell(document: dict[str, Any]) -> None:
            _send(writer, {"jsonrpc": "2.0", "method": "progress", "params": document})

        try:
            result = await method(params, tell)
            _send(writer, {"jsonrpc": "2.0", "id": number, "result": result})
        except VmmError as error:
            _send(writer, _failure(number, FAILED, str(error), to_document(error)))
        except Exception as error:  # a mistake of ours: the machine runs on
            import traceback

            self._on_crash(traceback.format_exc())
            _send(writer, _failure(number, INTERNAL, f"internal error: {type(error).__name__}: {error}"))

    async def close(self) -> None:
        """Take no more clients, let those that wait have their answers, hang up."""
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
    """A parameter of that kind; the default where it is absent or null. Raises InvalidSpec for another kind."""
    value = params.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InvalidSpec(f"the parameter {name!r} is not of the kind {getattr(kind, '__name__', kind)}")
    if isinstance(value, float) and math.isnan(value):  # no time would ever be over
        raise InvalidSpec(f"the parameter {name!r} is not a number")
    return value


def _send(writer: asyncio.StreamWriter, document: dict[str, Any]) -> None:
    if not writer.is_closing():
        writer.write(json.dumps(document).encode() + b"\n")


def _failure(number: object, code: int, text: str, data: object = None) -> dict[str, Any]:
    problem: dict[str, Any] = {"code": code, "message": text}
    if data is not None:
        problem["data"] = data
    return {"jsonrpc": "2.0", "id": number, "error": problem}


# -- the other end --------------------------------------------------------------------------------------------------


class ControlClient:
    """A connection to a worker. Usable as a context manager."""

    def __init__(self, path: str, *, machine: str | None = None) -> None:
        """Connect. Raises NotFound where no worker listens, AccessDenied."""
        self.path = path
        self.machine = machine
        self._number = 0
        self._received = b""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            if isinstance(error, PermissionError):
                raise AccessDenied("may not be controlled by you", machine=machine, path=path) from error
            raise NotFound("no worker is listening", machine=machine, path=path) from error

    def call(
        self,
        method: str,
        *,
        timeout_seconds: float | None = ANSWER_SECONDS,
        progress: Progress | None = None,
        **params: object,
    ) -> Any:
        """The method's result. Raises the error that the worker met, TimedOut, or VmmError when it goes away.

        `timeout_seconds` is between two signs of life; None waits for ever.
        """
        self._number += 1
        request = {"jsonrpc": "2.0", "id": self._number, "method": method, "params": params}
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            while True:
                answer = self._next_message(method, timeout_seconds)
                if answer.get("method") == "progress":
                    if progress is not None:
                        progress(answer["params"])
                elif answer.get("id") == self._number or answer.get("id") is None:
                    return self._result(answer)
        except OSError as error:
            raise VmmError(f"the worker went away during {method}", machine=self.machine) from error

    def _result(self, answer: dict[str, Any]) -> Any:
        problem = answer.get("error")
        if problem is None:
            return answer.get("result")
        error = from_document(problem.get("data") or {"problem": problem.get("message")})
        if error.machine is None:
            error.machine = self.machine
        raise error

    def _next_message(self, method: str, timeout_seconds: float | None) -> dict[str, Any]:
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while b"\n" not in self._received:
            self._socket.settimeout(None if deadline is None else max(0.001, deadline - time.monotonic()))
            try:
                piece = self._socket.recv(_PIECE_BYTES)
            except TimeoutError as error:
                raise TimedOut(
                    f"the worker did not answer {method} within {timeout_seconds:g} s", machine=self.machine
                ) from error
            if not piece:
                raise VmmError(f"the worker ended during {method}", machine=self.machine)
            self._received += piece
            if len(self._received) > 4 * MAX_LINE_BYTES:
                raise VmmError("what answers there is not a worker", machine=self.machine, path=self.path)
        line, _, self._received = self._received.partition(b"\n")
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise VmmError("what answers there is not a worker", machine=self.machine, path=self.path) from error
        if not isinstance(answer, dict):
            raise VmmError("what answers there is not a worker", machine=self.machine, path=self.path)
        return answer

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
