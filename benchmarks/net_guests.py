# SPDX-License-Identifier: Apache-2.0
"""Two real guests over each data path: the `user` switch, and the `bridge` back end with one queue and with several.

Megabits a second of one TCP transfer and of four at once, and the median of 20 pings, from one guest to the other.
The guests are emulated (TCG), so the processor is the limit far more than the switch: the comparison shows what a path
costs. Needs root; everything happens in a separate network namespace.

`beside_a_plain_bridge` compares machines of ours on a bridge switch with a bare QEMU on a bridge that has nothing but
its taps: no rules, no filter of system calls, no other devices. Both pairs have the same processor model, memory and
kernel and run all the time. They are measured in turn, each round in the other order, and the result is the median of
the rounds' ratios. A second pair of bare QEMUs has the devices of a machine of ours as well (a SCSI controller, agent
ports, a monitor): what ours cost beside those is the switch alone. Since whatever else the machine does changes a rate
more than a switch does, the processor time that the QEMUs use for a MiB (`/proc/PID/task/*/schedstat`, softirqs
included) is compared, too.
"""

from __future__ import annotations

import re
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import start_beside
from tests.vmm.guests.shell import GuestShell
from tests.vmm.net.machines import address
from tests.vmm.net.test_bridge_guests import BridgeLab
from vmm.store import registry
from vmm.store.state import processes_of

PATHS = {
    "user switch": ("user", 1),
    "bridge, 1 queue": ("bridge", 1),
    "bridge, 2 queues": ("bridge", 2),
}
FILE_MIB = 16
# What one of our machines has besides its adapter, as arguments for a bare QEMU; {0} is a path prefix for sockets.
OUR_DEVICES = (
    "-chardev socket,id=qmp,path={0}.qmp,server=on,wait=off -mon chardev=qmp,mode=control "
    "-device virtio-serial-pci,id=ports,ioeventfd=off "
    "-chardev socket,id=agent,path={0}.agent,server=on,wait=off "
    "-device virtserialport,bus=ports.0,nr=1,chardev=agent,name=agent "
    "-chardev socket,id=items,path={0}.items,server=on,wait=off "
    "-device virtserialport,bus=ports.0,nr=2,chardev=items,name=items "
    "-device virtio-scsi-pci,id=scsi0 "
)
FILES = 8  # of a sample beside a plain bridge: half a second is the shortest useful time


class _Environment:
    """What a test's monkeypatch does, for the life of this process."""

    def setenv(self, name: str, value: str) -> None:
        """Set a variable."""
        import os

        os.environ[name] = value


@contextmanager
def guests(backend: str, queues: int, lab: BridgeLab | None = None) -> Iterator[tuple[GuestShell, GuestShell]]:
    """Two guests on a switch of that kind; without `lab` in a namespace of their own."""
    environment: Any = _Environment()
    lab = lab or BridgeLab(environment)
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


def in_turn(one: GuestShell, files: int) -> float:
    """Megabits a second of that many downloads, one after the other."""
    fetch = "wget -q -O /dev/null http://10.5.0.2:5000/file"
    start = time.perf_counter()
    one.check(f"for n in $(seq {files}); do {fetch} || exit 1; done", seconds=300)
    return FILE_MIB * files * 8 * 1.048576 / (time.perf_counter() - start)


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


@contextmanager
def plain_guests(
    lab: BridgeLab, cpu_model: str, name: str = "plain", devices: str = ""
) -> Iterator[tuple[GuestShell, GuestShell, list[int]]]:
    """Two guests of bare QEMUs on a bridge that has nothing but their taps, and the process numbers of the QEMUs."""
    from tests.vmm.guests.linux import linux_guest

    guest = linux_guest()
    started: list[subprocess.Popen[bytes]] = []
    try:
        lab.spaces.run(lab.here, f"ip link add {name} type bridge && ip link set {name} up")
        shells = []
        for number in range(2):
            tap, serial = f"{name}{number}", lab.folder / f"{name}{number}.serial"
            lab.spaces.run(lab.here, f"ip tuntap add {tap} mode tap && ip link set {tap} master {name} up")
            command = (
                f"ip netns exec {lab.here} qemu-system-x86_64 -nodefaults -display none -accel tcg -cpu {cpu_model} "
                f"-m 192 -kernel {guest.kernel} -initrd {guest.initrd} -serial unix:{serial},server=on,wait=off "
                f"{devices.format(serial)}-netdev tap,id=n0,ifname={tap},script=no,downscript=no "
                f"-device virtio-net-pci,netdev=n0,mac=02:00:00:00:00:0{number + 1} -append"
            )
            started.append(start_beside([*command.split(), guest.append]))
            shells.append(_shell(serial))
            address(shells[-1], f"10.5.0.{number + 1}/24")
        shells[1].check(f"dd if=/dev/zero of=/tmp/file bs=1M count={FILE_MIB} 2>/dev/null; httpd -p 5000 -h /tmp")
        yield shells[0], shells[1], [process.pid for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()


def _shell(serial: Path) -> GuestShell:
    link = socket.socket(socket.AF_UNIX)
    deadline = time.monotonic() + 30
    while True:
        try:
            link.connect(str(serial))
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    shell = GuestShell(link)
    shell.wait_ready()
    return shell


def _processor_seconds(pids: Sequence[int]) -> float:
    """The processor time of these processes so far."""
    tasks = [task for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of a pair of guests."""

    mbit_per_second: float
    processor_seconds: float
    ping_milliseconds: float


def _sample(one: GuestShell, pids: Sequence[int]) -> Sample:
    before = _processor_seconds(pids)
    rate = in_turn(one, FILES)
    return Sample(rate, _processor_seconds(pids) - before, ping_milliseconds(one))


_SHORT = {"mbit_per_second": "tcp", "ping_milliseconds": "ping", "processor_seconds": "processor"}


def beside_a_plain_bridge(rounds: int = 11) -> dict[str, float]:
    """Our bridge's rate, ping and processor time divided by a plain one's: the medians of the rounds' ratios."""
    environment: Any = _Environment()
    lab = BridgeLab(environment)
    ratios: dict[str, list[float]] = {}
    with ExitStack() as running:
        ours, _ = running.enter_context(guests("bridge", 1, lab))
        machines = [registry.load(name) for name in ("one", "two")]
        pairs = {"ours": (ours, [processes_of(machine.runtime)["qemu"].pid for machine in machines])}
        for pair, devices in (("plain", ""), ("alike", OUR_DEVICES)):
            one, _, pids = running.enter_context(plain_guests(lab, machines[0].spec.cpu_model, pair, devices))
            pairs[pair] = (one, pids)
        for number in range(rounds + 1):
            names = sorted(pairs, reverse=number % 2 == 1)
            found = {name: _sample(*pairs[name]) for name in names}
            if number:  # the first round does not count
                for pair, suffix in (("plain", ""), ("alike", "-devices")):
                    for what in ("mbit_per_second", "ping_milliseconds", "processor_seconds"):
                        ratio = getattr(found["ours"], what) / getattr(found[pair], what)
                        ratios.setdefault(_SHORT[what] + suffix, []).append(ratio)
    return {name: median(found) for name, found in ratios.items()}
