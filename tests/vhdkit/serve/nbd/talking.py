# SPDX-License-Identifier: Apache-2.0
"""A client's side of a handshake without sockets: bytes for a `Handshake`, and its replies parsed."""

from __future__ import annotations

import struct

from tests import nbd_client as nbd
from tests.nbd_client import ACK, go_data, option, option_replies
from vhdkit.serve.nbd.options import ExportInfo, Handshake, TlsMode
from vhdkit.serve.nbd.wire import TransmissionFlag
from vhdkit.units import MIB

CONTEXTS = ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:one", "qemu:dirty-bitmap:two")
FLAGS = TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_FUA
FIRST = ExportInfo("first", "the first disk", 5 * MIB, FLAGS, CONTEXTS)
SECOND = ExportInfo("zweite ß", "", 1, FLAGS | TransmissionFlag.READ_ONLY, CONTEXTS[:1])
GREETING = b"NBDMAGICIHAVEOPT\0\3"
FIXED, NO_ZEROES = 1, 2
Replies = list[tuple[int, int, bytes]]


def catalog() -> list[ExportInfo]:
    """Two exports."""
    return [FIRST, SECOND]


def begin(flags: int = FIXED | NO_ZEROES, *, tls: TlsMode = TlsMode.OFF) -> Handshake:
    """A handshake whose greeting was accepted and answered."""
    handshake = Handshake(catalog, tls=tls)
    assert handshake.take_output() == GREETING
    handshake.receive(struct.pack(">I", flags))
    return handshake


def ask(handshake: Handshake, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
    """(kind, payload) of the replies to an option."""
    handshake.receive(option(number, data))
    replies = option_replies(handshake.take_output())
    assert all(echoed == number for echoed, _, _ in replies)
    return [(kind, payload) for _, kind, payload in replies]


def kinds(handshake: Handshake, number: int, data: bytes = b"") -> list[int]:
    """The kinds of the replies to an option."""
    return [kind for kind, _ in ask(handshake, number, data)]


def feed(handshake: Handshake, data: bytes, *, size: int) -> bytes:
    """Everything the server sends while `data` arrives in pieces of that size; TLS is secured at once."""
    said = handshake.take_output()
    for start in range(0, len(data), size):
        handshake.receive(data[start : start + size])
        said += handshake.take_output()
        while handshake.is_held_back:
            handshake.receive(b"")
            said += handshake.take_output()
    return said


def names(replies: list[tuple[int, bytes]]) -> list[str]:
    """The contexts in a successful answer."""
    assert replies[-1] == (ACK, b"")
    assert all(kind == nbd.REP_META for kind, _ in replies[:-1])
    return [payload[4:].decode() for _, payload in replies[:-1]]


def selected(handshake: Handshake, name: str = "first") -> list[str]:
    """What is selected when this export is entered."""
    assert kinds(handshake, nbd.GO, go_data(name))[-1] == ACK
    assert handshake.session is not None
    return [context for _, context in handshake.session.contexts]
