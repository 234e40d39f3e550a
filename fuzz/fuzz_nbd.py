# SPDX-License-Identifier: Apache-2.0
"""INV-BOUNDED for NBD: any bytes of a client end in answers, refusals or the end of that connection.

Fed: what a client sends, after one byte that chooses the TLS mode. Tried: the handshake, and behind it the requests,
each answered with success and with an error in the framing that was agreed on. Also watched:

- whole, byte by byte and in odd pieces, the same bytes get the same answers, the same end and the same requests;
- nothing is raised but `BrokenClient`, and no more is kept than the modules promise;
- what the server says is well formed: option replies, then chunks or simple replies, and nothing else;
- a request that is not refused lies inside the export.
"""

from __future__ import annotations

import random
import struct
import sys
from collections.abc import Iterator, Sequence

from fuzz.loop import main
from fuzz.mutate import extreme, mutate_bytes
from vhdkit.serve.nbd import options as nbd_options
from vhdkit.serve.nbd import protocol as nbd_protocol
from vhdkit.serve.nbd.options import ExportInfo, Handshake, HandshakeState, Session, TlsMode
from vhdkit.serve.nbd.protocol import BrokenClient, Request, Transmission
from vhdkit.serve.nbd.wire import MAX_STRING_BYTES, Command, TransmissionFlag
from vhdkit.units import KIB, TIB

_ALL = TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_FUA | TransmissionFlag.CAN_MULTI_CONN
_CONTEXTS = ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:0")
EXPORTS = (
    ExportInfo("disk", "a disk", 40 * TIB, _ALL, _CONTEXTS),
    ExportInfo("read-only", "", 64 * KIB + 1, _ALL | TransmissionFlag.READ_ONLY, _CONTEXTS[:1]),
)
_MODES = tuple(TlsMode)
_MAX_REQUESTS = 1000


def target(data: bytes) -> None:
    """Be the server for this client, three times."""
    mode, sent = _MODES[data[0] % len(_MODES)] if data else TlsMode.OFF, data[1:]
    whole = _conversation(mode, sent, max(len(sent), 1))
    assert whole == _conversation(mode, sent, 1), "byte by byte something else comes out"
    assert whole == _conversation(mode, sent, 13), "in pieces something else comes out"


def reaches_requests(data: bytes) -> int:
    """How many requests the server takes from this client: how the mutations are measured."""
    found = _conversation(_MODES[data[0] % len(_MODES)] if data else TlsMode.OFF, data[1:], max(len(data), 1))[3]
    return len(found)


def _conversation(
    mode: TlsMode, sent: bytes, size: int
) -> tuple[bytes, HandshakeState, Session | None, list[Request | None]]:
    handshake = Handshake(lambda: EXPORTS, tls=mode)
    said = bytearray(handshake.take_output())
    position = 0
    while position < len(sent) and handshake.state is HandshakeState.OPTIONS:
        handshake.receive(sent[position : position + size])
        position += size
        said += _taken(handshake, size)
        if _wants_tls(handshake):  # here a client in plain text is at its end
            handshake.secured()
            said += b"TLS"
            break
    session = handshake.session
    if session is None:
        return bytes(said), handshake.state, None, []
    rest = handshake.take_rest() + sent[position:]
    return bytes(said), handshake.state, session, _requests(Transmission(session), rest, size)


def _wants_tls(handshake: Handshake) -> bool:
    return handshake.state is HandshakeState.TLS


def _taken(handshake: Handshake, size: int) -> bytes:
    said = handshake.take_output()
    while handshake.is_held_back:
        handshake.receive(b"")
        said += handshake.take_output()
    if handshake.state is HandshakeState.OPTIONS:
        assert len(handshake._input) <= nbd_options.MAX_OPTION_BYTES + 16
    position = 0
    while position + 20 <= len(said) and said[position : position + 8] == bytes.fromhex("0003e889045565a9"):
        length: int = struct.unpack_from(">I", said, position + 16)[0]
        assert length <= 2 * MAX_STRING_BYTES + 8
        position += 20 + length
    assert len(said) - position in (0, 10, 134), "neither option replies nor the answer to EXPORT_NAME"
    return said


def _requests(rules: Transmission, sent: bytes, size: int) -> list[Request | None]:
    """The requests found when the bytes arrive in pieces; None at the end for a client that is hung up on."""
    found: list[Request | None] = []
    buffer, position, arrived = memoryview(sent), 0, 0
    while arrived < len(sent) and len(found) < _MAX_REQUESTS:
        arrived = min(arrived + size, len(sent))
        try:
            while position <= arrived and (request := rules.next_request(buffer, position, arrived)) is not None:
                found.append(request)
                start = position + rules.request_size
                position = start + request.payload_bytes
                _judge(rules, request, sent[start:position])
                if request.command == Command.DISC or len(found) == _MAX_REQUESTS:
                    return found
        except BrokenClient:
            return [*found, None]
    return found


def _judge(rules: Transmission, request: Request, payload: bytes) -> None:
    assert request.payload_bytes <= nbd_protocol.MAX_DRAINED_BYTES
    if not request.error and request.command not in (Command.DISC, Command.FLUSH) and not payload:
        assert request.offset + request.length <= rules.size_bytes
    if request.command == Command.BLOCK_STATUS and len(payload) == request.payload_bytes:
        narrowed = rules.status_filter(payload, request.offset)
        assert narrowed is None or request.offset + narrowed[0] <= rules.size_bytes
    for answer in (rules.done(request), rules.error(request, request.error or 5, "text")):
        assert answer[8:16] == struct.pack(">Q", request.cookie)


# -- mutations --------------------------------------------------------------------------------------------------


def mutate(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Another conversation near `data`: messages repeated, left out, exchanged, their numbers changed."""
    if rng.random() < 0.2:
        return mutate_bytes(data, rng, others)
    mode, messages = data[:1], list(_messages(data[1:]))
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randrange(len(messages) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            messages.insert(place, rng.choice(list(_messages(rng.choice(others)[1:])) or [b""]))
        elif kind == 1 and messages:
            del messages[rng.randrange(len(messages))]
        elif messages:
            chosen = rng.randrange(len(messages))
            messages[chosen] = _changed(messages[chosen], rng)
    return (bytes([rng.randrange(3)]) if rng.random() < 0.05 else mode) + b"".join(messages)[: 1 << 14]


def _messages(sent: bytes) -> Iterator[bytes]:
    """A client's bytes cut where its messages begin."""
    if sent:
        yield sent[:4]
    position = 4
    while position < len(sent):
        if sent.startswith(b"IHAVEOPT", position):
            size = 16 + int.from_bytes(sent[position + 12 : position + 16])
        elif sent.startswith(b"\x21\xe4\x1c\x71", position):
            flags = int.from_bytes(sent[position + 4 : position + 6])
            size = 32 + (int.from_bytes(sent[position + 24 : position + 32]) if flags & 32 else 0)
        else:
            command = int.from_bytes(sent[position + 6 : position + 8])
            size = 28 + (int.from_bytes(sent[position + 24 : position + 28]) if command == 1 else 0)
        size = min(size, 1 << 14)
        yield sent[position : position + size]
        position += size


def _changed(message: bytes, rng: random.Random) -> bytes:
    """One number of a message made extreme."""
    if len(message) < 8:
        return extreme(rng, 4) if rng.random() < 0.3 else message
    at, size = rng.choice(((4, 2), (6, 2), (8, 8), (8, 4), (12, 4), (16, 8), (16, 4), (24, 4), (24, 8), (28, 4)))
    raw = extreme(rng, size)
    if size == 2 and rng.random() < 0.9:
        raw = struct.pack(">H", rng.choice((rng.randrange(9), 1 << rng.randrange(16))))
    elif at == 8 and size == 4:
        raw = struct.pack(">I", rng.randrange(13))
    return message[:at] + raw + message[at + size :] if at + size <= len(message) else message


if __name__ == "__main__":
    sys.exit(main(target, "fuzz_nbd", mutate))
