# SPDX-License-Identifier: Apache-2.0
"""What a host with a NAT switch forwards: everything its guests need, wherever the routes lead, and nothing else."""

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
    """A switch made before there is any network lets guests reach the first card, a second one after failover, and
    another network behind a card without a default route. INV-NAT-FOLLOWS."""
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


def test_default_networks_do_not_overlap_with_routes(host: BridgeHost) -> None:
    """The networks of a VPN and of another table are avoided; two halves of the whole address space count as a default
    route."""
    host.link("tun0", "vpn", "10.66.0.1/30")
    host.run("ip addr add 10.66.0.2/30 dev tun0")
    host.run("ip route add 10.77.0.0/24 via 10.66.0.1; ip route add 10.77.1.0/24 via 10.66.0.1 table 99")
    host.run("ip route add 0.0.0.0/1 via 10.66.0.1; ip route add 128.0.0.0/1 via 10.66.0.1")
    program = "from vmm.net import switches; print(switches.free_address())"
    done = host.execute(["env", f"VMM_HOME={host.folder}", sys.executable, "-c", program])
    assert done.stdout == "10.77.2.1/24\n", done.stderr


def test_the_host_does_not_become_a_router_between_its_networks(host: BridgeHost) -> None:
    """With a NAT switch nothing new passes between two cards, until `ip_forward` is switched on.

    INV-NAT-FOLLOWS.
    """
    first = host.link("up0", "lan", "10.9.0.254/24")
    second = host.link("up1", "other", "10.8.0.254/24")
    host.run("ip addr add 10.9.0.2/24 dev up0; ip addr add 10.8.0.2/24 dev up1")
    host.spaces.run(first, "ip route add 10.8.0.0/24 via 10.9.0.2")
    host.spaces.run(second, "ip route add 10.9.0.0/24 via 10.8.0.2")
    host.apply(NAT, OTHER)
    assert not host.ping(first, "10.8.0.254", 1)
    # Another program's container network comes up, and packets pass through its bridge at once.
    inside = host.guest_of_another("cnt0", "10.5.0.1/24", "10.5.0.2/24", "10.5.0.1")
    host.spaces.run(first, "ip route add 10.5.0.0/24 via 10.9.0.2")
    assert host.ping(inside, "10.9.0.254")
    host.run("sysctl -qw net.ipv4.ip_forward=1")
    host.apply(NAT, OTHER)  # as the next machine that starts does
    assert host.ping(first, "10.8.0.254")


def test_forwarding_that_was_on_before_stays(host: BridgeHost) -> None:
    """A host that was configured as a router between two cards, without `ip_forward`, still is one with the switch."""
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


@pytest.mark.parametrize("switched_on", [False, True])
def test_forwarding_is_restored(host: BridgeHost, switched_on: bool) -> None:
    """Every card forwards what it did before, also one that was added since; but not if `ip_forward` was switched on
    since.

    INV-SETTING-HELD.
    """
    host.link("up0", "lan", "10.9.0.254/24")
    host.apply(NAT)
    host.link("up1", "other", "10.8.0.254/24")
    if switched_on:
        host.run("sysctl -qw net.ipv4.ip_forward=1")
    host.undo(NAT)
    left = {name: host.setting(f"net/ipv4/conf/{name}/forwarding") for name in ("all", "default", "up0", "up1")}
    assert set(left.values()) == {"1" if switched_on else "0"}
