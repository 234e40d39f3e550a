# SPDX-License-Identifier: Apache-2.0
"""What filling an image from its parents moves: for each of its blocks, the sectors that it lacks.

Decides which sectors the image must own so that it reads the same without the layers that it is filled from. What a
sector holds is decided as for a merge of these layers into the image (`merge_plan`), except that the sectors that the
image owns stay as they are: they hide the others.

    layers below     a sector that none of the pulled layers owns shows them, and stays as it is; zeros in a pulled
                     layer hide them, so the image owns these zeros
    nothing below    every block that has space ends owned as a whole, the rest of it as zeros, because some programs
                     ignore the bitmaps of an image without a parent; zeros in a block without space need none

A sector that the image takes over reads as before, from the moment at which it is owned, and before. So filling an
image needs no record: it can be interrupted anywhere, and repeating it skips what is owned by then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vhdkit.chain.verbs.merge_plan import MergePlan, plan_merge
from vhdkit.formats.bits import runs
from vhdkit.image import ZEROS_WITHOUT_SPACE, Layer, Piece
from vhdkit.units import sectors_to_bytes, whole_sectors


@dataclass(frozen=True, slots=True, eq=False)
class PullPlan:
    """The blocks of `image`, `units`, that may lack something; see `Moves`.

    The image is examined when the pieces of a block are asked for, so it may be open for writing and take them
    meanwhile. `is_last` is True if nothing is left below the pulled layers.
    """

    image: Layer
    merging: MergePlan
    units: NDArray[np.int64]
    is_last: bool

    @property
    def sources(self) -> tuple[Layer, ...]:
        """The pulled layers, the topmost first."""
        return self.merging.sources

    @property
    def unit_bytes(self) -> int:
        """The size of the image's blocks."""
        return self.merging.unit_bytes

    @property
    def touched_bytes(self) -> int:
        """Bytes of all the blocks that will be examined: the total for progress."""
        return len(self.units) * self.unit_bytes

    def blocks(self) -> Iterator[list[Piece]]:
        """The pieces that each block lacks, block after block. Raises IoFailed."""
        return map(self.pieces_of, self.units.tolist())

    def parts(self, size_bytes: int) -> Iterator[PullPlan]:
        """The same in parts of about that many bytes of the disk, in order."""
        step = max(size_bytes // self.unit_bytes, 1)
        for first in range(0, len(self.units), step):
            yield replace(self, units=self.units[first : first + step])

    def pieces_of(self, block: int) -> list[Piece]:
        """What one block lacks, in order. Raises IoFailed."""
        offset = self.image.block_offset(block)
        owned = self.image.owned_sectors(block) if offset >= 0 else None
        if offset == ZEROS_WITHOUT_SPACE or (offset >= 0 and owned is None):
            return []
        pieces = self.merging.pieces_of(block)
        first, per_block = block * whole_sectors(self.unit_bytes), whole_sectors(self.unit_bytes)
        count = min(per_block, whole_sectors(self.image.size_bytes) - first)
        if self.is_last:
            if offset < 0 and all(piece.source is None for piece in pieces):
                return []
            pieces = list(_with_zeros_between(pieces, first, first + count))
        return pieces if owned is None else list(_without(pieces, first, owned))

    def is_done(self) -> bool:
        """Whether the image lacks nothing. Raises IoFailed."""
        return not any(self.blocks())


def plan_pull(image: Layer, pulled: Sequence[Layer], below: Sequence[Layer]) -> PullPlan:
    """The plan for filling `image` from `pulled`, the layers under it, the topmost first; `below` are the others.

    Reads tables and looks for holes. A pulled layer whose blocks overlap is copied as it reads.
    """
    below_bytes = below[0].size_bytes if below else 0
    merging = plan_merge(pulled, image, below_bytes=below_bytes, seen_bytes=image.size_bytes)
    wanted = np.zeros(-(-image.size_bytes // image.block_size_bytes), dtype=np.bool_)
    wanted[merging.units] = True
    if not below:
        wanted |= image.allocated_blocks()[: len(wanted)]
    return PullPlan(image, merging, np.flatnonzero(wanted).astype(np.int64), not below)


def _with_zeros_between(pieces: Sequence[Piece], first: int, end: int) -> Iterator[Piece]:
    """The pieces, and zeros where there are none from sector `first` to `end`."""
    for piece in pieces:
        if piece.sector_index > first:
            yield Piece(first, piece.sector_index - first)
        yield piece
        first = piece.sector_index + piece.sector_count
    if end > first:
        yield Piece(first, end - first)


def _without(pieces: Sequence[Piece], first: int, owned: NDArray[np.bool_]) -> Iterator[Piece]:
    """The parts of the pieces outside the sectors that are owned; `owned` begins at sector `first`."""
    for piece in pieces:
        low = piece.sector_index - first
        for start, count, is_owned in runs(owned[low : low + piece.sector_count]):
            if not is_owned:
                yield _part(piece, start, count)


def _part(piece: Piece, start: int, count: int) -> Piece:
    """`count` sectors of a piece, from its sector `start` on."""
    after = piece.size_bytes - sectors_to_bytes(start + count)  # what is left out behind it
    return replace(
        piece,
        sector_index=piece.sector_index + start,
        sector_count=count,
        offset_bytes=piece.offset_bytes + sectors_to_bytes(start) if piece.source is not None else 0,
        short_bytes=min(max(piece.short_bytes - after, 0), sectors_to_bytes(count)),
    )
