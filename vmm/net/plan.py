# SPDX-License-Identifier: Apache-2.0
"""What a switch is, and what has to be on the host for it. Pure.

Decides the settings of a switch and which go together, the names of everything it makes on the host, and from both the
ordered list of steps (`steps`) that `applying` carries out and takes back. The same switch and facts give the same
steps. Must not look at the host: what is there is told in `HostFacts`.

    private    guests only                          user (default) or bridge
    internal   guests and the host                  bridge (root), or user with a gateway (everybody)
    external   guests, the host and its network     bridge (root): the host's addresses move to the bridge
"""

from __future__ import annotations

import hashlib
import ipaddress
import itertools
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vmm import errors
from vmm.complaints import words_of
from vmm.net import frames, ipv6_settings
from vmm.net.dhcp_server import LEASE_SECONDS, DhcpSetup
from vmm.net.gateway import GatewaySetup
from vmm.net.uplinks import CARD, Candidate, Kind, refusal

SwitchType = Literal["private", "internal", "external"]
Backend = Literal["user", "bridge"]
MAX_INTERFACE_CHARACTERS = 15
MAX_LEASES = 1024
USUAL_MTU_BYTES, MIN_MTU_BYTES = 1500, 576  # Ethernet's; what every host of IPv4 takes (RFC 791)
DEFAULT_NETWORKS = tuple(map(ipaddress.IPv4Network, ("10.77.0.0/16", "172.27.0.0/16", "192.168.128.0/17")))
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,31}")
_DOMAIN = re.compile(r"[a-z0-9]([a-z0-9.-]{0,62}[a-z0-9])?")
_HOST_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,62})?")
_FORWARD = re.compile(r"(?:tcp|udp):([0-9.]*):([0-9]{1,5})-([0-9.]*):([0-9]{1,5})")


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Lease(_Settings):
    """An address that one adapter always gets."""

    mac: str
    address: str
    name: str | None = Field(default=None, pattern=f"^{_HOST_NAME.pattern}$")

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        frames.parse_mac(self.mac)
        ipaddress.IPv4Address(self.address)
        return self


class SwitchSpec(_Settings):
    """A switch. `address` is the host's on an internal one, with its prefix."""

    schema_version: Literal[1] = 1
    id: str = Field(default_factory=lambda: str(uuid.uuid4()), pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")
    name: str
    type: SwitchType = "private"
    backend: Backend = "user"
    uplink: str | None = Field(default=None, pattern=r"^[^/\s]{1,15}$")
    uplink_mac: str | None = Field(default=None, pattern=r"^[0-9a-f]{2}(:[0-9a-f]{2}){5}$")  # of the card
    mtu_bytes: int | None = Field(default=None, ge=MIN_MTU_BYTES, le=frames.MAX_MTU_BYTES)  # None: the card's, or 1500
    host: bool = True  # external: the host has an adapter on the switch, too
    host_vlan: int | None = Field(default=None, ge=1, le=frames.MAX_VLAN)
    address: str | None = None
    dhcp: bool = True
    dhcp_first: str | None = None
    dhcp_last: str | None = None
    leases: tuple[Lease, ...] = Field(default=(), max_length=MAX_LEASES)
    nat: bool = False
    domain: str = "vmm.internal"
    forwards: tuple[str, ...] = ()  # user back end: PROTOCOL:ADDRESS:PORT-GUEST:PORT
    host_loopback: bool = False  # user back end: guests reach the host's 127.0.0.1 at the gateway's address

    @field_validator("name")
    @classmethod
    def _good_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name for a switch: letters, digits, '.', '_' and '-', at most 32")
        return name

    @field_validator("forwards")
    @classmethod
    def _good_forwards(cls, forwards: tuple[str, ...]) -> tuple[str, ...]:
        for one in forwards:
            found = _FORWARD.fullmatch(one)
            if found is None or not all(0 < int(found[port]) < 1 << 16 for port in (2, 4)):
                raise ValueError(f"{one!r} is no forwarded port: write tcp:127.0.0.1:2222-10.77.0.130:22")
            for address in (found[1], found[3]):
                if address:
                    ipaddress.IPv4Address(address)
        return forwards

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.type == "external") != (self.uplink is not None):
            raise ValueError("an external switch, and no other, has a network card as its uplink")
        if self.type == "external" and self.backend == "user":
            raise ValueError("an external switch needs the bridge back end, and root")
        if (self.type == "internal") != (self.address is not None):
            raise ValueError("an internal switch, and no other, has an address of the host's")
        if self.host_vlan is not None and (self.type == "private" or self.backend == "user"):
            raise ValueError("only a host's adapter on the bridge back end has a VLAN")
        if self.type == "internal" and self.backend == "user" and (self.mtu_bytes or 0) > USUAL_MTU_BYTES:
            raise ValueError(f"the user back end's gateway carries {USUAL_MTU_BYTES} bytes at most: use a lower MTU")
        if not _DOMAIN.fullmatch(self.domain):
            raise ValueError(f"{self.domain!r} is no domain")
        if self.host_loopback and (self.type != "internal" or self.backend != "user"):
            raise ValueError("only an internal switch of the user back end can lead guests to this host's loopback")
        if self.type == "internal":
            self._check_network()
        elif self.nat or self.leases or self.forwards:
            raise ValueError("only an internal switch has leases, NAT or forwarded ports")
        return self

    def _check_network(self) -> None:
        network = self.network
        if network.prefixlen > 29 or network.prefixlen < 8:
            raise ValueError("an internal network has a prefix from /8 to /29")
        if self.interface.ip in (network.network_address, network.broadcast_address):
            raise ValueError(f"{self.interface.ip} is the network's own address, not a host's")
        first, last = self.dhcp_range
        if first not in network or last not in network or first > last:
            raise ValueError(f"the DHCP range {first} to {last} does not lie in {network}")
        for key in ("mac", "address"):
            values = [getattr(lease, key) for lease in self.leases]
            if len(set(values)) != len(values):
                raise ValueError(f"two leases have the same {key}")
        if any(ipaddress.IPv4Address(lease.address) not in network for lease in self.leases):
            raise ValueError(f"a lease's address does not lie in {network}")
        if self.backend == "bridge" and self.forwards:
            raise ValueError("forwarded ports are the user back end's; the host reaches guests of a bridge directly")

    # -- the network --------------------------------------------------------------------------------------------

    @property
    def interface(self) -> ipaddress.IPv4Interface:
        """The host's address and network; of an internal switch."""
        assert self.address is not None
        return ipaddress.IPv4Interface(self.address)

    @property
    def network(self) -> ipaddress.IPv4Network:
        """The network of an internal switch."""
        return self.interface.network

    @property
    def dhcp_range(self) -> tuple[ipaddress.IPv4Address, ipaddress.IPv4Address]:
        """First and last address for dynamic leases: what was set, else the upper half."""
        network = self.network
        middle = network.network_address + network.num_addresses // 2
        first = ipaddress.IPv4Address(self.dhcp_first) if self.dhcp_first else middle
        last = ipaddress.IPv4Address(self.dhcp_last) if self.dhcp_last else network.broadcast_address - 1
        return first, last

    @property
    def moves_host(self) -> bool:
        """True when the bridge takes the place of the host's card."""
        return self.type == "external" and self.host

    @property
    def bridge_name(self) -> str:
        """The bridge, by the switch's id: names of switches may change."""
        return "vmm" + self.id.replace("-", "")[:8]

    @property
    def bridge_mac(self) -> str:
        """The bridge's address, unless it has its card's: one of its own, or it would change as guests come and go."""
        return frames.format_mac(b"\x02" + hashlib.sha256(self.id.encode()).digest()[:5])

    @property
    def table_name(self) -> str:
        """Its nftables tables."""
        return "vmm_" + self.id.replace("-", "")[:12]

    def to_json(self) -> bytes:
        """As it is stored."""
        return self.model_dump_json(indent=2).encode() + b"\n"

    def gateway(self) -> GatewaySetup:
        """The way out of an internal switch on the user back end."""
        network = self.network
        others = (one for one in itertools.islice(network.hosts(), 1, 6) if one != self.interface.ip)
        return GatewaySetup(
            network=str(network),
            host=str(self.interface.ip),
            name_server=str(next(others)),
            first=str(next(others)),
            domain=self.domain,
            outside=True,
            forwards=self.forwards,
            host_loopback=self.host_loopback,
        )

    def dhcp_setup(self) -> DhcpSetup | None:
        """The DHCP server of an internal switch on the user back end; None where it has none."""
        if not self.dhcp:
            return None
        first, last = self.dhcp_range
        return DhcpSetup(
            network=str(self.network),
            server=str(self.interface.ip),
            first=str(first),
            last=str(last),
            name_server=self.gateway().name_server,
            domain=self.domain,
            lease_seconds=LEASE_SECONDS,
            mtu_bytes=self.mtu_bytes or 0,
            fixed=tuple((one.mac, one.address, one.name or "") for one in self.leases),
        )


def make_switch(**settings: object) -> SwitchSpec:
    """A switch from settings. Raises InvalidSpec with all that is wrong with them."""
    try:
        return SwitchSpec.model_validate(settings)
    except ValidationError as error:
        raise errors.InvalidSpec(words_of(error)) from error


def free_network(taken: Iterable[ipaddress.IPv4Network]) -> ipaddress.IPv4Interface:
    """The host's address in the first /24 of DEFAULT_NETWORKS that overlaps with none that is taken.

    What is taken are networks of the host's and those that it has routes to: a VPN's would be cut off.
    """
    taken = list(taken)
    for network in (one for networks in DEFAULT_NETWORKS for one in networks.subnets(new_prefix=24)):
        if not any(network.overlaps(other) for other in taken):
            return ipaddress.IPv4Interface(f"{network.network_address + 1}/24")
    words = ", ".join(map(str, DEFAULT_NETWORKS))
    raise errors.NoSpace(f"every network in {words} is in use, or has a route", hint="choose one with --address")


# -- the host ---------------------------------------------------------------------------------------------------


# Of an address (linux/if_addr.h): privacy's, which only the kernel makes; without duplicate detection; made from a
# router's advertisement.
TEMPORARY, NO_DETECTION, FROM_ROUTER = 0x01, 0x02, 0x100
FROM_ADVERTISEMENT = 9  # a route's protocol (linux/rtnetlink.h)


@dataclass(frozen=True, slots=True)
class Address:
    """An address of an interface. `valid_seconds` None: for ever; else it came from a DHCP client or a router. It is
    used for new connections for `preferred_seconds` (None: while it is valid).

    `flags` are those of rtnetlink that somebody chose: no duplicate detection, no route of its own. `peer` is the
    other end of a point-to-point address, `metric` that of the route that the kernel makes from it (0: its choice).
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
    is_unproven: bool = False  # IPv6: duplicate detection has not ended, or found that another host has the address

    @property
    def is_six(self) -> bool:
        """True for IPv6."""
        return ":" in self.address

    @property
    def is_renewed(self) -> bool:
        """True when the kernel itself prolongs it, as a router says; what it made of such a one is temporary."""
        return self.is_six and bool(self.flags & (FROM_ROUTER | TEMPORARY))

    def __str__(self) -> str:
        return self.address if self.peer is None else f"{self.address} (peer {self.peer})"


@dataclass(frozen=True, slots=True)
class Route:
    """A route through an interface, without those that the kernel makes itself from addresses."""

    destination: str  # with prefix; 0.0.0.0/0 and ::/0 are the default
    gateway: str | None = None
    metric: int = 0
    table: int = 254
    source: str | None = None
    protocol: int = 4
    scope: int = 0
    on_link: bool = False  # the gateway is reached directly, whatever the addresses say
    metrics: tuple[tuple[str, int], ...] = ()  # such as ("mtu", 1400)
    expires_seconds: int | None = None  # from a router's advertisement
    preference: int | None = None  # of IPv6, as the advertisement had it

    @property
    def is_advertised(self) -> bool:
        """True when a router said it, and says it again."""
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
    addresses: tuple[Address, ...] = ()
    routes: tuple[Route, ...] = ()
    shared_routes: tuple[str, ...] = ()  # destinations that are led through several interfaces at once
    ipv6_settings: tuple[tuple[str, str], ...] = ()  # in which it is not as new interfaces are
    kind: Kind = CARD

    @property
    def candidate(self) -> Candidate:
        """What decides whether it can be a switch's card."""
        return Candidate(self.name, self.mac, self.master, self.is_wireless, self.shared_routes, self.kind)


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What the plan depends on."""

    has_vlan_filtering: bool = False
    uplink: UplinkFacts | None = None
    networks: tuple[str, ...] = ()  # in which the host has an address, as "10.0.0.1/24"
    routed: tuple[str, ...] = ()  # to which it has a route that is not the default one, as "10.8.0.0/16"


@dataclass(frozen=True, slots=True)
class Step:
    """One change of the host. What it needs to be taken back is found out when it is made."""

    kind: str
    arguments: Mapping[str, Any]
    words: str  # for people


VLAN_REFUSAL = "this kernel's bridges know no VLANs (CONFIG_BRIDGE_VLAN_FILTERING is not set)"
VLAN_HINT = "use the user back end for switches with VLANs, or a kernel with that option and CONFIG_VLAN_8021Q"


BRIDGE_VLAN = 1  # of every port of a filtering bridge that was given none: a new bridge's own


def port_vlans(vlan: int, allowed: Iterable[int]) -> tuple[int, frozenset[int]]:
    """(untagged VLAN, tagged ones) of a bridge's port whose untagged frames are of `vlan`, 0 being none."""
    untagged = vlan or BRIDGE_VLAN
    return untagged, frozenset(allowed) - {untagged}


def ranges(numbers: Iterable[int]) -> list[str]:
    """Numbers as few words: 1, 2, 3, 7 as "1-3", "7"."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return [str(first) if first == last else f"{first}-{last}" for first, last in found]


def refusals(spec: SwitchSpec, facts: HostFacts) -> list[str]:
    """Why the host cannot have this switch; nothing when it can."""
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
            reasons.append(f"there is no network card {spec.uplink}")
        elif (reason := refusal(uplink.candidate, spec.bridge_name)) is not None:
            reasons.append(reason)
        elif (spec.mtu_bytes or 0) > uplink.mtu_bytes:
            more = f"ip link set {uplink.name} mtu {spec.mtu_bytes}"
            reasons.append(f"{uplink.name} carries {uplink.mtu_bytes} bytes at most (MTU): first {more}")
    return reasons


def steps(spec: SwitchSpec, facts: HostFacts) -> list[Step]:
    """Everything to do for a switch on the bridge back end, in order. Facts of the time before the first step."""
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
            f"make the bridge {bridge}",
        ),
    ]
    words = f"keep the host's IPv6 off {bridge}, and believe no router there"
    values: tuple[tuple[str, str], ...] = ipv6_settings.NONE
    if spec.moves_host and uplink is not None:
        words, values = f"set IPv6 of {bridge} as it is on {spec.uplink}", uplink.ipv6_settings
    if values:  # they go with the bridge
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
    address = Address(str(spec.interface), str(spec.network.broadcast_address))
    todo = [Step("address", {"name": bridge, "one": address}, f"give the host {address} on {bridge}")]
    if spec.nat:
        words = f"let packets be forwarded from {bridge} to wherever this host's routes lead, and their answers back"
        todo.append(Step("forward", {}, words))
    if spec.dhcp:
        todo.append(Step("dhcp", {}, f"start a DHCP and name server (dnsmasq) on {bridge}"))
    return todo


def _external_steps(spec: SwitchSpec, facts: HostFacts, uplink: UplinkFacts) -> list[Step]:
    bridge = spec.bridge_name
    remember = Step("keep", {"name": uplink.name}, f"write down the addresses and routes of {uplink.name}")
    quiet = Step(
        "quiet", {"name": uplink.name}, f"keep the host's IPv6 off {uplink.name} while it is part of {bridge}"
    )
    todo = [
        remember,
        quiet,
        Step("enslave", {"name": uplink.name, "bridge": bridge}, f"put {uplink.name} into {bridge}"),
    ]
    if facts.has_vlan_filtering:  # or frames of VLANs would end at the card
        tagged = frozenset(range(1, frames.MAX_VLAN + 1)) - {BRIDGE_VLAN}
        arguments = {"name": uplink.name, "untagged": BRIDGE_VLAN, "tagged": tagged}
        todo.append(Step("vlans", arguments, f"let {uplink.name} carry every VLAN, tagged"))
    if not uplink.is_up:
        todo.append(Step("up", {"name": uplink.name}, f"switch {uplink.name} on"))
    if not spec.host:
        for one in uplink.addresses:
            words = f"take {one} from {uplink.name}: the host has no adapter on this switch"
            todo.append(Step("drop-address", {"name": uplink.name, "one": one}, words))
        return todo
    for one in in_order(uplink.addresses):
        todo.append(Step("address", {"name": bridge, "one": _moved(one)}, f"give {bridge} the address {one}"))
        todo.append(Step("drop-address", {"name": uplink.name, "one": one}, f"take {one} from {uplink.name}"))
    for route in sorted(uplink.routes, key=lambda one: one.gateway is not None):  # the way to gateways first
        todo.append(Step("route", {"name": bridge, "route": route}, f"lead {route} through {bridge}"))
    return todo


def in_order(addresses: Iterable[Address]) -> list[Address]:
    """In which order they are given, so that they are listed as here: the kernel puts a new one of IPv6 first."""
    found = list(addresses)
    return [one for one in found if not one.is_six] + [one for one in reversed(found) if one.is_six]


def _moved(one: Address) -> Address:
    """As the bridge gets it. An IPv4 address stays when its lease ends; one of IPv6 that is proved to be ours alone is
    used at once.
    """
    if not one.is_six:
        return replace(one, label=None, valid_seconds=None)
    return replace(one, flags=one.flags & ~TEMPORARY | (0 if one.is_unproven else NO_DETECTION))


def warnings(spec: SwitchSpec, facts: HostFacts) -> list[str]:
    """What a person should know before the steps are made."""
    uplink = facts.uplink
    if spec.type == "internal":
        over = [one for one in facts.routed if ipaddress.IPv4Network(one).overlaps(spec.network)]
        return [f"{spec.network} lies over this host's route to {one}, whose part it takes" for one in over]
    if spec.type != "external" or uplink is None:
        return []
    told = []
    if uplink.addresses and not spec.host:
        told.append(f"the host loses its addresses on {uplink.name}: do not do this over a connection through it")
    lent = [one.address for one in uplink.addresses if one.valid_seconds is not None and not one.is_renewed]
    if lent:
        told.append(
            f"{', '.join(lent)} came from a DHCP client: let that client use {spec.bridge_name} from now "
            f"on, or the address is lost when its lease ends"
        )
    return told
