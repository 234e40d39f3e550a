# SPDX-License-Identifier: Apache-2.0
"""The addresses that an internal switch assigns to guests, as the user sets them. Pure.

Decides which range can be assigned, and which address may be fixed for an adapter: one in the network that is not in
use. The same on both back ends.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from typing import Any

from vmm.model import errors
from vmm.net import switch_spec
from vmm.net.switch_spec import SwitchSpec


def with_fixed(
    spec: SwitchSpec, mac: str, address: str, name: str | None, held: Iterable[Mapping[str, Any]], now: float
) -> SwitchSpec:
    """The switch with this fixed address for this MAC, replacing an earlier one. `held`: the result of
    `lease_file.read`.

    Raises InvalidSpec for an address that no guest on its network may have, InUse for one that another adapter has.
    """
    rest = [one for one in spec.leases if one.mac != mac]
    if spec.type != "internal":
        raise errors.InvalidSpec(f"switch {spec.name!r} is {spec.type}: only an internal one assigns addresses")
    if not spec.dhcp:
        raise errors.InvalidSpec(f"switch {spec.name!r} assigns no addresses: it was created with --no-dhcp")
    refuse(spec, address)
    for one in rest:
        if ipaddress.IPv4Address(one.address) == ipaddress.IPv4Address(address):
            raise errors.InUse(f"{address} is already fixed for {one.name or one.mac}")
    for lease in held:
        if lease["address"] == address and lease["mac"] != mac and lease["expires"] > now:
            minutes = -(-int(lease["expires"] - now) // 60)
            raise errors.InUse(
                f"{lease['name'] or lease['mac']} now has {address}, for at least another {minutes} minutes",
                hint=f"choose an address outside of {spec.dhcp_range[0]} to {spec.dhcp_range[1]}",
            )
    leases = [*(one.model_dump() for one in rest), {"mac": mac, "address": address, "name": name}]
    return switch_spec.make_switch(**{**spec.model_dump(), "leases": leases})


def refuse(spec: SwitchSpec, address: str) -> None:
    """Raise InvalidSpec for an address that no guest on the internal switch may have."""
    try:
        wanted = ipaddress.IPv4Address(address)
    except ValueError as error:
        raise errors.InvalidSpec(f"{address!r} is not an IPv4 address") from error
    network = spec.network
    if wanted not in network:
        raise errors.InvalidSpec(f"{address} is not in {network}, the network of switch {spec.name!r}")
    if wanted == network.network_address:
        raise errors.InvalidSpec(f"{address} is the network's own address, which no guest can have")
    if wanted == network.broadcast_address:
        raise errors.InvalidSpec(f"{address} is the network's broadcast address, which no guest can have")
    if wanted == spec.interface.ip:
        raise errors.InvalidSpec(f"{address} is this host's own address on switch {spec.name!r}")
    if spec.capabilities.gateway and str(wanted) == spec.gateway().name_server:
        raise errors.InvalidSpec(f"{address} is the address of the name server on switch {spec.name!r}")


def without_fixed(spec: SwitchSpec, mac: str, adapter: str) -> SwitchSpec:
    """The switch without a fixed address for this MAC. Raises NotFound, which names the `adapter`."""
    rest = [one.model_dump() for one in spec.leases if one.mac != mac]
    if len(rest) == len(spec.leases):
        raise errors.NotFound(f"{adapter} has no fixed address on switch {spec.name}")
    return switch_spec.make_switch(**{**spec.model_dump(), "leases": rest})


def refuse_network(spec: SwitchSpec) -> None:
    """Raise InvalidSpec for a new internal switch whose network guests cannot use, or whose forwarded ports lead out
    of the network.

    Existing switches keep what they have: they must still be found, shown and deleted.
    """
    network = spec.network
    for kind, what in (
        ("is_multicast", "for multicast"),
        ("is_loopback", "for loopback"),
        ("is_link_local", "link-local"),
        ("is_unspecified", "not for hosts"),
        ("is_reserved", "reserved"),
    ):
        if getattr(network.network_address, kind) or getattr(network.broadcast_address, kind):
            raise errors.InvalidSpec(
                f"the network {network} is {what}: guests cannot use it",
                hint="choose a private network, such as --address 10.77.0.1/24",
            )
    for forward in spec.forwards:
        if guest := forward.rpartition("-")[2].partition(":")[0]:  # without an address it is the gateway's first one
            refuse(spec, guest)


def refuse_range(spec: SwitchSpec) -> None:
    """Raise InvalidSpec if the internal switch has no address to assign, or one that no guest can have."""
    if not spec.dhcp:
        return
    first, last = spec.dhcp_range
    network = spec.network
    for one, whose in ((network.network_address, "the network's own"), (network.broadcast_address, "the broadcast")):
        if first <= one <= last:
            raise errors.InvalidSpec(f"the DHCP range {first} to {last} contains {one}, {whose} address")
    ours = {spec.interface.ip}
    if spec.capabilities.gateway:
        ours.add(ipaddress.IPv4Address(spec.gateway().name_server))
    if int(last) - int(first) + 1 <= sum(first <= one <= last for one in ours):
        raise errors.InvalidSpec(f"the DHCP range {first} to {last} has no address except the switch's own")
