# SPDX-License-Identifier: Apache-2.0
"""The control socket: JSON-RPC 2.0, one message per line, on the same loop as the NBD clients.

Decides the limits of a client: a line has at most `MAX_LINE_BYTES`, one request of a client is processed at a time,
and nothing more is read from it meanwhile. How lines are split and messages encoded is decided in `vhdkit.jsonrpc`,
what a method does in `operations`. Methods that may take long run one after the other on a thread of their own, never
on the loop's workers, because holding an export waits for those; methods that take minutes get a thread each. The
kernel reports the user of each client (SO_PEERCRED): clients of other users can call only some methods, or none.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from vhdkit import errors, jsonrpc
from vhdkit.jsonrpc import FAILED, INTERNAL, INVALID_PARAMS, INVALID_REQUEST, NO_METHOD
from vhdkit.serve.nbd.channel import Channel
from vhdkit.serve.nbd.loop import READABLE, WRITABLE, Loop
from vhdkit.units import KIB

MAX_LINE_BYTES = 64 * KIB
MAX_CLIENTS = 32
_ACCEPT_AGAIN_SECONDS = 0.2  # out of descriptors: a moment later some may be free
_PEER = struct.Struct("3i")  # struct ucred: process, user, group
_log = logging.getLogger(__name__)

Params: TypeAlias = dict[str, Any]
Reply: TypeAlias = Callable[[bytes], None]


@dataclass(frozen=True, slots=True)
class Method:
    """A method that clients can call. `work` raises VhdkitError, or BadParams for wrong parameters."""

    work: Callable[[Params], object]
    takes_long: bool = False
    takes_minutes: bool = False  # runs on a thread of its own, so that nothing else waits; at most one per client


class BadParams(Exception):
    """The parameters of a request are not what the method takes."""


class Control:
    """The control socket of one server. All methods run on the loop's thread, `close` after the loop has ended."""

    def __init__(
        self, loop: Loop, methods: dict[str, Method], strangers_methods: dict[str, Method] | None = None
    ) -> None:
        """`strangers_methods`: for peers that are neither our user nor root; if None, such peers are disconnected."""
        self.loop = loop
        self._methods = methods
        self._strangers_methods = strangers_methods
        self._clients: set[_Client] = set()
        self._long: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None
        self._minutes: list[threading.Thread] = []

    def listen(self, sock: socket.socket) -> None:
        """Accept clients on a listening socket, which stays the caller's."""
        sock.setblocking(False)
        self.loop.watch(sock.fileno(), READABLE, lambda events: self._accept(sock))

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # out of descriptors: do not retry at once
            _log.error("control: cannot accept a client: %s", error)
            self.loop.unwatch(listener.fileno())
            self.loop.call_later(_ACCEPT_AGAIN_SECONDS, lambda: self.listen(listener))
            return
        methods = self._methods if _is_ours(sock) else self._strangers_methods
        if len(self._clients) >= MAX_CLIENTS or methods is None:
            sock.close()
            return
        sock.setblocking(False)
        self._clients.add(_Client(self, sock, methods, self._clients.discard))

    def close(self) -> None:
        """Wait for requests in progress, then disconnect. Methods that take minutes notice the end themselves."""
        for thread in self._minutes:
            thread.join()
        if self._worker is not None:
            self._long.put(None)
            self._worker.join()
        for client in list(self._clients):
            client.forget()

    # -- requests -----------------------------------------------------------------------------------------------

    def call(self, raw: bytes, methods: dict[str, Method], reply: Reply) -> None:
        """Execute the request on the line with one of `methods`; `reply` gets the answer, if any, now or later."""
        try:
            request = jsonrpc.parse_request(raw)
            method = methods.get(request.method)
            if method is None:
                text = f"no such method; there are {', '.join(methods)}"
                raise jsonrpc.RefusedRequest(NO_METHOD, text, request.id)
        except jsonrpc.RefusedRequest as problem:
            reply(problem.answer())
            return

        def run() -> bytes:
            answer = _answer(request, method)
            return b"" if request.is_notification else answer

        if method.takes_minutes:
            thread = threading.Thread(target=self._run_long, args=(run, reply), name="control-minutes", daemon=True)
            self._minutes = [one for one in self._minutes if one.is_alive()] + [thread]
            thread.start()
            return
        if not method.takes_long:
            reply(run())
            return
        self._start_worker()
        self._long.put(lambda: self._run_long(run, reply))

    def _run_long(self, run: Callable[[], bytes], reply: Reply) -> None:
        answer = run()
        self.loop.post(lambda: reply(answer))

    def _start_worker(self) -> None:
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="control", daemon=True)
            self._worker.start()

    def _work(self) -> None:
        while (job := self._long.get()) is not None:
            job()


def _is_ours(sock: socket.socket) -> bool:
    """True for a peer that has our user's access to files, by the credentials the kernel noted when it connected."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    _, user_id, _ = _PEER.unpack(raw)
    return user_id in (0, os.geteuid())


def _answer(request: jsonrpc.Request, method: Method) -> bytes:
    """Run the method; returns the line with its result or failure."""
    try:
        return jsonrpc.encode_result(request.id, method.work(request.params))
    except BadParams as problem:
        return jsonrpc.encode_failure(request.id, INVALID_PARAMS, str(problem))
    except errors.VhdkitError as error:
        data = {
            "kind": type(error).__name__,
            "exit_code": error.exit_code,
            "problem": error.problem,
            "path": error.path,
            "hint": error.hint,
        }
        return jsonrpc.encode_failure(request.id, FAILED, str(error), data)
    except Exception as error:  # a bug in our code: the disks remain served
        _log.exception("control: an internal error")
        return jsonrpc.encode_failure(request.id, INTERNAL, f"internal error: {type(error).__name__}")


class _Client:
    """One client of the control socket."""

    def __init__(
        self, control: Control, sock: socket.socket, methods: dict[str, Method], left: Callable[[_Client], None]
    ) -> None:
        self._control = control
        self._methods = methods
        self._left = left
        self._channel = Channel(control.loop, sock, self._proceed)
        self._room = memoryview(bytearray(MAX_LINE_BYTES + 1))
        self._lines = jsonrpc.LineBuffer(MAX_LINE_BYTES)
        self._busy = False  # a request is in progress
        self._ended = False  # it sends nothing more, or is not read from any more

    def _proceed(self, events: int = 0) -> None:
        try:
            self._channel.ready_to_send(events)
            if events & ~WRITABLE and not self._blocked():
                self._receive()
            while not self._blocked() and self._take_line():
                pass
        except OSError:
            self._channel.close()
        done = self._ended and not (self._busy or self._channel.unsent or self._lines.has_line)
        if done or self._channel.is_closed():
            self._channel.close()
            self._left(self)
        else:
            self._channel.watch(reading=not self._blocked() and not self._ended)

    def _blocked(self) -> bool:
        return self._busy or bool(self._channel.unsent) or self._channel.is_closed()

    def _receive(self) -> None:
        received = self._channel.receive_into(self._room)
        if received == 0:
            self._ended = True
        elif received:
            self._lines.feed(self._room[:received])

    def _take_line(self) -> bool:
        """Serve the next complete line; False if there is none."""
        try:
            raw = self._lines.next_line()
        except jsonrpc.LineTooLong as problem:
            self._ended = True
            self._channel.send(jsonrpc.encode_failure(None, INVALID_REQUEST, str(problem)))
            return False
        if raw is None:
            return False
        if raw.strip():
            self._busy = True
            self._control.call(raw, self._methods, self._reply)
        return True

    def _reply(self, answer: bytes) -> None:
        later = self._busy
        self._busy = False
        self._channel.send(answer)
        if later:
            self._control.loop.post(self._proceed)

    def forget(self) -> None:
        """The loop has ended: close the socket."""
        self._channel.close()
