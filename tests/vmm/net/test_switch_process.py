# SPDX-License-Identifier: Apache-2.0
"""Requests to a switch's process: what it may answer, and what happens if another program answers in its place."""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator

import pytest

from vhdkit import jsonrpc
from vmm.model import errors
from vmm.net.switch_control import MAX_ANSWER_BYTES
from vmm.net.switch_process import SwitchProcess

Answering = Callable[[socket.socket], None]


@contextlib.contextmanager
def stand_in(answering: Answering) -> Iterator[SwitchProcess]:
    """A program that accepts one client where the process of switch `lab` would listen."""
    with tempfile.TemporaryDirectory(prefix="vmm-sw-") as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/control.sock")
        listener.listen()

        def serve() -> None:
            client, _ = listener.accept()
            with client, contextlib.suppress(ConnectionError):
                client.recv(4096)
                answering(client)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield SwitchProcess(folder, "lab")
        finally:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as unblocker:
                unblocker.connect(f"{folder}/control.sock")  # a test that failed before it sent a request
            thread.join(60)
            assert not thread.is_alive()


def sending(data: bytes) -> Answering:
    """A stand-in that answers with these bytes."""
    return lambda client: client.sendall(data)


@pytest.mark.parametrize("answer", [b"garbage\n", b"5\n", b"{}\n", b'{"id": 1, "error": 5}\n', b"[" * 9999 + b"\n"])
def test_a_malformed_answer_names_the_switch(answer: bytes) -> None:
    """A malformed answer is an error with the name of the switch, and never another exception."""
    with stand_in(sending(answer)) as backend, pytest.raises(errors.VmmError, match="for switch lab is not a switch"):
        backend.ask("status")


def test_answers_are_bounded() -> None:
    """A stand-in that never ends its line is disconnected, and its bytes are not kept."""
    sent = 0

    def endless(client: socket.socket) -> None:
        nonlocal sent
        while sent < 20 * MAX_ANSWER_BYTES:
            client.sendall(b"x" * (1 << 16))
            sent += 1 << 16

    with stand_in(endless) as backend, pytest.raises(errors.VmmError, match="for switch lab is not a switch"):
        backend.ask("status")
    assert sent < 3 * MAX_ANSWER_BYTES


def test_a_switch_that_hangs_up_counts_as_not_running() -> None:
    """A switch that ends instead of answering counts as not running, so it is started again."""
    for answer in (b"", b'{"jsonrpc": "2.0", "id": 1,'):
        with stand_in(sending(answer)) as backend, pytest.raises(errors.WrongState, match="lab hung up"):
            backend.ask("status")


def test_the_stream_after_the_answer_is_not_consumed() -> None:
    """Reading the answer consumes no byte of the capture after it."""
    with (
        stand_in(sending(jsonrpc.encode_result(1, {}) + b"\n\nstream")) as backend,
        backend.capture(None) as stream,
        stream.makefile("rb") as file,
    ):
        assert file.read() == b"\n\nstream"
