# SPDX-License-Identifier: Apache-2.0
"""Reads of what is not in memory, where the system gives word of it."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.nbd_client import EIO, READ, Running, serving
from tests.vhdkit.serve.disks import child
from tests.vhdkit.serve.nbd.test_misses import MODES, Mode, cold, connect, owned_places
from tests.waiting import wait_until
from vhdkit import create_image, open_disk
from vhdkit.serve.nbd.export import Export
from vhdkit.units import KIB, MIB

pytestmark = pytest.mark.timeout(120)


class Words:
    """In place of what the system gives: word of data comes when the test says so. Only the loop's thread calls it."""

    def __init__(self, running: Running) -> None:
        self.told: list[Callable[[], None]] = []
        self._running = running
        running.server.loop.ask = self._ask  # type: ignore[method-assign]

    def _ask(self, ask: object, told: Callable[[], None]) -> bool:
        self.told.append(told)
        return True

    def come(self) -> None:
        """Of the one question that was asked."""
        self._running.server.loop.post(self.told.pop(0))


@MODES
def test_word_of_data_wakes_the_loop(mode: Mode) -> None:
    """INV-MISS-ENDS: where the system gives word of data, that of one of a client's reads wakes the loop to answer all
    that are there; none has a thread."""
    with cold(mode) as (running, client, store):
        words = Words(running)
        content = child().content
        for count in (1, 40):
            store.cool()
            asked = {
                client.send(READ, place, 512): place for place in owned_places(running.server.exports[0], 512)[:count]
            }
            wait_until(lambda count=count: store.sectors_asked() == count, "all were tried")  # type: ignore[misc]
            wait_until(lambda: len(words.told) == 1, "it asks for word")
            store.deliver()
            words.come()
            for cookie, answer in client.answers(count).items():
                place = asked[cookie]
                assert answer.content(place, 512) == content[place : place + 512]
        assert store.waits == 0 and not words.told


def test_word_that_comes_in_vain() -> None:
    """INV-MISS-ENDS: a read that is not there although word of it came becomes a job, which also reports an error."""
    with cold() as (running, client, store):
        words = Words(running)
        place = owned_places(running.server.exports[0], 512)[0]
        for is_broken, error in ((False, 0), (True, EIO)):
            store.gate.set()
            store.is_broken = is_broken
            cookie = client.send(READ, place, 512)
            if not is_broken:
                wait_until(lambda: len(words.told) == 1, "it asks for word")
                words.come()
            assert client.answers(1)[cookie].error == error
        assert store.waits == 1


def test_a_hold_waits_for_word() -> None:
    """A question holds a file: the export is drained when its word has come, and the read is answered afterwards."""
    with cold() as (running, client, store):
        words, export = Words(running), running.server.exports[0]
        place = owned_places(export, 512)[0]
        cookie = client.send(READ, place, 512)
        wait_until(lambda: len(words.told) == 1 and export.jobs == 1, "it asks for word")
        entered, leave = threading.Event(), threading.Event()

        def hold() -> None:
            with running.server.hold([export]):
                entered.set()
                assert leave.wait(60)

        holder = threading.Thread(target=hold, daemon=True)
        holder.start()
        wait_until(lambda: export.held, "the hold has begun")
        running.on_loop()
        assert not entered.is_set()
        store.deliver()
        words.come()
        assert entered.wait(60) and export.jobs == 0
        leave.set()
        holder.join(60)
        wait_until(lambda: len(words.told) == 1, "it asks again")
        words.come()
        assert client.answers(1)[cookie].content(place, 512) == child().content[place : place + 512]


@MODES
def test_a_cold_file(mode: Mode, tmp_path: Path) -> None:
    """Reads of a real file that is not in memory, small and large, aligned and not, are answered with its content."""
    path, rng = tmp_path / "disk.vhd", random.Random(7)
    create_image(path, 16 * MIB)
    content = rng.randbytes(16 * MIB)
    with open_disk(path, writable=True) as disk:
        disk.write(0, content)
    with serving(Export("", open_disk(path))) as running, connect(running, mode) as client:
        for depth in (1, 16, 64):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            asked = {}
            for _ in range(depth):
                place, size = rng.randrange(15 * MIB), rng.choice((1, 512, 4096, 4096, 5000, 300 * KIB))
                if rng.random() < 0.7:
                    place = place // 4096 * 4096
                asked[client.send(READ, place, size)] = place, size
            for cookie, answer in client.answers(depth).items():
                place, size = asked[cookie]
                assert answer.content(place, size) == content[place : place + size]
        assert running.server.exports[0].jobs == 0
