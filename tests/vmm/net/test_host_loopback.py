# SPDX-License-Identifier: Apache-2.0
"""Guests that try to reach this host's loopback through the gateway of a `user` switch."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest

from tests.support import require_qemu
from tests.vmm.net import packets
from tests.vmm.net.lab import SwitchLab
from tests.waiting import wait_until
from vmm.model import errors
from vmm.net import frames
from vmm.net.engine import Drop, Engine, PortRules
from vmm.net.gateway import GatewaySetup
from vmm.net.host_loopback import LoopbackFilter
from vmm.net.switch_spec import make_switch

SETUP = GatewaySetup("10.0.7.0/24", "10.0.7.1", "10.0.7.3", "10.0.7.4", forwards=("udp:127.0.0.1:99-10.0.7.9:53",))
GUEST = "10.0.7.9"
SECONDS = 120.0  # a QEMU starts, on a possibly busy machine
SYN, ACK, SYN_ACK, FIN = 0x02, 0x10, 0x12, 0x01


def checksum(data: bytes) -> int:
    """RFC 1071."""
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF - total


def packet(target: str, protocol: int, payload: bytes, *, source: str = GUEST, fragment: int = 0) -> bytes:
    """A frame to the gateway."""
    ends = socket.inet_aton(source), socket.inet_aton(target)
    header = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 1, fragment, 64, protocol, 0, *ends)
    header = header[:10] + checksum(header).to_bytes(2, "big") + header[12:]
    return packets.ethernet(frames.BROADCAST, packets.mac(1), header + payload, kind=0x0800)


def tcp(target: str, port: int, flags: int = SYN, source: str = GUEST) -> bytes:
    """A TCP segment from a guest's port 4000."""
    segment = struct.pack(">HHIIBBHHH", 4000, port, 1, 0, 0x50, flags, 8192, 0, 0)
    pseudo = socket.inet_aton(source) + socket.inet_aton(target) + struct.pack(">BBH", 0, 6, len(segment))
    segment = segment[:16] + checksum(pseudo + segment).to_bytes(2, "big") + segment[18:]
    return packet(target, 6, segment, source=source)


def udp(target: str, port: int, from_port: int = 4000, *, source: str = GUEST, fragment: int = 0) -> bytes:
    """A datagram of a guest."""
    return packet(target, 17, packets.udp(from_port, port, bytes(8)), source=source, fragment=fragment)


REFUSED = {
    "the gateway": tcp("10.0.7.1", 80),
    "the gateway, UDP": udp("10.0.7.1", 5000),
    "everybody": udp("255.255.255.255", 5000),
    "loopback": tcp("127.0.0.1", 80),
    "loopback, another": udp("127.9.9.9", 80),
    "this host": tcp("0.0.0.0", 80),
    "the name server, another port": udp("10.0.7.3", 80),
    "a fragment": udp("10.0.7.1", 5000, 53, fragment=0x2000),
    "a later fragment": udp("10.0.7.1", 5000, 53, fragment=0x0001),
    "another guest's": tcp("10.0.7.77", 80),
    "behind a priority tag": (lambda one: one[:12] + frames.tag(0) + one[12:])(tcp("10.0.7.1", 80)),
    "another guest's forwarded port": udp("10.0.7.1", 5000, 53, source="10.0.7.10"),
    "a segment cut short": packet("10.0.7.1", 6, bytes(12)),
}
PASSED = {
    "the world": tcp("192.0.2.1", 80),
    "the world, in fragments": udp("192.0.2.1", 80, fragment=0x2000),
    "ping": packet("10.0.7.1", 1, bytes([8, 0]) + bytes(6)),
    "the name server": udp("10.0.7.3", 53),
    "the name server, TCP": tcp("10.0.7.3", 53),
    "an answer from a forwarded port": tcp("10.0.7.1", 40000, SYN_ACK),
    "its end": tcp("10.0.7.1", 40000, FIN | ACK),
    "an answer from a forwarded UDP port": udp("10.0.7.1", 40000, 53),
    "ARP": packets.ethernet(frames.BROADCAST, packets.mac(1), bytes(28), kind=0x0806),
    "a short one": packets.ethernet(frames.BROADCAST, packets.mac(1), bytes(4), kind=0x0800),
}


@pytest.mark.parametrize("what", [*REFUSED, *PASSED])
def test_what_reaches_the_hosts_loopback_is_refused(what: str) -> None:
    """`INV-HOST-LOOPBACK`: under any address; what a guest needs from its gateway passes."""
    assert LoopbackFilter(SETUP).refuses((REFUSED | PASSED)[what]) is (what in REFUSED)


def test_guests_get_broadcasts_that_the_gateway_does_not() -> None:
    """A broadcast reaches the other guests, and is counted as dropped on its way to the host."""
    switch = Engine()
    for name in ("a", "b", "gateway"):
        switch.add_port(name, PortRules())
    switch.set_dhcp(None, "gateway")
    frame = REFUSED["everybody"]
    assert {name for name, _ in switch.forward("a", frame, 0.0)} == {"b", "gateway"}
    switch.loopback = LoopbackFilter(SETUP)
    assert [name for name, _ in switch.forward("a", frame, 0.0)] == ["b"]
    assert switch.ports["a"].counters.drops == {Drop.LOOPBACK: 1}


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[SwitchLab]:
    """A switch that is not started yet."""
    require_qemu()
    one = SwitchLab(monkeypatch)
    yield one
    one.close()


def arp(target: str) -> bytes:
    """A guest's ARP request for that address."""
    body = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + packets.mac(1) + socket.inet_aton(GUEST)
    return packets.ethernet(frames.BROADCAST, packets.mac(1), body + bytes(6) + socket.inet_aton(target), kind=0x0806)


def received(guest: socket.socket, kind: bytes) -> list[bytes]:
    """The frames of that type that a guest has received."""
    found: list[bytes] = []
    guest.setblocking(False)
    while True:
        try:
            frame = guest.recv(2000)
        except BlockingIOError:
            return [one for one in found if one[12:14] == kind]
        if frame[30:34] == socket.inet_aton(GUEST) or frame[12:14] == b"\x08\x06":
            found.append(frame)


def drops(lab: SwitchLab) -> int:
    """Dropped frames of the guest that would have reached the host's loopback."""
    status = lab.backend.status()
    assert status is not None
    return sum(int(port["drops"].get(Drop.LOOPBACK, 0)) for port in status["ports"] if port["name"] == "a")


@pytest.mark.parametrize("allowed", [False, True])
def test_a_program_on_127_0_0_1(lab: SwitchLab, allowed: bool) -> None:
    """`INV-HOST-LOOPBACK`: its port answers a guest's SYN only if that is switched on, at the gateway's address."""
    setup = replace(SETUP, forwards=(), host_loopback=allowed)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        guest = lab.plug("a")
        lab.backend.ask("set_gateway", gateway=asdict(setup))

        def is_known() -> bool:
            lab.send("a", arp("10.0.7.1"))
            return bool(received(guest, b"\x08\x06"))

        wait_until(is_known, "the gateway", SECONDS)
        targets = ["10.0.7.1", "127.0.0.1", "0.0.0.0", "255.255.255.255"]
        if allowed:

            def is_answered() -> bool:
                lab.send("a", tcp("10.0.7.1", port))
                return any(one[47] & SYN_ACK == SYN_ACK for one in received(guest, b"\x08\x00"))

            wait_until(is_answered, "the answer of 127.0.0.1", SECONDS)
            assert drops(lab) == 0
        else:
            for target in targets:
                lab.send("a", tcp(target, port))
            wait_until(lambda: drops(lab) == len(targets), "four drops", SECONDS)
            wait_until(is_known, "the gateway's next answer", SECONDS)
            assert received(guest, b"\x08\x00") == []


def test_host_loopback_needs_a_user_gateway() -> None:
    """A bridge never leads to 127.0.0.1, and a private switch has no gateway: the option is refused."""
    internal = {"name": "x", "type": "internal", "address": "10.77.0.1/24", "host_loopback": True}
    assert make_switch(**internal).gateway().host_loopback
    for settings in ({**internal, "backend": "bridge"}, {"name": "x", "host_loopback": True}):
        with pytest.raises(errors.InvalidSpec, match="loopback"):
            make_switch(**settings)
