# SPDX-License-Identifier: Apache-2.0
"""The worker's control socket: requests, answers, and that clients cannot disturb it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmm.host.private_socket import bind_private
from vmm.model.errors import InUse, InvalidSpec, NotFound, TimedOut, VmmError
from vmm.processes import rpc
from vmm.processes.rpc import ControlClient, ControlServer, Progress, parameter


class Server:
    """A server in its own thread, with methods for tests."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.crashes: list[str] = []
        self.finished: list[str] = []
        self._ready, self._stop = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        assert self._ready.wait(10)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        methods: dict[str, rpc.Method] = {
            "echo": self._echo, "fail": self._fail, "crash": self._crash, "slow": self._slow,
        }  # fmt: skip
        server = ControlServer(methods, on_crash=self.crashes.append)
        await server.start(bind_private(self.path))
        self._ready.set()
        await self._stop.wait()
        await server.close()

    async def _echo(self, params: dict[str, Any], progress: Progress) -> object:
        return params

    async def _fail(self, params: dict[str, Any], progress: Progress) -> object:
        raise InUse("is busy", hint="wait")

    async def _crash(self, params: dict[str, Any], progress: Progress) -> object:
        raise ZeroDivisionError("oops")

    async def _slow(self, params: dict[str, Any], progress: Progress) -> object:
        for number in range(3):
            progress({"step": "working", "done": number, "total": 3})
            await asyncio.sleep(0.02)  # it is slow
        self.finished.append("slow")
        return "done"

    def close(self) -> None:
        """End it."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()


@pytest.fixture
def server() -> Iterator[Server]:
    """A running server."""
    with tempfile.TemporaryDirectory(prefix="vmm-rpc-") as folder:
        one = Server(os.path.join(folder, "s"))
        try:
            yield one
        finally:
            one.close()


def test_results_errors_and_crashes(server: Server) -> None:
    """A result is returned; an error has its class, machine and hint; a crash is reported, and the server
    continues."""
    with ControlClient(server.path, machine="web") as client:
        assert client.call("echo", a=1, b=[None, "ü"]) == {"a": 1, "b": [None, "ü"]}
        with pytest.raises(InUse, match=r"web: is busy \(wait\)"):
            client.call("fail")
        with pytest.raises(VmmError, match="internal error: ZeroDivisionError"):
            client.call("crash")
        with pytest.raises(VmmError, match="unknown method; the methods are echo"):
            client.call("fly")
        assert client.call("echo") == {}
    assert "ZeroDivisionError" in server.crashes[0]


def test_progress_before_the_result(server: Server) -> None:
    """Progress arrives in order, and counts as a sign of life."""
    steps: list[dict[str, Any]] = []
    with ControlClient(server.path) as client:
        assert client.call("slow", progress=steps.append, timeout_seconds=5) == "done"
    assert [step["done"] for step in steps] == [0, 1, 2]


def test_a_client_may_disconnect(server: Server) -> None:
    """A request is carried out even if no client waits for the answer."""
    with ControlClient(server.path) as client, pytest.raises(TimedOut, match="did not answer slow within"):
        client.call("slow", timeout_seconds=0.001)
    with ControlClient(server.path) as client:
        while server.finished != ["slow"]:
            client.call("echo")


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"garbage\n", rpc.BAD_REQUEST),
        (b"[]\n", rpc.BAD_REQUEST),
        (b"\xff\n", rpc.BAD_REQUEST),
        (b"[" * 100000 + b"\n", rpc.BAD_REQUEST),
        (b'{"id": 1, "method": "echo", "params": []}\n', rpc.BAD_PARAMS),
        (b'{"id": 1, "method": {}}\n', rpc.NO_METHOD),
        (b"x" * (rpc.MAX_LINE_BYTES + 10) + b"\n", rpc.BAD_REQUEST),
    ],
)
def test_bad_requests(server: Server, raw: bytes, code: int) -> None:
    """A malformed request is answered with an error, and others are still served."""
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(10)
        link.connect(server.path)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            link.sendall(raw)
        with contextlib.suppress(ConnectionResetError):
            line = link.makefile("rb").readline()
            assert json.loads(line)["error"]["code"] == code
    with ControlClient(server.path) as client:
        assert client.call("echo", x=1) == {"x": 1}


def test_no_server(tmp_path: Path) -> None:
    """A missing socket, and one without a listener, are NotFound."""
    with pytest.raises(NotFound, match="no worker"):
        ControlClient(str(tmp_path / "absent"))


def test_a_server_that_is_not_a_worker(tmp_path: Path) -> None:
    """Garbage, and hanging up instead of an answer, are clear errors."""
    with tempfile.TemporaryDirectory(prefix="vmm-rpc-") as folder:
        path = os.path.join(folder, "s")
        with bind_private(path) as listener:
            for said, words in ((b"garbage\n", "no worker"), (b"5\n", "no worker"), (b"", "ended during")):
                with ControlClient(path) as client:
                    other, _ = listener.accept()
                    other.sendall(said)
                    other.shutdown(socket.SHUT_WR)
                    with pytest.raises(VmmError, match=words):
                        client.call("status")
                    other.close()


def test_a_request_has_the_time_of_its_own_call(tmp_path: Path) -> None:
    """A long request to a worker that reads slowly has its whole time, whatever an earlier call had left."""
    path = str(tmp_path / "c")
    asked: list[int] = []

    def answer_late(listener: socket.socket) -> None:
        with listener, listener.accept()[0] as sock, sock.makefile("rb") as lines:
            for wait_seconds in (0.0, 0.3):
                threading.Event().wait(wait_seconds)
                request = json.loads(lines.readline())
                asked.append(len(request["params"]["text"]))
                sock.sendall(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": None}).encode() + b"\n")

    listener = bind_private(path)
    listener.listen()
    server = threading.Thread(target=answer_late, args=(listener,), daemon=True)
    server.start()
    with contextlib.closing(ControlClient(path)) as client:
        client.call("echo", text="")
        client._socket.settimeout(0.001)  # as after an answer at the last moment
        client.call("echo", text="x" * (4 << 20))
    server.join()
    assert asked == [0, 4 << 20]


def test_a_worker_that_does_not_read(tmp_path: Path) -> None:
    """A request longer than the socket's buffer ends with a time-out."""
    with bind_private(str(tmp_path / "c")) as listener:
        listener.listen()
        with contextlib.closing(ControlClient(str(tmp_path / "c"))) as client, pytest.raises(TimedOut):
            client.call("echo", timeout_seconds=0.05, text="x" * (4 << 20))


def test_parameters_are_checked() -> None:
    """A parameter of another type is refused; true is not a number."""
    assert parameter({"a": 1}, "a", int) == 1 and parameter({}, "a", int, 5) == 5
    wrong: tuple[object, ...] = ("1", True, [], 1.5)
    for value in wrong:
        with pytest.raises(InvalidSpec, match="'a'"):
            parameter({"a": value}, "a", int)


def test_nan_is_not_a_time() -> None:
    """NaN, which Python's JSON and the command line accept as a number, is refused: waiting for it would never end."""
    with pytest.raises(InvalidSpec, match="'seconds' is not a number"):
        parameter({"seconds": float("nan")}, "seconds", int | float)
    assert parameter({"seconds": 0.5}, "seconds", int | float) == 0.5
