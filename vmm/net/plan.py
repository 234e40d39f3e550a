# SPDX-License-Identifier: Apache-2.0
"""The changes to the host that a switch of the bridge back end needs. Pure.

Decides from a switch's settings and the facts of the host (`HostFacts`) whether the host can have the switch, and the
ordered list of steps (`steps`) that `applying` carries out and undoes. The same switch and facts give the same steps.
Must not look at the host itself. What a switch is: `switch_spec`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vmm.net import frames, ipv6_settings
from vmm.net.switch_spec import SwitchSpec
from vmm.net.uplinks import CARD, Candidate, InterfaceKind, refusal

# Flags of an address (linux/if_addr.h): a privacy address, which only the kernel creates; without duplicate detection;
# created from a router's advertisement.
TEMPORARY, NO_DETECTION, FROM_ROUTER = 0x01, 0x02, 0x100
FROM_ADVERTISEMENT = 9  # a route's protocol (linux/rtnetlink.h)


@dataclass(frozen=True, slots=True)
class HostAddress:
    """An address of an interface. `valid_seconds` None: unlimited; otherwise it came from a DHCP client or a router.
    It is used for new connections for `preferred_seconds` (None: while it is valid).

    `flags` are the rtnetlink flags that were set on purpose: no duplicate detection, no route of its own. `peer` is
    the other end of a point-to-point address, `metric` that of the route that the kernel creates for it (0: the
    kernel's choice).
    """

    address: str  # with prefix
    broadcast: str | None = None
    valid_seconds: int | None = None
    flags: int = 0
    peer: str | None = None
    label: str | None = None  # None: the interface's name
    scope: int = 0
    metric: int = 0
    preferred_seconds: int | None = None
    is_unproven: bool = False  # IPv6: duplicate detection has not ended, or found another host with the address

    @property
    def is_six(self) -> bool:
        """True for IPv6."""
        return ":" in self.address

    @property
    def is_renewed(self) -> bool:
        """True if the kernel itself extends it, as a router announces; addresses that it derives from such a one are
        temporary.
        """
        return self.is_six and bool(self.flags & (FROM_ROUTER | TEMPORARY))

    def __str__(self) -> str:
        return self.address if self.peer is None else f"{self.address} (peer {self.peer})"


@dataclass(frozen=True, slots=True)
class Route:
    """A route through an interface, except those that the kernel itself creates from addresses."""

    destination: str  # with prefix; 0.0.0.0/0 and ::/0 are the default
    gateway: str | None = None
    metric: int = 0
    table: int = 254
    source: str | None = None
    protocol: int = 4
    scope: int = 0
    on_link: bool = False  # the gateway is reached directly, whatever the addresses are
    metrics: tuple[tuple[str, int], ...] = ()  # such as ("mtu", 1400)
    expires_seconds: int | None = None  # from a router's advertisement
    preference: int | None = None  # of IPv6, as the advertisement had it

    @property
    def is_advertised(self) -> bool:
        """True if a router announced it, and will announce it again."""
        return self.protocol == FROM_ADVERTISEMENT and self.gateway is not None

    def __str__(self) -> str:
        return self.destination + (f" via {self.gateway}" if self.gateway else "")


@dataclass(frozen=True, slots=True)
class UplinkFacts:
    """The card of an external switch as it is now."""

    name: str
    mac: str
    mtu_bytes: int
    is_up: bool
    master: str | None
    is_wireless: bool
    addresses: tuple[HostAddress, ...] = ()
    routes: tuple[Route, ...] = ()
    shared_routes: tuple[str, ...] = ()  # destinations that are reached through several interfaces at once
    ipv6_settings: tuple[tuple[str, str], ...] = ()  # those in which it differs from new interfaces
    kind: InterfaceKind = CARD

    @property
    def candidate(self) -> Candidate:
        """The facts that decide whether it can be a switch's card."""
        return Candidate(self.name, self.mac, self.master, self.is_wireless, self.shared_routes, self.kind)


@dataclass(frozen=True, slots=True)
class HostFacts:
    """The facts that the plan depends on."""

    has_vlan_filtering: bool = False
    uplink: UplinkFacts | None = None
    networks: tuple[str, ...] = ()  # in which the host has an address, as "10.0.0.1/24"
    routed: tuple[str, ...] = ()  # to which it has a route that is not the default one, as "10.8.0.0/16"


@dataclass(frozen=True, slots=True)
class Step:
    """One change to the host. What is needed to undo it is determined when it is made."""

    kind: str
    arguments: Mapping[str, Any]
    words: str  # for people


VLAN_REFUSAL = "this kernel's bridges do not support VLANs (CONFIG_BRIDGE_VLAN_FILTERING is not set)"
VLAN_HINT = "use the user back end for switches with VLANs, or a kernel with that option and CONFIG_VLAN_8021Q"


BRIDGE_VLAN = 1  # of every port of a filtering bridge without VLANs of its own: the default of a new bridge


def port_vlans(vlan: int, allowed: Iterable[int]) -> tuple[int, frozenset[int]]:
    """(untagged VLAN, tagged ones) of a bridge's port whose untagged frames belong to `vlan`; 0 means none."""
    untagged = vlan or BRIDGE_VLAN
    return untagged, frozenset(allowed) - {untagged}


def uplink_vlans() -> tuple[int, frozenset[int]]:
    """(untagged VLAN, tagged ones) of an external switch's card: all of them."""
    return port_vlans(0, range(1, frames.MAX_VLAN + 1))


def ranges(numbers: Iterable[int]) -> list[str]:
    """Numbers in compact form: 1, 2, 3, 7 as "1-3", "7"."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return [str(first) if first == last else f"{first}-{last}" for first, last in found]


def refusals(spec: SwitchSpec, facts: HostFacts) -> list[str]:
    """Why the host cannot have this switch; empty if it can."""
    reasons = []
    if spec.host_vlan is not None and not facts.has_vlan_filtering:
        reasons.append(VLAN_REFUSAL)
    if spec.type == "internal":
        for one in facts.networks:
            if ipaddress.IPv4Interface(one).network.overlaps(spec.network):
                reasons.append(f"its network {spec.network} overlaps with this host's {one}: choose another --address")
    if spec.type == "external":
        uplink = facts.uplink
        if uplink is None:
            reasons.append(f"network card {spec.uplink} does not exist")
        elif (reason := refusal(uplink.candidate, spec.bridge_name)) is not None:
            reasons.append(reason)
        elif (spec.mtu_bytes or 0) > uplink.mtu_bytes:
            more = f"ip link set {uplink.name} mtu {spec.mtu_bytes}"
            reasons.append(f"{uplink.name} carries {uplink.mtu_bytes} bytes at most (MTU): first {more}")
    return reasons


def steps(spec: SwitchSpec, facts: HostFacts) -> list[Step]:
    """All steps for a switch on the bridge back end, in order. The facts are those from before the first step."""
    bridge = spec.bridge_name
    uplink = facts.uplink if spec.type == "external" else None
    todo = [
        Step("rules", {}, f"load the switch's nftables rules (table {spec.table_name})"),
        Step(
            "bridge",
            {
                "name": bridge,
                "mac": uplink.mac if uplink is not None else spec.bridge_mac,
                "mtu_bytes": spec.mtu_bytes or (uplink.mtu_bytes if uplink is not None else None),
                "vlan_filtering": facts.has_vlan_filtering,
            },
            f"create the bridge {bridge}",
        ),
    ]
    words = f"keep the host's IPv6 off {bridge}, and ignore router advertisements there"
    values: tuple[tuple[str, str], ...] = ipv6_settings.NONE
    if spec.moves_host and uplink is not None:
        words, values = f"set IPv6 of {bridge} as it is on {spec.uplink}", uplink.ipv6_settings
    if values:  # they disappear with the bridge
        todo.append(Step("ipv6", {"name": bridge, "values": values}, words))
    if spec.host_vlan is not None:
        arguments = {"name": bridge, "untagged": spec.host_vlan, "tagged": frozenset[int](), "own": True}
        todo.append(Step("vlans", arguments, f"put the host's adapter into VLAN {spec.host_vlan}"))
    todo.append(Step("up", {"name": bridge}, f"switch {bridge} on"))
    if spec.type == "internal":
        todo += _internal_steps(spec)
    if uplink is not None:
        todo += _external_steps(spec, facts, uplink)
    return todo


def _internal_steps(spec: SwitchSpec) -> list[Step]:
    bridge = spec.bridge_name
    address = HostAddress(str(spec.interface), str(spec.network.broadcast_address))
    todo = [Step("address", {"name": bridge, "one": address}, f"give the host the address {address} on {bridge}")]
    if spec.nat:
        words = f"forward packets from {bridge} along this host's routes, and their answers back"
        todo.append(Step("forward", {}, words))
    if spec.dhcp:
        todo.append(Step("dhcp", {}, f"start a DHCP and name server (dnsmasq) on {bridge}"))
    return todo


def _external_steps(spec: SwitchSpec, facts: HostFacts, uplink: UplinkFacts) -> list[Step]:
    bridge = spec.bridge_name
    remember = Step("keep", {"name": uplink.name}, f"record the addresses and routes of {uplink.name}")
    quiet = Step(
        "quiet", {"name": uplink.name}, f"keep the host's IPv6 off {uplink.name} while it is part of {bridge}"
    )
    todo = [
        remember,
        quiet,
        Step("enslave", {"name": uplink.name, "bridge": bridge}, f"add {uplink.name} to {bridge}"),
    ]
    if facts.has_vlan_filtering:  # otherwise frames of VLANs would end at the card
        untagged, tagged = uplink_vlans()
        arguments = {"name": uplink.name, "untagged": untagged, "tagged": tagged}
        todo.append(Step("vlans", arguments, f"let {uplink.name} carry every VLAN, tagged"))
    if not uplink.is_up:
        todo.append(Step("up", {"name": uplink.name}, f"switch {uplink.name} on"))
    if not spec.host:
        for one in uplink.addresses:
            words = f"remove {one} from {uplink.name}: the host has no adapter on this switch"
            todo.append(Step("drop-address", {"name": uplink.name, "one": one}, words))
        return todo
    for one in in_order(uplink.addresses):
        todo.append(Step("address", {"name": bridge, "one": _moved(one)}, f"add the address {one} to {bridge}"))
        todo.append(Step("drop-address", {"name": uplink.name, "one": one}, f"remove {one} from {uplink.name}"))
    for route in sorted(uplink.routes, key=lambda one: one.gateway is not None):  # the routes to gateways first
        todo.append(Step("route", {"name": bridge, "route": route}, f"add the route {route} through {bridge}"))
    return todo


def in_order(addresses: Iterable[HostAddress]) -> list[HostAddress]:
    """The order in which to add addresses to have them listed as here: the kernel puts new IPv6 addresses first."""
    found = list(addresses)
    return [one for one in found if not one.is_six] + [one for one in reversed(found) if one.is_six]


def _moved(one: HostAddress) -> HostAddress:
    """The address in the form that the bridge gets. An IPv4 address stays when its lease ends; an IPv6 address that is
    proved to be ours alone is used at once.
    """
    if not one.is_six:
        return replace(one, label=None, valid_seconds=None)
    return replace(one, flags=one.flags & ~TEMPORARY | (0 if one.is_unproven else NO_DETECTION))


def warnings(spec: SwitchSpec, facts: HostFacts) -> list[str]:
    """Warnings for the user before the steps are made."""
    uplink = facts.uplink
    if spec.type == "internal":
        over = [one for one in facts.routed if ipaddress.IPv4Network(one).overlaps(spec.network)]
        return [
            f"{spec.network} overlaps with this host's route to {one} and takes part of its traffic" for one in over
        ]
    if spec.type != "external" or uplink is None:
        return []
    found = []
    if uplink.addresses and not spec.host:
        found.append(f"the host loses its addresses on {uplink.name}: do not do this over a connection that uses it")
    lent = [one.address for one in uplink.addresses if one.valid_seconds is not None and not one.is_renewed]
    if lent:
        found.append(
            f"{', '.join(lent)} came from a DHCP client: make that client use {spec.bridge_name} from now "
            f"on, or the address is lost when its lease ends"
        )
    return found
