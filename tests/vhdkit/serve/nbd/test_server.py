# SPDX-License-Identifier: Apache-2.0
"""The server as a whole: clients that connect and disconnect, hostile clients, holding, ending."""

from __future__ import annotations

import errno
import socket
import threading
import time
import tracemalloc
from pathlib import Path
from typing import NoReturn

import pytest

from tests import nbd_client as nbd
from tests.harness.power import Scene
from tests.harness.stores import MemStore
from tests.nbd_client import DISC, FLUSH, FUA, READ, STATUS, WRITE, HungUp, Running, serving
from tests.vhdkit.serve.disks import SIZE, child, empty, export_of, sparse
from tests.waiting import wait_until
from vhdkit import errors
from vhdkit.serve.nbd import server as nbd_server
from vhdkit.serve.nbd.server import NbdServer
from vhdkit.units import MIB

pytestmark = pytest.mark.timeout(120)


def listening(running: Running, path: Path) -> str:
    """Make a running server listen on a unix socket."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    running.server.loop.post(lambda: running.server.listen(listener))
    running.on_loop()
    return str(path)


# -- coming and going -------------------------------------------------------------------------------------------


def test_many_short_connections(tmp_path: Path) -> None:
    """1,000 clients that connect and drop at once, or in mid-word, leave nothing behind; others are served."""
    with serving(export_of(child())) as running:
        path = listening(running, tmp_path / "socket")
        with running.dial(path) as good:
            good.start().go()
            for number in range(1000):
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(path)
                    if number % 3 == 1:
                        sock.send(b"\0\0")
                    elif number % 3 == 2:
                        sock.send(b"\0\0\0\3" + nbd.option(nbd.LIST)[:20])
                if number % 100 == 0:
                    assert len(good.read(0, 4096)) == 4096
            wait_until(lambda: len(running.server.connections) == 1, "the others have gone")


def test_gone_before_the_greeting() -> None:
    """A client that disconnected before the greeting is not kept among the connections."""
    with serving(export_of(child())) as running:
        for _ in range(20):
            running.connect().sock.close()
        running.on_loop()
        wait_until(lambda: not running.server.connections, "it has gone")


def test_idle_connections_do_not_exhaust_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the limit of clients the oldest without an export is disconnected; those with one stay."""
    monkeypatch.setattr(nbd_server, "MAX_CONNECTIONS", 5)
    with serving(export_of(child())) as running:
        path = listening(running, tmp_path / "socket")
        idle = [running.dial(path) for _ in range(4)]
        for client in idle:
            client.greet()
        working = [running.dial(path).start().go() for _ in range(3)]
        assert idle[0].is_hung_up() and idle[1].is_hung_up()
        assert all(len(client.read(0, 512)) == 512 for client in working)
        working += [running.dial(path).start().go() for _ in range(2)]
        with running.dial(path) as refused:
            assert refused.is_hung_up()
        assert all(len(client.read(0, 512)) == 512 for client in working)


def test_messages_say_why_a_client_makes_room(caplog: pytest.LogCaptureFixture) -> None:
    """A client that is disconnected because descriptors are used up is not said to be one of too many."""

    class Exhausted(socket.socket):
        def accept(self) -> NoReturn:
            """As with no descriptor left."""
            raise OSError(errno.EMFILE, "Too many open files")

    with serving(export_of(child())) as running, running.connect() as idle, Exhausted() as listener:
        idle.greet()
        running.server.loop.post(lambda: running.server._accept(listener))
        assert idle.is_hung_up()
        running.on_loop()
        assert "no descriptors are left: test, which has chosen no export, is disconnected" in caplog.text
        assert "more than" not in caplog.text


def test_a_greedy_peer_makes_room_for_new_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the limit, a peer with more than its share loses what it never used, then what has been idle longest."""
    monkeypatch.setattr(nbd_server, "MAX_CONNECTIONS", 5)
    monkeypatch.setattr("vhdkit.serve.nbd.admission.LEAST_SHARE", 2)
    with serving(export_of(child())) as running:
        path = listening(running, tmp_path / "socket")
        guest = running.client()  # of another peer
        greedy = [running.dial(path).start().go() for _ in range(4)]
        for client in (greedy[1], greedy[0], greedy[3]):
            assert len(client.read(0, 512)) == 512
        newcomer = running.dial(path).start().go()
        assert greedy[2].is_hung_up() and len(newcomer.read(0, 512)) == 512
        another = running.dial(path).start().go()
        assert greedy[1].is_hung_up(), "it was idle for longest"
        for client in (guest, greedy[0], greedy[3], newcomer, another):
            assert len(client.read(0, 512)) == 512


def test_clients_that_do_not_finish_negotiation_are_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that never selects an export is disconnected after a while; one that has may be silent."""
    monkeypatch.setattr(nbd_server, "HANDSHAKE_SECONDS", 0.2)
    with serving(export_of(child())) as running:
        working, undecided = running.client(), running.connect()
        undecided.greet()
        assert undecided.is_hung_up()
        assert len(working.read(0, 512)) == 512


def test_names_differ() -> None:
    """Two exports with the same name are refused."""
    with pytest.raises(errors.InvalidArgument):
        NbdServer([export_of(child(), name="a"), export_of(child(), name="a")])


def test_exit_last() -> None:
    """With `exit_last` the server ends when the last client that used an export has gone, not before the first."""
    with serving(export_of(child()), exit_last=True) as running:
        running.connect().sock.close()
        running.on_loop()
        first, second = running.client(), running.client()
        first.send(DISC)
        assert first.is_hung_up()
        assert len(second.read(0, 512)) == 512
        second.sock.close()
        running.join()


# -- hostile clients --------------------------------------------------------------------------------------------


def test_client_that_never_reads() -> None:
    """Row 35: clients that request but never read cost bounded memory, and others are served as before."""
    with serving(export_of(sparse(64 * MIB))) as running, running.client() as good:
        assert good.call(WRITE, 0, payload=b"x" * 4 * MIB).error == 0
        tracemalloc.start()
        try:
            greedy = [running.client(structured=number % 2 == 0, contexts=["base:allocation"]) for number in range(4)]
            for client in greedy:
                client.sock.setblocking(False)
                with pytest.raises(BlockingIOError):
                    for number in range(100_000):
                        client.send(READ if number % 4 else STATUS, 0, MIB if number % 2 else 3 * MIB)
            for _ in range(50):
                assert good.read(0, 65536) == b"x" * 65536
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 48 * MIB, f"{peak // MIB} MiB for four clients that do not read"


def test_flood_of_options_is_bounded() -> None:
    """Row 6: a client that pipelines LISTs and never reads does not fill the memory with answers."""
    exports = [export_of(empty(), name=f"disk {number}") for number in range(50)]
    for export in exports:
        export.description = "x" * 4096
    with serving(*exports) as running:
        tracemalloc.start()
        try:
            client = running.connect()
            client.greet()
            client.send_bytes(nbd.option(nbd.LIST) * 4000)
            with running.client("disk 1") as good:
                assert good.read(0, 512) == bytes(512)
            time.sleep(0.2)  # time in which it would fill the memory
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 8 * MIB
        for _ in range(300):
            assert client.option_replies(nbd.LIST)[-1] == (nbd.ACK, b"")


def test_client_death_with_requests_in_flight() -> None:
    """Clients that die with reads, writes and flushes in flight affect no other client, and their jobs end."""
    with serving(export_of(child())) as running, running.client() as good:
        for turn in range(30):
            client = running.client(structured=turn % 2 == 0)
            for number in range(8):
                client.send(READ, number, SIZE - 100)
                client.send(WRITE, 512 * number + 1, payload=b"x" * 3000, flags=FUA)
                client.send(FLUSH)
            client.sock.close()
        assert len(good.read(0, SIZE)) == SIZE
        wait_until(lambda: len(running.server.connections) == 1, "the others have gone")
        wait_until(
            lambda: running.server.memory.used_bytes == 0 and running.server.exports[0].jobs == 0, "its jobs are done"
        )


class SlowReads(MemStore):
    """A device whose reads block until `go` is set."""

    def __init__(self, start: MemStore) -> None:
        super().__init__(start.name, sectors=dict(start._sectors), size_bytes=start.size())
        self.go = threading.Event()
        self.go.set()

    def try_pread_into(self, offset_bytes: int, buffer: memoryview) -> bool:
        """Never possible without waiting."""
        return False

    def pread_into(self, offset_bytes: int, buffer: memoryview) -> None:
        """Wait, then read."""
        assert self.go.wait(20)
        super().pread_into(offset_bytes, buffer)


def test_cold_reads_do_not_block_others() -> None:
    """A client that waits for a slow device does not stop the clients of another export."""
    scene = child()
    slow = SlowReads(scene.leaf)
    with serving(export_of(scene, store=slow, name="slow"), export_of(child(), name="fast")) as running:
        waiting, other = running.client("slow"), running.client("fast")
        content = waiting.read(0, SIZE)
        slow.go.clear()
        cookies = {waiting.send(READ, 600 * number, 512): 600 * number for number in range(20)}
        for _ in range(20):
            assert len(other.read(0, 65536)) == 65536
        slow.go.set()
        for cookie, answer in waiting.answers(len(cookies)).items():
            assert answer.data[0][1] == content[cookies[cookie] : cookies[cookie] + 512]


# -- holding still ----------------------------------------------------------------------------------------------


def test_hold() -> None:
    """While an export is held no request is in flight and none begins; then all are answered."""
    scene = child()
    export = export_of(scene)
    with serving(export) as running:
        clients = [running.client(structured=number % 2 == 0) for number in range(4)]
        for turn in range(6):
            asked = []
            for number, client in enumerate(clients):
                offset = 4096 * number
                client.send(WRITE, offset, payload=bytes([turn + 1]) * 4000, flags=FUA * (turn % 2))
                client.send(WRITE, MIB + 4096 * number + 1, payload=bytes([turn + 1]) * 77)
                client.send(READ, 0, SIZE)
                asked.append(3)
            with running.server.hold([export]):
                assert export.jobs == 0
                before = export.disk.read(0, SIZE)
                time.sleep(0.02)  # time in which a job that was not held would begin
                assert export.jobs == 0
                assert export.disk.read(0, SIZE) == before
            for client, count in zip(clients, asked, strict=True):
                assert not any(answer.error for answer in client.answers(count).values())
        assert all(client.read(4096 * number, 4000) == b"\6" * 4000 for number, client in enumerate(clients))


def test_a_hold_beside_many_listings() -> None:
    """A hold begins although most of the listings of many clients have not begun; afterwards all are answered."""
    export = export_of(child())
    with serving(export) as running:
        clients = [running.client(contexts=["base:allocation"]) for _ in range(50)]
        for client in clients:
            for _ in range(8):
                client.send(STATUS, 0, SIZE)
        running.on_loop()
        with running.server.hold([export]) as hold:
            assert not export.jobs and not hold.seconds
            waiting = sum(one._serving.jobs for one in running.server.connections if one._serving is not None)
        assert waiting, "all was answered before the hold: the test could not fail"
        assert hold.seconds > 0
        for client in clients:
            assert not any(answer.error for answer in client.answers(8).values())


def test_holds_take_turns_and_end_with_the_server() -> None:
    """Two threads that hold do not deadlock; a hold on a server that has ended raises instead of waiting."""
    export = export_of(child())
    with serving(export) as running:
        inside: list[int] = []

        def hold() -> None:
            for _ in range(20):
                with running.server.hold([export]):
                    inside.append(1)
                    assert len(inside) == 1
                    inside.pop()

        threads = [threading.Thread(target=hold) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        running.end()
        with pytest.raises(errors.InvalidArgument), running.server.hold([export]):
            pass


# -- ending -----------------------------------------------------------------------------------------------------


def test_stop_answers_what_is_in_flight() -> None:
    """Row 41: at the end started requests are answered, and everything answered is in the file."""
    scene = empty()
    export = export_of(scene)
    running = Running(NbdServer([export]))
    client = running.client()
    for number in range(10):
        client.send(WRITE, 4096 * number, payload=bytes([number + 1]) * 4096, flags=FUA)
    first = client.answer()
    running.server.stop()
    answered = [first]
    with pytest.raises(HungUp):
        while True:
            answered.append(client.answer())
    running.join()
    assert running.failure is None
    assert not any(answer.error for answer in answered)
    scene.leaf.frozen = True
    running.close()
    with serving(export_of(Scene(scene.leaf, [], b""), read_only=True)) as again, again.client() as reader:
        for number in range(len(answered)):
            assert reader.read(4096 * number, 4096) == bytes([number + 1]) * 4096


def test_stop_with_clients_in_every_phase() -> None:
    """Half-open, undecided, silent, never-reading clients: the server ends soon all the same."""
    with serving(export_of(child())) as running:
        clients = [running.connect(), running.client(), running.client(structured=True)]
        greeted = running.connect()
        greeted.greet()
        greeted.send_bytes(nbd.option(nbd.GO, nbd.go_data(""))[:20])
        clients[2].send(READ, 0, 4096)
        running.on_loop()
        began = time.monotonic()
        running.end()
        assert time.monotonic() - began < nbd_server.GRACE_SECONDS
        assert greeted.is_hung_up()
