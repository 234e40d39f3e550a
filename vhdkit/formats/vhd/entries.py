# SPDX-License-Identifier: Apache-2.0
"""Which entries of a BAT are impossible: blocks outside the file, over headers, or over each other.

Decides what is wrong with a table as a whole, and how an impossible entry is reported. Must not know what is in the
blocks, nor how they are repaired.

`INV-BLOCKS-DISJOINT`: blocks overlap neither each other nor headers. Blocks that overlap each other can be read, and
are refused for writing only.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from vhdkit.errors import CorruptImage, CorruptReason
from vhdkit.formats.vhd import bitmap
from vhdkit.formats.vhd.bat import Bat
from vhdkit.formats.vhd.layout import BAT_ENTRY_SIZE
from vhdkit.formats.vhd.metadata import Metadata
from vhdkit.formats.vhd.places import block_data_end
from vhdkit.units import SECTOR_SIZE, sectors_to_bytes


def used_sizes(metadata: Metadata) -> tuple[int, int]:
    """Bytes in the file, bitmap included, of a block and of the last one, which may reach past the disk's end."""
    assert metadata.header is not None
    block_size = metadata.header.block_size
    bitmap_bytes = bitmap.bitmap_size(block_size)
    last = metadata.size_bytes - (metadata.block_count - 1) * block_size
    return bitmap_bytes + block_size, bitmap_bytes + last


def check_blocks(metadata: Metadata, bat: Bat) -> CorruptImage | None:
    """Refuse BAT entries outside the file or over metadata (`INV-BLOCKS-DISJOINT`).

    Overlapping blocks can both be read, but a write to one would change the other: the error for those is returned,
    and raised by a caller that opens the image for writing.
    """
    for reason, blocks in bad_entries(metadata, bat):
        if len(blocks):
            error = entry_error(metadata, bat, reason, int(blocks[0]))
            if reason is CorruptReason.BLOCKS_OVERLAP:
                return error
            raise error
    return None


def bad_entries(metadata: Metadata, bat: Bat) -> Iterator[tuple[CorruptReason, NDArray[np.intp]]]:
    """What is wrong with the table's entries: each reason with its blocks, the worst kind first.

    Arrays, not errors: a hostile table of 16 MiB has four million bad entries. A sound table of a million blocks
    costs a few vectorised passes, milliseconds.
    """
    used = bat.entries[bat.allocated()]
    if not len(used):
        return
    assert metadata.header is not None
    whole, last = used_sizes(metadata)
    highest = max(block_data_end(metadata) - bitmap.bitmap_size(metadata.header.block_size), 0) // SECTOR_SIZE
    yield CorruptReason.BLOCK_OUTSIDE_FILE, np.flatnonzero(bat.allocated() & (bat.entries > highest))
    if sectors_to_bytes(int(used.min())) < metadata_end(metadata):
        starts = bat.entries.astype(np.int64) * SECTOR_SIZE
        ends = starts + whole
        ends[-1] = starts[-1] + last
        over = np.zeros(len(bat), dtype=np.bool_)
        for _, offset, size in metadata.forbidden_to_blocks():
            over |= (starts < offset + size) & (ends > offset)
        yield CorruptReason.BLOCK_OVER_METADATA, np.flatnonzero(bat.allocated() & over)
    yield CorruptReason.BLOCKS_OVERLAP, np.flatnonzero(_overlapping(bat, whole, last))


def metadata_end(metadata: Metadata) -> int:
    """The first byte after every structure that is not a block."""
    return max(offset + size for _, offset, size in metadata.forbidden_to_blocks())


def _overlapping(bat: Bat, whole: int, last: int) -> NDArray[np.bool_]:
    """The blocks that begin inside another one."""
    used = np.sort(bat.entries[bat.allocated()])
    gaps = used[1:] - used[:-1]
    close = np.flatnonzero(gaps < whole // SECTOR_SIZE)
    if not len(close):
        return np.zeros(len(bat), dtype=np.bool_)
    # Only a block that reaches past the end of the disk may take less space than a whole one.
    final = bat.block_start(len(bat) - 1) // SECTOR_SIZE
    close = close[~((used[close] == final) & (gaps[close] >= last // SECTOR_SIZE))]
    return bat.allocated() & np.isin(bat.entries, used[close + 1])


_PROBLEMS = {
    CorruptReason.BLOCK_OUTSIDE_FILE: "points past the end of the file",
    CorruptReason.BLOCK_OVER_METADATA: "points into the image's own headers",
    CorruptReason.BLOCKS_OVERLAP: "points into another block",
}


_OVERLAP_HINT = "it can be read; `vhdkit check --repair` separates the blocks, then it can also be written to"


def entry_error(metadata: Metadata, bat: Bat, reason: CorruptReason, block_index: int) -> CorruptImage:
    """The error for one bad entry, naming its place in the table."""
    return CorruptImage(
        reason,
        _PROBLEMS[reason],
        path=metadata.path,
        structure=f"BAT entry {block_index}",
        offset_bytes=bat.table_offset_bytes + block_index * BAT_ENTRY_SIZE,
        found=f"block at byte {bat.block_start(block_index):#x} of a file of {metadata.file_size_bytes} bytes",
        hint=_OVERLAP_HINT if reason is CorruptReason.BLOCKS_OVERLAP else "`vhdkit check` lists all problems",
    )
