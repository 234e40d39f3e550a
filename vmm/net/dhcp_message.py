# SPDX-License-Identifier: Apache-2.0
"""DHCP messages in Ethernet frames: parsing a client's request, and building the frame that answers it. Pure.

Decides how bytes become a request (`parse`) and how an answer becomes bytes (`reply`). The answer itself is decided in
`dhcp_server`. Must not know leases, ports or clocks. BOOTP relays (giaddr) and option overload (52) are not supported:
a guest's switch has no relay, and requests fit into the options field itself.

Sources: RFC 951, RFC 2131 (section 2, figure 1; section 4.1 for where an answer goes), RFC 2132, RFC 6842 (option 61
in answers).

`INV-DHCP-BOUNDED`: `parse` accepts any bytes, reads only within them, and returns a message or None.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from vmm.net import frames

SERVER_PORT, CLIENT_PORT = 67, 68
MAX_FRAME_BYTES = 1536  # of a request: longer ones are fragments, which no client sends
PORT_AT = 36  # offset of the UDP destination port in an untagged frame whose IP header has no options
MAX_NAME_BYTES = 63
_MAGIC = b"\x63\x82\x53\x63"
_FIXED = struct.Struct(">BBBBIHH4s4s4s4s16s192s4s")  # RFC 2131, figure 1, and the magic cookie
_MIN_BOOTP_BYTES = 300  # RFC 951: some clients drop shorter messages
_IPV4, _UDP = b"\x08\x00", 17
_BROADCAST_FLAG = 0x8000
_EVERYBODY = b"\xff" * 4
_NOBODY = bytes(4)


class MessageType(IntEnum):
    """Option 53."""

    DISCOVER = 1
    OFFER = 2
    REQUEST = 3
    DECLINE = 4
    ACK = 5
    NAK = 6
    RELEASE = 7
    INFORM = 8


class Option(IntEnum):
    """The options that are read or written (RFC 2132)."""

    PAD = 0
    MASK = 1
    ROUTER = 3
    NAME_SERVER = 6
    HOST_NAME = 12
    DOMAIN = 15
    MTU = 26
    BROADCAST = 28
    ADDRESS = 50
    LEASE_SECONDS = 51
    KIND = 53
    SERVER = 54
    WANTED = 55
    RENEWAL_SECONDS = 58
    REBINDING_SECONDS = 59
    CLIENT = 61
    END = 255


@dataclass(frozen=True, slots=True)
class Message:
    """A client's message. Addresses are 4 bytes, all zero if the client gives none; `to` is the destination of the
    packet.
    """

    kind: MessageType
    mac: bytes  # chaddr: the client that the lease is for
    sender: bytes  # of the frame
    to: bytes
    transaction: int = 0
    wants_broadcast: bool = False
    present: bytes = _NOBODY  # ciaddr: the address that the client has and uses
    requested: bytes = _NOBODY
    server: bytes = _NOBODY
    client: bytes = b""
    wanted: frozenset[int] = frozenset()  # empty: the client does not say
    name: str = ""


def parse(frame: bytes) -> Message | None:
    """The message of a DHCP client in a frame, with or without a tag; None for any other frame."""
    at = frames.ADDRESSES_BYTES
    if frames.has_tag(frame):
        at += frames.TAG_BYTES
    if len(frame) > MAX_FRAME_BYTES or frame[at : at + 2] != _IPV4:
        return None
    packet = frame[at + 2 :]
    if len(packet) < 20 or packet[0] >> 4 != 4 or packet[9] != _UDP or int.from_bytes(packet[6:8], "big") & 0x3FFF:
        return None
    datagram = packet[(packet[0] & 0x0F) * 4 : int.from_bytes(packet[2:4], "big")]
    if len(datagram) < 8 or int.from_bytes(datagram[2:4], "big") != SERVER_PORT:
        return None
    return _message(datagram[8 : int.from_bytes(datagram[4:6], "big")], frame[6:12], packet[16:20])


def _message(body: bytes, sender: bytes, to: bytes) -> Message | None:
    if len(body) < _FIXED.size:
        return None
    (operation, hardware, length, _, transaction, _, flags, present, _, _, relay, station, _, magic) = _FIXED.unpack(
        body[: _FIXED.size]
    )
    if (operation, hardware, length, magic, relay) != (1, 1, frames.MAC_BYTES, _MAGIC, _NOBODY):
        return None
    mac = station[: frames.MAC_BYTES]
    options = _options(body[_FIXED.size :])
    try:
        kind = MessageType(int.from_bytes(options.get(Option.KIND, b""), "big"))
    except ValueError:
        return None
    if frames.is_group(mac) or kind in (MessageType.OFFER, MessageType.ACK, MessageType.NAK):
        return None
    return Message(
        kind, mac, sender, to, transaction, bool(flags & _BROADCAST_FLAG), present,
        requested=_address(options.get(Option.ADDRESS, b"")),
        server=_address(options.get(Option.SERVER, b"")),
        client=options.get(Option.CLIENT, b""),
        wanted=frozenset(options.get(Option.WANTED, b"")),
        name=host_name(options.get(Option.HOST_NAME, b"")),
    )  # fmt: skip


def _address(value: bytes) -> bytes:
    return value if len(value) == 4 else _NOBODY


def host_name(value: bytes) -> str:
    """A client's name as a label of DNS; "" if it is not one."""
    text = value.decode("ascii", "replace").partition(".")[0].rstrip("\0").lower()
    fits = 0 < len(text) <= MAX_NAME_BYTES and text[0] != "-"
    return text if fits and all(c in "abcdefghijklmnopqrstuvwxyz0123456789-" for c in text) else ""


def _options(field: bytes) -> dict[int, bytes]:
    """The complete options; the first one if an option occurs twice."""
    found: dict[int, bytes] = {}
    at = 0
    while at < len(field) and field[at] != Option.END:
        if field[at] == Option.PAD:
            at += 1
            continue
        if at + 2 > len(field) or at + 2 + field[at + 1] > len(field):
            break
        found.setdefault(field[at], field[at + 2 : at + 2 + field[at + 1]])
        at += 2 + field[at + 1]
    return found


# -- answers ------------------------------------------------------------------------------------------------------


def reply(
    question: Message,
    kind: MessageType,
    given: bytes,
    options: Iterable[tuple[int, bytes]],
    *,
    server: bytes,
    mac: bytes,
) -> bytes:
    """The answering frame. `given` is the client's address (zero in a NAK); `server` and `mac` are the sender's."""
    fields = [(Option.KIND, bytes([kind])), (Option.SERVER, server), *options]
    if question.client:
        fields.append((Option.CLIENT, question.client))
    flags = _BROADCAST_FLAG if question.wants_broadcast else 0
    present = question.present if kind is MessageType.ACK else _NOBODY
    yours = given if question.kind is not MessageType.INFORM else _NOBODY
    body = _FIXED.pack(
        2, 1, frames.MAC_BYTES, 0, question.transaction, 0, flags, present, yours, _NOBODY, _NOBODY, question.mac, b"",
        _MAGIC,
    )  # fmt: skip
    body += b"".join(bytes([code, len(value)]) + value for code, value in fields) + bytes([Option.END])
    body = body.ljust(_MIN_BOOTP_BYTES, b"\0")
    if kind is MessageType.NAK or (question.wants_broadcast and question.present == _NOBODY):
        to, station = _EVERYBODY, frames.BROADCAST
    elif question.present != _NOBODY:
        to, station = question.present, question.sender
    else:
        to, station = given, question.mac
    return station + mac + _IPV4 + _packet(server, to, body)


def _packet(source: bytes, to: bytes, body: bytes) -> bytes:
    length = 8 + len(body)
    pseudo = source + to + struct.pack(">BBH", 0, _UDP, length)
    head = struct.pack(">HHHH", SERVER_PORT, CLIENT_PORT, length, 0)
    head = head[:6] + (_checksum(pseudo + head + body) or 0xFFFF).to_bytes(2, "big")
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + length, 0, 0, 64, _UDP, 0, source, to)
    return ip[:10] + _checksum(ip).to_bytes(2, "big") + ip[12:] + head + body


def _checksum(content: bytes) -> int:
    """RFC 1071."""
    content += b"\0" * (len(content) % 2)
    total: int = sum(struct.unpack(f">{len(content) // 2}H", content))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF - total


def text(address: bytes) -> str:
    """The address as "10.0.0.1"."""
    return str(ipaddress.IPv4Address(address))
