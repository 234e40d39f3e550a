# SPDX-License-Identifier: Apache-2.0
"""Addresses, tags, and what the guards recognise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vmm.net import packets
from vmm.net import frames

ADDRESS = bytes.fromhex("00155d01020a")
SNAP = frames._SNAP[0]


def wrapped(frame: bytes, *wrappers: bytes) -> bytes:
    """The frame with these headers between its addresses and its type."""
    return frame[:12] + b"".join(wrappers) + frame[12:]


@pytest.mark.parametrize("text", ["00:15:5d:01:02:0a", "00-15-5D-01-02-0A", "00155d01020a"])
def test_addresses_are_read_in_all_spellings(text: str) -> None:
    """Colons, dashes or nothing between the digits, in upper or lower case."""
    assert frames.parse_mac(text) == ADDRESS
    assert frames.format_mac(ADDRESS) == "00:15:5d:01:02:0a"


@pytest.mark.parametrize("text", ["", "00:15:5d:01:02", "00:15-5d:01:02:0a", "00:15:5d:01:02:0g", "0015:5d01020a"])
def test_other_texts_are_not_addresses(text: str) -> None:
    """The error names the invalid text."""
    with pytest.raises(ValueError, match="not a MAC address"):
        frames.parse_mac(text)


@given(st.integers(0, 4095), st.integers(0, 15))
def test_tags_round_trip(vlan: int, priority: int) -> None:
    """Reading a tag gives back what it was made from."""
    header = bytes(12) + frames.tag(vlan, priority)
    assert frames.has_tag(header)
    assert frames.tag_of(header) == (priority, vlan)


def test_frame_sizes_at_the_limits() -> None:
    """14 bytes are a frame, 13 are not; a tagged frame has at least 18; the longest has MAX_FRAME_BYTES."""
    plain = packets.ethernet(packets.mac(1), packets.mac(2), b"")
    tagged = packets.ethernet(packets.mac(1), packets.mac(2), b"", vlan=5)
    assert not frames.is_malformed(plain, 14)
    assert frames.is_malformed(plain[:13], 13)
    assert not frames.is_malformed(tagged, 18)
    assert frames.is_malformed(tagged[:17], 17)
    assert not frames.is_malformed(plain, frames.MAX_FRAME_BYTES)
    assert frames.is_malformed(plain, frames.MAX_FRAME_BYTES + 1)
    assert frames.is_malformed(packets.ethernet(packets.mac(1), frames.BROADCAST), 60)


def test_reserved_addresses() -> None:
    """01-80-C2-00-00-00 to -0F stay on one link, -10 does not."""
    assert frames.is_reserved(bytes.fromhex("0180c2000000"))
    assert frames.is_reserved(bytes.fromhex("0180c200000f"))
    assert not frames.is_reserved(bytes.fromhex("0180c2000010"))


def test_dhcp_servers_are_recognised() -> None:
    """They are recognised by the port they send from, in versions 4 and 6, tagged or not, behind IP options; clients
    are not."""
    me, all_ = packets.mac(1), frames.BROADCAST
    offer = packets.udp(67, 68)
    assert frames.is_dhcp_server(packets.dhcp_offer(me))
    assert frames.is_dhcp_server(packets.ethernet(all_, me, packets.ipv4(17, offer), vlan=7, kind=0x0800))
    assert frames.is_dhcp_server(packets.ethernet(all_, me, packets.ipv4(17, offer, options=bytes(8)), kind=0x0800))
    assert frames.is_dhcp_server(packets.ethernet(all_, me, packets.ipv6(17, packets.udp(547, 546)), kind=0x86DD))
    assert not frames.is_dhcp_server(packets.ethernet(all_, me, packets.ipv4(17, packets.udp(68, 67)), kind=0x0800))
    assert not frames.is_dhcp_server(packets.ethernet(all_, me, packets.ipv4(6, offer), kind=0x0800))
    assert not frames.is_dhcp_server(packets.ethernet(all_, me, packets.ipv4(17, offer, fragment=10), kind=0x0800))


def _four(source_port: int, destination_port: int, payload: bytes, *, fragment: int = 0) -> bytes:
    packet = packets.ipv4(17, packets.udp(source_port, destination_port, payload), fragment=fragment)
    return packets.ethernet(frames.BROADCAST, packets.mac(1), packet, kind=0x0800)


def _six(source_port: int, destination_port: int, payload: bytes, fragment: bytes = b"") -> bytes:
    packet = packets.ipv6(44 if fragment else 17, fragment + packets.udp(source_port, destination_port, payload))
    return packets.ethernet(frames.BROADCAST, packets.mac(1), packet, kind=0x86DD)


MORE, SIX_MORE = 0x2000, bytes([17, 0, 0, 1, 0, 0, 0, 9])


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        (_four(1067, 68, b"\x02"), True),  # RFC 2131 says to which port a server answers, not from which
        (_four(1067, 67, b"\x02"), True),  # to a relay
        (_four(1067, 67, b"\x01"), False),
        (_four(68, 67, b"\x01"), False),
        (_four(5000, 6000, b"\x02"), False),
        (_four(1067, 67, b"", fragment=MORE), True),  # the message's kind is in the next fragment
        (_four(1067, 67, b"\x01" * 8, fragment=MORE), True),
        (_four(5000, 6000, b"\x02", fragment=MORE), False),
        (_four(5000, 6000, b"", fragment=1), True),  # would overwrite what follows the first 8 bytes
        (_four(5000, 6000, b"", fragment=2), False),
        (_six(1067, 546, b"\x02"), True),
        *((_six(1067, 547, bytes([kind])), kind in (2, 7, 10, 13)) for kind in range(14)),
        (_six(1067, 547, b"", SIX_MORE), True),
        (_six(5000, 6000, b"", SIX_MORE), False),
        (_six(5000, 6000, b"", bytes([17, 0, 0, 8, 0, 0, 0, 9])), True),
        (_six(5000, 6000, b"", bytes([17, 0, 0, 16, 0, 0, 0, 9])), False),
    ],
)
def test_dhcp_servers_are_recognised_by_their_messages(frame: bytes, expected: bool) -> None:
    """`INV-DHCP-GUARD`: they are recognised by recipients and content, whatever port they send from, also in
    fragments."""
    assert frames.is_dhcp_server(frame) is expected
    for wrapper in (frames.tag(0), b"\x88\xa8\x00\x07", b"\x00\x40" + SNAP):
        assert frames.is_dhcp_server(wrapped(frame, wrapper)) is expected


def test_routers_are_recognised() -> None:
    """Advertisements and redirects of both versions are recognised; neighbour messages and echoes are not."""
    me, all_ = packets.mac(1), frames.BROADCAST
    assert frames.is_router(packets.router_advertisement(me))
    for protocol, kind, expected in ((1, 9, True), (1, 5, True), (1, 8, False)):
        packet = packets.ipv4(protocol, bytes([kind]) + bytes(7))
        assert frames.is_router(packets.ethernet(all_, me, packet, kind=0x0800)) is expected
    for kind, expected in ((137, True), (135, False), (136, False), (128, False)):
        packet = packets.ipv6(58, bytes([kind]) + bytes(7))
        assert frames.is_router(packets.ethernet(all_, me, packet, kind=0x86DD)) is expected


def test_routers_cannot_hide_behind_extension_headers() -> None:
    """The known ways to evade such a guard (RFC 7113) fail: options, a first fragment, too many headers, a truncated
    chain."""
    me = packets.mac(1)
    options = bytes([58, 0]) + bytes(6)
    fragment = bytes([58, 0, 0, 1]) + bytes(4)
    assert frames.is_router(packets.router_advertisement(me, options, 60))
    assert frames.is_router(packets.router_advertisement(me, fragment, 44))
    many = b"".join(bytes([60, 0]) + bytes(6) for _ in range(frames.MAX_EXTENSION_HEADERS)) + options
    assert frames.is_router(packets.router_advertisement(me, many, 60))
    cut = packets.ethernet(frames.BROADCAST, me, packets.ipv6(60, options), kind=0x86DD)
    assert frames.is_router(cut)


@pytest.mark.parametrize(
    "wrappers",
    [
        (frames.tag(0), frames.tag(0)),
        (frames.tag(5), b"\x88\xa8\x00\x07"),
        (b"\x00\x40" + SNAP,),
        (frames.tag(0), b"\x00\x40" + SNAP, frames.tag(0)),
        (frames.tag(0),) * 30,
    ],
)
def test_tags_and_snap_headers_hide_nothing(wrappers: tuple[bytes, ...]) -> None:
    """Receivers remove any number of priority tags and SNAP headers, so the guards do, too; too many count as an
    attempt."""
    me = packets.mac(1)
    assert frames.is_dhcp_server(wrapped(packets.dhcp_offer(me), *wrappers))
    assert frames.is_router(wrapped(packets.router_advertisement(me), *wrappers))
    if len(wrappers) <= frames.MAX_WRAPPERS:
        asking = packets.ethernet(frames.BROADCAST, me, packets.ipv4(17, packets.udp(68, 67)), kind=0x0800)
        assert not frames.is_dhcp_server(wrapped(asking, *wrappers))
        assert not frames.is_router(wrapped(asking, *wrappers))


@pytest.mark.parametrize("options_bytes", [8, 192, 200, 208, 256])
def test_dhcp_servers_cannot_hide_behind_extension_headers(options_bytes: int) -> None:
    """Wherever the datagram begins: also beyond the part of the frame that a guard is shown, and behind too many
    headers."""
    me = packets.mac(1)
    options = bytes([17, options_bytes // 8 - 1]) + bytes(options_bytes - 2)
    offer = packets.ethernet(
        frames.BROADCAST, me, packets.ipv6(60, options + packets.udp(547, 546, bytes(20))), kind=0x86DD
    )
    assert frames.is_dhcp_server(offer[: frames.INSPECT_BYTES])
    many = b"".join(bytes([60, 0]) + bytes(6) for _ in range(frames.MAX_EXTENSION_HEADERS)) + bytes([17, 0]) + bytes(6)
    packet = packets.ipv6(60, many + packets.udp(547, 546))
    assert frames.is_dhcp_server(packets.ethernet(frames.BROADCAST, me, packet, kind=0x86DD))


@given(st.binary(max_size=300))
def test_any_bytes_get_a_decision(frame: bytes) -> None:
    """`INV-FRAME-BOUNDED`: random bytes get an answer, never an exception."""
    heads = (b"\x86\xdd\x60", b"\x08\x00\x45", frames.TPID, b"\x00\x40" + SNAP)
    for head in (b"", *(bytes(12) + one for one in heads)):
        frames.is_dhcp_server(head + frame)
        frames.is_router(head + frame)
        if len(head + frame) >= 16:
            frames.is_malformed((head + frame)[:16], len(head + frame))
