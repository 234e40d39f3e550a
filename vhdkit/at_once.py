# SPDX-License-Identifier: Apache-2.0
"""Work that is done only if it need not wait for a device, however deep below its caller the file is read.

Decides how that is required of the reads and locks below, and how the caller learns what was not in memory. Must not
know what the work is.

    with required():                    the thread's reads of files come from the page cache,
        work()                          or raise NotInMemory, which names the place that is now being read

Only `FileStore.pread` and `taken` heed it. Work that reads in other ways, or that could not be done once more after
it was given up at such a place, must not be done in this way.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class ReadFile(Protocol):
    """What is read."""

    def try_pread_into(self, offset_bytes: int, buffer: memoryview) -> bool:
        """See `store.ReadStore`."""
        ...


class NotInMemory(Exception):
    """The work would have to wait: for the byte at an offset of a file, or (None) for another thread."""

    def __init__(self, file: ReadFile | None = None, offset_bytes: int = 0) -> None:
        super().__init__()
        self.file = file
        self.offset_bytes = offset_bytes


class _Thread(threading.local):
    must_not_wait = False


_thread = _Thread()


@contextmanager
def required() -> Iterator[None]:
    """In this thread, nothing that is called in the block waits for a device. Raises NotInMemory."""
    before, _thread.must_not_wait = _thread.must_not_wait, True
    try:
        yield
    finally:
        _thread.must_not_wait = before


def is_required() -> bool:
    """True inside `required`."""
    return _thread.must_not_wait


def read(file: ReadFile, offset_bytes: int, size_bytes: int) -> bytes:
    """All of a range, from memory. Raises NotInMemory, also if it reaches past the end of the file."""
    data = bytearray(size_bytes)
    if not file.try_pread_into(offset_bytes, memoryview(data)):
        raise NotInMemory(file, offset_bytes + max(size_bytes, 1) - 1)
    return bytes(data)


class _Taken:
    """Releases a lock at the end of a block."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc_info: object) -> None:
        self._lock.release()


def taken(lock: threading.Lock) -> AbstractContextManager[object]:
    """To be entered at once: hold a lock that another thread may hold while it waits for a device.

    Raises NotInMemory.
    """
    if not _thread.must_not_wait:
        return lock
    if not lock.acquire(blocking=False):
        raise NotInMemory
    return _Taken(lock)
