# SPDX-License-Identifier: Apache-2.0
"""Disks as byte streams: a raw or fixed image read from, or written to, a pipe.

Decides how a stream of unknown length becomes an image. The pipe itself belongs to the caller, who passes a
function that reads or writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from vhdkit import errors, formats
from vhdkit.arguments import AnyPath
from vhdkit.chain.engine.chain import Chain, Progress
from vhdkit.chain.engine.steady import steady
from vhdkit.chain.verbs.convert import convert_chain, converted_sectors, converted_size
from vhdkit.chain.verbs.create import DiskFormat, check_block_size, replacing
from vhdkit.chain.verbs.zeros import data_ranges
from vhdkit.folder import NewFile, scratch_store
from vhdkit.formats.format import DEFAULT_BLOCK_SIZE
from vhdkit.formats.probe import FormatName, format_of, identify
from vhdkit.image import ExtentKind
from vhdkit.store import FileStore
from vhdkit.units import MIB, SECTOR_SIZE, round_up, sectors_to_bytes, whole_sectors

_PIECE_BYTES = MIB
_STREAM = "standard input"
_ZEROS = bytes(_PIECE_BYTES)


def export_stream(
    chain: Chain,
    write: Callable[[memoryview], object],
    disk_format: DiskFormat,
    *,
    azure: bool = False,
    accept_sector_size: bool = False,
    progress: Progress | None = None,
) -> int:
    """Pass the whole disk to `write`, piece by piece in order; returns its virtual size in bytes.

    Raises InvalidArgument for a format that cannot be streamed, IoFailed, and what `write` raises.
    """
    made = formats.making(disk_format)
    if made.stream_end(disk_format, chain.size_bytes) is None:
        raise errors.InvalidArgument(
            f"a {disk_format.label} cannot be written to a pipe, only a raw image or a fixed VHD",
            hint="use --to raw or --to fixed",
        )
    converted_sectors(chain, disk_format, accept=accept_sector_size)
    size = converted_size(chain.size_bytes, disk_format, azure=azure)
    with steady(chain):
        _write_disk(chain, write, progress)
    for position in range(chain.size_bytes, size, _PIECE_BYTES):
        write(memoryview(_ZEROS)[: min(_PIECE_BYTES, size - position)])
    end = made.stream_end(disk_format, size)
    if end:
        write(memoryview(end))
    return size


def _write_disk(chain: Chain, write: Callable[[memoryview], object], progress: Progress | None) -> None:
    buffer, zeros = memoryview(bytearray(_PIECE_BYTES)), memoryview(_ZEROS)
    for extent in chain.extents(0, whole_sectors(chain.size_bytes), find_holes=True):
        step = whole_sectors(_PIECE_BYTES)
        for position in range(extent.sector_index, extent.end_sector, step):
            piece_bytes = sectors_to_bytes(min(step, extent.end_sector - position))
            if extent.kind is ExtentKind.DATA:
                chain.read_into(position, buffer[:piece_bytes])
                write(buffer[:piece_bytes])
            else:
                write(zeros[:piece_bytes])
            if progress is not None:
                progress(sectors_to_bytes(position) + piece_bytes, chain.size_bytes)


def import_stream(
    read: Callable[[int], bytes],
    destination: AnyPath,
    disk_format: DiskFormat,
    *,
    source_format: FormatName | None = None,
    block_size_bytes: int = DEFAULT_BLOCK_SIZE,
    azure: bool = False,
    replace: bool = False,
    sync: bool = True,
    progress: Progress | None = None,
) -> int:
    """Create an image from what `read` returns until it returns nothing; returns its virtual size in bytes.

    A stream that ends with the footer of a fixed VHD of exactly that length is read as one, unless `source_format` is
    RAW. For a raw or fixed result the bytes go directly to the image; a dynamic one needs the length first, so they
    wait in a nameless file beside the destination. Raises InvalidArgument, AlreadyExists, NoSpace, IoFailed.
    """
    path = os.fsdecode(destination)
    made = formats.making(disk_format)
    check_block_size(made, block_size_bytes)
    if made.stream_end(disk_format, SECTOR_SIZE) is None:
        NewFile(path, replace=replace).discard()  # refuse an invalid destination before reading the stream
        with scratch_store(os.path.dirname(path)) as spool:
            receive(read, spool, source_format, progress)
            return convert_chain(
                Chain([formats.plain().open(spool)]),
                path,
                disk_format,
                block_size_bytes=block_size_bytes,
                azure=azure,
                replace=replace,
                sync=sync,
            )
    with replacing(path, replace=replace) as old, NewFile(path, replace=replace, old=old) as new:
        size = converted_size(receive(read, new.store, source_format, progress), disk_format, azure=azure)
        new.store.truncate(size)
        end = made.stream_end(disk_format, size)
        if end:
            new.store.pwrite(size, end)
        new.commit(sync=sync)
    return size


def pass_stream(
    read: Callable[[int], bytes],
    write: Callable[[memoryview], object],
    disk_format: DiskFormat,
    *,
    source_format: FormatName | None = None,
    azure: bool = False,
) -> int:
    """Convert from pipe to pipe; the bytes wait in a temporary file until the end is known."""
    with scratch_store(None) as spool:
        receive(read, spool, source_format, None)
        return export_stream(Chain([formats.plain().open(spool)]), write, disk_format, azure=azure)


def receive(
    read: Callable[[int], bytes],
    store: FileStore,
    source_format: FormatName | None,
    progress: Progress | None,
) -> int:
    """Fill the empty `store` with the stream's disk, omitting zeros; returns its size in bytes, whole sectors."""
    size, pending = 0, bytearray()
    while True:
        piece = read(_PIECE_BYTES)
        pending += piece
        if piece and len(pending) < _PIECE_BYTES:
            continue
        whole = pending if not piece else pending[: len(pending) // SECTOR_SIZE * SECTOR_SIZE]
        _place(store, size, bytes(whole))
        size += len(whole)
        del pending[: len(whole)]
        if progress is not None:
            progress(size, size)
        if not piece:
            break
    if size == 0:
        raise errors.InvalidArgument("is empty: not a disk image", path=_STREAM)
    store.truncate(size)
    size = round_up(_disk_size(store, size, source_format), SECTOR_SIZE)
    store.truncate(size)
    return size


def _place(store: FileStore, offset_bytes: int, data: bytes) -> None:
    padded = memoryview(data.ljust(round_up(len(data), SECTOR_SIZE), b"\0"))
    for start, stop in data_ranges(padded):
        store.pwrite(offset_bytes + start, padded[start : min(stop, len(data))])


def _disk_size(store: FileStore, size_bytes: int, source_format: FormatName | None) -> int:
    """The size of the disk in the received bytes: all of them, or those before a fixed VHD's footer.

    Detected as for a file. Raises InvalidArgument for a VHD that is not fixed, CorruptImage, UnsupportedFormat.
    """
    try:
        found = identify(store, by_name=False) if source_format is None else format_of(store, source_format)
        if found.is_plain:
            return size_bytes
        facts = found.facts(store)
    except errors.VhdkitError as error:
        error.path = _STREAM  # the store carries the name of the result
        raise
    if facts.block_size_bytes:
        raise errors.InvalidArgument(
            f"a dynamic or differencing {found.title} cannot be read from a pipe",
            path=_STREAM,
            hint="give the name of its file",
        )
    return facts.size_bytes
