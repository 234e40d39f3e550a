# SPDX-License-Identifier: Apache-2.0
"""The promises of the virtual switch in numbers: each is one measurement with a goal.

Everything is measured in separate folders and network namespaces. What needs root says so. Each can be run alone:
`script/bench net -- --only killed`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import net_stations
from benchmarks.common import start_beside
from tests.vmm.net.machines import MachineLab
from tests.vmm.net.packets import ethernet, mac
from vmm.model.spec import DEFAULT_STORM_FRAMES
from vmm.net import switches
from vmm.net.engine import PortRules
from vmm.net.host_side import HostSide
from vmm.net.ports import PortSetup
from vmm.net.switch_process import SwitchProcess
from vmm.net.switch_spec import make_switch

SECONDS = 4.0
RATE = 100_000_000
PORTS = 200


@dataclass(frozen=True, slots=True)
class Goal:
    """A measurement: its unit, and the value that must be reached."""

    words: str
    unit: str
    limit: float
    at_least: bool
    measure: Callable[[], float]

    def is_met(self, value: float) -> bool:
        """Whether the value is good enough."""
        return value >= self.limit if self.at_least else value <= self.limit


@contextmanager
def environment() -> Iterator[Any]:
    """Set variables as a test's monkeypatch does, and restore them."""
    before = dict(os.environ)

    class Environment:
        """The one method that is needed."""

        def setenv(self, name: str, value: str) -> None:
            """Set a variable."""
            os.environ[name] = value

    try:
        yield Environment()
    finally:
        os.environ.clear()
        os.environ.update(before)


class Stations:
    """Sockets as the guests of a `user` switch: of the one given, or of one in the folder."""

    def __init__(self, folder: Path, backend: SwitchProcess | None = None) -> None:
        self.folder = folder
        self.backend = backend or SwitchProcess(str(folder / "rt" / "sw"), "bench")
        self.setups: dict[str, PortSetup] = {}
        self.socks: dict[str, socket.socket] = {}

    def plug(self, name: str, number: int, rate: int = 0, *, as_qemu: bool = False) -> socket.socket:
        """A station with that address, and the unmodified rules of an adapter.

        `as_qemu`: its socket is not connected, so another process may take the switch's place.
        """
        rules = PortRules(frozenset({mac(number)}), storm_frames_per_second=DEFAULT_STORM_FRAMES)
        setup = PortSetup(name, str(self.folder / f"{name}.s"), str(self.folder / f"{name}.g"), rules, rate)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        sock.bind(setup.peer)
        self.backend.plug(setup)
        self.setups[name], self.socks[name] = setup, sock
        if not as_qemu:
            sock.connect(setup.address)
        return sock

    def close(self) -> None:
        """End it."""
        self.backend.stop()
        for sock in self.socks.values():
            sock.close()


@contextmanager
def stations() -> Iterator[Stations]:
    """A switch in a folder of its own."""
    with environment() as variables, tempfile.TemporaryDirectory(prefix="vmm-net-") as folder:
        variables.setenv("VMM_RUNTIME", str(Path(folder) / "rt"))
        one = Stations(Path(folder))
        try:
            yield one
        finally:
            one.close()


def _flood(sock: socket.socket, frame: bytes, pause_seconds: float) -> None:
    sock.setblocking(pause_seconds == 0)
    while True:
        try:
            sock.send(frame)
        except OSError:
            time.sleep(0.001)
        if pause_seconds:
            time.sleep(pause_seconds)


def _drain(sock: socket.socket) -> None:
    sock.setblocking(True)
    while True:
        sock.recv(20000)


@contextmanager
def _process(work: Callable[..., None], *arguments: object) -> Iterator[None]:
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def gigabits() -> float:
    """Frames of 1,514 bytes from socket to socket."""
    with tempfile.TemporaryDirectory(prefix="vmm-net-") as folder, net_stations.user_switch(Path(folder)) as plug:
        return net_stations.frame_rate(plug, 1514, SECONDS) * 1514 * 8 / 1e9


def _quiet_p99(flood: bytes, *, reads: bool) -> float:
    """Milliseconds of the slowest hundredth of a quiet pair's round trips while another station floods."""
    with stations() as here:
        one, two, flooder, other = (here.plug(name, number) for number, name in enumerate("abcd", 1))
        for sock, number in ((two, 2), (other, 4)):
            sock.send(ethernet(mac(1), mac(number), bytes(46)))
        times = []
        with _process(_flood, flooder, flood, 0), _process(_drain if reads else time.sleep, other if reads else 3600):
            time.sleep(0.3)
            for sock in (one, two):
                sock.settimeout(1)
            end = time.perf_counter() + SECONDS
            number = 0
            while (start := time.perf_counter()) < end:
                number += 1
                mark = number.to_bytes(4, "big") + bytes(42)
                one.send(ethernet(mac(2), mac(1), mark))
                for sock, back in ((two, ethernet(mac(1), mac(2), mark)), (one, b"")):
                    while sock.recv(2000)[14:18] != mark[:4]:
                        pass  # of the flood
                    if back:
                        sock.send(back)
                times.append(time.perf_counter() - start)
                time.sleep(0.002)
        return sorted(times)[len(times) * 99 // 100] * 1e3


def quiet_pair() -> float:
    """The worst of three floods: to one station, to one that never reads, to all."""
    to_one = ethernet(mac(4), mac(3), bytes(1500))
    to_all = ethernet(b"\xff" * 6, mac(3), bytes(1500))
    return max(_quiet_p99(to_one, reads=True), _quiet_p99(to_one, reads=False), _quiet_p99(to_all, reads=True))


def storm_megabytes() -> float:
    """Memory of a switch with 200 ports, none of which is read, while one sends 10,000 broadcasts a second."""
    with stations() as here:
        flooder = here.plug("flooder", 1)
        for number in range(2, PORTS + 1):
            here.plug(f"p{number}", number)
        status = here.backend.status()
        assert status is not None
        with _process(_flood, flooder, ethernet(b"\xff" * 6, mac(1), bytes(1500)), 0.0001):
            time.sleep(SECONDS)
        text = Path(f"/proc/{status['pid']}/status").read_text()
        return int(text.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


def killed_seconds() -> float:
    """The longest pause between frames of two stations when the switch is killed under a machine that does nothing."""
    with environment() as variables:
        lab = MachineLab(variables)
        try:
            switches.create(make_switch(name="bench"))
            lab.define("idle", {"switch": "bench"}, kernel=None, initrd=None, append=None, memory_bytes=64 << 20)
            lab.manager.start("idle")
            time.sleep(2)  # until its worker has checked the switch
            here = Stations(lab.folder, HostSide(switches.load("bench")).user)
            here.plug("a", 11, as_qemu=True)
            receiver = here.plug("b", 12, as_qemu=True)
            done = threading.Event()
            sender = threading.Thread(target=_send_by_path, args=(here.socks["a"], here.setups["a"].address, done))
            sender.start()
            status = here.backend.status()
            assert status is not None
            worst = _longest_pause(receiver, lambda: os.kill(status["pid"], signal.SIGKILL))
            done.set()
            sender.join()
            return worst
        finally:
            lab.close()


def _send_by_path(sock: socket.socket, address: str, done: threading.Event) -> None:
    """As QEMU: to whatever process is bound there."""
    sock.setblocking(False)
    while not done.is_set():
        with suppress(OSError):
            sock.sendto(ethernet(mac(12), mac(11), bytes(46)), address)
        time.sleep(0.001)


def _longest_pause(receiver: socket.socket, kill: Callable[[], None]) -> float:
    receiver.settimeout(10)
    receiver.recv(2000)
    last, worst, start = time.perf_counter(), 0.0, time.perf_counter()
    was_killed = False
    while last < start + SECONDS:
        receiver.recv(2000)
        now = time.perf_counter()
        worst = max(worst, now - last if was_killed else 0.0)
        last = now
        if not was_killed and now > start + 1:
            kill()
            was_killed = True
    return worst


def bandwidth_user() -> float:
    """By what percentage an idle station that begins to send misses its limit in 4 seconds."""
    with stations() as here:
        sender, receiver = here.plug("a", 1, RATE), here.plug("b", 2)
        receiver.send(ethernet(mac(1), mac(2), bytes(46)))
        time.sleep(1)
        receiver.settimeout(5)
        with _process(_flood, sender, ethernet(mac(2), mac(1), bytes(1500)), 0):
            receiver.recv(2000)
            start, got = time.perf_counter(), 0
            while (now := time.perf_counter()) < start + SECONDS:
                got += len(receiver.recv(2000))
        return abs(got * 8 / (now - start) / RATE - 1) * 100


class Received:
    """What a card received, read from the kernel through a socket of the card's namespace."""

    def __init__(self, name: str) -> None:
        from vmm.net.bridge import Kernel

        self._kernel = Kernel()
        self._index = self._kernel.index(name)

    def size_bytes(self) -> int:
        """So far."""
        found: int = self._kernel._netlink.get_links(self._index)[0].get_attr("IFLA_STATS64")["rx_bytes"]
        return found

    def close(self) -> None:
        """End it."""
        self._kernel.close()


def bandwidth_bridge() -> float:
    """The same on a bridge; needs root."""
    from tests.vmm.net.test_enforcing import _FLOOD, ANY, Bridge
    from vmm.net.nft import GuestPort

    bridge = Bridge()
    with bridge.spaces.inside(bridge.two):
        received = Received("eth0")
    try:
        bridge.enforce(GuestPort("vt0", ANY, RATE), GuestPort("vt1", ANY))
        time.sleep(1)
        flood = start_beside(["ip", "netns", "exec", bridge.one, sys.executable, "-c", _FLOOD])
        try:
            before = received.size_bytes()
            while received.size_bytes() == before:
                pass
            start = time.perf_counter()
            while time.perf_counter() < start + SECONDS:
                bridge.enforce(GuestPort("vt0", ANY, RATE), GuestPort("vt1", replace(ANY, dhcp_guard=True)))
                time.sleep(0.5)
            got, seconds = received.size_bytes() - before, time.perf_counter() - start
        finally:
            flood.kill()
            flood.wait()
        return abs(got * 8 / seconds / RATE - 1) * 100
    finally:
        received.close()
        bridge.spaces.close()


_guests: dict[str, float] = {}


def _of_guests(what: str) -> float:
    """A ratio of our bridge to a plain one, measured once for all such goals."""
    if not _guests:
        from benchmarks.net_guests import beside_a_plain_bridge

        _guests.update(beside_a_plain_bridge())
    return _guests[what]


GOALS = {
    "frames": Goal("user switch, frames of 1,514 bytes between sockets", "Gbit/s", 1.3, True, gigabits),
    "quiet-pair": Goal("user switch, p99 of a quiet pair beside a flood", "ms", 5.0, False, quiet_pair),
    "storm-memory": Goal("user switch, 200 ports under a storm", "MB", 60.0, False, storm_megabytes),
    "killed": Goal("user switch killed: how long guests are cut off", "s", 0.2, False, killed_seconds),
    "bandwidth-user": Goal("user switch, a limit over 4 s from idle misses by", "%", 5.0, False, bandwidth_user),
    "bandwidth-bridge": Goal("bridge, a limit over 4 s from idle misses by", "%", 5.0, False, bandwidth_bridge),
    "guest-tcp": Goal("bridge, guests' TCP as part of a plain bridge's", "×", 1.0, True, lambda: _of_guests("tcp")),
    "guest-ping": Goal(
        "bridge, guests' ping as part of a plain bridge's", "×", 1.5, False, lambda: _of_guests("ping")
    ),
    "guest-tcp-devices": Goal(
        "the same beside a plain QEMU with the same devices", "×", 1.0, True, lambda: _of_guests("tcp-devices")
    ),
    "guest-ping-devices": Goal(
        "the same beside a plain QEMU with the same devices", "×", 1.5, False, lambda: _of_guests("ping-devices")
    ),
    "guest-processor": Goal(
        "bridge, guests' TCP: processor time as part of a plain bridge's",
        "×",
        1.1,
        False,
        lambda: _of_guests("processor"),
    ),
}
