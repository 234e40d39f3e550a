# SPDX-License-Identifier: Apache-2.0
"""The control socket of a `user` switch: JSON-RPC 2.0, one message a line, on the switch's own loop.

Decides how requests are spelled, and that a client cannot hold up the switch: a line has at most MAX_LINE_BYTES,
there are at most MAX_CLIENTS, and who does not read its answers is hung up on. A client that asked for a capture gets
the answer and from then on the stream of `capture`. What a method does is decided in `user_switch`.
"""

from __future__ import annotations

import json
import logging
import select
import socket
from collections.abc import Callable
from typing import Any, TypeAlias

from vmm.model import errors
from vmm.net.capture import Capture

MAX_LINE_BYTES = 192 << 10  # a thousand fixed addresses with long names
MAX_ANSWER_BYTES = 4 << 20
MAX_CLIENTS = 64
_FAILED, _PARSE, _INVALID, _NO_METHOD, _INTERNAL = -32000, -32700, -32600, -32601, -32603
_log = logging.getLogger(__name__)

Method: TypeAlias = Callable[[dict[str, Any]], object]
Handler: TypeAlias = Callable[[int], None]


class Loop:
    """Descriptors and what to call when they are ready."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}

    def watch(self, descriptor: int, events: int, handler: Handler) -> None:
        """Call `handler` with the events whenever one happens; replaces what was watched before."""
        if descriptor in self._handlers:
            self._epoll.modify(descriptor, events)
        else:
            self._epoll.register(descriptor, events)
        self._handlers[descriptor] = handler

    def unwatch(self, descriptor: int) -> None:
        """Call nobody any more."""
        if self._handlers.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def run_once(self, timeout_seconds: float) -> None:
        """Wait for events and call the handlers."""
        for descriptor, events in self._epoll.poll(timeout_seconds):
            handler = self._handlers.get(descriptor)
            if handler is not None:
                handler(events)

    def close(self) -> None:
        """Give the descriptor back."""
        self._epoll.close()


class ControlServer:
    """Takes clients from a listening socket and answers them by `methods`."""

    def __init__(
        self,
        loop: Loop,
        listener: socket.socket,
        methods: dict[str, Method],
        start_capture: Callable[[dict[str, Any]], Capture],
        stop_capture: Callable[[Capture], None],
    ) -> None:
        self.loop = loop
        self.methods = methods
        self.start_capture = start_capture
        self.stop_capture = stop_capture
        self.clients: set[_Client] = set()
        self._listener = listener
        listener.setblocking(False)
        loop.watch(listener.fileno(), select.EPOLLIN, self._accept)

    def _accept(self, events: int) -> None:
        del events
        try:
            sock, _ = self._listener.accept()
        except OSError:  # it went away again, or there are no descriptors: the next event asks again
            return
        if len(self.clients) >= MAX_CLIENTS:
            sock.close()
            return
        sock.setblocking(False)
        self.clients.add(_Client(self, sock))

    def pump_captures(self) -> None:
        """Send what was captured since the last call."""
        for client in list(self.clients):
            if client.capture is not None:
                client.stream()

    def close(self) -> None:
        """Hang up."""
        for client in list(self.clients):
            client.close()
        self.loop.unwatch(self._listener.fileno())
        self._listener.close()

    def answer(self, line: bytes, client: _Client) -> bytes:
        """The line that answers `line`; nothing for a notification."""
        number: object = None
        try:
            request = json.loads(line)
            if not isinstance(request, dict) or request.get("jsonrpc") != "2.0":
                return _failure(None, _INVALID, 'a request is one JSON object with "jsonrpc": "2.0"')
            number = request.get("id")
            name, params = request.get("method"), request.get("params", {})
            if not isinstance(params, dict):
                return _failure(number, _INVALID, "parameters are given by name")
            if name == "capture":
                client.capture = self.start_capture(params)
                result: object = {}
            elif isinstance(name, str) and name in self.methods:
                result = self.methods[name](params)
            else:
                return _failure(number, _NO_METHOD, f"there is no method {name!r}")
        except errors.VmmError as error:
            return _failure(number, _FAILED, str(error), errors.to_document(error))
        except (ValueError, RecursionError):
            return _failure(None, _PARSE, "this is no JSON")
        except Exception as error:  # a mistake of ours: frames are moved on
            _log.exception("control: an internal error")
            return _failure(number, _INTERNAL, f"internal error: {type(error).__name__}")
        return _line({"jsonrpc": "2.0", "id": number, "result": result})


def _line(document: object) -> bytes:
    return json.dumps(document).encode() + b"\n"


def _failure(number: object, code: int, text: str, data: object = None) -> bytes:
    problem: dict[str, object] = {"code": code, "message": text}
    if data is not None:
        problem["data"] = data
    return _line({"jsonrpc": "2.0", "id": number, "error": problem})


class _Client:
    """Somebody at the control socket."""

    def __init__(self, server: ControlServer, sock: socket.socket) -> None:
        self._server = server
        self._socket = sock
        self._input = bytearray()
        self._output = bytearray()
        self.capture: Capture | None = None
        server.loop.watch(sock.fileno(), select.EPOLLIN, self._ready)

    def _ready(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self._send()
        if events & ~select.EPOLLOUT:
            try:
                received = self._socket.recv(MAX_LINE_BYTES)
            except BlockingIOError:
                return
            except OSError:
                received = b""
            if not received:
                self.close()
                return
            self._take(received)

    def _take(self, received: bytes) -> None:
        if self.capture is not None:
            return  # it has nothing more to say
        self._input += received
        while (end := self._input.find(b"\n")) >= 0:
            line = bytes(self._input[:end])
            del self._input[: end + 1]
            if line.strip():
                self._output += self._server.answer(line, self)
        if len(self._input) > MAX_LINE_BYTES or len(self._output) > MAX_ANSWER_BYTES:
            self.close()
            return
        self._send()

    def stream(self) -> None:
        """Hand over what was captured."""
        assert self.capture is not None
        if not self._output and self.capture.pending:
            self._output, self.capture.pending = self.capture.pending, self._output
            self._send()

    def _send(self) -> None:
        try:
            if self._output:
                sent = self._socket.send(self._output)
                del self._output[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        events = select.EPOLLIN | (select.EPOLLOUT if self._output else 0)
        self._server.loop.watch(self._socket.fileno(), events, self._ready)

    def close(self) -> None:
        """Hang up; a capture ends."""
        if self in self._server.clients:
            self._server.clients.discard(self)
            self._server.loop.unwatch(self._socket.fileno())
            self._socket.close()
            if self.capture is not None:
                self._server.stop_capture(self.capture)
