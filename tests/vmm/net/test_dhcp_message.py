# SPDX-License-Identifier: Apache-2.0
"""DHCP messages: how a frame is read, and the frames of answers."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vmm.net import dhcp_client, packets
from vmm.net import dhcp_message
from vmm.net.dhcp_message import MessageType, parse

ONE = packets.mac(1)
DISCOVER = dhcp_client.ask(ONE, dhcp_client.DISCOVER, options={50: b"\x0a\0\x07\x09", 61: b"\x01id", 55: b"\x01\x03"})


def test_a_request_is_read() -> None:
    """Client, kind and options are read, also behind a tag; the name is read up to its first dot."""
    message = parse(DISCOVER)
    assert message is not None
    assert (message.kind, message.mac, message.sender, message.to) == (MessageType.DISCOVER, ONE, ONE, b"\xff" * 4)
    assert (message.requested, message.client) == (b"\x0a\0\x07\x09", b"\x01id")
    assert set(message.wanted) == {1, 3}
    tagged = parse(dhcp_client.ask(ONE, dhcp_client.REQUEST, vlan=0, options={12: b"Web.example"}, flags=0x8000))
    assert tagged is not None
    assert (tagged.kind, tagged.name, tagged.wants_broadcast) == (MessageType.REQUEST, "web", True)


@pytest.mark.parametrize(
    "frame",
    [
        packets.ethernet(
            b"\xff" * 6, ONE, packets.ipv4(17, packets.udp(68, 67, bytes(300))), kind=0x0800
        ),  # no cookie
        packets.ethernet(b"\xff" * 6, ONE, packets.ipv4(6, DISCOVER[34:]), kind=0x0800),
        packets.dhcp_offer(ONE),
        dhcp_client.ask(ONE, dhcp_client.OFFER),
        dhcp_client.ask(ONE, 0),
        dhcp_client.ask(ONE, 9),
        dhcp_client.ask(ONE, dhcp_client.DISCOVER, operation=2),
        dhcp_client.ask(ONE, dhcp_client.DISCOVER, relay="10.0.0.9"),
        dhcp_client.ask(ONE, dhcp_client.DISCOVER, station=b"\xff" * 6),
        DISCOVER[:20] + b"\x20" + DISCOVER[21:],  # the first of several fragments
        DISCOVER + bytes(dhcp_message.MAX_FRAME_BYTES),
    ],
)
def test_other_frames_are_not_requests(frame: bytes) -> None:
    """Other protocols and ports, messages of servers, relays, fragments, and messages that are too long are
    ignored."""
    assert parse(frame) is None


@given(st.one_of(st.binary(max_size=700), st.tuples(st.integers(0, len(DISCOVER)), st.binary(max_size=40)).map(
    lambda cut: DISCOVER[: cut[0]] + cut[1] + DISCOVER[cut[0] + len(cut[1]) :]
)))  # fmt: skip
def test_any_bytes_are_read_within_their_length(frame: bytes) -> None:
    """`INV-DHCP-BOUNDED`: the result is a message or None, never an exception, and addresses have the right size."""
    message = parse(frame)
    if message is not None:
        assert {len(one) for one in (message.present, message.requested, message.server, message.to)} == {4}
        assert len(message.mac) == 6
        reply = dhcp_message.reply(message, MessageType.ACK, b"\x0a\0\x07\x09", [], server=b"\x0a\0\x07\x01", mac=ONE)
        assert dhcp_client.read(reply).kind == dhcp_client.ACK


@pytest.mark.parametrize("length", range(0, len(DISCOVER), 7))
def test_truncated_frames_are_read_within_their_length(length: int) -> None:
    """A frame that ends anywhere gives a message with its complete parts, or none."""
    parse(DISCOVER[:length])


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (b"web", "web"), (b"Web-1.example.org", "web-1"), (b"web\0", "web"), (b"-web", ""), (b"a b", ""), (b"", ""),
        (b"\xff", ""), (b"a" * 63, "a" * 63), (b"a" * 64, ""), (b"a\n1 02:00:00:00:00:09 10.0.0.9 x *", ""),
    ],
)  # fmt: skip
def test_only_dns_labels_are_names(value: bytes, name: str) -> None:
    """A name that is not a DNS label is dropped: names go into a file of lines and words."""
    assert dhcp_message.host_name(value) == name


def test_destination_of_answers() -> None:
    """An answer goes to the new address, to all stations if that was requested or it is a NAK, or to the address that
    is in use."""

    def sent(kind: MessageType, **settings: object) -> dhcp_client.Answer:
        question = parse(dhcp_client.ask(ONE, dhcp_client.REQUEST, **settings))  # type: ignore[arg-type]
        assert question is not None
        given = socket.inet_aton("10.0.7.9")
        return dhcp_client.read(
            dhcp_message.reply(question, kind, given, [], server=b"\x0a\0\x07\x01", mac=b"\x52" * 6)
        )

    plain = sent(MessageType.ACK)
    assert (plain.destination, plain.source, plain.to, plain.yours) == (ONE, b"\x52" * 6, "10.0.7.9", "10.0.7.9")
    everybody = sent(MessageType.ACK, flags=0x8000)
    assert (everybody.destination, everybody.to, everybody.broadcast) == (b"\xff" * 6, "255.255.255.255", True)
    renewing = sent(MessageType.ACK, present="10.0.7.9", station=packets.mac(2))
    assert (renewing.destination, renewing.to, renewing.present) == (ONE, "10.0.7.9", "10.0.7.9")
    assert sent(MessageType.NAK, present="10.0.7.9").destination == b"\xff" * 6
    assert sent(MessageType.ACK, options={61: b"\x01abc"}).options[61] == b"\x01abc"
