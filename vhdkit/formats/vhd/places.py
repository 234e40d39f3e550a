# SPDX-License-Identifier: Apache-2.0
"""Which bytes of a dynamic or differencing image's file belong to structures other than blocks.

Decides how far the table reaches: as far as the header states, even if the disk needs fewer entries. XenServer
reserves such space for a disk that will grow while it is in use; neither blocks nor holes may be placed there.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from vhdkit.formats.vhd import bitmap, layout
from vhdkit.formats.vhd.bat import Bat
from vhdkit.formats.vhd.metadata import Metadata
from vhdkit.units import SECTOR_SIZE, round_up, sectors_to_bytes


def block_data_end(metadata: Metadata) -> int:
    """Where block data ends in the file: at the trailing footer, or at the end of a file without one."""
    return metadata.tail.offset_bytes if metadata.tail.state.usable else metadata.file_size_bytes


def nominal_end(metadata: Metadata, bat: Bat) -> int:
    """The first byte after every vital structure and every whole block; anything else lies inside the file."""
    assert metadata.header is not None
    end = max((offset + size for _, offset, size in metadata.vital_structures()), default=0)
    used = bat.entries[bat.allocated()]
    if len(used):
        block_size = metadata.header.block_size
        end = max(end, sectors_to_bytes(int(used.max())) + bitmap.bitmap_size(block_size) + block_size)
    return end


def block_starts(bat: Bat) -> NDArray[np.int64]:
    """Offsets of the bitmaps of all allocated blocks, in the order of the disk."""
    starts: NDArray[np.int64] = bat.entries[bat.allocated()].astype(np.int64) * SECTOR_SIZE
    return starts


def table_range(metadata: Metadata, bat: Bat) -> tuple[int, int]:
    """(offset, end) of the table as the header states it, whole sectors.

    Cut at the next block and at the end of the data: a header that states more is wrong.
    """
    assert metadata.header is not None
    start = metadata.header.table_offset
    used = start + metadata.block_count * layout.BAT_ENTRY_SIZE
    stated = round_up(start + metadata.header.max_table_entries * layout.BAT_ENTRY_SIZE, SECTOR_SIZE)
    starts = block_starts(bat)
    behind = starts[starts >= used]
    limits = [block_data_end(metadata), *([int(behind.min())] if len(behind) else [])]
    return start, max(used, min(stated, *limits))


def fixed_ranges(metadata: Metadata, bat: Bat) -> Iterator[tuple[int, int]]:
    """(offset, end) of what is neither a block nor a trailing footer, and does not move with the parent's names."""
    yield 0, layout.FOOTER_SIZE
    yield table_range(metadata, bat)
    for name, offset, size in metadata.structures():
        if name.startswith("batmap"):
            yield offset, offset + size


def structure_ranges(metadata: Metadata, bat: Bat) -> list[tuple[int, int]]:
    """(offset, end) of everything in the file except blocks and the trailing footer."""
    data_end = block_data_end(metadata)
    places = metadata.structures() + metadata.forbidden_to_blocks()
    ranges = [(offset, min(offset + size, data_end)) for _, offset, size in places if offset < data_end]
    return [*ranges, table_range(metadata, bat)]


def end_of_structures(metadata: Metadata, bat: Bat) -> int:
    """The first byte, on a sector boundary, after everything in the image except its trailing footer.

    Unlike `nominal_end`, it includes optional structures: the parent's names may lie after all blocks.
    """
    ends = [end for _, end in structure_ranges(metadata, bat)]
    return round_up(max([nominal_end(metadata, bat), *ends]), SECTOR_SIZE)
