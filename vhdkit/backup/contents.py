# SPDX-License-Identifier: Apache-2.0
"""What of a disk goes into the image of a night: all of it, the layers above a reference, or what differs.

Decides the format, size and block size of that image, and how it is filled. Must not know names, nights, nor which of
the three ways is right (`basis`).

    full       the whole disk, in an image without a parent
    layers     the sectors that the disk's upper layers own, in a child of an image that reads like the layer below
    compared   the pages that read differently, in a child of any image of this disk

The block size is the disk's own: a VHD owns single sectors, and the rest of a block is a hole. The new image is
complete in its file when a function here returns; the caller flushes it and gives it its name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from vhdkit import errors, formats
from vhdkit.chain.engine.chain import Chain, Progress
from vhdkit.chain.engine.steady import steady
from vhdkit.chain.verbs.compare import Sectors, different_pieces
from vhdkit.chain.verbs.copying import copy_content
from vhdkit.chain.verbs.create import DiskFormat
from vhdkit.chain.verbs.merge_parts import seen_through
from vhdkit.chain.verbs.merge_plan import plan_merge
from vhdkit.chain.verbs.merge_steps import fold, take_over_disk
from vhdkit.formats.format import DEFAULT_BLOCK_SIZE, CreateRequest
from vhdkit.image import Layer, ParentRef
from vhdkit.store import Store
from vhdkit.units import PAGE_SIZE, SECTOR_SIZE, round_up, whole_sectors

_SECTORS_PER_PAGE = whole_sectors(PAGE_SIZE)
_SAME, _DATA, _ZERO = range(3)


def kind_of_full(chain: Chain) -> DiskFormat:
    """The kind of an image without a parent: a VHDX if the disk is one, or fits into no VHD; else a VHD."""
    vhdx, vhd = formats.making(DiskFormat.VHDX), formats.making(DiskFormat.DYNAMIC)
    if any(layer.format_name == vhdx.name for layer in chain.layers):
        return DiskFormat.VHDX
    try:
        vhd.check_request(CreateRequest(round_up(chain.size_bytes, vhd.size_unit_bytes), DiskFormat.DYNAMIC))
    except errors.InvalidArgument:
        return DiskFormat.VHDX
    return DiskFormat.DYNAMIC


def write_full(store: Store, chain: Chain, progress: Progress | None = None) -> None:
    """Make the empty file an image with the whole content of the disk. Raises NoSpace, IoFailed, SyncFailed."""
    made = formats.making(kind := kind_of_full(chain))
    sector_bytes = chain.leaf.sector_bytes if chain.leaf.sector_bytes in made.sector_sizes else SECTOR_SIZE
    size, block_size = round_up(chain.size_bytes, made.size_unit_bytes), block_size_in(chain.layers, made.name)
    made.create(store, CreateRequest(size, kind, block_size, sector_bytes=sector_bytes))
    target = made.open(store, writable=True)
    with steady(chain):
        copy_content(chain, target, progress=progress)
    take_over_disk(target, chain.leaf)
    target.seal()


def write_layers(
    store: Store, link: ParentRef, sources: Sequence[Layer], below: Sequence[Layer], progress: Progress | None = None
) -> bool:
    """Make the empty file a child of `below[0]`, which it names by `link`, that owns what the `sources` own.

    The sources are the upper layers of the disk, leaf first, and the layer under them reads like `below[0]`. False if
    they own nothing: then the disk reads like `below[0]`. Raises InvalidArgument, NoSpace, IoFailed, SyncFailed.
    """
    target = _child(store, link, sources, below)
    with steady(Chain(sources)):
        moved = fold(plan_merge(sources, target, below_bytes=seen_through(below), fresh=True), target, progress)
    take_over_disk(target, sources[0])
    target.seal()
    return any(moved) or sources[0].size_bytes != below[0].size_bytes


def write_differences(
    store: Store, link: ParentRef, chain: Chain, below: Sequence[Layer], progress: Progress | None = None
) -> bool:
    """Make the empty file a child of `below[0]` that reads like the disk: it owns the pages that differ.

    Reads both. False if nothing differs. Raises InvalidArgument, NoSpace, IoFailed, SyncFailed.
    """
    target = _child(store, link, chain.layers, below)
    child, has_changed = Chain([target, *below]), chain.size_bytes != below[0].size_bytes
    for first_sector, ours, theirs in different_pieces(chain, Chain(below), progress):
        _write_differing_pages(child, first_sector, ours, theirs)
        has_changed = True
    take_over_disk(target, chain.leaf)
    target.seal()
    return has_changed


def _child(store: Store, link: ParentRef, sources: Sequence[Layer], below: Sequence[Layer]) -> Layer:
    """An empty child of `below[0]` in the file, of the size of the first source, open for writing."""
    made = formats.for_children_of(below[0])
    block_size = block_size_in(sources, made.name)
    made.create_child(store, sources[0].size_bytes, link, block_size_bytes=block_size, disk=below[0])
    return made.open(store, writable=True)


def block_size_in(layers: Sequence[Layer], format_name: str) -> int:
    """The block size of the topmost layer with one that this format can have; or the usual one."""
    made = formats.named(format_name)
    for layer in layers:
        if layer.block_size_bytes:
            with contextlib.suppress(errors.InvalidArgument):
                made.check_block_size(layer.block_size_bytes)
                return layer.block_size_bytes
    return DEFAULT_BLOCK_SIZE


def _write_differing_pages(child: Chain, first_sector: int, ours: Sectors, theirs: Sectors) -> None:
    """Write the pages of `ours` that differ from `theirs`, whole sectors of the disk from `first_sector` on."""
    differs, has_data = _by_page(np.any(ours != theirs, axis=1)), _by_page(np.any(ours, axis=1))
    for start, stop, kind in _runs(np.where(differs, np.where(has_data, _DATA, _ZERO), _SAME)):
        sector, end = start * _SECTORS_PER_PAGE, min(stop * _SECTORS_PER_PAGE, len(ours))
        if kind == _DATA:
            child.write(first_sector + sector, ours[sector:end].view(np.uint8).reshape(-1).data)
        elif kind == _ZERO:
            child.write_zeroes(first_sector + sector, end - sector)


def _by_page(sectors: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """One boolean per page from one per sector: is any of them true?"""
    padded = np.zeros(-(-len(sectors) // _SECTORS_PER_PAGE) * _SECTORS_PER_PAGE, dtype=np.bool_)
    padded[: len(sectors)] = sectors
    return np.asarray(padded.reshape(-1, _SECTORS_PER_PAGE).any(axis=1))


def _runs(kinds: NDArray[np.int_]) -> Iterator[tuple[int, int, int]]:
    """(first, end, kind) of the runs of equal values."""
    edges = (np.flatnonzero(kinds[1:] != kinds[:-1]) + 1).tolist()
    for start, stop in zip([0, *edges], [*edges, len(kinds)], strict=True):
        yield start, stop, int(kinds[start])
