# SPDX-License-Identifier: Apache-2.0
"""What a host with a NAT switch forwards: all that its guests ask for, wherever routes lead by then, and no more."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vmm.net.hosts import BridgeHost, bridge_host
from vmm.net.switch_spec import SwitchSpec, make_switch

pytestmark = [pytest.mark.netns]


def _nat(number: int) -> SwitchSpec:
    return make_switch(
        name=f"nat{number}", type="internal", backend="bridge", address=f"10.77.{number}.1/24", nat=True, dhcp=False
    )


NAT, OTHER = _nat(9), _nat(8)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[BridgeHost]:
    """A host without cards."""
    with bridge_host(tmp_path) as made:
        yield made


def test_guests_follow_the_hosts_routes(host: BridgeHost) -> None:
    """Made before there is any network, guests reach the first card, a second one after failover, and a network of
    its own behind a card without a default route. INV-NAT-FOLLOWS."""
    host.apply(NAT)
    guest = host.guest(NAT, "one", "10.77.9.2/24", "10.77.9.1")
    first = host.link("up0", "lan", "10.9.0.254/24")
    second = host.link("up1", "backup", "10.8.0.254/24")
    for name in (first, second):
        host.spaces.run(name, "ip addr add 192.0.2.1/32 dev lo")
    host.run("ip addr add 10.9.0.2/24 dev up0; ip route add default via 10.9.0.254")
    assert host.ping(guest, "192.0.2.1")
    host.run("ip addr add 10.8.0.2/24 dev up1")
    assert host.ping(guest, "10.8.0.254")
    host.run("ip link set up0 down; ip route add default via 10.8.0.254")
    assert host.ping(guest, "192.0.2.1")


def test_a_default_network_lies_over_no_route(host: BridgeHost) -> None:
    """A VPN's network and one of another table are left alone; its two halves of everything are a default route."""
    host.link("tun0", "vpn", "10.66.0.1/30")
    host.run("ip addr add 10.66.0.2/30 dev tun0")
    host.run("ip route add 10.77.0.0/24 via 10.66.0.1; ip route add 10.77.1.0/24 via 10.66.0.1 table 99")
    host.run("ip route add 0.0.0.0/1 via 10.66.0.1; ip route add 128.0.0.0/1 via 10.66.0.1")
    program = "from vmm.net import switches; print(switches.free_address())"
    done = host.execute(["env", f"VMM_HOME={host.folder}", sys.executable, "-c", program])
    assert done.stdout == "10.77.2.1/24\n", done.stderr


def test_the_host_is_no_router_between_its_networks(host: BridgeHost) -> None:
    """With a NAT switch nothing passes between two cards that did not before, until `ip_forward` is switched on.

    INV-NAT-FOLLOWS.
    """
    first = host.link("up0", "lan", "10.9.0.254/24")
    second = host.link("up1", "other", "10.8.0.254/24")
    host.run("ip addr add 10.9.0.2/24 dev up0; ip addr add 10.8.0.2/24 dev up1")
    host.spaces.run(first, "ip route add 10.8.0.0/24 via 10.9.0.2")
    host.spaces.run(second, "ip route add 10.9.0.0/24 via 10.8.0.2")
    host.apply(NAT, OTHER)
    assert not host.ping(first, "10.8.0.254", 1)
    # As another's network of containers comes up: through its bridge packets pass at once.
    inside = host.guest_of_another("cnt0", "10.5.0.1/24", "10.5.0.2/24", "10.5.0.1")
    host.spaces.run(first, "ip route add 10.5.0.0/24 via 10.9.0.2")
    assert host.ping(inside, "10.9.0.254")
    host.run("sysctl -qw net.ipv4.ip_forward=1")
    host.apply(NAT, OTHER)  # as with the next machine that starts
    assert host.ping(first, "10.8.0.254")


def test_what_forwarded_before_does_so_still(host: BridgeHost) -> None:
    """A host that somebody made a router of between two cards, without `ip_forward`, is one with the switch."""
    first = host.link("up0", "lan", "10.9.0.254/24")
    second = host.link("up1", "other", "10.8.0.254/24")
    host.run("ip addr add 10.9.0.2/24 dev up0; ip addr add 10.8.0.2/24 dev up1")
    host.run("sysctl -qw net.ipv4.conf.up0.forwarding=1 net.ipv4.conf.up1.forwarding=1")
    host.spaces.run(first, "ip route add 10.8.0.0/24 via 10.9.0.2")
    host.spaces.run(second, "ip route add 10.9.0.0/24 via 10.8.0.2")
    host.apply(NAT)
    assert host.ping(first, "10.8.0.254")
    host.apply(NAT)
    assert host.ping(first, "10.8.0.254")
    host.undo(NAT)
    assert host.setting("net/ipv4/conf/up0/forwarding") == "1"


@pytest.mark.parametrize("somebody", [False, True])
def test_what_is_put_back(host: BridgeHost, somebody: bool) -> None:
    """Every card forwards what it did before, one that came since, too; but not once `ip_forward` was switched on.

    INV-SETTING-HELD.
    """
    host.link("up0", "lan", "10.9.0.254/24")
    host.apply(NAT)
    host.link("up1", "other", "10.8.0.254/24")
    if somebody:
        host.run("sysctl -qw net.ipv4.ip_forward=1")
    host.undo(NAT)
    left = {name: host.setting(f"net/ipv4/conf/{name}/forwarding") for name in ("all", "default", "up0", "up1")}
    assert set(left.values()) == {"1" if somebody else "0"}
