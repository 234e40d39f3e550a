# SPDX-License-Identifier: Apache-2.0
"""Frames that tests send: Ethernet with and without tags, UDP in IPv4 and IPv6, ICMPv6."""

from __future__ import annotations

import struct

from vmm.net import frames


def mac(number: int) -> bytes:
    """A station's address."""
    return b"\x02\x00\x00\x00" + number.to_bytes(2, "big")


def ethernet(
    destination: bytes, source: bytes, payload: bytes = b"payload", *, vlan: int | None = None, kind: int = 0x88B5
) -> bytes:
    """A frame; it is tagged if `vlan` is given (0 makes a priority tag)."""
    middle = b"" if vlan is None else frames.tag(vlan)
    return destination + source + middle + kind.to_bytes(2, "big") + payload


def ipv4(protocol: int, payload: bytes, *, fragment: int = 0, options: bytes = b"") -> bytes:
    """A packet from 10.0.0.1 to 10.0.0.2; `fragment` is the offset in 8 bytes."""
    head = (5 + len(options) // 4) | 0x40
    fields = (
        head,
        0,
        20 + len(options) + len(payload),
        1,
        fragment,
        64,
        protocol,
        0,
        b"\x0a\0\0\x01",
        b"\x0a\0\0\x02",
    )
    header: bytes = struct.pack(">BBHHHBBH4s4s", *fields) + options
    total: int = sum(struct.unpack(f">{len(header) // 2}H", header))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return header[:10] + (0xFFFF - total).to_bytes(2, "big") + header[12:] + payload


def ipv6(following: int, payload: bytes) -> bytes:
    """A packet between two link-local addresses."""
    one, other = (b"\xfe\x80" + bytes(13) + bytes([last]) for last in (1, 2))
    return struct.pack(">IHBB", 0x60000000, len(payload), following, 255) + one + other + payload


def udp(source_port: int, destination_port: int, payload: bytes = b"") -> bytes:
    """A datagram without checksum."""
    return struct.pack(">HHHH", source_port, destination_port, 8 + len(payload), 0) + payload


def dhcp_offer(source: bytes) -> bytes:
    """What a DHCP server broadcasts."""
    return ethernet(frames.BROADCAST, source, ipv4(17, udp(67, 68, b"\x02" + bytes(240))), kind=0x0800)


def router_advertisement(source: bytes, extensions: bytes = b"", following: int = 58) -> bytes:
    """An ICMPv6 router advertisement, behind extension headers if given."""
    payload = extensions + struct.pack(">BBH", 134, 0, 0) + bytes(12)
    return ethernet(b"\x33\x33\0\0\0\x01", source, ipv6(following, payload), kind=0x86DD)
