# SPDX-License-Identifier: Apache-2.0
"""Guests that pretend to be routers, and IPv6 on the bridges of all kinds of switches."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vmm.net.hosts import BridgeHost, bridge_host
from tests.waiting import wait_until
from vmm.net.switch_spec import SwitchSpec, make_switch

pytestmark = [pytest.mark.netns]

INTERNAL = make_switch(name="int", type="internal", backend="bridge", address="10.77.9.1/24", nat=True, dhcp=False)
PRIVATE = make_switch(name="prv", type="private", backend="bridge")
EXTERNAL = make_switch(name="ext", type="external", backend="bridge", uplink="up0")
ALONE = make_switch(name="alone", type="external", backend="bridge", uplink="up0", host=False)

SECONDS = 120.0  # programs start, on a possibly busy machine

# A router for half an hour, with a network for addresses (RFC 4861, 4.2 and 4.6.2). The kernel adds the checksum.
_ADVERTISE = """
import socket, struct, sys
sock = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
prefix = struct.pack(">BBBBIII", 3, 4, 64, 0xC0, 1800, 1800, 0) + socket.inet_pton(socket.AF_INET6, "2001:db8:bad::")
advertisement = struct.pack(">BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0) + prefix
sock.sendto(advertisement, ("ff02::1", 0, 0, socket.if_nametoindex(sys.argv[1])))
"""


@pytest.fixture
def host(tmp_path: Path) -> Iterator[BridgeHost]:
    """A host without cards."""
    with bridge_host(tmp_path) as made:
        yield made


def advertise(host: BridgeHost, guest: str, interface: str) -> None:
    """Send one advertisement, as soon as the interface has its own address."""
    wait_until(
        lambda: "fe80::" in host.spaces.run(guest, f"ip -6 addr show dev {interface} -tentative"),
        "an address",
        SECONDS,
    )
    host.spaces.run(guest, f"{sys.executable} -c '{_ADVERTISE}' {interface}")


def heard(host: BridgeHost, interface: str) -> int:
    """How many advertisements the host's IPv6 received on an interface."""
    counters = host.run(f"cat /proc/net/dev_snmp6/{interface}")
    return sum(int(line.split()[1]) for line in counters.splitlines() if line.startswith("Icmp6InRouterAdv"))


def learned(host: BridgeHost) -> str:
    """Default routes, and addresses of the advertised network."""
    return host.run("ip -6 route show default; ip -6 addr | grep 2001:db8:bad || true")


def setting(host: BridgeHost, spec: SwitchSpec, name: str) -> str:
    """An IPv6 setting of a switch's bridge."""
    return host.setting(f"net/ipv6/conf/{spec.bridge_name}/{name}")


@pytest.mark.parametrize("spec", [INTERNAL, PRIVATE, ALONE], ids=lambda spec: str(spec.name))
def test_a_guest_cannot_become_the_hosts_router(host: BridgeHost, spec: SwitchSpec) -> None:
    """`INV-NO-GUEST-ROUTER`: its advertisements have no effect, even if IPv6 is switched on everywhere.

    Checking the switch again switches IPv6 off again.
    """
    host.link("up0", "lan", "10.9.0.254/24")
    host.apply(spec)
    bridge = spec.bridge_name
    guest = host.guest(spec, "one", "10.77.9.2/24")
    assert host.run(f"ip -6 addr show dev {bridge}") == ""
    host.run("sysctl -qw net.ipv6.conf.all.disable_ipv6=0 net.ipv6.conf.all.accept_ra=2")
    if spec is INTERNAL:  # the rules of the others keep guests from the host altogether
        before = heard(host, bridge)
        advertise(host, guest, "eth0")
        wait_until(lambda: heard(host, bridge) > before, "the advertisement", SECONDS)
    else:
        advertise(host, guest, "eth0")
    assert learned(host) == ""
    assert setting(host, spec, "accept_ra") == setting(host, spec, "autoconf") == "0"
    assert setting(host, spec, "disable_ipv6") == "0"
    host.apply(spec)
    assert host.run(f"ip -6 addr show dev {bridge}") == ""


@pytest.mark.parametrize("accepts", ["0", "2"])
def test_an_external_switch_keeps_the_cards_ipv6_settings(host: BridgeHost, accepts: str) -> None:
    """The host listens on the bridge to the routers to which it listened on the card."""
    there = host.link("up0", "lan", "10.9.0.254/24")
    host.run(f"sysctl -qw net.ipv6.conf.up0.forwarding=1 net.ipv6.conf.up0.accept_ra={accepts}")
    host.run("sysctl -qw net.ipv6.conf.up0.temp_valid_lft=4711")
    host.apply(EXTERNAL)
    bridge = EXTERNAL.bridge_name
    assert setting(host, EXTERNAL, "accept_ra") == accepts
    assert setting(host, EXTERNAL, "forwarding") == "1"
    assert setting(host, EXTERNAL, "temp_valid_lft") == "4711"
    before = heard(host, bridge)
    advertise(host, there, "far")
    wait_until(lambda: heard(host, bridge) > before, "the advertisement", SECONDS)
    if accepts == "2":
        wait_until(lambda: f"dev {bridge} " in host.run("ip -6 route show default"), "its route", SECONDS)
        assert "2001:db8:bad:" in learned(host)
    else:
        assert learned(host) == ""
    host.undo(EXTERNAL)
    assert host.setting("net/ipv6/conf/up0/accept_ra") == accepts
