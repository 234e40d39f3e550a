# SPDX-License-Identifier: Apache-2.0
"""The fields of an Ethernet frame, and the frames that the guards look for. Pure.

Decides how addresses and VLAN tags are encoded (IEEE 802.3, 802.1Q), how short and how long a frame may be, which
group addresses no bridge forwards (802.1Q table 8-1), and what messages of a DHCP server and of a router look like
(RFC 2131, 8415, 4861, 1256). Must not know ports, VLAN membership or policies.

    0        6        12         14          18
    | dst    | src    | type     | payload           untagged
    | dst    | src    | 0x8100   | TCI | type | ...  tagged; TCI = priority 3 bits, DEI 1, VLAN 12

`INV-FRAME-BOUNDED`: every function accepts any bytes, reads only within them, and follows at most
MAX_EXTENSION_HEADERS.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MAC_BYTES = 6
HEADER_BYTES = 14
TAG_BYTES = 4
ADDRESSES_BYTES = 12  # both addresses; a tag follows them
KEY_BYTES = 16  # everything that a frame's way depends on, unless a guard examines more: addresses, type, TCI
MAX_MTU_BYTES = 9216  # jumbo frames, as in other switches
MAX_FRAME_BYTES = MAX_MTU_BYTES + HEADER_BYTES + TAG_BYTES
INSPECT_BYTES = 256  # of a frame, for a guard
MAX_EXTENSION_HEADERS = 8  # a longer chain counts as an attempt to hide what follows
MAX_WRAPPERS = 8  # tags and SNAP headers; the same applies to them
MAX_VLAN = 4094
TPID = b"\x81\x00"
_FOREIGN_TPIDS = (b"\x88\xa8", b"\x91\x00")  # 802.1ad's tag and its predecessor: not tags of this switch
_TPIDS = (TPID, *_FOREIGN_TPIDS)
_SNAP = (b"\xaa\xaa\x03\x00\x00\x00", b"\xaa\xaa\x03\x00\x00\xf8")  # RFC 1042, 802.1H
_MIN_TYPE = 0x0600  # a smaller value is a length
BROADCAST = b"\xff" * MAC_BYTES
_RESERVED_PREFIX = b"\x01\x80\xc2\x00\x00"
_MAC = re.compile(r"[0-9a-f]{2}([:-]?)(?:[0-9a-f]{2}\1){4}[0-9a-f]{2}", re.IGNORECASE)
_IPV4, _IPV6 = b"\x08\x00", b"\x86\xdd"
_ICMP, _UDP, _ICMPV6 = 1, 17, 58
_DHCP_SERVER_PORTS, _DHCP_CLIENT_PORTS = (67, 547), (68, 546)  # of version 4, of version 6
_BOOTP_REPLY = 2
_DHCPV6_SERVER_TYPES = (2, 7, 10, 13)  # advertise, reply, reconfigure, relay-reply
_UDP_HEADER_BYTES = 8
_ROUTER_ICMP = (5, 9)  # redirect, router advertisement
_ROUTER_ICMPV6 = (134, 137)  # router advertisement, redirect
_FRAGMENT = 44
_WITHIN_HEADERS = 1  # offset in units of 8 bytes of a fragment that would replace headers of the first one (RFC 1858)
_EXTENSIONS = (0, 43, 60, 135, 139, 140)  # headers of the form: next, length in 8 bytes minus one
_AUTHENTICATION = 51  # its length is in 4 bytes minus two


def parse_mac(text: str) -> bytes:
    """The address in "00:15:5d:00:00:0a", "00-15-5D-00-00-0A" or "00155d00000a". Raises ValueError."""
    if not _MAC.fullmatch(text):
        raise ValueError(f"{text!r} is not a MAC address (six pairs of hexadecimal digits, as in 00:15:5d:01:02:03)")
    return bytes.fromhex(text.replace(":", "").replace("-", ""))


def format_mac(address: bytes) -> str:
    """The address as "00:15:5d:00:00:0a"."""
    return address.hex(":")


def is_group(address: bytes) -> bool:
    """True for broadcast and multicast addresses."""
    return bool(address[0] & 1)


def is_reserved(address: bytes) -> bool:
    """True for the group addresses that must not leave their link (spanning tree, pause, LLDP): no bridge forwards
    them.
    """
    return address[:5] == _RESERVED_PREFIX and address[5] <= 0x0F


def has_tag(header: bytes) -> bool:
    """True if the frame has an 802.1Q tag."""
    return header[12:14] == TPID


def has_foreign_tag(header: bytes) -> bool:
    """True if the frame begins with a tag that this switch does not use, such as a provider's (802.1ad)."""
    return header[12:14] in _FOREIGN_TPIDS


def has_two_tags(beginning: bytes) -> bool:
    """True if another tag would come first once the frame's own is removed."""
    return has_tag(beginning) and beginning[16:18] in _TPIDS


def tag_of(header: bytes) -> tuple[int, int]:
    """(priority and DEI as 4 bits, VLAN) of a tagged frame."""
    value = int.from_bytes(header[14:16], "big")
    return value >> 12, value & 0xFFF


def tag(vlan: int, priority: int = 0) -> bytes:
    """The four bytes of a tag; `priority` are the upper 4 bits of the TCI."""
    return TPID + (priority << 12 | vlan).to_bytes(2, "big")


def is_malformed(header: bytes, size_bytes: int) -> bool:
    """True for anything but a complete Ethernet frame: too short, too long, or from a group address."""
    if size_bytes < HEADER_BYTES or size_bytes > MAX_FRAME_BYTES:
        return True
    if is_group(header[6:12]):
        return True
    return has_tag(header) and size_bytes < HEADER_BYTES + TAG_BYTES


def is_dhcp_server(frame: bytes) -> bool:
    """True for messages of a DHCP server, version 4 or 6, and for frames that hide whether they are one (RFC 7610).

    A server may answer from any port (RFC 2131 specifies only the destination), so messages to clients are judged by
    their destination; those to relays, where servers and clients send to the same port, by the kind of message.
    """
    found = _transport(frame)
    if found is None:
        return True
    if found.protocol != _UDP:
        return False
    source, destination = (int.from_bytes(found.payload[at : at + 2], "big") for at in (0, 2))
    if source in _DHCP_SERVER_PORTS or destination in _DHCP_CLIENT_PORTS:
        return True
    if destination not in _DHCP_SERVER_PORTS:
        return len(found.payload) < 4 and found.is_cut
    if found.is_first_of_several:
        return True
    kind = found.payload[_UDP_HEADER_BYTES : _UDP_HEADER_BYTES + 1]
    answers = (_BOOTP_REPLY,) if destination == _DHCP_SERVER_PORTS[0] else _DHCPV6_SERVER_TYPES
    return kind[0] in answers if kind else found.is_cut


def is_router(frame: bytes) -> bool:
    """True for router advertisements and redirects, and for frames that hide whether they are one (RFC 7113)."""
    found = _transport(frame)
    if found is None:
        return True
    kinds = {_ICMP: _ROUTER_ICMP, _ICMPV6: _ROUTER_ICMPV6}.get(found.protocol, ())
    return bool(found.payload) and found.payload[0] in kinds


class _Transport(NamedTuple):
    """What follows the IP headers. `protocol` is -1 for anything but IP, and for later fragments."""

    protocol: int
    payload: bytes
    is_first_of_several: bool = False
    is_cut: bool = False  # the frame continues after the part that is shown


_NOTHING = _Transport(-1, b"")


def _transport(frame: bytes) -> _Transport | None:
    """What an IP packet carries; None if its headers hide that."""
    found = _unwrapped(frame)
    if found is None:
        return None
    kind, packet = found
    is_cut = len(frame) >= INSPECT_BYTES
    if kind == _IPV4 and len(packet) >= 20:
        fragment = int.from_bytes(packet[6:8], "big")
        if offset := fragment & 0x1FFF:
            return None if offset == _WITHIN_HEADERS else _NOTHING
        return _Transport(packet[9], packet[(packet[0] & 0x0F) * 4 :], bool(fragment & 0x2000), is_cut)
    if kind == _IPV6 and len(packet) >= 40:
        return _behind_extensions(packet, is_cut)
    return _NOTHING


def _unwrapped(frame: bytes) -> tuple[bytes, bytes] | None:
    """(type, packet) after all tags and SNAP headers, which receivers remove too (CVE-2021-27853, -27854, -27862).

    None if there are too many of them.
    """
    at = ADDRESSES_BYTES
    for _ in range(MAX_WRAPPERS + 1):
        kind = frame[at : at + 2]
        if kind in _TPIDS:
            at += TAG_BYTES
        elif int.from_bytes(kind, "big") < _MIN_TYPE and frame[at + 2 : at + 8] in _SNAP:
            at += 8
        else:
            return kind, frame[at + 2 :]
    return None


def _behind_extensions(packet: bytes, is_cut: bool) -> _Transport | None:
    following, at, is_first = packet[6], 40, False
    for _ in range(MAX_EXTENSION_HEADERS + 1):
        if following not in (*_EXTENSIONS, _FRAGMENT, _AUTHENTICATION):
            is_told = at + 2 <= len(packet) or following not in (_UDP, _ICMPV6)  # what it is stands in its first bytes
            return _Transport(following, packet[at:], is_first, is_cut) if is_told else None
        if at + 8 > len(packet):
            return None
        if following == _FRAGMENT:
            fragment = int.from_bytes(packet[at + 2 : at + 4], "big")
            if offset := fragment >> 3:
                return None if offset == _WITHIN_HEADERS else _NOTHING  # the first fragment was judged
            is_first = bool(fragment & 1)
        length = 8
        if following == _AUTHENTICATION:
            length = (packet[at + 1] + 2) * 4
        elif following != _FRAGMENT:
            length = (packet[at + 1] + 1) * 8
        following, at = packet[at], at + length
    return None
