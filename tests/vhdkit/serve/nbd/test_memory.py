# SPDX-License-Identifier: Apache-2.0
"""The memory that clients make the server keep: bounded, given back, and enough for everyone to be served."""

from __future__ import annotations

import random
import socket
import threading

import pytest

from tests import nbd_client as nbd
from tests.harness.stores import Fault, FaultyStore, io_failed
from tests.nbd_client import DF, EIO, FLUSH, FUA, READ, STATUS, WRITE, HungUp, serving
from tests.vhdkit.serve.disks import SIZE, child, empty, export_of, sparse
from tests.waiting import wait_until
from vhdkit.serve.nbd import memory
from vhdkit.serve.nbd.memory import AMPLE, TIGHT, ClientMemory
from vhdkit.units import KIB, MIB

pytestmark = pytest.mark.timeout(120)
CLIENTS = 40
CONTEXTS = ["base:allocation", "qemu:allocation-depth"]


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers whose memory is scarce from the beginning."""
    monkeypatch.setattr(memory, "AMPLE", TIGHT)


def test_limits_follow_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the budget limits are tight, until clearly less is kept."""
    budget = ClientMemory()
    budget.change(memory.TIGHT_BYTES)
    assert budget.limits is AMPLE
    budget.change(1)
    assert budget.limits is TIGHT
    budget.change(memory._AMPLE_BYTES - memory.TIGHT_BYTES)
    assert budget.limits is TIGHT
    budget.change(-2)
    assert budget.limits is AMPLE


def test_trimming_is_worth_it_once() -> None:
    """The heap is trimmed when much less is kept than once was, and not again before there was more."""
    budget = ClientMemory()
    budget.change(10 * MIB)
    assert not budget.should_trim()
    budget.change(-10 * MIB)
    assert budget.should_trim() and not budget.should_trim()


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("extended", [False, True])
def test_everything_works_when_memory_is_scarce(scarce: None, structured: bool, extended: bool) -> None:
    """Reads, writes and listings of every shape have the same results as with ample memory."""
    scene, rng = child(), random.Random(5)
    model = bytearray(scene.content)
    with serving(export_of(scene)) as running:
        contexts = CONTEXTS if structured else []
        client = running.connect().start(structured=structured or extended, extended=extended)
        client.go(contexts=contexts)
        places = [(0, SIZE), (1, SIZE - 2), (0, MIB), (7, 64 * KIB), (511, 2)]
        places += [(offset := rng.randrange(SIZE), rng.randrange(1, SIZE - offset + 1)) for _ in range(20)]
        for number, (offset, length) in enumerate(places):
            assert client.read(offset, length) == model[offset : offset + length]
            if client.structured and length <= MIB:
                answer = client.call(READ, offset, length, flags=DF)
                assert answer.content(offset, length) == model[offset : offset + length] and len(answer.data) == 1
            data = rng.randbytes(length)
            assert client.call(WRITE, offset, payload=data, flags=FUA * (number % 2)).error == 0
            model[offset : offset + length] = data
            if contexts:
                statuses = client.call(STATUS, 0, SIZE).statuses
                assert all(0 < sum(size for size, _ in runs) <= SIZE for runs in statuses.values())
                assert all(len(runs) <= TIGHT.descriptors for runs in statuses.values())
        assert client.call(FLUSH).error == 0


@pytest.mark.parametrize("structured", [False, True])
def test_a_slow_reader_gets_what_was_there(scarce: None, structured: bool) -> None:
    """A long read that the client collects bit by bit is complete, and the server keeps next to nothing of it."""
    export = export_of(sparse(64 * MIB))
    with serving(export) as running, running.client(structured=structured) as client:
        data = random.Random(6).randbytes(MIB)
        for offset in range(0, 8 * MIB, MIB):
            assert client.call(WRITE, offset, payload=data).error == 0
        for offset, flags in [(0, 0), (1000, 0)] + [(512, DF)] * structured:
            length, count = (MIB, 6) if flags else (7 * MIB, 1)
            for _ in range(count):
                client.send(READ, offset, length, flags=flags)
            wait_until(lambda: any(one._channel.unsent for one in running.server.connections), "its socket is full")
            running.on_loop()
            assert running.server.memory.used_bytes <= 3 * TIGHT.piece_bytes
            for _ in range(count):
                assert client.answer().content(offset, length) == (8 * data)[offset : offset + length]


@pytest.mark.parametrize("structured", [False, True])
def test_a_read_in_one_chunk_that_fails_midway(scarce: None, structured: bool) -> None:
    """Rows 33 and 34: after a header that promised the data the connection ends; no chunk is cut short."""
    scene = empty()
    store = FaultyStore(scene.leaf)
    with serving(export_of(scene, store=store)) as running, running.client(structured=structured) as client:
        assert client.call(WRITE, 0, payload=b"d" * SIZE).error == 0
        store.faults.append(Fault("read", io_failed, persistent=True, where=lambda offset: offset > SIZE - 40 * KIB))
        client.send(READ, SIZE - 600 * KIB, 600 * KIB, flags=DF * structured)
        with pytest.raises(HungUp):
            client.answer()
        with running.client(structured=True) as other:
            assert other.call(READ, SIZE - 600 * KIB, 600 * KIB).error == EIO
            assert other.read(0, 4096) == b"d" * 4096
        store.faults.clear()


@pytest.mark.parametrize(
    "attack",
    [
        [*[(READ, 64 * KIB * number + 1, 64 * KIB) for number in range(62)], (READ, 0, 32 * MIB)],
        [(READ, 0, MIB)] * 64,
        [(READ, 0, 64 * MIB)] * 4,
        [(READ, 4 * KIB * (number % 1000), 4 * KIB) for number in range(3000)],
        [(STATUS, 0, 64 * MIB)] * 500,
    ],
    ids=["unaligned", "large", "largest", "small", "listings"],
)
def test_answers_that_are_never_collected(attack: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """For clients that collect nothing a bounded amount is kept, others are served, and in the end all is freed."""
    monkeypatch.setattr(memory, "TIGHT_BYTES", MIB)
    monkeypatch.setattr(memory, "_AMPLE_BYTES", MIB // 2)
    with serving(export_of(sparse(64 * MIB))) as running, running.client() as good:
        assert good.call(WRITE, 0, payload=b"x" * 4 * MIB).error == 0
        budget = running.server.memory
        for number in range(CLIENTS):
            client = running.client(structured=number % 2 == 0 or attack[0][0] == STATUS, contexts=CONTEXTS)
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.send_bytes(b"".join(nbd.request(*asked, cookie=place) for place, asked in enumerate(attack)))
            assert good.read(0, 64 * KIB) == b"x" * 64 * KIB
        deaf = [one for one in running.server.connections if one.is_idle() is False]
        assert len(deaf) >= CLIENTS // 2, "the attack is none"
        for _ in range(20):
            assert good.read(4096, MIB) == b"x" * MIB
            running.on_loop()
        one_client = AMPLE.jobs_bytes + AMPLE.reply_bytes + AMPLE.input_bytes
        each = TIGHT.input_bytes + TIGHT.kept_bytes + TIGHT.reply_bytes + 2 * TIGHT.piece_bytes
        assert budget._most_bytes < MIB + one_client + CLIENTS * each
        running.drop_all()
        wait_until(lambda: budget.used_bytes == 0, "all is freed")


def test_payloads_that_cannot_be_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Payloads are received in large parts even when memory is scarce; while a slice has the disk's lock, only a few
    clients keep such parts, and in the end everything is written."""
    monkeypatch.setattr(memory, "TIGHT_BYTES", -1)
    count, size = 3 * memory._LARGE_INPUTS, 512 * KIB
    export = export_of(sparse(64 * MIB))
    with serving(export) as running:
        server = running.server
        server.memory.change(0)
        clients = [running.client() for _ in range(count)]
        payloads = [bytes([number + 1]) * size for number in range(count)]
        for number, client in enumerate(clients):
            raw = nbd.request(WRITE, number * MIB, size, cookie=number, flags=0)
            client._asked[number] = (WRITE, number * MIB, size)
            client.send_bytes(raw + payloads[number][: 64 * KIB])
        connections = server.connections
        wait_until(lambda: all(one._serving and one._serving.payload for one in connections), "all have begun")
        wait_until(lambda: not any(one._kept for one in connections), "what came is written")

        locked, unlock = threading.Event(), threading.Event()

        def lock() -> None:
            with export.disk._write_lock.lock:
                locked.set()
                assert unlock.wait(60)

        holder = threading.Thread(target=lock, daemon=True)
        holder.start()
        assert locked.wait(60)
        export.bulk += 1
        senders = [
            threading.Thread(target=client.send_bytes, args=(payloads[number][64 * KIB :],), daemon=True)
            for number, client in enumerate(clients)
        ]
        for sender in senders:
            sender.start()
        wait_until(lambda: all(one._kept for one in connections), "all wait")
        running.on_loop()
        assert 0 < sum(len(one._kept) > TIGHT.input_bytes for one in connections) <= memory._LARGE_INPUTS
        assert server.memory.used_bytes <= memory._LARGE_INPUTS * AMPLE.input_bytes + count * 2 * TIGHT.input_bytes
        unlock.set()
        holder.join(60)

        def end_of_slice() -> None:
            export.bulk -= 1
            waiting, export.after_bulk = export.after_bulk, []
            for go_on in waiting:
                go_on()

        server.loop.post(end_of_slice)
        for number, client in enumerate(clients):
            assert client.answers(1)[number].error == 0
            assert client.read(number * MIB, size) == payloads[number]
        running.on_loop()
        assert server.memory.large_inputs == 0
        for client in clients:
            client.sock.close()
