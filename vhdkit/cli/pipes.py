# SPDX-License-Identifier: Apache-2.0
"""The bytes of a disk on standard input and standard output.

Decides what happens when a stream takes or gives less than was asked for: the rest follows, and nothing is lost. Both
may have been made non-blocking by whoever holds the other end, and Python's streams may be unbuffered
(PYTHONUNBUFFERED); then a call takes or gives a part, or nothing yet. Must not know what the bytes mean.
"""

from __future__ import annotations

import select
from typing import Any


class PipeReader:
    """Reads a binary stream of Python's, such as `sys.stdin.buffer`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def read(self, size_bytes: int) -> bytes:
        """At most that many bytes, and none only at the end. Raises OSError."""
        while (got := self._stream.read(size_bytes)) is None:  # non-blocking, and nothing there yet
            select.select([self._stream.fileno()], [], [])
        return bytes(got)


class PipeWriter:
    """Writes a binary stream of Python's, such as `sys.stdout.buffer`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, data: memoryview) -> None:
        """Write all of it. Raises OSError."""
        while data:
            try:
                done = self._stream.write(data) or 0  # None: an unbuffered stream that would have to wait
                is_full = not done
            except BlockingIOError as error:
                done, is_full = error.characters_written, True
            data = data[done:]
            if is_full:
                self._wait()

    def flush(self) -> None:
        """Return when nothing waits in Python's buffer. Raises OSError."""
        while True:
            try:
                self._stream.flush()
                return
            except BlockingIOError:
                self._wait()

    def fileno(self) -> int:
        """The stream's descriptor. Raises OSError, ValueError if it has none."""
        return int(self._stream.fileno())

    def _wait(self) -> None:
        select.select([], [self._stream.fileno()], [])
