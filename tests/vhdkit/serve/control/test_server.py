# SPDX-License-Identifier: Apache-2.0
"""The control socket's framing: any input leads to an answer or a closed connection, and other clients are served."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vhdkit import errors
from vhdkit.jsonrpc import FAILED, INTERNAL, INVALID_PARAMS, INVALID_REQUEST, NO_METHOD, PARSE_ERROR
from vhdkit.serve.control.client import ControlClient
from vhdkit.serve.control.server import (
    MAX_CLIENTS,
    MAX_LINE_BYTES,
    BadParams,
    Control,
    Method,
    Params,
)
from vhdkit.serve.nbd.loop import Loop
from vhdkit.sockets import SocketFile

SECONDS = 60


class Bench:
    """Methods to call, and the loop that serves them."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.notified: list[Params] = []
        self.file = SocketFile(self.path)
        self.loop = Loop()
        methods = {
            "echo": Method(lambda params: params),
            "long": Method(self._wait, takes_long=True),
            "fail": Method(self._fail),
            "crash": Method(lambda params: 1 // 0),
            "choosy": Method(self._refuse, takes_long=True),
            "note": Method(self.notified.append),
            "big": Method(lambda params: "x" * 10_000_000),
        }
        self.control = Control(self.loop, methods)
        self.control.listen(self.file.socket)
        self.thread = threading.Thread(target=self.loop.run, daemon=True)
        self.thread.start()

    def _wait(self, params: Params) -> object:
        self.entered.set()
        assert self.gate.wait(SECONDS)
        return "done"

    @staticmethod
    def _fail(params: Params) -> object:
        raise errors.NoSpace("is full", path="disk.vhd", hint="free some")

    @staticmethod
    def _refuse(params: Params) -> object:
        raise BadParams("not these")

    def connect(self) -> socket.socket:
        """A client with a generous timeout."""
        client = socket.socket(socket.AF_UNIX)
        client.connect(self.path)
        client.settimeout(SECONDS)
        return client

    def talk(self, raw: bytes) -> list[dict[str, Any]]:
        """All answers to these bytes followed by the end of the stream."""
        with self.connect() as client:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                client.sendall(raw)
                client.shutdown(socket.SHUT_WR)
            received = b""
            with contextlib.suppress(ConnectionResetError):
                while piece := client.recv(1 << 20):
                    received += piece
        return [json.loads(line) for line in received.splitlines()]

    def code(self, raw: bytes) -> int:
        """The error code in the only answer."""
        (answer,) = self.talk(raw + b"\n")
        code: int = answer["error"]["code"]
        return code

    def end(self) -> None:
        """Stop everything."""
        self.gate.set()
        self.loop.stop()
        self.thread.join(SECONDS)
        self.loop.close()
        self.control.close()
        self.file.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A control socket with a few methods."""
    one = Bench(tmp_path / "c.sock")
    yield one
    one.end()


def line(method: str, number: object = 1, **params: object) -> bytes:
    """A request."""
    return json.dumps({"jsonrpc": "2.0", "id": number, "method": method, "params": params}).encode() + b"\n"


def test_requests_are_answered_in_order(bench: Bench) -> None:
    """Several lines at once, blank lines between, numbers and texts as ids."""
    raw = line("echo", 1, a=[1]) + b"\n  \n" + line("echo", "x") + b'{"jsonrpc":"2.0","id":2,"method":"echo"}\n'
    answers = bench.talk(raw)
    assert [(one["id"], one["result"]) for one in answers] == [(1, {"a": [1]}), ("x", {}), (2, {})]


def test_notifications_are_not_answered(bench: Bench) -> None:
    """Without an id the method runs and there is no answer."""
    assert bench.talk(b'{"jsonrpc":"2.0","method":"note","params":{"n":1}}\n' + line("echo", 5))[0]["id"] == 5
    assert bench.notified == [{"n": 1}]


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"garbage", PARSE_ERROR),
        (b"\xff\xfe", PARSE_ERROR),
        (b"[" * 5000, PARSE_ERROR),
        (b"9" * 5000, PARSE_ERROR),
        (b"[]", INVALID_REQUEST),
        (b"3", INVALID_REQUEST),
        (b"{}", INVALID_REQUEST),
        (b'{"jsonrpc":"1.0","method":"echo","id":1}', INVALID_REQUEST),
        (b'{"jsonrpc":"2.0","method":["echo"],"id":1}', INVALID_REQUEST),
        (b'{"jsonrpc":"2.0","method":"echo","id":{}}', INVALID_REQUEST),
        (b'{"jsonrpc":"2.0","method":"echo","id":true}', INVALID_REQUEST),
        (b'{"jsonrpc":"2.0","method":"nope","id":1}', NO_METHOD),
        (b'{"jsonrpc":"2.0","method":"echo","params":[1],"id":1}', INVALID_PARAMS),
        (b'{"jsonrpc":"2.0","method":"choosy","id":1}', INVALID_PARAMS),
        (b'{"jsonrpc":"2.0","method":"fail","id":1}', FAILED),
        (b'{"jsonrpc":"2.0","method":"crash","id":1}', INTERNAL),
    ],
)
def test_refusals(bench: Bench, raw: bytes, code: int) -> None:
    """Each kind of error has its code, and the next request is served."""
    assert bench.code(raw) == code
    assert bench.talk(line("echo"))[0]["result"] == {}


def test_lines_are_bounded(bench: Bench) -> None:
    """The longest line is served; a longer one is refused without being kept, and the client disconnected."""
    room = MAX_LINE_BYTES - len(line("echo", 1, a="")) + 1
    assert len(bench.talk(line("echo", 1, a="x" * room))[0]["result"]["a"]) == room
    assert bench.code(line("echo", 1, a="x" * (room + 1))[:-1]) == INVALID_REQUEST
    answers = bench.talk(b"x" * (20 * MAX_LINE_BYTES))
    assert not answers or answers[0]["error"]["code"] == INVALID_REQUEST


def test_a_long_method_does_not_block_other_clients(bench: Bench) -> None:
    """While one client's request takes long, others are answered; its own next request waits."""
    with bench.connect() as slow:
        slow.sendall(line("long", 1) + line("echo", 2))
        assert bench.entered.wait(SECONDS)
        assert bench.talk(line("echo", 3))[0]["id"] == 3
        bench.gate.set()
        received = b""
        while received.count(b"\n") < 2:
            received += slow.recv(4096)
        assert [json.loads(one)["id"] for one in received.splitlines()] == [1, 2]


def test_clients_that_disconnect_or_do_not_read(bench: Bench) -> None:
    """A client that disconnects during its request, or reads no answer, does not affect others."""
    with bench.connect() as gone:
        gone.sendall(line("long", 1))
        assert bench.entered.wait(SECONDS)
    with bench.connect() as deaf:
        deaf.sendall(line("big") * 50)
        bench.gate.set()
        assert bench.talk(line("echo", 3))[0]["id"] == 3


def test_clients_are_bounded(bench: Bench) -> None:
    """Clients beyond the limit are disconnected; when some have gone, new ones are accepted."""
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_CLIENTS):
            client = stack.enter_context(bench.connect())
            client.sendall(line("echo"))
            assert client.recv(4096)
        with bench.connect() as late:
            with contextlib.suppress(BrokenPipeError):
                late.sendall(line("echo"))
            with contextlib.suppress(ConnectionResetError):
                assert late.recv(4096) == b""
    for _ in range(100):
        with contextlib.suppress(OSError):
            if bench.talk(line("echo", 4)):
                return
    raise AssertionError("a new client is still refused")


def test_a_thousand_clients_one_after_the_other(bench: Bench) -> None:
    """Connections that open and close leave nothing behind."""
    for number in range(1000):
        with bench.connect() as client:
            if number % 2:
                client.sendall(b'{"jsonrpc"')
    assert bench.talk(line("echo", 3))[0]["id"] == 3


@given(raw=st.binary(max_size=300))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arbitrary_bytes(bench: Bench, raw: bytes) -> None:
    """Any bytes are answered line by line with errors, or not at all, and the server continues."""
    for answer in bench.talk(raw + b"\n"):
        assert answer["error"]["code"] in (PARSE_ERROR, INVALID_REQUEST)
    assert bench.talk(line("echo", 3))[0]["id"] == 3


def test_results_and_errors_at_the_client(bench: Bench) -> None:
    """A result arrives unchanged; an error as an exception of its class, with path, hint and exit code."""
    with ControlClient(bench.path) as client:
        assert client.call("echo", a=1) == {"a": 1}
        with pytest.raises(errors.NoSpace) as caught:
            client.call("fail")
        assert (caught.value.path, caught.value.hint, caught.value.exit_code) == ("disk.vhd", "free some", 7)
        with pytest.raises(errors.VhdkitError, match="no such method") as other:
            client.call("nope")
        assert other.value.exit_code == 2
        with pytest.raises(errors.VhdkitError, match="internal"):
            client.call("crash")


@pytest.mark.parametrize("answer", [b"", b"nonsense\n", b"[]\n", b"{}\n", b'{"error": 3}\n', b'{"error": {}}\n'])
def test_the_client_reports_wrong_answers(tmp_path: Path, answer: bytes) -> None:
    """If another program listens there, or none, a clear error says so."""
    path = str(tmp_path / "x.sock")
    with pytest.raises(errors.NotFound):
        ControlClient(path)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        with pytest.raises(errors.NotFound):
            ControlClient(path)
        other.listen()

        def serve() -> None:
            client, _ = other.accept()
            with client:
                client.recv(4096)
                client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with ControlClient(path) as client, pytest.raises(errors.IoFailed):
            client.call("status")
        thread.join()
