# SPDX-License-Identifier: Apache-2.0
"""The console hub: watchers, the typist, scroll-back, bounded logs, and what survives restarts."""

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
    """A client at console.sock."""

    def __init__(self, link: socket.socket, answer: dict[str, object]) -> None:
        self.link = link
        self.typing = answer["typing"]

    async def see(self, words: bytes) -> bytes:
        """Read until these words have appeared; return what was read."""
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
    """A hub with its guest, and its watchers."""

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
    """Run a scene with a hub and a guest."""

    async def run() -> None:
        async with scene_in(folder, log_bytes) as scene:
            await act(scene)

    asyncio.run(run())


def test_all_watch_and_one_types(tmp_path: Path) -> None:
    """All clients see the same; the first one can type, the second only watches until the first has left."""

    async def act(scene: Scene) -> None:
        first, second = await scene.watch(), await scene.watch()
        assert (first.typing, second.typing) == (True, False)
        await scene.serial.say(b"hello\r\n")
        assert await first.see(b"hello") == await second.see(b"hello")
        await second.type(b"ignored")
        await first.type(b"ls\n")
        assert await scene.serial.hear(3) == b"ls\n"
        first.link.close()
        await until(lambda: scene.hub.watcher_count == 1, "the first one has disconnected")
        await second.type(b"now me")
        assert await scene.serial.hear(6) == b"now me"

    play(tmp_path, act)


def test_sharing_and_taking(tmp_path: Path) -> None:
    """Clients that share type together; taking over ends that; a client that only watches can never type, not even
    alone."""

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
    """A client that connects later sees the end of the earlier output, as much as it requests."""

    async def act(scene: Scene) -> None:
        first = await scene.watch()
        await scene.serial.say(b"0123456789")
        await first.see(b"9")
        assert (await (await scene.watch(scrollback=4)).see(b"9")) == b"6789"
        none = await scene.watch(scrollback=0)
        await scene.serial.say(b"new")
        assert await none.see(b"new") == b"new"

    play(tmp_path, act)


def test_watchers_survive_a_restart_of_qemu(tmp_path: Path) -> None:
    """When QEMU ends and starts again, the watchers stay connected, and the log continues."""

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
        assert await (await scene.watch()).see(b"life;") == b"second life;"  # only of this run

    play(tmp_path, act)
    text = read_log(str(tmp_path / "console.log"))
    assert re.fullmatch(rb"first life;\r\n\[vmm: started [-0-9: ]*\]\r\nsecond life;", text)


def test_a_new_worker_takes_over_socket_and_log(tmp_path: Path) -> None:
    """A hub in a new worker finds the dead one's socket and log, and continues with both."""

    async def act(scene: Scene) -> None:
        watcher = await scene.watch()
        await scene.serial.say(b"before;")
        await watcher.see(b"before;")

    play(tmp_path, act)
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(tmp_path / "console"))  # as a killed one leaves it
    dead.close()
    (tmp_path / "serial").unlink(missing_ok=True)

    async def again(scene: Scene) -> None:
        assert await (await scene.watch()).see(b"before;") == b"before;"

    play(tmp_path, again)


def test_closing_removes_the_socket_first(tmp_path: Path) -> None:
    """The socket is removed before the watchers are disconnected, so that they do not try again."""

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


def test_socket_and_log_are_private(tmp_path: Path) -> None:
    """Socket and log are accessible only to their owner."""

    async def act(scene: Scene) -> None:
        await asyncio.sleep(0)
        for name in "console", "console.log":
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600

    play(tmp_path, act)


def test_log_is_bounded(tmp_path: Path) -> None:
    """The log is rotated at its limit, and scroll-back reaches across the rotation."""

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


def test_one_large_piece_keeps_the_log_within_its_limit(tmp_path: Path) -> None:
    """Of a piece larger than the log, only its end is kept."""
    log = ConsoleLog(str(tmp_path / "log"), max_bytes=10)
    log.append(b"a" * 8)
    log.append(b"0123456789abcdef")
    log.close()
    assert read_log(str(tmp_path / "log")) == b"a" * 8 + b"6789abcdef"
    assert (tmp_path / "log").stat().st_size == 10


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    """A log in a missing folder, or behind a symbolic link, is an error that names it."""
    with pytest.raises(NotFound, match="nowhere"):
        ConsoleLog(str(tmp_path / "nowhere" / "console.log"))
    (tmp_path / "link").symlink_to("/etc/hostname")
    with pytest.raises(VmmError, match="link"):
        ConsoleLog(str(tmp_path / "link"))
    assert read_log(str(tmp_path / "none")) == b""


def test_a_full_disk_does_not_stop_the_console(tmp_path: Path) -> None:
    """If the log cannot be written, the watchers still see everything."""
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


def test_a_slow_watcher_does_not_delay_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that does not read misses output, and is informed; the others and the log get everything."""
    monkeypatch.setattr(console, "BEHIND_BYTES", 1000)

    async def act(scene: Scene) -> None:
        slow, quick = await scene.watch(), await scene.watch()
        for number in range(300):
            await scene.serial.say(b"%4096d" % number)
            await quick.see(b"%4096d" % number)
        seeing = asyncio.create_task(slow.see(b"omitted here"))
        await until(
            lambda: all(not one.writer.transport.get_write_buffer_size() for one in scene.hub._watchers), "all is sent"
        )
        await scene.serial.say(b"the end")
        assert len(await seeing) < 300 * 4096
        await quick.see(b"the end")

    play(tmp_path, act)


def test_a_guest_that_does_not_read_its_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that never reads costs bounded memory, and its output still arrives."""
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
    """A malformed request is answered with an error, and the hub keeps running."""

    async def act(scene: Scene) -> None:
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "console"))
        writer.write(request_line)
        answer = json.loads(await reader.readline())
        assert answer["ok"] is False and answer["error"]
        writer.close()
        assert (await scene.watch()).typing is True

    play(tmp_path, act)


def test_too_many_watchers(tmp_path: Path) -> None:
    """One client over the limit is refused, and accepted after another one has left."""

    async def act(scene: Scene) -> None:
        watchers = [await scene.watch() for _ in range(MAX_WATCHERS)]
        with pytest.raises(InUse, match=str(MAX_WATCHERS)):
            await scene.watch()
        watchers[3].link.close()
        await until(lambda: scene.hub.watcher_count < MAX_WATCHERS, "one has disconnected")
        await scene.watch()

    play(tmp_path, act)
