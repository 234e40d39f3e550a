# SPDX-License-Identifier: Apache-2.0
"""The line of `serve --stats`."""

from __future__ import annotations

import os
import pty
import select
import time

from tests.servers import serving
from tests.vhdkit.cli.running import good
from vhdkit.cli.statistics import stats_line
from vhdkit.serve.nbd.server import NbdServer


def test_line() -> None:
    """Clients, rate, median and 99th percentile of request times, totals; no times before the first request."""
    server = NbdServer([])
    try:
        assert stats_line(server, 0) == "0 clients, 0 requests/s, 0 in all, 0 errors"
        server.stats.batch(98, 10_000)
        server.stats.batch(2, 3_000_000_000)
        server.stats.errors = 1
        line = "0 clients, 7 requests/s, half within 16 µs, 99 % within 4295 ms, 100 in all, 1 errors"
        assert stats_line(server, 7) == line
    finally:
        server.close()


def test_shown_on_a_terminal_only() -> None:
    """The line appears if standard error is a terminal, and not in a pipe."""
    good("create", "a.vhd", "--size", "1M")
    with serving("a.vhd", "--stats") as server:
        time.sleep(1.3)  # a line is due every second
        assert server.stop() == (0, "")
    ours, theirs = pty.openpty()
    try:
        with serving("a.vhd", "--stats", stderr=theirs, env={"TERM": "xterm"}) as server:
            seen, deadline = b"", time.monotonic() + 60
            while b"requests/s" not in seen and time.monotonic() < deadline:
                if select.select([ours], [], [], 1)[0]:
                    seen += os.read(ours, 4096)
            assert b"0 clients, 0 requests/s" in seen
            server.process.terminate()
            assert server.process.wait(60) == 0
    finally:
        os.close(ours)
        os.close(theirs)
