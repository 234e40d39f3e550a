# SPDX-License-Identifier: Apache-2.0
"""Which settings a switch has, and what follows from them."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.model import errors
from vmm.net import switch_spec
from vmm.net.switch_spec import make_switch


@pytest.mark.parametrize(
    "word",
    [
        "nonsense",
        "tcp:127.0.0.1:0-10.77.0.9:22",
        "tcp:1.2.3:80-10.77.0.9:22",
        "tcp:127.0.0.1:80-10.77.0.9:99999",
        "tcp::80-:22,restrict=on",
        "sctp::80-:22",
    ],
)
def test_forwarded_ports_are_checked(word: str) -> None:
    """What QEMU would refuse is refused when the switch is made, not at each start of its helper."""
    with pytest.raises(errors.InvalidSpec):
        make_switch(name="x", type="internal", address="10.77.0.1/24", forwards=(word,))
    good = make_switch(name="x", type="internal", address="10.77.0.1/24", forwards=("udp::53-:53",))
    assert good.forwards == ("udp::53-:53",)


def test_a_lease_has_a_host_name() -> None:
    """Any other text could become more than one line of dnsmasq's configuration."""
    lease = {"mac": "00:15:5d:00:00:01", "address": "10.77.0.9", "name": "x\naddn-hosts=/a"}
    with pytest.raises(errors.InvalidSpec, match="name"):
        make_switch(name="x", type="internal", backend="bridge", address="10.77.0.1/24", leases=(lease,))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "a/b"}, "cannot be the name of a switch"),
        ({"name": "-x"}, "cannot be the name of a switch"),
        ({"name": ""}, "cannot be the name of a switch"),
        ({"type": "external"}, "no other type can have one"),
        ({"uplink": "eth0"}, "no other type can have one"),
        ({"type": "external", "uplink": "eth0"}, "needs the bridge back end"),
        ({"type": "internal"}, "no other type can have one"),
        ({"address": "10.0.0.1/24"}, "no other type can have one"),
        ({"type": "internal", "address": "10.0.0.0/24"}, "not a host's"),
        ({"type": "internal", "address": "10.0.0.1/30"}, "from /8 to /29"),
        ({"type": "internal", "address": "nonsense"}, "'nonsense' is not an IPv4 address"),
        ({"type": "internal", "address": "10.0.0.1/24", "dhcp_first": "10.0.1.5"}, "DHCP range"),
        ({"type": "internal", "address": "10.0.0.1/24", "dhcp_first": "10.0.0.9", "dhcp_last": "10.0.0.5"}, "range"),
        ({"type": "internal", "address": "10.0.0.1/24", "domain": "Bad_"}, "not a domain name"),
        ({"nat": True}, "only an internal switch"),
        ({"host_vlan": 5}, "only the host's adapter"),
        ({"colour": "red"}, "colour"),
        (
            {
                "type": "internal", "address": "10.0.0.1/24", "backend": "bridge",
                "leases": [{"mac": "02:00:00:00:00:01", "address": "10.0.9.9"}],
            },
            "is not within",
        ),
        (
            {
                "type": "internal", "address": "10.0.0.1/24", "backend": "bridge",
                "leases": [{"mac": f"02:00:00:00:00:0{n}", "address": "10.0.0.9"} for n in (1, 2)],
            },
            "the same address",
        ),
    ],
)  # fmt: skip
def test_impossible_switches_are_refused(settings: dict[str, Any], words: str) -> None:
    """The error says what is wrong."""
    with pytest.raises(errors.InvalidSpec, match=words):
        make_switch(**{"name": "x", **settings})


@given(st.sets(st.integers(0, 255), max_size=255))
def test_a_new_network_is_free(taken: set[int]) -> None:
    """The network for a new switch does not overlap with any network in use."""
    networks = [ipaddress.IPv4Network(f"10.77.{one}.0/24") for one in taken]
    interface = switch_spec.free_network(networks)
    assert not any(interface.network.overlaps(one) for one in networks)
    assert interface.ip == interface.network.network_address + 1


def test_no_free_network() -> None:
    """If the host uses all networks, the error says what to do."""
    with pytest.raises(errors.NoSpace, match="--address"):
        switch_spec.free_network(switch_spec.DEFAULT_NETWORKS)


def test_the_gateway_is_derived_from_the_switch() -> None:
    """For the user back end it is the host's address, with another one for the name server; also found at once in a
    /8."""
    setup = make_switch(name="x", type="internal", address="10.0.0.1/24").gateway()
    assert (setup.network, setup.host, setup.name_server, setup.first) == (
        "10.0.0.0/24",
        "10.0.0.1",
        "10.0.0.2",
        "10.0.0.3",
    )
    other = make_switch(name="x", type="internal", address="10.0.0.2/24").gateway()
    assert other.name_server != other.host
    assert make_switch(name="x", type="internal", address="10.0.0.1/8").gateway().network == "10.0.0.0/8"


def test_the_user_back_ends_dhcp_is_derived_from_the_switch() -> None:
    """It has the range with its end and the fixed addresses; it is empty if the switch has no DHCP."""
    lease = {"mac": "02:00:00:00:00:01", "address": "10.0.0.9", "name": "web"}
    settings = {
        "name": "x",
        "type": "internal",
        "address": "10.0.0.1/24",
        "dhcp_first": "10.0.0.4",
        "dhcp_last": "10.0.0.7",
    }
    setup = make_switch(**settings, leases=[lease]).dhcp_setup()
    assert setup is not None
    assert (setup.first, setup.last, setup.server) == ("10.0.0.4", "10.0.0.7", "10.0.0.1")
    assert setup.fixed == (("02:00:00:00:00:01", "10.0.0.9", "web"),)
    assert make_switch(**settings, dhcp=False).dhcp_setup() is None
