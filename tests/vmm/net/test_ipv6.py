# SPDX-License-Identifier: Apache-2.0
"""An external switch on an IPv6 network: addresses from a router or a DHCPv6 server move to the bridge and back."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vmm.net.hosts import BridgeHost, bridge_host
from tests.waiting import wait_until
from vmm.net.switch_spec import make_switch

pytestmark = [pytest.mark.netns]

LAN = make_switch(name="lan", type="external", backend="bridge", uplink="up0")
ALONE = make_switch(name="alone", type="external", backend="bridge", uplink="up0", host=False)
# A router's advertisement (RFC 4861, 4.2): itself for half an hour, one on-link prefix for address configuration.
_ADVERTISE = """
import socket, struct, sys
valid, preferred = map(int, sys.argv[1:])
prefix = socket.inet_pton(socket.AF_INET6, "2001:db8:5::")
words = struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0)
words += struct.pack("!BBBBIII", 3, 4, 64, 0xC0, valid, preferred, 0) + prefix
sock = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
sock.sendto(words, ("ff02::1", 0, 0, socket.if_nametoindex("far")))
"""


class Six:
    """A host whose card up0 has addresses from a router and a DHCPv6 server, and privacy addresses."""

    def __init__(self, host: BridgeHost) -> None:
        self.host = host
        self.there = host.link("up0", "lan", "2001:db8:5::fe/64")
        host.spaces.run(self.there, "sysctl -qw net.ipv6.conf.all.forwarding=1")  # else it says it is not a router
        host.run("sysctl -qw net.ipv6.conf.up0.use_tempaddr=2")
        self.wait(lambda: "fe80" in host.spaces.run(self.there, "ip -6 addr show dev far scope link"))
        self.wait(lambda: "fe80" in host.run("ip -6 addr show dev up0 scope link"))
        self.advertise(3000, 2000)
        self.wait(lambda: len(self.addresses("up0")) == 2)
        host.run("ip addr add 2001:db8:5:1::77/128 dev up0 valid_lft 3000 preferred_lft 2000")

    @staticmethod
    def wait(ready: Callable[[], bool]) -> None:
        """Wait until the condition holds."""
        wait_until(ready, "the network is in that state", 30)

    def advertise(self, valid: int, preferred: int) -> None:
        """Have the router send an advertisement."""
        command = f"{sys.executable} -c '{_ADVERTISE}' {valid} {preferred}"
        self.host.spaces.run(self.there, command)

    def addresses(self, name: str) -> dict[str, dict[str, Any]]:
        """The addresses of a network that an interface has."""
        (link,) = json.loads(self.host.run(f"ip -j -6 addr show dev {name}"))
        return {one["local"]: one for one in link["addr_info"] if one["scope"] == "global"}

    def default(self) -> list[str]:
        """The interfaces that the default route leads through."""
        return [one["dev"] for one in json.loads(self.host.run("ip -j -6 route show default"))]


@pytest.fixture
def six(tmp_path: Path) -> Iterator[Six]:
    """A host with IPv6."""
    with bridge_host(tmp_path) as made:
        yield Six(made)


def test_leased_addresses_move_with_their_lifetimes_and_back(six: Six) -> None:
    """The router's address, its privacy address and DHCPv6's are on the bridge, no IPv6 is left on the card, the
    router and a neighbour answer, advertisements renew; afterwards the card has everything again. INV-SIX-MOVES."""
    before = six.addresses("up0")
    (ours,) = (name for name, one in before.items() if one.get("mngtmpaddr"))
    assert len(before) == 3 and six.default() == ["up0"]
    six.host.apply(LAN)
    bridge = LAN.bridge_name
    moved = six.addresses(bridge)
    assert set(before) <= set(moved)
    for name, one in before.items():
        for time in ("valid_life_time", "preferred_life_time"):
            assert one[time] - 100 <= moved[name][time] <= one[time]
    assert moved[ours].get("mngtmpaddr")
    assert six.host.run("ip -6 addr show dev up0") == "" == six.host.run("ip -6 route show dev up0")
    assert set(six.default()) == {bridge}
    assert six.host.ping(six.host.here, "2001:db8:5::fe")
    six.host.spaces.run(six.there, "ip -6 neigh flush dev far")
    assert six.host.ping(six.there, ours)
    six.advertise(9000, 8000)
    six.wait(lambda: six.addresses(bridge)[ours]["valid_life_time"] > 8000)
    assert set(six.default()) == {bridge}
    six.host.undo(LAN)
    back = six.addresses("up0")
    assert set(before) <= set(back)
    assert back[ours]["valid_life_time"] > 8000 and back["2001:db8:5:1::77"]["valid_life_time"] <= 3000
    assert set(six.default()) == {"up0"}
    assert six.host.setting("net/ipv6/conf/up0/disable_ipv6") == "0"
    six.wait(lambda: "fe80" in six.host.run("ip -6 addr show dev up0 scope link"))
    assert six.host.ping(six.host.here, "2001:db8:5::fe")


def test_leases_renewed_on_the_bridge_come_back_renewed(six: Six) -> None:
    """A DHCP client that uses the bridge, as it should, renews leases there: the card gets them back as renewed."""
    six.host.run("ip addr add 10.9.9.2/24 dev up0 valid_lft 3000 preferred_lft 2000")
    six.host.apply(LAN)
    for one in ("2001:db8:5:1::77/128", "10.9.9.2/24"):
        six.host.run(f"ip addr change {one} dev {LAN.bridge_name} valid_lft 9000 preferred_lft 8000")
    six.host.undo(LAN)
    (card,) = json.loads(six.host.run("ip -j addr show dev up0"))
    found = {one["local"]: one for one in card["addr_info"]}
    for name in ("2001:db8:5:1::77", "10.9.9.2"):
        assert 8000 < found[name]["valid_life_time"] <= 9000
    assert 7000 < found["2001:db8:5:1::77"]["preferred_life_time"] <= 8000


def test_an_address_that_another_host_has_is_not_used_on_the_bridge(six: Six) -> None:
    """Duplicate detection found the address on the card's link, so the bridge looks for it, too. INV-SIX-MOVES."""
    six.host.run("sysctl -qw net.ipv6.conf.up0.accept_dad=1; ip addr add 2001:db8:5::fe/64 dev up0")
    six.wait(lambda: "dadfailed" in six.host.run("ip -6 addr show dev up0"))
    assert six.host.do("apply", LAN).returncode == 0
    six.wait(lambda: "dadfailed" in six.host.run(f"ip -6 addr show dev {LAN.bridge_name}"))
    six.host.undo(LAN)
    assert "2001:db8:5::fe" in six.addresses("up0")


def test_a_host_that_is_not_on_the_switch_has_no_ipv6_there(six: Six) -> None:
    """Neither card nor bridge takes an address from an advertisement, and the card has its own back afterwards."""
    before = set(six.addresses("up0"))
    six.host.apply(ALONE)
    six.advertise(9000, 8000)
    assert six.host.run(f"ip -6 addr show dev {ALONE.bridge_name}") == "" == six.host.run("ip -6 addr show dev up0")
    six.host.undo(ALONE)
    assert before <= set(six.addresses("up0"))


def test_a_renamed_card_has_ipv6_again(six: Six) -> None:
    """IPv6 is switched on again at the card's new name."""
    before = set(six.addresses("up0"))
    six.host.apply(LAN)
    six.host.run("ip link set up0 down; ip link set up0 name up7; ip link set up7 up")
    six.host.undo(LAN)
    assert before <= set(six.addresses("up7"))
    assert six.host.setting("net/ipv6/conf/up7/disable_ipv6") == "0"


def test_the_bridge_believes_routers_as_the_card_did(six: Six) -> None:
    """A host that leaves advertisements to NetworkManager does so on the bridge, too."""
    six.host.run("sysctl -qw net.ipv6.conf.up0.accept_ra=0 net.ipv6.conf.up0.autoconf=0")
    six.host.apply(LAN)
    settings = {key: six.host.setting(f"net/ipv6/conf/{LAN.bridge_name}/{key}") for key in ("accept_ra", "autoconf")}
    assert settings == {"accept_ra": "0", "autoconf": "0"}
    assert six.host.setting(f"net/ipv6/conf/{LAN.bridge_name}/use_tempaddr") == "2"
