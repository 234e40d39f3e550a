# SPDX-License-Identifier: Apache-2.0
"""The DHCP server of a `user` switch: takes a client's frame and the time, returns the answering frame. No I/O.

Decides which client gets which address, and for how long. A client is identified by its MAC address. It gets, in this
order: its fixed address; the one that it had last; the one that it asks for; one derived from its MAC address. So a
lost table leads to nearly the same addresses, and a kept one to exactly the same: the caller saves `records` before it
sends an answer that depends on them (`unsaved`).

    DISCOVER   OFFER
    REQUEST    ACK for what the client may have; NAK for what it may not; no answer if it chose another server
    INFORM     ACK without an address
    DECLINE    that address is not given out for a while; RELEASE: it is free, but remembered for its last holder

No other server on the network knows better, so an unknown client gets a NAK and is not left waiting (RFC 2131, 4.3.2
permits this for a server that knows the network).

`INV-DHCP-ONE-HOLDER`: no two clients have a lease of one address at the same time, whatever they send, even if the
server is restarted from its saved records.
`INV-DHCP-RANGE`: an assigned address is a fixed address of that client or lies in the range; it is never the address
of the network, the broadcast, the gateway or the name server.
`INV-DHCP-TABLE-BOUNDED`: at most MAX_RECORDS clients are known, plus those with fixed addresses, and at most
MAX_PORT_LEASES of one port.

Sources: RFC 2131 (section 4.3 and table 4), RFC 2132.
"""

from __future__ import annotations

import ipaddress
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vmm.model import errors
from vmm.net import dhcp_message, frames
from vmm.net.dhcp_message import Message, MessageType, Option
from vmm.net.limits import Bucket

LEASE_SECONDS = 3600
OFFER_SECONDS = 60
DECLINED_SECONDS = 600
MAX_RECORDS = 4096
MAX_PORT_LEASES = 64  # of a port that may send from any address; other ports have as many as they have addresses
MAX_DECLINED = 16
MAX_FIXED = 1024
MESSAGES_PER_SECOND, MESSAGES_BURST = 20, 40  # of one port
MAX_BUCKETS = 1024
SAVE_AGAIN = 8  # a lease extended by less than this fraction is not worth another write
_NOBODY = bytes(4)
_EVERYBODY = b"\xff" * 4


@dataclass(frozen=True, slots=True)
class DhcpSetup:
    """The network, and what clients are given. `first` and `last` are the range; `fixed` are (MAC, address, name)."""

    network: str
    server: str  # our address, and the router's
    first: str
    last: str
    name_server: str = ""
    domain: str = ""
    mtu_bytes: int = 0  # 0: not sent
    lease_seconds: int = LEASE_SECONDS
    fixed: tuple[tuple[str, str, str], ...] = ()

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> DhcpSetup:
        """Parse JSON. Raises InvalidSpec."""
        try:
            fixed = tuple((str(mac), str(address), str(name)) for mac, address, name in document.get("fixed", ()))
            setup = cls(**{**document, "fixed": fixed})
            Rules(setup)
            if len(fixed) > MAX_FIXED or not 60 <= setup.lease_seconds < 1 << 31 or not 0 <= setup.mtu_bytes < 1 << 16:
                raise ValueError("a lease must last at least a minute, and an MTU must fit into 16 bits")
        except (TypeError, ValueError, AttributeError) as error:
            raise errors.InvalidSpec(f"these are not settings of a DHCP server: {error}") from error
        return setup

    def to_document(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "fixed": [list(one) for one in self.fixed]}


class Rules:
    """A setup as numbers. Raises ValueError for an impossible one."""

    def __init__(self, setup: DhcpSetup) -> None:
        network = ipaddress.IPv4Network(setup.network)
        self.mask = network.netmask.packed
        self.broadcast = network.broadcast_address.packed
        self.server = ipaddress.IPv4Address(setup.server).packed
        self.name_server = ipaddress.IPv4Address(setup.name_server).packed if setup.name_server else self.server
        self.domain = setup.domain.encode("ascii")
        if len(self.domain) > 255:
            raise ValueError("the domain is too long")
        self.lowest, self.highest = (int(ipaddress.IPv4Address(one)) for one in (setup.first, setup.last))
        if self.lowest > self.highest:
            raise ValueError(f"the range from {setup.first} to {setup.last} is empty or not in the network")
        ours = (network.network_address.packed, self.broadcast, self.server, self.name_server)
        self.reserved = frozenset(int.from_bytes(one, "big") for one in ours)
        self.fixed: dict[bytes, tuple[int, str]] = {}
        for mac, address, name in setup.fixed:
            self.fixed[frames.parse_mac(mac)] = int(ipaddress.IPv4Address(address)), name
        self.fixed_addresses = frozenset(address for address, _ in self.fixed.values())


@dataclass(slots=True)
class ClientRecord:
    """What is known about one client. `held_until` is `expires`, or later while an offer to it is open."""

    address: int
    expires: float = 0.0  # of its last lease, in seconds since 1970
    held_until: float = 0.0
    name: str = ""
    port: str = ""
    saved: float = 0.0  # the `expires` that was saved last


class DhcpServer:
    """One network's server. `now` is the time in seconds since 1970."""

    def __init__(self, setup: DhcpSetup, records: Iterable[tuple[bytes, ClientRecord]] = ()) -> None:
        self.records: dict[bytes, ClientRecord] = {}
        self.unsaved: set[bytes] = set()
        self._holders: dict[int, bytes] = {}
        self._declined: dict[int, float] = {}
        self._buckets: dict[str, Bucket] = {}
        self.change(setup)
        for mac, record in records:
            if len(self.records) < MAX_RECORDS and record.address not in self._holders:
                self.records[mac] = record
                self._holders[record.address] = mac

    def change(self, setup: DhcpSetup) -> None:
        """Change the range or the fixed addresses; leases stay as they are until clients ask again."""
        self.setup = setup
        self.rules = Rules(setup)
        # The gateway's Ethernet address, which its user-mode network uses for every address of its own.
        self.mac = b"\x52\x55" + self.rules.server

    def leases(self) -> Iterator[tuple[bytes, ClientRecord]]:
        """Every client that ever got an address, however long ago."""
        return ((mac, record) for mac, record in self.records.items() if record.expires)

    def was_saved(self) -> None:
        """Note that the records were saved as they are now."""
        for mac in self.unsaved:
            if mac in self.records:
                self.records[mac].saved = self.records[mac].expires
        self.unsaved.clear()

    # -- requests ----------------------------------------------------------------------------------------------

    def is_for_us(self, message: Message) -> bool:
        """True for messages that are broadcast or sent to the server's address."""
        return message.to in (_EVERYBODY, self.rules.server, self.rules.broadcast)

    def takes(self, port: str, now: float) -> bool:
        """True unless the port asks too often."""
        bucket = self._buckets.get(port)
        if bucket is None:
            if len(self._buckets) >= MAX_BUCKETS:  # including ports that are gone
                self._buckets.clear()
            bucket = self._buckets[port] = Bucket(MESSAGES_PER_SECOND, MESSAGES_BURST)
        return bucket.take(1, now) == 1

    def answer(self, message: Message, now: float, *, port: str = "", own: frozenset[bytes] = frozenset()) -> bytes:
        """The frame that answers a message from `port`; empty if none is due.

        `own`: the addresses that the port may speak for; empty: any.
        """
        if own and message.mac not in own:
            return b""
        match message.kind:
            case MessageType.DISCOVER:
                return self._discover(message, now, port)
            case MessageType.REQUEST:
                return self._request(message, now, port)
            case MessageType.INFORM:
                return self._reply(message, MessageType.ACK, message.present) if message.present != _NOBODY else b""
            case MessageType.DECLINE:
                self._decline(message, now)
            case MessageType.RELEASE:
                self._release(message, now)
        return b""

    def _discover(self, message: Message, now: float, port: str) -> bytes:
        address = self._choose(message, now, port)
        if address is None:
            return b""
        record = self._record(message.mac, address)
        record.held_until = max(record.held_until, now + OFFER_SECONDS)
        record.port = port
        return self._reply(message, MessageType.OFFER, address.to_bytes(4, "big"))

    def _request(self, message: Message, now: float, port: str) -> bytes:
        if message.server not in (_NOBODY, self.rules.server):  # it chose another server
            record = self.records.get(message.mac)
            if record is not None:
                record.held_until = min(record.held_until, max(now, record.expires))
            return b""
        wanted = message.requested if message.requested != _NOBODY else message.present
        address = int.from_bytes(wanted, "big")
        if wanted == _NOBODY or not self._may_have(message.mac, address, now) or self._is_too_much(message, now, port):
            return self._reply(message, MessageType.NAK, _NOBODY)
        record = self._record(message.mac, address)
        record.port = port
        record.name = message.name or record.name
        record.expires = record.held_until = now + self.setup.lease_seconds
        if record.expires - record.saved >= self.setup.lease_seconds / SAVE_AGAIN:
            self.unsaved.add(message.mac)
        return self._reply(message, MessageType.ACK, wanted)

    def _decline(self, message: Message, now: float) -> None:
        """A host without a lease uses the address, as the client found: do not give it out for a while."""
        address = int.from_bytes(message.requested, "big")
        record = self.records.get(message.mac)
        if record is None or record.address != address or message.mac in self.rules.fixed:
            return
        if record.expires:
            self.unsaved.add(message.mac)
        self._forget(message.mac)
        if len(self._declined) >= MAX_DECLINED:
            del self._declined[min(self._declined, key=lambda one: self._declined[one])]
        self._declined[address] = now + DECLINED_SECONDS

    def _release(self, message: Message, now: float) -> None:
        record = self.records.get(message.mac)
        if record is not None and record.address == int.from_bytes(message.present, "big"):
            record.held_until = now
            if record.expires > now:
                record.expires = record.saved = now
                self.unsaved.add(message.mac)

    # -- addresses ----------------------------------------------------------------------------------------------

    def _may_have(self, mac: bytes, address: int, now: float) -> bool:
        fixed = self.rules.fixed.get(mac)
        if fixed is not None:
            return fixed[0] == address and not self._is_held(mac, address, now)
        rules = self.rules
        if not rules.lowest <= address <= rules.highest or address in rules.reserved:
            return False
        if address in rules.fixed_addresses or self._declined.get(address, 0.0) > now:
            return False
        return not self._is_held(mac, address, now)

    def _is_held(self, mac: bytes, address: int, now: float) -> bool:
        """True while another client has the address, or was offered it."""
        holder = self._holders.get(address)
        return holder is not None and holder != mac and self.records[holder].held_until > now

    def _choose(self, message: Message, now: float, port: str) -> int | None:
        """The address to offer; None if none is available."""
        mac = message.mac
        fixed = self.rules.fixed.get(mac)
        if fixed is not None:
            return fixed[0] if self._may_have(mac, fixed[0], now) else None
        if self._is_too_much(message, now, port):
            return None
        record = self.records.get(mac)
        if record is not None and self._may_have(mac, record.address, now):
            return record.address
        if message.requested != _NOBODY and self._may_have(mac, int.from_bytes(message.requested, "big"), now):
            return int.from_bytes(message.requested, "big")
        return self._free(mac, now)

    def _free(self, mac: bytes, now: float) -> int | None:
        """The first address, counted from the one that the MAC address leads to, that no client ever had; otherwise
        the one that has been free the longest.
        """
        rules = self.rules
        count = rules.highest - rules.lowest + 1
        taken = len(self._holders) + len(self._declined) + len(rules.fixed_addresses) + len(rules.reserved)
        start = zlib.crc32(mac) % count
        for step in range(min(count, taken + 1)):
            address = rules.lowest + (start + step) % count
            if address not in self._holders and self._may_have(mac, address, now):
                return address
        free = [one for one in self._holders if self._may_have(mac, one, now)]
        return min(free, key=lambda one: self.records[self._holders[one]].held_until, default=None)

    def _is_too_much(self, message: Message, now: float, port: str) -> bool:
        """True if another client would exceed the limit of this port or of the table."""
        if message.mac in self.rules.fixed:
            return False
        if message.mac not in self.records and len(self.records) >= MAX_RECORDS:
            oldest = min(self.records, key=lambda one: self.records[one].held_until)
            if self.records[oldest].held_until > now:
                return True
        if not port:
            return False
        others = [mac for mac, one in self.records.items() if one.port == port and one.held_until > now]
        return len(others) >= MAX_PORT_LEASES and message.mac not in others

    def _record(self, mac: bytes, address: int) -> ClientRecord:
        """The client's record, with this address, which it may have."""
        record = self.records.get(mac)
        if record is not None and record.address == address:
            return record
        if record is not None:
            self._forget(mac)
        if (holder := self._holders.get(address)) is not None:
            self._forget(holder)
        if len(self.records) >= MAX_RECORDS and mac not in self.rules.fixed:
            # Its address is no longer held: `_is_too_much` has checked that.
            self._forget(min(self.records, key=lambda one: self.records[one].held_until))
        self.records[mac] = ClientRecord(address)
        self._holders[address] = mac
        return self.records[mac]

    def _forget(self, mac: bytes) -> None:
        del self._holders[self.records.pop(mac).address]

    # -- answers ------------------------------------------------------------------------------------------------

    def _reply(self, message: Message, kind: MessageType, given: bytes) -> bytes:
        options = [] if kind is MessageType.NAK else list(self._options(message))
        return dhcp_message.reply(message, kind, given, options, server=self.rules.server, mac=self.mac)

    def _options(self, message: Message) -> Iterator[tuple[int, bytes]]:
        rules, lease = self.rules, self.setup.lease_seconds
        if message.kind is not MessageType.INFORM:
            yield Option.LEASE_SECONDS, lease.to_bytes(4, "big")
            yield Option.RENEWAL_SECONDS, (lease // 2).to_bytes(4, "big")
            yield Option.REBINDING_SECONDS, (lease * 7 // 8).to_bytes(4, "big")
        _, name = rules.fixed.get(message.mac, (0, ""))
        known = [
            (Option.MASK, rules.mask),
            (Option.BROADCAST, rules.broadcast),
            (Option.ROUTER, rules.server),
            (Option.NAME_SERVER, rules.name_server),
            (Option.DOMAIN, rules.domain),
            (Option.HOST_NAME, name.encode("ascii", "ignore")),
            (Option.MTU, self.setup.mtu_bytes.to_bytes(2, "big") if self.setup.mtu_bytes else b""),
        ]
        for code, value in known:
            if value and (not message.wanted or code in message.wanted):
                yield code, value
