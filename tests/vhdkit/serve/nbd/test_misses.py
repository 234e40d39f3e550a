# SPDX-License-Identifier: Apache-2.0
"""Reads of what is not in memory, on stores whose pages arrive when the test says so."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.harness.power import Scene, open_mem
from tests.harness.stores import MemStore, io_failed
from tests.nbd_client import EIO, FLUSH, READ, WRITE, Client, Running, serving
from tests.vhdkit.serve.disks import SIZE, child, export_of, sparse
from tests.waiting import wait_until
from vhdkit.serve.nbd.export import PIECE_BYTES, Export
from vhdkit.serve.nbd.misses import MAX_MISSES, MAX_WAITERS, Misses
from vhdkit.units import KIB, MIB, PAGE_SIZE, SECTOR_SIZE

pytestmark = pytest.mark.timeout(120)
MODES = pytest.mark.parametrize(
    "mode", [{}, {"structured": True}, {"extended": True}], ids=["simple", "structured", "extended"]
)


Mode = dict[str, bool]


class ColdStore(MemStore):
    """A file of which only some pages are in memory. Reads that wait do so until the test opens the gate."""

    def __init__(self, start: MemStore) -> None:
        super().__init__(start.name, sectors=dict(start._sectors), size_bytes=start.size())
        self.is_warm = True
        self.is_broken = False
        self.gate = threading.Event()
        self.gate.set()
        self.blocked = 0  # reads that found the gate closed
        self.waits = 0  # reads that would have waited for the device
        self.asked: list[tuple[int, int]] = []
        self.here: set[int] = set()

    def cool(self) -> None:
        """From now on nothing is in memory, and the device does not answer."""
        self.here.clear()
        self.asked.clear()
        self.waits = self.blocked = 0
        self.is_warm = False
        self.gate.clear()

    def sectors_asked(self) -> int:
        """How many single sectors were asked for; each may have been asked for several times."""
        return len({offset for offset, size in list(self.asked) if size == SECTOR_SIZE})

    def deliver(self) -> None:
        """What was asked for arrives."""
        for offset, size in list(self.asked):
            self.here.update(range(offset // PAGE_SIZE, -(-(offset + size) // PAGE_SIZE)))

    def try_pread_into(self, offset_bytes: int, buffer: memoryview) -> bool:
        """As a kernel that begins to read what is missing."""
        pages = range(offset_bytes // PAGE_SIZE, -(-(offset_bytes + len(buffer)) // PAGE_SIZE))
        if self.is_broken:
            raise io_failed()
        if not self.is_warm and not self.here.issuperset(pages):
            self.asked.append((offset_bytes, len(buffer)))
            return False
        return super().try_pread_into(offset_bytes, buffer)

    def prefetch(self, offset_bytes: int, size_bytes: int) -> None:
        """Record what was asked for."""
        self.asked.append((offset_bytes, size_bytes))

    def pread_into(self, offset_bytes: int, buffer: memoryview) -> None:
        """Wait for the gate, then read."""
        pages = range(offset_bytes // PAGE_SIZE, -(-(offset_bytes + len(buffer)) // PAGE_SIZE))
        if self.is_broken:
            raise io_failed()
        if not self.is_warm and not self.here.issuperset(pages):
            self.waits += 1
            if not self.gate.is_set():
                self.blocked += 1
            assert self.gate.wait(60)
        super().pread_into(offset_bytes, buffer)


def connect(running: Running, mode: Mode) -> Client:
    """A client with that kind of framing."""
    return running.client(structured=mode.get("structured", False), extended=mode.get("extended", False))


@contextmanager
def cold(mode: Mode | None = None, *, scene: Scene | None = None) -> Iterator[tuple[Running, Client, ColdStore]]:
    """A server of a disk whose leaf is cold, with its grains settled, and a client."""
    scene = child() if scene is None else scene
    store = ColdStore(scene.leaf)
    export = export_of(scene, store=store)
    export.disk.read(0, export.disk.size_bytes if scene.content else 0)
    with serving(export) as running, connect(running, mode or {}) as client:
        store.cool()
        try:
            yield running, client, store
        finally:
            store.gate.set()


def owned_places(export: Export, size: int) -> list[int]:
    """Offsets in the disk whose data lies in the leaf, apart from one another."""
    extents = [one for one in export.disk.extents() if one.layer_index == 0 and one.size_bytes >= size]
    return [
        offset for one in extents for offset in range(one.offset_bytes, one.offset_bytes + one.size_bytes - size, size)
    ]


@MODES
def test_reads_wait_without_threads(mode: Mode) -> None:
    """INV-MISS-ENDS: of many reads that wait for the device one has a thread; when it ends, all whose pages are there
    are answered by the loop."""
    with cold(mode) as (running, client, store):
        places = owned_places(running.server.exports[0], 512)[:40]
        content = child().content
        asked = {client.send(READ, place, 512): place for place in places}
        wait_until(lambda: store.blocked == 1, "a thread waits for the oldest")
        wait_until(lambda: store.sectors_asked() == 40, "the device was asked for all")
        store.deliver()
        store.gate.set()
        for cookie, answer in client.answers(len(asked)).items():
            assert answer.content(asked[cookie], 512) == content[asked[cookie] : asked[cookie] + 512]
        assert store.waits == 1


@MODES
def test_a_store_that_is_never_ready(mode: Mode) -> None:
    """INV-MISS-ENDS: reads of a store that never has anything in memory are answered by jobs, several at once."""
    with cold(mode) as (_running, client, store):
        content, rng = child().content, random.Random(1)
        store.gate.set()
        for _ in range(6):
            asked = {}
            for _ in range(50):
                place, size = rng.randrange(SIZE - 9000), rng.choice((1, 512, 4096, 9000))
                asked[client.send(READ, place, size)] = place, size
            for cookie, answer in client.answers(len(asked)).items():
                place, size = asked[cookie]
                assert answer.content(place, size) == content[place : place + size]
        assert client.read(0, SIZE) == content


def test_reads_of_a_slow_store_wait_side_by_side() -> None:
    """Where the loop never finds anything ready, more and more of a client's reads wait at once, up to a limit."""
    with cold() as (running, client, store):
        places = owned_places(running.server.exports[0], 512)[:100]
        for place in places:
            client.send(READ, place, 512)
        wait_until(lambda: store.blocked == 1, "the first one waits")
        most, lock, release = 0, threading.Lock(), threading.Semaphore(0)
        inside = 0
        plain = MemStore.pread_into

        def pread_into(offset_bytes: int, buffer: memoryview) -> None:
            nonlocal most, inside
            with lock:
                inside += 1
                most = max(most, inside)
            assert release.acquire(timeout=60)
            with lock:
                inside -= 1
            plain(store, offset_bytes, buffer)

        export = running.server.exports[0]
        export.disk.chain._readers_by_number = tuple(pread_into for _ in export.disk.chain._readers_by_number)
        store.gate.set()
        for wanted in (2, 4, MAX_WAITERS):
            wait_until(lambda wanted=wanted: inside >= wanted, "more of them wait")  # type: ignore[misc]
            release.release(wanted)
        release.release(200)
        assert len(client.answers(len(places))) == len(places)
        assert most == MAX_WAITERS


def test_a_failed_read_is_reported() -> None:
    """A waiting read that fails is answered with the error, and the others with their data."""
    with cold() as (running, client, store):
        places = owned_places(running.server.exports[0], 512)[:10]
        first = client.send(READ, places[0], 512)
        wait_until(lambda: store.blocked == 1, "a thread waits for the oldest")
        rest = {client.send(READ, place, 512): place for place in places[1:]}
        wait_until(lambda: store.sectors_asked() == 10, "the device was asked for all")

        store.is_broken = True
        store.gate.set()
        answers = client.answers(10)
        assert answers[first].error == 0, "it was being read already"
        assert {answers[cookie].error for cookie in rest} == {EIO}


def test_waiting_reads_use_the_disk_after_a_hold() -> None:
    """INV-MISS-USES-THE-PRESENT-DISK: a hold waits for the one read that is in a thread; the others read from the disk
    that the export has afterwards."""
    with cold() as (running, client, store):
        export = running.server.exports[0]
        places = owned_places(export, 512)[:20]
        old = {client.send(READ, places[0], 512): places[0]}
        wait_until(lambda: store.blocked == 1, "a thread waits for the oldest")
        old |= {client.send(READ, place, 512): place for place in places[1:]}
        wait_until(lambda: store.sectors_asked() == 20, "the device was asked for all")
        entered = threading.Event()

        def swap() -> None:
            with running.server.hold([export]):
                assert export.jobs == 0
                new = MemStore(store.name, sectors=dict(store._sectors), size_bytes=store.size())
                disk = open_mem(new, child().parents, writable=True)
                for place in places:
                    disk.write(place, b"N" * 512)
                before, export.disk = export.disk, disk
                store.is_warm = True
                before.close()
            entered.set()

        holder = threading.Thread(target=swap, daemon=True)
        holder.start()
        wait_until(lambda: export.held, "the hold has begun")
        store.deliver()
        store.gate.set()
        holder.join(60)
        assert entered.is_set()
        answers = client.answers(len(old))
        first, *rest = [answers[cookie].content(place, 512) for cookie, place in old.items()]
        assert first in (child().content[places[0] : places[0] + 512], b"N" * 512)
        assert rest == [b"N" * 512] * 19


def test_a_client_that_is_disconnected_leaves_nothing() -> None:
    """Reads of a client whose connection is closed are forgotten, and others are served."""
    with cold() as (running, client, store):
        places = owned_places(running.server.exports[0], 512)
        with running.client() as other:
            for place in places[:30]:
                client.send(READ, place, 512)
            wait_until(lambda: store.blocked == 1 and store.sectors_asked() == 30, "a thread waits for the oldest")
            running.server.loop.post(running.server.connections[0].close)
            wait_until(lambda: len(running.server.connections) == 1, "it is gone")
            assert not running.server.loop.waiters.present
            cookie = other.send(READ, places[40], 512)
            wait_until(lambda: store.blocked == 2, "it waits")
            store.gate.set()
            assert other.answers(1)[cookie].content(places[40], 512) == child().content[places[40] : places[40] + 512]
        wait_until(
            lambda: running.server.exports[0].jobs == 0 and running.server.memory.used_bytes == 0, "its job has ended"
        )
        assert store.waits == 2


def test_the_number_of_waiting_reads_is_bounded() -> None:
    """A client that asks for more than it may have waiting is not read from; in the end it gets all its answers."""
    with cold() as (running, client, store):
        place = owned_places(running.server.exports[0], 512)[0]
        sender = threading.Thread(target=lambda: [client.send(READ, place, 512) for _ in range(1000)], daemon=True)
        sender.start()
        wait_until(lambda: store.blocked == 1, "a thread waits for the oldest")

        def waiting() -> int:
            return sum(one.count for one in list(running.server.loop.waiters.present) if isinstance(one, Misses))

        wait_until(lambda: waiting() == MAX_MISSES, "as many as may wait do")
        running.on_loop()
        assert waiting() == MAX_MISSES
        store.deliver()
        store.gate.set()
        assert len(client.answers(1000)) == 1000
        sender.join(60)


def test_where_unsettled_reads_lie_is_found_out_together() -> None:
    """The bitmaps of blocks that were not used yet are prefetched, then read by one job for all waiting reads."""
    scene = sparse(64 * MIB)
    disk = open_mem(scene.leaf, [], writable=True)
    for number in range(24):
        disk.write(number * 2 * MIB, bytes([number + 1]) * 4096)
    disk.close()
    with cold(scene=scene) as (running, client, store):
        store.gate.set()
        asked = {client.send(READ, number * 2 * MIB, 4096): number for number in range(24)}
        wait_until(lambda: running.server.exports[0].disk.is_settled(0, 4096), "the first bitmap is read")
        store.deliver()
        for cookie, answer in client.answers(24).items():
            assert answer.content(asked[cookie] * 2 * MIB, 4096) == bytes([asked[cookie] + 1]) * 4096
        bitmaps = {offset for offset, size in store.asked if size == 512}
        assert len(bitmaps) == 24


def test_a_sequential_reader_finds_its_data_prefetched() -> None:
    """What a stream will read next is prefetched before it asks, and no more than a window of it."""
    scene = sparse(64 * MIB)
    disk = open_mem(scene.leaf, [], writable=True)
    disk.write(0, b"d" * 24 * MIB)
    disk.close()
    with cold({"structured": True}, scene=scene) as (_running, client, store):
        store.gate.set()
        for number in range(40):
            assert client.read(number * 256 * KIB, 256 * KIB) == b"d" * 256 * KIB
            if number > 4:  # the start of the next one is a whole block away from everything that was read itself
                ahead = (number + 2) * 256 * KIB
                wait_until(
                    lambda ahead=ahead: sum(size for _, size in store.asked if size > 0) > ahead,  # type: ignore[misc]
                    "the next one is prefetched",
                )


@MODES
@pytest.mark.parametrize("seed", range(3))
def test_random_histories_on_a_half_cold_disk(mode: Mode, seed: int) -> None:
    """A read that begins after a write was answered sees it, whatever is in memory and however long other reads wait;
    a read beside a write sees the old or the new bytes of each sector."""
    scene, rng = child(), random.Random(seed)
    with cold(mode) as (running, client, store):
        store.gate.set()
        chance = random.Random(seed + 100)

        def try_pread_into(offset_bytes: int, buffer: memoryview) -> bool:
            return chance.random() < 0.4 and MemStore.try_pread_into(store, offset_bytes, buffer)

        chain = running.server.exports[0].disk.chain
        running.on_loop()
        chain._tries_by_number = (try_pread_into, try_pread_into, *chain._tries_by_number[2:])
        model = bytearray(scene.content)
        for _ in range(60):
            may_be = bytearray(model)
            reads: dict[int, tuple[int, int]] = {}
            writes: dict[int, tuple[int, int]] = {}
            for _ in range(rng.randrange(1, 12)):
                offset = rng.randrange(SIZE - 10000)
                if rng.random() < 0.3:
                    offset, size = offset // 512 * 512, 512 * rng.randrange(1, 10)
                    raw = bytes([rng.randrange(256)]) * size
                    if any(start < offset + size and offset < start + length for start, length in writes.values()):
                        continue  # which of two writes of one batch comes last is not defined
                    writes[client.send(WRITE, offset, payload=raw)] = offset, size
                    may_be[offset : offset + size] = raw
                else:
                    size = rng.choice((1, 512, 4096, 9000))
                    reads[client.send(READ, offset, size)] = offset, size
            answers = client.answers(len(reads) + len(writes))
            assert all(answer.error == 0 for answer in answers.values())
            for cookie, (offset, size) in reads.items():
                got = answers[cookie].content(offset, size)
                for start in range(offset // 512 * 512, offset + size, 512):
                    low, high = max(start, offset), min(start + 512, offset + size)
                    assert got[low - offset : high - offset] in (bytes(model[low:high]), bytes(may_be[low:high]))
            model = may_be
        assert client.call(FLUSH).error == 0
        assert client.read(0, SIZE) == model


@MODES
def test_large_reads_wait_too(mode: Mode) -> None:
    """Reads of up to a mebibyte wait as small ones do; longer ones, sent in pieces, may follow them at once."""
    scene = sparse(16 * MIB)
    disk = open_mem(scene.leaf, [], writable=True)
    rng = random.Random(5)
    content = rng.randbytes(16 * MIB)
    disk.write(0, content)
    disk.close()
    with cold(mode, scene=scene) as (running, client, store):
        running.server.exports[0].disk.settle(0, 16 * MIB)
        places = [(0, PIECE_BYTES), (PIECE_BYTES, 300 * KIB), (7 * MIB, 4096), (3 * MIB, 5 * MIB), (12 * MIB, 1000)]
        asked = {client.send(READ, *place): place for place in places}
        wait_until(lambda: store.blocked >= 1, "a thread waits for the oldest")
        store.deliver()
        store.gate.set()
        for cookie, answer in client.answers(len(asked)).items():
            offset, size = asked[cookie]
            assert answer.content(offset, size) == content[offset : offset + size]
