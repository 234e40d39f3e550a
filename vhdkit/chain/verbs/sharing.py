# SPDX-License-Identifier: Apache-2.0
"""What a new image can share with the files of a chain, so that the file system need not copy it.

Decides which runs of sectors are shared and which remain to be copied, and what `check` says about images that cannot
be shared. Must not know how a file system shares (`transfer`), nor how the rest is copied (`convert`).

    plan of a merge into an empty image --> runs that lie alike on pages in both files, and are long    shared
                                        --> everything else that is data                               copied

Only images whose sectors have their places from the beginning (raw, fixed) share: there a stored zero takes no space
that the source does not take. In a dynamic image zeros are found and left out instead. Shared content is that of the
source when it is shared; sources are held by the caller, and do not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from vhdkit import errors
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.verbs.merge_plan import plan_merge
from vhdkit.finding import Finding, Severity
from vhdkit.formats.format import Format
from vhdkit.image import Layer, Piece
from vhdkit.store import FileStore, ReadStore
from vhdkit.transfer import MIN_SHARED_BYTES, may_share
from vhdkit.units import MIB, PAGE_SIZE, round_down, round_up, sectors_to_bytes, whole_sectors

_MAX_SHARED_BYTES = 256 * MIB  # in one call, which cannot be interrupted


def can_share(chain: Chain, target: Layer) -> bool:
    """Whether the file system can share space between the new image `target` and a layer of the chain.

    Raises IoFailed.
    """
    has_places = not target.block_size_bytes or bool(target.allocated_blocks().all())
    if not has_places or target.sector_bytes > min(layer.sector_bytes for layer in chain.layers):
        return False
    new, sources = target.store, [layer.store for layer in chain.layers]
    return isinstance(new, FileStore) and any(isinstance(one, FileStore) and one.shares_with(new) for one in sources)


def sharing_findings(store: ReadStore, image_format: Format) -> list[Finding]:
    """A note if parts of a sound image cannot be shared although its file system can share. Raises IoFailed."""
    if not isinstance(store, FileStore) or not may_share(store.fileno()):
        return []
    try:
        layer = image_format.open(store)
    except (errors.CorruptImage, errors.InvalidArgument):
        return []  # the examination has reported it
    blocks = np.flatnonzero(layer.allocated_blocks()).tolist()
    odd = [block for block in blocks if layer.block_offset(block) % PAGE_SIZE]
    if not odd:
        return []
    message = (
        f"{len(odd)} of {len(blocks)} blocks lie at offsets that are not a multiple of {PAGE_SIZE}: the file system"
        " cannot share them, so that merging and converting copies them; in an image made by `vhdkit convert` it can"
    )
    return [
        Finding(Severity.NOTE, "unaligned-blocks", message, store.name, f"block {odd[0]}", layer.block_offset(odd[0]))
    ]


def pieces_to_move(chain: Chain, target: Layer) -> Iterator[Piece | tuple[int, int]]:
    """Everything in the chain that may hold data, in order: a `Piece` to share, or (first sector, count) to copy.

    A piece is meant for `Layer.copy_in`. `target` is a new image that reads as zeros. Raises IoFailed.
    """
    start = end = 0  # the run to copy that has not been returned yet
    for piece in _joined(_data_pieces(chain, target), target):
        head, size = _whole_pages(piece, target)
        middle = piece.sector_index + whole_sectors(head)
        if end != piece.sector_index:
            if end > start:
                yield start, end - start
            start = piece.sector_index
        if not size:
            end = piece.sector_index + piece.sector_count
            continue
        if middle > start:
            yield start, middle - start
        offset = piece.offset_bytes + head
        yield replace(piece, sector_index=middle, sector_count=whole_sectors(size), offset_bytes=offset, short_bytes=0)
        start, end = middle + whole_sectors(size), piece.sector_index + piece.sector_count
    if end > start:
        yield start, end - start


def _data_pieces(chain: Chain, target: Layer) -> Iterator[Piece]:
    for pieces in plan_merge(chain.layers, target, fresh=True).blocks():
        yield from (piece for piece in pieces if piece.source is not None)


def _joined(pieces: Iterator[Piece], target: Layer) -> Iterator[Piece]:
    """Pieces that follow one another in both files become one, up to a limit and within one block of the target."""
    last: Piece | None = None
    for piece in pieces:
        if last is not None and _follows(last, piece, target):
            count = last.sector_count + piece.sector_count
            last = replace(last, sector_count=count, short_bytes=piece.short_bytes)
            continue
        if last is not None:
            yield last
        last = piece
    if last is not None:
        yield last


def _follows(last: Piece, piece: Piece, target: Layer) -> bool:
    block_sectors = whole_sectors(target.block_size_bytes)
    return (
        last.source is piece.source
        and last.sector_index + last.sector_count == piece.sector_index
        and last.offset_bytes + last.size_bytes == piece.offset_bytes
        and last.size_bytes + piece.size_bytes <= _MAX_SHARED_BYTES
        and not (block_sectors and piece.sector_index % block_sectors == 0)
    )


def _whole_pages(piece: Piece, target: Layer) -> tuple[int, int]:
    """The part of a piece that can be shared: (bytes before it, its size), the size 0 if nothing is worth sharing."""
    place = _place(piece.sector_index, target)
    head = round_up(place, PAGE_SIZE) - place
    size = round_down(place + piece.size_bytes - piece.short_bytes, PAGE_SIZE) - place - head
    if (piece.offset_bytes - place) % PAGE_SIZE or size < MIN_SHARED_BYTES:
        return 0, 0
    return head, size


def _place(sector_index: int, target: Layer) -> int:
    """Where a sector lies in the file of the new image."""
    if not target.block_size_bytes:
        return sectors_to_bytes(sector_index)
    block, within = divmod(sector_index, whole_sectors(target.block_size_bytes))
    return target.block_offset(block) + sectors_to_bytes(within)
