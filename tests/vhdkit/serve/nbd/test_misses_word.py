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
from tests.vhdkit.chain.engine.test_unsettled import Cold
from tests.vhdkit.serve.disks import child
from tests.vhdkit.serve.nbd.test_misses import MODES, Mode, cold, connect, owned_places
from tests.waiting import wait_until
from vhdkit import create_image, open_disk
from vhdkit import store as store_module
from vhdkit.disk import Disk
from vhdkit.serve.nbd import loop, misses
from vhdkit.serve.nbd.export import Export
from vhdkit.units import KIB, MIB

pytestmark = pytest.mark.timeout(120)


class Words:
    """In place of what the system gives: word of data comes when the test says so. Only the loop's thread calls it."""

    def __init__(self, running: Running) -> None:
        self.told: list[Callable[[], None]] = []
        self.is_prompt = False  # word comes as soon as it was asked for
        self._running = running
        running.server.loop.ask = self._ask  # type: ignore[method-assign]

    def _ask(self, ask: object, told: Callable[[], None]) -> bool:
        if self.is_prompt:
            self._running.server.loop.post(told)
        else:
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


def test_a_hold_waits_for_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question holds a file: the export is drained when its word has come, and the read is answered afterwards."""
    monkeypatch.setattr(loop, "_BRIEF_LOOKS", 0)  # which find the data before it asks again
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
        words.is_prompt = True  # it may ask again, or find the data at a look
        leave.set()
        holder.join(60)
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


class Unsettled:
    """A server of a file of which nothing was read yet, not even where its data lies."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.jobs: list[int] = []  # where a job found out where a read lies
        path = folder / "disk.vhd"
        create_image(path, 16 * MIB)
        with open_disk(path, writable=True) as disk:
            for number in range(8):
                disk.write(number * 2 * MIB, bytes([number + 1]) * 4096)
        settle = Disk.settle

        def counted(disk: Disk, offset: int, size: int) -> None:
            self.jobs.append(offset)
            settle(disk, offset, size)

        patch.setattr(Disk, "settle", counted)
        self.export = Export("", open_disk(path))


def test_where_a_read_lies_is_found_out_without_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-MISS-ENDS: word of a bitmap has the loop find out where all reads lie of which what tells is there, in turns
    that end, and asks for word of the next that is not."""
    monkeypatch.setattr(misses, "_FINDING_OUT_NS", 60_000_000_000)
    unsettled = Unsettled(tmp_path, monkeypatch)
    with serving(unsettled.export) as running, connect(running, {}) as client:
        words = Words(running)
        monkeypatch.setattr(store_module, "_preadv", Cold().read)
        asked = {client.send(READ, number * 2 * MIB, 4096): number for number in range(8)}
        wait_until(lambda: len(words.told) == 1, "it asks for word of one")
        words.is_prompt = True
        misses._FINDING_OUT_NS = -1
        words.come()
        for cookie, answer in client.answers(8).items():
            assert answer.content(asked[cookie] * 2 * MIB, 4096) == bytes([asked[cookie] + 1]) * 4096
    assert not unsettled.jobs


@pytest.mark.parametrize("has_word", [False, True])
def test_where_a_read_lies_is_found_out_by_a_job(
    has_word: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INV-MISS-ENDS: without word of what tells where a read lies, or if it comes in vain, a job finds it out."""
    unsettled = Unsettled(tmp_path, monkeypatch)

    def not_there(*arguments: object) -> int:
        raise BlockingIOError

    with serving(unsettled.export) as running, connect(running, {}) as client:
        words = Words(running)
        if not has_word:
            running.server.loop.ask = lambda ask, told: False  # type: ignore[method-assign]
        monkeypatch.setattr(store_module, "_preadv", not_there)
        cookie = client.send(READ, 2 * MIB, 4096)
        if has_word:
            for _ in range(2):  # of the bitmap, of the data
                wait_until(lambda: len(words.told) == 1, "it asks for word")
                words.come()
        assert client.answers(1)[cookie].content(2 * MIB, 4096) == b"\2" * 4096
    assert unsettled.jobs == [2 * MIB]


def test_a_hold_waits_for_word_of_where_a_read_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The question holds a file, so the export is drained after it; the read is answered after the hold."""
    unsettled = Unsettled(tmp_path, monkeypatch)
    export = unsettled.export
    with serving(export) as running, connect(running, {}) as client:
        words = Words(running)
        monkeypatch.setattr(store_module, "_preadv", Cold().read)
        cookie = client.send(READ, 2 * MIB, 4096)
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
        words.is_prompt = True
        words.come()
        assert entered.wait(60) and export.jobs == 0
        assert not export.disk.is_settled(2 * MIB, 4096)
        leave.set()
        holder.join(60)
        assert client.answers(1)[cookie].content(2 * MIB, 4096) == b"\2" * 4096


def test_what_tells_where_a_read_lies_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-MISS-ENDS: the read gets the error of the device; once the device works again, reads get their data."""
    unsettled = Unsettled(tmp_path, monkeypatch)
    unsettled.export.disk.read(0, 4096)

    def broken(*arguments: object) -> int:
        raise OSError(5, "Input/output error")

    with serving(unsettled.export) as running, connect(running, {}) as client:
        with monkeypatch.context() as patch:
            patch.setattr(store_module, "_preadv", broken)
            patch.setattr(os, "pread", broken)
            cookie = client.send(READ, 2 * MIB, 4096)
            assert client.answers(1)[cookie].error == EIO
        asked = {client.send(READ, number * 2 * MIB, 4096): number for number in range(2)}
        for cookie, answer in client.answers(2).items():
            assert answer.content(asked[cookie] * 2 * MIB, 4096) == bytes([asked[cookie] + 1]) * 4096
