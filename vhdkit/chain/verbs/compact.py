# SPDX-License-Identifier: Apache-2.0
"""Shrinks an image's file without changing a byte of its disk.

Decides what can be dropped. A block of a dynamic or differencing image is dropped if every sector it owns is zero, and
what would be visible without it is zero, too: this requires the parents, since zeros in a child may hide data of an
ancestor (`INV-COMPACT-PRESERVES`), unless the format can store that a block is zeros. Then the gaps are filled with
the blocks at the end, and the file is truncated. In images without blocks zeros become holes. How blocks move, in
which order, and which of its bytes any program may show is decided by the format (`Compactable`): compacting must not
change what any program shows.

Content never changes, so an image that has children can be compacted, too, if no program has it open.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vhdkit import errors, formats
from vhdkit.arguments import AnyPath, checked
from vhdkit.chain.engine.chain import Chain, Progress
from vhdkit.chain.names.lineage import same_content
from vhdkit.chain.names.opening import open_layers
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.records import pending
from vhdkit.chain.verbs.report import Report
from vhdkit.chain.verbs.zeros import data_ranges, first_data_in_store, is_zero_in_disk
from vhdkit.formats.format import Compactable, CompactPlan
from vhdkit.image import ExtentKind, Layer
from vhdkit.store import FileStore
from vhdkit.units import KIB, MIB, PAGE_SIZE, SECTOR_SIZE, round_down

_PIECE_BYTES = MIB
_MIN_HOLE_BYTES = 64 * KIB  # a shorter hole in a fixed or raw image costs more than it saves


@dataclass(frozen=True, slots=True)
class CompactResult:
    """What compacting did, or would do. Sizes in bytes; the `allocated` sizes exclude the file's holes.

    `punched_bytes` are zeros that became holes (fixed and raw images).
    """

    path: str
    file_size_before_bytes: int
    file_size_after_bytes: int
    allocated_before_bytes: int
    allocated_after_bytes: int | None  # None: unknown until it is done
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
    """Drop blocks of zeros, fill the gaps and truncate the file, or punch holes; `dry_run` only reports the result.

    After a power cut or Ctrl-C at any moment the disk reads as before, and compacting can be repeated. Raises what
    opening the chain raises, ImageInUse if the image is open anywhere, InvalidArgument for a device, NoSpace,
    IoFailed, SyncFailed.
    """
    options, report = options or OpenOptions(), Report(progress)
    with _prepare(path, options, dry_run=dry_run) as layers:
        plan = _plan(layers, report)
        punched = plan.punched(report) if dry_run else _run(plan, report)
        report.finish()
        return _result(plan, punched, dry_run=dry_run)


@contextlib.contextmanager
def _prepare(path: AnyPath, options: OpenOptions, *, dry_run: bool) -> Iterator[list[Layer]]:
    """The open chain, leaf first, held; unless `dry_run` the leaf is open for writing, and what its children read is
    declared to stay the same.
    """
    with contextlib.nullcontext() if dry_run else same_content(os.fsdecode(path)):
        layers = open_layers(path, writable=not dry_run, options=options, danger=None)
        try:
            yield layers
        finally:
            for layer in layers:
                layer.close()


@dataclass(frozen=True, slots=True, eq=False)
class _Shrinking:
    """A file that gets smaller, with its sizes before; `blocks` is None for an image without blocks.

    Zeros in an image without blocks are found while they are punched: a list of all of them could be long.
    """

    image: Layer
    file: FileStore
    size_bytes: int
    allocated_bytes: int
    blocks: tuple[Compactable, CompactPlan] | None

    def punched(self, report: Report) -> int:
        """Bytes of zeros that would become holes."""
        return 0 if self.blocks is not None else sum(_punch_zeros(self.image, report, True))


def _plan(layers: Sequence[Layer], report: Report) -> _Shrinking:
    """What can be dropped from the leaf, and where the rest goes. Reads the disk, and changes nothing."""
    image = layers[0]
    file = _regular_file(image)
    size, allocated, blocks = image.store.size(), file.allocated_bytes(), None
    if image.block_size_bytes:
        compactable = compactable_of(image)
        blocks = compactable, plan_compact(layers, compactable, report)
    return _Shrinking(image, file, size, allocated, blocks)


def _run(plan: _Shrinking, report: Report) -> int:
    """Make the file smaller; returns the bytes that became holes. Raises NoSpace, IoFailed, SyncFailed."""
    if plan.blocks is not None:
        run_compact(*plan.blocks, report)
        return 0
    punched = sum(_punch_zeros(plan.image, report, False))
    plan.image.flush()
    return punched


def _result(plan: _Shrinking, punched_bytes: int, *, dry_run: bool) -> CompactResult:
    blocks = None if plan.blocks is None else plan.blocks[1]
    return CompactResult(
        path=plan.image.store.name,
        file_size_before_bytes=plan.size_bytes,
        file_size_after_bytes=plan.size_bytes if blocks is None else min(blocks.file_end_bytes, plan.size_bytes),
        allocated_before_bytes=plan.allocated_bytes,
        allocated_after_bytes=None if dry_run else plan.file.allocated_bytes(),
        dropped_block_count=0 if blocks is None else len(blocks.dropped),
        moved_block_count=0 if blocks is None else blocks.moved_block_count,
        punched_bytes=punched_bytes,
    )


def _regular_file(image: Layer) -> FileStore:
    store = pending.file_of(image.store)
    assert store is not None
    if store.is_device:
        raise errors.InvalidArgument("is a device: only files can be compacted", path=store.name)
    return store


def compactable_of(image: Layer) -> Compactable:
    """The format's way to shrink an image with blocks. Raises InvalidArgument if the format has none."""
    found = formats.of(image).compactable(image)
    if found is None:
        raise errors.InvalidArgument(
            f"is a {image.facts.title}, whose file cannot be made smaller in place",
            path=image.store.name,
            hint="a copy made by `vhdkit convert` has no blocks of zeros",
        )
    return found


def plan_compact(layers: Sequence[Layer], compactable: Compactable, report: Report | None = None) -> CompactPlan:
    """The blocks of the leaf that can be dropped, and the new places of the others."""
    image = layers[0]
    below = Chain(layers[1:]) if len(layers) > 1 else None
    blocks = compactable.blocks()
    if report is not None:
        report.expect(len(blocks) * image.block_size_bytes)
    empty = np.zeros(len(blocks), dtype=np.bool_)
    for number in range(len(blocks)):
        empty[number] = _can_go(image, compactable, int(blocks[number]), below)
        if report is not None:
            report.did(image.block_size_bytes)
    return compactable.plan(np.sort(blocks[empty]).astype(np.int64))


def _can_go(image: Layer, compactable: Compactable, block: int, below: Chain | None) -> bool:
    """True if the disk reads the same without the block."""
    position, offset = block * image.block_size_bytes, image.block_offset(block)
    ranges = compactable.visible_ranges(block)
    if any(first_data_in_store(image.store, offset + start, size) is not None for start, size in ranges):
        return False
    if image.unowned is ExtentKind.ZERO or below is None or compactable.owned_as_zeros(block):
        return True
    return all(is_zero_in_disk(below, position + start, size) for start, size in ranges)


def run_compact(compactable: Compactable, plan: CompactPlan, report: Report | None = None) -> None:
    """Carry out the result of `plan_compact`; the caller then closes the image, which is open for writing."""
    if report is not None:
        report.expect(plan.moved_bytes)
    compactable.run(report.did if report is not None else None)


def _punch_zeros(image: Layer, report: Report, dry_run: bool) -> Iterator[int]:
    """Turn the zeros of an image without blocks into holes; yields the bytes of each."""
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
