# SPDX-License-Identifier: Apache-2.0
"""Reading ahead of sequential streams: which range to prefetch after which read.

Decides when reads form a stream, how far ahead of it to read, and when to stop. Pure: it takes offsets and sizes in
bytes and returns ranges, which the caller prefetches (`Disk.prefetch`). Where large reads follow one another in a
file, the kernel reads ahead without being asked, and the file ignores the wish (`streams`). What is left are small
requests, and disks whose parts lie apart from one another or in several files.

    ──────────────┬─────────┬──────────────────┬──────
       was read   │position │  prefetched      │ end of the window
                            ▲ mark: a read from here on extends the window

A read that begins where an earlier one ended begins a stream; each of the last ends is a mark, too. The window starts
small and doubles with each extension. A stream that is read no further is not extended, so reading ahead stops at a
seek with at most one window too much.

`INV-READ-AHEAD-BOUNDED`: of all streams that share a `Budget`, no more bytes than its limit are prefetched and not yet
read; no byte of one stream is prefetched twice.
"""

from __future__ import annotations

from vhdkit.units import KIB, MIB

WINDOW_BYTES = 8 * MIB  # the longest window of a stream
BUDGET_BYTES = 64 * MIB  # of all windows in a process that shares one budget
MAX_STREAMS = 4  # of one reader
_FIRST_WINDOW_BYTES = 256 * KIB
_FIRST_WINDOW_READS = 2  # of a reader's own size, if that is more
REMEMBERED_ENDS = 16  # of reads that did not belong to a stream
_FORGOTTEN_AFTER = 64  # reads noted elsewhere


class Budget:
    """What the windows of several readers may take together, perhaps within a larger budget."""

    def __init__(self, limit_bytes: int = BUDGET_BYTES, *, within: Budget | None = None) -> None:
        self.left_bytes = limit_bytes
        self._within = within

    def take(self, size_bytes: int) -> bool:
        """Take that much, if it is left."""
        if size_bytes > self.left_bytes or (self._within is not None and not self._within.take(size_bytes)):
            return False
        self.left_bytes -= size_bytes
        return True

    def give_back(self, size_bytes: int) -> None:
        """Return what was taken."""
        self.left_bytes += size_bytes
        if self._within is not None:
            self._within.give_back(size_bytes)


class _Stream:
    """Read up to `position`, prefetched up to `end`; `window` is its part of the budget."""

    __slots__ = ("end", "mark", "position", "turn", "window")

    def __init__(self, position: int, window: int, turn: int) -> None:
        self.position = self.end = position
        self.window = window
        self.turn = turn
        self.mark = -1


class ReadAhead:
    """One reader of a disk of `size_bytes`.

    Call `note` for each read. A caller for whom that costs too much may leave out the reads that did not have to wait,
    except those whose offset is in `marks`. At the end call `forget`, which returns what was taken from the budget.
    """

    def __init__(self, size_bytes: int, budget: Budget | None = None, *, window_bytes: int = WINDOW_BYTES) -> None:
        self.marks: set[int] = set()
        self._size = size_bytes
        self._budget = Budget() if budget is None else budget
        self._max_window = window_bytes
        self._streams: list[_Stream] = []  # the one used last is the last
        self._ends: dict[int, None] = {}
        self._turn = 0

    def note(self, offset_bytes: int, size_bytes: int) -> tuple[int, int] | None:
        """Note a read of a range; returns the range (offset, size) to prefetch now, or None."""
        if self._streams:
            self._turn += 1
            for stream in self._streams:
                if stream.position - stream.window <= offset_bytes <= stream.end:
                    return self._advance(stream, offset_bytes, size_bytes)
            if self._streams[0].turn + _FORGOTTEN_AFTER < self._turn:
                self._drop(self._streams[0])
        ends, end = self._ends, offset_bytes + size_bytes
        if offset_bytes in ends:
            self._forget_end(offset_bytes)
            return self._begin(end, size_bytes)
        ends[end] = None
        self.marks.add(end)
        if len(ends) > REMEMBERED_ENDS:
            self._forget_end(next(iter(ends)))
        return None

    def _forget_end(self, offset: int) -> None:
        del self._ends[offset]
        self.marks.discard(offset)

    def forget(self) -> None:
        """Forget every stream."""
        for stream in list(self._streams):
            self._drop(stream)
        self._ends.clear()
        self.marks.clear()

    def _begin(self, position: int, size: int) -> tuple[int, int] | None:
        window = min(max(_FIRST_WINDOW_BYTES, _FIRST_WINDOW_READS * size), self._max_window)
        if len(self._streams) == MAX_STREAMS:
            self._drop(self._streams[0])
        if not self._budget.take(window):
            return None
        stream = _Stream(position, window, self._turn)
        self._streams.append(stream)
        return self._extend(stream, size)

    def _advance(self, stream: _Stream, offset: int, size: int) -> tuple[int, int] | None:
        stream.turn = self._turn
        if self._streams[-1] is not stream:
            self._streams.remove(stream)
            self._streams.append(stream)
        stream.position = max(stream.position, offset + size)
        if stream.end - stream.position > stream.window // 2:
            return None
        grown = min(stream.window * 2, self._max_window)
        if grown > stream.window and self._budget.take(grown - stream.window):
            stream.window = grown
        return self._extend(stream, size)

    def _extend(self, stream: _Stream, size: int) -> tuple[int, int] | None:
        """Prefetch up to a whole window ahead of the position, and set the mark for the next time."""
        start = max(stream.end, stream.position)
        stream.end = min(max(stream.position + stream.window, start), self._size)
        self.marks.discard(stream.mark)
        reads = -(-(stream.end - stream.window // 2 - size - stream.position) // size) if size else 0
        stream.mark = stream.position + max(reads, 0) * size
        if stream.end < self._size:
            self.marks.add(stream.mark)
        return (start, stream.end - start) if stream.end > start else None

    def _drop(self, stream: _Stream) -> None:
        self._streams.remove(stream)
        self.marks.discard(stream.mark)
        self._budget.give_back(stream.window)
