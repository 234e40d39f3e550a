# SPDX-License-Identifier: Apache-2.0
"""Lines and messages of the control sockets: round trips, limits, and any bytes in any pieces."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vhdkit import jsonrpc

LIMIT_BYTES = 64
LONG = b'{"jsonrpc": "2.0", "id": "' + b"x" * LIMIT_BYTES + b'"}\n'
# File names may contain bytes that are not UTF-8, which Python keeps as lone surrogates.
bytes_of_names = st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF, categories=["Cs"])
texts = st.text(st.characters(exclude_categories=["Cs"]) | bytes_of_names, max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
params_given = st.dictionaries(texts, values, max_size=4)
ids = st.none() | st.integers() | texts | st.floats(allow_nan=False, allow_infinity=False)
dialects = st.sampled_from(
    [jsonrpc.SPECIFIED, jsonrpc.Dialect(needs_version=False, not_json=-32600, bad_method=-32601, bad_params=-32600)]
)
# Near-messages: the right members with any values.
nearly = st.dictionaries(
    st.sampled_from(["jsonrpc", "id", "method", "params", "result", "error"]),
    st.sampled_from(["2.0", {}, {"code": 1, "message": "x"}, {"code": "1"}, [], True, float("nan"), 1e999]) | values,
).map(lambda document: json.dumps(document).encode())
streams = st.lists(st.binary(max_size=LIMIT_BYTES + 10) | nearly | st.just(b"\n"), max_size=12).map(b"".join)


def in_pieces(data: bytes, cuts: Iterable[int]) -> Iterator[bytes]:
    """The bytes, cut at these places."""
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return (data[start:end] for start, end in itertools.pairwise(places))


def lines_of(buffer: jsonrpc.LineBuffer, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The lines, taken as they become complete; the memory is checked between the pieces."""
    for piece in pieces:
        buffer.feed(piece)
        assert len(buffer) <= LIMIT_BYTES + len(piece)
        while (line := buffer.next_line()) is not None:
            yield line
        assert not buffer.has_line


@given(data=streams, cuts=st.lists(st.integers(0, 1 << 16), max_size=20))
@example(data=b"x" * LIMIT_BYTES + b"\n", cuts=[])
@example(data=b"x" * (LIMIT_BYTES + 1) + b"\n", cuts=[])
@example(data=b"\n" + b"x" * (LIMIT_BYTES + 1), cuts=[LIMIT_BYTES])
def test_lines_do_not_depend_on_the_pieces(data: bytes, cuts: list[int]) -> None:
    """The lines up to the first overlong one, which ends the stream; the rest is dropped."""
    whole = data.split(b"\n")
    long = next((i for i, line in enumerate(whole) if len(line) > LIMIT_BYTES), None)
    buffer = jsonrpc.LineBuffer(LIMIT_BYTES)
    found: list[bytes] = []
    try:
        found.extend(lines_of(buffer, in_pieces(data, cuts)))
    except jsonrpc.LineTooLong:
        assert long is not None and len(buffer) == 0
        buffer.feed(b"more\n")
        assert len(buffer) == 0 and not buffer.has_line
        with pytest.raises(jsonrpc.LineTooLong):
            buffer.next_line()
    else:
        assert long is None and found == whole[:-1]


def test_the_lines_before_an_overlong_one_are_returned() -> None:
    """Complete requests are served although the next line is too long, even in one piece."""
    buffer = jsonrpc.LineBuffer(LIMIT_BYTES)
    buffer.feed(b"one\n" + b"x" * (LIMIT_BYTES + 1) + b"\nthree\n")
    assert buffer.next_line() == b"one"
    with pytest.raises(jsonrpc.LineTooLong, match="at most 64 bytes"):
        buffer.next_line()


@given(line=st.binary(max_size=200) | nearly, dialect=dialects)
@example(line=b"[" * 100_000, dialect=jsonrpc.SPECIFIED)
@example(line=b'{"id": ' + b"[" * 900 + b"]" * 900 + b"}", dialect=jsonrpc.SPECIFIED)
@example(line=b"9" * 5000, dialect=jsonrpc.SPECIFIED)
@example(line=b'{"id": 1e999, "method": "a"}', dialect=jsonrpc.Dialect(needs_version=False))
def test_any_line_to_a_server_is_a_request_or_has_an_answer(line: bytes, dialect: jsonrpc.Dialect) -> None:
    """There is no other exception; the answer to a refusal is a message that a caller understands."""
    try:
        request = jsonrpc.parse_request(line, dialect)
    except jsonrpc.RefusedRequest as problem:
        answer = jsonrpc.parse_message(problem.answer().removesuffix(b"\n"))
        assert isinstance(answer, jsonrpc.Answer) and answer.failure is not None
        assert (answer.id, answer.failure.code) == (problem.request_id, problem.code)
    else:
        again = jsonrpc.parse_message(jsonrpc.encode_result(request.id, None).removesuffix(b"\n"))
        assert isinstance(again, jsonrpc.Answer) and again.id == request.id


@given(data=streams, cuts=st.lists(st.integers(0, 1 << 16), max_size=20))
@example(data=LONG, cuts=[])
@example(data=b"[" * LIMIT_BYTES + b"\n", cuts=[])
def test_any_bytes_to_a_caller_are_messages_or_a_protocol_error(data: bytes, cuts: list[int]) -> None:
    """In any pieces; a returned message answers the last request, or no known request."""
    caller = jsonrpc.Caller(LIMIT_BYTES)
    caller.request("status", {})
    try:
        for piece in in_pieces(data, cuts):
            caller.feed(piece)
            while (message := caller.next_message()) is not None:
                assert isinstance(message, jsonrpc.Notification) or message.id in (None, 1)
                assert isinstance(message, jsonrpc.Notification) or message.id == 1 or message.failure is not None
    except jsonrpc.ProtocolError as error:
        assert isinstance(error, jsonrpc.LineTooLong | jsonrpc.BadMessage)


@given(method=texts, params=params_given)
def test_a_request_arrives_as_it_was_sent(method: str, params: dict[str, Any]) -> None:
    """Method and parameters are unchanged, numbered from 1, on one line."""
    caller = jsonrpc.Caller(1 << 20)
    for number in (1, 2):
        sent = caller.request(method, params)
        assert sent.index(b"\n") == len(sent) - 1
        assert jsonrpc.parse_request(sent[:-1]) == jsonrpc.Request(number, method, params, is_notification=False)
    notification = jsonrpc.encode_notification(method, params)
    assert jsonrpc.parse_request(notification[:-1]) == jsonrpc.Request(None, method, params, is_notification=True)
    assert jsonrpc.parse_message(notification[:-1]) == jsonrpc.Notification(method, params)


@given(number=ids, result=values, code=st.integers(), text=texts, cut=st.integers(0, 1 << 16))
def test_answers_arrive_as_they_were_sent(number: jsonrpc.Id, result: object, code: int, text: str, cut: int) -> None:
    """Results and failures, with the id of the request, in any two pieces."""
    assert jsonrpc.parse_message(jsonrpc.encode_result(number, result)[:-1]) == jsonrpc.Answer(number, result)
    failed = jsonrpc.Answer(number, None, jsonrpc.Failure(code, text, result))
    assert jsonrpc.parse_message(jsonrpc.encode_failure(number, code, text, result)[:-1]) == failed
    caller = jsonrpc.Caller(1 << 20)
    caller.request("status", {})
    sent = jsonrpc.encode_result(1, result)
    for piece in in_pieces(sent, [cut % len(sent)]):
        assert caller.next_message() is None
        caller.feed(piece)
    assert caller.next_answer() == jsonrpc.Answer(1, result)


def test_answers_to_earlier_requests_are_skipped() -> None:
    """The answer to an abandoned request is not taken for the next one's; notifications may be skipped."""
    caller = jsonrpc.Caller(1 << 10)
    caller.request("slow", {})
    caller.request("status", {})
    notification = jsonrpc.encode_notification("progress", {"done": 1})
    for expected, ask in (
        (jsonrpc.Notification("progress", {"done": 1}), caller.next_message),
        (jsonrpc.Answer(2, "yes"), caller.next_answer),
    ):
        caller.feed(notification + jsonrpc.encode_result(1, "late") + notification + jsonrpc.encode_result(2, "yes"))
        ask_once: Callable[[], object] = ask
        assert ask_once() == expected
    assert caller.next_answer() == jsonrpc.Answer(2, "yes")
    assert caller.next_answer() is None


def test_an_error_without_an_id_counts() -> None:
    """A server reports an unreadable request without its id; a result without an id answers no request."""
    caller = jsonrpc.Caller(1 << 10)
    caller.request("status", {})
    caller.feed(jsonrpc.encode_result(None, "of another request"))
    assert caller.next_answer() is None
    caller.feed(jsonrpc.encode_failure(None, jsonrpc.PARSE_ERROR, "this is not JSON"))
    answer = caller.next_answer()
    assert answer is not None and answer.failure == jsonrpc.Failure(jsonrpc.PARSE_ERROR, "this is not JSON")


@pytest.mark.parametrize(
    ("line", "code", "number"),
    [
        (b"{", jsonrpc.PARSE_ERROR, None),
        (b"[]", jsonrpc.INVALID_REQUEST, None),
        (b'{"jsonrpc": "2.0", "id": [], "method": "a"}', jsonrpc.INVALID_REQUEST, None),
        (b'{"jsonrpc": "2.0", "id": true, "method": "a"}', jsonrpc.INVALID_REQUEST, None),
        (b'{"jsonrpc": "2.0", "id": NaN, "method": "a"}', jsonrpc.INVALID_REQUEST, None),
        (b'{"id": 7, "method": "a"}', jsonrpc.INVALID_REQUEST, 7),
        (b'{"jsonrpc": "2.0", "id": 7, "method": 1}', jsonrpc.INVALID_REQUEST, 7),
        (b'{"jsonrpc": "2.0", "id": 7, "method": "a", "params": null}', jsonrpc.INVALID_PARAMS, 7),
    ],
)
def test_refusals_by_the_specification(line: bytes, code: int, number: jsonrpc.Id) -> None:
    """Each kind of error has the code of the specification, and the id if it can be read."""
    with pytest.raises(jsonrpc.RefusedRequest) as caught:
        jsonrpc.parse_request(line)
    assert (caught.value.code, caught.value.request_id) == (code, number)


def test_a_dialect_changes_only_codes() -> None:
    """A server with its own codes for refusals keeps them; one that needs no version accepts requests without it."""
    dialect = jsonrpc.Dialect(needs_version=False, not_json=-1, bad_method=-2, bad_params=-3)
    for line, code in ((b"{", -1), (b'{"method": 1}', -2), (b'{"method": "a", "params": 1}', -3)):
        with pytest.raises(jsonrpc.RefusedRequest) as caught:
            jsonrpc.parse_request(line, dialect)
        assert caught.value.code == code
    assert jsonrpc.parse_request(b'{"id": 1, "method": "a"}', dialect).params == {}


@pytest.mark.parametrize(
    "line",
    [
        b"", b"5", b"{}", b'{"id": 1}', b'{"error": 3}', b'{"error": {}}', b'{"error": {"code": "1", "message": ""}}',
        b'{"id": {}, "result": 1}', b'{"method": 3}', b'{"method": "progress", "params": []}', b"[" * 100_000,
    ],
    ids=range(11),
)  # fmt: skip
def test_what_is_not_a_message(line: bytes) -> None:
    """A typed error, whatever the line contains."""
    with pytest.raises(jsonrpc.BadMessage):
        jsonrpc.parse_message(line)
