# SPDX-License-Identifier: Apache-2.0
"""Requests of one client at a real server: reads, writes, refusals, drained payloads, failing storage."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time

import pytest

from tests import nbd_client as nbd
from tests.harness.power import open_mem
from tests.harness.stores import CrashStore, Fault, FaultyStore, io_failed, no_space, sync_failed
from tests.nbd_client import (
    CACHE,
    DF,
    DISC,
    EINVAL,
    EIO,
    ENOSPC,
    EPERM,
    FLUSH,
    FUA,
    READ,
    STATUS,
    TRIM,
    WRITE,
    ZEROES,
    Client,
    HungUp,
    Running,
    serving,
)
from tests.vhdkit.serve.disks import SIZE, child, empty, export_of, sparse
from tests.waiting import wait_until
from vhdkit import errors
from vhdkit.units import KIB, MIB

pytestmark = pytest.mark.timeout(120)
MODES = pytest.mark.parametrize(
    "mode", [{}, {"structured": True}, {"extended": True}], ids=["simple", "structured", "extended"]
)
Mode = dict[str, bool]


def connect(running: Running, mode: Mode) -> Client:
    """A client with that kind of framing."""
    return running.client(structured=mode.get("structured", False), extended=mode.get("extended", False))


@MODES
def test_reads_of_every_shape(mode: Mode) -> None:
    """Rows 16, 34 and 35: reads of all sizes and offsets answer each byte once, also in holes and with DF."""
    scene, rng = child(), random.Random(1)
    with serving(export_of(scene)) as running, connect(running, mode) as client:
        assert client.size == SIZE
        places = [(0, SIZE), (1, SIZE - 2), (0, 1), (SIZE - 1, 1), (511, 2), (0, MIB), (0, MIB + 1), (7, 64 * KIB)]
        places += [(offset := rng.randrange(SIZE), rng.randrange(1, SIZE - offset + 1)) for _ in range(25)]
        for offset, length in places:
            assert client.read(offset, length) == scene.content[offset : offset + length]
            if client.structured and length <= MIB:
                answer = client.call(READ, offset, length, flags=DF)
                assert answer.content(offset, length) == scene.content[offset : offset + length]
                assert len(answer.data) == 1 and not answer.holes


@MODES
def test_writes_of_every_shape(mode: Mode) -> None:
    """Row 25: writes of all sizes, aligned or not, with and without FUA, read back; neighbours are unchanged."""
    scene, rng = child(), random.Random(2)
    model = bytearray(scene.content)
    with serving(export_of(scene)) as running, connect(running, mode) as client:
        places = [(0, SIZE), (1, SIZE - 2), (3, 5), (SIZE - 1, 1), (4096, 70000), (12345, MIB)]
        places += [(offset := rng.randrange(SIZE), rng.randrange(1, SIZE - offset + 1)) for _ in range(15)]
        for number, (offset, length) in enumerate(places):
            data = rng.randbytes(length)
            assert client.call(WRITE, offset, payload=data, flags=FUA * (number % 2)).error == 0
            model[offset : offset + length] = data
        assert client.read(0, SIZE) == model


def test_pieces_of_a_payload_end_at_whole_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """However a long payload arrives, no page is written in two parts, which would make the kernel read it first."""
    export, ends = export_of(empty()), []
    write = export.disk.try_write_flat

    def noted(offset: int, piece: memoryview) -> bool:
        ends.append(offset + len(piece))
        return write(offset, piece)

    monkeypatch.setattr(export.disk, "try_write_flat", noted)
    start, data = 5 * 512, random.Random(4).randbytes(700_000 // 512 * 512)
    with serving(export) as running, connect(running, {}) as client:
        raw = nbd.request(WRITE, start, len(data), cookie=5) + data
        client._asked[5] = (WRITE, start, len(data))
        for place in range(0, len(raw), 10_007):
            client.send_bytes(raw[place : place + 10_007])
        assert client.answer().error == 0
        assert client.read(start, len(data)) == data
    assert len(ends) > 1 and ends[-1] == start + len(data)
    assert not any(end % (64 * KIB) for end in ends[:-1])


@MODES
def test_dribbled_bytes(mode: Mode) -> None:
    """A client that sends byte by byte is answered like any other."""
    with serving(export_of(empty())) as running, connect(running, mode) as client:
        flags = nbd.PAYLOAD_LEN if client.extended else 0
        raw = nbd.request(WRITE, 1000, 600, flags=flags, cookie=5, extended=client.extended) + b"x" * 600
        client._asked[5] = (WRITE, 1000, 600)
        for place in range(len(raw)):
            client.send_bytes(raw[place : place + 1])
        assert client.answer().error == 0
        assert client.read(999, 602) == b"\0" + b"x" * 600 + b"\0"


@MODES
def test_pipelined_flood(mode: Mode) -> None:
    """Row 32: 1,500 requests sent while answers come back are all answered, each by its cookie."""
    scene = child()
    with serving(export_of(scene)) as running, connect(running, mode) as client:
        rng = random.Random(3)
        places = [(rng.randrange(0, SIZE - 9000), rng.choice((1, 512, 4096, 8192))) for _ in range(1500)]
        asked: dict[int, tuple[int, int]] = {}

        def ask() -> None:
            for place in places:
                asked[client.send(READ, *place)] = place

        sender = threading.Thread(target=ask)
        sender.start()
        answers = client.answers(len(places))
        sender.join()
        for cookie, answer in answers.items():
            offset, length = asked[cookie]
            assert answer.content(offset, length) == scene.content[offset : offset + length]


@MODES
@pytest.mark.parametrize(
    ("offset", "size", "flags", "error"),
    [
        (0, 512, 0x8000, EINVAL),
        (0, 100_000, nbd.NO_HOLE, EINVAL),
        (SIZE, 1, 0, ENOSPC),
        (SIZE - 1, 70_000, 0, ENOSPC),
        ((1 << 64) - 1, 4096, 0, EINVAL),
        (0, 3 * MIB, 0, ENOSPC),
    ],
)
def test_refused_writes_are_drained(mode: Mode, offset: int, size: int, flags: int, error: int) -> None:
    """Row 25: a refused WRITE takes its payload with it, the next request is understood, and nothing is changed."""
    with serving(export_of(empty())) as running, connect(running, mode) as client:
        payload = nbd.request(TRIM, 0, 512, cookie=666, extended=client.extended) * (size // 28 + 1)
        assert client.call(WRITE, offset, payload=payload[:size], flags=flags).error == error
        assert client.read(0, SIZE) == bytes(SIZE)


def test_oversized_write_is_drained() -> None:
    """Row 35: a WRITE of 65 MiB is refused, drained without being kept, and the session continues."""
    with serving(export_of(empty())) as running, running.client() as client:
        assert client.call(WRITE, 0, payload=bytes(65 * MIB)).error in (EINVAL, ENOSPC)
        assert client.read(0, 512) == bytes(512)


def test_oversized_payload_of_extended_headers_hangs_up() -> None:
    """Row 35: with extended headers a payload beyond the maximum ends the connection."""
    with serving(export_of(empty())) as running, running.client(extended=True) as client:
        client.send_bytes(nbd.request(WRITE, 0, 1 << 40, flags=nbd.PAYLOAD_LEN, extended=True))
        assert client.is_hung_up()


@MODES
def test_read_only(mode: Mode) -> None:
    """Rows 23 and 27: a read-only export advertises it, refuses with EPERM, drains, and still reads and flushes."""
    scene = child()
    with serving(export_of(scene, read_only=True)) as running, connect(running, mode) as client:
        assert client.flags & nbd.READ_ONLY and client.flags & nbd.HAS_FLAGS
        assert not client.flags & (nbd.CAN_TRIM | nbd.CAN_ZERO | nbd.CAN_FAST_ZERO)
        assert client.call(WRITE, 0, payload=b"x" * 100_000).error == EPERM
        assert client.call(ZEROES, 0, 512).error == client.call(TRIM, 0, 512).error == EPERM
        assert client.call(FLUSH).error == 0
        assert client.read(0, SIZE) == scene.content


@MODES
def test_odd_requests_leave_the_session_alone(mode: Mode) -> None:
    """Rows 25, 28 and 29: unknown commands, overflows, zero lengths: each is answered, and the session continues."""
    scene = child()
    with serving(export_of(scene)) as running, connect(running, mode) as client:
        assert client.call(99, 0, 512).error == EINVAL
        assert client.call(READ, (1 << 64) - 1, 512).error == EINVAL
        assert client.call(READ, SIZE, 1).error == EINVAL
        assert client.call(STATUS, 0, 512).error == EINVAL
        assert client.call(FLUSH, 0, 1).error == EINVAL
        for command in (READ, WRITE, TRIM, CACHE, ZEROES, STATUS):
            for flags in (0, FUA):
                assert client.call(command, 512, 0, flags=flags).error in (0, EINVAL)
        assert client.call(CACHE, 0, SIZE, flags=FUA).error == 0
        assert client.read(0, SIZE) == scene.content


@pytest.mark.parametrize("raw", [b"\0" * 28, b"GET / HTTP/1.1\r\n\r\n0123456789", bytes(range(100)), b"\xff" * 9000])
def test_bad_magic_hangs_up(raw: bytes) -> None:
    """Row 24: garbage ends that connection only."""
    with serving(export_of(empty())) as running, running.client() as other, running.client() as client:
        client.send_bytes(raw)
        assert client.is_hung_up()
        assert other.read(0, 512) == bytes(512)


@MODES
def test_disconnect(mode: Mode) -> None:
    """Row 31: DISC lets requests in flight finish, is not answered itself, and closes."""
    with serving(export_of(empty())) as running, connect(running, mode) as client:
        cookies = {client.send(WRITE, 512 * number, payload=b"d" * 512, flags=FUA) for number in range(20)}
        cookies.add(client.send(FLUSH))
        client.send(DISC)
        answers = client.answers(21)
        assert set(answers) == cookies and not any(answer.error for answer in answers.values())
        with pytest.raises(HungUp):
            client.answer()


def test_disconnecting_inside_a_request() -> None:
    """A client that disconnects inside a request or a payload leaves nothing behind."""
    scene = empty()
    with serving(export_of(scene)) as running:
        for raw in (b"\x25", nbd.request(READ, 0, 512)[:27], nbd.request(WRITE, 0, 4096) + b"x" * 4000):
            client = running.client()
            client.send_bytes(raw)
            client.sock.close()
        with running.client() as client:
            assert client.read(4096, 512) == bytes(512)


def test_long_commands_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 35: a client that zeros its disk twenty times over does not block the workers for others."""
    monkeypatch.setattr("vhdkit.serve.nbd.slices._MOST_BYTES", 256 * KIB)
    with serving(export_of(sparse(64 * MIB))) as running, running.client() as other:
        greedy = running.client(extended=True)
        cookies = {greedy.send(ZEROES, 4096, 60 * MIB, flags=nbd.NO_HOLE) for _ in range(20)}
        running.on_loop()
        assert other.call(WRITE, 5, payload=b"other").error == 0
        assert other.call(FLUSH).error == 0
        greedy.sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            greedy.sock.recv(1)
        greedy.sock.settimeout(nbd.PATIENCE_SECONDS)
        answers = greedy.answers(20)
        assert set(answers) == cookies and not any(answer.error for answer in answers.values())
        assert other.read(0, 12) == b"\0" * 5 + b"other" + b"\0" * 2


def test_a_hold_begins_inside_a_long_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hold begins between two slices of a long command, which then continues and is answered."""
    monkeypatch.setattr("vhdkit.serve.nbd.slices._MOST_BYTES", 256 * KIB)
    export = export_of(sparse(64 * MIB))
    with serving(export) as running, running.client(extended=True) as client:
        client.send(ZEROES, 0, 60 * MIB, flags=nbd.NO_HOLE)
        running.on_loop()
        with running.server.hold([export]):
            assert export.parked and not export.jobs
        assert client.answer().error == 0 and not export.parked
        assert client.read(0, 4096) == bytes(4096)


def test_a_client_that_shuts_down_with_unread_answers() -> None:
    """A client that shuts its socket down both ways but keeps it open does not make the server spin."""
    with serving(export_of(sparse(64 * MIB))) as running:
        client = running.client()
        for _ in range(8):
            client.send(READ, 0, MIB)
        running.on_loop()
        client.sock.shutdown(socket.SHUT_WR)
        client.sock.shutdown(socket.SHUT_RD)
        wait_until(lambda: not running.server.connections, "the server ends the connection", nbd.PATIENCE_SECONDS)


# -- storage that fails -----------------------------------------------------------------------------------------


def in_block(number: int, store: FaultyStore) -> Fault:
    """Reads that begin in the second half of the file fail; `number` is only part of the signature."""
    limit = store.size() // 2
    return Fault("read", io_failed, persistent=True, where=lambda offset: offset >= limit + number)


@MODES
def test_failing_reads(mode: Mode) -> None:
    """Row 33: a bad sector is EIO for the request that needs it; others are served."""
    scene = empty()
    store = FaultyStore(scene.leaf)
    with serving(export_of(scene, store=store)) as running, connect(running, mode) as client:
        data = random.Random(4).randbytes(SIZE)
        for offset in range(0, SIZE, 512 * KIB):
            assert client.call(WRITE, offset, payload=data[offset : offset + 512 * KIB]).error == 0
        store.faults.append(in_block(0, store))
        other = running.client(structured=True)
        cookies = {client.send(READ, offset, 4096): offset for offset in range(0, SIZE - 4096, 100_000)}
        failed = 0
        for cookie, answer in client.answers(len(cookies)).items():
            offset = cookies[cookie]
            failed += answer.error == EIO
            assert answer.error in (0, EIO)
            assert answer.error or answer.content(offset, 4096) == data[offset : offset + 4096]
        assert 0 < failed < len(cookies)
        assert other.read(0, 4096) == data[:4096]
        assert client.read(0, 4096) == data[:4096]
        running.server.exports[0].disk.chain.leaf.store.faults.clear()  # type: ignore[attr-defined]


@MODES
def test_long_read_that_fails_midway(mode: Mode) -> None:
    """Rows 33 and 34: structured, an error chunk ends it, the session continues; simple, the connection closes."""
    scene = empty()
    store = FaultyStore(scene.leaf)
    with serving(export_of(scene, store=store)) as running, connect(running, mode) as client:
        assert client.call(WRITE, 0, payload=b"d" * SIZE).error == 0
        store.faults.append(Fault("read", io_failed, persistent=True, where=lambda offset: offset > SIZE - 40 * KIB))
        cookie = client.send(READ, 0, SIZE)
        if client.structured:
            answer = client.answer()
            assert (answer.cookie, answer.error) == (cookie, EIO)
            assert all(set(raw) == {ord("d")} for _, raw in answer.data)
            assert client.read(0, 4096) == b"d" * 4096
        else:
            with pytest.raises(HungUp):
                client.answer()
        assert running.client().read(0, 4096) == b"d" * 4096
        store.faults.clear()


@MODES
def test_full_file_system(mode: Mode) -> None:
    """Row 27: ENOSPC stays ENOSPC, for that write only; writes that need no space succeed."""
    scene = empty()
    store = FaultyStore(scene.leaf)
    with serving(export_of(scene, store=store)) as running, connect(running, mode) as client:
        assert client.call(WRITE, 0, payload=b"a" * 4096).error == 0
        for operation in ("write", "reserve", "truncate"):
            store.faults.append(Fault(operation, no_space, persistent=True, where=lambda offset: offset > 600 * KIB))
        assert client.call(WRITE, MIB, payload=b"b" * 4096).error == ENOSPC
        assert client.call(WRITE, MIB, payload=b"b" * 300_000).error == ENOSPC
        assert client.call(WRITE, 4096, payload=b"c" * 4096).error == 0
        store.faults.clear()
        assert client.call(WRITE, MIB, payload=b"b" * 4096).error == 0
        assert client.read(0, 8192) == b"a" * 4096 + b"c" * 4096


@pytest.mark.parametrize("fua", [False, True])
def test_failed_flush_is_never_forgotten(fua: bool) -> None:
    """Row 30, INV-FLUSHED-OR-NEWER: after one failed sync that FLUSH is EIO, and no later one reports success."""
    scene = empty()
    store = FaultyStore(scene.leaf)
    with pytest.raises(errors.SyncFailed), serving(export_of(scene, store=store)) as running:  # and its end reports it
        client, other = running.client(), running.client(structured=True)
        assert client.call(WRITE, 0, payload=b"lost").error == 0
        store.faults.append(Fault("sync", sync_failed))
        if fua:
            assert client.call(WRITE, 512, payload=b"lost", flags=FUA).error == EIO
        else:
            assert client.call(FLUSH).error == EIO
        for one in (client, other):
            assert one.call(FLUSH).error != 0
            assert one.call(WRITE, 0, payload=b"more", flags=FUA).error != 0
            assert one.call(READ, 512, 512).error == 0


# -- power cuts -------------------------------------------------------------------------------------------------


def survives(store: CrashStore, offset: int, data: bytes) -> bool:
    """Whether the data survives every outcome of a power cut right now."""
    for seed in range(12):
        with open_mem(store.after_cut(random.Random(seed))) as disk:
            if disk.read(offset, len(data)) != data:
                return False
    return True


@MODES
@pytest.mark.parametrize("size", [1, 512, 4096, 100_001, MIB + 512])
def test_fua_is_durable_when_answered(mode: Mode, size: int) -> None:
    """Rows 26 and 31, INV-FLUSHED-OR-NEWER: a FUA write survives a power cut right after its answer."""
    store = CrashStore(empty().leaf)
    data = random.Random(size).randbytes(size)
    with serving(export_of(empty(), store=store)) as running, connect(running, mode) as client:
        assert client.call(WRITE, 600, payload=data, flags=FUA).error == 0
        assert survives(store, 600, data)
        assert client.call(ZEROES, 600, size, flags=FUA).error == 0
        assert survives(store, 600, bytes(size))
        unsure = client.call(WRITE, 600, payload=data)
        assert unsure.error == 0 and not survives(store, 600, data), "the test could not fail"


def test_flush_covers_all_connections() -> None:
    """Row 30: MULTI_CONN: written on B and flushed on C, data is durable and readable on A."""
    store = CrashStore(empty().leaf)
    with serving(export_of(empty(), store=store)) as running:
        clients = [running.client(), running.client(structured=True), running.client(extended=True)]
        assert all(client.flags & nbd.MULTI_CONN for client in clients)
        for turn in range(6):
            a, b, c = (clients[(turn + number) % 3] for number in range(3))
            data = bytes([turn + 1]) * 5000
            assert b.call(WRITE, 5000 * turn, payload=data).error == 0
            assert c.call(FLUSH).error == 0
            assert survives(store, 5000 * turn, data)
            assert a.read(5000 * turn, 5000) == data


def test_flushes_are_shared_but_never_early() -> None:
    """Row 30: a write answered during a slow flush is covered by the next flush, not by this one."""

    class Slow(CrashStore):
        def sync(self) -> None:
            super().sync()
            time.sleep(0.02)  # later writes are not in this sync

    store = Slow(empty().leaf)
    with serving(export_of(empty(), store=store)) as running:
        first, second = running.client(), running.client()
        for turn in range(8):
            first.call(WRITE, 0, payload=bytes([turn]) * 512)
            flushing = first.send(FLUSH)
            data = struct.pack(">I", turn) * 128
            assert second.call(WRITE, 4096 * (turn + 1), payload=data).error == 0
            assert second.call(FLUSH).error == 0
            assert survives(store, 4096 * (turn + 1), data)
            assert first.answer().cookie == flushing
