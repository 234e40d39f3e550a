# SPDX-License-Identifier: Apache-2.0
"""Word from the system that data has arrived in the page cache.

Decides how the system is asked: by io_uring(7), of which it uses a single operation, the read of one byte through the
cache into a buffer that is never looked at. Must not know what the data is, nor who waits for it.

A thread that waits in `pread` does the same, but costs two switches of threads and of the interpreter. Here the
device's own interrupt ends the sleep of the one thread that serves. No system call of that thread is interrupted
(IORING_SETUP_DEFER_TASKRUN, Linux 6.1). On older systems, and where io_uring is forbidden, `Arrivals.open` finds none.

Until its answer is taken, a question keeps its file open, with the locks on it.

Layouts: io_uring_setup(2) and linux/io_uring.h. The memory that is shared with the kernel is accessed by one thread,
and by the kernel in that thread's system calls, so it needs no barriers.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import struct

from vhdkit.units import PAGE_SIZE

MOST = 64  # questions at once
_SETUP, _ENTER, _REGISTER = 425, 426, 427  # system calls; the numbers are the same on every architecture
_SINGLE_ISSUER, _DEFER_TASKRUN = 1 << 12, 1 << 13
_REGISTER_EVENTFD = 4
_GET_EVENTS = 1
_READ = 22
_ENTRIES_PLACE = 0x10000000  # of the questions, in mmap(2) of the ring
_PARAMETERS = struct.Struct("=7I12x8I8x8I8x")  # struct io_uring_params: its head, then the places in both queues
_ENTRY = struct.Struct("=BBHiQQIIQ24x")  # struct io_uring_sqe
_RESULT = struct.Struct("=QiI")  # struct io_uring_cqe
_WRAP = (1 << 32) - 1
_WORD = 4

_call = ctypes.CDLL(None, use_errno=True).syscall


class Arrivals:
    """Questions whether data is there, and the answers. Only the thread that opened it may use it."""

    def __init__(self, ring: int, event: int, parameters: tuple[int, ...]) -> None:
        """Take over both descriptors. Use `open` instead. Raises OSError."""
        entries, results = parameters[:2]
        asked_tail, array = parameters[8], parameters[13]
        told_head, told_tail, first_result = parameters[15], parameters[16], parameters[20]
        self.event = event  # readable when there is word
        self._ring = ring
        size = max(array + _WORD * entries, first_result + _RESULT.size * results)
        self._shared = mmap.mmap(ring, size)
        self._entries = mmap.mmap(ring, entries * _ENTRY.size, offset=_ENTRIES_PLACE)
        self._scratch = mmap.mmap(-1, PAGE_SIZE)
        anchor = ctypes.c_char.from_buffer(self._scratch)
        self._scratch_address = ctypes.addressof(anchor)
        del anchor
        self._words = memoryview(self._shared)[: size // _WORD * _WORD].cast("I")
        for number in range(entries):
            self._words[array // _WORD + number] = number
        self._asked_tail, self._told_head, self._told_tail = (
            place // _WORD for place in (asked_tail, told_head, told_tail)
        )
        self._entry_mask, self._result_mask, self._first_result = entries - 1, results - 1, first_result
        self._free = list(range(entries))  # numbers of questions
        nothing = ctypes.c_void_p(0), ctypes.c_size_t(0)
        enter, fd, none, one = ctypes.c_long(_ENTER), ctypes.c_uint(ring), ctypes.c_uint(0), ctypes.c_uint(1)
        self._submitting = (enter, fd, one, none, none, *nothing)
        self._collecting = (enter, fd, none, none, ctypes.c_uint(_GET_EVENTS), *nothing)
        self._waiting = (enter, fd, none, one, ctypes.c_uint(_GET_EVENTS), *nothing)

    @classmethod
    def open(cls) -> Arrivals | None:
        """None if the system does not allow it, or has no memory for it."""
        raw = bytearray(_PARAMETERS.size)
        _PARAMETERS.pack_into(raw, 0, 0, 0, _SINGLE_ISSUER | _DEFER_TASKRUN, *[0] * 20)
        with contextlib.ExitStack() as stack:
            ring = _call(_SETUP, MOST, (ctypes.c_char * len(raw)).from_buffer(raw))
            if ring < 0:
                return None
            stack.callback(os.close, ring)
            try:
                event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                stack.callback(os.close, event)
                if _call(_REGISTER, ring, _REGISTER_EVENTFD, ctypes.byref(ctypes.c_int(event)), 1) < 0:
                    return None
                found = cls(ring, event, _PARAMETERS.unpack(raw))
            except (OSError, ValueError):
                return None
            stack.pop_all()
            return found

    def ask(self, fd: int, offset_bytes: int) -> int | None:
        """Ask about the byte at an offset; the number of the question, or None if there are too many."""
        if not self._free:
            return None
        number, words, place = self._free.pop(), self._words, self._asked_tail
        tail = words[place]
        slot = (tail & self._entry_mask) * _ENTRY.size
        _ENTRY.pack_into(self._entries, slot, _READ, 0, 0, fd, offset_bytes, self._scratch_address, 1, 0, number)
        words[place] = (tail + 1) & _WRAP
        if _call(*self._submitting) != 1:
            words[place] = tail
            self._free.append(number)
            return None
        return number

    def take(self) -> list[int]:
        """The questions that were answered: the data is there, or cannot be read."""
        taken = self._collect()
        with contextlib.suppress(BlockingIOError):  # collecting has set it, too
            os.eventfd_read(self.event)
        if len(self._free) <= self._entry_mask:  # word of others may have come just before it was reset
            taken += self._collect()
        return taken

    def _collect(self) -> list[int]:
        _call(*self._collecting)
        words, taken = self._words, []
        head, tail = words[self._told_head], words[self._told_tail]
        while head != tail:
            place = self._first_result + (head & self._result_mask) * _RESULT.size
            taken.append(_RESULT.unpack_from(self._shared, place)[0])
            head = (head + 1) & _WRAP
        words[self._told_head] = head
        self._free += taken
        return taken

    def close(self) -> None:
        """Wait for all answers, as each question holds its file and the locks of that. Closing twice is fine."""
        if self._ring >= 0:
            while len(self._free) <= self._entry_mask:
                if _call(*self._waiting) < 0 and ctypes.get_errno() != errno.EINTR:
                    break
                self._collect()
            ring, self._ring = self._ring, -1
            self._free.clear()
            os.close(ring)
            os.close(self.event)
            self._words.release()
            self._shared.close()
            self._entries.close()
