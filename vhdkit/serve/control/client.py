# SPDX-License-Identifier: Apache-2.0
"""The client side of the control socket: sends a request to a running server and waits for the answer.

Decides how an answer becomes a result, or the error that occurred in the server. The server is trusted no more than a
client: the size of an answer is bounded.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Any, Self

from vhdkit import errors, jsonrpc
from vhdkit.arguments import AnyPath
from vhdkit.arguments import path as checked_path
from vhdkit.store import translated
from vhdkit.units import KIB, MIB

MAX_ANSWER_BYTES = 16 * MIB
ANSWER_SECONDS = 600.0  # flushing a slow disk can take long
_START = "start one: vhdkit serve IMAGE --control PATH"


class ControlClient:
    """A connection to a server's control socket."""

    def __init__(self, path: AnyPath, *, timeout_seconds: float | None = ANSWER_SECONDS) -> None:
        """Connect. With `timeout_seconds` None, an answer may take any time.

        Raises NotFound where no server listens, AccessDenied, InvalidArgument.
        """
        path = self.path = checked_path("path", path)
        self._caller = jsonrpc.Caller(MAX_ANSWER_BYTES)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with translated(path, "reach the server"):
                self._socket.connect(path)  # before the timeout is set: a short queue must not become an error
            self._socket.settimeout(timeout_seconds)
        except errors.NotFound as error:
            self._socket.close()
            raise errors.NotFound("no server is listening there", path=path, hint=_START) from error
        except errors.IoFailed as error:
            self._socket.close()
            if isinstance(error.__cause__, ConnectionRefusedError):
                raise errors.NotFound("no server is listening there", path=path, hint=_START) from error
            raise
        except BaseException:
            self._socket.close()
            raise

    def call(self, method: str, **params: object) -> Any:
        """The method's result. Raises the error that occurred in the server, and IoFailed if it does not answer."""
        request = self._caller.request(method, params)
        try:
            with translated(self.path, "talk to the server"):
                self._socket.sendall(request)
                answer = self._receive()
        except jsonrpc.ProtocolError as error:
            raise errors.IoFailed("the program that answers there is not a vhdkit server", path=self.path) from error
        if answer.failure is not None:
            raise _error_of(answer.failure)
        return answer.result

    def _receive(self) -> jsonrpc.Answer:
        while (answer := self._caller.next_answer()) is None:
            piece = self._socket.recv(64 * KIB)
            if not piece:
                raise errors.IoFailed("the server closed the connection without an answer", path=self.path)
            self._caller.feed(piece)
        return answer

    def interrupt(self) -> None:
        """End the call for which another thread waits: it raises IoFailed there. The server goes on with it."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _error_of(failure: jsonrpc.Failure) -> errors.VhdkitError:
    """The server's error as one of ours: of the same class if that class takes only a message."""
    data = failure.data if isinstance(failure.data, dict) else {}
    kind = getattr(errors, str(data.get("kind")), None)
    if not (isinstance(kind, type) and issubclass(kind, errors.VhdkitError)) or kind is errors.CorruptImage:
        kind = errors.VhdkitError
    text = str(data.get("problem") or failure.message)
    error: errors.VhdkitError = kind(text, path=data.get("path"), hint=data.get("hint"))
    code = data.get("exit_code")
    error.exit_code = code if isinstance(code, int) else 1 if failure.code == jsonrpc.INTERNAL else 2
    return error
