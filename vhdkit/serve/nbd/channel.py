# SPDX-License-Identifier: Apache-2.0
"""A client's socket on the loop: non-blocking, plain or TLS, with the output that the client has not accepted yet.

Decides which events of a socket the loop watches, and what happens to bytes that the socket does not accept at once.
Must not know what the bytes mean.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable

from vhdkit.sending import SentFile
from vhdkit.serve.nbd.loop import HANGUP, READABLE, WRITABLE, Loop
from vhdkit.serve.nbd.stats import Stats
from vhdkit.units import SECTOR_SIZE, round_up

_UNWATCHED = -1
_WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Channel:
    """Bytes to and from one client. Methods raise OSError (SSLError too) when the client is gone."""

    def __init__(
        self, loop: Loop, sock: socket.socket, ready: Callable[[int], None], stats: Stats | None = None
    ) -> None:
        """Take over a connected, non-blocking socket; `ready(events)` is called when it becomes ready."""
        self._loop = loop
        self._stats = stats or Stats()  # counts the traffic
        self._sock = sock
        self._fd = sock.fileno()
        self._ready = ready
        self._events = READABLE
        self.hung_up = False  # the client has closed both directions: nothing reaches it
        self.unsent: list[memoryview] = []
        self.unsent_bytes = 0
        self.late_bytes = 0  # sent of what the socket had not accepted at once
        self._is_full = False  # `send_file` could not send all
        self._closed = False
        loop.watch(self._fd, READABLE, ready)

    def is_closed(self) -> bool:
        """True after `close`."""
        return self._closed

    @property
    def is_local(self) -> bool:
        """True if the peer is a process on this machine and gets the bytes as they are."""
        return self._sock.family == socket.AF_UNIX and not self.is_secure

    @property
    def is_secure(self) -> bool:
        """True once it is encrypted."""
        return isinstance(self._sock, ssl.SSLSocket)

    def has_pending(self) -> bool:
        """True when decrypted bytes are buffered, which the loop cannot see."""
        return isinstance(self._sock, ssl.SSLSocket) and self._sock.pending() > 0

    def receive_into(self, buffer: memoryview) -> int | None:
        """How many bytes were received; 0 at the end of the stream, None if there are none yet."""
        try:
            received = self._sock.recv_into(buffer)
        except _WOULD_BLOCK:
            return None
        self._stats.bytes_received += received
        return received

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send what the socket accepts now and keep a copy of the rest: the caller may reuse `data`.

        If the client is gone, the connection is closed without an error.
        """
        if self._closed or not data:
            return
        sent = 0
        if not self.unsent:
            try:
                sent = self._sock.send(data)
            except _WOULD_BLOCK:
                pass
            except OSError:
                self.close()
                return
            self._stats.bytes_sent += sent
            if sent == len(data):
                return
        self.unsent.append(memoryview(bytes(memoryview(data)[sent:])))
        self.unsent_bytes += len(data) - sent

    def offer(self, data: memoryview, least: int) -> int:
        """Send what the socket accepts now of data that can be had again; returns how much of it is taken care of.

        Of the rest only what is needed to reach `least` bytes is kept, or a multiple of sectors after that. At least
        one sector is kept if the socket accepts nothing. With TLS all of the rest is kept: what was encrypted once
        must be sent.
        """
        if self._closed or self.unsent or self.is_secure:
            self.send(data)
            return len(data)
        sent = 0
        try:
            sent = self._sock.send(data)
        except _WOULD_BLOCK:
            pass
        except OSError:
            self.close()
            return len(data)
        self._stats.bytes_sent += sent
        end = min(max(least + round_up(max(sent - least, 0), SECTOR_SIZE), SECTOR_SIZE), len(data))
        if sent < end:
            self.unsent.append(memoryview(bytes(data[sent:end])))
            self.unsent_bytes += end - sent
        return end

    def send_file(self, file: SentFile, offset_bytes: int, size_bytes: int) -> int:
        """Send from a range of a file what the socket accepts now; returns how much of it is taken care of.

        Nothing may be unsent. See `SentFile.send` for why it may be less than the socket would accept. Raises
        DiskClosed.
        """
        assert self.is_local and not self.unsent
        if self._closed:  # the number of the socket may be another file's by now
            return size_bytes
        sent = 0
        while sent < size_bytes and (count := file.send(self._fd, offset_bytes + sent, size_bytes - sent)):
            sent += count
        self._stats.bytes_sent += sent
        if self._is_full:
            self.late_bytes += sent
        self._is_full = sent < size_bytes
        return sent

    def send_unsent(self) -> None:
        """Send as much of the kept output as the socket accepts."""
        while self.unsent:
            data = self.unsent[0]
            try:
                sent = self._sock.send(data)
            except _WOULD_BLOCK:
                return
            self._stats.bytes_sent += sent
            self.unsent_bytes -= sent
            self.late_bytes += sent
            if sent < len(data):
                self.unsent[0] = data[sent:]
            else:
                self.unsent.pop(0)

    def ready_to_send(self, events: int) -> None:
        """Send kept output when `events` show that there is room, or that the client hung up.

        If the client hung up, sending fails and the connection is closed; otherwise the loop would report the hangup
        forever.
        """
        if events & HANGUP:
            self.hung_up = True
        if self.unsent and events & (WRITABLE | HANGUP):
            self.send_unsent()
            if self.unsent and events & HANGUP:
                self.close()

    def watch(self, *, reading: bool) -> None:
        """Wait for input when `reading`, for room when output is unsent, and always for the client to hang up."""
        events = (READABLE if reading else 0) | (WRITABLE if self.unsent else 0)
        if not events and self.hung_up:  # else the loop would report it over and over
            events = _UNWATCHED
        if events == self._events:
            return
        if events == _UNWATCHED:
            self._loop.unwatch(self._fd)
        elif self._events == _UNWATCHED:
            self._loop.watch(self._fd, events, self._ready)
        else:
            self._loop.change(self._fd, events)
        self._events = events

    def enlarge(self, size_bytes: int) -> None:
        """Let the kernel keep that much of what the client has not received yet."""
        with contextlib.suppress(OSError):  # gone already
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size_bytes)

    def start_tls(self, context: ssl.SSLContext) -> None:
        """Start encryption, as the server; call `shake_hands` until it is done. No output may be unsent."""
        assert not self.unsent
        self._loop.unwatch(self._fd)
        self._sock = context.wrap_socket(self._sock, server_side=True, do_handshake_on_connect=False)
        self._fd = self._sock.fileno()
        self._events = READABLE
        self._loop.watch(self._fd, READABLE, self._ready)

    def shake_hands(self) -> bool:
        """Continue the TLS handshake; True when it is done."""
        assert isinstance(self._sock, ssl.SSLSocket)
        self._events = READABLE
        done = False
        try:
            self._sock.do_handshake()
            done = True
        except ssl.SSLWantWriteError:
            self._events = WRITABLE
        except ssl.SSLWantReadError:
            pass
        self._loop.change(self._fd, self._events)
        return done

    def close(self) -> None:
        """Close the connection. Closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        self.unsent.clear()
        self.unsent_bytes = 0
        self._loop.unwatch(self._fd)
        if isinstance(self._sock, ssl.SSLSocket):
            with contextlib.suppress(OSError, ValueError):  # send close_notify if that is still possible
                self._sock.unwrap()
        self._sock.close()
