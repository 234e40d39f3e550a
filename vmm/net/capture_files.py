# SPDX-License-Identifier: Apache-2.0
"""The files of a captured stream: one file, one file of limited size, or the newest of several files.

Decides where a pcapng stream may be cut, that every file can be read by itself, and which file is removed when there
are enough. A file contains whole blocks only; each begins with the section and the interfaces described before it. A
stream that ends early, because the switch ended or the disk is full, leaves a file of whole blocks. Must not know
sockets.

    stream   | section | interface 0 | frame | frame | interface 1 | frame | ...
    file 2   | section | interface 0 | interface 1 | frame | ...
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections import deque
from types import TracebackType
from typing import BinaryIO, Self

from vmm.model.errors import VmmError
from vmm.net.capture import INTERFACE, PACKET, SECTION
from vmm.net.frames import MAX_FRAME_BYTES

MAX_FILES = 10_000
MIN_SIZE_BYTES = 64 << 10  # the beginning of a file and a few of the longest frames
MAX_BLOCK_BYTES = MAX_FRAME_BYTES + 4096
_HEAD = struct.Struct("<II")


class CaptureFiles:
    """Takes a stream piece by piece. `max_bytes` 0: no limit; with `max_files` the oldest file is removed when there
    would be more.

    Without `max_files` the stream is full when its one file is full: `write` then returns False. Only the owner can
    read the files, because the guests' traffic is private. Raises OSError.
    """

    def __init__(self, path: str, *, max_bytes: int = 0, max_files: int = 0, stream: BinaryIO | None = None) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.max_files = max_files
        self.frame_count = 0
        self.names: deque[str] = deque()
        self._stream = stream
        self._number = 0
        self._input = bytearray()
        self._beginning = bytearray()  # of every file
        self._size = 0
        self._file = stream if stream is not None else self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not self._stream:
            self._file.close()

    def write(self, received: bytes) -> bool:
        """Take a piece of the stream; False if there is no space for more. Raises VmmError for anything but pcapng."""
        self._input += received
        at = 0
        has_room = True
        while has_room and len(self._input) - at >= _HEAD.size:
            kind, size = _HEAD.unpack_from(self._input, at)
            if size < 12 or size > MAX_BLOCK_BYTES:
                raise VmmError(f"the stream is not pcapng: it has a block of {size} bytes")
            if len(self._input) - at < size:
                break
            has_room = self._take(kind, bytes(self._input[at : at + size]))
            at += size
        del self._input[:at]
        self._file.flush()
        return has_room

    def _take(self, kind: int, block: bytes) -> bool:
        if self.max_bytes and self._size + len(block) > self.max_bytes:
            if not self.max_files:
                return False
            self._next()
        if kind in (SECTION, INTERFACE):
            self._beginning += block
        self._file.write(block)
        self._size += len(block)
        self.frame_count += kind == PACKET
        return True

    def _next(self) -> None:
        self._file.close()
        self._file = self._open()
        self._file.write(self._beginning)
        self._size = len(self._beginning)

    def _open(self) -> BinaryIO:
        """Open the next file; the oldest is removed first, so that there are never more than `max_files`."""
        self._number += 1
        if self.max_files and len(self.names) >= self.max_files:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.names.popleft())
        name = self.path
        if self.max_files:
            root, ending = os.path.splitext(self.path)
            name = f"{root}-{self._number:05}{ending}"
        file = open(name, "wb", opener=_private)  # noqa: SIM115
        self.names.append(name)
        return file


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
