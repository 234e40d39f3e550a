# SPDX-License-Identifier: Apache-2.0
"""What a switch is: its settings, and which of them can be combined. Pure.

Decides what is valid in a switch's file, and every name derived from it: of the bridge, of the nftables tables, and
the addresses that guests get. Must not know what has to be done on the host for a switch: that is `plan`.

    private    guests only                          user (default) or bridge
    internal   guests and the host                  bridge (root), or user with a gateway (any user)
    external   guests, the host and its network     bridge (root): the host's addresses move to the bridge
"""

from __future__ import annotations

import hashlib
import ipaddress
import itertools
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vmm.model import errors
from vmm.model.complaints import words_of
from vmm.net import frames
from vmm.net.dhcp_server import LEASE_SECONDS, DhcpSetup
from vmm.net.gateway import GatewaySetup

SwitchType = Literal["private", "internal", "external"]
BackendName = Literal["user", "bridge"]
MAX_INTERFACE_CHARACTERS = 15
MAX_LEASES = 1024
USUAL_MTU_BYTES, MIN_MTU_BYTES = 1500, 576  # Ethernet's; the minimum for every IPv4 host (RFC 791)
DEFAULT_NETWORKS = tuple(map(ipaddress.IPv4Network, ("10.77.0.0/16", "172.27.0.0/16", "192.168.128.0/17")))
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,31}")
_DOMAIN = re.compile(r"[a-z0-9]([a-z0-9.-]{0,62}[a-z0-9])?")
_HOST_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,62})?")
_FORWARD = re.compile(r"(?:tcp|udp):([0-9.]*):([0-9]{1,5})-([0-9.]*):([0-9]{1,5})")


def _check_address(text: str) -> None:
    """Raise ValueError for anything but an IPv4 address, in our words."""
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        raise ValueError(f"{text!r} is not an IPv4 address") from None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a back end can do for a switch, and what a switch on it consists of.

    `in_kernel`: a bridge with nftables rules and taps, which need root and which other programs may change; otherwise
    a process, with a gateway of its own if the switch is internal. `max_internal_mtu_bytes`: None for no limit.
    """

    in_kernel: bool
    external: bool
    host_vlan: bool
    host_loopback: bool
    forwards: bool
    mirrors: bool
    max_internal_mtu_bytes: int | None

    @property
    def gateway(self) -> bool:
        """True if guests on an internal switch reach the outside through a gateway process."""
        return not self.in_kernel


CAPABILITIES: dict[BackendName, Capabilities] = {
    "user": Capabilities(
        in_kernel=False,
        external=False,
        host_vlan=False,
        host_loopback=True,
        forwards=True,
        mirrors=True,
        max_internal_mtu_bytes=USUAL_MTU_BYTES,  # the gateway carries no more
    ),
    "bridge": Capabilities(
        in_kernel=True,
        external=True,
        host_vlan=True,
        host_loopback=False,
        forwards=False,
        mirrors=False,
        max_internal_mtu_bytes=None,
    ),
}


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
        _check_address(self.address)
        return self


class SwitchSpec(_Settings):
    """A switch. `address` is the host's address on an internal switch, with its prefix."""

    schema_version: Literal[1] = 1
    id: str = Field(default_factory=lambda: str(uuid.uuid4()), pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")
    name: str
    type: SwitchType = "private"
    backend: BackendName = "user"
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
            raise ValueError(f"{name!r} cannot be the name of a switch: use at most 32 of a-z, 0-9, '.', '_', '-'")
        return name

    @field_validator("forwards")
    @classmethod
    def _good_forwards(cls, forwards: tuple[str, ...]) -> tuple[str, ...]:
        for one in forwards:
            found = _FORWARD.fullmatch(one)
            if found is None or not all(0 < int(found[port]) < 1 << 16 for port in (2, 4)):
                raise ValueError(f"{one!r} is not a forwarded port: write tcp:127.0.0.1:2222-10.77.0.130:22")
            for address in (found[1], found[3]):
                if address:
                    _check_address(address)
        return forwards

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.type == "external") != (self.uplink is not None):
            raise ValueError("an external switch needs a network card (--nic), and no other type can have one")
        if self.type == "external" and not self.capabilities.external:
            raise ValueError("an external switch needs the bridge back end, which needs root")
        if (self.type == "internal") != (self.address is not None):
            raise ValueError("an internal switch needs an address of this host, and no other type can have one")
        if self.host_vlan is not None and (self.type == "private" or not self.capabilities.host_vlan):
            raise ValueError("only the host's adapter on a bridge, of an internal or external switch, can have a VLAN")
        most = self.capabilities.max_internal_mtu_bytes
        if self.type == "internal" and most is not None and (self.mtu_bytes or 0) > most:
            raise ValueError(f"the user back end's gateway carries {USUAL_MTU_BYTES} bytes at most: use a lower MTU")
        if not _DOMAIN.fullmatch(self.domain):
            raise ValueError(f"{self.domain!r} is not a domain name")
        if self.host_loopback and (self.type != "internal" or not self.capabilities.host_loopback):
            raise ValueError("only an internal switch on the user back end can let guests reach this host's loopback")
        if self.type == "internal":
            self._check_network()
        elif self.nat or self.leases or self.forwards:
            raise ValueError("only an internal switch can have leases, NAT or forwarded ports")
        return self

    def _check_network(self) -> None:
        address, _, prefix = str(self.address).partition("/")
        _check_address(address)
        if not re.fullmatch("[0-9]{1,2}", prefix) or int(prefix) > 32:
            raise ValueError(f"{self.address!r} is not an address with a prefix, such as 10.77.0.1/24")
        for one in filter(None, (self.dhcp_first, self.dhcp_last)):
            _check_address(one)
        network = self.network
        if network.prefixlen > 29 or network.prefixlen < 8:
            raise ValueError("an internal network must have a prefix from /8 to /29")
        if self.interface.ip in (network.network_address, network.broadcast_address):
            raise ValueError(f"{self.interface.ip} is the network's own address, not a host's")
        first, last = self.dhcp_range
        if first > last:
            raise ValueError(f"the DHCP range {first} to {last} ends before it begins")
        if first not in network or last not in network:
            raise ValueError(f"the DHCP range {first} to {last} is not within {network}")
        for key in ("mac", "address"):
            values = [getattr(lease, key) for lease in self.leases]
            if len(set(values)) != len(values):
                raise ValueError(f"two leases have the same {key}")
        if any(ipaddress.IPv4Address(lease.address) not in network for lease in self.leases):
            raise ValueError(f"a lease's address is not within {network}")
        if self.forwards and not self.capabilities.forwards:
            raise ValueError("only the user back end forwards ports; on a bridge the host reaches guests directly")

    # -- the network --------------------------------------------------------------------------------------------

    @property
    def capabilities(self) -> Capabilities:
        """The capabilities of its back end."""
        return CAPABILITIES[self.backend]

    @property
    def interface(self) -> ipaddress.IPv4Interface:
        """The host's address and network; internal switches only."""
        assert self.address is not None
        return ipaddress.IPv4Interface(self.address)

    @property
    def network(self) -> ipaddress.IPv4Network:
        """The network of an internal switch."""
        return self.interface.network

    @property
    def dhcp_range(self) -> tuple[ipaddress.IPv4Address, ipaddress.IPv4Address]:
        """First and last address for dynamic leases: what was set, by default the upper half."""
        network = self.network
        middle = network.network_address + network.num_addresses // 2
        first = ipaddress.IPv4Address(self.dhcp_first) if self.dhcp_first else middle
        last = ipaddress.IPv4Address(self.dhcp_last) if self.dhcp_last else network.broadcast_address - 1
        return first, last

    @property
    def moves_host(self) -> bool:
        """True if the bridge takes the place of the host's card."""
        return self.type == "external" and self.host

    @property
    def bridge_name(self) -> str:
        """The bridge's name, derived from the switch's id, because switches can be renamed."""
        return "vmm" + self.id.replace("-", "")[:8]

    @property
    def bridge_mac(self) -> str:
        """The bridge's address unless it has its card's; a fixed one, or it would change as guests come and go."""
        return frames.format_mac(b"\x02" + hashlib.sha256(self.id.encode()).digest()[:5])

    @property
    def table_name(self) -> str:
        """The name of its nftables tables."""
        return "vmm_" + self.id.replace("-", "")[:12]

    def to_json(self) -> bytes:
        """The switch as it is stored."""
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
        """The DHCP server of an internal switch on the user back end; None if it has none."""
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
    """A switch from settings. Raises InvalidSpec, which lists everything wrong with them."""
    try:
        return SwitchSpec.model_validate(settings)
    except ValidationError as error:
        raise errors.InvalidSpec(words_of(error)) from error


def free_network(taken: Iterable[ipaddress.IPv4Network]) -> ipaddress.IPv4Interface:
    """The host's address in the first /24 of DEFAULT_NETWORKS that does not overlap with a taken network.

    Taken are the host's networks and those that it has routes to: a VPN's network would become unreachable.
    """
    taken = list(taken)
    for network in (one for networks in DEFAULT_NETWORKS for one in networks.subnets(new_prefix=24)):
        if not any(network.overlaps(other) for other in taken):
            return ipaddress.IPv4Interface(f"{network.network_address + 1}/24")
    words = ", ".join(map(str, DEFAULT_NETWORKS))
    raise errors.NoSpace(f"every network in {words} is in use or routed", hint="choose one with --address")
