# SPDX-License-Identifier: Apache-2.0
"""The learning switch itself: takes a frame's first bytes, returns where the frame goes. Pure.

Decides which ports receive a frame and in which form (IEEE 802.1Q: learning, ageing, flooding, VLAN classification,
tagging and untagging), and who may send it (address guard, DHCP guard, router guard, storm limit). Must not know
sockets, clocks or buffers: time is an argument, and frames are moved by `user_switch`.

Where a frame goes depends only on its port and its first `frames.KEY_BYTES` bytes, so the mover keeps the answers of
`decide` in `Port.flows` and asks again only for what is missing there: one look-up per frame. Every change here
empties those tables. Decisions that depend on more are marked: `inspect` (a guard must examine the frame), `flooded`
(the storm limit counts it, and no sender waits for its receivers).

`INV-SWITCH-MODEL`: `forward` returns what a naive 802.1Q bridge would, for any sequence of frames.
`INV-VLAN-ISOLATED`: a frame reaches only ports that are members of its VLAN, and a tag within a tag never becomes the
frame's own tag on its way (a guest could send into a VLAN of which it is not a member).
`INV-UNTAGGED-ONLY`: no tag passes through an adapter other than a trunk, in either direction, except a priority tag
(VLAN 0), which is removed.
`INV-NO-REFLECTION`: a frame never returns to the port it came from.
`INV-TABLE-BOUNDED`: at most MAX_ADDRESSES addresses are known, MAX_PORT_ADDRESSES of one port.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from vmm.net import dhcp_message, frames
from vmm.net.dhcp_message import Message
from vmm.net.dhcp_server import DhcpServer
from vmm.net.host_loopback import LoopbackFilter
from vmm.net.limits import Bucket

AGEING_SECONDS = 300.0  # 802.1Q's recommended ageing time
MAX_ADDRESSES = 8192
MAX_PORT_ADDRESSES = 1024  # a guest that may send from any address cannot push out the others'
MAX_PORTS = 256
STORM_BURST_SECONDS = 0.1


class Drop(StrEnum):
    """Why a frame was not forwarded; the names of the counters."""

    MALFORMED = "malformed"
    RESERVED = "reserved"  # a group address that must not leave its link
    VLAN = "vlan"  # its port is not a member of the frame's VLAN
    SPOOFED = "spoofed"
    DHCP = "dhcp-guard"
    DHCP_FLOOD = "dhcp-flood"  # more requests than the switch's own DHCP server answers; they still reach other ports
    ROUTER = "router-guard"
    STORM = "storm"
    LINK_DOWN = "link-down"
    NOWHERE = "nowhere"  # no other port exists, or the destination is on the frame's own port
    FULL = "full"  # the receiving port does not accept its frames
    LOOPBACK = "host-loopback"  # it would have reached this host's loopback through the gateway; other ports got it
    BANDWIDTH = "bandwidth"  # the port exceeded its limit for longer than frames are queued; bridges only


class VlanMode(StrEnum):
    """How a port belongs to VLANs. VLAN 0 stands for "none": the network of all ports without a VLAN."""

    UNTAGGED = "untagged"
    ACCESS = "access"
    TRUNK = "trunk"


@dataclass(frozen=True, slots=True)
class PortRules:
    """What a port may do. `vlan` is the access VLAN, or a trunk's native one (0: untagged frames have no VLAN)."""

    addresses: frozenset[bytes] = frozenset()  # may send from these; empty: not set, so from any
    spoofing: bool = False  # may send from any address
    mode: VlanMode = VlanMode.UNTAGGED
    vlan: int = 0
    allowed: frozenset[int] = frozenset()  # a trunk's tagged VLANs
    dhcp_guard: bool = False
    router_guard: bool = False
    storm_frames_per_second: int = 0  # 0: no limit
    mirror_source: bool = False  # what it sends and receives is copied to every mirror destination
    mirror_destination: bool = False


@dataclass(slots=True)
class Counters:
    """From the guest's point of view: received from it, transmitted to it."""

    received_frames: int = 0
    received_bytes: int = 0
    transmitted_frames: int = 0
    transmitted_bytes: int = 0
    drops: Counter[str] = field(default_factory=Counter)


class Rewrite(NamedTuple):
    """Another form of a frame: both addresses, then `tag`, then the rest of the original from `skip_bytes` on."""

    skip_bytes: int
    tag: bytes


class Output(NamedTuple):
    """One receiver. `change` is None if it gets the frame as it came."""

    port: Port
    change: Rewrite | None


@dataclass(frozen=True, eq=False, slots=True)
class Decision:
    """Where a frame goes. Equal decisions of one engine are the same object until the next change."""

    outputs: tuple[Output, ...]
    drop: Drop | None = None
    inspect: bool = False
    flooded: bool = False
    must_be_last: bool = False  # the frame's tag must not be followed by another one
    asks: bool = False  # it may come from a DHCP client; `Engine.asked` decides


@dataclass(eq=False, slots=True)
class Port:
    """A port of the switch. `flows` belongs to the mover."""

    name: str
    rules: PortRules
    counters: Counters = field(default_factory=Counters)
    link_up: bool = True
    flows: dict[object, Decision] = field(default_factory=dict)
    storm: Bucket | None = None
    address_count: int = 0


@dataclass(slots=True)
class _Known:
    port: Port
    seen: float


class Engine:
    """One switch. Not thread-safe. `now` is any monotonic clock, in seconds."""

    def __init__(self, *, ageing_seconds: float = AGEING_SECONDS) -> None:
        self.ageing_seconds = ageing_seconds
        self.ports: dict[str, Port] = {}
        self.way_out: Port | None = None  # the port of an internal switch's gateway
        self.dhcp: DhcpServer | None = None
        self.loopback: LoopbackFilter | None = None  # for the way out; None: frames may reach the host's loopback
        self._table: dict[tuple[int, bytes], _Known] = {}
        self._decisions: dict[tuple[object, ...], Decision] = {}

    # -- ports --------------------------------------------------------------------------------------------------

    def add_port(self, name: str, rules: PortRules) -> Port:
        """Add a port; its name is free and there are fewer than MAX_PORTS."""
        assert name not in self.ports and len(self.ports) < MAX_PORTS
        port = Port(name, rules)
        self.ports[name] = port
        self.set_rules(name, rules)
        return port

    def set_rules(self, name: str, rules: PortRules) -> None:
        """Change the rules of a port; what was learned on it is forgotten."""
        port = self.ports[name]
        port.rules = rules
        rate = rules.storm_frames_per_second
        port.storm = Bucket(rate, max(1.0, rate * STORM_BURST_SECONDS)) if rate else None
        self._forget(port)

    def set_link(self, name: str, up: bool) -> None:
        """Disconnect the port, or connect it again."""
        self.ports[name].link_up = up
        self._forget(self.ports[name])

    def remove_port(self, name: str) -> None:
        """Remove a port, and what was learned on it."""
        self._forget(self.ports.pop(name))

    def _forget(self, port: Port) -> None:
        self._table = {key: known for key, known in self._table.items() if known.port is not port}
        port.address_count = 0
        self._invalidate()

    def _invalidate(self) -> None:
        self._decisions.clear()
        for port in self.ports.values():
            port.flows.clear()

    # -- addresses ----------------------------------------------------------------------------------------------

    def addresses(self, now: float) -> list[tuple[int, bytes, str, float]]:
        """Every known address, as (VLAN, address, port, seconds since it was last seen at most)."""
        return [
            (vlan, address, known.port.name, now - known.seen)
            for (vlan, address), known in self._table.items()
            if now - known.seen <= self.ageing_seconds
        ]

    def age(self, now: float) -> None:
        """Forget addresses that were not seen for the ageing time.

        All flows are decided again afterwards, which is how an address in use stays known: call this several times per
        ageing time.
        """
        old = [key for key, known in self._table.items() if now - known.seen > self.ageing_seconds]
        for key in old:
            self._table.pop(key).port.address_count -= 1
        self._invalidate()

    def _learn(self, port: Port, vlan: int, address: bytes, now: float) -> None:
        known = self._table.get((vlan, address))
        if known is not None and known.port is port:
            if now - known.seen > self.ageing_seconds:
                self._invalidate()  # it was unknown for a while
            known.seen = now
            return
        if known is None and len(self._table) >= MAX_ADDRESSES:
            return
        if port.address_count >= MAX_PORT_ADDRESSES:
            return
        if known is not None:
            known.port.address_count -= 1
        self._table[vlan, address] = _Known(port, now)
        port.address_count += 1
        self._invalidate()

    # -- frames -------------------------------------------------------------------------------------------------

    def decide(self, port: Port, header: bytes, now: float) -> Decision:
        """Where a well-formed frame that begins with `header` goes; its sender is learned.

        `header` has at least frames.KEY_BYTES bytes, or is the whole frame.
        """
        if not port.link_up:
            return self._decision((), Drop.LINK_DOWN)
        rules = port.rules
        destination, source = header[:6], header[6:12]
        if rules.addresses and not rules.spoofing and source not in rules.addresses:
            return self._decision((), Drop.SPOOFED)
        if frames.is_reserved(destination):
            return self._decision((), Drop.RESERVED)
        tagged = frames.has_tag(header)
        priority, vlan = frames.tag_of(header) if tagged else (0, 0)
        is_foreign = frames.has_foreign_tag(header)
        vlan_of_frame = _classify(rules, vlan)
        if vlan_of_frame is None or (is_foreign and rules.mode is not VlanMode.TRUNK):
            return self._decision((), Drop.VLAN)
        self._learn(port, vlan_of_frame, source, now)
        known = None if frames.is_group(destination) else self._table.get((vlan_of_frame, destination))
        if known is not None and now - known.seen > self.ageing_seconds:
            known = None
        receivers = [known.port] if known is not None else list(self.ports.values())
        outputs = []
        for other in receivers:
            form = _form(other.rules, vlan_of_frame)
            takes = not is_foreign or other.rules.mode is VlanMode.TRUNK
            if other is not port and other.link_up and form is not None and takes:
                outputs.append(Output(other, _change(tagged, vlan, priority, vlan_of_frame, form)))
        outputs += self._mirrored(port, outputs)
        if not outputs:
            return self._decision((), Drop.NOWHERE)
        untags = any(change is not None and not change.tag for _, change in outputs)
        must_be_last = tagged and (untags or rules.mode is not VlanMode.TRUNK)
        # The gateway's frames to one guest belong to connections, and there are many of them.
        guarded = rules.dhcp_guard and (port is not self.way_out or frames.is_group(destination))
        inspect = guarded or rules.router_guard or must_be_last
        asks = (
            self.dhcp is not None
            and vlan_of_frame == 0
            and port is not self.way_out
            and destination in (frames.BROADCAST, self.dhcp.mac)
        )
        flooded = known is None
        return self._decision(tuple(outputs), None, inspect, flooded, must_be_last, asks)

    def _mirrored(self, port: Port, outputs: list[Output]) -> list[Output]:
        """Copies of the frame, as it came, for the mirror destinations that do not get it anyway."""
        receivers = {output.port for output in outputs}
        if not (port.rules.mirror_source or any(one.rules.mirror_source for one in receivers)):
            return []
        return [
            Output(one, None)
            for one in self.ports.values()
            if one.rules.mirror_destination and one.link_up and one is not port and one not in receivers
        ]

    def _decision(
        self,
        outputs: tuple[Output, ...],
        drop: Drop | None,
        inspect: bool = False,
        flooded: bool = False,
        must_be_last: bool = False,
        asks: bool = False,
    ) -> Decision:
        key = (outputs, drop, inspect, flooded, must_be_last, asks)
        decision = self._decisions.get(key)
        if decision is None:
            decision = self._decisions[key] = Decision(outputs, drop, inspect, flooded, must_be_last, asks)
        return decision

    def set_dhcp(self, server: DhcpServer | None, way_out: str | None) -> None:
        """Set the server that answers DHCP clients without a VLAN, and the gateway's port, which gets none of their
        messages.
        """
        self.dhcp = server
        self.way_out = None if way_out is None else self.ports[way_out]
        self._invalidate()

    def asked(self, frame: bytes) -> Message | None:
        """The request to the switch's DHCP server in a frame whose decision has `asks` set; None if it has none.

        Such a frame still reaches all its receivers except the gateway. `dhcp` makes the answer.
        """
        message = dhcp_message.parse(frame)
        return message if message is not None and self.dhcp is not None and self.dhcp.is_for_us(message) else None

    def refuses(self, port: Port, decision: Decision, beginning: bytes) -> Drop | None:
        """Why a frame whose decision has `inspect` set is dropped, by the port's guards or otherwise; None if it is
        not.
        """
        if decision.must_be_last and frames.has_two_tags(beginning):
            return Drop.VLAN
        if port.rules.dhcp_guard and frames.is_dhcp_server(beginning):
            return Drop.DHCP
        if port.rules.router_guard and frames.is_router(beginning):
            return Drop.ROUTER
        return None

    def leads_to_loopback(self, other: Port, beginning: bytes) -> bool:
        """True for a frame that the port `other` must not get, because it would reach the host's loopback there."""
        return other is self.way_out and self.loopback is not None and self.loopback.refuses(beginning)

    def forward(self, name: str, frame: bytes, now: float) -> list[tuple[str, bytes]]:
        """Process one frame completely: the receivers with what they get. Counts, learns, drops."""
        port = self.ports[name]
        port.counters.received_frames += 1
        port.counters.received_bytes += len(frame)
        drop = self._judge(port, frame, now)
        if isinstance(drop, Drop):
            port.counters.drops[drop] += 1
            return []
        result = []
        asked = drop.asks and self.asked(frame) is not None
        for other, change in drop.outputs:
            if asked and other is self.way_out:
                continue
            if self.leads_to_loopback(other, frame[: frames.INSPECT_BYTES]):
                port.counters.drops[Drop.LOOPBACK] += 1
                continue
            out = frame if change is None else changed(frame, change)
            other.counters.transmitted_frames += 1
            other.counters.transmitted_bytes += len(out)
            result.append((other.name, out))
        return result

    def _judge(self, port: Port, frame: bytes, now: float) -> Drop | Decision:
        if frames.is_malformed(frame[: frames.KEY_BYTES], len(frame)):
            return Drop.MALFORMED
        decision = self.decide(port, frame[: frames.KEY_BYTES], now)
        if decision.drop is not None:
            return decision.drop
        if decision.inspect and (drop := self.refuses(port, decision, frame[: frames.INSPECT_BYTES])) is not None:
            return drop
        if decision.flooded and port.storm is not None and not port.storm.take(1, now):
            return Drop.STORM
        return decision


def changed(frame: bytes, change: Rewrite) -> bytes:
    """The frame in its changed form."""
    return frame[: frames.ADDRESSES_BYTES] + change.tag + frame[change.skip_bytes :]


def _classify(rules: PortRules, vlan: int) -> int | None:
    """The VLAN of a frame with the tag `vlan` (0: none); None if the port may not send it."""
    if vlan == 0:
        return rules.vlan
    if rules.mode is VlanMode.TRUNK and vlan in rules.allowed:
        return vlan
    return None


def _form(rules: PortRules, vlan: int) -> bool | None:
    """How the port gets frames of the VLAN: tagged, untagged, or (None) not at all."""
    if vlan == rules.vlan:
        return False
    return True if rules.mode is VlanMode.TRUNK and vlan in rules.allowed else None


def _change(has_tag: bool, said: int, priority: int, vlan: int, tagged: bool) -> Rewrite | None:
    if not tagged:
        return Rewrite(frames.ADDRESSES_BYTES + frames.TAG_BYTES, b"") if has_tag else None
    if not has_tag:
        return Rewrite(frames.ADDRESSES_BYTES, frames.tag(vlan))
    if said == vlan:
        return None
    return Rewrite(frames.ADDRESSES_BYTES + frames.TAG_BYTES, frames.tag(vlan, priority))
