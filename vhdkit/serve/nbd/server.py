# SPDX-License-Identifier: Apache-2.0
"""The NBD server: listening sockets, connections, exports, and the order of shutting down.

Decides which clients are admitted, when an export is held (`hold`), and that at the end all requests in flight are
answered, and the disks flushed and closed. Must not know the protocol (`connection`) or what commands do (`export`).
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import logging
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence

from vhdkit import errors
from vhdkit.readahead import Budget
from vhdkit.serve.nbd.admission import makes_room
from vhdkit.serve.nbd.connection import Connection
from vhdkit.serve.nbd.export import Export
from vhdkit.serve.nbd.heap import trim
from vhdkit.serve.nbd.jobs import Jobs
from vhdkit.serve.nbd.loop import READABLE, Lane, Loop
from vhdkit.serve.nbd.memory import AMPLE, ClientMemory
from vhdkit.serve.nbd.options import ExportInfo, Session, TlsMode
from vhdkit.serve.nbd.scans import Scans
from vhdkit.serve.nbd.stats import Stats
from vhdkit.units import KIB

BUFFER_BYTES = AMPLE.input_bytes + AMPLE.kept_bytes + 64 * KIB  # a request that is incomplete, and more input
MAX_CONNECTIONS = 1024
HANDSHAKE_SECONDS = 600.0  # for a client to choose an export; a person may be typing options
GRACE_SECONDS = 10.0  # for clients to receive their last answers
HANG_UP_SECONDS = 2.0
_CREDENTIALS = struct.Struct("iII")  # unix(7), SO_PEERCRED: process, user, group
_TRIM_SECONDS = 0.5  # after a client has left: usually others leave with it
_ACCEPT_AGAIN_SECONDS = 0.2  # out of descriptors: a moment later some may be free
_LOOK_SECONDS = 0.2  # an event ends the wait; this is between checks whether the server has ended
_log = logging.getLogger(__name__)


class Hold:
    """One `NbdServer.hold`. `seconds`, once it is over: the time during which new requests were not served."""

    def __init__(self) -> None:
        self.began = 0.0
        self.seconds = 0.0


class NbdServer:
    """Serves exports until `stop`. `run` is the loop; other threads call only `stop` and what is documented so."""

    def __init__(
        self,
        exports: Sequence[Export],
        *,
        tls_context: ssl.SSLContext | None = None,
        tls_mode: TlsMode = TlsMode.OFF,
        exit_last: bool = False,
    ) -> None:
        """Take over open disks; the first is the default export. `exit_last`: end when the last client leaves.

        Raises InvalidArgument when two exports have one name.
        """
        self.exports = list(exports)
        names = [export.name for export in exports]
        if len(set(names)) != len(names):
            raise errors.InvalidArgument("two exports have the same name")
        self.tls_context = tls_context
        self.tls_mode = tls_mode
        self.loop = Loop()
        self.stats = Stats()
        self.jobs = Jobs(self.loop, self.stats, self.drained)
        self.scans = Scans(self.loop.call_later)
        self.memory = ClientMemory()
        self.read_ahead = Budget()
        self.buffer = memoryview(
            bytearray(BUFFER_BYTES)
        )  # both buffers are shared by all connections, which are served one at a time
        self.served: object | None = None
        self.replies = memoryview(bytearray(AMPLE.reply_bytes))
        self.connections: list[Connection] = []
        self._on_leaving: list[Callable[[], None]] = []  # called when a client leaves
        self._exit_last = exit_last
        self._listeners: list[socket.socket] = []
        self._ending = False
        self._closed = False
        self._numbers = itertools.count(1)
        self._drained: Callable[[], None] | None = None
        self._holding = threading.Lock()
        self._ended = threading.Event()
        self._users = 0  # threads that use disks of exports outside of requests
        self._left_alone = threading.Condition()
        self._judging = False  # a check for undecided clients is scheduled
        self._trimming = False  # a look at the heap is scheduled

    def catalog(self) -> list[ExportInfo]:
        """The current exports."""
        return [export.info() for export in self.exports]

    # -- clients ------------------------------------------------------------------------------------------------

    def listen(self, sock: socket.socket) -> None:
        """Accept connections on a bound socket."""
        sock.listen(128)
        sock.setblocking(False)
        self._listeners.append(sock)
        self.loop.watch(sock.fileno(), READABLE, lambda events: self._accept(sock))

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, address = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # out of descriptors: disconnect some clients before the next attempt
            self._make_room(None, "no descriptors are left")
            _log.error("cannot accept a connection: %s", error)
            self.loop.unwatch(listener.fileno())
            self.loop.call_later(_ACCEPT_AGAIN_SECONDS, lambda: self._watch_again(listener))
            return
        full = f"more than {MAX_CONNECTIONS} clients"
        if len(self.connections) >= MAX_CONNECTIONS and not self._make_room(_peer_key(sock, address), full):
            _log.warning("%s: a new one is turned away", full)
            sock.close()
            return
        self.adopt(sock, _peer_name(sock, address), _peer_key(sock, address))

    def _watch_again(self, listener: socket.socket) -> None:
        if not self._ending:
            self.loop.watch(listener.fileno(), READABLE, lambda events: self._accept(listener))

    def adopt(self, sock: socket.socket, peer: str, peer_key: Hashable = None) -> None:
        """Serve a connected socket."""
        sock.setblocking(False)
        try:
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # row 42
        except OSError as error:  # gone already
            _log.debug("%s: %s", peer, error)
            sock.close()
            return
        connection = Connection(self, sock, peer, self._left)
        connection.number, connection.peer_key = next(self._numbers), peer_key
        self.connections.append(connection)
        self._judge_later()
        connection.proceed()  # the client may have hung up before the greeting

    def _make_room(self, newcomer: Hashable, reason: str) -> bool:
        """Disconnect a client for a new one of that peer, if there is one that may be; see `admission`."""
        found = makes_room(self.connections, newcomer, MAX_CONNECTIONS)
        if found is not None:
            state = (
                "has chosen no export" if found.export is None else f"was silent for {found.silent_seconds():.0f} s"
            )
            _log.warning("%s: %s, which %s, is disconnected", reason, found.peer, state)
            found.close()
        return found is not None

    def _judge_later(self) -> None:
        if not self._judging:
            self._judging = True
            self.loop.call_later(HANDSHAKE_SECONDS / 4, self._judge)

    def _judge(self) -> None:
        """Disconnect clients that do not finish negotiation."""
        self._judging = False
        for connection in list(self.connections):
            if connection.is_undecided(HANDSHAKE_SECONDS):
                _log.info("%s: chose no export in %.0f seconds", connection.peer, HANDSHAKE_SECONDS)
                connection.close()
        if any(connection.is_undecided(0) for connection in self.connections):
            self._judge_later()

    def enter(self, session: Session) -> Export:
        """The export that a client has chosen."""
        return next(export for export in self.exports if export.name == session.export.name)

    def add_export(self, export: Export) -> None:
        """Add an export; not on the loop's thread. Raises InvalidArgument if the name is taken."""

        def add() -> None:
            if any(one.name == export.name for one in self.exports):
                raise errors.InvalidArgument(f"there is an export {export.name!r} already")
            self.exports.append(export)

        self._on_loop(add)

    def remove_export(self, export: Export, *, disconnect: bool = False) -> None:
        """Remove an export; not on the loop's thread. The caller then owns its disk again.

        Raises ImageInUse while clients use it, unless `disconnect` is true. In that case the export is withdrawn
        before its clients are disconnected, so clients that reconnect do not find it.
        """
        gone = threading.Event()

        def look() -> None:
            if not any(one.export is export for one in self.connections):
                gone.set()

        def remove() -> None:
            users = [one for one in self.connections if one.export is export]
            if users and not disconnect:
                raise errors.ImageInUse(
                    f"export {export.name!r} is used by client {', '.join(str(one.number) for one in users)}",
                    hint="`remove --disconnect` disconnects its clients",
                )
            self.exports.remove(export)
            self._on_leaving.append(look)
            self.disconnect(users)
            look()

        try:
            self._on_loop(remove)
            while not gone.wait(_LOOK_SECONDS) and not self._ended.is_set():
                pass  # when the server ends it has no clients at all
        finally:
            self.loop.post(lambda: self._on_leaving.remove(look) if look in self._on_leaving else None)

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """While the block runs, not on the loop's thread, no disk is closed: the server's end waits for it.

        The block must check `has_ended` regularly. Raises InvalidArgument if the server has ended.
        """
        with self._left_alone:
            if self._ended.is_set():
                raise errors.InvalidArgument("the server has ended")
            self._users += 1
        try:
            yield
        finally:
            with self._left_alone:
                self._users -= 1
                self._left_alone.notify_all()

    def has_ended(self) -> bool:
        """True when no client is served any more; for threads other than the loop's."""
        return self._ended.is_set()

    def _on_loop(self, work: Callable[[], None]) -> None:
        """Run `work` between requests, and raise what it raises."""
        done = threading.Event()
        failures: list[errors.VhdkitError] = []

        def run() -> None:
            try:
                work()
            except errors.VhdkitError as failure:
                failures.append(failure)
            done.set()

        self.loop.post(run)
        while not done.wait(_LOOK_SECONDS):
            if self._ended.is_set():
                raise errors.InvalidArgument("the server has ended")
        if failures:
            raise failures[0]

    def disconnect(self, connections: Sequence[Connection]) -> None:
        """Disconnect clients once their requests in flight are answered, or shortly after if they do not read."""

        def give_up() -> None:
            for connection in connections:
                connection.close()

        for connection in connections:
            connection.end()
            connection.proceed()
        self.loop.call_later(HANG_UP_SECONDS, give_up)

    def _left(self, connection: Connection) -> None:
        if connection in self.connections:
            self.connections.remove(connection)
        for look in list(self._on_leaving):
            look()
        if not self._trimming:
            self._trimming = True
            self.loop.call_later(_TRIM_SECONDS, self._trim)
        if not self.connections and (self._ending or (self._exit_last and connection.export is not None)):
            self.loop.stop()

    def _trim(self) -> None:
        self._trimming = False
        if not self._ending and self.memory.should_trim():
            self.loop.submit(trim, lambda result: None, Lane.BULK)

    # -- holding still ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def hold(self, exports: Sequence[Export]) -> Iterator[Hold]:
        """While the block runs, not on the loop's thread, these exports have no request in flight.

        New requests wait, without notice to clients. One such block runs at a time. Raises InvalidArgument if the
        server has ended. Afterwards the `Hold` says for how long clients waited.
        """
        with self._holding, self._held(exports) as hold:
            yield hold

    @contextlib.contextmanager
    def _held(self, exports: Sequence[Export]) -> Iterator[Hold]:
        still, released, hold = threading.Event(), threading.Event(), Hold()

        def begin() -> None:
            hold.began = time.monotonic()
            for export in exports:
                export.held = True
            self._drained = lambda: None if any(export.jobs for export in exports) else still.set()
            self._drained()

        def end() -> None:
            self._drained = None
            for export in exports:
                export.held = False
                parked, export.parked = export.parked, []
                for go_on in parked:
                    go_on()
            hold.seconds = time.monotonic() - hold.began
            released.set()
            for connection in list(self.connections):
                connection.proceed()

        self.loop.post(begin)
        while not still.wait(_LOOK_SECONDS):
            if self._ended.is_set():
                raise errors.InvalidArgument("the server has ended")
        try:
            yield hold
        finally:
            self.loop.post(end)
            while not released.wait(_LOOK_SECONDS) and not self._ended.is_set():
                pass  # a server that has ended holds no clients

    def drained(self, export: Export) -> None:
        """Called when a held export has no job in flight, unless the ended job starts another, such as a flush."""
        self.loop.post(self._look_if_still)

    def _look_if_still(self) -> None:
        if self._drained is not None:
            self._drained()

    # -- running and ending -------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until `stop` (or, with `exit_last`, until the last client leaves), then flush and close all disks.

        Raises the first error of that last flush.
        """
        try:
            self.loop.run()
        finally:
            self.close()

    def stop(self) -> None:
        """Stop accepting clients and requests, answer those in flight, end. From any thread or signal handler."""
        self.loop.post(self._stop)

    def _stop(self) -> None:
        if self._ending:
            return
        self._ending = True
        self._close_listeners()
        for connection in list(self.connections):
            connection.shut_down()
        if not self.connections:
            self.loop.stop()
        self.loop.call_later(GRACE_SECONDS, self.loop.stop)

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            self.loop.unwatch(listener.fileno())
            listener.close()
        self._listeners.clear()

    def close(self) -> None:
        """Disconnect every client, flush and close all disks. Closing twice is fine. Raises as `run` does."""
        if self._closed:
            return
        self._closed = self._ending = True
        self._close_listeners()
        for connection in list(self.connections):
            connection.close()
        self.loop.close()  # ends the workers, so none of them uses a disk any more
        with self._left_alone:
            self._ended.set()
            self._left_alone.wait_for(lambda: not self._users)
        with self._holding:  # wait for the thread that holds an export to finish with its disk
            self._close_disks()

    def _close_disks(self) -> None:
        failures: list[errors.VhdkitError] = []
        for export in self.exports:
            try:
                export.disk.close()
            except errors.VhdkitError as failure:
                failures.append(failure)
        if failures:
            raise failures[0]


def _peer_name(sock: socket.socket, address: object) -> str:
    if isinstance(address, tuple):
        return f"{address[0]}:{address[1]}"
    return f"unix client {sock.fileno()}"


def _peer_key(sock: socket.socket, address: object) -> Hashable:
    """What connections of one peer have in common: see `admission`."""
    if isinstance(address, tuple):
        found = ipaddress.ip_address(str(address[0]).partition("%")[0])
        if isinstance(found, ipaddress.IPv6Address):
            return found.ipv4_mapped or found.packed[:8]
        return found
    with contextlib.suppress(OSError):
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return int(_CREDENTIALS.unpack(raw)[0])
    return None
