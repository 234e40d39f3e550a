# SPDX-License-Identifier: Apache-2.0
"""The content of a chain reaches a new image.

Decides in which pieces it is copied, and how reading and writing overlap. Must not know names, nor when the new image
is complete (`convert`).

    this thread:     extents (without holes) --> pieces --> read, find zeros     (buffers)     progress
                                                                  |  filled  ^
                                                                  v          |  written
    another thread:                                         write the rest to the new image

One thread writes, since a file takes one write at a time, and an image that allocates blocks one change. One thread
reads, since two of them would mostly wait for the interpreter's lock where a chain has many small runs. Where the file
system can share space between the source and the new image, that is done instead (`sharing`).

`INV-COPY-BOUNDED`: `_BUFFERS` pieces are in memory, whatever the size of the disk.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from types import TracebackType
from typing import Self, TypeAlias

from vhdkit.chain.engine.ahead import Ahead, announced
from vhdkit.chain.engine.chain import Chain, Progress
from vhdkit.chain.verbs.sharing import can_share, pieces_to_move
from vhdkit.chain.verbs.zeros import data_ranges
from vhdkit.image import ExtentKind, Layer, Piece
from vhdkit.units import MIB, PAGE_SIZE, round_down, round_up, sectors_to_bytes, whole_sectors

_PIECE_BYTES = (
    2 * MIB
)  # measured: larger pieces leave the cache; smaller ones cost more calls and more thread switches
_BUFFERS = 4

_Run: TypeAlias = tuple[int, int]  # first sector, count


def copy_content(chain: Chain, target: Layer, *, progress: Progress | None = None) -> None:
    """Write everything in `chain` that is not zero to `target`, which reads as zeros, in units of its sectors.

    `progress` is called in this thread with what is written. Raises IoFailed, NoSpace.
    """
    assert PAGE_SIZE % target.sector_bytes == 0  # pieces are divided at pages
    chain.map.walked_once()
    ahead = Ahead(chain)

    def announce(job: _Run | Piece) -> None:
        if not isinstance(job, Piece):
            ahead.expect(*job)

    def report(end_sector: int) -> None:
        if progress is not None:
            progress(sectors_to_bytes(end_sector), chain.size_bytes)

    with _Writer(target, report) as writer:
        for job in announced(_jobs(chain, target), _sectors_to_read, announce):
            buffer = writer.free_buffer()
            if isinstance(job, Piece):
                writer.share(buffer, job)
                continue
            sector_index, sector_count = job
            view = buffer[: sectors_to_bytes(sector_count)]
            ahead.read_into(sector_index, view)
            writer.write(buffer, sector_index, sector_count, data_ranges(view))
        writer.finish()
    report(whole_sectors(chain.size_bytes))


def _sectors_to_read(job: _Run | Piece) -> int:
    return 0 if isinstance(job, Piece) else job[1]


class _Writer:
    """The thread that writes. It takes filled buffers, and returns them when they are written.

    After a failure in either thread it writes nothing more.
    """

    def __init__(self, target: Layer, report: Callable[[int], None]) -> None:
        self._target = target
        self._report = report
        self._jobs: SimpleQueue[tuple[memoryview, int, Callable[[], object]] | None] = SimpleQueue()
        self._done: SimpleQueue[tuple[memoryview, int, BaseException | None]] = SimpleQueue()
        self._has_stopped = False
        self._thread = threading.Thread(target=self._work, name="vhdkit-convert", daemon=True)
        for _ in range(_BUFFERS):
            self._done.put((memoryview(bytearray(_PIECE_BYTES)), -1, None))

    def free_buffer(self) -> memoryview:
        """Wait for a buffer that may be filled, and report what was written from it. Raises what writing raised."""
        buffer, end_sector, failure = self._done.get()
        if failure is not None:
            raise failure
        if end_sector >= 0:
            self._report(end_sector)
        return buffer

    def write(self, buffer: memoryview, sector_index: int, sector_count: int, ranges: list[tuple[int, int]]) -> None:
        """Write these byte ranges of the buffer, which holds the sectors from `sector_index` on."""

        def job() -> None:
            for start, stop in ranges:
                self._target.write(sector_index + whole_sectors(start), buffer[start:stop])

        self._jobs.put((buffer, sector_index + sector_count, job))

    def share(self, buffer: memoryview, piece: Piece) -> None:
        """Let the file system share a piece, without looking for zeros in it. The buffer is not used."""
        self._jobs.put((buffer, piece.sector_index + piece.sector_count, lambda: self._target.copy_in([piece])))

    def finish(self) -> None:
        """Return when everything is written. Raises what writing raised."""
        for _ in range(_BUFFERS):
            self.free_buffer()

    def _work(self) -> None:
        while (work := self._jobs.get()) is not None:
            buffer, end_sector, job = work
            failure: BaseException | None = None
            if not self._has_stopped:
                try:
                    job()
                except BaseException as error:  # raised in the other thread
                    self._has_stopped, failure = True, error
            self._done.put((buffer, end_sector, failure))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The thread has ended when this returns: what it was writing is written, what waits is left."""
        self._has_stopped = True
        self._jobs.put(None)
        self._thread.join()


def _jobs(chain: Chain, target: Layer) -> Iterator[_Run | Piece]:
    """Everything that may hold data, in order: what is copied, and what is shared."""
    if not can_share(chain, target):
        yield from _pieces(chain, whole_sectors(target.sector_bytes))
        return
    for one in pieces_to_move(chain, target):
        if isinstance(one, Piece):
            yield one
        else:
            yield from _cut(one[0], one[0] + one[1], whole_sectors(_PIECE_BYTES))


def _pieces(chain: Chain, unit: int) -> Iterator[tuple[int, int]]:
    """The parts of the disk that may hold data as (first sector, count), cut at multiples of the piece size.

    They begin and end at multiples of `unit` sectors, or at the end of the disk. Which layer owns the data does not
    matter here: in a chain, a piece often has runs of several layers.
    """
    step, disk_end = whole_sectors(_PIECE_BYTES), whole_sectors(chain.size_bytes)
    start = end = 0
    for extent in chain.extents(0, disk_end, find_holes=True):
        if extent.kind is not ExtentKind.DATA:
            continue
        first = round_down(extent.sector_index, unit)
        if first > end:
            yield from _cut(start, end, step)
            start = first
        end = min(round_up(extent.end_sector, unit), disk_end)
        while end - start >= 2 * step:  # emit complete pieces before the run ends
            stop = (start // step + 1) * step
            yield start, stop - start
            start = stop
    yield from _cut(start, end, step)


def _cut(start: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    while start < end:
        stop = min((start // step + 1) * step, end)
        yield start, stop - start
        start = stop
