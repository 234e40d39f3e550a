# SPDX-License-Identifier: Apache-2.0
"""Converting a disk, with all its parents, to a new image of another kind.

Decides what is copied, what becomes a hole, and what must not be overwritten. The result appears whole or not
at all; the source is only read.

    source extents (without holes) --> pieces --> workers: read, find zeros, write the rest --> new file

Workers run in parallel because reading and writing release the interpreter's lock. Where the file system can share
space between the source and a raw or fixed result, that is done instead (`sharing`).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np

from vhdkit import errors, formats
from vhdkit.arguments import AnyPath, Size, byte_size, checked
from vhdkit.chain.engine.chain import Chain, Progress
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.records import pending
from vhdkit.chain.verbs.create import DiskFormat, check_block_size, replacing
from vhdkit.chain.verbs.sharing import can_share, pieces_to_move
from vhdkit.folder import NewFile
from vhdkit.formats.azure import azure_size
from vhdkit.formats.format import DEFAULT_BLOCK_SIZE, CreateRequest
from vhdkit.image import ExtentKind, Layer, Piece
from vhdkit.units import MIB, PAGE_SIZE, SECTOR_SIZE, round_down, round_up, sectors_to_bytes, whole_sectors

_PIECE_BYTES = MIB  # measured optimum: larger pieces leave the cache, smaller ones cost more calls
_WORKERS = 2
_PIECES_IN_FLIGHT = 4 * _WORKERS
_MIN_HOLE_PAGES = 4  # a shorter run of zero pages is written: such a small hole costs more than it saves
_WORDS_PER_PAGE = PAGE_SIZE // 8


@checked
def convert(
    source: AnyPath,
    destination: AnyPath,
    disk_format: DiskFormat | str,
    *,
    block_size_bytes: Size = DEFAULT_BLOCK_SIZE,
    azure: bool = False,
    accept_sector_size: bool = False,
    replace: bool = False,
    sync: bool = True,
    options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> int:
    """Write the content of `source` to a new image; returns its virtual size in bytes.

    Zeros become holes; where a raw or fixed result shares space with the source, those stored there are shared.
    With `sync` the result is on the device when this returns. `azure` rounds a fixed VHD up to whole MiB. A disk
    with sectors of 4096 bytes keeps them in a VHDX, and becomes a VHD, whose sectors have 512 bytes, only with
    `accept_sector_size`. `replace` allows an existing file, but never one of the source, one in use, or a parent.
    Raises what `open_disk` raises, and InvalidArgument, AlreadyExists, ImageInUse, HasChildren, NoSpace.
    """
    block_size_bytes, disk_format = byte_size("block_size_bytes", block_size_bytes), DiskFormat(disk_format)
    check_block_size(formats.making(disk_format), block_size_bytes)
    with Chain.open(source, options=options) as chain:
        return convert_chain(
            chain,
            destination,
            disk_format,
            block_size_bytes=block_size_bytes,
            azure=azure,
            accept_sector_size=accept_sector_size,
            replace=replace,
            sync=sync,
            options=options,
            progress=progress,
        )


def convert_chain(
    chain: Chain,
    destination: AnyPath,
    disk_format: DiskFormat,
    *,
    block_size_bytes: int = DEFAULT_BLOCK_SIZE,
    azure: bool = False,
    accept_sector_size: bool = False,
    replace: bool = False,
    sync: bool = True,
    options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> int:
    """`convert` for an open chain."""
    size = converted_size(chain.size_bytes, disk_format, azure=azure)
    sector_bytes = converted_sectors(chain, disk_format, accept=accept_sector_size)
    request = CreateRequest(size, disk_format, block_size_bytes, sector_bytes=sector_bytes)
    with _prepare(chain, os.fsdecode(destination), request, replace=replace, options=options) as (new, target):
        copy_content(chain, target, one_writer=bool(target.block_size_bytes), progress=progress)
        target.seal()
        new.commit(sync=sync)
    return size


@contextlib.contextmanager
def _prepare(
    chain: Chain, path: str, request: CreateRequest, *, replace: bool, options: OpenOptions | None
) -> Iterator[tuple[NewFile, Layer]]:
    """The new file, without its name, and the empty image in it; a file that it will replace is held meanwhile."""
    held = replacing(path, chain.layers, replace=replace, options=options)
    like = pending.files_of(chain.layers)
    with held as old, NewFile(path, replace=replace, old=old, like=like) as new:
        made = formats.making(request.kind)
        made.create(new.store, request)
        yield new, made.open(new.store, writable=True)


def converted_size(size_bytes: int, disk_format: DiskFormat, *, azure: bool) -> int:
    """The virtual size of the result, rounded up to what such a disk can have, with zeros.

    Raises InvalidArgument if that size is not possible.
    """
    if azure:
        if disk_format is not DiskFormat.FIXED:
            raise errors.InvalidArgument("Azure accepts only fixed VHDs", hint="use --to fixed")
        size_bytes = azure_size(size_bytes)
    made = formats.making(disk_format)
    size_bytes = round_up(size_bytes, made.size_unit_bytes)
    made.check_request(CreateRequest(size_bytes, disk_format))
    return size_bytes


def converted_sectors(chain: Chain, disk_format: DiskFormat, *, accept: bool) -> int:
    """The sector size of the result. Raises InvalidArgument if it would change without `accept`.

    A raw image can hold any disk, since it records no sector size.
    """
    made, sector_bytes = formats.making(disk_format), chain.leaf.sector_bytes
    if sector_bytes in made.sector_sizes:
        return sector_bytes
    if not made.is_plain and not accept:
        raise errors.InvalidArgument(
            f"the disk has sectors of {sector_bytes} bytes, and a {made.title} has sectors of {SECTOR_SIZE}: a guest"
            " would not find the partitions, because a partition table counts in sectors",
            path=chain.leaf.store.name,
            hint="convert it to a VHDX with --to vhdx; if nothing on the disk counts in sectors, add"
            " --accept-sector-size (accept_sector_size=True in the library)",
        )
    return SECTOR_SIZE


def copy_content(chain: Chain, target: Layer, *, one_writer: bool = False, progress: Progress | None = None) -> None:
    """Write everything in `chain` that is not zero to `target`, which reads as zeros, in units of its sectors.

    `one_writer` serializes writes, as required by a layer that allocates. Raises IoFailed, NoSpace.
    """
    assert PAGE_SIZE % target.sector_bytes == 0  # pieces are divided at pages
    mover = _Mover(chain, target, one_writer)
    if can_share(chain, target):
        jobs = _sharing_jobs(chain, target, mover)
    else:
        jobs = _jobs(chain, mover, whole_sectors(target.sector_bytes))
    running: deque[tuple[int, Future[None]]] = deque()

    def finish(keep: int) -> None:
        while len(running) > keep:
            end_bytes, job = running.popleft()
            job.result()
            if progress is not None:
                progress(end_bytes, chain.size_bytes)

    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="vhdkit-convert") as pool:
        try:
            for end_sector, job in jobs:
                finish(_PIECES_IN_FLIGHT - 1)
                running.append((sectors_to_bytes(end_sector), pool.submit(job)))
            finish(0)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if progress is not None:
        progress(chain.size_bytes, chain.size_bytes)


def _jobs(chain: Chain, mover: _Mover, unit: int) -> Iterator[tuple[int, Callable[[], None]]]:
    """Everything that may hold data, in order, as (sector where it ends, how it is moved)."""
    for first, count in _pieces(chain, unit):
        yield first + count, partial(mover.move, first, count)


def _sharing_jobs(chain: Chain, target: Layer, mover: _Mover) -> Iterator[tuple[int, Callable[[], None]]]:
    """The same where the file system can share space: only what it cannot share is read."""
    for one in pieces_to_move(chain, target):
        if isinstance(one, Piece):
            yield one.sector_index + one.sector_count, partial(mover.share, one)
        else:
            for first, count in _cut(one[0], one[0] + one[1], whole_sectors(_PIECE_BYTES)):
                yield first + count, partial(mover.move, first, count)


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


class _Mover:
    """Moves one piece at a time; each thread has its own buffer."""

    def __init__(self, chain: Chain, target: Layer, one_writer: bool) -> None:
        self._chain = chain
        self._target = target
        self._lock = threading.Lock() if one_writer else None
        self._sharing = self._lock or threading.Lock()
        self._own = threading.local()

    def share(self, piece: Piece) -> None:
        """Let the file system share a piece, without looking for zeros in it."""
        with self._sharing:
            self._target.copy_in([piece])

    def move(self, sector_index: int, sector_count: int) -> None:
        """Read the piece and write its parts that are not zeros."""
        if not hasattr(self._own, "buffer"):
            self._own.buffer = memoryview(bytearray(_PIECE_BYTES))
        view: memoryview = self._own.buffer[: sectors_to_bytes(sector_count)]
        self._chain.read_into(sector_index, view)
        for start, stop in data_ranges(view):
            first = sector_index + whole_sectors(start)
            if self._lock is None:
                self._target.write(first, view[start:stop])
            else:
                with self._lock:
                    self._target.write(first, view[start:stop])


def data_ranges(view: memoryview) -> list[tuple[int, int]]:
    """The byte ranges of `view` (whole sectors) that are not zeros, on pages from its start."""
    size = len(view)
    page_count = size // PAGE_SIZE
    words = np.frombuffer(view, dtype=np.uint64, count=page_count * _WORDS_PER_PAGE).reshape(
        page_count, _WORDS_PER_PAGE
    )
    # Most pages with data have some in their first word; only the others are examined completely.
    has_data = words[:, 0] != 0
    quiet = np.flatnonzero(~has_data)
    if 0 < len(quiet) < page_count:
        has_data[quiet] = words[quiet].any(axis=1)
    elif page_count and len(quiet) == page_count and words.max():  # else all zeros, the usual case here
        has_data = words.any(axis=1)
    pages = np.flatnonzero(has_data)
    ranges: list[tuple[int, int]] = []
    if len(pages):
        breaks = np.flatnonzero(pages[1:] - pages[:-1] > _MIN_HOLE_PAGES)
        starts = [pages[0], *pages[breaks + 1]]
        stops = [*pages[breaks], pages[-1]]
        ranges = [(int(a) * PAGE_SIZE, (int(b) + 1) * PAGE_SIZE) for a, b in zip(starts, stops, strict=True)]
    tail = page_count * PAGE_SIZE
    if tail < size and any(view[tail:]):
        if ranges and ranges[-1][1] == tail:
            ranges[-1] = (ranges[-1][0], size)
        else:
            ranges.append((tail, size))
    return ranges
