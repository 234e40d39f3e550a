# SPDX-License-Identifier: Apache-2.0
"""One client from accept to close: options in pieces, TCP, half-closed sockets, bugs in the server."""

from __future__ import annotations

import socket

import pytest

from tests import nbd_client as nbd
from tests.nbd_client import READ, Client, serving
from tests.vhdkit.serve.disks import SIZE, child, export_of
from vhdkit.disk import Disk

pytestmark = pytest.mark.timeout(60)


def test_handshake_byte_by_byte_with_requests_behind() -> None:
    """A session sent byte by byte, its first request right behind GO, is answered as any other."""
    scene = child()
    with serving(export_of(scene)) as running, running.connect() as client:
        options = nbd.option(99, b"junk") + nbd.option(nbd.GO, nbd.go_data("", ()))
        raw = b"\0\0\0\3" + options + nbd.request(READ, 512, 512, cookie=3)
        client._asked[3] = (READ, 512, 512)
        for place in range(len(raw)):
            client.send_bytes(raw[place : place + 1])
        assert len(client.take(18)) == 18
        assert client.option_replies(99)[0][0] == nbd.UNSUP
        assert client.option_replies(nbd.GO)[-1] == (nbd.ACK, b"")
        assert client.answer().data == [(512, scene.content[512:1024])]


def test_abort_without_waiting() -> None:
    """Row 7: a client that sends ABORT and disconnects causes no error."""
    with serving(export_of(child())) as running, running.client() as good:
        for _ in range(20):
            client = running.connect()
            client.send_bytes(b"\0\0\0\3" + nbd.option(nbd.ABORT))
            client.sock.close()
        with running.connect() as polite:
            polite.greet()
            assert polite.option(nbd.ABORT) == [(nbd.ACK, b"")]
            assert polite.is_hung_up()
        assert len(good.read(0, 512)) == 512


def test_half_closed() -> None:
    """A client that sends its requests and closes that direction still receives all answers."""
    with serving(export_of(child())) as running, running.client(structured=True) as client:
        cookies = {client.send(READ, 0, SIZE), *(client.send(READ, 3 * number, 700) for number in range(20))}
        client.sock.shutdown(socket.SHUT_WR)
        assert set(client.answers(21)) == cookies
        assert client.is_hung_up()


def test_tcp() -> None:
    """Row 42: on TCP the server's side has TCP_NODELAY, and serves."""
    with serving(export_of(child())) as running:
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        address = listener.getsockname()
        running.server.loop.post(lambda: running.server.listen(listener))
        running.on_loop()
        with Client(socket.create_connection(address)) as client:
            assert len(client.start().go().read(0, SIZE)) == SIZE
            theirs = running.server.connections[0]._channel._sock
            assert theirs.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_bug_ends_only_one_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unforeseen exception ends the connection in which it occurred and does not affect the others."""
    with serving(export_of(child())) as running:
        client, other = running.client(), running.client()

        def broken(*args: object) -> bool:
            raise ZeroDivisionError

        with monkeypatch.context() as patch:
            patch.setattr(Disk, "try_read_flat", broken)
            client.send(READ, 0, 512)
            assert client.is_hung_up()
        assert len(other.read(0, 512)) == 512
