# SPDX-License-Identifier: Apache-2.0
"""The settings of a switch, and the steps that follow from them."""

from __future__ import annotations

import ipaddress
import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.net import plan, switch_spec
from vmm.net.plan import HostAddress, HostFacts, Route, UplinkFacts
from vmm.net.switch_spec import make_switch
from vmm.net.uplinks import InterfaceKind

ID = "01234567-89ab-cdef-0123-456789abcdef"
UPLINK = UplinkFacts(
    "eth0",
    "02:00:00:00:00:01",
    9000,
    True,
    None,
    False,
    (HostAddress("10.0.0.5/24", "10.0.0.255"), HostAddress("10.0.0.6/24", None, 600)),
    (Route("0.0.0.0/0", "10.0.0.1", 100), Route("10.9.0.0/16")),
)


NO_IPV6 = "keep the host's IPv6 off vmm01234567, and ignore router advertisements there"


def words(settings: dict[str, Any], facts: HostFacts) -> list[str]:
    """The steps, as shown to users."""
    return [step.words for step in plan.steps(make_switch(id=ID, name="x", backend="bridge", **settings), facts)]


def test_private_steps() -> None:
    """First the rules, then a bridge on which the host has no address."""
    assert words({}, HostFacts()) == [
        "load the switch's nftables rules (table vmm_0123456789ab)",
        "create the bridge vmm01234567",
        NO_IPV6,
        "switch vmm01234567 on",
    ]


def test_internal_steps() -> None:
    """The host's address, forwarding only with NAT, DHCP last."""
    steps = words({"type": "internal", "address": "10.77.0.1/24", "nat": True}, HostFacts())
    assert steps[2] == NO_IPV6
    assert steps[4:] == [
        "give the host the address 10.77.0.1/24 on vmm01234567",
        "forward packets from vmm01234567 along this host's routes, and their answers back",
        "start a DHCP and name server (dnsmasq) on vmm01234567",
    ]
    plain = words({"type": "internal", "address": "10.77.0.1/24", "dhcp": False}, HostFacts())
    assert plain[4:] == ["give the host the address 10.77.0.1/24 on vmm01234567"]


def test_external_steps() -> None:
    """The card's state is recorded first; each address moves at once; routes to gateways come before the gateways."""
    facts = HostFacts(uplink=UPLINK)
    spec = make_switch(id=ID, name="x", type="external", backend="bridge", uplink="eth0")
    steps = plan.steps(spec, facts)
    assert steps[1].arguments["mac"] == UPLINK.mac
    assert steps[1].arguments["mtu_bytes"] == 9000
    assert [step.words for step in steps][2:] == [
        "switch vmm01234567 on",
        "record the addresses and routes of eth0",
        "keep the host's IPv6 off eth0 while it is part of vmm01234567",
        "add eth0 to vmm01234567",
        "add the address 10.0.0.5/24 to vmm01234567",
        "remove 10.0.0.5/24 from eth0",
        "add the address 10.0.0.6/24 to vmm01234567",
        "remove 10.0.0.6/24 from eth0",
        "add the route 10.9.0.0/16 through vmm01234567",
        "add the route 0.0.0.0/0 via 10.0.0.1 through vmm01234567",
    ]
    (warning,) = plan.warnings(spec, facts)
    assert warning.startswith("10.0.0.6/24 came from a DHCP client")


@pytest.mark.parametrize("address", ["10.0.0.129/25", "10.0.0.1/24", "10.1.0.1/8"])
def test_a_network_of_the_host_is_refused(address: str) -> None:
    """A network within one of the host's own would lead its traffic to the guests; an adjacent one is accepted."""
    spec = make_switch(name="x", type="internal", backend="bridge", address=address)
    (reason,) = plan.refusals(spec, HostFacts(networks=("127.0.0.1/8", "10.0.0.5/24")))
    assert "10.0.0.5/24" in reason
    assert plan.refusals(spec, HostFacts(networks=("192.168.0.1/24",))) == []


def test_the_hosts_vlan() -> None:
    """If bridges know VLANs, the host's adapter gets its VLAN before it is up, and the card carries all of them."""
    facts = HostFacts(uplink=UPLINK, has_vlan_filtering=True)
    spec = make_switch(id=ID, name="x", type="external", backend="bridge", uplink="eth0", host_vlan=30)
    assert plan.refusals(spec, facts) == []
    steps = plan.steps(spec, facts)
    assert [step.words for step in steps][1:8] == [
        "create the bridge vmm01234567",
        "put the host's adapter into VLAN 30",
        "switch vmm01234567 on",
        "record the addresses and routes of eth0",
        "keep the host's IPv6 off eth0 while it is part of vmm01234567",
        "add eth0 to vmm01234567",
        "let eth0 carry every VLAN, tagged",
    ]
    host, card = (step.arguments for step in steps if step.kind == "vlans")
    assert host == {"name": "vmm01234567", "untagged": 30, "tagged": frozenset(), "own": True}
    assert (card["name"], card["untagged"]) == ("eth0", 1)
    assert sorted(card["tagged"]) == list(range(2, 4095))
    without = make_switch(id=ID, name="x", type="external", backend="bridge", uplink="eth0")
    assert [step.kind for step in plan.steps(without, facts)].count("vlans") == 1
    inside = words(
        {"type": "internal", "address": "10.77.0.1/24", "host_vlan": 30}, HostFacts(has_vlan_filtering=True)
    )
    assert inside[3:5] == ["put the host's adapter into VLAN 30", "switch vmm01234567 on"]


@given(st.sets(st.integers(1, 4094)))
def test_ranges(numbers: set[int]) -> None:
    """The text names each number once, and consecutive ones as a range."""
    found = [[int(one) for one in word.split("-")] for word in plan.ranges(numbers)]
    assert [number for one in found for number in range(one[0], one[-1] + 1)] == sorted(numbers)
    assert all(later[0] > earlier[-1] + 1 for earlier, later in itertools.pairwise(found))


def test_the_bridge_gets_its_cards_ipv6_settings() -> None:
    """Settings of the card that differ from the default are set before the bridge is up, in one step; without any
    there is no step."""
    spec = make_switch(id=ID, name="x", type="external", backend="bridge", uplink="eth0")
    card = replace(UPLINK, ipv6_settings=(("accept_ra", "2"),))
    steps = plan.steps(spec, HostFacts(uplink=card))
    assert [step.kind for step in steps][:4] == ["rules", "bridge", "ipv6", "up"]
    assert steps[2].arguments == {"name": "vmm01234567", "values": (("accept_ra", "2"),)}
    assert "ipv6" not in [step.kind for step in plan.steps(spec, HostFacts(uplink=UPLINK))]


def test_external_without_the_host() -> None:
    """The host's addresses are removed, and the plan says so."""
    spec = make_switch(id=ID, name="x", type="external", backend="bridge", uplink="eth0", host=False)
    kinds = [step.kind for step in plan.steps(spec, HostFacts(uplink=UPLINK))]
    assert kinds == ["rules", "bridge", "ipv6", "up", "keep", "quiet", "enslave", "drop-address", "drop-address"]
    assert plan.warnings(spec, HostFacts(uplink=UPLINK))[0].startswith("the host loses its addresses on eth0")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"master": "br0"}, "eth0 is already part of br0"),
        ({"is_wireless": True}, "eth0 is wireless"),
        ({"master": "bond0", "kind": InterfaceKind(master="bond")}, "eth0 is already part of bond0: take bond0"),
        ({"mac": "00:00:00:00:00:00"}, "eth0 is not a network card"),
        ({"mac": "", "kind": InterfaceKind(is_ethernet=False)}, "eth0 is not a network card"),
        (
            {"kind": InterfaceKind("bridge")},
            "eth0 is a bridge: a bridge cannot be part of another; use the card that is part of eth0",
        ),
        ({"kind": InterfaceKind(on_top=("mv0", "mv1"))}, "mv0, mv1 stand on eth0 and take its frames"),
        ({"kind": InterfaceKind("macvlan")}, "eth0 is of kind macvlan: it gets only the frames for its own address"),
    ],
)
def test_cards_that_cannot_be_an_uplink(change: dict[str, Any], words: str) -> None:
    """Each is refused with the reason."""
    from dataclasses import replace

    spec = make_switch(name="x", type="external", backend="bridge", uplink="eth0")
    assert words in plan.refusals(spec, HostFacts(uplink=replace(UPLINK, **change)))[0]
    assert plan.refusals(spec, HostFacts()) == ["network card eth0 does not exist"]
    assert plan.refusals(spec, HostFacts(uplink=UPLINK)) == []


def test_the_default_network_does_not_overlap_with_a_route() -> None:
    """If a VPN has all of 10.0.0.0/8, the default is elsewhere; a chosen network there leads to a warning."""
    interface = switch_spec.free_network([ipaddress.IPv4Network("10.0.0.0/8")])
    assert str(interface) == "172.27.0.1/24"
    spec = make_switch(name="x", type="internal", backend="bridge", address="10.8.3.1/24")
    (warning,) = plan.warnings(spec, HostFacts(routed=("10.8.0.0/16", "172.16.0.0/12")))
    assert "10.8.3.0/24 overlaps with this host's route to 10.8.0.0/16" in warning
