# SPDX-License-Identifier: Apache-2.0
"""The handshake: TLS, its end, and limits on what a client can make it keep."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import nbd_client as nbd
from tests.nbd_client import ACK, INVALID, UNSUP, go_data, meta_data, option, option_replies
from tests.vhdkit.serve.nbd.talking import (
    CONTEXTS,
    FIRST,
    begin,
    catalog,
    feed,
    kinds,
    selected,
)
from vhdkit.serve.nbd import options as nbd_options
from vhdkit.serve.nbd.options import Handshake, HandshakeState, TlsMode

# -- TLS --------------------------------------------------------------------------------------------------------


def secured(tls: TlsMode = TlsMode.REQUIRED, *before: tuple[int, bytes], behind: bytes = b"") -> Handshake:
    """A handshake that has become encrypted, after some options and with plain text behind STARTTLS."""
    handshake = begin(tls=tls)
    for number, data in before:
        assert kinds(handshake, number, data)[-1] == ACK
    handshake.receive(option(nbd.STARTTLS) + behind)
    assert option_replies(handshake.take_output()) == [(nbd.STARTTLS, ACK, b"")]
    assert handshake.state is HandshakeState.TLS
    handshake.secured()
    return handshake


def test_tls_forgets_what_was_agreed() -> None:
    """Row 20: structured replies, extended headers and contexts agreed before TLS are dropped."""
    contexts = (nbd.SET_META, meta_data(["base:allocation"], "first"))
    for number in (nbd.STRUCTURED, nbd.EXTENDED):
        handshake = secured(TlsMode.OFFERED, (number, b""), contexts)
        assert kinds(handshake, nbd.SET_META, contexts[1]) == [INVALID]
        assert selected(handshake) == []
        assert handshake.session is not None and not handshake.session.structured and not handshake.session.extended


def test_no_tls() -> None:
    """Row 21: a server without TLS refuses STARTTLS by policy, and continues."""
    handshake = begin()
    assert kinds(handshake, nbd.STARTTLS)[0] in (nbd.POLICY, UNSUP)
    assert kinds(handshake, nbd.GO, go_data("first"))[-1] == ACK


@pytest.mark.parametrize("number", [nbd.LIST, nbd.INFO, nbd.GO, nbd.STRUCTURED, nbd.LIST_META, nbd.EXTENDED, 99])
def test_required_tls(number: int) -> None:
    """Row 21: if TLS is required, every option but STARTTLS and ABORT is ERR_TLS_REQD."""
    handshake = begin(tls=TlsMode.REQUIRED)
    assert kinds(handshake, number, go_data("first")) == [nbd.TLS_REQD]
    assert kinds(handshake, nbd.ABORT) == [ACK]


def test_required_tls_closes_export_name() -> None:
    """Rows 11 and 21: EXPORT_NAME without TLS ends the connection."""
    handshake = begin(tls=TlsMode.REQUIRED)
    handshake.receive(option(nbd.EXPORT_NAME, b"first"))
    assert (handshake.state, handshake.take_output()) == (HandshakeState.CLOSED, b"")


def test_offered_tls_is_a_choice() -> None:
    """Row 21: if TLS is offered, clients may go without it."""
    assert kinds(begin(tls=TlsMode.OFFERED), nbd.GO, go_data("first"))[-1] == ACK


def test_tls_twice() -> None:
    """Row 21: STARTTLS inside TLS, and STARTTLS with data, are ERR_INVALID."""
    assert kinds(secured(), nbd.STARTTLS) == [INVALID]
    assert kinds(begin(tls=TlsMode.OFFERED), nbd.STARTTLS, b"x") == [INVALID]


def test_plain_text_behind_starttls_is_dropped() -> None:
    """Row 22: injected plain text is not taken for data of the encrypted client."""
    handshake = secured(TlsMode.OFFERED, behind=option(nbd.STRUCTURED) + option(nbd.GO, go_data("first")))
    assert handshake.state is HandshakeState.OPTIONS and handshake.take_output() == b""
    handshake.receive(b"")
    assert handshake.take_output() == b""
    assert kinds(handshake, nbd.SET_META, meta_data([], "first")) == [INVALID]


# -- ending and bounds ------------------------------------------------------------------------------------------


def test_shutting_down() -> None:
    """Row 41: options are answered with ERR_SHUTDOWN, ABORT with ACK, EXPORT_NAME by closing."""
    handshake = begin()
    handshake.shut_down()
    assert kinds(handshake, nbd.GO, go_data("first")) == [nbd.SHUTDOWN]
    assert kinds(handshake, nbd.ABORT) == [ACK]
    handshake = begin()
    handshake.shut_down()
    handshake.receive(option(nbd.EXPORT_NAME, b"first"))
    assert handshake.state is HandshakeState.CLOSED


def test_first_requests_behind_go_are_handed_on() -> None:
    """A client may send requests right behind GO: no byte of them is lost."""
    handshake = begin()
    handshake.receive(option(nbd.GO, go_data("first")) + b"requests")
    assert handshake.state is HandshakeState.TRANSMISSION
    assert handshake.take_rest() == b"requests"


def test_flood_of_lists_is_answered_in_turns() -> None:
    """Row 6: 500 pipelined LISTs with long answers wait for space instead of filling the memory."""
    long = replace(FIRST, description="x" * 4096)
    handshake = Handshake(lambda: [replace(long, name=f"disk {number}") for number in range(20)])
    handshake.receive(struct.pack(">I", 3) + option(nbd.LIST) * 500)
    said, longest = 0, 0
    while handshake.output:
        longest = max(longest, len(handshake.output))
        said += len(handshake.take_output())
        handshake.receive(b"")
    assert longest < nbd_options.MAX_OUTPUT_BYTES + 21 * 5000
    assert said > 500 * 20 * 4096
    assert not handshake.is_held_back


OPTIONS = st.one_of(
    st.builds(option, st.sampled_from([nbd.INFO, nbd.GO]), st.builds(go_data, st.sampled_from(["", "first", "no"]))),
    st.builds(
        option,
        st.sampled_from([nbd.LIST_META, nbd.SET_META]),
        st.builds(
            meta_data,
            st.lists(st.sampled_from([*CONTEXTS, "base:", "qemu:", "x:y"]), max_size=4),
            st.sampled_from(["", "first", "no", "zweite ß"]),
        ),
    ),
    st.builds(option, st.sampled_from([nbd.LIST, nbd.STRUCTURED, nbd.EXTENDED, nbd.STARTTLS])),
    st.builds(option, st.integers(0, 20), st.binary(max_size=40)),
    st.sampled_from([option(nbd.ABORT), option(nbd.EXPORT_NAME, b"first"), option(99, bytes(70000))]),
    st.binary(max_size=40),
)


@given(st.integers(0, 3), st.lists(OPTIONS, max_size=12), st.sampled_from(list(TlsMode)), st.integers(1, 30))
@settings(max_examples=80)
def test_pieces_do_not_matter(flags: int, options: list[bytes], tls: TlsMode, size: int) -> None:
    """The same conversation, sent whole or in pieces, has the same answers, end and session."""
    data = struct.pack(">I", flags) + b"".join(options)
    ends = []
    for piece in (max(len(data), 1), 1, size):
        handshake = Handshake(catalog, tls=tls)
        said = feed(handshake, data, size=piece)
        ends.append((said, handshake.state, handshake.session))
    assert ends[0] == ends[1] == ends[2]


@given(st.binary(max_size=300), st.booleans())
@settings(max_examples=80)
def test_garbage_is_bounded(data: bytes, after_flags: bool) -> None:
    """Any bytes raise no exception, and no more than one option's header is kept while its data is skipped."""
    handshake = Handshake(catalog, tls=TlsMode.OFFERED)
    handshake.receive(b"\0\0\0\3" if after_flags else b"")
    for start in range(0, len(data), 7):
        handshake.receive(data[start : start + 7])
        assert len(handshake._input) <= 16 + nbd_options.MAX_OPTION_BYTES
