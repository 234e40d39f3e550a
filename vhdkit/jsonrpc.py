# SPDX-License-Identifier: Apache-2.0
"""JSON-RPC 2.0, one message per line, without any I/O: the protocol of every control socket of vhdkit and vmm.

Decides where a line ends and how long it may be, which lines are requests and answers, and how requests, results,
errors and notifications are encoded. A peer is not trusted: whatever bytes arrive, in whatever pieces, memory stays
bounded and the only exceptions are `ProtocolError`s. Must not know sockets, event loops, methods, or the errors that
methods raise; the adapters (`serve/control` here, `processes/rpc` and `net/switch_control` in vmm) translate those.

    server: bytes received -> LineBuffer.feed, next_line -> parse_request -> (the method) -> encode_result -> bytes
    client: Caller.request -> bytes;  bytes received -> Caller.feed, next_message -> Answer or Notification

The specification is https://www.jsonrpc.org/specification. Batches are not supported: a request is one object.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, TypeAlias

PARSE_ERROR, INVALID_REQUEST, NO_METHOD, INVALID_PARAMS, INTERNAL = -32700, -32600, -32601, -32602, -32603
FAILED = -32000  # the first code that the specification leaves to servers: the method failed, with details in `data`
_VERSION = "2.0"

Id: TypeAlias = int | float | str | None


class ProtocolError(ValueError):
    """A peer sent something that is not this protocol."""


class LineTooLong(ProtocolError):
    """A line exceeds the limit; nothing more can be read from this peer."""


class BadMessage(ProtocolError):
    """A line received by a caller is neither an answer nor a notification."""


class RefusedRequest(ProtocolError):
    """A line received by a server is not a request that it accepts."""

    def __init__(self, code: int, text: str, request_id: Id = None) -> None:
        self.code = code
        self.request_id = request_id
        super().__init__(text)

    def answer(self) -> bytes:
        """The line to send back."""
        return encode_failure(self.request_id, self.code, str(self))


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a server accepts, and the codes of its refusals, where they differ from the specification.

    `needs_version`: a request without "jsonrpc": "2.0" is refused. The codes are for a line that is not JSON, for
    a method that is not a string, and for parameters that are not an object.
    """

    needs_version: bool = True
    not_json: int = PARSE_ERROR
    bad_method: int = INVALID_REQUEST
    bad_params: int = INVALID_PARAMS


SPECIFIED = Dialect()


@dataclass(frozen=True, slots=True)
class Request:
    """A request as received. A request without an id is a notification, which a server may leave unanswered."""

    id: Id
    method: str
    params: dict[str, Any]
    is_notification: bool


@dataclass(frozen=True, slots=True)
class Failure:
    """The error in an answer: one of the codes above, a sentence, and what the server adds to them."""

    code: int
    message: str
    data: Any = None


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a request: the result, or the failure instead of it."""

    id: Id
    result: Any
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Notification:
    """A message from the server that answers no request."""

    method: str
    params: dict[str, Any]


class LineBuffer:
    """Splits a stream of bytes into lines of at most `max_line_bytes`, the newline not counted.

    Holds one unfinished line and the piece that was fed last, if the lines are taken before more is fed.
    """

    def __init__(self, max_line_bytes: int) -> None:
        self._max_line_bytes = max_line_bytes
        self._received = bytearray()
        self._searched = 0  # no newline lies before this byte
        self._is_broken = False

    def __len__(self) -> int:
        """How many bytes are held."""
        return len(self._received)

    @property
    def has_line(self) -> bool:
        """True when a whole line has been received."""
        return self._received.find(b"\n", self._searched) >= 0

    def feed(self, piece: bytes | bytearray | memoryview) -> None:
        """Add what was received. After a line that was too long, everything is dropped."""
        if not self._is_broken:
            self._received += piece

    def next_line(self) -> bytes | None:
        """The next line without its newline; None when more bytes are needed. Raises LineTooLong, then every time."""
        end = self._received.find(b"\n", self._searched)
        if self._is_broken or max(end, -1 if end >= 0 else len(self._received)) > self._max_line_bytes:
            self._is_broken = True
            self._received = bytearray()
            self._searched = 0
            raise LineTooLong(f"a line has at most {self._max_line_bytes} bytes")
        if end < 0:
            self._searched = len(self._received)
            return None
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        self._searched = 0
        return line


class Caller:
    """The client's end of one connection: numbers the requests and finds their answers."""

    def __init__(self, max_line_bytes: int) -> None:
        self._lines = LineBuffer(max_line_bytes)
        self._number = 0

    def request(self, method: str, params: dict[str, Any]) -> bytes:
        """The bytes to send for the next request. Raises TypeError or ValueError for what JSON cannot express."""
        self._number += 1
        return _line({"jsonrpc": _VERSION, "id": self._number, "method": method, "params": params})

    def feed(self, piece: bytes) -> None:
        """Add what was received."""
        self._lines.feed(piece)

    def next_message(self) -> Answer | Notification | None:
        """The answer to the last request, or a notification; None when more bytes are needed.

        Answers to earlier requests, which the caller no longer waits for, are skipped. An error without an id is
        the server's reply to a line that it could not read, and counts; a result without an id answers none of our
        requests, which all have one, and is skipped. Raises LineTooLong, BadMessage.
        """
        while (line := self._lines.next_line()) is not None:
            message = parse_message(line)
            if isinstance(message, Notification) or message.id == self._number:
                return message
            if message.id is None and message.failure is not None:
                return message
        return None

    def next_answer(self) -> Answer | None:
        """Like `next_message`, for callers that ignore notifications."""
        while isinstance(message := self.next_message(), Notification):
            pass
        return message


def parse_request(line: bytes, dialect: Dialect = SPECIFIED) -> Request:
    """The request on a line. Raises RefusedRequest, which carries the answer to send."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RefusedRequest(dialect.not_json, "this is not JSON") from error
    if not isinstance(document, dict):
        raise RefusedRequest(INVALID_REQUEST, "a request is one JSON object on one line")
    request_id = document.get("id")
    if not _is_id(request_id):
        raise RefusedRequest(INVALID_REQUEST, "an id is a number or a string")
    if dialect.needs_version and document.get("jsonrpc") != _VERSION:
        raise RefusedRequest(INVALID_REQUEST, f'a request has "jsonrpc": "{_VERSION}"', request_id)
    method, params = document.get("method"), document.get("params", {})
    if not isinstance(method, str):
        raise RefusedRequest(dialect.bad_method, 'a request has a "method", which is a string', request_id)
    if not isinstance(params, dict):
        raise RefusedRequest(dialect.bad_params, "parameters are given by name", request_id)
    return Request(request_id, method, params, is_notification="id" not in document)


def parse_message(line: bytes) -> Answer | Notification:
    """The answer or the notification on a line. Raises BadMessage."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadMessage("an answer is one JSON object on one line") from error
    if not isinstance(document, dict):
        raise BadMessage("an answer is one JSON object on one line")
    method, params, message_id = document.get("method"), document.get("params", {}), document.get("id")
    if method is not None:
        if not isinstance(method, str) or not isinstance(params, dict):
            raise BadMessage("a notification has a method and parameters by name")
        return Notification(method, params)
    if not _is_id(message_id):
        raise BadMessage("an id is a number or a string")
    problem = document.get("error")
    if problem is None:
        if "result" not in document:
            raise BadMessage("an answer has a result or an error")
        return Answer(message_id, document["result"])
    return Answer(message_id, None, _failure(problem))


def _failure(problem: object) -> Failure:
    if isinstance(problem, dict):
        code, message = problem.get("code"), problem.get("message")
        if isinstance(code, int) and isinstance(message, str):
            return Failure(code, message, problem.get("data"))
    raise BadMessage("an error has a code and a message")


def _is_id(value: object) -> bool:
    """Null counts: it is the id of an answer to a request whose id could not be read."""
    if isinstance(value, float):
        return math.isfinite(value)  # Python's JSON can write other floats, but standard JSON cannot
    return value is None or (isinstance(value, int | str) and not isinstance(value, bool))


def encode_result(request_id: Id, result: object) -> bytes:
    """The line that answers with a result. Raises TypeError or ValueError for what JSON cannot express."""
    return _line({"jsonrpc": _VERSION, "id": request_id, "result": result})


def encode_failure(request_id: Id, code: int, message: str, data: object = None) -> bytes:
    """The line that answers with an error; `data` is left out when it is None."""
    problem: dict[str, object] = {"code": code, "message": message}
    if data is not None:
        problem["data"] = data
    return _line({"jsonrpc": _VERSION, "id": request_id, "error": problem})


def encode_notification(method: str, params: dict[str, Any]) -> bytes:
    """The line of a message that answers no request."""
    return _line({"jsonrpc": _VERSION, "method": method, "params": params})


def _line(document: object) -> bytes:
    return json.dumps(document).encode() + b"\n"
