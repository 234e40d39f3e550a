# SPDX-License-Identifier: Apache-2.0
"""The control socket of a `user` switch: JSON-RPC 2.0, one message per line, on the switch's own loop.

Decides that a client cannot hold up the switch: a line has at most MAX_LINE_BYTES, there are at most MAX_CLIENTS, and
a client that does not read its answers is disconnected. A client that asked for a capture gets the answer and then the
stream of `capture`. How lines are split and messages encoded is decided in `vhdkit.jsonrpc`, what a method does in
`user_switch`.
"""

from __future__ import annotations

import logging
import select
import socket
from collections.abc import Callable
from typing import Any, TypeAlias

from vhdkit import jsonrpc
from vmm.model import errors
from vmm.net.capture import PacketCapture

MAX_LINE_BYTES = 192 << 10  # a thousand fixed addresses with long names
MAX_ANSWER_BYTES = 4 << 20
MAX_CLIENTS = 64
# The codes with which switches of earlier releases refused requests.
_DIALECT = jsonrpc.Dialect(bad_method=jsonrpc.NO_METHOD, bad_params=jsonrpc.INVALID_REQUEST)
_log = logging.getLogger(__name__)

Method: TypeAlias = Callable[[dict[str, Any]], object]
Handler: TypeAlias = Callable[[int], None]


class Loop:
    """Descriptors, and what to call when they are ready."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}

    def watch(self, descriptor: int, events: int, handler: Handler) -> None:
        """Call `handler` with the events whenever one occurs; replaces an earlier handler."""
        if descriptor in self._handlers:
            self._epoll.modify(descriptor, events)
        else:
            self._epoll.register(descriptor, events)
        self._handlers[descriptor] = handler

    def unwatch(self, descriptor: int) -> None:
        """Stop watching it."""
        if self._handlers.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def run_once(self, timeout_seconds: float) -> None:
        """Wait for events and call the handlers."""
        for descriptor, events in self._epoll.poll(timeout_seconds):
            handler = self._handlers.get(descriptor)
            if handler is not None:
                handler(events)

    def close(self) -> None:
        """Close the descriptor."""
        self._epoll.close()


class ControlServer:
    """Accepts clients from a listening socket and answers them with `methods`."""

    def __init__(
        self,
        loop: Loop,
        listener: socket.socket,
        methods: dict[str, Method],
        start_capture: Callable[[dict[str, Any]], PacketCapture],
        stop_capture: Callable[[PacketCapture], None],
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
        except OSError:  # the client has gone, or no descriptor is left: the next event tries again
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
        """Disconnect all clients."""
        for client in list(self.clients):
            client.close()
        self.loop.unwatch(self._listener.fileno())
        self._listener.close()

    def answer(self, line: bytes, client: _Client) -> bytes:
        """The line that answers `line`, even if the request has no id."""
        try:
            request = jsonrpc.parse_request(line, _DIALECT)
            if request.method != "capture" and request.method not in self.methods:
                raise jsonrpc.RefusedRequest(jsonrpc.NO_METHOD, f"unknown method {request.method!r}", request.id)
        except jsonrpc.RefusedRequest as problem:
            return problem.answer()
        try:
            return jsonrpc.encode_result(request.id, self._result(request, client))
        except errors.VmmError as error:
            return jsonrpc.encode_failure(request.id, jsonrpc.FAILED, str(error), errors.to_document(error))
        except Exception as error:  # a mistake of ours: frames must still be moved
            _log.exception("control: an internal error")
            text = f"internal error: {type(error).__name__}"
            return jsonrpc.encode_failure(request.id, jsonrpc.INTERNAL, text)

    def _result(self, request: jsonrpc.Request, client: _Client) -> object:
        if request.method != "capture":
            return self.methods[request.method](request.params)
        client.capture = self.start_capture(request.params)
        return {}


class _Client:
    """A connection to the control socket."""

    def __init__(self, server: ControlServer, sock: socket.socket) -> None:
        self._server = server
        self._socket = sock
        self._lines = jsonrpc.LineBuffer(MAX_LINE_BYTES)
        self._output = bytearray()
        self.capture: PacketCapture | None = None
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
            return  # it must not send anything more
        self._lines.feed(received)
        try:
            while (line := self._lines.next_line()) is not None:
                if line.strip():
                    self._output += self._server.answer(line, self)
        except jsonrpc.LineTooLong:
            self.close()
            return
        if len(self._output) > MAX_ANSWER_BYTES:
            self.close()
            return
        self._send()

    def stream(self) -> None:
        """Send what was captured."""
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
        """Disconnect; a capture ends."""
        if self in self._server.clients:
            self._server.clients.discard(self)
            self._server.loop.unwatch(self._socket.fileno())
            self._socket.close()
            if self.capture is not None:
                self._server.stop_capture(self.capture)
