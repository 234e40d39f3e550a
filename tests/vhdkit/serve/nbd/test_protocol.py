# SPDX-License-Identifier: Apache-2.0
"""The transmission phase as bytes: which requests are refused with which error, and how answers are framed."""

from __future__ import annotations

import errno as errnos
import struct
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import nbd_client as nbd
from tests.nbd_client import (
    CACHE,
    DF,
    DISC,
    EINVAL,
    ENOSPC,
    EOVERFLOW,
    EPERM,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    PAYLOAD_LEN,
    READ,
    REQ_ONE,
    STATUS,
    TRIM,
    WRITE,
    ZEROES,
)
from vhdkit.serve.nbd import protocol as nbd_protocol
from vhdkit.serve.nbd.options import ExportInfo, Session
from vhdkit.serve.nbd.protocol import BrokenClient, Request, Transmission
from vhdkit.serve.nbd.wire import TransmissionFlag, wire_errno
from vhdkit.units import GIB, KIB, MIB

SIZE = 100 * MIB + 5
CONTEXTS = ((1, "base:allocation"), (2, "qemu:allocation-depth"))
HUGE = (1 << 64) - 1


@dataclass(frozen=True)
class Kind:
    """How answers are framed."""

    structured: bool
    extended: bool

    def rules(self, *, read_only: bool = False, size: int = SIZE, contexts: bool = True) -> Transmission:
        """The rules of such a session."""
        flags = TransmissionFlag.READ_ONLY if read_only else TransmissionFlag(0)
        chosen = CONTEXTS if contexts and self.structured else ()
        export = ExportInfo("disk", "", size, flags, tuple(name for _, name in chosen))
        return Transmission(Session(export, self.structured, self.extended, chosen))

    def ask(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, cookie: int = 1) -> bytes:
        """A request as bytes."""
        if self.extended and command == WRITE:
            flags |= PAYLOAD_LEN
        return nbd.request(command, offset, length, flags=flags, cookie=cookie, extended=self.extended)


SIMPLE, STRUCTURED, EXTENDED = Kind(False, False), Kind(True, False), Kind(True, True)
KINDS = pytest.mark.parametrize("kind", [SIMPLE, STRUCTURED, EXTENDED], ids=["simple", "structured", "extended"])


def parse(rules: Transmission, raw: bytes) -> Request | None:
    """The first request of some bytes."""
    return rules.next_request(memoryview(raw), 0, len(raw))


def judged(kind: Kind, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, **rules: bool | int) -> int:
    """The error a request is refused with."""
    transmission = kind.rules(**rules)  # type: ignore[arg-type]  # booleans and one size
    found = parse(transmission, kind.ask(command, offset, length, flags=flags))
    assert found is not None
    return found.error


# -- requests ---------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("magic", [b"\0\0\0\0", b"\x25\x60\x95\x14", b"GET "])
def test_bad_magic(kind: Kind, magic: bytes) -> None:
    """Row 24: bytes that are not a request raise BrokenClient, for the connection to be closed."""
    with pytest.raises(BrokenClient):
        parse(kind.rules(), magic + kind.ask(READ, 0, 1)[4:])


def test_the_other_modes_magic_is_bad() -> None:
    """Row 24: a compact request is invalid in an extended session, and vice versa."""
    with pytest.raises(BrokenClient):
        parse(EXTENDED.rules(), SIMPLE.ask(READ, 0, 1).ljust(32, b"\0"))
    with pytest.raises(BrokenClient):
        parse(SIMPLE.rules(), EXTENDED.ask(READ, 0, 1))


@KINDS
def test_incomplete_request(kind: Kind) -> None:
    """The rest of a header is waited for, wherever it is cut and wherever it is in the buffer."""
    raw = kind.ask(READ, 4096, 512)
    for size in range(len(raw)):
        assert kind.rules().next_request(memoryview(b"\xff" * 7 + raw), 7, 7 + size) is None
    found = kind.rules().next_request(memoryview(b"\xff" * 7 + raw + b"next"), 7, 11 + len(raw))
    assert found == Request(0, READ, 0, 1, 4096, 512, 0)


@KINDS
def test_cookie_is_opaque(kind: Kind) -> None:
    """Row 32: all its 64 bits are returned in every kind of answer."""
    for cookie in (0, 1, HUGE, 0x67446698 << 32):
        found = parse(kind.rules(), kind.ask(READ, 0, 512, cookie=cookie))
        assert found is not None
        raw = struct.pack(">Q", cookie)
        header = memoryview(bytearray(64))
        kind.rules().put_read_header(header, 0, cookie, 0, 512)
        done = memoryview(bytearray(64))
        kind.rules().put_done(done, 0, cookie, 0)
        for answer in (kind.rules().done(found), kind.rules().error(found, EINVAL), bytes(header), bytes(done)):
            assert answer[8:16] == raw


@KINDS
@pytest.mark.parametrize("command", [8, 9, 200, 0xFFFF])
def test_unknown_command(kind: Kind, command: int) -> None:
    """Row 25: EINVAL, without a payload."""
    found = parse(kind.rules(), kind.ask(command, 0, 512))
    assert found is not None and (found.error, found.payload_bytes) == (EINVAL, 0)


FINE = {
    READ: DF,
    WRITE: 0,
    FLUSH: 0,
    TRIM: 0,
    CACHE: 0,
    ZEROES: NO_HOLE | FAST_ZERO,
    STATUS: REQ_ONE,
}


@pytest.mark.parametrize("command", sorted(FINE))
@pytest.mark.parametrize("bit", range(16))
def test_every_flag_of_every_command(command: int, bit: int) -> None:
    """Rows 25 and 26: FUA is allowed on every command, each other flag only where it belongs, unknown bits nowhere."""
    length = 0 if command == FLUSH else 512
    expected = 0 if 1 << bit & (FINE[command] | FUA) else EINVAL
    assert judged(STRUCTURED, command, 0, length, flags=1 << bit) == expected
    if 1 << bit != PAYLOAD_LEN:
        assert judged(EXTENDED, command, 0, length, flags=1 << bit) == expected


def test_payload_len_belongs_to_writes_and_filters() -> None:
    """Row 25: with extended headers PAYLOAD_LEN anywhere else is EINVAL, and its payload is drained."""
    for command in (READ, FLUSH, TRIM, CACHE, ZEROES, 77):
        found = parse(EXTENDED.rules(), EXTENDED.ask(command, 0, 512, flags=PAYLOAD_LEN))
        assert found is not None and (found.error, found.payload_bytes) == (EINVAL, 512)
    without = parse(EXTENDED.rules(), nbd.request(WRITE, 0, 512, extended=True))
    assert without is not None and (without.error, without.payload_bytes) == (EINVAL, 0)


@KINDS
@pytest.mark.parametrize(
    ("flags", "offset", "length", "error"),
    [(DF, 0, 512, EINVAL), (0, SIZE, 1, ENOSPC), (0, HUGE, 512, EINVAL), (0, 0, 65 * MIB, EINVAL)],
)
def test_refused_write_is_drained(kind: Kind, flags: int, offset: int, length: int, error: int) -> None:
    """Row 25: whatever the reason for refusing a WRITE, its payload belongs to it."""
    if kind.extended and length > 64 * MIB:
        with pytest.raises(BrokenClient):  # as the specification of that mode requires
            parse(kind.rules(), kind.ask(WRITE, offset, length, flags=flags))
        return
    found = parse(kind.rules(), kind.ask(WRITE, offset, length, flags=flags))
    assert found is not None and (found.error, found.payload_bytes) == (error, length)


@KINDS
def test_absurd_payload(kind: Kind) -> None:
    """Row 35: gigabytes are not drained just to send an error."""
    with pytest.raises(BrokenClient):
        parse(kind.rules(size=8 * GIB), kind.ask(WRITE, 0, (1 << 32) - 1))


@KINDS
@pytest.mark.parametrize("command", [WRITE, TRIM, ZEROES])
def test_read_only(kind: Kind, command: int) -> None:
    """Rows 23 and 27: a change to a read-only export is EPERM, even if it is out of range."""
    assert judged(kind, command, 0, 512, read_only=True) == EPERM
    assert judged(kind, command, SIZE, 512, read_only=True) == EPERM
    for harmless in (READ, CACHE):
        assert judged(kind, harmless, 0, 512, read_only=True) == 0
    assert judged(kind, FLUSH, read_only=True) == 0


@KINDS
@pytest.mark.parametrize(("offset", "length"), [(SIZE, 1), (SIZE - 1, 2), (0, SIZE + 1), (1 << 63, 1)])
def test_past_the_end(kind: Kind, offset: int, length: int) -> None:
    """Row 27: writes past the end are ENOSPC, everything else there is EINVAL."""
    if kind is SIMPLE and length > 0xFFFFFFFF:
        return
    for command in (READ, TRIM, CACHE):
        assert judged(kind, command, offset, length) == EINVAL
    assert judged(kind, ZEROES, offset, length) == ENOSPC
    if length <= 64 * MIB:
        assert judged(kind, WRITE, offset, length) == ENOSPC
    assert judged(kind, STATUS, offset, length) == EINVAL


@KINDS
@pytest.mark.parametrize("command", [READ, WRITE, TRIM, CACHE, ZEROES, STATUS])
@pytest.mark.parametrize(("offset", "length"), [(HUGE, 1), (HUGE - 511, 512), (HUGE, 0xFFFFFFF)])
def test_overflow(kind: Kind, command: int, offset: int, length: int) -> None:
    """Row 28: offset + length beyond 2^64 is EINVAL; nothing wraps around to the start."""
    if command == WRITE:
        length = min(length, 512)
    assert judged(kind, command, offset, length) == EINVAL
    if kind.extended and command != WRITE:
        assert judged(kind, command, 512, HUGE) == EINVAL


@KINDS
def test_zero_lengths(kind: Kind) -> None:
    """Row 29: they are harmless, even at the very end."""
    for command in (READ, WRITE, TRIM, CACHE, ZEROES):
        assert judged(kind, command, 0, 0) == 0
        assert judged(kind, command, SIZE, 0) == 0
    assert judged(kind, STATUS, 0, 0) == EINVAL


@KINDS
def test_flush_has_no_range(kind: Kind) -> None:
    """Row 30: FLUSH with an offset or length is EINVAL."""
    assert judged(kind, FLUSH) == 0
    assert judged(kind, FLUSH, 1, 0) == judged(kind, FLUSH, 0, 1) == judged(kind, FLUSH, HUGE, 0) == EINVAL


@KINDS
def test_disconnect_is_never_refused(kind: Kind) -> None:
    """Row 31: DISC ends the session, even with odd fields and flags."""
    assert judged(kind, DISC) == judged(kind, DISC, HUGE, 12, flags=FUA | REQ_ONE) == 0


def test_large_reads() -> None:
    """Rows 16, 27 and 35: 64 MiB are served; beyond, and beyond 1 MiB with DF, a structured client gets EOVERFLOW."""
    for kind in (SIMPLE, STRUCTURED, EXTENDED):
        assert judged(kind, READ, 0, 64 * MIB) == 0
        assert judged(kind, READ, 0, 64 * MIB + 1) == (EOVERFLOW if kind.structured else EINVAL)
    for kind in (STRUCTURED, EXTENDED):
        assert judged(kind, READ, 0, 64 * KIB, flags=DF) == 0
        assert judged(kind, READ, 0, 64 * MIB, flags=DF) == EOVERFLOW
    assert judged(SIMPLE, READ, 0, 512, flags=DF) == EINVAL


@KINDS
def test_long_effects(kind: Kind) -> None:
    """Row 35: TRIM, ZEROES, CACHE and STATUS may be longer than any payload, with extended headers beyond 4 GiB."""
    length = 20 * GIB if kind.extended else (1 << 32) - 1
    for command in (TRIM, ZEROES, CACHE, STATUS):
        expected = EINVAL if command == STATUS and not kind.structured else 0
        assert judged(kind, command, 7, length, size=1 << 40) == expected


def test_status_without_contexts() -> None:
    """Row 19: BLOCK_STATUS without a context of this export is EINVAL, with a payload too."""
    for kind in (SIMPLE, STRUCTURED, EXTENDED):
        assert judged(kind, STATUS, 0, 512, contexts=False) == EINVAL
    assert judged(EXTENDED, STATUS, 0, 12, flags=PAYLOAD_LEN, contexts=False) == EINVAL


def test_status_filter() -> None:
    """A payload selects among the contexts; unknown and repeated ids, odd sizes and bad ranges are refused."""
    rules = EXTENDED.rules(size=1 << 50)
    pack = struct.pack
    assert rules.status_filter(pack(">QI", 512, 2), 0) == (512, (2,))
    assert rules.status_filter(pack(">QII", 1 << 40, 2, 1), 1 << 40) == (1 << 40, (2, 1))
    refused = [
        b"",
        pack(">Q", 512),
        pack(">QI", 512, 3),
        pack(">QII", 512, 1, 1),
        pack(">QI", 512, 1) + b"\0",
        pack(">QI", 0, 1),
        pack(">QI", (1 << 50) + 1, 1),
        pack(">QI", HUGE, 1),
    ]
    for payload in refused:
        assert rules.status_filter(payload, 0) is None, payload
    long = parse(rules, EXTENDED.ask(STATUS, 0, 5000, flags=PAYLOAD_LEN))
    assert long is not None and (long.error, long.payload_bytes) == (EINVAL, 5000)


def test_errors_of_the_system() -> None:
    """Row 27: only the eight error numbers of the protocol are ever sent."""
    assert wire_errno(errnos.EDQUOT) == wire_errno(errnos.EFBIG) == wire_errno(errnos.ENOSPC) == ENOSPC
    assert wire_errno(errnos.EROFS) == wire_errno(errnos.EACCES) == EPERM
    assert {int(wire_errno(number)) for number in range(200)} <= {1, 5, 12, 22, 28, 75, 95, 108}
    assert wire_errno(errnos.ENOENT) == wire_errno(0) == nbd.EIO


# -- answers ----------------------------------------------------------------------------------------------------


def test_simple_answers() -> None:
    """Row 33: a simple reply is 16 bytes; an error reply has no data behind it."""
    found = parse(SIMPLE.rules(), SIMPLE.ask(READ, 0, 512, cookie=7))
    assert found is not None
    assert SIMPLE.rules().error(found, 5, "words") == bytes.fromhex("67446698000000050000000000000007")
    assert SIMPLE.rules().done(found) == bytes.fromhex("67446698000000000000000000000007")


@pytest.mark.parametrize("command", [READ, STATUS, WRITE, FLUSH, TRIM, CACHE, ZEROES, 77])
def test_structured_where_it_must_be(command: int) -> None:
    """Row 15: after structured replies every answer to READ and STATUS is structured, also early errors."""
    for kind, chunk in ((STRUCTURED, b"\x66\x8e\x33\xef"), (EXTENDED, b"\x6e\x8a\x27\x8c")):
        found = parse(kind.rules(), kind.ask(command, HUGE, 512, flags=0x8000))
        assert found is not None and found.error == EINVAL
        is_chunk = kind.extended or command in (READ, STATUS)
        assert (kind.rules().error(found, found.error)[:4] == chunk) == is_chunk
        assert (kind.rules().done(found)[:4] == chunk) == is_chunk


def test_chunks_byte_by_byte() -> None:
    """Row 34: the layouts of all chunks, as in the protocol document."""
    kinds = ((STRUCTURED, "668e33ef{}{}{:016x}{:08x}"), (EXTENDED, "6e8a278c{}{}{:016x}0000000000001000{:016x}"))
    for kind, head in kinds:
        rules = kind.rules()
        found = parse(rules, kind.ask(READ, 4096, 8192, cookie=9))
        assert found is not None

        def expect(answer: bytes, done: bool, chunk: int, payload: bytes, size: int, head: str = head) -> None:
            flags = "0001" if done else "0000"
            assert answer.hex() == head.format(flags, f"{chunk:04x}", 9, size) + payload.hex()

        expect(rules.data_chunk(found, 5000, 100), False, 1, struct.pack(">Q", 5000), 108)
        expect(rules.hole_chunk(found, 5000, 100), False, 2, struct.pack(">QI", 5000, 100), 12)
        expect(rules.done(found), True, 0, b"", 0)
        expect(rules.error(found, 5, "ß"), True, 0x8001, struct.pack(">IH", 5, 2) + "ß".encode(), 8)
        header = memoryview(bytearray(64))
        rules.put_read_header(header, 0, 9, 4096, 8192)
        expect(bytes(header[: rules.read_header_size]), True, 1, struct.pack(">Q", 4096), 8200)
        runs = rules.status_runs([512, 7680], [0, 3])
        body = struct.pack(">I4I", 1, 512, 0, 7680, 3)
        if kind.extended:
            body = struct.pack(">II4Q", 1, 2, 512, 0, 7680, 3)
        expect(rules.status(found, 1, runs, last=False), False, 6 if kind.extended else 5, body, len(body))
        expect(rules.status(found, 1, runs, last=True), True, 6 if kind.extended else 5, body, len(body))


@KINDS
def test_the_hot_paths_reply_is_the_usual_one(kind: Kind) -> None:
    """The hot path's reply to a successful write has the same bytes as the general one."""
    found = parse(kind.rules(), kind.ask(WRITE, 4096, 512, cookie=9))
    assert found is not None
    buffer = memoryview(bytearray(b"\xaa" * 80))
    size = kind.rules().put_done(buffer, 3, 9, 4096)
    assert bytes(buffer[3 : 3 + size]) == kind.rules().done(found)
    assert bytes(buffer[:3]) + bytes(buffer[3 + size :]) == b"\xaa" * (80 - size)


def test_error_text_is_bounded() -> None:
    """Row 13: an error's text has at most 4096 bytes."""
    found = parse(STRUCTURED.rules(), STRUCTURED.ask(READ, 0, 512))
    assert found is not None
    assert len(STRUCTURED.rules().error(found, 5, "ß" * 9999)) == 20 + 6 + 4096


@given(st.binary(min_size=28, max_size=28), st.sampled_from([SIMPLE, STRUCTURED, EXTENDED]), st.booleans())
@settings(max_examples=150)
def test_arbitrary_headers(raw: bytes, kind: Kind, read_only: bool) -> None:
    """Any header with the right magic is a request to serve, one to refuse with an NBD error, or BrokenClient."""
    rules = kind.rules(read_only=read_only)
    head = kind.ask(0)[:4]
    try:
        found = parse(rules, head + raw)
    except BrokenClient:
        return
    assert found is not None
    assert found.error in (0, EPERM, EINVAL, ENOSPC, EOVERFLOW)
    assert 0 <= found.payload_bytes <= nbd_protocol.MAX_DRAINED_BYTES
    if not found.error and found.command in (READ, WRITE, TRIM, ZEROES, CACHE):
        assert found.offset + found.length <= SIZE
        assert found.command in (READ, CACHE) or not read_only
        assert found.command not in (READ, WRITE) or found.length <= 64 * MIB
