# SPDX-License-Identifier: Apache-2.0
"""The contract that a format implements: its values and the open image; the format itself is `formats.format.Format`.

A `Layer` is one image file by itself: which sectors it owns and where they lie in its file. The chain engine
combines layers; front ends hold a `Disk`, never a layer. `ImageFacts` is the file's metadata, read before it is
opened: its ids, its size and its parent.

The two ids have separate uses: `file_id` decides whether a record or an undo log belongs to this file, `linkage_id` is
what children record about their parent. In a VHD both are the footer's unique id. A file without a `file_id` can only
be identified by its `linkage_id`, as long as it is not written to (`present_id`).

Who checks what: `Disk` checks the range and read-only, and splits off partial sectors. A layer may assume whole
sectors inside its own size (it asserts this), and one writer at a time; `flush` may run beside a writer.
Reads need no lock.

One question: `extents` returns which sectors are data, zeros, or left to the parent. Reading, maps, convert and
check are all built on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from vhdkit.errors import CorruptImage
from vhdkit.finding import Finding
from vhdkit.store import ReadStore, Store
from vhdkit.units import SECTOR_SIZE, sectors_to_bytes

ID_BYTES = 16  # of every id: the size of an id's field in records beside an image
ZEROS_WITHOUT_SPACE = -2  # the offset of a block that is owned whole, as zeros: see `Layer.block_offset`
NULL_ID = bytes(ID_BYTES)  # in records, the id of an image without one (a raw disk)


class ExtentKind(StrEnum):
    """The kinds of runs of sectors."""

    DATA = "data"  # bytes in the layer's file
    ZERO = "zero"  # zeros that this layer owns, or that no layer can own
    ABSENT = "absent"  # not owned by this layer: ask its parent


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


class KnownRun(NamedTuple):
    """A part of a disk that is certainly zeros, which no layer owns (`is_hole`), or may be anything."""

    offset_bytes: int
    size_bytes: int
    is_hole: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of sectors to take over from another file: from `offset_bytes` of `source`, or zeros without one.

    The last `short_bytes` of it lie past the end of that file (a raw image may end inside a sector) and are zeros.
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


class NameDialect(StrEnum):
    """How the text of a parent's name is interpreted."""

    PATH = "path"  # a path from the child's folder, or an absolute one; both kinds of slash separate
    NAME = "name"  # a file name alone, which programs do not follow


@dataclass(frozen=True, slots=True)
class ParentName:
    """One of the names that a child records for its parent; `structure` is where it is stored, for messages."""

    structure: str
    text: str
    dialect: NameDialect = NameDialect.PATH


@dataclass(frozen=True, slots=True)
class ParentRef:
    """What a child records about its parent: the accepted ids, and the names in the order in which they are tried.

    Without ids the parent is a raw disk, which has none. `timestamp` counts from the format's own epoch, 0 if it is
    unknown. `is_whole` is False if some of the names cannot be read.
    """

    linkage_ids: tuple[bytes, ...]
    timestamp: int
    names: tuple[ParentName, ...]
    is_whole: bool = True

    @property
    def raw_allowed(self) -> bool:
        """True when any raw file may be the parent, because no id is recorded."""
        return not self.linkage_ids

    @property
    def linkage_id(self) -> bytes:
        """The id by which the parent is searched and named in messages and records; `NULL_ID` for a raw parent."""
        return self.linkage_ids[0] if self.linkage_ids else NULL_ID

    @classmethod
    def of_paths(cls, linkage_id: bytes, timestamp: int, *, relative: str, absolute: str, name: str) -> ParentRef:
        """What a new child records; the paths are Windows paths. `NULL_ID` stands for a raw parent."""
        names = (
            ParentName("relative path", relative),
            ParentName("absolute path", absolute),
            ParentName("name", name, NameDialect.NAME),
        )
        return cls(() if linkage_id == NULL_ID else (linkage_id,), timestamp, names)


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """The metadata of an image file. Sizes in bytes; ids and time stamp are None if it has none.

    `kind` is a word such as "dynamic", `title` the same for display ("dynamic VHD"). `made_size_bytes` is the
    virtual size that it had when it was made, or the present one if that is not recorded. `block_size_bytes` is 0 for
    an image whose sectors are contiguous.
    """

    path: str
    format_name: str
    kind: str
    title: str
    size_bytes: int
    made_size_bytes: int
    block_size_bytes: int = 0
    sector_bytes: int = SECTOR_SIZE
    file_id: bytes | None = None
    linkage_id: bytes | None = None
    timestamp: int | None = None
    parent: ParentRef | None = None
    findings: tuple[Finding, ...] = ()
    physical_sector_bytes: int = SECTOR_SIZE

    @property
    def present_id(self) -> bytes:
        """The id that identifies the file as it is now; `NULL_ID` without one. It may change when it is written to."""
        return self.file_id or self.linkage_id or NULL_ID


class Layer(Protocol):
    """One open image file. Sizes in bytes, positions in sectors of `units.SECTOR_SIZE`."""

    @property
    def store(self) -> Store:
        """The bytes of the file."""
        ...

    @property
    def format_name(self) -> str:
        """The name of its format; `formats.of` gives the format itself."""
        ...

    @property
    def facts(self) -> ImageFacts:
        """The file's metadata when it was opened."""
        ...

    @property
    def findings(self) -> list[Finding]:
        """The findings from opening it; the chain adds those about the parent."""
        ...

    @property
    def damage(self) -> CorruptImage | None:
        """Why the image can be read but not written to; None if it is intact."""
        ...

    @property
    def ignore_bitmaps(self) -> bool:
        """Whether sectors under clear bits of a dynamic image are read as data."""
        ...

    @property
    def sector_bytes(self) -> int:
        """The unit in which the layer is written, a power of two from `units.SECTOR_SIZE`."""
        ...

    @property
    def unique_id(self) -> bytes | None:
        """The linkage id, by which children identify the image; None for a format without one (raw)."""
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
        """What a sector is that the layer does not own: ZERO (a dynamic disk) or ABSENT (a differencing one)."""
        ...

    def allocated_blocks(self) -> NDArray[np.bool_]:
        """One boolean per block: True if it has space in the file. Empty for a linear layer."""
        ...

    def block_offset(self, block_index: int) -> int:
        """Store offset of the block's first data byte; -1 when the block is not allocated, -2 when it is owned whole,
        as zeros that take no space.
        """
        ...

    def zero_blocks(self) -> NDArray[np.bool_]:
        """One boolean per block: True if it is owned whole, as zeros that take no space. Empty where none can be."""
        ...

    def owned_sectors(self, block_index: int) -> NDArray[np.bool_] | None:
        """One boolean per sector of an allocated block, or None if it owns every sector that belongs to the disk."""
        ...

    def prefetch_ownership(self, block_index: int) -> None:
        """Ask for what `block_offset` and `owned_sectors` of that block will read from the file. Never waits."""
        ...

    def extents(self, sector_index: int, sector_count: int) -> Iterator[Extent]:
        """The range as runs, in order, without gaps, for this layer alone (`layer_index` 0)."""
        ...

    def write(self, sector_index: int, data: memoryview) -> bool:
        """Store whole sectors. True when the layer owns more than before."""
        ...

    def write_in_place(self, store_offset_bytes: int, data: memoryview) -> None:
        """Overwrite sectors that the layer owns at that place: only their data changes."""
        ...

    def write_zeroes(self, sector_index: int, sector_count: int) -> bool:
        """Own the range, as zeros. True when the layer owns more than before."""
        ...

    def copy_in(self, pieces: Sequence[Piece]) -> None:
        """Own the pieces' sectors with their content, moved as a whole; for merges, while no program reads this layer.

        Pieces are in order, do not overlap, and lie within one block (in a linear layer anywhere).
        """
        ...

    def trim(self, sector_index: int, sector_count: int) -> None:
        """Release space: sectors the layer owns read as zeros afterwards, the others are left as they are."""
        ...

    def refuse_writing(self) -> None:
        """Refuse every write and flush from now on: a write might be lost at the next open."""
        ...

    def pin_blocks(self) -> None:
        """Move no block from now on: an open chain reads the blocks at their present places."""
        ...

    @property
    def table_bytes(self) -> int:
        """The memory that the tables of a read-only image take; 0 if `leave_table` would free nothing."""
        ...

    def leave_table(self) -> None:
        """Read the tables from the file, entry by entry, from now on."""
        ...

    def seal(self) -> None:
        """Flush so that nothing is left in memory and the file is complete, as after `close`. Raises as `flush`."""
        ...

    def flush_is_due(self) -> bool:
        """True when so much metadata awaits a flush that a write may soon have to flush."""
        ...

    def flush(self) -> None:
        """Return when every completed write is on the device. Raises SyncFailed, and after that on every call."""
        ...

    def close(self) -> None:
        """Flush what was written, then close the file."""
        ...


def copy_piece(piece: Piece, store: Store, offset_bytes: int) -> None:
    """Copy the content of a piece that has a source to that offset in `store`. Raises NoSpace, IoFailed."""
    assert piece.source is not None
    size = piece.size_bytes - piece.short_bytes
    store.copy_from(piece.source, piece.offset_bytes, offset_bytes, size)
    if piece.short_bytes:
        store.pwrite(offset_bytes + size, bytes(piece.short_bytes))


def read_extents(store: ReadStore, extents: Iterable[Extent], buffer: memoryview) -> None:
    """Fill `buffer` from one layer's extents; sectors that the layer does not own become zeros."""
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
    """Join adjacent extents that form one run: same kind, same layer, and for data contiguous in the file."""
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
