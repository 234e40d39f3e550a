# SPDX-License-Identifier: Apache-2.0
"""Internal switches on the bridge back end: guests reach each other and their gateway, whatever happens on the
host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vmm.net.hosts import BridgeHost, bridge_host
from vmm.net.switch_spec import make_switch

pytestmark = [pytest.mark.netns]

CLOSED = make_switch(name="closed", type="internal", backend="bridge", address="10.77.8.1/24", dhcp=False)

NAT = make_switch(name="nat", type="internal", backend="bridge", address="10.77.7.1/24", dhcp=False, nat=True)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[BridgeHost]:
    """A host without cards."""
    with bridge_host(tmp_path) as made:
        yield made


def test_guests_reach_each_other_with_br_netfilter(host: BridgeHost) -> None:
    """With br_netfilter switched on, a network without NAT is closed to the outside but open between its guests.

    INV-GATEWAY-STAYS.
    """
    host.run("sysctl -qw net.bridge.bridge-nf-call-iptables=1", check=False)  # not in every kernel
    host.apply(CLOSED)
    one = host.guest(CLOSED, "one", "10.77.8.2/24", "10.77.8.1")
    host.guest(CLOSED, "two", "10.77.8.3/24")
    assert host.ping(one, "10.77.8.3")
    rules = host.run("nft list chain inet " + CLOSED.table_name + "_out forward")
    assert rules.index(" accept ") < rules.index(" drop ")
    there = host.link("up0", "lan", "10.9.0.254/24")
    host.run("ip addr add 10.9.0.2/24 dev up0; sysctl -qw net.ipv4.ip_forward=1")
    host.spaces.run(there, "ip route add 10.77.8.0/24 via 10.9.0.2")
    assert not host.ping(one, "10.9.0.254", 1)


def test_the_bridge_keeps_its_mac_address_while_guests_come_and_go(host: BridgeHost) -> None:
    """When the guest with the lowest address leaves, the gateway's address stays the same: it belongs to the switch.

    INV-GATEWAY-STAYS.
    """
    host.apply(CLOSED)
    bridge = CLOSED.bridge_name
    assert host.mac(bridge) == CLOSED.bridge_mac
    one = host.guest(CLOSED, "one", "10.77.8.2/24")
    host.guest(CLOSED, "two", "10.77.8.3/24")
    host.run("ip link set tap-two address 00:00:00:00:00:02")
    assert host.ping(one, "10.77.8.1")
    assert host.mac(bridge) == CLOSED.bridge_mac
    host.run("ip link del tap-two")
    assert host.mac(bridge) == CLOSED.bridge_mac
    assert host.ping(one, "10.77.8.1", 2)


def test_each_switch_has_its_own_mac_address() -> None:
    """It is derived from the switch's id, is the same after a restart, and never belongs to another switch's pool."""
    again = CLOSED.model_copy(update={"name": "other"})
    other = make_switch(name="closed", type="internal", backend="bridge", address="10.77.8.1/24")
    assert again.bridge_mac == CLOSED.bridge_mac != other.bridge_mac
    assert CLOSED.bridge_mac.startswith("02:") and len(CLOSED.bridge_mac) == 17


def test_nat_forwards_only_its_own_network(host: BridgeHost) -> None:
    """`INV-NAT-OWN-SOURCES`: packets of a guest with a made-up address are not forwarded, so that address is never
    seen outside."""
    there = host.link("up0", "lan", "10.9.0.254/24")
    host.run("ip addr add 10.9.0.2/24 dev up0; ip route add default via 10.9.0.254")
    host.run("sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0")
    host.apply(NAT)
    guest = host.guest(NAT, "one", "10.77.7.2/24", "10.77.7.1")
    host.spaces.run(there, "nft 'table ip t { chain c { type filter hook prerouting priority 0; }; }'")
    host.spaces.run(there, "nft 'add rule ip t c ip saddr 10.99.0.5 counter'")
    host.spaces.run(guest, "ip addr add 10.99.0.5/32 dev eth0")
    host.spaces.run(guest, "ping -c 3 -i 0.01 -W 1 -I 10.99.0.5 10.9.0.254", check=False)
    assert host.ping(guest, "10.9.0.254")  # so the earlier ones would have arrived, too
    assert "counter packets 0 " in host.spaces.run(there, "nft list table ip t")
