# SPDX-License-Identifier: Apache-2.0
"""What a DHCP client sends, and how it reads the answers; written independently of the code under test."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

from tests.vmm.net import packets
from vmm.net import frames

DISCOVER, OFFER, REQUEST, DECLINE, ACK, NAK, RELEASE, INFORM = range(1, 9)


def ask(
    mac: bytes, kind: int, *, options: dict[int, bytes] | None = None, present: str = "0.0.0.0", flags: int = 0,
    station: bytes | None = None, destination: bytes = frames.BROADCAST, to: str = "255.255.255.255",
    vlan: int | None = None, relay: str = "0.0.0.0", operation: int = 1,
) -> bytes:  # fmt: skip
    """The frame of a message; `station` is chaddr if it differs from the sender."""
    body = struct.pack(">BBBBIHH", operation, 1, 6, 0, 0x12345678, 0, flags) + socket.inet_aton(present)
    body += bytes(8) + socket.inet_aton(relay) + (station or mac).ljust(16, b"\0") + bytes(192) + b"\x63\x82\x53\x63"
    for code, value in {53: bytes([kind]), **(options or {})}.items():
        body += bytes([code, len(value)]) + value
    datagram = packets.udp(68, 67, body + b"\xff")
    packet = struct.pack(
        ">BBHHHBBH4s4s", 0x45, 0, 20 + len(datagram), 0, 0, 64, 17, 0, socket.inet_aton(present), socket.inet_aton(to)
    )
    packet = packet[:10] + (0xFFFF - _sum(packet)).to_bytes(2, "big") + packet[12:]
    middle = b"" if vlan is None else frames.tag(vlan)
    return destination + mac + middle + b"\x08\x00" + packet + datagram


@dataclass(frozen=True)
class Answer:
    """A server's frame, parsed."""

    destination: bytes
    source: bytes
    to: str
    yours: str
    present: str
    broadcast: bool
    options: dict[int, bytes]

    @property
    def kind(self) -> int:
        """Option 53."""
        return self.options[53][0]

    def address(self, code: int) -> str:
        """An option that holds an address."""
        return socket.inet_ntoa(self.options[code])


def read(frame: bytes) -> Answer:
    """Parse the frame, and check its lengths and checksums."""
    assert frame[12:14] == b"\x08\x00"
    packet = frame[14:]
    assert len(packet) == struct.unpack(">H", packet[2:4])[0]
    assert _sums_up(packet[:20])
    datagram = packet[20:]
    assert struct.unpack(">HHH", datagram[:6]) == (67, 68, len(datagram))
    assert _sums_up(packet[12:20] + struct.pack(">BBH", 0, 17, len(datagram)) + datagram)
    body = datagram[8:]
    assert len(body) >= 300
    assert (body[0], body[1:3], body[236:240]) == (2, b"\x01\x06", b"\x63\x82\x53\x63")
    options, at = {}, 240
    while body[at] != 255:
        options[body[at]] = body[at + 2 : at + 2 + body[at + 1]]
        at += 2 + body[at + 1]
    return Answer(
        frame[:6], frame[6:12], socket.inet_ntoa(packet[16:20]), socket.inet_ntoa(body[16:20]),
        socket.inet_ntoa(body[12:16]), bool(body[10] & 0x80), options,
    )  # fmt: skip


def _sums_up(content: bytes) -> bool:
    return _sum(content) == 0xFFFF


def _sum(content: bytes) -> int:
    content += b"\0" * (len(content) % 2)
    total: int = sum(struct.unpack(f">{len(content) // 2}H", content))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total
