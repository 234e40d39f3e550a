# SPDX-License-Identifier: Apache-2.0
"""The contract that a format implements.

A `Layer` is one image file by itself: which sectors it owns and where they lie in its file. The chain engine
folds layers together; front ends never hold one (they hold a `Disk`).

Who checks what: `Disk` checks the range and read-only, and splits off part sectors. A layer may assume whole
sectors inside its own size (it asserts this), and one writer at a time; `flush` may run beside a writer.
Reads need no lock.

One question: `extents` says which sectors are data, zeros, or left to the parent. Reading, maps, convert and
check are all built on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vhdkit.store import ReadStore, Store
from vhdkit.units import sectors_to_bytes


class ExtentKind(StrEnum):
    """What a run of sectors is."""

    DATA = "data"  # bytes in the layer's file
    ZERO = "zero"  # zeros, by this layer's word
    ABSENT = "absent"  # the layer says nothing: ask its parent


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of sectors of one kind.

    `layer_index` counts from the leaf (0); -1 if no layer of the chain owns the run.
    `store_offset_bytes` is where a DATA run begins in that layer's file, else None.
    """

    sector_index: int
    sector_count: int
    kind: ExtentKind
    layer_index: int = 0
    store_offset_bytes: int | None = None

    @property
    def end_sector(self) -> int:
        """The first sector after the run."""
        return self.sector_index + self.sector_count

    @property
    def offset_bytes(self) -> int:
        """Where the run begins on the disk."""
        return sectors_to_bytes(self.sector_index)

    @property
    def size_bytes(self) -> int:
        """How long the run is."""
        return sectors_to_bytes(self.sector_count)


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of sectors to take over from another file: from `offset_bytes` of `source`, or zeros without one.

    The last `short_bytes` of it lie behind the end of that file (a raw image may end inside a sector): zeros too.
    """

    sector_index: int
    sector_count: int
    source: ReadStore | None = None
    offset_bytes: int = 0
    short_bytes: int = 0

    @property
    def size_bytes(self) -> int:
        """How long the run is."""
        return sectors_to_bytes(self.sector_count)


class Layer(Protocol):
    """One open image file. Sizes in bytes, positions in sectors of `units.SECTOR_SIZE`."""

    @property
    def store(self) -> Store:
        """The bytes of the file."""
        ...

    @property
    def unique_id(self) -> bytes | None:
        """The id that children know the image by; None for one without (raw)."""
        ...

    @property
    def size_bytes(self) -> int:
        """The virtual size, a whole number of sectors."""
        ...

    @property
    def writable(self) -> bool:
        """Whether it was opened for writing."""
        ...

    @property
    def block_size_bytes(self) -> int:
        """The unit of allocation, a power of two; 0 for a linear layer, which owns every sector."""
        ...

    @property
    def data_end_bytes(self) -> int:
        """Store offset from which an owned sector reads as zeros (a last block cut off by the end of the file)."""
        ...

    @property
    def unowned(self) -> ExtentKind:
        """What a sector the layer does not own is: ZERO (a dynamic disk) or ABSENT (a differencing one)."""
        ...

    def allocated_blocks(self) -> NDArray[np.bool_]:
        """One truth value per block: has it space in the file? Empty for a linear layer."""
        ...

    def block_offset(self, block_index: int) -> int:
        """Store offset of the block's first data byte; -1 when the block is not allocated."""
        ...

    def owned_sectors(self, block_index: int) -> NDArray[np.bool_] | None:
        """One truth value per sector of an allocated block, or None when it owns all that are of the disk."""
        ...

    def extents(self, sector_index: int, sector_count: int) -> Iterator[Extent]:
        """The range as runs, in order, without gaps, for this layer alone (`layer_index` 0)."""
        ...

    def write(self, sector_index: int, data: memoryview) -> bool:
        """Store whole sectors. True when the layer owns more than before."""
        ...

    def write_in_place(self, store_offset_bytes: int, data: memoryview) -> None:
        """Overwrite sectors that the layer owns and that lie there: nothing but their data changes."""
        ...

    def write_zeroes(self, sector_index: int, sector_count: int) -> bool:
        """Own the range, as zeros. True when the layer owns more than before."""
        ...

    def copy_in(self, pieces: Sequence[Piece]) -> None:
        """Own the pieces' sectors with their content, moved as a whole; for merges, while nobody reads this layer.

        Pieces are in order, do not overlap, and lie within one block (in a linear layer anywhere).
        """
        ...

    def trim(self, sector_index: int, sector_count: int) -> None:
        """Give space back: sectors the layer owns read as zeros afterwards, the others are left as they are."""
        ...

    def flush_is_due(self) -> bool:
        """True when so much metadata waits for a flush that a write may soon have to do one itself."""
        ...

    def flush(self) -> None:
        """Return when every completed write is on the device. Raises SyncFailed once, and ever after."""
        ...

    def close(self) -> None:
        """Flush what was written, then let go of the file."""
        ...


def copy_piece(piece: Piece, store: Store, offset_bytes: int) -> None:
    """Put the content of a piece that has a source there in `store`. Raises NoSpace, IoFailed."""
    assert piece.source is not None
    size = piece.size_bytes - piece.short_bytes
    store.copy_from(piece.source, piece.offset_bytes, offset_bytes, size)
    if piece.short_bytes:
        store.pwrite(offset_bytes + size, bytes(piece.short_bytes))


def read_extents(store: ReadStore, extents: Iterable[Extent], buffer: memoryview) -> None:
    """Fill `buffer` from one layer's extents; what the layer does not own is zeros."""
    position = 0
    for extent in extents:
        size_bytes = sectors_to_bytes(extent.sector_count)
        piece = buffer[position : position + size_bytes]
        if extent.store_offset_bytes is None:
            piece[:] = bytes(size_bytes)
        else:
            store.pread_into(extent.store_offset_bytes, piece)
        position += size_bytes
    assert position == len(buffer), (position, len(buffer))


def merged_extents(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Join neighbours that are one run: same answer, same layer, and for data one piece of the file."""
    last: Extent | None = None
    for extent in extents:
        if last is None:
            last = extent
            continue
        follows = last.store_offset_bytes is None or (
            last.store_offset_bytes + sectors_to_bytes(last.sector_count) == extent.store_offset_bytes
        )
        if (last.kind, last.layer_index) == (extent.kind, extent.layer_index) and follows:
            last = Extent(
                last.sector_index,
                last.sector_count + extent.sector_count,
                last.kind,
                last.layer_index,
                last.store_offset_bytes,
            )
        else:
            yield last
            last = extent
    if last is not None:
        yield last
