# SPDX-License-Identifier: Apache-2.0
"""The handshake: every row of docs/nbd-support.md about it, as bytes in and bytes out."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from tests import nbd_client as nbd
from tests.nbd_client import ACK, INVALID, UNKNOWN, UNSUP, go_data, meta_data, option, option_replies, text
from tests.vhdkit.serve.nbd.talking import (
    CONTEXTS,
    FIRST,
    FIXED,
    FLAGS,
    GREETING,
    NO_ZEROES,
    SECOND,
    ask,
    begin,
    catalog,
    kinds,
    names,
    selected,
)
from vhdkit.serve.nbd import options as nbd_options
from vhdkit.serve.nbd.options import Handshake, HandshakeState, TlsMode
from vhdkit.units import KIB, MIB

# -- greeting and flags -----------------------------------------------------------------------------------------


def test_greeting() -> None:
    """Row 1: NBDMAGIC, IHAVEOPT and both flags, before the client sends anything."""
    assert Handshake(catalog).take_output() == GREETING


@pytest.mark.parametrize("flags", [4, 0x80000000, 7, 1 << 16])
def test_unknown_client_flag_closes(flags: int) -> None:
    """Row 2: a flag that was not offered ends the connection without another byte."""
    handshake = begin(flags)
    assert handshake.state is HandshakeState.CLOSED
    assert handshake.take_output() == b""


@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_offered_client_flags_are_taken(flags: int) -> None:
    """Row 2: any choice among the offered flags is accepted; some clients set only bit 0."""
    handshake = begin(flags)
    handshake.receive(option(nbd.EXPORT_NAME, b"first"))
    assert handshake.state is HandshakeState.TRANSMISSION


@pytest.mark.parametrize(("flags", "padding"), [(0, 124), (FIXED, 124), (NO_ZEROES, 0), (3, 0)])
def test_export_name_reply(flags: int, padding: int) -> None:
    """Row 3: EXPORT_NAME is answered with 10 bytes after NO_ZEROES, else with 134."""
    handshake = begin(flags)
    handshake.receive(option(nbd.EXPORT_NAME, b"first"))
    assert handshake.take_output() == struct.pack(">QH", 5 * MIB, FLAGS | 1) + bytes(padding)


def test_go_never_pads() -> None:
    """Row 3: GO's answer has no padding, whatever the client's flags."""
    handshake = begin(FIXED)
    replies = ask(handshake, nbd.GO, go_data("first", ()))
    assert replies == [(nbd.REP_INFO, struct.pack(">HQH", 0, 5 * MIB, FLAGS | 1)), (ACK, b"")]
    assert handshake.state is HandshakeState.TRANSMISSION


@pytest.mark.parametrize("number", [nbd.LIST, nbd.GO, nbd.ABORT, nbd.STARTTLS, nbd.STRUCTURED, 77])
def test_non_fixed_client_has_export_name_only(number: int) -> None:
    """Row 4: without FIXED_NEWSTYLE any other option ends the connection, and TLS is not offered."""
    handshake = begin(NO_ZEROES, tls=TlsMode.OFFERED)
    handshake.receive(option(number))
    assert handshake.state is HandshakeState.CLOSED
    assert handshake.take_output() == b""


# -- options that are wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4096, 64 * KIB])
@pytest.mark.parametrize("number", [4, 12, 99, 0xFFFFFFFF])
def test_unknown_option_is_drained(number: int, size: int) -> None:
    """Row 5: an unknown option is ERR_UNSUP, its data is skipped, and the next option is understood."""
    handshake = begin()
    assert kinds(handshake, number, bytes(size)) == [UNSUP]
    assert kinds(handshake, nbd.LIST)[-1] == ACK


def test_bad_option_magic_closes() -> None:
    """Row 6: bytes that are not an option end the connection."""
    handshake = begin()
    handshake.receive(option(nbd.LIST, magic=b"IHAVEOPX"))
    assert handshake.state is HandshakeState.CLOSED


@pytest.mark.parametrize("number", [nbd.GO, nbd.SET_META, nbd.LIST, 99])
def test_long_option_is_skipped_not_kept(number: int) -> None:
    """Row 6: a long option is ERR_TOO_BIG at once, none of it is kept, and the next one is understood."""
    handshake = begin()
    size = nbd_options.MAX_SKIPPED_BYTES
    handshake.receive(nbd.OPTION_MAGIC + struct.pack(">II", number, size))
    assert [kind for _, kind, _ in option_replies(handshake.take_output())] == [nbd.TOO_BIG]
    for _ in range(size // KIB):
        handshake.receive(bytes(KIB))
        assert len(handshake._input) <= KIB
    assert kinds(handshake, nbd.LIST)[-1] == ACK


@pytest.mark.parametrize("size", [nbd_options.MAX_SKIPPED_BYTES + 1, 0xFFFFFFFF])
def test_absurd_option_closes(size: int) -> None:
    """Row 6: the server does not wait for an option of gigabytes."""
    handshake = begin()
    handshake.receive(nbd.OPTION_MAGIC + struct.pack(">II", nbd.GO, size))
    assert handshake.state is HandshakeState.CLOSED


def test_options_without_end_close() -> None:
    """Row 6: a client that does not finish negotiation is disconnected."""
    handshake = begin()
    for _ in range(nbd_options.MAX_OPTIONS):
        handshake.receive(option(99))
        assert handshake.state is HandshakeState.OPTIONS
        handshake.take_output()
    handshake.receive(option(99))
    assert handshake.state is HandshakeState.CLOSED


@pytest.mark.parametrize("data", [b"", b"goodbye", bytes(64 * KIB)])
def test_abort(data: bytes) -> None:
    """Row 7: ABORT is acknowledged and ends the session, also with data."""
    handshake = begin()
    assert kinds(handshake, nbd.ABORT, data) == [ACK]
    assert handshake.state is HandshakeState.CLOSED
    handshake.receive(option(nbd.LIST))
    assert handshake.take_output() == b""


# -- LIST, INFO, GO, EXPORT_NAME --------------------------------------------------------------------------------


def test_list() -> None:
    """Row 8: one SERVER per export, with its description, then ACK."""
    assert ask(begin(), nbd.LIST) == [
        (nbd.REP_SERVER, text("first") + b"the first disk"),
        (nbd.REP_SERVER, text("zweite ß")),
        (ACK, b""),
    ]


@pytest.mark.parametrize("number", [nbd.LIST, nbd.STRUCTURED, nbd.EXTENDED])
def test_options_without_data(number: int) -> None:
    """Rows 8 and 15: unexpected data is ERR_INVALID, and nothing is agreed on."""
    handshake = begin()
    assert kinds(handshake, number, b"x") == [INVALID]
    assert kinds(handshake, nbd.SET_META, meta_data([])) == [INVALID]


@pytest.mark.parametrize("number", [nbd.INFO, nbd.GO])
def test_info_always_describes_the_export(number: int) -> None:
    """Rows 9 and 36: INFO_EXPORT comes unrequested, unknown kinds are ignored, others come once; block sizes."""
    handshake = begin()
    replies = ask(handshake, number, go_data("first", (1, 2, 3, 3, 7, 0xFFFF)))
    assert replies == [
        (nbd.REP_INFO, struct.pack(">HQH", 0, 5 * MIB, FLAGS | 1)),
        (nbd.REP_INFO, b"\0\1first"),
        (nbd.REP_INFO, b"\0\2the first disk"),
        (nbd.REP_INFO, struct.pack(">HIII", 3, 1, 4096, 64 * MIB)),
        (ACK, b""),
    ]
    assert handshake.state is (HandshakeState.TRANSMISSION if number == nbd.GO else HandshakeState.OPTIONS)


@pytest.mark.parametrize("number", [nbd.INFO, nbd.GO, nbd.LIST_META])
def test_unknown_export(number: int) -> None:
    """Row 9: an unknown name is ERR_UNKNOWN, and the session continues."""
    handshake = begin()
    data = meta_data([], "none") if number == nbd.LIST_META else go_data("none")
    assert kinds(handshake, number, data) == [UNKNOWN]
    assert kinds(handshake, nbd.GO, go_data("first"))[-1] == ACK


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0",
        go_data("first")[:-1],
        go_data("first") + b"x",
        struct.pack(">I", 6) + b"first\0\0",
        struct.pack(">I", 0xFFFFFFFF) + b"first\0\0",
        text("first") + b"\0\2\0\1",
        text("first") + b"\xff\xff\0\1",
        go_data(b"\xff\xfe"),
        go_data(b"fi\0rst"),
        go_data(b"x" * 4097),
    ],
)
@pytest.mark.parametrize("number", [nbd.INFO, nbd.GO])
def test_malformed_info_and_go(number: int, data: bytes) -> None:
    """Rows 9 and 13: short, trailing or overlong data and invalid names are ERR_INVALID; the session continues."""
    handshake = begin()
    assert kinds(handshake, number, data) == [INVALID]
    assert kinds(handshake, nbd.GO, go_data("first"))[-1] == ACK


def test_info_then_go() -> None:
    """Row 10: INFO, then GO with the same arguments, give the same, including contexts and structured replies."""
    for negotiated in ((), (nbd.STRUCTURED,), (nbd.EXTENDED,)):
        handshake = begin()
        for number in negotiated:
            assert kinds(handshake, number) == [ACK]
        if negotiated:
            ask(handshake, nbd.SET_META, meta_data(["base:allocation"], "first"))
        data = go_data("first", (1, 2, 3))
        assert ask(handshake, nbd.INFO, data) == ask(handshake, nbd.GO, data)


@pytest.mark.parametrize("name", [b"none", b"\xff", b"first\0", b"x" * 4097, b"FIRST"])
def test_export_name_unknown_closes(name: bytes) -> None:
    """Row 11: EXPORT_NAME has no error reply: the connection ends silently."""
    handshake = begin()
    handshake.receive(option(nbd.EXPORT_NAME, name))
    assert handshake.state is HandshakeState.CLOSED
    assert handshake.take_output() == b""


def test_empty_name_is_the_default() -> None:
    """Row 12: the empty name means the first export, in every option with a name."""
    handshake = begin()
    assert ask(handshake, nbd.INFO, go_data("", (1,)))[1] == (nbd.REP_INFO, b"\0\1first")
    assert kinds(handshake, nbd.LIST_META, meta_data(["base:allocation"]))[-1] == ACK
    handshake.receive(option(nbd.EXPORT_NAME))
    assert handshake.session is not None and handshake.session.export == FIRST


def test_an_export_may_have_an_empty_name() -> None:
    """Row 12: an export whose name is empty is the default, wherever it is in the list."""
    nameless = replace(SECOND, name="")
    handshake = Handshake(lambda: [FIRST, nameless])
    handshake.receive(struct.pack(">I", 3) + option(nbd.GO, go_data("")))
    assert handshake.session is not None and handshake.session.export == nameless


def test_no_exports() -> None:
    """Row 12: without exports there is no default either."""
    handshake = Handshake(list)
    handshake.take_output()
    handshake.receive(struct.pack(">I", 3))
    assert kinds(handshake, nbd.LIST) == [ACK]
    assert kinds(handshake, nbd.GO, go_data("")) == [UNKNOWN]


def test_long_names_and_texts() -> None:
    """Rows 13 and 14: a name of 4096 bytes is served; descriptions and error texts are cut to 4096 bytes."""
    name = "ß" * 2048
    handshake = Handshake(lambda: [replace(FIRST, name=name, description="ß" * 5000 + "x")])
    handshake.take_output()
    handshake.receive(struct.pack(">I", 3))
    listed = ask(handshake, nbd.LIST)[0][1]
    assert listed == text(name) + ("ß" * 2048).encode()
    unknown = ask(handshake, nbd.INFO, go_data("\u20ac" * 1365))
    assert unknown[0][0] == UNKNOWN and len(unknown[0][1]) <= 4096 and unknown[0][1].decode()
    assert kinds(handshake, nbd.GO, go_data(name))[-1] == ACK


# -- structured replies, extended headers, contexts -------------------------------------------------------------


def test_structured_reply() -> None:
    """Rows 15 and 16: agreed on, also twice; only then DF is offered."""
    handshake = begin()
    assert kinds(handshake, nbd.STRUCTURED) == [ACK]
    assert kinds(handshake, nbd.STRUCTURED)[0] in (ACK, INVALID)
    handshake.receive(option(nbd.EXPORT_NAME, b"first"))
    assert handshake.session is not None and handshake.session.structured
    for negotiated, has_df in ((False, False), (True, True)):
        handshake = begin()
        if negotiated:
            ask(handshake, nbd.STRUCTURED)
        flags = struct.unpack(">HQH", ask(handshake, nbd.INFO, go_data("first", ()))[0][1])[2]
        assert bool(flags & nbd.CAN_DF) == has_df


def test_extended_headers() -> None:
    """Extended headers need no structured replies, are negotiated once, and supersede structured replies."""
    handshake = begin()
    assert kinds(handshake, nbd.EXTENDED) == [ACK]
    assert kinds(handshake, nbd.EXTENDED) == [INVALID]
    assert kinds(handshake, nbd.STRUCTURED) == [nbd.EXT_REQD]
    assert kinds(handshake, nbd.GO, go_data("first"))[-1] == ACK
    assert handshake.session is not None and handshake.session.extended and handshake.session.structured


def test_extended_headers_exclude_export_name() -> None:
    """After extended headers EXPORT_NAME is illegal, and has no error reply."""
    handshake = begin()
    ask(handshake, nbd.EXTENDED)
    handshake.receive(option(nbd.EXPORT_NAME, b"first"))
    assert handshake.state is HandshakeState.CLOSED


@pytest.mark.parametrize(("contexts", "offered"), [(["base:allocation"], True), (["x:y"], False), (None, False)])
def test_status_payload_is_offered_with_contexts_only(contexts: list[str] | None, offered: bool) -> None:
    """BLOCK_STATUS_PAYLOAD is advertised after extended headers if there is a context to filter."""
    handshake = begin()
    ask(handshake, nbd.EXTENDED)
    if contexts is not None:
        ask(handshake, nbd.SET_META, meta_data(contexts, "first"))
    flags = struct.unpack(">HQH", ask(handshake, nbd.GO, go_data("first", ()))[0][1])[2]
    assert bool(flags & nbd.STATUS_PAYLOAD) == offered


@pytest.mark.parametrize(
    ("queries", "found"),
    [
        ([], CONTEXTS),
        (["base:"], CONTEXTS[:1]),
        (["base:allocation"], CONTEXTS[:1]),
        (["qemu:"], CONTEXTS[1:]),
        (["qemu:dirty-bitmap:"], CONTEXTS[2:]),
        (["base:nothing"], ()),
        (["x-other:", "x-other:thing"], ()),
        (["qemu:allocation-depth", "base:", "base:allocation"], CONTEXTS[:2]),
    ],
)
def test_list_meta_context(queries: list[str], found: tuple[str, ...]) -> None:
    """Row 17: no query lists all, a namespace its own, unknown ones are ignored; the ids are 0."""
    handshake = begin()
    for _ in range(2):
        replies = ask(handshake, nbd.LIST_META, meta_data(queries, "first"))
        assert names(replies) == list(found)
        assert all(payload[:4] == bytes(4) for _, payload in replies[:-1])
        assert kinds(handshake, nbd.STRUCTURED) == [ACK]


@pytest.mark.parametrize("number", [nbd.LIST_META, nbd.SET_META])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        text("first"),
        text("first") + b"\0\0\0\1",
        text("first") + b"\0\0\0\1\0\0\0\5base",
        meta_data(["base:allocation"], "first") + b"x",
        text("first") + struct.pack(">I", 1) + text(b"\xff"),
        text("first") + struct.pack(">I", 1) + text("base:" + "x" * 4096),
    ],
)
def test_malformed_queries(number: int, data: bytes) -> None:
    """Rows 13 and 17: a query that is short, overlong or not valid text is ERR_INVALID."""
    handshake = begin()
    ask(handshake, nbd.STRUCTURED)
    assert kinds(handshake, number, data) == [INVALID]


def test_too_many_queries() -> None:
    """Rows 6 and 17: more queries than a client can use are ERR_TOO_BIG, and the count alone costs nothing."""
    handshake = begin()
    ask(handshake, nbd.STRUCTURED)
    assert kinds(handshake, nbd.SET_META, text("first") + b"\xff\xff\xff\xff") == [nbd.TOO_BIG]
    assert kinds(handshake, nbd.SET_META, meta_data(["x:y"] * 256, "first")) == [ACK]


def test_set_meta_context_needs_structured_replies() -> None:
    """Row 18: before them it is ERR_INVALID."""
    handshake = begin()
    assert kinds(handshake, nbd.SET_META, meta_data(["base:allocation"], "first")) == [INVALID]
    assert selected(handshake) == []


def test_set_meta_context() -> None:
    """Row 18: exact names are selected once each, with ids that differ; `base:` and no query select nothing."""
    handshake = begin()
    ask(handshake, nbd.STRUCTURED)
    assert names(ask(handshake, nbd.SET_META, meta_data(["base:", "qemu:"], "first"))) == []
    assert names(ask(handshake, nbd.SET_META, meta_data([], "first"))) == []
    queries = [CONTEXTS[3], CONTEXTS[0], CONTEXTS[0], "x:y"]
    replies = ask(handshake, nbd.SET_META, meta_data(queries, "first"))
    assert set(names(replies)) == {CONTEXTS[0], CONTEXTS[3]} and len(replies) == 3
    ids = [payload[:4] for _, payload in replies[:-1]]
    assert len(set(ids)) == 2
    assert selected(handshake) == names(replies)


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (meta_data([], "first"), ACK),
        (meta_data(["x:y"], "first"), ACK),
        (meta_data(["base:allocation"], "none"), UNKNOWN),
        (meta_data(["base:allocation"], "first")[:-1], INVALID),
        (text("first") + b"\xff\xff\xff\xff", nbd.TOO_BIG),
        (bytes(64 * KIB + 1), nbd.TOO_BIG),
    ],
)
def test_every_set_replaces_the_old_one(data: bytes, answer: int) -> None:
    """Row 18: even one that fails clears the earlier selection."""
    handshake = begin()
    ask(handshake, nbd.STRUCTURED)
    assert names(ask(handshake, nbd.SET_META, meta_data(["base:allocation"], "first"))) == ["base:allocation"]
    assert kinds(handshake, nbd.SET_META, data) == [answer]
    assert selected(handshake) == []


def test_contexts_of_another_export_are_void() -> None:
    """Row 19: they were set for one export, and another one is entered."""
    handshake = begin()
    ask(handshake, nbd.STRUCTURED)
    ask(handshake, nbd.SET_META, meta_data(["base:allocation"], "first"))
    assert selected(handshake, "zweite ß") == []


def test_list_leaves_the_selection_alone() -> None:
    """Row 18: listing contexts changes nothing."""
    handshake = begin()
    ask(handshake, nbd.STRUCTURED)
    ask(handshake, nbd.SET_META, meta_data(["base:allocation"], "first"))
    ask(handshake, nbd.LIST_META, meta_data(["qemu:"], "first"))
    assert selected(handshake) == ["base:allocation"]
