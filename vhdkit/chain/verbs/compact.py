# SPDX-License-Identifier: Apache-2.0
"""Making an image's file smaller without changing a byte of its disk.

Decides what can be dropped. A block of a dynamic or differencing image is dropped if every sector it owns is zero, and
what would be seen without it is zero, too: the parents are needed for this, since zeros in a child may hide data of an
ancestor (`INV-COMPACT-PRESERVES`). Header and parent names that lie after blocks are moved to the front
(`formats.vhd.front`), then the gaps are filled with the blocks that lie last, and the file is cut. In fixed and raw
images zeros become holes. How blocks move, and in which order, is decided in `formats.vhd.move`.

In a dynamic image, bytes under clear bits count as data: by the specification they are zeros, but some programs show
them, and compacting must not change what any program shows.

Content never changes, so an image on which others stand can be compacted, too, if no program has it open.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vhdkit import errors
from vhdkit.arguments import AnyPath, checked
from vhdkit.chain.engine.chain import Chain, Progress
from vhdkit.chain.names.lineage import same_content
from vhdkit.chain.names.resolve import OpenOptions, open_layers
from vhdkit.chain.records import pending
from vhdkit.chain.verbs.convert import data_ranges
from vhdkit.chain.verbs.report import Report
from vhdkit.chain.verbs.zeros import first_data_in_store, is_zero_in_disk
from vhdkit.formats.draft import DraftStore
from vhdkit.formats.linear import LinearImage
from vhdkit.formats.vhd import bitmap
from vhdkit.formats.vhd.dynamic import DynamicImage, open_dynamic
from vhdkit.formats.vhd.front import behind_first_block, settle_front
from vhdkit.formats.vhd.layout import FOOTER_SIZE
from vhdkit.formats.vhd.move import Packing, block_space, cut_end, drop_blocks, move_blocks, plan_packing
from vhdkit.image import Layer
from vhdkit.store import FileStore
from vhdkit.units import KIB, MIB, PAGE_SIZE, SECTOR_SIZE, round_down, sectors_to_bytes, whole_sectors

_PIECE_BYTES = MIB
_MIN_HOLE_BYTES = 64 * KIB  # a shorter hole in a fixed or raw image costs more than it saves


@dataclass(frozen=True, slots=True)
class CompactResult:
    """What compacting did, or would do. Sizes in bytes; `allocated` does not count the file's holes.

    `punched_bytes` are zeros that became holes (fixed and raw images).
    """

    path: str
    file_size_before_bytes: int
    file_size_after_bytes: int
    allocated_before_bytes: int
    allocated_after_bytes: int | None  # None: not known before it is done
    dropped_block_count: int
    moved_block_count: int
    punched_bytes: int


@checked
def compact(
    path: AnyPath,
    *,
    options: OpenOptions | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> CompactResult:
    """Drop blocks of zeros, fill the gaps and cut the file, or punch holes; `dry_run` only says what it would do.

    After a power cut or Ctrl-C at any moment the disk reads as before, and compacting can be repeated. Raises what
    opening the chain raises, ImageInUse if the image is open anywhere, InvalidArgument for a device, NoSpace,
    IoFailed, SyncFailed.
    """
    if dry_run:
        return _compacted(path, options, True, progress)
    with same_content(os.fsdecode(path)):
        return _compacted(path, options, False, progress)


def _compacted(path: AnyPath, options: OpenOptions | None, dry_run: bool, progress: Progress | None) -> CompactResult:
    layers = open_layers(path, writable=not dry_run, options=options, danger=None)
    try:
        image, store = layers[0], layers[0].store
        file = _regular_file(image)
        size, allocated = store.size(), file.allocated_bytes()
        report = Report(progress)
        if isinstance(image, DynamicImage):
            dropped, packing = plan_compact(layers, report)
            if not dry_run:
                run_compact(image, dropped, packing, report)
            after = min(packing.end_bytes + FOOTER_SIZE, size)
            counts, punched = (len(dropped), len(packing.blocks)), 0
        else:
            assert isinstance(image, LinearImage)
            punched = sum(_punch_zeros(image, report, dry_run))
            counts, after = (0, 0), size
            image.flush()
        report.finish()
        allocated_after = None if dry_run else file.allocated_bytes()
        return CompactResult(store.name, size, after, allocated, allocated_after, *counts, punched)
    finally:
        for layer in layers:
            layer.close()


def _regular_file(image: Layer) -> FileStore:
    store = pending.file_of(image.store)
    assert store is not None
    if store.is_device:
        raise errors.InvalidArgument("is a device: only files can be compacted", path=store.name)
    return store


def plan_compact(layers: Sequence[Layer], report: Report | None = None) -> tuple[NDArray[np.int64], Packing]:
    """The blocks of the leaf, a dynamic or differencing image, that can go, and where the others go then."""
    image = layers[0]
    assert isinstance(image, DynamicImage)
    below = Chain(layers[1:]) if len(layers) > 1 else None
    blocks = np.flatnonzero(image.allocated_blocks())
    blocks = blocks[np.argsort(image.bat.entries[blocks], kind="stable")]  # in the order they lie in the file
    if report is not None:
        report.expect(len(blocks) * image.block_size_bytes)
    empty = np.zeros(len(blocks), dtype=np.bool_)
    for number in range(len(blocks)):
        empty[number] = _can_go(image, int(blocks[number]), below)
        if report is not None:
            report.did(image.block_size_bytes)
    dropped = np.sort(blocks[empty]).astype(np.int64)
    if not behind_first_block(image.metadata, image.bat):
        return dropped, plan_packing(image, dropped)
    draft = DraftStore(image.store)
    return dropped, plan_packing(_with_front_settled(open_dynamic(draft, writable=True), dropped))


def _with_front_settled(image: DynamicImage, dropped: NDArray[np.int64]) -> DynamicImage:
    """The image without the dropped blocks, and with header and names before the others."""
    drop_blocks(image, dropped)
    return open_dynamic(image.store, writable=True) if settle_front(image) else image


def _can_go(image: DynamicImage, block: int, below: Chain | None) -> bool:
    """True when the disk reads the same without the block."""
    position = block * image.block_size_bytes
    inside = min(image.block_size_bytes, image.size_bytes - position)
    offset = image.block_offset(block)
    if not image.is_differencing:
        return first_data_in_store(image.store, offset, inside) is None
    owned = image.owned_sectors(block)
    runs = [(0, whole_sectors(inside), True)]
    if owned is not None:
        runs = [run for run in bitmap.runs(owned[: whole_sectors(inside)]) if run[2]]
    ranges = [(sectors_to_bytes(first), sectors_to_bytes(count)) for first, count, _ in runs]
    if any(first_data_in_store(image.store, offset + start, size) is not None for start, size in ranges):
        return False
    return below is None or all(is_zero_in_disk(below, position + start, size) for start, size in ranges)


def run_compact(
    image: DynamicImage, dropped: NDArray[np.int64], packing: Packing, report: Report | None = None
) -> None:
    """Do what `plan_compact` found; the image, opened for writing, is closed by the caller."""
    if report is not None:
        report.expect(len(packing.blocks) * block_space(image))
    settled = _with_front_settled(image, dropped)
    if settled is not image:
        packing = plan_packing(settled)
    move_blocks(settled, packing, report.did if report is not None else None)
    cut_end(settled, packing.end_bytes)


def _punch_zeros(image: LinearImage, report: Report, dry_run: bool) -> Iterator[int]:
    """Make holes of the zeros of a fixed or raw image; yields the bytes of each."""
    store, size = image.store, min(image.size_bytes, image.store.size())
    report.expect(size)
    for offset, count, may_hold_data in store.data_runs(0, size):
        if not may_hold_data:
            report.did(count)
            continue
        for start in range(offset, offset + count, _PIECE_BYTES):
            raw = store.pread(start, min(_PIECE_BYTES, offset + count - start))
            for low, high in zero_ranges(raw):
                if not dry_run:
                    store.punch(start + low, high - low)
                yield high - low
            report.did(len(raw))


def zero_ranges(raw: bytes) -> Iterator[tuple[int, int]]:
    """(start, end) of the longer runs of zero pages."""
    whole = round_down(len(raw), SECTOR_SIZE)
    position = 0
    for start, stop in [*data_ranges(memoryview(raw)[:whole]), (whole, whole)]:
        low, high = -(-position // PAGE_SIZE) * PAGE_SIZE, round_down(start, PAGE_SIZE)
        if high - low >= _MIN_HOLE_BYTES:
            yield low, high
        position = stop
