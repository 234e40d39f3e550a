# SPDX-License-Identifier: Apache-2.0
"""The `user` switch between two sockets, beside a naive hub and vde_switch; how long it takes to add a port.

Frames a second that arrive at one port while another, in a separate process, sends as fast as it can. All
contestants are measured in turn, in every round. `--guests` measures real guests instead: over both back ends, with
one queue and two (needs root; takes minutes). Then the switch's promises, each with its goal and whether it is met
(`net_goals`; those of bridges need root); `--only NAME` measures one of them and nothing else.
"""

from __future__ import annotations

import os
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from benchmarks import net_stations
from benchmarks.common import arguments, interleaved, report, workplace
from benchmarks.net_goals import GOALS as PROMISES
from vmm.net.ports import PortSetup
from vmm.net.switch_process import SwitchProcess

SIZES = (64, 1514)
NEED_ROOT = (
    "bandwidth-bridge",
    "guest-tcp",
    "guest-ping",
    "guest-tcp-devices",
    "guest-ping-devices",
    "guest-processor",
)
GOALS = {64: 150_000.0, 1514: 1.5e9 / 8 / 1514}


def one_run(make: Callable[[Path], AbstractContextManager[net_stations.Plug]], size: int, seconds: float) -> float:
    """A fresh switch in a fresh folder, measured once."""
    with tempfile.TemporaryDirectory(prefix="vmm-net-") as folder, make(Path(folder)) as plug:
        return net_stations.frame_rate(plug, size, seconds)


def latency(make: Callable[[Path], AbstractContextManager[net_stations.Plug]]) -> float:
    """Microseconds of a round trip."""
    with tempfile.TemporaryDirectory(prefix="vmm-net-") as folder, make(Path(folder)) as plug:
        return net_stations.round_trips(plug, 2000)


def port_seconds(folder: Path, count: int = 50) -> list[float]:
    """How long it takes to add each of `count` ports to a running switch, including its socket."""
    backend = SwitchProcess(str(folder / "sw"), "ports")
    backend.ensure("status")
    times = []
    for number in range(count):
        name = f"{uuid.uuid4().hex[:8]}-{number}"
        start = time.perf_counter()
        backend.plug(PortSetup(name, str(folder / f"{number}.port"), str(folder / f"{number}.guest")))
        times.append(time.perf_counter() - start)
    backend.stop()
    return sorted(times)


def report_guests(rounds: int, out: Path | None) -> None:
    """Measure and print the data paths of real guests."""
    from benchmarks.net_guests import measure

    results = measure(rounds)
    table = [
        [
            name,
            f"{row['mbit_per_second']:.0f}",
            f"{row['mbit_per_second_4_streams']:.0f}",
            f"{row['ping_milliseconds']:.2f}",
        ]
        for name, row in results.items()
    ]
    columns = ["two emulated guests", "Mbit/s", "4 streams, Mbit/s", "ping, ms"]
    report("net: data paths of guests", columns, table, {"results": results}, out)


def report_goals(names: Sequence[str], out: Path | None) -> None:
    """Measure promises and print each with its goal, and the machine's other load meanwhile."""
    table, data = [], {}
    for name in names:
        goal = PROMISES[name]
        value = goal.measure()
        verdict = "met" if goal.is_met(value) else "MISSED"
        sign = "≥" if goal.at_least else "≤"
        table.append([goal.words, f"{value:.2f} {goal.unit}", f"{sign} {goal.limit:g} {goal.unit}", verdict])
        data[name] = {"value": value, "unit": goal.unit, "goal": goal.limit, "met": goal.is_met(value)}
    load = os.getloadavg()[0]
    report("net: promises", ["what", "measured", "goal", "verdict"], table, {"results": data, "load": load}, out)
    print(f"the machine's load was {load:.1f} with {os.cpu_count()} processors")


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__ or "", rounds=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--guests", action="store_true", help="real guests instead of sockets")
    parser.add_argument("--only", action="append", choices=sorted(PROMISES), help="one promise alone; repeatable")
    options = parser.parse_args()
    if options.only:
        report_goals(options.only, options.json)
        return
    if options.guests:
        report_guests(options.rounds, options.json)
        return
    makers: dict[str, Callable[[Path], AbstractContextManager[net_stations.Plug]]] = {
        "vmm user switch": net_stations.user_switch,
        "vmm user switch, receiver as QEMU's": partial(net_stations.user_switch, as_qemu=True),
        "naive hub": net_stations.naive_hub,
    }
    if net_stations.has_vde():
        makers["vde_switch"] = net_stations.vde
    table, data = [], {}
    for size in SIZES:
        runs: dict[str, Callable[[], float]] = {
            name: partial(one_run, make, size, options.seconds) for name, make in makers.items()
        }
        for name, row in interleaved(runs, options.rounds).items():
            rate = row.median
            goal = f"{rate / GOALS[size]:.2f}" if name == "vmm user switch" else ""
            table.append([name, str(size), f"{rate:,.0f}", f"{rate * size * 8 / 1e9:.2f}", goal])
            data[f"{name}, {size} B"] = {"frames_per_second": rate, "gbit_per_second": rate * size * 8 / 1e9}
    trips = {name: latency(make) for name, make in makers.items() if "QEMU" not in name}
    with workplace(options.dir) as folder:
        adding = port_seconds(folder)
    columns = ["switch", "frame, bytes", "frames/s", "Gbit/s", "of the goal"]
    numbers: dict[str, object] = {
        "results": data,
        "round_trip_microseconds": trips,
        "add_port_median_seconds": adding[len(adding) // 2],
        "add_port_worst_seconds": adding[-1],
    }
    report("net: frames through a switch from one socket to another", columns, table, numbers, options.json)
    print("round trips, in microseconds:", ", ".join(f"{name} {value:.0f}" for name, value in trips.items()))
    report_goals([name for name in PROMISES if os.geteuid() == 0 or name not in NEED_ROOT], None)
    print(f"adding a port: median {adding[len(adding) // 2] * 1e3:.2f} ms, worst {adding[-1] * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
