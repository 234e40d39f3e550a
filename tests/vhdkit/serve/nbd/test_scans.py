# SPDX-License-Identifier: Apache-2.0
"""Scans beside ordinary clients: turns against a clock by hand, and content on a server whose scans often rest."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.nbd_client import DF, READ, WRITE, Running, serving
from tests.waiting import wait_until
from vhdkit.disk import open_disk
from vhdkit.serve.nbd.export import Export
from vhdkit.serve.nbd.scans import LARGE_BYTES, RECENT_NS, Scan, Scans
from vhdkit.serve.nbd.share import MOST_REST_NS, REST, Share
from vhdkit.units import KIB, MIB

pytestmark = pytest.mark.timeout(120)
SIZE = 8 * MIB
PART = 128 * KIB  # sent at once
MILLISECOND = 1_000_000


class World:
    """A clock, timers, and a device that was read for what `read` says."""

    def __init__(self) -> None:
        self.now = 10**12
        self.blocks = 0
        self._timers: list[tuple[int, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self.scans = Scans(self._call_later, clock=lambda: self.now, blocks_read=lambda: self.blocks)
        self.ordinary = Scan(self.scans)

    def _call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (self.now + round(seconds * 1e9), next(self._numbers), callback))

    def serve_ordinary(self, nanoseconds: int = 20_000) -> None:
        """One batch of small requests, then whatever timer is due."""
        self.ordinary.served(16, self.now)
        self.pass_by(nanoseconds)

    def pass_by(self, nanoseconds: int) -> None:
        """Time passes; timers that become due run."""
        end = self.now + nanoseconds
        while self._timers and self._timers[0][0] <= end:
            self.now, _, callback = heapq.heappop(self._timers)
            callback()
            end = max(end, self.now)
        self.now = end

    def read(self, scan: Scan, cost: int, *, size: int = 256 * KIB, cold: bool = True) -> None:
        """A large read that may be made now."""
        scan.begin(self.now)
        began, self.now = self.now, self.now + cost
        self.blocks += cold
        scan.end(began, size)


class Client:
    """One that makes a large read when `proceed` is called; an eager one also after each, until it has to rest."""

    def __init__(self, world: World, cost: int, *, cold: bool = True, is_eager: bool = False) -> None:
        self.scan = Scan(world.scans)
        self.turns = self.spent = self.rests = 0
        self.is_gone = False
        self._is_resting = False
        self._world = world
        self._cost = cost
        self._cold = cold
        self._is_eager = is_eager

    def proceed(self) -> None:
        """Read, or rest."""
        if self._is_resting or self.is_gone:
            return
        if self.scan.must_rest(self._world.now):
            self.rests += 1
            self._is_resting = True
            self._world.scans.rest(self.scan, self._go_on)
            return
        self._world.read(self.scan, self._cost, cold=self._cold)
        self.turns += 1
        self.spent += self._cost
        if self._is_eager:
            self.proceed()

    def _go_on(self) -> None:
        self._is_resting = False
        self.proceed()


def test_alone_it_never_rests() -> None:
    """Without ordinary clients there is nothing to share, with any number of scans."""
    world = World()
    clients = [Client(world, MILLISECOND) for _ in range(4)]
    for _ in range(100):
        for client in clients:
            client.proceed()
    assert [client.turns for client in clients] == [100] * 4
    assert not any(client.rests for client in clients)


@given(st.lists(st.integers(1_000, MOST_REST_NS // REST), min_size=1, max_size=4), st.integers(20_000, MILLISECOND))
@settings(max_examples=20, deadline=None)
def test_beside_ordinary_clients_scans_take_their_share(costs: list[int], batch: int) -> None:
    """INV-SCAN-GOES-ON: all scans together take one part in `REST + 1`, after the first reads; each has as many
    turns as the others.
    """
    world = World()
    world.serve_ordinary(batch)
    clients = [Client(world, cost, is_eager=True) for cost in costs]
    for client in clients:
        client.proceed()  # nothing is known of them yet
    began, first = world.now, sum(client.spent for client in clients)
    while min(client.turns for client in clients) < 4:
        world.serve_ordinary(batch)
    spent = sum(client.spent for client in clients) - first
    assert (spent - max(costs)) * (REST + 1) <= world.now - began  # the last one has not been paid for
    turns = [client.turns for client in clients]
    assert max(turns) - min(turns) <= 1


def test_a_client_that_left_while_it_rested() -> None:
    """The others go on."""
    world = World()
    world.serve_ordinary()
    clients = [Client(world, MILLISECOND) for _ in range(3)]
    for client in clients * 2:
        client.proceed()
    assert all(client.rests for client in clients)
    clients[0].is_gone = True
    while clients[2].turns < 3:
        world.serve_ordinary()
        clients[1].proceed()
        clients[2].proceed()
    assert clients[0].turns == 1


def test_large_reads_of_what_is_in_memory_never_rest() -> None:
    """A client that has scanned is soon free, too, when its reads find everything in memory."""
    world = World()
    client = Client(world, 100_000, cold=False)
    for _ in range(100):
        world.serve_ordinary()
        client.proceed()
    assert (client.turns, client.rests) == (100, 0)
    world.read(client.scan, 100_000)
    for _ in range(10_000):
        world.serve_ordinary()
        client.proceed()
    rests = client.rests
    assert 0 < rests < 100
    for _ in range(100):
        world.serve_ordinary()
        client.proceed()
    assert client.rests == rests


def test_a_job_that_read_the_device() -> None:
    """Jobs read bitmaps and read ahead for a scan, so that its own reads find everything."""
    world = World()
    world.serve_ordinary()
    client = Client(world, MILLISECOND, cold=False)
    other = Client(world, MILLISECOND)

    def job() -> int:
        world.blocks += 1
        return 7

    assert client.scan.noting(job)() == 7  # before its first large read: not part of a scan
    client.proceed()
    other.proceed()
    assert not client.scan.must_rest(world.now)
    assert client.scan.noting(lambda: 8)() == 8
    assert not client.scan.must_rest(world.now)
    assert client.scan.noting(job)() == 7
    world.read(other.scan, MILLISECOND)
    assert client.scan.must_rest(world.now)


def test_ordinary_clients_that_pause() -> None:
    """Scans go on, and what they owe is forgotten."""
    world = World()
    world.serve_ordinary()
    client = Client(world, MOST_REST_NS)
    client.proceed()
    world.serve_ordinary()
    client.proceed()
    assert (client.turns, client.rests) == (1, 1)
    world.pass_by(2 * RECENT_NS)
    assert client.turns == 2
    client.proceed()
    assert (client.turns, client.rests) == (3, 1)


def test_who_is_ordinary() -> None:
    """Not a client of which a large read is among its last requests, nor a scan whose reads were answered late."""
    world = World()
    mixed = Scan(world.scans)
    world.read(mixed, 1000)
    mixed.served(63, world.now)
    assert not world.scans.has_others(world.now)
    mixed.served(1, world.now)
    mixed.served(1, world.now)
    assert world.scans.has_others(world.now)
    late = Client(world, 1000, cold=False)
    late.proceed()
    world.now += 1000
    late.scan.answered_late(1, world.now - 1000)
    another = Client(world, 1000)
    another.proceed()
    world.ordinary.served(1, world.now)
    assert another.scan.must_rest(world.now)


# -- on a server ------------------------------------------------------------------------------------------------


class Gate(Share):
    """Closed by each read, and open again when the test says so, or at the second look."""

    def __init__(self, *, opens: bool) -> None:
        super().__init__()
        self.is_closed = False
        self.opens = opens

    def left_ns(self, now_ns: int) -> int:
        """See `Share`."""
        was_closed = self.is_closed
        self.is_closed = was_closed and not self.opens
        return MILLISECOND if was_closed else 0

    def charge(self, now_ns: int, cost_ns: int) -> None:
        """See `Share`."""
        self.is_closed = True


class Restless(Scans):
    """Every large read is one of a scan, beside others."""

    def __init__(self, running: Running, gate: Gate) -> None:
        super().__init__(running.server.loop.call_later, blocks_read=itertools.count().__next__)
        self._share = gate
        self.rests = 0

    def has_others(self, now_ns: int) -> bool:
        """See `Scans`."""
        return True

    def rest(self, scan: Scan, go_on: Callable[[], None]) -> None:
        """See `Scans`."""
        self.rests += 1
        super().rest(scan, go_on)


@contextmanager
def resting(folder: Path, gate: Gate) -> Iterator[tuple[Running, Restless, Export, bytes]]:
    """A server of random bytes, and they."""
    content = random.Random(3).randbytes(SIZE)
    path = folder / "disk.raw"
    path.write_bytes(content)
    export = Export("", open_disk(path, writable=True))
    with serving(export) as running:
        scans = Restless(running, gate)
        running.server.scans = scans
        yield running, scans, export, content


MODES = pytest.mark.parametrize(
    "mode", [{}, {"structured": True}, {"extended": True}], ids=["simple", "structured", "extended"]
)


@MODES
def test_every_read_is_answered(tmp_path: Path, mode: dict[str, bool]) -> None:
    """With what the disk holds, whatever its size, by turns with small requests and writes behind it."""
    rng = random.Random(5)
    with resting(tmp_path, Gate(opens=True)) as (running, scans, _, content):
        expected = bytearray(content)
        client, other = (
            running.client(structured="structured" in mode, extended="extended" in mode) for _ in range(2)
        )
        for size in (LARGE_BYTES, 100_352, 256 * KIB, MIB, 3 * MIB + 512, SIZE, 1000 * 512 + 7):
            offset = rng.randrange(0, (SIZE - size) // 512 + 1) * 512
            flags = DF if client.structured and size <= MIB and rng.random() < 0.3 else 0
            data = rng.randbytes(4 * KIB)
            place = rng.randrange(0, SIZE // 4096) * 4096
            large = client.send(READ, offset, size, flags=flags)
            assert other.read(place, 4 * KIB) == expected[place : place + 4 * KIB]
            before = bytes(expected[offset : offset + size])
            answer = client.answer()
            assert (answer.cookie, answer.error) == (large, 0)
            assert answer.content(offset, size) == before
            assert not client.call(WRITE, place, payload=data).error
            expected[place : place + 4 * KIB] = data
            assert client.read(place, 4 * KIB) == data
        assert scans.rests > 5


def test_what_a_client_that_rests_has_sent_waits(tmp_path: Path) -> None:
    """Its later requests do, others' do not; a hold does not wait for it, and what was put aside is answered later."""
    gate = Gate(opens=False)
    with resting(tmp_path, gate) as (running, scans, export, content):
        client, other = running.client(structured=True), running.client()
        assert client.read(0, PART) == content[:PART]
        running.on_loop()
        assert gate.is_closed
        cookies = [client.send(READ, MIB, PART), client.send(READ, 0, 4 * KIB), client.send(READ, 2 * MIB, 2 * MIB)]
        wait_until(lambda: scans.rests == 1, "it rests")
        assert other.read(4 * KIB, 4 * KIB) == content[4 * KIB : 8 * KIB]
        with running.server.hold([export]):
            gate.is_closed = False
            running.on_loop()
        gate.opens = True
        client_answers = client.answers(3)
        assert set(client_answers) == set(cookies)
        for cookie, (offset, size) in zip(cookies, [(MIB, PART), (0, 4 * KIB), (2 * MIB, 2 * MIB)], strict=True):
            assert client_answers[cookie].content(offset, size) == content[offset : offset + size]


def test_disconnected_while_resting(tmp_path: Path) -> None:
    """Nothing is left of the client, the next one has its turn, and the server ends."""
    gate = Gate(opens=False)
    with resting(tmp_path, gate) as (running, scans, _, content):
        gone, client = running.client(structured=True), running.client(structured=True)
        for one in (gone, client):
            gate.is_closed = False
            one.read(0, PART)
            running.on_loop()
        gone.send(READ, MIB, PART)
        wait_until(lambda: scans.rests == 1, "the first rests")
        client.send(READ, 2 * MIB, PART)
        wait_until(lambda: scans.rests == 2, "the second rests")
        running.server.loop.post(running.server.connections[0].close)
        running.on_loop()
        gate.is_closed = False
        assert client.answer().content(2 * MIB, PART) == content[2 * MIB : 2 * MIB + PART]
        assert len(running.server.connections) == 1
