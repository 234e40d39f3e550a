# SPDX-License-Identifier: Apache-2.0
"""One port of a `user` switch as a unix datagram socket: bound here, connected to the other side, with a backlog.

Decides when the other side of a port is connected, and what happens to frames that it does not take at once. Must not
know decisions, VLANs or clocks.

Each port has a socket of its own, connected to its peer: the kernel then refuses frames from any other process, a
frame's port is known without reading a sender's name, and sending resolves no path. QEMU binds its side at a path and
sends to ours by path, so it is enough that a restarted switch binds the same path again: `INV-SWITCH-RESTART`. A
replaced peer is recognized by its inode.

The peer's path is in a folder to which the process of an untrusted guest may write. It is opened without following
links and must be a socket; the connection goes to that very inode.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmm.model import errors
from vmm.net.batch import BATCH_FRAMES, Batch, tag_buffer
from vmm.net.limits import Bucket

if TYPE_CHECKING:
    import ctypes

    from vmm.net.capture import PacketCapture
    from vmm.net.engine import Port, Rewrite
    from vmm.net.ports import PortSetup

CONGESTED_FRAMES = 64  # from here on its senders wait for a moment, so that nothing is lost
STALLED_SECONDS = 0.1  # a receiver that took nothing for this long is paused or broken: no sender waits for it
MAX_BACKLOG_FRAMES = 512  # for a receiver that takes nothing for a while: QEMU's socket holds 11 frames
SEND_BUFFER_BYTES = 4 << 20  # the kernel counts what the other side has not taken yet
RATE_BURST_SECONDS = 0.01
_MIN_BURST_BYTES = 4096.0


def _give_away(address: str, owner: int) -> None:
    """Give a socket to its new owner. Its folder already belongs to the owner, so the name may have been replaced.

    Raises OSError for anything but a socket of ours with a single name.
    """
    place = os.open(address, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        facts = os.fstat(place)
        if not stat.S_ISSOCK(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_nlink != 1:
            raise FileExistsError(errno.EEXIST, "another process took the socket's name")
        os.chown(f"/proc/self/fd/{place}", owner, -1)
    finally:
        os.close(place)


class PortSocket:
    """The outer side of a port. `watch` is called when the backlog begins and ends."""

    def __init__(self, port: Port, setup: PortSetup) -> None:
        self.port = port
        self.setup = setup
        self.connected = False
        self.backlog: deque[bytes] = deque()
        self.taken_at = 0.0  # when the peer last took a frame from the backlog, or it was empty
        self.waits_until = 0.0  # do not read from it before that time; 0: read from it
        self.captures: list[PacketCapture] = []
        self.rate: Bucket | None = None
        self.batch_limit = BATCH_FRAMES
        self._tags: dict[Rewrite, ctypes.Array[ctypes.c_char]] = {}
        self._peer_identity: tuple[int, int] | None = None
        self._socket = self._bound(setup.address)
        self.descriptor = self._socket.fileno()
        self.apply(setup)

    def _bound(self, address: str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            with contextlib.suppress(OSError):  # a limit of the host: then as much as it allows
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(address)  # left by a killed switch: only one runs, and its caller holds the lock
            os.fchmod(sock.fileno(), 0o600)  # applies to its name too, once it has one
            sock.bind(address)
            if self.setup.owner is not None and self.setup.owner != os.geteuid():
                _give_away(address, self.setup.owner)
        except OSError as error:
            sock.close()
            raise errors.of_os_error(error, "make the port's socket", path=address) from error
        return sock

    def apply(self, setup: PortSetup) -> None:
        """Change the limits; the addresses stay."""
        self.setup = setup
        bytes_per_second = setup.rate_bits_per_second / 8
        self.rate = None
        self.batch_limit = BATCH_FRAMES
        if bytes_per_second:
            burst = max(_MIN_BURST_BYTES, bytes_per_second * RATE_BURST_SECONDS)
            self.rate = Bucket(bytes_per_second, burst)
            self.batch_limit = max(1, min(BATCH_FRAMES, int(burst / 1514)))

    # -- the other side -----------------------------------------------------------------------------------------

    def connect(self) -> bool:
        """Connect to the peer if it exists; True if it does."""
        self.connected = False
        self._peer_identity = None
        try:
            place = os.open(self.setup.peer, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            facts = os.fstat(place)
            if not stat.S_ISSOCK(facts.st_mode):
                return False
            self._socket.connect(f"/proc/self/fd/{place}")
            self._peer_identity = facts.st_dev, facts.st_ino
            self.connected = True
        except OSError:
            return False
        finally:
            os.close(place)
        return True

    def check_peer(self) -> None:
        """Connect again if the peer is new, or if none was connected."""
        if self.connected and self._peer_identity is not None:
            try:
                facts = os.lstat(self.setup.peer)
            except OSError:
                facts = None
            if facts is not None and (facts.st_dev, facts.st_ino) == self._peer_identity:
                return
        self.backlog.clear()
        self.connect()

    # -- frames -------------------------------------------------------------------------------------------------

    def send(self, batch: Batch, slots: Sequence[int], change: Rewrite | None) -> int:
        """Send what the peer takes now and keep the rest; returns how many frames were sent or kept."""
        count = len(slots)
        sent = 0
        if not self.connected:
            return 0
        while not self.backlog and sent < count:
            try:
                taken = self._send_now(batch, slots[sent:] if sent else slots, change)
            except ConnectionError:
                self._lost()
                return sent
            except OSError:  # this one frame cannot be sent; the others can
                slots = [*slots[:sent], *slots[sent + 1 :]]
                count -= 1
                continue
            if not taken:
                break
            sent += taken
        room = MAX_BACKLOG_FRAMES - len(self.backlog)
        kept = slots[sent : sent + room]
        for slot in kept:
            self.backlog.append(batch.kept(slot) if change is None else batch.kept(slot, *change))
        return sent + len(kept)

    def _send_now(self, batch: Batch, slots: Sequence[int], change: Rewrite | None) -> int:
        if change is not None:
            tag = self._tags.get(change)
            if tag is None:
                tag = self._tags[change] = tag_buffer(change.tag)
            return batch.send_changed(self.descriptor, slots, change.skip_bytes, tag)
        if type(slots) is range:
            return batch.send_all(self.descriptor, slots.start, slots.stop)
        return batch.send(self.descriptor, slots)

    def send_own(self, frame: bytes) -> bool:
        """Send one frame, or keep it; False if neither is possible."""
        if not self.connected or len(self.backlog) >= MAX_BACKLOG_FRAMES:
            return False
        if not self.backlog:
            try:
                self._socket.send(frame)
                return True
            except BlockingIOError:
                pass
            except ConnectionError:
                self._lost()
                return False
            except OSError:
                return False
        self.backlog.append(frame)
        return True

    def is_congested(self, now: float) -> bool:
        """True if the peer takes its frames, but more slowly than they arrive."""
        return len(self.backlog) >= CONGESTED_FRAMES and now - self.taken_at < STALLED_SECONDS

    def flush(self, now: float) -> None:
        """Send from the backlog what the peer takes now."""
        while self.backlog:
            try:
                self._socket.send(self.backlog[0])
            except BlockingIOError:
                return
            except ConnectionError:
                self._lost()
                return
            except OSError:
                pass  # this frame cannot be sent
            self.backlog.popleft()
            self.taken_at = now

    def _lost(self) -> None:
        self.connected = False
        self.backlog.clear()

    def close(self) -> None:
        """Remove the port and its name."""
        self._socket.close()
        with contextlib.suppress(OSError):
            os.unlink(self.setup.address)
