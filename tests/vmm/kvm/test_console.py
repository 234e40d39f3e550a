# SPDX-License-Identifier: Apache-2.0
"""The console hub: watchers, who types, scroll-back, bounded logs, and what survives restarts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from tests.waiting import until
from vmm.kvm import console
from vmm.kvm.console import LOG_BYTES, MAX_WATCHERS, ConsoleHub, ConsoleLog, Typing, open_console, read_log
from vmm.model.errors import InUse, NotFound, VmmError


class Serial:
    """QEMU's end of the serial port, and the guest behind it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._server: asyncio.Server
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter
        self.connected = asyncio.Event()

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self._path)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.connected.set()

    async def say(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def hear(self, count: int) -> bytes:
        async with asyncio.timeout(30):
            return await self._reader.readexactly(count)

    def stop(self) -> None:
        self.connected.clear()
        self._server.close()
        with contextlib.suppress(AttributeError):
            self._writer.close()


class Watcher:
    """Somebody at console.sock."""

    def __init__(self, link: socket.socket, answer: dict[str, object]) -> None:
        self.link = link
        self.typing = answer["typing"]

    async def see(self, words: bytes) -> bytes:
        """What comes up to these words."""
        loop = asyncio.get_running_loop()
        seen = b""
        async with asyncio.timeout(30):
            while words not in seen:
                piece = await loop.sock_recv(self.link, 65536)
                assert piece, f"ended after {seen!r}"
                seen += piece
        return seen

    async def type(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.link, data)

    async def ended(self) -> bool:
        async with asyncio.timeout(30):
            while await asyncio.get_running_loop().sock_recv(self.link, 65536):
                pass
        return True


class Scene:
    """A hub with its guest, and those who watch."""

    def __init__(self, folder: Path, log_bytes: int) -> None:
        self.folder = folder
        self.serial = Serial(folder / "serial")
        self.hub = ConsoleHub(
            str(folder / "serial"), str(folder / "console"), str(folder / "console.log"), log_bytes=log_bytes
        )
        self._links: list[socket.socket] = []

    async def watch(self, typing: Typing = "alone", scrollback: int = 1000) -> Watcher:
        path = str(self.folder / "console")
        link, answer = await asyncio.to_thread(open_console, path, typing=typing, scrollback_bytes=scrollback)
        link.setblocking(False)
        self._links.append(link)
        return Watcher(link, answer)

    def close_links(self) -> None:
        for link in self._links:
            link.close()


@contextlib.asynccontextmanager
async def scene_in(folder: Path, log_bytes: int) -> AsyncIterator[Scene]:
    scene = Scene(folder, log_bytes)
    await scene.serial.start()
    await scene.hub.start()
    try:
        async with asyncio.timeout(30):
            await scene.serial.connected.wait()
        yield scene
    finally:
        scene.close_links()
        await scene.hub.close()
        scene.serial.stop()


def play(folder: Path, act: Callable[[Scene], Awaitable[None]], *, log_bytes: int = LOG_BYTES) -> None:
    """Run an act with a hub and a guest."""

    async def run() -> None:
        async with scene_in(folder, log_bytes) as scene:
            await act(scene)

    asyncio.run(run())


def test_all_watch_and_one_types(tmp_path: Path) -> None:
    """Everybody sees the same; the first types, the second only watches until the first has gone."""

    async def act(scene: Scene) -> None:
        first, second = await scene.watch(), await scene.watch()
        assert (first.typing, second.typing) == (True, False)
        await scene.serial.say(b"hello\r\n")
        assert await first.see(b"hello") == await second.see(b"hello")
        await second.type(b"ignored")
        await first.type(b"ls\n")
        assert await scene.serial.hear(3) == b"ls\n"
        first.link.close()
        await until(lambda: scene.hub.watcher_count == 1, "the first has gone")
        await second.type(b"now me")
        assert await scene.serial.hear(6) == b"now me"

    play(tmp_path, act)


def test_sharing_and_taking(tmp_path: Path) -> None:
    """Those who share type together; one who takes ends it; one who never types does not even when alone."""

    async def act(scene: Scene) -> None:
        watching = await scene.watch("never")
        assert watching.typing is False
        one, other = await scene.watch("shared"), await scene.watch("shared")
        assert (one.typing, other.typing, (await scene.watch("alone")).typing) == (True, True, False)
        await one.type(b"1")
        assert await scene.serial.hear(1) == b"1"
        await other.type(b"2")
        assert await scene.serial.hear(1) == b"2"
        taker = await scene.watch("take")
        assert taker.typing is True
        await one.type(b"x")
        await other.type(b"x")
        await taker.type(b"3")
        assert await scene.serial.hear(1) == b"3"

    play(tmp_path, act)


def test_scrollback(tmp_path: Path) -> None:
    """One who comes later sees the end of what was said before, as much as he asks for."""

    async def act(scene: Scene) -> None:
        first = await scene.watch()
        await scene.serial.say(b"0123456789")
        await first.see(b"9")
        assert (await (await scene.watch(scrollback=4)).see(b"9")) == b"6789"
        none = await scene.watch(scrollback=0)
        await scene.serial.say(b"new")
        assert await none.see(b"new") == b"new"

    play(tmp_path, act)


def test_survives_qemu(tmp_path: Path) -> None:
    """When QEMU ends and starts again the watchers stay, and the log goes on."""

    async def act(scene: Scene) -> None:
        watcher = await scene.watch()
        await scene.serial.say(b"first life;")
        await watcher.see(b"life;")
        scene.serial.stop()
        (tmp_path / "serial").unlink(missing_ok=True)
        scene.hub.mark_start()
        await scene.serial.start()
        async with asyncio.timeout(30):
            await scene.serial.connected.wait()
        await scene.serial.say(b"second life;")
        assert await watcher.see(b"second life;") == b"second life;"
        await watcher.type(b"k")
        assert await scene.serial.hear(1) == b"k"
        await scene.hub.start()  # as for each start of QEMU; it is open already
        assert await (await scene.watch()).see(b"life;") == b"second life;"  # of this life alone

    play(tmp_path, act)
    text = read_log(str(tmp_path / "console.log"))
    assert re.fullmatch(rb"first life;\r\n\[vmm: started [-0-9: ]*\]\r\nsecond life;", text)


def test_survives_the_worker(tmp_path: Path) -> None:
    """A hub in a new worker finds the dead one's socket and log, and goes on with both."""

    async def act(scene: Scene) -> None:
        watcher = await scene.watch()
        await scene.serial.say(b"before;")
        await watcher.see(b"before;")

    play(tmp_path, act)
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(tmp_path / "console"))  # as one that was killed leaves it
    dead.close()
    (tmp_path / "serial").unlink(missing_ok=True)

    async def again(scene: Scene) -> None:
        assert await (await scene.watch()).see(b"before;") == b"before;"

    play(tmp_path, again)


def test_closing_tells_the_watchers(tmp_path: Path) -> None:
    """At the end the socket is gone before the watchers are hung up on, so that they do not try again."""

    async def act(scene: Scene) -> None:
        watcher = await scene.watch()
        await scene.serial.say(b"good bye")
        await watcher.see(b"bye")
        closing = asyncio.create_task(scene.hub.close())
        assert await watcher.ended()
        assert not (tmp_path / "console").exists()
        await closing
        with pytest.raises(NotFound):
            await scene.watch()

    play(tmp_path, act)


def test_private(tmp_path: Path) -> None:
    """Socket and log are for their owner alone."""

    async def act(scene: Scene) -> None:
        await asyncio.sleep(0)
        for name in "console", "console.log":
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600

    play(tmp_path, act)


def test_log_is_bounded(tmp_path: Path) -> None:
    """The log turns over at its limit, and scroll-back reaches over the turn."""

    async def act(scene: Scene) -> None:
        watcher = await scene.watch()
        for number in range(40):
            await scene.serial.say(b"%0100d" % number)
            await watcher.see(b"%0100d" % number)

    play(tmp_path, act, log_bytes=1000)
    sizes = [(tmp_path / name).stat().st_size for name in ("console.log", "console.log.1")]
    assert all(0 < size <= 1000 for size in sizes)
    text = read_log(str(tmp_path / "console.log"))
    assert text.endswith(b"%0100d" % 38 + b"%0100d" % 39) and len(text) == sum(sizes)


def test_log_takes_one_large_piece(tmp_path: Path) -> None:
    """A piece larger than the log leaves its end there, and the log within its limit."""
    log = ConsoleLog(str(tmp_path / "log"), max_bytes=10)
    log.append(b"a" * 8)
    log.append(b"0123456789abcdef")
    log.close()
    assert read_log(str(tmp_path / "log")) == b"a" * 8 + b"6789abcdef"
    assert (tmp_path / "log").stat().st_size == 10


def test_log_that_cannot_be(tmp_path: Path) -> None:
    """A log in no folder, or behind a link that somebody put there, is an error that names it."""
    with pytest.raises(NotFound, match="nowhere"):
        ConsoleLog(str(tmp_path / "nowhere" / "console.log"))
    (tmp_path / "link").symlink_to("/etc/hostname")
    with pytest.raises(VmmError, match="link"):
        ConsoleLog(str(tmp_path / "link"))
    assert read_log(str(tmp_path / "none")) == b""


def test_full_disk_stops_nothing(tmp_path: Path) -> None:
    """When the log cannot be written the watchers still see everything."""
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")

    async def act(scene: Scene) -> None:
        watcher = await scene.watch(scrollback=0)
        full = os.open("/dev/full", os.O_WRONLY)
        assert scene.hub._log is not None
        os.dup2(full, scene.hub._log._descriptor)
        os.close(full)
        await scene.serial.say(b"still here")
        assert await watcher.see(b"here") == b"still here"

    play(tmp_path, act)


def test_slow_watcher_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One who does not read misses output, and is told; the others get it all, and the log."""
    monkeypatch.setattr(console, "BEHIND_BYTES", 1000)

    async def act(scene: Scene) -> None:
        slow, quick = await scene.watch(), await scene.watch()
        for number in range(300):
            await scene.serial.say(b"%4096d" % number)
            await quick.see(b"%4096d" % number)
        seeing = asyncio.create_task(slow.see(b"left out here"))
        await until(
            lambda: all(not one.writer.transport.get_write_buffer_size() for one in scene.hub._watchers), "all is sent"
        )
        await scene.serial.say(b"the end")
        assert len(await seeing) < 300 * 4096
        await quick.see(b"the end")

    play(tmp_path, act)


def test_guest_that_takes_no_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that never reads costs no memory without bound, and its output still comes."""
    monkeypatch.setattr(console, "UNREAD_SECONDS", 0.05)

    async def act(scene: Scene) -> None:
        typist = await scene.watch()
        for _ in range(200):
            await typist.type(b"x" * 16384)
        await scene.serial.say(b"busy")
        await typist.see(b"busy")
        assert scene.hub._serial is not None
        assert scene.hub._serial.transport.get_write_buffer_size() < 200 * 16384 / 2

    play(tmp_path, act)


@pytest.mark.parametrize(
    "request_line",
    [b"{}x\n", b"[]\n", b'{"type": "loudly"}\n', b'{"scrollback": -1}\n', b"\xff\n", b"[" * 9999 + b"\n"],
)
def test_bad_requests(tmp_path: Path, request_line: bytes) -> None:
    """A request that is none is answered with an error, and the hub lives on."""

    async def act(scene: Scene) -> None:
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "console"))
        writer.write(request_line)
        answer = json.loads(await reader.readline())
        assert answer["ok"] is False and answer["error"]
        writer.close()
        assert (await scene.watch()).typing is True

    play(tmp_path, act)


def test_too_many_watchers(tmp_path: Path) -> None:
    """One more than may watch is refused, and comes in when somebody has gone."""

    async def act(scene: Scene) -> None:
        watchers = [await scene.watch() for _ in range(MAX_WATCHERS)]
        with pytest.raises(InUse, match=str(MAX_WATCHERS)):
            await scene.watch()
        watchers[3].link.close()
        await until(lambda: scene.hub.watcher_count < MAX_WATCHERS, "one has gone")
        await scene.watch()

    play(tmp_path, act)
