# SPDX-License-Identifier: Apache-2.0
"""The gateway of an internal switch without privileges."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest

from tests.support import require_qemu
from tests.vmm.net import dhcp_client, packets
from tests.vmm.net.lab import SwitchLab
from tests.waiting import becomes, wait_until
from vmm.host.proc import ProcessRef
from vmm.model import errors
from vmm.net import frames, gateway
from vmm.net.dhcp_server import DhcpSetup
from vmm.net.engine import PortRules
from vmm.net.gateway import GatewaySetup

SETUP = GatewaySetup("10.0.7.0/24", "10.0.7.1", "10.0.7.3", "10.0.7.50", "vmm.internal")


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[SwitchLab]:
    """A switch that is not started yet."""
    require_qemu()
    one = SwitchLab(monkeypatch)
    yield one
    one.close()


def arp_request(station: bytes, target: str) -> bytes:
    """An ARP request for that address."""
    head = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1)
    body = station + socket.inet_aton("10.0.7.9") + bytes(6) + socket.inet_aton(target)
    return packets.ethernet(b"\xff" * 6, station, head + body, kind=0x0806)


def is_answered(lab: SwitchLab, guest: socket.socket) -> bool:
    """True if the gateway answers within seconds."""
    guest.settimeout(0.5)

    def answers() -> bool:
        try:
            lab.send("a", arp_request(packets.mac(1), "10.0.7.1"))
            return guest.recv(2000)[12:14] == b"\x08\x06"
        except (TimeoutError, ConnectionRefusedError):  # refused by a switch that is just starting
            return False

    return becomes(answers)


def test_the_gateway_answers_and_is_started_again(lab: SwitchLab) -> None:
    """A guest finds it on the network, also after it was killed; it ends with the switch."""
    guest = lab.plug("a")
    lab.backend.ask("set_gateway", gateway=asdict(SETUP))
    assert is_answered(lab, guest)
    status = lab.backend.status()
    assert status is not None
    assert status["gateway"]["running"]
    os.kill(status["gateway"]["pid"], signal.SIGKILL)
    assert is_answered(lab, guest)
    again = lab.backend.status()
    assert again is not None
    child = again["gateway"]["pid"]
    assert child not in (None, status["gateway"]["pid"])
    os.kill(status["pid"], signal.SIGKILL)
    wait_until(lambda: not os.path.exists(f"/proc/{child}"), "the helper ends with its switch")
    lab.backend.ensure_running()
    assert is_answered(lab, guest)


def answer(lab: SwitchLab, name: str, *questions: bytes) -> dhcp_client.Answer:
    """The switch's answer to the last of these messages."""
    for question in questions:
        lab.send(name, question)
        while (frame := lab.guests[name].recv(2000))[42:43] != b"\x02":  # broadcasts of others
            continue
    return dhcp_client.read(frame)


def test_dhcp_leases_outlive_the_switchs_process(lab: SwitchLab) -> None:
    """Leases, also fixed ones, outlive the process: no client gets an address that another has. The gateway's own DHCP
    is silent."""
    one, two = packets.mac(1), packets.mac(2)
    lab.plug("a", rules=PortRules(addresses=frozenset({one})))
    lab.plug("b", rules=PortRules(addresses=frozenset({two})))
    dhcp = DhcpSetup(
        "10.0.7.0/24", "10.0.7.1", "10.0.7.200", "10.0.7.200", fixed=((frames.format_mac(two), "10.0.7.9", "web"),)
    )
    leases = str(lab.folder / "leases")
    lab.backend.ask("set_gateway", gateway=asdict(SETUP), dhcp=dhcp.to_document(), leases=leases)
    got = answer(
        lab,
        "a",
        dhcp_client.ask(one, dhcp_client.DISCOVER),
        dhcp_client.ask(one, dhcp_client.REQUEST, options={50: socket.inet_aton("10.0.7.200")}),
    )
    assert (got.kind, got.yours, got.address(54)) == (dhcp_client.ACK, "10.0.7.200", "10.0.7.1")
    status = lab.backend.status()
    assert status is not None
    os.kill(status["pid"], signal.SIGKILL)
    ProcessRef(status["pid"], 0).wait(10)
    lab.backend.ensure_running()
    for name in ("a", "b"):
        lab.plug(name, rules=PortRules(addresses=frozenset({one if name == "a" else two})))
    taken = {50: socket.inet_aton("10.0.7.200")}
    assert answer(lab, "b", dhcp_client.ask(two, dhcp_client.REQUEST, options=taken)).kind == dhcp_client.NAK
    assert answer(lab, "b", dhcp_client.ask(two, dhcp_client.DISCOVER)).yours == "10.0.7.9"
    renewed = answer(lab, "a", dhcp_client.ask(one, dhcp_client.REQUEST, present="10.0.7.200"))
    assert (renewed.kind, renewed.yours) == (dhcp_client.ACK, "10.0.7.200")


def test_without_dhcp_no_answer_passes(lab: SwitchLab) -> None:
    """The gateway's own DHCP cannot be switched off; its answers are dropped."""
    guest = lab.plug("a")
    # With the host's loopback open: otherwise the gateway would not get broadcasts at all.
    lab.backend.ask("set_gateway", gateway=asdict(replace(SETUP, host_loopback=True)), dhcp=None)
    assert is_answered(lab, guest)
    lab.send("a", dhcp_client.ask(packets.mac(1), dhcp_client.DISCOVER))
    assert is_answered(lab, guest)  # earlier frames have arrived
    status = lab.backend.status()
    assert status is not None
    (gateway,) = [one for one in status["ports"] if one["name"] == "gateway"]
    assert gateway["drops"]["dhcp-guard"] == 1


def test_a_gateway_that_cannot_start_is_reported(lab: SwitchLab) -> None:
    """The switch's status says that it does not run, and why."""
    lab.backend.ensure_running()
    lab.backend.ask("set_gateway", gateway=asdict(replace(SETUP, first="10.0.7.1")), dhcp=None)

    def is_running() -> bool:
        status = lab.backend.status()
        return status is not None and status["gateway"]["running"]

    wait_until(lambda: not is_running(), "the gateway ends")
    status = lab.backend.status()
    assert status is not None
    assert "DHCP" in status["gateway"]["said"]


def test_command() -> None:
    """It is a QEMU without a machine, sandboxed; closed to the outside, and with forwarded ports, if requested."""
    words = gateway.command(SETUP, "/peer", "/switch")
    assert words[:3] == ["qemu-system-x86_64", "-machine", "none"]
    user = json.loads(words[words.index("-netdev") + 1])
    network = {"net": "10.0.7.0/24", "host": "10.0.7.1", "dns": "10.0.7.3", "dhcpstart": "10.0.7.50"}
    assert user == {"type": "user", "id": "out", "ipv6": False, "domainname": "vmm.internal", **network}
    closed = replace(SETUP, outside=False, forwards=("tcp:127.0.0.1:2222-10.0.7.50:22",))
    words = gateway.command(closed, "/p", "/s")
    user = json.loads(words[words.index("-netdev") + 1])
    assert (user["restrict"], user["hostfwd"]) == (True, [{"str": "tcp:127.0.0.1:2222-10.0.7.50:22"}])


@pytest.mark.parametrize(
    "change",
    [
        {"network": "rubbish"}, {"host": "10.0.7"}, {"colour": 1}, {"domain": "a,restrict=off"},
        {"forwards": ["tcp::1-:2,guestfwd=x"]}, {"forwards": ["tcp::1-:2"] * 65},
        {"forwards": ["tcp::x-:2"]}, {"forwards": [1]}, {"domain": 1},
    ],
)  # fmt: skip
def test_settings_cannot_smuggle_options(change: dict[str, Any]) -> None:
    """A text that is not an address, or contains a comma, never reaches QEMU's command line."""
    with pytest.raises(errors.InvalidSpec):
        GatewaySetup.from_document({**asdict(SETUP), **change})
