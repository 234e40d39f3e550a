# SPDX-License-Identifier: Apache-2.0
"""Sockets on the loop: TLS from STARTTLS to the end, and plain text injected around it."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import nbd_client as nbd
from tests.nbd_client import FLUSH, FUA, READ, WRITE, Client, HungUp, Running, serving
from tests.support import require_tool, run
from tests.vhdkit.serve.disks import SIZE, child, export_of
from vhdkit.serve.nbd.channel import Channel
from vhdkit.serve.nbd.loop import Loop
from vhdkit.serve.nbd.options import TlsMode
from vhdkit.units import MIB

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a key and a self-signed certificate."""
    folder = tmp_path_factory.mktemp("tls")
    request = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    files = ["-subj", "/CN=localhost", "-keyout", str(folder / "key"), "-out", str(folder / "certificate")]
    run([require_tool("openssl"), *request, *files])
    return folder


@pytest.fixture
def tls(certificate: Path) -> Iterator[Running]:
    """A server that requires TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "certificate", certificate / "key")
    with serving(export_of(child()), tls_context=context, tls_mode=TlsMode.REQUIRED) as running:
        yield running


def encrypt(client: Client, certificate: Path, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> Client:
    """Request TLS and start it."""
    assert client.option(nbd.STARTTLS) == [(nbd.ACK, b"")]
    context = ssl.create_default_context(cafile=certificate / "certificate")
    context.minimum_version = context.maximum_version = version
    client.sock = context.wrap_socket(client.sock, server_hostname="localhost")
    return client


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_everything_over_tls(tls: Running, certificate: Path, version: ssl.TLSVersion) -> None:
    """Row 21: large reads, writes, pipelined requests and flushes over TLS 1.2 and 1.3."""
    scene = child()
    with tls.connect() as client:
        client.greet()
        assert client.option(nbd.LIST)[0][0] == nbd.TLS_REQD
        encrypt(client, certificate, version)
        assert client.option(nbd.STARTTLS)[0][0] == nbd.INVALID
        client.option(nbd.STRUCTURED)
        client.structured = True
        client.go(contexts=["base:allocation"])
        assert client.read(0, SIZE) == scene.content
        data = bytes(range(256)) * 4096
        assert client.call(WRITE, 77, payload=data, flags=FUA).error == 0
        cookies = {client.send(READ, 77 + 4096 * number, 4096) for number in range(50)}
        cookies.add(client.send(FLUSH))
        answers = client.answers(51)
        assert set(answers) == cookies and not any(answer.error for answer in answers.values())
        assert client.read(77, MIB) == data
        tls.server.stop()
        with pytest.raises(HungUp):
            client.take(1)


def test_refused_write_over_tls_is_drained(tls: Running, certificate: Path) -> None:
    """Row 25: a refused payload is drained from the encrypted stream, not from the socket below it."""
    with tls.connect() as client:
        client.greet()
        encrypt(client, certificate).go()
        assert client.call(WRITE, SIZE, payload=b"x" * (3 * MIB)).error == nbd.ENOSPC
        assert client.read(0, 512) == child().content[:512]


@pytest.mark.parametrize("injected", [b"\0", nbd.option(nbd.STRUCTURED), nbd.option(nbd.GO, nbd.go_data(""))])
def test_plain_text_behind_starttls(tls: Running, certificate: Path, injected: bytes) -> None:
    """Row 22: bytes behind STARTTLS in plain text are never answered, in the same packet or before the handshake."""
    client = tls.connect()
    client.greet()
    client.send_bytes(nbd.option(nbd.STARTTLS) + injected)
    assert client.option_replies(nbd.STARTTLS) == [(nbd.ACK, b"")]
    client.send_bytes(injected * 20 + b"x" * 9000)
    said = b""
    with pytest.raises(HungUp):
        while True:
            said += client.take(1)
    assert b"\x00\x03\xe8\x89" not in said and len(said) < 50  # at most a TLS alert
    with tls.connect() as other:
        other.greet()
        assert len(encrypt(other, certificate).go().read(0, 512)) == 512


def test_half_a_tls_handshake_does_not_delay_the_end(tls: Running) -> None:
    """Rows 21 and 41: a client that stops in the middle of its handshake is disconnected when the server ends."""
    client = tls.connect()
    client.greet()
    assert client.option(nbd.STARTTLS) == [(nbd.ACK, b"")]
    tls.on_loop()
    tls.server.stop()
    assert client.is_hung_up()
    tls.join()


def test_unsent_is_kept_and_sent_later() -> None:
    """What a socket does not accept at once is sent later, complete and in order; a buffer is free at once."""
    loop, (ours, theirs) = Loop(), socket.socketpair()
    ours.setblocking(False)
    channel = Channel(loop, ours, lambda events: None)
    buffer = bytearray(b"a" * MIB)
    channel.send(memoryview(buffer))
    buffer[:] = b"z" * MIB
    channel.send(b"b" * MIB)
    assert channel.unsent
    received = bytearray()
    while len(received) < 2 * MIB:
        received += theirs.recv(MIB)
        channel.send_unsent()
    assert received == b"a" * MIB + b"b" * MIB and not channel.unsent
    theirs.close()
    for _ in range(3):
        channel.send(b"unread")
    assert channel.is_closed()
    channel.close()
    loop.close()
