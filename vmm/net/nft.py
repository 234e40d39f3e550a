# SPDX-License-Identifier: Apache-2.0
"""nftables rules of a switch on the bridge back end: documents for `nft -j`, and the one place that runs it.

Decides which rule stands for which guard. The documents are pure and replace a switch's table as a whole, in one
transaction of the kernel. Their commands are in nft's JSON (libnftables-json(5)).

    table bridge vmm_ID    sending: what a guest may send    receiving: what reaches it    host: a private switch's
    table inet vmm_ID_out  forward: whether an internal network leads on    outside: its masquerade
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vmm import errors
from vmm.net import frames
from vmm.net.engine import PortRules, VlanMode
from vmm.net.plan import SwitchSpec

NFT_SECONDS = 20.0
NFT_HINT = "apt-get install nftables"
_BURST_SECONDS = 0.02
_MIN_BURST_BYTES = 16 << 10

_LLC, _SNAP = 0x0004, 0xAAAA  # the kernel's ETH_P_802_2; the service access points of SNAP
_HIDDEN = "hidden"

Rule = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class GuestPort:
    """A port of the bridge: its interface and what it may do."""

    interface: str
    rules: PortRules
    rate_bits_per_second: int = 0


def _match(left: Any, right: Any, operator: str = "==") -> dict[str, Any]:
    return {"match": {"op": operator, "left": left, "right": right}}


def _field(protocol: str, name: str) -> dict[str, Any]:
    return {"payload": {"protocol": protocol, "field": name}}


def _meta(key: str) -> dict[str, Any]:
    return {"meta": {"key": key}}


def _set(values: Sequence[Any]) -> Any:
    return {"set": list(values)} if len(values) > 1 else values[0]


# Spanning tree's would pass (bridges without it pass it on), and could have a switch of the network close its port.
_IS_RESERVED = _match({"&": [_field("ether", "daddr"), "ff:ff:ff:ff:ff:f0"]}, "01:80:c2:00:00:00")
# A priority tag (VLAN 0) is none, unless another stands behind it; tags of other kinds are.
_IS_TAGGED = (
    _match(_field("vlan", "id"), 0, "!="),
    _match(_field("ether", "type"), _set(["8021ad", 0x9100])),
    _match(_meta("protocol"), _set(["8021q", "8021ad", 0x9100])),
)
_DROP: Rule = [{"counter": None}, {"drop": None}]


def port_rules(port: GuestPort) -> tuple[list[Rule], list[Rule]]:
    """(rules for what the guest sends, rules for what it gets)."""
    rules = port.rules
    here = _match(_meta("iifname"), port.interface)
    sending: list[Rule] = []
    if rules.addresses and not rules.spoofing:
        known = _set(sorted(frames.format_mac(one) for one in rules.addresses))
        sending.append([here, _match(_field("ether", "saddr"), known, "!="), *_DROP])
    sending.append([here, _IS_RESERVED, *_DROP])
    receiving: list[Rule] = []
    if rules.mode is VlanMode.TRUNK:  # its outer tag is off here: what is left must be none, or it would be the next
        sending.append([here, _match(_meta("protocol"), _set(["8021q", "8021ad"])), *_DROP])
    else:
        there = _match(_meta("oifname"), port.interface)
        for tagged in _IS_TAGGED:
            sending.append([here, tagged, *_DROP])
            receiving.append([there, tagged, *_DROP])
    if rules.dhcp_guard or rules.router_guard:
        sending += _hiding(here)
    if rules.dhcp_guard:
        sending += [[here, *one, *_DROP] for one in _dhcp_servers()]
    if rules.router_guard:
        for protocol, kinds in (
            ("icmp", ["redirect", "router-advertisement"]),
            ("icmpv6", ["nd-router-advert", "nd-redirect"]),
        ):
            is_kind = _match(_meta("protocol"), "ip" if protocol == "icmp" else "ip6")
            sending.append([here, is_kind, _match(_field(protocol, "type"), _set(kinds)), *_DROP])
    if rules.storm_frames_per_second:
        many = _match(_meta("pkttype"), _set(["broadcast", "multicast"]))
        burst = max(1, rules.storm_frames_per_second // 10)
        limit = {"rate": rules.storm_frames_per_second, "per": "second", "burst": burst, "inv": True}
        sending.append([here, many, {"limit": limit}, *_DROP])
    if port.rate_bits_per_second:
        bytes_per_second = port.rate_bits_per_second // 8
        burst = max(_MIN_BURST_BYTES, int(bytes_per_second * _BURST_SECONDS))
        limit = {"rate": bytes_per_second, "rate_unit": "bytes", "per": "second", "inv": True}
        sending.append([here, {"limit": {**limit, "burst": burst, "burst_unit": "bytes"}}, *_DROP])
    return sending, receiving


_IS_IPV4 = _match(_meta("protocol"), "ip")  # unlike the frame's type the same for a tagged one


def _dhcp_servers() -> list[Rule]:
    """What only servers send, as `frames.is_dhcp_server` judges: each is a list of matches."""
    to_clients = _match(_field("udp", "dport"), _set([68, 546]))
    found: list[Rule] = [[_match(_field("udp", "sport"), _set([67, 547]))], [to_clients]]
    first_of_several = {
        67: [_IS_IPV4, _match({"&": [_field("ip", "frag-off"), 0x2000]}, 0x2000)],
        547: [_match({"exthdr": {"name": "frag", "field": "more-fragments"}}, 1)],
    }
    for number, kinds in ((67, [2]), (547, [2, 7, 10, 13])):
        to_servers = _match(_field("udp", "dport"), number)
        kind = {"payload": {"base": "th", "offset": 64, "len": 8}}
        found += [[to_servers, _match(kind, _set(kinds))], [*first_of_several[number], to_servers]]
    return found


def _hiding(here: dict[str, Any]) -> list[Rule]:
    """What a guard cannot look into: IP in SNAP, stacked tags, IPv6 whose headers do not lead to a protocol.

    Nor may a fragment begin so early that it says anew what was judged in the first one (RFC 1858).
    """
    llc = _match(_meta("protocol"), _LLC)
    snap = _match({"payload": {"base": "nh", "offset": 0, "len": 16}}, _SNAP)
    stacked = _match(_meta("protocol"), _set(["8021q", "8021ad"]))
    ipv6 = _match(_meta("protocol"), "ip6")
    early = _match({"&": [_field("ip", "frag-off"), 0x1FFF]}, 1)
    early6 = _match({"exthdr": {"name": "frag", "field": "frag-off"}}, 1)
    found: list[Rule] = [[here, *one, *_DROP] for one in ([llc, snap], [stacked], [_IS_IPV4, early], [early6])]
    return [*found, [here, ipv6, {"jump": {"target": _HIDDEN}}]]


# What is cut off cannot be read, and no match on it is true: neither on the protocol, nor on what follows the headers
# of one that guards look into. Later fragments are fine: the first one was judged.
_HIDDEN_RULES: list[Rule] = [
    [_match({"exthdr": {"name": "frag", "field": "frag-off"}}, 0, "!="), {"return": None}],
    [_match(_meta("l4proto"), _set(["udp", "ipv6-icmp"]), "!="), {"return": None}],
    [_match({"payload": {"base": "th", "offset": 0, "len": 16}}, 0, "!="), {"return": None}],
    [*_DROP],
]


def _replaced(family: str, table: str) -> list[dict[str, Any]]:
    """A fresh table, whether there was one or not."""
    place = {"table": {"family": family, "name": table}}
    return [{"add": place}, {"delete": place}, {"add": place}]


def _chain(family: str, table: str, name: str, kind: str, hook: str, priority: int) -> dict[str, Any]:
    where = {"family": family, "table": table, "name": name}
    return {"add": {"chain": {**where, "type": kind, "hook": hook, "prio": priority, "policy": "accept"}}}


def _rules(family: str, table: str, chain: str, rules: Sequence[Rule]) -> list[dict[str, Any]]:
    return [{"add": {"rule": {"family": family, "table": table, "chain": chain, "expr": rule}}} for rule in rules]


def document(spec: SwitchSpec, ports: Sequence[GuestPort]) -> dict[str, Any]:
    """All tables of a switch with these ports."""
    table = spec.table_name
    both = [port_rules(port) for port in ports]
    commands = _replaced("bridge", table)
    commands.append(_chain("bridge", table, "sending", "filter", "prerouting", -300))
    commands.append(_chain("bridge", table, "receiving", "filter", "postrouting", 0))
    if any(port.rules.dhcp_guard or port.rules.router_guard for port in ports):
        commands.append({"add": {"chain": {"family": "bridge", "table": table, "name": _HIDDEN}}})
        commands += _rules("bridge", table, _HIDDEN, _HIDDEN_RULES)
    commands += _rules("bridge", table, "sending", [rule for sending, _ in both for rule in sending])
    commands += _rules("bridge", table, "receiving", [rule for _, receiving in both for rule in receiving])
    if spec.type == "private" or (spec.type == "external" and not spec.host):
        # The kernel's option for matching a bridge's own name (nft_meta_bridge) is rare: the ports' names do as well.
        names = [port.interface for port in ports] + ([spec.uplink] if spec.uplink else [])
        for name, hook, way in (("from_host", "output", "oifname"), ("to_host", "input", "iifname")):
            commands.append(_chain("bridge", table, name, "filter", hook, 0))
            if names:
                commands += _rules("bridge", table, name, [[_match(_meta(way), _set(names)), *_DROP]])
    if spec.type == "internal":
        commands += _outward(spec)
    return {"nftables": commands}


def _outward(spec: SwitchSpec) -> list[dict[str, Any]]:
    """Whether an internal network leads to others: masqueraded, or not at all, whatever the host forwards else."""
    table, bridge = f"{spec.table_name}_out", spec.bridge_name
    commands = [*_replaced("inet", table), _chain("inet", table, "forward", "filter", "forward", -10)]
    # With br_netfilter frames between two guests come by here, too, as if the bridge forwarded them to itself.
    inside: Rule = [_match(_meta("iifname"), bridge), _match(_meta("oifname"), bridge), {"accept": None}]
    commands += _rules("inet", table, "forward", [inside])
    if not spec.nat:
        closed: list[Rule] = [[_match(_meta("iifname"), bridge), *_DROP], [_match(_meta("oifname"), bridge), *_DROP]]
        return commands + _rules("inet", table, "forward", closed)
    known = _match({"ct": {"key": "state"}}, ["established", "related"], "in")
    inward: Rule = [_match(_meta("oifname"), bridge), _match(_meta("iifname"), bridge, "!=")]
    commands += _rules("inet", table, "forward", [[*inward, known, {"accept": None}], [*inward, *_DROP]])
    commands.append(_chain("inet", table, "outside", "nat", "postrouting", 100))
    network = {"prefix": {"addr": str(spec.network.network_address), "len": spec.network.prefixlen}}
    leaving: Rule = [_match(_field("ip", "saddr"), network), _match(_meta("oifname"), bridge, "!=")]
    return commands + _rules("inet", table, "outside", [[*leaving, {"masquerade": None}]])


def removal(spec: SwitchSpec) -> dict[str, Any]:
    """A document after which there is no table of the switch's, whether there was one or not."""
    commands = []
    for family, name in (("bridge", spec.table_name), ("inet", f"{spec.table_name}_out")):
        place = {"table": {"family": family, "name": name}}
        commands += [{"add": place}, {"delete": place}]
    return {"nftables": commands}


def run(rules: dict[str, Any]) -> None:
    """Have the kernel take a document, whole or not at all. Raises Unsupported, VmmError."""
    program = shutil.which("nft", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if program is None:
        raise errors.Unsupported("nft is not installed", hint=NFT_HINT)
    try:
        done = subprocess.run(
            [program, "-j", "-f", "-"],
            input=json.dumps(rules).encode(),
            capture_output=True,
            timeout=NFT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise errors.TimedOut("nft does not answer") from error
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
        raise errors.VmmError(f"nft refused the switch's rules: {said[0]}")
