# SPDX-License-Identifier: Apache-2.0
"""The bytes of a file that has no name yet: written once, in large parts, and durable only at the end.

Decides what makes writing them quick. Must not know what they mean, nor where the file gets its name (`folder`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from vhdkit import space
from vhdkit.descriptor import held
from vhdkit.store import Buffer, FileStore
from vhdkit.units import KIB, MIB

_LARGE_BYTES = MIB // 4  # a write of this size is worth another call to the kernel
# In one call. For a write at a multiple of its own size, Linux looks for as much contiguous memory. From 1 MiB on this
# took up to 4 times as long as 256 KiB at a time, and up to 10 times when the page cache had filled the memory.
_MOST_BYTES = 256 * KIB


class UnnamedStore(FileStore):
    """A file that cannot be found under its name yet: its writes need no order, so only a commit syncs.

    Messages use the name that it will have; until then it lies under a temporary one. It is written once and in large
    parts, so the space of each is reserved where that is quicker, and the device may start long before the commit.
    """

    def __init__(self, owned: list[int], path: str, place: str) -> None:
        super().__init__(owned, path, writable=True)
        self._place = place
        self._reserves: bool | None = None  # not yet known whether that is quicker
        self._expected = (0, 0)  # where the range that was announced last begins and ends
        self.starts_early = False  # the device writes while more is written

    def expect(self, offset_bytes: int, size_bytes: int) -> None:
        """All of this range is written next, in parts: reserve it at once, so that the parts share an extent.

        Only a hint: the size of the file stays.
        """
        self._expected = (offset_bytes, offset_bytes + size_bytes)
        self._reserve_by(space.reserve_inside, offset_bytes, size_bytes)

    def pwrite(self, offset_bytes: int, data: Buffer) -> None:
        """See `Store.pwrite`."""
        size = len(data)
        if size < _LARGE_BYTES:
            super().pwrite(offset_bytes, data)
        else:
            first, end = self._expected
            if self._reserves is not False and not first <= offset_bytes <= offset_bytes + size <= end:
                self._reserve_by(space.reserve, offset_bytes, size)
            view = memoryview(data)
            for done in range(0, size, _MOST_BYTES):
                super().pwrite(offset_bytes + done, view[done : done + _MOST_BYTES])
        if self.starts_early:
            self._transfer.behind.wrote(size)

    @held
    def _reserve_by(self, reserve: Callable[[int, int, int], bool], offset_bytes: int, size_bytes: int) -> None:
        """Reserve what is written next. Only a hint: if it fails, the write itself reports what is wrong."""
        if self._reserves is None:
            self._reserves = space.is_quicker_reserved(self._fd)
        if self._reserves:
            with contextlib.suppress(OSError):
                self._reserves = reserve(self._fd, offset_bytes, size_bytes)

    def sync(self) -> None:
        """Do nothing: `NewFile.commit` syncs."""
