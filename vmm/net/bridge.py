# SPDX-License-Identifier: Apache-2.0
"""The kernel's side of the bridge back end, by rtnetlink: links, addresses, routes, neighbours. The home of pyroute2.

Decides how a change is requested from the kernel, that requesting it twice is not an error, and how the present state
is read so that it can be restored. Must not know which changes a switch needs, nor their order. Works in the network
namespace of the calling thread. pyroute2 runs an event loop of its own: never call this from a thread that runs
another.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from vmm.model import errors
from vmm.model.waiting import looks
from vmm.net import bridge_features, frames, ipv6, ipv6_settings, plan, uplinks
from vmm.net.plan import HostAddress, HostFacts, Route, UplinkFacts
from vmm.net.switch_spec import SwitchSpec

FOREVER = 0xFFFFFFFF
ALIAS = "vmm switch"  # distinguishes our bridge from another program's of the same name
_KERNEL_PROTOCOLS = (1, 2)  # redirect, kernel: the kernel recreates them by itself
_MULTICAST_OR_LOCAL = (3, 2, 5)  # kinds of routes that the kernel makes: broadcast, local, multicast
_ANSWERED = 0x02 | 0x04 | 0x08 | 0x10 | 0x80  # reachable, stale, delay, probe, permanent
_PVID, _UNTAGGED = 0x02, 0x04  # of a VLAN: untagged frames that arrive belong to it; its frames leave untagged
_SELF = 2  # refers to the bridge itself, not the bridge that it is a port of
_NO_ROUTE = 0x200  # of an address: the kernel creates no route from it
_ON_LINK = 4  # of a route
_UNPROVEN = 0x08 | 0x40  # of an address of IPv6: another host has it; no answer yet
_CHOSEN_FLAGS = plan.NO_DETECTION | plan.FROM_ROUTER | _NO_ROUTE | 0x400  # the last one joins groups
_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
_DISCARD_PORT = 9
_RA_METRIC = 1024
_ETHERNET = 1  # ARPHRD_ETHER
_WIRELESS = ("wireless", "phy80211")
_PROBE_SECONDS = 0.05  # each look sends a packet
_GONE = (errno.ENODEV, errno.ESRCH, errno.EADDRNOTAVAIL, errno.ENOENT)


def refused(error: NetlinkError, doing: str) -> errors.VmmError:
    """The error for a refusal by the kernel."""
    return errors.of_os_error(OSError(error.code, os.strerror(error.code)), doing)


class Kernel:
    """A conversation with the kernel. Close it, or use it in a `with`."""

    def __init__(self) -> None:
        self._netlink = IPRoute()

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the conversation."""
        self._netlink.close()

    # -- links --------------------------------------------------------------------------------------------------

    def index(self, name: str) -> int | None:
        """The index of a link; None if no link has that name."""
        found = self._netlink.link_lookup(ifname=name)
        return int(found[0]) if found else None

    def mark(self, name: str) -> dict[str, Any]:
        """What identifies a link later, under any name (`name_now`): its name, index and address."""
        link = self.link(name) or {}
        return {"name": name, "index": link.get("index"), "mac": link.get("mac")}

    def name_now(self, mark: Mapping[str, Any]) -> str | None:
        """The name that a marked link has now; None if it is gone. Earlier versions recorded only the name."""
        name, index, mac = mark["name"], mark.get("index"), mark.get("mac")
        if index is None:
            return name if self.index(name) is not None else None
        for message in self._netlink.get_links():
            if message["index"] == index:
                return str(message.get_attr("IFLA_IFNAME"))
        link = self.link(name)  # its driver may have been reloaded
        return name if link is not None and link["mac"] == mac else None

    def _need(self, name: str) -> int:
        index = self.index(name)
        if index is None:
            raise errors.NotFound(f"network interface {name} does not exist")
        return index

    def link(self, name: str) -> dict[str, Any] | None:
        """What the kernel reports about a link: mac, mtu_bytes, is_up, master (by name), alias, kind."""
        index = self.index(name)
        if index is None:
            return None
        message = self._netlink.get_links(index)[0]
        master = message.get_attr("IFLA_MASTER")
        info = message.get_attr("IFLA_LINKINFO")
        return {
            "index": index,
            "mac": message.get_attr("IFLA_ADDRESS"),
            "mtu_bytes": message.get_attr("IFLA_MTU"),
            "is_up": bool(message["flags"] & 1),
            "master": None if master is None else self._name(master),
            "alias": message.get_attr("IFLA_IFALIAS"),
            "kind": None if info is None else info.get_attr("IFLA_INFO_KIND"),
            "is_ethernet": message["ifi_type"] == _ETHERNET,
        }

    def _name(self, index: int) -> str:
        return str(self._netlink.get_links(index)[0].get_attr("IFLA_IFNAME"))

    def add_bridge(self, name: str, mac: str, mtu_bytes: int | None, vlan_filtering: bool) -> None:
        """Add a bridge of ours; succeeds if it exists. Raises AlreadyExists for another program's interface of that
        name.
        """
        present = self.link(name)
        if present is not None:
            if present["alias"] != ALIAS:
                raise errors.AlreadyExists(f"an interface {name} already exists and does not belong to vmm")
            return
        settings: dict[str, Any] = {"br_stp_state": 0, "br_forward_delay": 0, "address": mac}
        if vlan_filtering:
            settings["br_vlan_filtering"] = 1
        try:
            self._netlink.link("add", ifname=name, kind="bridge", ifalias=ALIAS, **settings)
            index = self._need(name)
            self._netlink.link("set", index=index, ifalias=ALIAS)
            if mtu_bytes is not None:
                self._netlink.link("set", index=index, mtu=mtu_bytes)
        except NetlinkError as error:
            raise refused(error, f"make the bridge {name}") from error

    def remove_bridge(self, name: str) -> None:
        """Remove a bridge of ours, with its addresses and routes; succeeds if it is gone."""
        present = self.link(name)
        if present is None or present["kind"] != "bridge":
            return
        self._change(f"remove the bridge {name}", "del", present["index"])

    def set_up(self, name: str, up: bool = True) -> None:
        """Switch a link on or off."""
        index = self.index(name)
        if index is not None or up:
            self._change(f"switch {name} on", "set", self._need(name), state="up" if up else "down")

    def set_mtu(self, name: str, mtu_bytes: int) -> None:
        """Set the MTU; does nothing if the link has it."""
        link = self.link(name)
        if link is None or link["mtu_bytes"] != mtu_bytes:
            self._change(f"set the MTU of {name} to {mtu_bytes}", "set", self._need(name), mtu=mtu_bytes)

    def set_master(self, name: str, bridge: str | None) -> None:
        """Add a link to a bridge, or (None) remove it from its bridge; succeeds if it is in none."""
        present = self.link(name)
        if bridge is None and (present is None or present["master"] is None):
            return
        master = 0 if bridge is None else self._need(bridge)
        self._change(f"put {name} into {bridge}", "set", self._need(name), master=master)

    def set_vlans(self, name: str, untagged: int, tagged: Iterable[int], own: bool = False) -> None:
        """Set the VLANs of a bridge's port, or (`own`) of the bridge as the host's adapter: one untagged, others
        tagged.

        It leaves all other VLANs first, so that a port is never in the old and the new ones at once. Raises VmmError.
        """
        index = self._need(name)
        wanted = set(tagged) - {untagged}
        unwanted = self._vlans(index) - wanted - {untagged}
        settings: dict[str, Any] = {"index": index}
        if own:
            settings["vlan_flags"] = _SELF
        try:
            for one in plan.ranges(unwanted):
                self._netlink.vlan_filter("del", vlan_info={"vid": one}, **settings)
            info = {"vid": untagged, "flags": _PVID | _UNTAGGED}
            self._netlink.vlan_filter("add", vlan_info=info, **settings)
            for one in plan.ranges(wanted):
                self._netlink.vlan_filter("add", vlan_info={"vid": one}, **settings)
        except NetlinkError as error:
            raise refused(error, f"set the VLANs of {name}") from error

    def _vlans(self, index: int) -> set[int]:
        found: set[int] = set()
        for message in self._netlink.get_vlans(index=index):
            spec = message.get_attr("IFLA_AF_SPEC")
            for kind, value in () if spec is None else spec["attrs"]:
                if kind == "IFLA_BRIDGE_VLAN_INFO":
                    found.add(int(value["vid"]))
        return found

    def _change(self, doing: str, verb: str, index: int, **settings: Any) -> None:
        try:
            self._netlink.link(verb, index=index, **settings)
        except NetlinkError as error:
            if verb == "del" and error.code in _GONE:
                return
            raise refused(error, doing) from error

    # -- addresses and routes -----------------------------------------------------------------------------------

    def addresses(self, name: str) -> tuple[HostAddress, ...]:
        """The addresses that users or DHCP clients gave a link, without those that the kernel derives itself."""
        index = self.index(name)
        if index is None:
            return ()
        return tuple(self._addresses(index))

    def _addresses(self, index: int) -> Iterator[HostAddress]:
        for message in self._netlink.get_addr(index=index):
            is_four = message["family"] == socket.AF_INET
            if not is_four and (message["family"] != socket.AF_INET6 or message["scope"] != 0):
                continue  # a link-local address is derived from the card's own
            cache = message.get_attr("IFA_CACHEINFO") or {}
            valid = int(cache.get("ifa_valid", FOREVER))
            preferred = int(cache.get("ifa_preferred", FOREVER))
            flags = int(message.get_attr("IFA_FLAGS") or 0)
            other = message.get_attr("IFA_ADDRESS")
            own = message.get_attr("IFA_LOCAL") or other
            label = message.get_attr("IFA_LABEL")
            yield HostAddress(
                f"{own}/{message['prefixlen']}",
                message.get_attr("IFA_BROADCAST") if is_four else None,
                None if valid == FOREVER else valid,
                flags & (_CHOSEN_FLAGS if is_four else _CHOSEN_FLAGS | plan.TEMPORARY),
                other if other != own else None,
                label if label != self._name(index) else None,
                int(message["scope"]),
                int(message.get_attr("IFA_RT_PRIORITY") or 0),
                None if is_four or preferred == FOREVER else preferred,
                not is_four and bool(flags & _UNPROVEN),
            )

    def add_address(self, name: str, one: HostAddress) -> None:
        """Add an address to a link; succeeds if the link has it."""
        settings = {"index": self._need(name), **_place(one)}
        optional: dict[str, Any] = {"broadcast": one.broadcast, "label": one.label}
        optional |= {
            "flags": one.flags & ~plan.TEMPORARY or None,
            "scope": one.scope or None,
            "rt_priority": one.metric or None,
        }
        preferred = one.valid_seconds if one.preferred_seconds is None else one.preferred_seconds
        optional |= {"valid_lft": one.valid_seconds, "preferred_lft": preferred}
        settings |= {key: value for key, value in optional.items() if value is not None}
        try:
            self._netlink.addr("replace", **settings)
        except NetlinkError as error:
            raise refused(error, f"add the address {one} to {name}") from error

    def remove_address(self, name: str, one: HostAddress) -> None:
        """Remove an address from a link; succeeds if it is gone."""
        index = self.index(name)
        if index is None:
            return
        try:
            self._netlink.addr("delete", index=index, **_place(one))
        except NetlinkError as error:
            if error.code not in _GONE:
                raise refused(error, f"remove the address {one} from {name}") from error

    def routes(self, name: str) -> tuple[Route, ...]:
        """The routes through a link that the kernel would not recreate by itself."""
        index = self.index(name)
        return () if index is None else tuple(self._routes(index))

    def _routes(self, index: int) -> Iterator[Route]:
        chosen = {
            str(ipaddress.ip_interface(one.address).network)
            for one in self._addresses(index)
            if one.flags & _NO_ROUTE  # NetworkManager adds such addresses, and their routes as if it were the kernel
        }
        for family in (socket.AF_INET, socket.AF_INET6):
            anything = "0.0.0.0" if family == socket.AF_INET else "::"
            for message in self._netlink.get_routes(family=family):
                if message.get_attr("RTA_OIF") != index or message["type"] in _MULTICAST_OR_LOCAL:
                    continue
                destination = f"{message.get_attr('RTA_DST') or anything}/{message['dst_len']}"
                if message["proto"] in _KERNEL_PROTOCOLS and destination not in chosen:
                    continue
                metrics = (message.get_attr("RTA_METRICS") or {}).get("attrs", ())
                yield Route(
                    destination,
                    message.get_attr("RTA_GATEWAY"),
                    message.get_attr("RTA_PRIORITY") or 0,
                    message.get_attr("RTA_TABLE") or 254,
                    message.get_attr("RTA_PREFSRC"),
                    message["proto"],
                    message["scope"],
                    bool(message["flags"] & _ON_LINK),
                    tuple((key.removeprefix("RTAX_").lower(), value) for key, value in metrics),
                    _expiry(message) if family == socket.AF_INET6 else None,
                    message.get_attr("RTA_PREF"),
                )

    def _shared_routes(self, index: int) -> Iterator[str]:
        for message in self._netlink.get_routes():
            if any(hop["oif"] == index for hop in message.get_attr("RTA_MULTIPATH") or ()):
                yield f"{message.get_attr('RTA_DST') or 'anywhere'}"

    def add_route(self, name: str, route: Route) -> None:
        """Add a route through a link; succeeds if it exists.

        A route from a router's advertisement gets another metric if the kernel accepts advertisements: it ignores the
        next advertisement if a route with the same metric exists that it did not create itself.
        """
        if route.is_advertised and ipv6.hears_routers(name):
            route = replace(route, metric=(route.metric or _RA_METRIC) + 1)
        settings: dict[str, Any] = {"dst": route.destination, "oif": self._need(name), "table": route.table}
        settings |= {"proto": route.protocol, "scope": route.scope}
        optional: dict[str, Any] = {"gateway": route.gateway, "prefsrc": route.source}
        optional |= {"priority": route.metric or None, "metrics": dict(route.metrics) or None}
        optional["flags"] = _ON_LINK if route.on_link else None
        if route.expires_seconds is not None:  # pyroute2 has no type for it
            optional["expires"] = struct.pack("=I", route.expires_seconds)
        if route.preference:
            optional["pref"] = route.preference
        settings |= {key: value for key, value in optional.items() if value is not None}
        try:
            self._netlink.route("replace", **settings)
        except NetlinkError as error:
            raise refused(error, f"add the route {route} through {name}") from error

    # -- looking around -----------------------------------------------------------------------------------------

    def facts(self, spec: SwitchSpec) -> HostFacts:
        """The facts that the plan of a switch depends on."""
        uplink = None
        if spec.uplink is not None and (link := self.link(spec.uplink)) is not None:
            master = None if link["master"] is None else self.link(link["master"])
            uplink = UplinkFacts(
                name=spec.uplink,
                mac=link["mac"] or "",
                mtu_bytes=link["mtu_bytes"],
                is_up=link["is_up"],
                master=link["master"],
                is_wireless=any(os.path.exists(f"/sys/class/net/{spec.uplink}/{one}") for one in _WIRELESS),
                addresses=self.addresses(spec.uplink),
                routes=self.routes(spec.uplink),
                shared_routes=tuple(sorted(set(self._shared_routes(link["index"])))),
                ipv6_settings=ipv6_settings.of_card(spec.uplink),
                kind=uplinks.InterfaceKind(
                    link["kind"],
                    None if master is None else master["kind"],
                    link["is_ethernet"],
                    tuple(self._on_top(link["index"])),
                ),
            )
        return HostFacts(
            bridge_features.has_vlan_filtering(),
            uplink,
            tuple(self.networks(spec.bridge_name)),
            tuple(self.routed(spec.bridge_name)),
        )

    def _on_top(self, index: int) -> Iterator[str]:
        """The interfaces on top of a card that keep a bridge from getting its frames, by name."""
        for message in self._netlink.get_links():
            info = message.get_attr("IFLA_LINKINFO")
            kind = None if info is None else info.get_attr("IFLA_INFO_KIND")
            elsewhere = message.get_attr("IFLA_LINK_NETNSID") is not None  # its index belongs to another namespace
            if kind in uplinks.ON_TOP and message.get_attr("IFLA_LINK") == index and not elsewhere:
                yield str(message.get_attr("IFLA_IFNAME"))

    def networks(self, besides: str | None = None) -> list[str]:
        """Every IPv4 network in which the host has an address, as "10.0.0.1/24"; not those on the link `besides`."""
        index = None if besides is None else self.index(besides)
        return [
            f"{message.get_attr('IFA_LOCAL') or message.get_attr('IFA_ADDRESS')}/{message['prefixlen']}"
            for message in self._netlink.get_addr(family=socket.AF_INET)
            if index is None or message["index"] != index
        ]

    def routed(self, besides: str | None = None) -> list[str]:
        """Every IPv4 network that a route leads to, in any table, except through the link `besides`.

        Networks of a quarter of all addresses or more are left out: they stand for a default route (0.0.0.0/1 and
        128.0.0.0/1).
        """
        index = None if besides is None else self.index(besides)
        found = {
            f"{message.get_attr('RTA_DST')}/{message['dst_len']}"
            for message in self._netlink.get_routes(family=socket.AF_INET)
            if message["dst_len"] > 2
            and message["type"] not in _MULTICAST_OR_LOCAL
            and (index is None or message.get_attr("RTA_OIF") != index)
        }
        return sorted(found)

    def answers(self, name: str, neighbour: str, seconds: float) -> bool:
        """True if a neighbour on the link answers (ARP or neighbour discovery) within that time."""
        index = self._need(name)
        family = socket.AF_INET6 if ":" in neighbour else socket.AF_INET
        place: tuple[Any, ...] = (neighbour, _DISCARD_PORT)
        if family == socket.AF_INET6:
            place += (0, index)  # a link-local address is valid on this link
        for _ in looks(seconds, every_seconds=_PROBE_SECONDS):
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                try:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, name.encode())
                    probe.sendto(b"", socket.MSG_DONTWAIT, place)
                except OSError:
                    pass  # no route yet, or the last attempt failed: ask again
            for message in self._netlink.get_neighbours(ifindex=index, family=family):
                if message.get_attr("NDA_DST") == neighbour and message["state"] & _ANSWERED:
                    return True
        return False

    def mac_of(self, name: str) -> bytes | None:
        """The MAC address of a link."""
        link = self.link(name)
        return None if link is None or not link["mac"] else frames.parse_mac(link["mac"])


def _expiry(message: Any) -> int | None:
    """The remaining lifetime of a route in seconds; None: unlimited."""
    ticks = int((message.get_attr("RTA_CACHEINFO") or {}).get("rta_expires", 0))
    return None if ticks == 0 else max(1, ticks // _TICKS_A_SECOND)


def _place(one: HostAddress) -> dict[str, Any]:
    """What identifies an address."""
    host, _, prefix = one.address.partition("/")
    if one.peer is None:
        return {"address": host, "prefixlen": int(prefix)}
    return {"local": host, "address": one.peer, "prefixlen": int(prefix)}
