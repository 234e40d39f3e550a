# SPDX-License-Identifier: Apache-2.0
"""nftables rules of a switch on the bridge back end: documents for `nft -j`, and the one place that runs it.

Decides which rule implements which guard. The documents are pure; the kernel accepts one completely or not at all.
Their commands are in nft's JSON (libnftables-json(5)). A document replaces rules; counters (drops by port and reason)
and limits stay as they are, so that a change to one port does not let another port send more (`INV-LIMITS-KEPT`).

    table bridge vmm_ID    sending: what a guest may send    receiving: what reaches it    host: a private switch's
                           TAP.sending, TAP.receiving, TAP.hidden: a port's chains         TAP.REASON: its counters
    table netdev vmm_ID    TAP: what the guest sends waits in a queue (`shaping`)
    table inet vmm_ID_out  forward: whether an internal network leads on    outside: its masquerade
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from vmm.model import errors, paths
from vmm.net import forwarding, frames
from vmm.net.engine import Drop, PortRules, VlanMode
from vmm.net.forwarding import Guard
from vmm.net.switch_spec import SwitchSpec

NFT_SECONDS = 20.0
NFT_HINT = "apt-get install nftables"
_LLC, _SNAP = 0x0004, 0xAAAA  # the kernel's ETH_P_802_2; the service access points of SNAP
MAX_RATE_BITS = 30_000_000_000  # a higher rate does not fit into 32 bits of bytes, nor through any tap
_LIMIT = "storm-limit"
_DIGEST_CHARACTERS = 12
_SENDING, _RECEIVING, _HIDDEN = "sending", "receiving", "hidden"  # chains: of all ports, and TAP.NAME of one

Rule = list[dict[str, Any]]
Kept = tuple[str, str]  # (kind, name) of an object that a document keeps if it exists: counter, limit, chain


@dataclass(frozen=True, slots=True)
class GuestPort:
    """A port of the bridge: its interface and its rules."""

    interface: str
    rules: PortRules
    rate_bits_per_second: int = 0

    @property
    def is_shaped(self) -> bool:
        """True if what it sends waits in a queue first."""
        return 0 < self.rate_bits_per_second <= MAX_RATE_BITS


def _match(left: Any, right: Any, operator: str = "==") -> dict[str, Any]:
    return {"match": {"op": operator, "left": left, "right": right}}


def _field(protocol: str, name: str) -> dict[str, Any]:
    return {"payload": {"protocol": protocol, "field": name}}


def _meta(key: str) -> dict[str, Any]:
    return {"meta": {"key": key}}


def _set(values: Sequence[Any]) -> Any:
    return {"set": list(values)} if len(values) > 1 else values[0]


# Spanning tree frames would pass (bridges without it forward them), and could make a switch of the network close its
# port.
_IS_RESERVED = _match({"&": [_field("ether", "daddr"), "ff:ff:ff:ff:ff:f0"]}, "01:80:c2:00:00:00")
# A priority tag (VLAN 0) does not count as one unless another follows it; tags of other kinds do.
_IS_TAGGED = (
    _match(_field("vlan", "id"), 0, "!="),
    _match(_field("ether", "type"), _set(["8021ad", 0x9100])),
    _match(_meta("protocol"), _set(["8021q", "8021ad", 0x9100])),
)
_DROP: Rule = [{"counter": None}, {"drop": None}]


_IS_IPV4 = _match(_meta("protocol"), "ip")  # unlike the frame's type, the same for a tagged frame


def _dhcp_servers() -> list[Rule]:
    """Messages that only servers send, as `frames.is_dhcp_server` judges them: each is a list of matches."""
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


@dataclass(frozen=True, slots=True)
class PortChains:
    """The rules of a port for the kernel: its chains by name, and the counters and limits that they use."""

    chains: dict[str, list[Rule]]
    counters: frozenset[str]
    limits: dict[str, dict[str, Any]]


def port_chains(port: GuestPort) -> PortChains:
    """The chains of one port."""
    one = _PortChains(port)
    sending, receiving = one.sending(), one.receiving()
    chains = {name(port.interface, _SENDING): sending, name(port.interface, _RECEIVING): receiving}
    if port.rules.dhcp_guard or port.rules.router_guard:
        chains[name(port.interface, _HIDDEN)] = one.hidden()
    return PortChains(chains, frozenset(one.counters), one.limits)


def name(interface: str, what: str) -> str:
    """The name of a port's object in the switch's table."""
    return f"{interface}.{what}"


def shaper_name(interface: str) -> str:
    """The interface in whose queue the frames of a tap wait."""
    return "vb" + interface.removeprefix("vt")


class _PortChains:
    """Writes a port's rules and records which counters and limits they need."""

    def __init__(self, port: GuestPort) -> None:
        self.port = port
        self.counters: set[str] = set()
        self.limits: dict[str, dict[str, Any]] = {}

    def _drop(self, reason: Drop) -> Rule:
        """Drop, and count the reason."""
        counter = name(self.port.interface, reason)
        self.counters.add(counter)
        return [{"counter": counter}, {"drop": None}]

    def sending(self) -> list[Rule]:
        """The rules for what the guest sends."""
        rules = self.port.rules
        found: list[Rule] = []
        if rules.addresses and not rules.spoofing:
            known = _set(sorted(frames.format_mac(one) for one in rules.addresses))
            found.append([_match(_field("ether", "saddr"), known, "!="), *self._drop(Drop.SPOOFED)])
        found.append([_IS_RESERVED, *self._drop(Drop.RESERVED)])
        if rules.mode is VlanMode.TRUNK:  # its outer tag is already removed here: another one would be next
            found.append([_match(_meta("protocol"), _set(["8021q", "8021ad"])), *self._drop(Drop.VLAN)])
        else:
            found += [[tagged, *self._drop(Drop.VLAN)] for tagged in _IS_TAGGED]
        if rules.dhcp_guard or rules.router_guard:
            found += self._hiding()
        if rules.dhcp_guard:
            found += [[*one, *self._drop(Drop.DHCP)] for one in _dhcp_servers()]
        if rules.router_guard:
            for protocol, kinds in (
                ("icmp", ["redirect", "router-advertisement"]),
                ("icmpv6", ["nd-router-advert", "nd-redirect"]),
            ):
                is_kind = _match(_meta("protocol"), "ip" if protocol == "icmp" else "ip6")
                is_router = _match(_field(protocol, "type"), _set(kinds))
                found.append([is_kind, is_router, *self._drop(Drop.ROUTER)])
        if rules.storm_frames_per_second:
            many = _match(_meta("pkttype"), _set(["broadcast", "multicast"]))
            found.append([many, {"limit": self._storm_limit()}, *self._drop(Drop.STORM)])
        return found

    def _storm_limit(self) -> str:
        """The limit's name contains its rate: an existing limit keeps what is left of it."""
        rate = self.port.rules.storm_frames_per_second
        limit = name(self.port.interface, f"{_LIMIT}.{rate}")
        self.limits[limit] = {"rate": rate, "per": "second", "burst": max(1, rate // 10), "inv": True}
        return limit

    def receiving(self) -> list[Rule]:
        """The rules for what reaches the guest."""
        if self.port.rules.mode is VlanMode.TRUNK:
            return []
        return [[tagged, *self._drop(Drop.VLAN)] for tagged in _IS_TAGGED]

    def _guard(self) -> Drop:
        """The guard that counts frames that hide their content: the first one that would examine them."""
        return Drop.DHCP if self.port.rules.dhcp_guard else Drop.ROUTER

    def _hiding(self) -> list[Rule]:
        """What a guard cannot look into: IP in SNAP, stacked tags, IPv6 whose headers do not lead to a protocol.

        A fragment must also not begin so early that it replaces what was judged in the first one (RFC 1858).
        """
        llc = _match(_meta("protocol"), _LLC)
        snap = _match({"payload": {"base": "nh", "offset": 0, "len": 16}}, _SNAP)
        stacked = _match(_meta("protocol"), _set(["8021q", "8021ad"]))
        ipv6 = _match(_meta("protocol"), "ip6")
        early = _match({"&": [_field("ip", "frag-off"), 0x1FFF]}, 1)
        early6 = _match({"exthdr": {"name": "frag", "field": "frag-off"}}, 1)
        drop = self._drop(self._guard())
        found: list[Rule] = [[*one, *drop] for one in ([llc, snap], [stacked], [_IS_IPV4, early], [early6])]
        return [*found, [ipv6, {"jump": {"target": name(self.port.interface, _HIDDEN)}}]]

    def hidden(self) -> list[Rule]:
        """Rules for truncated headers, which cannot be read, so that no match on them is true.

        They cover the protocol, and what follows the headers of a protocol that guards examine. Later fragments are
        accepted: the first one was judged.
        """
        return [
            [_match({"exthdr": {"name": "frag", "field": "frag-off"}}, 0, "!="), {"return": None}],
            [_match(_meta("l4proto"), _set(["udp", "ipv6-icmp"]), "!="), {"return": None}],
            [_match({"payload": {"base": "th", "offset": 0, "len": 16}}, 0, "!="), {"return": None}],
            self._drop(self._guard()),
        ]


def _replaced(family: str, table: str) -> list[dict[str, Any]]:
    """A new table, whether one existed or not."""
    place = {"table": {"family": family, "name": table}}
    return [{"add": place}, {"delete": place}, {"add": place}]


def _chain(family: str, table: str, name: str, kind: str, hook: str, priority: int) -> dict[str, Any]:
    where = {"family": family, "table": table, "name": name}
    return {"add": {"chain": {**where, "type": kind, "hook": hook, "prio": priority, "policy": "accept"}}}


def _rules(family: str, table: str, chain: str, rules: Sequence[Rule]) -> list[dict[str, Any]]:
    """Each rule has the digest of its content as its comment, by which it is recognized (`rule_check`)."""
    place = {"family": family, "table": table, "chain": chain}
    return [{"add": {"rule": {**place, "comment": _digest(rule), "expr": rule}}} for rule in rules]


def _digest(rule: Rule) -> str:
    return hashlib.sha256(json.dumps(rule, sort_keys=True).encode()).hexdigest()[:_DIGEST_CHARACTERS]


def document(
    spec: SwitchSpec, ports: Sequence[GuestPort], present: Collection[Kept] = (), guard: Guard | None = None
) -> dict[str, Any]:
    """All tables of a switch with these ports. Of the objects in `present`, in the first table, those of other ports
    are removed.

    Pure if `guard` is given; otherwise it is what the host needs now.
    """
    table = spec.table_name
    place = {"family": "bridge", "table": table}
    found = [port_chains(port) for port in ports]
    chains = {one: rules for port in found for one, rules in port.chains.items()}
    commands: list[dict[str, Any]] = [{"add": {"table": {"family": "bridge", "name": table}}}]
    commands.append(_chain("bridge", table, _SENDING, "filter", "prerouting", -300))
    commands.append(_chain("bridge", table, _RECEIVING, "filter", "postrouting", 0))
    fixed = {_SENDING: _dispatch("iifname", ports, _SENDING), _RECEIVING: _dispatch("oifname", ports, _RECEIVING)}
    if spec.type == "private" or (spec.type == "external" and not spec.host):
        # The kernel's option for matching a bridge's own name (nft_meta_bridge) is rare; matching the ports' names
        # works everywhere.
        names = [port.interface for port in ports] + ([spec.uplink] if spec.uplink else [])
        for one, hook, way in (("from_host", "output", "oifname"), ("to_host", "input", "iifname")):
            commands.append(_chain("bridge", table, one, "filter", hook, 0))
            fixed[one] = [[_match(_meta(way), _set(names)), *_DROP]] if names else []
    chains = {**fixed, **chains}
    counters = {one for port in found for one in port.counters}
    limits = {one: limit for port in found for one, limit in port.limits.items()}
    commands += [{"add": {"chain": {**place, "name": one}}} for one in chains if one not in fixed]
    commands += [{"flush": {"chain": {**place, "name": one}}} for one in chains]
    kept = {("chain", one) for one in chains} | {("counter", one) for one in counters}
    kept |= {("limit", one) for one in limits}
    stale = sorted(set(present) - kept)  # by kind: chains are removed before the objects that they use
    commands += [{"flush": {"chain": {**place, "name": one}}} for kind, one in stale if kind == "chain"]
    commands += [{"delete": {kind: {**place, "name": one}}} for kind, one in stale]
    commands += [{"add": {"counter": {**place, "name": one}}} for one in sorted(counters)]
    commands += [{"add": {"limit": {**place, "name": one, **limit}}} for one, limit in sorted(limits.items())]
    for one in reversed(chains):  # a chain has its rules before another one jumps to it
        commands += _rules("bridge", table, one, chains[one])
    commands += _shaped(spec, ports)
    if spec.type == "internal":
        if guard is None:
            guard = forwarding.guard(paths.runtime_home()) if spec.nat else Guard(is_needed=False)
        commands += _outward(spec, guard)
    return {"nftables": commands}


def _shaped(spec: SwitchSpec, ports: Sequence[GuestPort]) -> list[dict[str, Any]]:
    """Lead what ports with a bandwidth limit send through their queues, whose interfaces exist."""
    table = spec.table_name
    commands = _replaced("netdev", table)
    for port in ports:
        if port.is_shaped:
            chain = _chain("netdev", table, port.interface, "filter", "ingress", 0)
            chain["add"]["chain"]["dev"] = port.interface
            queue: Rule = [{"fwd": {"dev": shaper_name(port.interface)}}]
            commands += [chain, *_rules("netdev", table, port.interface, [queue])]
    return commands if len(commands) > 3 else commands[:2]


def _dispatch(way: str, ports: Sequence[GuestPort], chain: str) -> list[Rule]:
    """One look-up, however many ports there are."""
    if not ports:
        return []
    targets = [[port.interface, {"jump": {"target": name(port.interface, chain)}}] for port in ports]
    return [[{"vmap": {"key": _meta(way), "data": {"set": targets}}}]]


def _outward(spec: SwitchSpec, guard: Guard) -> list[dict[str, Any]]:
    """Whether an internal network leads to others: masqueraded, or not at all, whatever else the host forwards."""
    table, bridge = f"{spec.table_name}_out", spec.bridge_name
    commands = [*_replaced("inet", table), _chain("inet", table, "forward", "filter", "forward", -10)]
    # With br_netfilter, frames between two guests also pass here, as if the bridge forwarded them to itself.
    inside: Rule = [_match(_meta("iifname"), bridge), _match(_meta("oifname"), bridge), {"accept": None}]
    commands += _rules("inet", table, "forward", [inside])
    if not spec.nat:
        closed: list[Rule] = [[_match(_meta("iifname"), bridge), *_DROP], [_match(_meta("oifname"), bridge), *_DROP]]
        return commands + _rules("inet", table, "forward", closed)
    network = {"prefix": {"addr": str(spec.network.network_address), "len": spec.network.prefixlen}}
    from_guest, made_up = _match(_meta("iifname"), bridge), _match(_field("ip", "saddr"), network, "!=")
    ipv6 = _match(_meta("nfproto"), "ipv6")  # the network has none
    commands += _rules("inet", table, "forward", [[from_guest, made_up, *_DROP], [from_guest, ipv6, *_DROP]])
    known = _match({"ct": {"key": "state"}}, ["established", "related"], "in")
    inward: Rule = [_match(_meta("oifname"), bridge), _match(_meta("iifname"), bridge, "!=")]
    commands += _rules("inet", table, "forward", [[*inward, known, {"accept": None}], [*inward, *_DROP]])
    if guard.is_needed:
        commands += _rules("inet", table, "forward", [_between_others(guard)])
    commands.append(_chain("inet", table, "outside", "nat", "postrouting", 100))
    leaving: Rule = [_match(_field("ip", "saddr"), network), _match(_meta("oifname"), bridge, "!=")]
    return commands + _rules("inet", table, "outside", [[*leaving, {"masquerade": None}]])


def _between_others(guard: Guard) -> Rule:
    """Keeps the host from routing between its other networks; traffic of other programs' bridges, and our own, is not
    judged.
    """
    matches = [_match(_meta("nfproto"), "ipv4")]
    if guard.forwarded:
        matches.append(_match(_meta("iifname"), {"set": list(guard.forwarded)}, "!="))
    return [*matches, *(_match(_meta(key), "bridge", "!=") for key in ("iifkind", "oifkind")), *_DROP]


def removal(spec: SwitchSpec) -> dict[str, Any]:
    """A document that removes the switch's tables, if they exist."""
    commands = []
    tables = (("netdev", spec.table_name), ("bridge", spec.table_name), ("inet", f"{spec.table_name}_out"))
    for family, table in tables:
        place = {"table": {"family": family, "name": table}}
        commands += [{"add": place}, {"delete": place}]
    return {"nftables": commands}


def load(spec: SwitchSpec, ports: Sequence[GuestPort], *, anew: bool = False) -> None:
    """Make the kernel enforce the rules of these ports. `anew`: replaces the tables and their counters, whatever their
    state.

    Raises Unsupported, VmmError. One caller at a time.
    """
    if not anew:
        present = _present(spec)
        try:
            run(document(spec, ports, present))
            return
        except errors.VmmError:
            if _present(spec) == present:
                raise
    run({"nftables": [*removal(spec)["nftables"], *document(spec, ports)["nftables"]]})


def _present(spec: SwitchSpec) -> list[Kept]:
    """The objects that a document may leave as they are. Other programs may remove them at any time (`nft flush
    ruleset`).
    """
    return [(kind, str(one["name"])) for kind, one in _own(spec) if kind in _KEPT]


def drops(spec: SwitchSpec) -> dict[str, dict[str, int]]:
    """Frames dropped so far: interface -> reason -> how many. Raises Unsupported, VmmError."""
    found: dict[str, dict[str, int]] = {}
    for kind, one in _own(spec):
        if kind == "counter" and one["packets"]:
            interface, _, reason = str(one["name"]).partition(".")
            found.setdefault(interface, {})[reason] = int(one["packets"])
    return found


_KEPT = ("chain", "counter", "limit")


def _own(spec: SwitchSpec) -> list[tuple[str, dict[str, Any]]]:
    return listed("bridge", spec.table_name)


def listed(family: str, table: str) -> list[tuple[str, dict[str, Any]]]:
    """(kind, facts) of everything in a table; nothing if the table does not exist."""
    done = _nft("-j", "list", "table", family, table)
    if done.returncode != 0:
        return []
    return [(kind, facts) for one in json.loads(done.stdout)["nftables"] for kind, facts in one.items()]


def run(rules: dict[str, Any]) -> None:
    """Make the kernel apply a document, completely or not at all. Raises Unsupported, VmmError."""
    done = _nft("-j", "-f", "-", document=json.dumps(rules))
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
        raise errors.VmmError(f"nft refused the switch's rules: {said[0]}")


def _nft(*words: str, document: str = "") -> subprocess.CompletedProcess[bytes]:
    program = shutil.which("nft", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if program is None:
        raise errors.Unsupported("nft is not installed", hint=NFT_HINT)
    try:
        return subprocess.run(
            [program, *words], input=document.encode(), capture_output=True, timeout=NFT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise errors.TimedOut("nft did not answer") from error
