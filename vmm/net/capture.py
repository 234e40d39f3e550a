# SPDX-License-Identifier: Apache-2.0
"""Captured frames as a pcapng stream (draft-ietf-opsawg-pcapng), which Wireshark and tshark read.

Decides the bytes of the stream, and that a slow reader loses frames instead of holding up the switch: at most
MAX_BUFFER_BYTES wait for it, and the number of lost frames is written to the stream when there is space again. Whole
blocks only. Must not know sockets or the reader.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from enum import IntEnum

from vmm.net import frames

MAX_BUFFER_BYTES = 8 << 20
MAX_SNAP_BYTES = frames.MAX_FRAME_BYTES
SECTION, INTERFACE, _STATISTICS, PACKET = 0x0A0D0D0A, 1, 5, 6
_ETHERNET = 1
_IF_NAME, _IF_RESOLUTION, _IF_DROP, _FLAGS, _APPLICATION = 2, 9, 5, 2, 4
_NANOSECONDS = 9


class Direction(IntEnum):
    """The direction in pcapng's flags, from the point of view of the guest's adapter: what the guest sends is
    outbound.
    """

    OUT = 1  # to the guest: inbound for its adapter
    IN = 2  # from the guest: outbound


class PacketCapture:
    """A stream of one port's frames in both directions, or (port None) of what all ports send, each frame once."""

    def __init__(
        self, port: str | None, *, snap_bytes: int = MAX_SNAP_BYTES, clock: Callable[[], int] = time.time_ns
    ) -> None:
        self.port = port
        self.snap_bytes = snap_bytes
        self.lost_frames = 0
        self.taken_frames = 0
        self._clock = clock
        self._numbers: dict[str, int] = {}
        self._told_lost: dict[str, int] = {}
        self._lost: dict[str, int] = {}
        self.pending = bytearray(_section())

    def take(self, port: str, way: Direction, frame: bytes) -> None:
        """Add a frame, unless the reader is too far behind."""
        if self.port is None and way is Direction.OUT:
            return
        if len(self.pending) + len(frame) > MAX_BUFFER_BYTES:
            self.lost_frames += 1
            self._lost[port] = self._lost.get(port, 0) + 1
            return
        now = self._clock()
        number = self._numbers.get(port)
        if number is None:
            number = self._numbers[port] = len(self._numbers)
            self.pending += _interface(port, self.snap_bytes)
        lost = self._lost.get(port, 0)
        if lost != self._told_lost.get(port, 0):
            self._told_lost[port] = lost
            self.pending += _statistics(number, now, lost)
        self.taken_frames += 1
        self.pending += _packet(number, now, frame, self.snap_bytes, way)


def _block(kind: int, body: bytes) -> bytes:
    size = 12 + len(body)
    return struct.pack("<II", kind, size) + body + struct.pack("<I", size)


def _padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 4)


def _option(code: int, content: bytes) -> bytes:
    return struct.pack("<HH", code, len(content)) + _padded(content)


def _section() -> bytes:
    options = _option(_APPLICATION, b"vmm") + _option(0, b"")
    return _block(SECTION, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1) + options)


def _interface(name: str, snap_bytes: int) -> bytes:
    options = _option(_IF_NAME, name.encode()) + _option(_IF_RESOLUTION, bytes([_NANOSECONDS])) + _option(0, b"")
    return _block(INTERFACE, struct.pack("<HHI", _ETHERNET, 0, snap_bytes) + options)


def _packet(number: int, now: int, frame: bytes, snap_bytes: int, way: Direction) -> bytes:
    kept = frame[:snap_bytes]
    head = struct.pack("<IIIII", number, now >> 32, now & 0xFFFFFFFF, len(kept), len(frame))
    return _block(PACKET, head + _padded(kept) + _option(_FLAGS, struct.pack("<I", way)) + _option(0, b""))


def _statistics(number: int, now: int, lost: int) -> bytes:
    options = _option(_IF_DROP, struct.pack("<Q", lost)) + _option(0, b"")
    return _block(_STATISTICS, struct.pack("<III", number, now >> 32, now & 0xFFFFFFFF) + options)
