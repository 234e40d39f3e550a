# SPDX-License-Identifier: Apache-2.0
"""Which addresses guests may be given."""

from __future__ import annotations

from typing import Any

import pytest

from vmm.model import errors
from vmm.net.guest_addresses import refuse_network, refuse_range, with_fixed, without_fixed
from vmm.net.switch_spec import SwitchSpec, make_switch

ONE, TWO = "02:00:00:00:00:01", "02:00:00:00:00:02"


def switch(backend: str, **settings: object) -> SwitchSpec:
    """An internal switch with a fixed address for TWO."""
    leases = [{"mac": TWO, "address": "10.0.7.9", "name": "web"}]
    usual = {"name": "nat", "type": "internal", "address": "10.0.7.1/24", "leases": leases}
    return make_switch(backend=backend, **(usual | settings))


@pytest.mark.parametrize("backend", ["user", "bridge"])
@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("10.0.7.0", "the network's own address"),
        ("10.0.7.255", "the network's broadcast address"),
        ("10.0.7.1", "this host's own address"),
        ("10.0.8.9", "is not in 10.0.7.0/24, the network of switch 'nat'"),
        ("10.0.7", "not an IPv4 address"),
        ("10.0.7.9", "10.0.7.9 is already fixed for web"),
        ("10.0.7.200", "db now has 10.0.7.200, for at least another 2 minutes"),
    ],
)
def test_addresses_that_no_guest_can_have(backend: str, address: str, words: str) -> None:
    """The network's, the broadcast's, the host's, one outside, and one that is fixed for another guest or in use are
    refused."""
    held: list[dict[str, Any]] = [
        {"mac": "02:00:00:00:00:07", "address": "10.0.7.200", "name": "db", "expires": 1100},
        {"mac": "02:00:00:00:00:08", "address": "10.0.7.201", "name": None, "expires": 999},
        {"mac": ONE, "address": "10.0.7.202", "name": None, "expires": 9999},
    ]
    spec = switch(backend)
    with pytest.raises((errors.InvalidSpec, errors.InUse), match=words):
        with_fixed(spec, ONE, address, None, held, 1000)
    for fine in ("10.0.7.201", "10.0.7.202", "10.0.7.254"):
        changed = with_fixed(spec, ONE, fine, "one", held, 1000)
        assert [(one.mac, one.address) for one in changed.leases] == [(TWO, "10.0.7.9"), (ONE, fine)]
    assert [one.address for one in with_fixed(spec, TWO, "10.0.7.8", None, held, 1000).leases] == ["10.0.7.8"]


def test_the_name_servers_address_of_the_user_back_end_is_reserved() -> None:
    """The bridge back end's name server has the host's own address, so there it is free."""
    with pytest.raises(errors.InvalidSpec, match="the address of the name server"):
        with_fixed(switch("user"), ONE, "10.0.7.2", None, [], 0)
    assert len(with_fixed(switch("bridge"), ONE, "10.0.7.2", None, [], 0).leases) == 2


def test_switches_that_give_out_no_addresses() -> None:
    """Private switches and those without DHCP; a fixed address that does not exist cannot be removed."""
    with pytest.raises(errors.InvalidSpec, match="is private: only an internal one"):
        with_fixed(make_switch(name="lab"), ONE, "10.0.7.9", None, [], 0)
    with pytest.raises(errors.InvalidSpec, match="--no-dhcp"):
        with_fixed(switch("user", dhcp=False), ONE, "10.0.7.20", None, [], 0)
    with pytest.raises(errors.NotFound, match="web/nic-0 has no fixed address on switch nat"):
        without_fixed(switch("user"), ONE, "web/nic-0")
    assert without_fixed(switch("user"), TWO, "web/nic-0").leases == ()


@pytest.mark.parametrize("backend", ["user", "bridge"])
@pytest.mark.parametrize(
    ("first", "last", "words"),
    [
        ("10.0.7.0", "10.0.7.9", "contains 10.0.7.0, the network's own address"),
        ("10.0.7.200", "10.0.7.255", "contains 10.0.7.255, the broadcast address"),
        ("10.0.7.1", "10.0.7.1", "has no address except the switch's own"),
        ("10.0.7.1", "10.0.7.9", None),
        ("10.0.7.254", "10.0.7.254", None),
    ],
)
def test_ranges(backend: str, first: str, last: str, words: str | None) -> None:
    """A range with an address that no guest can have, or without any address, is refused; a low one is accepted."""
    spec: Any = switch(backend, dhcp_first=first, dhcp_last=last)
    if words is None:
        refuse_range(spec)
        return
    with pytest.raises(errors.InvalidSpec, match=words):
        refuse_range(spec)
    refuse_range(switch(backend, dhcp_first=first, dhcp_last=last, dhcp=False))


@pytest.mark.parametrize("backend", ["user", "bridge"])
@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("224.0.0.1/24", "for multicast"),
        ("127.9.0.1/16", "for loopback"),
        ("169.254.7.1/24", "link-local"),
        ("0.0.0.1/8", "not for hosts"),
        ("240.0.0.1/24", "reserved"),
    ],
)
def test_networks_that_guests_cannot_use(backend: str, address: str, words: str) -> None:
    """A new switch cannot have them; an existing one can still be read, and so deleted."""
    spec = switch(backend, address=address, leases=[])
    with pytest.raises(errors.InvalidSpec, match=words) as caught:
        refuse_network(spec)
    assert "--address" in str(caught.value.hint)
    for fine in ("10.0.7.1/24", "172.16.0.1/16", "192.168.9.1/29", "100.64.1.1/24", "198.51.100.1/24"):
        refuse_network(switch(backend, address=fine, leases=[]))


@pytest.mark.parametrize("guest", ["10.0.8.9", "10.0.7.0", "10.0.7.255", "10.0.7.1", "10.0.7.2"])
def test_forwarded_ports_lead_to_guests(guest: str) -> None:
    """A guest's address must lie in the network and be one that a guest can have."""
    with pytest.raises(errors.InvalidSpec, match=guest):
        refuse_network(switch("user", forwards=(f"tcp:127.0.0.1:2222-{guest}:22",)))
    refuse_network(switch("user", forwards=("tcp::2222-10.0.7.9:22", "udp::53-:53")))
