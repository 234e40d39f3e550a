# SPDX-License-Identifier: Apache-2.0
"""Converting a disk, with all its parents, to a new image of another kind.

Decides what size and sectors the result has, and what must not be overwritten. The result appears whole or not
at all; the source is only read. How the content is copied is decided in `copying`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from vhdkit import errors, formats
from vhdkit.arguments import AnyPath, Size, byte_size, checked
from vhdkit.chain.engine.chain import Chain, Progress
from vhdkit.chain.engine.steady import steady
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.records import pending
from vhdkit.chain.verbs.copying import copy_content
from vhdkit.chain.verbs.create import DiskFormat, check_block_size, replacing
from vhdkit.folder import NewFile
from vhdkit.formats.azure import azure_size
from vhdkit.formats.format import DEFAULT_BLOCK_SIZE, CreateRequest
from vhdkit.image import Layer
from vhdkit.rate import RateLimit
from vhdkit.units import SECTOR_SIZE, round_up


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
    raw_size_bytes: int | None = None,
    limit: RateLimit | None = None,
    options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> int:
    """`convert` for an open chain. A raw image gets the length `raw_size_bytes`, if it is given and shorter.

    `limit` is how much is written in a second.
    """
    size = converted_size(chain.size_bytes, disk_format, azure=azure)
    sector_bytes = converted_sectors(chain, disk_format, accept=accept_sector_size)
    request = CreateRequest(size, disk_format, block_size_bytes, sector_bytes=sector_bytes)
    with _prepare(chain, os.fsdecode(destination), request, replace=replace, options=options) as (new, target):
        if sync:
            new.start_early()
        if limit is not None:
            progress = limit.follow(progress, lambda _: new.store.allocated_bytes())
        with steady(chain):
            copy_content(chain, target, progress=progress)
        target.seal()
        if disk_format is DiskFormat.RAW and raw_size_bytes is not None and raw_size_bytes < size:
            new.store.truncate(raw_size_bytes)
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
