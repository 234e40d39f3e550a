# SPDX-License-Identifier: Apache-2.0
"""Reading a disk in pieces that are known in advance, ahead of their use.

Decides when the kernel is asked for pieces that come later: from the first piece on that was not in memory, so that
reading what is in memory costs nothing. Must not know what the pieces are for. How one stream among the requests of a
client is recognised is another question, because those are not known in advance.

`INV-AHEAD-BOUNDED`: at most `AHEAD_BYTES` and one piece of a chain are asked for and not yet read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from vhdkit.chain.engine.chain import Chain
from vhdkit.units import MIB, sectors_to_bytes

AHEAD_BYTES = 16 * MIB
_AHEAD_ITEMS = 1024  # so that small pieces take little memory

_T = TypeVar("_T")


class Ahead:
    """Reads one chain. Used by one thread."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._is_cold = False
        self._coming: deque[tuple[int, int]] = deque()

    def expect(self, sector_index: int, sector_count: int) -> None:
        """This range, which lies inside the disk, will be read after those that were expected before. Never waits."""
        self._coming.append((sector_index, sector_count))
        if self._is_cold:
            self._chain.prefetch(sector_index, sector_count)

    def read_into(self, sector_index: int, buffer: memoryview) -> None:
        """See `Chain.read_into`; the range is the one expected first. Raises IoFailed."""
        self._coming.popleft()
        if not self._is_cold:
            if self._chain.try_read_into(sector_index, buffer):
                return
            self._is_cold = True
            for coming in self._coming:
                self._chain.prefetch(*coming)
        self._chain.read_into(sector_index, buffer)


def announced(items: Iterable[_T], sectors_of: Callable[[_T], int], announce: Callable[[_T], None]) -> Iterator[_T]:
    """The same items, each announced when those before it that were not returned yet are at most `AHEAD_BYTES`.

    Of items without sectors, which are not read, only a few are announced ahead, too.
    """
    waiting: deque[_T] = deque()
    ahead_bytes = 0
    for item in items:
        announce(item)
        waiting.append(item)
        ahead_bytes += sectors_to_bytes(sectors_of(item))
        while ahead_bytes > AHEAD_BYTES or len(waiting) > _AHEAD_ITEMS:
            ahead_bytes -= sectors_to_bytes(sectors_of(waiting[0]))
            yield waiting.popleft()
    yield from waiting
