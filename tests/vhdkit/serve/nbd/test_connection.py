# SPDX-License-Identifier: Apache-2.0
"""One client from accept to close: options in pieces, TCP, half-closed sockets, bugs in the server."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import replace

import pytest

from tests import nbd_client as nbd
from tests.nbd_client import READ, WRITE, ZEROES, Client, serving
from tests.vhdkit.serve.disks import SIZE, child, export_of, sparse
from tests.waiting import wait_until
from vhdkit.arguments import Size
from vhdkit.disk import Disk
from vhdkit.serve.nbd import memory
from vhdkit.serve.nbd.connection import Connection
from vhdkit.serve.nbd.serving import MAX_JOBS
from vhdkit.units import KIB, MIB, SECTOR_SIZE

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


def test_requests_behind_a_handshake_with_much_output() -> None:
    """Requests right behind GO are answered also if GO's answer reaches the limit of output."""
    scene = child()
    with serving(export_of(scene)) as running, running.connect() as client:
        running.server.memory.limits = replace(memory.AMPLE, option_bytes=1)
        client._asked[3] = (READ, 512, 512)
        go = nbd.option(nbd.GO, nbd.go_data("", ()))
        client.send_bytes(b"\0\0\0\3" + go + nbd.request(READ, 512, 512, cookie=3))
        assert len(client.take(18)) == 18
        assert client.option_replies(nbd.GO)[-1] == (nbd.ACK, b"")
        client.sock.settimeout(10)
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
            patch.setattr(Disk, "try_read_whole", broken)
            client.send(READ, 0, 512)
            assert client.is_hung_up()
        assert len(other.read(0, 512)) == 512


def test_hanging_up_ends_what_nobody_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that hangs up while the server reads nothing from it is noticed: its long commands are cut short."""
    export = export_of(sparse(256 * MIB))
    began, go_on, slices = threading.Event(), threading.Event(), 0

    def zero(offset: int, size: int) -> None:
        nonlocal slices
        slices += 1
        began.set()
        assert go_on.wait(60)
        time.sleep(0.01)  # so that the next slice is not longer

    monkeypatch.setattr(export.disk, "write_zeroes", zero)
    with serving(export) as running:
        client = running.client()
        client.send_bytes(b"".join(nbd.request(ZEROES, 0, 256 * MIB, cookie=number) for number in range(MAX_JOBS)))
        assert began.wait(60)
        wait_until(lambda: running.server.connections[0]._in_progress() == MAX_JOBS, "all to be in jobs")
        client.sock.close()
        wait_until(lambda: not running.server.connections, "the connection to be closed")
        go_on.set()
        wait_until(lambda: not export.jobs, "the job to end")
        assert slices == 1


def test_the_end_waits_for_a_long_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that ends answers a long read in full, also one whose socket accepts more than it sends in a turn."""
    monkeypatch.setattr(memory, "AMPLE", replace(memory.AMPLE, offer_bytes=4 * KIB))
    with serving(export_of(sparse(4 * MIB))) as running, running.client() as client:
        client.call(WRITE, 0, 4 * MIB, payload=b"x" * (4 * MIB))
        cookie = client.send(READ, 0, 4 * MIB)
        head = client.sock.recv(16)
        running.server.stop()
        assert head and client.take(4 * MIB) == b"x" * (4 * MIB)
        assert cookie and client.is_hung_up()


@pytest.mark.parametrize("warm", [True, False], ids=["at once", "in jobs"])
def test_parts_of_a_long_read_share_no_sector(monkeypatch: pytest.MonkeyPatch, *, warm: bool) -> None:
    """An unaligned long read is cut between sectors: otherwise a sector could be half old and half new."""
    monkeypatch.setattr(memory, "AMPLE", replace(memory.AMPLE, offer_bytes=10_000, piece_bytes=10_000))
    export = export_of(sparse(4 * MIB))
    parts: list[int] = []
    read_at_once, read_in_job = Disk.try_read_flat, Disk.read

    def at_once(disk: Disk, offset: int, room: memoryview) -> bool:
        parts.append(offset)
        return warm and read_at_once(disk, offset, room)

    def in_job(disk: Disk, offset: Size, size: Size) -> bytes:
        parts.append(int(offset))
        return read_in_job(disk, offset, size)

    with serving(export) as running, running.client() as client:
        client.call(WRITE, 0, 4 * MIB, payload=b"x" * (4 * MIB))
        monkeypatch.setattr(Disk, "try_read_flat", at_once)
        monkeypatch.setattr(Disk, "read", in_job)
        assert client.read(100, 100_000) == b"x" * 100_000
        assert len(set(parts)) > 9 and {one % SECTOR_SIZE for one in parts if one != 100} == {0}


def test_pieces_of_a_payload_that_have_arrived_are_written_in_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """What arrives while a piece of a long payload is written is taken without another event of the loop."""
    monkeypatch.setattr(memory, "AMPLE", replace(memory.AMPLE, input_bytes=64 * KIB))
    export, data = export_of(sparse(MIB)), bytes(range(256)) * 768
    write, react, all_sent = export.disk.try_write_flat, Connection._react, threading.Event()
    seen: list[str] = []

    def slow_write(offset: int, piece: memoryview) -> bool:
        assert all_sent.wait(30)
        seen.append("piece")
        return write(offset, piece)

    def noted_react(connection: Connection, events: int) -> None:
        seen.append("event")
        react(connection, events)

    monkeypatch.setattr(export.disk, "try_write_flat", slow_write)
    monkeypatch.setattr(Connection, "_react", noted_react)
    with serving(export) as running, running.client() as client:
        client.send(WRITE, 0, payload=data)
        all_sent.set()
        assert client.answer().error == 0
        assert seen[seen.index("piece") :][:3] == ["piece"] * 3
        assert client.read(0, len(data)) == data


def test_a_full_buffer_is_no_end_of_the_stream() -> None:
    """While kept input fills the buffer, nothing is received, and the client stays connected."""
    with serving(export_of(child())) as running, running.client() as client:
        connection, size, seen = running.server.connections[0], len(running.server.buffer), []

        def fill() -> None:
            connection._kept = bytes(size)
            connection._receive()
            seen.append((len(connection._kept), connection._ending))
            connection._kept = b""

        client.read(0, 512)
        running.server.loop.post(fill)
        assert len(client.read(0, 512)) == 512
        assert seen == [(size, False)]


def test_jobs_of_others_that_end_while_a_request_is_served() -> None:
    """A request may end a job of another client, whose next input is then due: the input of the first stays whole."""
    content = bytearray(MIB)

    def send_writes(client: Client, count: int, begin: int, step: int, first_size: int, size: int) -> None:
        raw = []
        for number in range(1, count + 1):
            place, data = begin + number * step, bytes([number]) * (first_size if number == 1 else size)
            client._asked[number] = (WRITE, place, 0)
            raw.append(nbd.request(WRITE, place, len(data), cookie=number) + data)
            content[place : place + len(data)] = data
        client.send_bytes(b"".join(raw))

    with serving(export_of(sparse(MIB))) as running, running.client() as first, running.client() as other:
        jobs = running.server.jobs
        may_begin, jobs._may_begin = jobs._may_begin, lambda client: False  # type: ignore[method-assign]
        send_writes(other, 2 * MAX_JOBS, MIB // 2, 1, 1, 1)  # half of them wait as input
        wait_until(lambda: sum(bool(one._kept) for one in running.server.connections) == 1, "its jobs wait")
        jobs._may_begin = may_begin  # type: ignore[method-assign]
        send_writes(first, 8, 0, 4 * KIB, 700, 512)
        assert not any(answer.error for answer in first.answers(8).values())
        assert not any(answer.error for answer in other.answers(2 * MAX_JOBS).values())
        assert first.read(0, MIB) == content
