# SPDX-License-Identifier: Apache-2.0
"""`serve --stats`: one line on the terminal that shows what the server is doing. Decides how it looks."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

from rich.live import Live
from rich.text import Text

from vhdkit.cli.output import console
from vhdkit.serve.nbd.server import NbdServer

_SECONDS = 1.0


@contextlib.contextmanager
def stats_shown(server: NbdServer) -> Iterator[None]:
    """Show the line on standard error while the block runs, from a thread of its own: a slow terminal delays nothing.

    Nothing is shown if standard error is not a terminal.
    """
    if not sys.stderr.isatty():
        yield
        return
    done = threading.Event()
    with Live(console=console(stderr=True), auto_refresh=False, transient=True) as live:

        def show() -> None:
            before = 0
            while not done.wait(_SECONDS):
                requests = server.stats.requests
                live.update(Text(stats_line(server, requests - before)), refresh=True)
                before = requests

        thread = threading.Thread(target=show, name="stats", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(2 * _SECONDS)


def stats_line(server: NbdServer, requests_per_second: int) -> str:
    """ "3 clients, 12045 requests/s, half within 16 µs, 99 % within 131 µs, 1204501 in all, 0 errors"."""
    stats = server.stats
    histogram = stats.histogram_us()
    waits = (
        "".join(f", {name} within {_time(_within(histogram, share))}" for name, share in _SHARES) if histogram else ""
    )
    clients = f"{len(server.connections)} client{'' if len(server.connections) == 1 else 's'}"
    return f"{clients}, {requests_per_second} requests/s{waits}, {stats.requests} in all, {stats.errors} errors"


_SHARES = (("half", 0.5), ("99 %", 0.99))


def _within(histogram: dict[float, int], share: float) -> float:
    """The time, in microseconds, within which this share of the requests was answered."""
    wanted, seen = share * sum(histogram.values()), 0
    for limit, count in sorted(histogram.items()):
        seen += count
        if seen >= wanted:
            return limit
    return 0.0


def _time(microseconds: float) -> str:
    return f"{microseconds:.0f} µs" if microseconds < 1000 else f"{microseconds / 1000:.0f} ms"
