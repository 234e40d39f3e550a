# SPDX-License-Identifier: Apache-2.0
"""The way out of an internal switch without privileges."""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest

from tests.support import require_qemu
from tests.vmm.net import packets
from tests.vmm.net.lab import SwitchLab
from vmm import errors
from vmm.net import gateway
from vmm.net.gateway import Gateway, GatewaySetup

SETUP = GatewaySetup("10.0.7.0/24", "10.0.7.1", "10.0.7.3", "10.0.7.50", "vmm.internal")


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[SwitchLab]:
    """A switch that is not started yet."""
    require_qemu()
    one = SwitchLab(monkeypatch)
    yield one
    one.close()


def arp_request(station: bytes, target: str) -> bytes:
    """Who has that address?"""
    head = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1)
    body = station + socket.inet_aton("10.0.7.9") + bytes(6) + socket.inet_aton(target)
    return packets.ethernet(b"\xff" * 6, station, head + body, kind=0x0806)


def is_answered(lab: SwitchLab, guest: socket.socket) -> bool:
    """True when the gateway answers within seconds."""
    deadline = time.monotonic() + 15
    guest.settimeout(0.5)
    while time.monotonic() < deadline:
        try:
            lab.send("a", arp_request(packets.mac(1), "10.0.7.1"))
            if guest.recv(2000)[12:14] == b"\x08\x06":
                return True
        except TimeoutError:
            continue
        except ConnectionRefusedError:  # a switch that is just being started
            time.sleep(0.05)
    return False


def test_the_gateway_answers_and_is_started_again(lab: SwitchLab) -> None:
    """A guest finds it on the network, also after it was killed; it ends with the switch."""
    guest = lab.plug("a")
    lab.backend.ask("set_gateway", gateway=asdict(SETUP))
    assert is_answered(lab, guest)
    status = lab.backend.status()
    assert status is not None
    assert status["gateway"]["running"]
    children = f"/proc/{status['pid']}/task/{status['pid']}/children"
    with open(children, encoding="ascii") as file:
        (child,) = map(int, file.read().split())
    os.kill(child, signal.SIGKILL)
    assert is_answered(lab, guest)
    with open(children, encoding="ascii") as file:
        (child,) = map(int, file.read().split())
    os.kill(status["pid"], signal.SIGKILL)
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{child}"):
        assert time.monotonic() < deadline, "the helper outlives its switch"
        time.sleep(0.05)
    lab.backend.ensure_running()
    assert is_answered(lab, guest)


def test_command() -> None:
    """A QEMU without a machine, sandboxed; closed to the outside, and with ports, when asked for."""
    words = gateway.command(SETUP, "/peer", "/switch")
    assert words[:3] == ["qemu-system-x86_64", "-machine", "none"]
    (user,) = [word for word in words if word.startswith("user,")]
    network = "net=10.0.7.0/24,host=10.0.7.1,dns=10.0.7.3,dhcpstart=10.0.7.50"
    assert user == f"user,id=out,ipv6=off,{network},domainname=vmm.internal"
    closed = replace(SETUP, outside=False, forwards=("tcp:127.0.0.1:2222-10.0.7.50:22",))
    (user,) = [word for word in gateway.command(closed, "/p", "/s") if word.startswith("user,")]
    assert user.endswith(",restrict=on,hostfwd=tcp:127.0.0.1:2222-10.0.7.50:22")


@pytest.mark.parametrize(
    "change",
    [
        {"network": "rubbish"}, {"host": "10.0.7"}, {"colour": 1}, {"domain": "a,restrict=off"},
        {"forwards": ["tcp::1-:2,guestfwd=x"]}, {"forwards": ["tcp::1-:2"] * 65},
    ],
)  # fmt: skip
def test_settings_cannot_smuggle_options(change: dict[str, Any]) -> None:
    """What is no address, or holds a comma, never reaches QEMU's command line."""
    with pytest.raises(errors.InvalidSpec):
        Gateway.from_document({**asdict(SETUP), **change}, "/tmp")
