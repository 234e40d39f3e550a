# SPDX-License-Identifier: Apache-2.0
"""A machine's serial console: a hub in the worker to which several watchers can connect, and the client side.

Decides who may type, how much earlier output a new watcher sees, how long the log may become, and what happens to a
slow watcher (it misses output and gets a notice; the guest and the other watchers never wait for it). Must not know
terminals (vmm/cli/console.py) or why a machine starts and ends.

    QEMU's serial.sock  <->  ConsoleHub  ->  console.log, console.log.1          (bounded; the scroll-back)
                                  ^
                                  |  console.sock: a line of JSON each way, then bytes
                              watchers

A watcher's line: {"type": "alone" | "shared" | "take" | "never", "scrollback": BYTES}. The answer: {"ok": true,
"typing": true | false, "machine": NAME} or {"ok": false, "error": ...}. `alone` may type if no other watcher does,
`shared` together with others who share, `take` ends the others' typing. A watcher that may not type still watches.

The hub survives QEMU's restarts (it reconnects) and a worker's death (the log is a file; the next worker opens
console.sock again, and watchers reconnect). While no hub is connected, QEMU discards the guest's output.

Each start of the machine is marked in the log, and scroll-back does not go back beyond the last mark: a script that
waits for "login:" means that of the present start.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from typing import Any, Final, Literal, get_args

from vmm.host.private_socket import bind_private
from vmm.model.errors import InUse, VmmError, of_os_error

Typing = Literal["alone", "shared", "take", "never"]

LOG_BYTES: Final = 1024 * 1024  # of each of the two files
SCROLLBACK_BYTES: Final = 64 * 1024
BEHIND_BYTES: Final = 256 * 1024  # buffered for a watcher that does not read
MAX_WATCHERS: Final = 32
REQUEST_SECONDS: Final = 5.0
UNREAD_SECONDS: Final = 10.0  # input is dropped if the guest does not read for this long
RECONNECT_SECONDS: Final = 0.1
_PIECE_BYTES: Final = 16 * 1024
_MAX_REQUEST_BYTES: Final = 4096
_START_MARK: Final = b"[vmm: started "
_MISSED: Final = b"\r\n[vmm: output was omitted here: this terminal is too slow]\r\n"


class ConsoleLog:
    """What the guest wrote, in two files that are rotated; the older one is PATH.1."""

    def __init__(self, path: str, *, max_bytes: int = LOG_BYTES) -> None:
        """Open or create the log, accessible to our user only. Raises VmmError."""
        self.path = path
        self._max_bytes = max_bytes
        self._descriptor = -1
        self._size = 0
        self._open()

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._descriptor = os.open(self.path, flags, 0o600)
            self._size = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise of_os_error(error, "open the console's log", path=self.path) from error

    @property
    def size_bytes(self) -> int:
        """The size of the newer file."""
        return self._size

    def append(self, data: bytes) -> None:
        """Append output. If the disk is full, only the output is lost: a console must not stop a machine."""
        with contextlib.suppress(OSError, VmmError):
            if self._size + len(data) > self._max_bytes and self._size > 0:
                os.rename(self.path, older_log(self.path))
                os.close(self._descriptor)
                self._descriptor = -1
                self._open()
            if self._descriptor < 0:
                self._open()
            self._size += os.write(self._descriptor, data[-self._max_bytes :])

    def scrollback(self, count: int) -> bytes:
        """The last `count` bytes, but nothing from before the machine's last start."""
        data = read_log(self.path, count)
        _, mark, since = data.rpartition(_START_MARK)
        return since.partition(b"\n")[2] if mark else data

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def older_log(path: str) -> str:
    """The file with the older part of the log `path`."""
    return path + ".1"


def read_log(path: str, count: int = 2 * LOG_BYTES) -> bytes:
    """The last `count` bytes of a console's log; empty if there is none. Raises VmmError."""
    data = b""
    for one in (path, older_log(path)):
        wanted = count - len(data)
        if wanted <= 0:
            break
        try:
            with open(one, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - wanted))
                data = file.read(wanted) + data
        except FileNotFoundError:
            continue
        except OSError as error:
            raise of_os_error(error, "read the console's log", path=one) from error
    return data


class _Watcher:
    """One connection to console.sock, after its request."""

    def __init__(self, writer: asyncio.StreamWriter, typing: Typing) -> None:
        self.writer = writer
        self.typing = typing
        self.may_type = False
        self._missed = False

    def show(self, data: bytes) -> None:
        """Send output to the watcher, unless too much is buffered for it already."""
        transport = self.writer.transport
        if transport.is_closing():
            return
        if transport.get_write_buffer_size() > BEHIND_BYTES:
            self._missed = True
            return
        if self._missed:
            self._missed = False
            data = _MISSED + data
        self.writer.write(data)


class ConsoleHub:
    """The console of one running machine. For one event loop.

    hub = ConsoleHub(serial_path, console_path, log_path, machine="web")
    await hub.start()              # console.sock exists, and the guest's output is logged from here on
    ...
    await hub.close()              # console.sock is removed, watchers are disconnected
    """

    def __init__(
        self,
        serial_path: str,
        console_path: str,
        log_path: str,
        *,
        machine: str = "",
        log_bytes: int = LOG_BYTES,
        on_first_output: Callable[[], None] | None = None,
    ) -> None:
        """`serial_path`: QEMU's listening end. `on_first_output` is called once, at the guest's first output."""
        self._serial_path = serial_path
        self._console_path = console_path
        self._log_path = log_path
        self._log_bytes = log_bytes
        self._machine = machine
        self._on_first_output = on_first_output
        self._watchers: list[_Watcher] = []
        self._serial: asyncio.StreamWriter | None = None
        self._typing = asyncio.Lock()
        self._connected = asyncio.Event()
        self._log: ConsoleLog | None = None
        self._server: asyncio.Server | None = None
        self._following: asyncio.Task[None] | None = None

    @property
    def watcher_count(self) -> int:
        """The number of watchers."""
        return len(self._watchers)

    async def start(self, *, wait_seconds: float = 5.0) -> None:
        """Open the log and console.sock, and connect to the serial port; if called again, only the latter.

        Returns when connected, or after `wait_seconds` without QEMU: the hub keeps trying for as long as it lives.
        Raises VmmError.
        """
        if self._server is None:
            await self._open()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._connected.wait(), wait_seconds)

    async def _open(self) -> None:
        self._log = ConsoleLog(self._log_path, max_bytes=self._log_bytes)
        listening = _listen(self._console_path)
        self._server = await asyncio.start_unix_server(self._serve, sock=listening)
        self._following = asyncio.create_task(self._follow())

    def mark_start(self) -> None:
        """Mark a new start of the guest in the log. Call before `start`, or first output may precede the mark."""
        now = time.strftime("%Y-%m-%d %H:%M:%S").encode()
        log = ConsoleLog(self._log_path, max_bytes=self._log_bytes) if self._log is None else self._log
        log.append((b"\r\n" if log.size_bytes else b"") + _START_MARK + now + b"]\r\n")
        if log is not self._log:
            log.close()

    async def close(self) -> None:
        """Close the hub. console.sock is removed first: a disconnected watcher then knows that no hub follows."""
        if self._server is not None:
            self._server.close()
            with contextlib.suppress(OSError):
                os.unlink(self._console_path)
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait({self._following})
        for watcher in list(self._watchers):
            watcher.writer.close()
        for watcher in list(self._watchers):
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(watcher.writer.wait_closed(), 1.0)
        if self._log is not None:
            self._log.close()

    # -- QEMU's side ------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_unix_connection(self._serial_path)
                self._serial = writer
                self._connected.set()
                try:
                    while data := await reader.read(_PIECE_BYTES):
                        self._show(data)
                finally:
                    self._serial = None
                    self._connected.clear()
                    writer.close()
            await asyncio.sleep(RECONNECT_SECONDS)  # between two attempts, for as long as the machine runs

    def _show(self, data: bytes) -> None:
        if self._on_first_output is not None:
            report, self._on_first_output = self._on_first_output, None
            report()
        assert self._log is not None
        self._log.append(data)
        for watcher in self._watchers:
            watcher.show(data)

    # -- the watchers' side -----------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        watcher: _Watcher | None = None
        try:
            watcher = await self._welcome(reader, writer)
            if watcher is not None:
                await self._take_keys(watcher, reader)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
            pass
        finally:
            if watcher is not None:
                self._watchers.remove(watcher)
                self._share_out()
            writer.close()

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> _Watcher | None:
        line = await asyncio.wait_for(reader.readuntil(b"\n"), REQUEST_SECONDS)
        try:
            if len(line) > _MAX_REQUEST_BYTES:
                raise VmmError("the request is too long")
            typing, scrollback = _read_request(line)
            if len(self._watchers) >= MAX_WATCHERS:
                raise InUse(f"{MAX_WATCHERS} clients already watch this console, which is its limit")
        except VmmError as error:
            writer.write(json.dumps({"ok": False, "error": error.problem}).encode() + b"\n")
            await writer.drain()
            return None
        watcher = _Watcher(writer, typing)
        if typing == "take":
            for other in self._watchers:
                other.typing = "never"
        self._watchers.append(watcher)
        self._share_out()
        assert self._log is not None
        answer = {"ok": True, "typing": watcher.may_type, "machine": self._machine}
        writer.write(json.dumps(answer).encode() + b"\n" + self._log.scrollback(scrollback))
        return watcher

    def _share_out(self) -> None:
        """Decide who may type: the last taker; else the first who wants to, with all who share if it shares."""
        wanting = [watcher for watcher in self._watchers if watcher.typing != "never"]
        taking = [watcher for watcher in wanting if watcher.typing == "take"]
        first = taking[-1] if taking else wanting[0] if wanting else None
        for watcher in self._watchers:
            together = first is not None and first.typing == "shared" and watcher.typing == "shared"
            watcher.may_type = watcher is first or together

    async def _take_keys(self, watcher: _Watcher, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(_PIECE_BYTES):
            if not watcher.may_type:
                continue
            # A guest that does not read delays only those who type. After the time-out its input is dropped.
            with contextlib.suppress(OSError, TimeoutError):
                async with self._typing, asyncio.timeout(UNREAD_SECONDS):
                    await self._connected.wait()
                    if self._serial is not None:
                        await self._serial.drain()
                        self._serial.write(data)


def _read_request(line: bytes) -> tuple[Typing, int]:
    try:
        request = json.loads(line)
        typing, scrollback = request.get("type", "alone"), request.get("scrollback", SCROLLBACK_BYTES)
    except (ValueError, AttributeError, RecursionError):
        raise VmmError("the request is not a JSON object") from None
    if typing not in get_args(Typing) or type(scrollback) is not int or scrollback < 0:
        raise VmmError('the request must have "type" (alone, shared, take or never) and "scrollback" (bytes)')
    return typing, min(scrollback, 2 * LOG_BYTES)


def _listen(path: str) -> socket.socket:
    """A listening socket that only our user may connect to; replaces the socket of a dead worker."""
    try:
        listening = bind_private(path, backlog=MAX_WATCHERS)
    except OSError as error:
        raise of_os_error(error, "open the console's socket", path=path) from error
    listening.setblocking(False)
    return listening


# -- the client side ------------------------------------------------------------------------------------------------


def open_console(
    path: str,
    *,
    typing: Typing = "alone",
    scrollback_bytes: int = SCROLLBACK_BYTES,
    timeout_seconds: float = REQUEST_SECONDS,
) -> tuple[socket.socket, dict[str, Any]]:
    """Connect to a hub: (the connection, a byte stream in both directions from now on; the hub's answer).

    `answer["typing"]` says whether input reaches the guest. Raises NotFound if no hub listens, InUse.
    """
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        link.settimeout(timeout_seconds)
        link.connect(path)
        link.sendall(json.dumps({"type": typing, "scrollback": scrollback_bytes}).encode() + b"\n")
        line = b""
        while not line.endswith(b"\n"):
            piece = link.recv(1)  # one byte at a time: everything after the line is the guest's output
            if not piece or len(line) > _MAX_REQUEST_BYTES:
                raise VmmError("the console ended before it answered", path=path)
            line += piece
        answer = json.loads(line)
        if not answer.get("ok"):
            raise InUse(str(answer.get("error")))
        link.settimeout(None)
    except (OSError, ValueError, AttributeError) as error:
        link.close()
        if isinstance(error, OSError):
            raise of_os_error(error, "reach the console", path=path) from error
        raise VmmError("the program that answers there is not a console", path=path) from error
    except BaseException:
        link.close()
        raise
    return link, answer
