# SPDX-License-Identifier: Apache-2.0
"""Reads that go from the page cache to a socket without a copy: content, cut files, failures, holds, deaf clients."""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vhdkit
from tests.nbd_client import DF, EIO, FLUSH, READ, WRITE, Client, Running, serving
from tests.support import daily_or_nightly
from tests.waiting import wait_until
from vhdkit import errors, page_cache
from vhdkit.disk import Disk, open_disk
from vhdkit.sending import SentFile
from vhdkit.serve.nbd.channel import Channel
from vhdkit.serve.nbd.export import Export
from vhdkit.serve.nbd.loop import Loop
from vhdkit.store import FileStore
from vhdkit.uncached import CacheMode
from vhdkit.units import KIB, MIB

pytestmark = pytest.mark.timeout(120)
SIZE = 4 * MIB
FRAMINGS = pytest.mark.parametrize("extended", [False, True], ids=["structured", "extended"])
KINDS = pytest.mark.parametrize(
    ("kind", "extended"), [("vhd", False), ("vhd", True), ("vhdx", False), ("raw", False), ("child", False)]
)


class Sent:
    """What was sent directly; `limit` is how much more may be, after which `then` runs once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes = self.calls = 0
        self.limit = 1 << 62
        self.then: Callable[[], None] = lambda: None
        self._send: Callable[[SentFile, int, int, int], int] = SentFile.send
        monkeypatch.setattr(page_cache, "holds", lambda fd, offset, size: True)  # also on kernels that do not say

        def send(file: SentFile, socket_fd: int, offset_bytes: int, size_bytes: int) -> int:
            return self.send(file, socket_fd, offset_bytes, size_bytes)

        monkeypatch.setattr(SentFile, "send", send)

    def send(self, file: SentFile, socket_fd: int, offset: int, size: int) -> int:
        """As `SentFile.send`, within the limit."""
        self.calls += 1
        if not self.limit:
            then, self.then = self.then, lambda: None
            then()
            return 0
        done = self._send(file, socket_fd, offset, min(size, self.limit))
        self.bytes += done
        self.limit -= done
        return done


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """Counts what is sent directly."""
    return Sent(monkeypatch)


def image(folder: Path, kind: str, content: bytes) -> Path:
    """An image on the file system with that content; of a child, every second block is its own."""
    if kind == "raw":
        path = folder / "disk.raw"
        path.write_bytes(content)
        return path
    path = folder / ("disk.vhdx" if kind == "vhdx" else "disk.vhd")
    vhdkit.create_image(path, len(content), block_size_bytes=MIB)
    with open_disk(path, writable=True) as disk:
        disk.write(0, content)
    if kind == "child":
        child = folder / "disk.avhd"
        vhdkit.create_child(child, path, block_size_bytes=MIB)
        with open_disk(child, writable=True) as disk:
            for offset in range(0, len(content), 2 * MIB):
                disk.write(offset, content[offset : offset + MIB])
        return child
    return path


def opened(path: Path) -> Disk:
    """The disk, and where all of it lies is known."""
    disk = open_disk(path, writable=True)
    disk.settle(0, disk.size_bytes)
    disk.read(0, disk.size_bytes)  # it is in the page cache
    return disk


@contextmanager
def served(path: Path, *, extended: bool = False) -> Iterator[tuple[Running, Client]]:
    """A server and a client that takes chunks."""
    with serving(Export("", opened(path))) as running, running.client(structured=True, extended=extended) as client:
        yield running, client


@KINDS
def test_random_histories(tmp_path: Path, sent: Sent, kind: str, extended: bool) -> None:
    """A read that begins after a write was answered sees it; one beside a write sees the old or the new bytes."""
    rng = random.Random(7)
    model = bytearray(rng.randbytes(SIZE))
    with served(image(tmp_path, kind, bytes(model)), extended=extended) as (_, client):
        for _ in range(daily_or_nightly(8, 100)):
            may_be = bytearray(model)
            reads: dict[int, tuple[int, int]] = {}
            writes: list[tuple[int, int, bytes]] = []
            order: list[tuple[int, int, bytes]] = []
            for _ in range(rng.randrange(1, 10)):
                size = 512 * rng.randrange(1, 2000)
                offset = rng.randrange(SIZE - size) // 512 * 512
                if rng.random() < 0.3:
                    if any(start < offset + size and offset < start + length for start, length, _ in writes):
                        continue  # which of two writes of one batch comes last is not defined
                    writes.append((offset, size, rng.randbytes(size)))
                    order.append(writes[-1])
                    may_be[offset : offset + size] = writes[-1][2]
                else:
                    offset, size = rng.choice(((offset, size), (offset, MIB), (0, SIZE), (offset + 5, 300_001)))
                    order.append((offset, min(size, SIZE - offset), b""))

            def send(order: list[tuple[int, int, bytes]], reads: dict[int, tuple[int, int]]) -> None:
                for offset, size, raw in order:
                    if raw:
                        client.send(WRITE, offset, payload=raw)
                    else:
                        reads[client.send(READ, offset, size)] = offset, size

            sender = threading.Thread(target=send, args=(order, reads), daemon=True)
            sender.start()  # the server reads no more while answers are not collected
            answers = client.answers(len(order))
            sender.join()
            assert all(answer.error == 0 for answer in answers.values())
            for cookie, (offset, size) in reads.items():
                got = np.frombuffer(answers[cookie].content(offset, size), np.uint8)
                before, after = (np.frombuffer(one, np.uint8, size, offset) for one in (bytes(model), bytes(may_be)))
                assert ((got == before) | (got == after)).all()
            model = may_be
        assert client.call(FLUSH).error == 0
        assert client.read(0, SIZE) == model
    assert sent.bytes > SIZE


def test_all_of_a_large_read_is_sent_so(tmp_path: Path, sent: Sent) -> None:
    """A large read is copied only where the socket was full: a sector or two each time."""
    content = random.Random(1).randbytes(SIZE)
    with served(image(tmp_path, "raw", content)) as (running, client):
        for offset in range(0, SIZE, MIB):
            assert client.read(offset, MIB) == content[offset : offset + MIB]
        assert client.read(0, SIZE) == content
        before = running.server.stats.requests
        client.read(0, MIB)
        running.on_loop()
        assert running.server.stats.requests == before + 1
    assert sent.bytes > (2 * SIZE + MIB) * 0.97


def test_who_gets_copies(tmp_path: Path, sent: Sent) -> None:
    """Simple replies, unfragmented ones, remote clients and files that are not cached: all are sent from memory."""
    content = random.Random(2).randbytes(SIZE)
    path = image(tmp_path, "vhd", content)
    with serving(Export("", opened(path))) as running, socket.create_server(("127.0.0.1", 0)) as listener:
        with running.client() as client:
            assert client.read(0, MIB) == content[:MIB]
        with running.client(structured=True) as client:
            assert client.read(MIB, MIB, DF) == content[MIB : 2 * MIB]
        with socket.create_connection(listener.getsockname()) as ours:
            theirs, _ = listener.accept()
            running.server.loop.post(lambda: running.server.adopt(theirs, "remote"))
            assert Client(ours).start(structured=True).go().read(5, 2 * MIB) == content[5 : 5 + 2 * MIB]
    options = vhdkit.OpenOptions(cache=CacheMode.NONE)
    with open_disk(path, options=options) as disk:
        disk.settle(0, SIZE)
        assert disk.chain.file_run(0, SIZE // 512) is None
    assert not sent.bytes


def test_what_is_not_in_memory_is_not_sent_so(tmp_path: Path, sent: Sent, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a page is not in the cache, the loop must not wait for it in `sendfile`."""
    content = random.Random(3).randbytes(SIZE)
    with served(image(tmp_path, "raw", content)) as (_, client):
        monkeypatch.setattr(page_cache, "holds", lambda fd, offset, size: False)
        assert client.read(0, MIB) == content[:MIB]
    assert not sent.bytes


@FRAMINGS
def test_a_file_that_is_cut_off_meanwhile(tmp_path: Path, sent: Sent, extended: bool) -> None:
    """The header has promised the data: the rest of the chunk reads as it always does past the end, as zeros."""
    content = random.Random(4).randbytes(SIZE)
    path = image(tmp_path, "raw", content)
    with served(path, extended=extended) as (_, client):
        sent.limit, sent.then = 100 * KIB + 7, lambda: os.truncate(path, 200 * KIB + 100)
        got = client.read(0, MIB)
        cut = 200 * KIB + 100
        assert got[:cut] == content[:cut] and not any(got[cut:])
        os.truncate(path, SIZE)
        sent.limit = 1 << 62
        assert client.read(2 * MIB, MIB) == bytes(MIB)


@FRAMINGS
@pytest.mark.parametrize("sent_bytes", [0, 100 * KIB, 100 * KIB + 7])
def test_a_device_that_fails_in_the_middle(tmp_path: Path, sent: Sent, sent_bytes: int, extended: bool) -> None:
    """Row 34: the chunk is padded, an error follows it, and the session goes on."""
    content = random.Random(5).randbytes(SIZE)
    with served(image(tmp_path, "vhd", content), extended=extended) as (running, client):
        chain: Any = running.server.exports[0].disk.chain
        names = ("_readers", "_readers_by_number", "_tries_by_number")
        before = {name: getattr(chain, name) for name in names}

        def fail() -> None:
            for name in names:
                setattr(chain, name, (_io_failed,) * 2)

        sent.limit, sent.then = sent_bytes, fail
        answer = client.call(READ, 0, MIB)
        assert answer.error == EIO
        assert b"".join(raw for _, raw in answer.data)[:sent_bytes] == content[:sent_bytes]
        for name in names:
            setattr(chain, name, before[name])
        assert client.read(0, 4096) == content[:4096]
        sent.limit = 1 << 62
        assert client.read(0, MIB) == content[:MIB]


def _io_failed(*_: object) -> None:
    raise errors.IoFailed("the device failed", path="test")


def test_a_file_system_that_cannot_do_it(tmp_path: Path, sent: Sent) -> None:
    """Where the kernel sends nothing of a file although the socket has room, a client gets copies from then on."""
    content = random.Random(9).randbytes(SIZE)
    with served(image(tmp_path, "raw", content)) as (_, client):
        sent.limit = 0
        for offset in (0, 2 * MIB, MIB):
            assert client.read(offset, MIB) == content[offset : offset + MIB]
    assert 0 < sent.calls < 200  # it is full now and then, too


def test_a_hold_in_the_middle(tmp_path: Path, sent: Sent) -> None:
    """A hold does not wait for clients that do not read; the rest comes from the disk that the export has then."""
    content = random.Random(6).randbytes(SIZE)
    path = image(tmp_path, "vhd", content)
    with served(path) as (running, client):
        cookie = client.send(READ, 0, SIZE)
        wait_until(lambda: sent.bytes > 0, "the first part is sent")
        export = running.server.exports[0]
        with running.server.hold([export]):
            at = sent.bytes
            export.disk.close()
            export.disk = opened_child(tmp_path, path)
            assert sent.bytes == at
        answer = client.answer()
        assert answer.cookie == cookie and answer.content(0, SIZE) == content
        assert client.call(WRITE, 0, payload=b"n" * 4096).error == 0
        assert client.read(0, MIB)[:5000] == b"n" * 4096 + content[4096:5000]


def opened_child(folder: Path, path: Path) -> Disk:
    """A new child of an image."""
    child = folder / "new.avhd"
    vhdkit.create_child(child, path)
    return opened(child)


def test_deaf_clients_cost_no_memory(tmp_path: Path, sent: Sent) -> None:
    """Of answers that are not collected nothing but a sector is kept in our memory, and others are served."""
    content = random.Random(8).randbytes(SIZE)
    with served(image(tmp_path, "vhd", content)) as (running, other):
        clients = [running.client(structured=True) for _ in range(6)]
        for client in clients:
            for _ in range(4):
                client.send(READ, 0, MIB)
        running.on_loop()
        assert other.read(MIB, MIB) == content[MIB : 2 * MIB]
        assert running.server.memory.used_bytes < 12 * KIB
        for client in clients:
            for answer in client.answers(4).values():
                assert answer.content(0, MIB) == content[:MIB]


def test_nothing_is_sent_to_a_closed_socket(tmp_path: Path, sent: Sent) -> None:
    """The number of a closed socket may belong to another file, which must not be written to."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * MIB)
    loop = Loop()
    ours, theirs = socket.socketpair()
    with ours, FileStore.open(path) as file:
        theirs.setblocking(False)
        channel = Channel(loop, theirs, lambda events: None)
        channel.close()
        assert channel.send_file(file, 0, MIB) == MIB
    loop.close()
    assert not sent.bytes
