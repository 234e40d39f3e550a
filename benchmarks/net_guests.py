# SPDX-License-Identifier: Apache-2.0
"""Two real guests over each data path: the `user` switch, and the `bridge` back end with one queue and with several.

Megabits a second of one TCP transfer and of four at once, and the median of 20 pings, from one guest to the other.
The guests are emulated (TCG), so the processor is the limit far more than the switch: what is compared is what a path
costs. Needs root; everything happens in a network namespace of its own.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.vmm.guests.shell import GuestShell
from tests.vmm.net.machines import address
from tests.vmm.net.test_bridge_guests import BridgeLab

PATHS = {
    "user switch": ("user", 1),
    "bridge, 1 queue": ("bridge", 1),
    "bridge, 2 queues": ("bridge", 2),
}
FILE_MIB = 16


class _Environment:
    """What a test's monkeypatch does, for the life of this process."""

    def setenv(self, name: str, value: str) -> None:
        """Set a variable."""
        import os

        os.environ[name] = value


@contextmanager
def guests(backend: str, queues: int) -> Iterator[tuple[GuestShell, GuestShell]]:
    """Two guests on a switch of that kind."""
    environment: Any = _Environment()
    lab = BridgeLab(environment)
    try:
        lab.vmm("switch", "create", "bench", "--type", "private", "--backend", backend)
        for name in ("one", "two"):
            lab.define(name, cpu_count=max(queues, 1))
            lab.vmm("nic", "add", name, f"bench,queues={queues}")
            lab.vmm("start", name)
        one, two = lab.shell("one"), lab.shell("two")
        address(one, "10.5.0.1/24")
        address(two, "10.5.0.2/24")
        two.check(f"dd if=/dev/zero of=/tmp/file bs=1M count={FILE_MIB} 2>/dev/null; httpd -p 5000 -h /tmp")
        yield one, two
    finally:
        lab.close()


def transfer(one: GuestShell, streams: int) -> float:
    """Megabits a second of that many downloads at once."""
    fetch = "wget -q -O /dev/null http://10.5.0.2:5000/file"
    start = time.perf_counter()
    one.check(f"for n in $(seq {streams}); do {fetch} & done; wait", seconds=300)
    return FILE_MIB * streams * 8 * 1.048576 / (time.perf_counter() - start)


def ping_milliseconds(one: GuestShell) -> float:
    """The median of 20 pings."""
    said = one.check("ping -c 20 -i 0.1 10.5.0.2", seconds=120)
    times = sorted(float(found) for found in re.findall(r"time=([0-9.]+) ms", said))
    return times[len(times) // 2]


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Every path: the medians of `rounds` transfers."""
    results = {}
    for name, (backend, queues) in PATHS.items():
        with guests(backend, queues) as (one, _):
            transfer(one, 1)
            single = sorted(transfer(one, 1) for _ in range(rounds))
            many = sorted(transfer(one, 4) for _ in range(rounds))
            results[name] = {
                "mbit_per_second": single[rounds // 2],
                "mbit_per_second_4_streams": many[rounds // 2],
                "ping_milliseconds": ping_milliseconds(one),
            }
    return results
