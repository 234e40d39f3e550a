# SPDX-License-Identifier: Apache-2.0
"""Many frames with one system call: recvmmsg and sendmmsg over buffers that are set up once.

Decides how a batch lies in memory, so that receiving frames, reading their headers and sending them on need no Python
object per frame except the numbers that are read. Must not know ports, decisions or what a frame means.

Slot i of a batch is STRIDE_BYTES at i × STRIDE_BYTES. Three vectors point there: to receive (the whole slot), to send
the frame as it came (its length), and to send it changed (addresses, tag, rest). STRIDE is an odd number of cache
lines; otherwise the headers of all slots would fall into the same few lines of the cache.

    slot    | addresses 12 | ....................................... | unused |
    as is   |<------------------- length ------------------------->|
    changed |<----12------>|  + tag +  |<--- from skip to length -->|

`INV-BATCH-BOUNDED`: the kernel is never offered more space than a slot has; a frame that fills its slot is too long.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence

from vmm.net import frames

BATCH_FRAMES = 64
STRIDE_BYTES = 145 * 64
_ROOM_BYTES = frames.MAX_FRAME_BYTES + 1  # one more than a frame may have, so that a longer one is noticed
_MSG_DONTWAIT = 0x40
_WORD, _LONG = 4, 8


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Message(ctypes.Structure):  # struct mmsghdr, whose first seven fields are struct msghdr
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("vectors", ctypes.c_void_p),
        ("vector_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("length", ctypes.c_uint32),
    )


_VECTOR_BYTES = ctypes.sizeof(_Vector)
_MESSAGE_BYTES = ctypes.sizeof(_Message)
_MESSAGE_WORDS = _MESSAGE_BYTES // _WORD
_MESSAGE_LONGS = _MESSAGE_BYTES // _LONG
_VECTORS_LONG = _Message.vectors.offset // _LONG
_LENGTH_WORD = _Message.length.offset // _WORD
_STRIDE_LONGS = STRIDE_BYTES // _LONG
_STRIDE_SHORTS = STRIDE_BYTES // 2
assert (_VECTOR_BYTES, _MESSAGE_BYTES) == (16, 64), "the layout is that of 64-bit Linux"
assert _ROOM_BYTES <= STRIDE_BYTES

# PyDLL keeps the interpreter's lock: these calls never wait, and releasing the lock costs more than they do.
_libc = ctypes.PyDLL(None, use_errno=True)
_recvmmsg = _libc.recvmmsg
_recvmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p)
_sendmmsg = _libc.sendmmsg
_sendmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int)


class Batch:
    """Space for BATCH_FRAMES frames. Slots hold the frames of the last `receive`."""

    def __init__(self) -> None:
        count = BATCH_FRAMES
        self._slots = bytearray(count * STRIDE_BYTES)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._slots))
        self._bytes = memoryview(self._slots)
        self._longs = self._bytes.cast("Q")
        self._shorts = self._bytes.cast("H")
        self._empty = b""
        receive, self._as_is, self._changed = ((_Vector * (count * each))() for each in (1, 1, 3))
        self._incoming, self._in_order, self._gathered = ((_Message * count)() for _ in range(3))
        for slot in range(count):
            place = self._base + slot * STRIDE_BYTES
            receive[slot].base, receive[slot].length = place, _ROOM_BYTES
            self._as_is[slot].base = place
            self._changed[slot * 3].base, self._changed[slot * 3].length = place, frames.ADDRESSES_BYTES
            for messages, vectors in ((self._incoming, receive), (self._in_order, self._as_is)):
                messages[slot].vectors = ctypes.addressof(vectors) + slot * _VECTOR_BYTES
                messages[slot].vector_count = 1
        self._keep = receive  # the kernel is given its address
        self._incoming_address = ctypes.addressof(self._incoming)
        self._in_order_address = ctypes.addressof(self._in_order)
        self._gathered_address = ctypes.addressof(self._gathered)
        self._as_is_address = ctypes.addressof(self._as_is)
        self._changed_address = ctypes.addressof(self._changed)
        self._incoming_words = memoryview(self._incoming).cast("B").cast("I")
        self._as_is_words = memoryview(self._as_is).cast("B").cast("I")  # lengths are below 2**32
        self._gathered_longs = memoryview(self._gathered).cast("B").cast("Q")
        self._changed_longs = memoryview(self._changed).cast("B").cast("Q")
        self.lengths: list[int] = []
        self._copies: dict[tuple[int, object], bytes] = {}

    def receive(self, descriptor: int, limit: int = BATCH_FRAMES) -> int:
        """Receive up to `limit` frames that are waiting; returns their number. Raises OSError.

        Afterwards `lengths` has their sizes; a size above MAX_FRAME_BYTES stands for any longer frame.
        """
        if self._copies:
            self._copies.clear()
        count: int = _recvmmsg(descriptor, self._incoming_address, limit, _MSG_DONTWAIT, None)
        if count <= 0:
            return _nothing()
        words = self._incoming_words[_LENGTH_WORD : count * _MESSAGE_WORDS : _MESSAGE_WORDS]
        self._as_is_words[2 : count * 4 : 4] = words
        self.lengths = words.tolist()
        return count

    def keys(self, count: int) -> tuple[list[int], list[int]]:
        """The first and the second 8 bytes of each frame, as numbers."""
        longs = self._longs
        end = count * _STRIDE_LONGS
        return longs[0:end:_STRIDE_LONGS].tolist(), longs[1:end:_STRIDE_LONGS].tolist()

    def words(self, offset_bytes: int) -> list[int]:
        """The two bytes at that offset of each frame, in this machine's byte order; undefined for a shorter frame."""
        end = len(self.lengths) * _STRIDE_SHORTS
        return self._shorts[offset_bytes // 2 : end : _STRIDE_SHORTS].tolist()

    def beginning(self, slot: int, size_bytes: int) -> bytes:
        """A copy of the frame's first bytes, at most as many as it has."""
        start = slot * STRIDE_BYTES
        return bytes(self._bytes[start : start + min(size_bytes, self.lengths[slot])])

    def frame(self, slot: int) -> bytes:
        """A copy of the frame."""
        return self.beginning(slot, STRIDE_BYTES)

    def kept(self, slot: int, skip_bytes: int = 0, tag: bytes | None = None) -> bytes:
        """A copy of the frame, as it came or (with `tag`) changed; all callers get the same one until the next
        `receive`.
        """
        key = (slot, tag)
        copy = self._copies.get(key)
        if copy is None:
            copy = self.frame(slot)
            if tag is not None:
                copy = copy[: frames.ADDRESSES_BYTES] + tag + copy[skip_bytes:]
            self._copies[key] = copy
        return copy

    def send_all(self, descriptor: int, first: int, end: int) -> int:
        """Send the slots from `first` up to `end`, as they came; returns how many were taken. Raises OSError."""
        address = self._in_order_address + first * _MESSAGE_BYTES
        sent: int = _sendmmsg(descriptor, address, end - first, _MSG_DONTWAIT)
        return sent if sent > 0 else _nothing()

    def send(self, descriptor: int, slots: Sequence[int]) -> int:
        """Send these slots, as they came; returns how many the receiver took. Raises OSError."""
        longs, base, at = self._gathered_longs, self._as_is_address, _VECTORS_LONG
        for slot in slots:
            longs[at] = base + slot * _VECTOR_BYTES
            longs[at + 1] = 1
            at += _MESSAGE_LONGS
        sent: int = _sendmmsg(descriptor, self._gathered_address, len(slots), _MSG_DONTWAIT)
        return sent if sent > 0 else _nothing()

    def send_changed(
        self, descriptor: int, slots: Sequence[int], skip_bytes: int, tag: ctypes.Array[ctypes.c_char]
    ) -> int:
        """Send these slots as addresses, tag, rest from `skip_bytes`; returns how many were taken. Raises OSError.

        `tag` comes from `tag_buffer` and may be empty.
        """
        longs, vectors, at = self._gathered_longs, self._changed_longs, _VECTORS_LONG
        tag_address, tag_bytes = ctypes.addressof(tag), len(tag) - 1
        for slot in slots:
            vector = slot * 6
            vectors[vector + 2], vectors[vector + 3] = tag_address, tag_bytes
            vectors[vector + 4] = self._base + slot * STRIDE_BYTES + skip_bytes
            vectors[vector + 5] = self.lengths[slot] - skip_bytes
            longs[at] = self._changed_address + vector * _LONG
            longs[at + 1] = 3
            at += _MESSAGE_LONGS
        sent: int = _sendmmsg(descriptor, self._gathered_address, len(slots), _MSG_DONTWAIT)
        return sent if sent > 0 else _nothing()


def tag_buffer(tag: bytes) -> ctypes.Array[ctypes.c_char]:
    """The bytes of a tag in memory that the kernel can read, followed by a zero."""
    return ctypes.create_string_buffer(tag)


def _nothing() -> int:
    """0 for a call that would have waited; OSError for one that failed."""
    number = ctypes.get_errno()
    if number in (errno.EAGAIN, errno.EINTR, errno.ENOBUFS, 0):
        return 0
    raise OSError(number, os.strerror(number))
