# SPDX-License-Identifier: Apache-2.0
"""Signals that are not a request to end: a server continues, with everything that was written to it."""

from __future__ import annotations

import signal
import socket
import threading

import pytest

import vhdkit
from tests.nbd_client import WRITE, Client
from tests.servers import serving
from tests.support import require_nbdkit
from tests.vhdkit.cli.running import good
from vhdkit.cli.unmeant import UNMEANT_SIGNALS, unmeant_ignored


@pytest.mark.parametrize("engine", ["builtin", "nbdkit"])
def test_the_server_continues(engine: str) -> None:
    """USR1, USR2, ALRM and the like do not affect a server; data written but not flushed is there afterwards."""
    if engine == "nbdkit":
        require_nbdkit()
    good("create", "a.vhd", "--size", "8M")
    with serving("a.vhd", "--socket", "s", "--engine", engine) as server:
        with socket.socket(socket.AF_UNIX) as sock:
            client = Client(sock)
            sock.connect("s")
            client.start().go("a.vhd")
            assert client.call(WRITE, 0, payload=b"unflushed").error == 0
            for number in UNMEANT_SIGNALS:
                server.process.send_signal(number)
            assert client.read(0, 9) == b"unflushed"
        assert server.stop() == (0, "")
    with vhdkit.open_disk("a.vhd") as disk:
        assert disk.read(0, 9) == b"unflushed"


@pytest.mark.parametrize("number", [signal.SIGQUIT, signal.SIGXCPU])
def test_other_signals_end_the_server_in_order(number: int) -> None:
    r"""Ctrl-\ and an exceeded CPU limit end a server as SIGTERM does."""
    good("create", "a.vhd", "--size", "8M")
    with serving("a.vhd") as server:
        assert server.stop(number) == (0, "")


def test_handlers_are_restored() -> None:
    """After the block each signal is handled as before; on another thread nothing is changed."""
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: seen.append(number))
    try:
        with unmeant_ignored():
            signal.raise_signal(signal.SIGUSR2)
        signal.raise_signal(signal.SIGUSR2)
        thread = threading.Thread(target=lambda: unmeant_ignored().__enter__())
        thread.start()
        thread.join()
        signal.raise_signal(signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert seen == [signal.SIGUSR2] * 2
