# SPDX-License-Identifier: Apache-2.0
"""What is wrong with one VHDX file, apart from its parents.

Decides what is an error, a warning or a note. Continues after the first error as far as the file can be read.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vhdkit.errors import CorruptImage
from vhdkit.finding import Finding, Severity, finding_of
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.bat import Bat, BlockState
from vhdkit.formats.vhdx.entries import end_of_blocks, faults, places, reserved_bits, whole_sizes
from vhdkit.formats.vhdx.header import HeaderState, exhausted
from vhdkit.formats.vhdx.metadata import Metadata, read_metadata
from vhdkit.formats.vhdx.regions import read_table, table_name, table_state
from vhdkit.formats.vhdx.stray_bits import stray_bits
from vhdkit.store import ReadStore
from vhdkit.units import MIB, format_size

_MAX_LISTED = 16  # findings of one kind, before the rest are only counted


def check_vhdx(store: ReadStore, *, progress: Callable[[int, int], None] | None = None) -> list[Finding]:
    """Everything there is to report about the file. `progress` gets (bytes of the disk examined, all of them).

    Raises IoFailed.
    """
    try:
        metadata = read_metadata(store)
    except CorruptImage as error:
        return [finding_of(error, store.name)]
    bat = Bat.load(metadata.view, metadata.regions.bat.file_offset, metadata.shape)
    errors = [finding_of(error, store.name) for error in faults(metadata, bat)]
    unwritable = [exhausted(store.name, metadata.current), reserved_bits(metadata, bat)]
    errors += [finding_of(error, store.name) for error in unwritable if error is not None]
    found = [*metadata.findings, *errors, *_unexpected_bitmaps(metadata, bat), *_headers_differ(metadata)]
    found += [*_tables_differ(metadata), *_without_log(metadata)]
    if errors:
        return found
    found += [*_unused_space(metadata, bat), *_cut_short(metadata, bat), *_hidden_places(metadata, bat)]
    return found + (_stray_bits(metadata, bat, progress) if metadata.items.has_parent else [])


def _unexpected_bitmaps(metadata: Metadata, bat: Bat) -> list[Finding]:
    """Sector bitmaps in an image without a parent."""
    if metadata.items.has_parent:
        return []
    for numbers, _ in bat.used():
        for number in numbers[numbers % (metadata.shape.ratio + 1) == metadata.shape.ratio][:1].tolist():
            message = "only a differencing image has sector bitmaps: this one is ignored"
            offset = metadata.regions.bat.file_offset + number * layout.BAT_ENTRY_SIZE
            structure = metadata.shape.structure(number)
            return [Finding(Severity.WARNING, "bitmap-unexpected", message, metadata.path, structure, offset)]
    return []


def _headers_differ(metadata: Metadata) -> list[Finding]:
    """The other header is intact, but is not what it should be."""
    other = metadata.headers[1 - metadata.current.slot]
    if other.state is not HeaderState.GOOD:
        return []
    if other.raw == metadata.current.raw:
        code = "headers-equal"
        message = (
            f"both headers have the number {other.header.sequence_number} and are identical, as Disk2VHD leaves them;"
            " some programs require different numbers, which `check --repair` writes"
        )
    elif other.header.data_write_guid != metadata.header.data_write_guid:
        code = "headers-differ"
        message = (
            "its DataWriteGuid differs from that of the current header: children that were made while this header was"
            " current no longer recognise the image"
        )
    else:
        return []
    return [Finding(Severity.NOTE, code, message, metadata.path, other.structure, other.offset_bytes)]


def _tables_differ(metadata: Metadata) -> list[Finding]:
    tables = [read_table(metadata.view, copy) for copy in range(2)]
    if tables[0] == tables[1] or any(table_state(raw) != "good" for raw in tables):
        return []
    message = "differs from region table 1, which is used"
    offset = layout.REGION_TABLE_OFFSETS[1]
    return [Finding(Severity.WARNING, "region-tables-differ", message, metadata.path, table_name(1), offset)]


def _unused_space(metadata: Metadata, bat: Bat) -> list[Finding]:
    """Space of the file that neither blocks nor structures use."""
    numbers, _, _ = places(metadata, bat)
    used = int(whole_sizes(metadata, numbers).sum()) + sum(size for _, _, size in metadata.structures())
    unused = metadata.view.size() - used
    if unused < MIB:
        return []
    message = f"{format_size(unused)} of the file are not used by any block or structure; `vhdkit compact` frees them"
    return [Finding(Severity.NOTE, "space-unused", message, metadata.path)]


def _without_log(metadata: Metadata) -> list[Finding]:
    """The file has no log, so its metadata cannot be changed."""
    if metadata.log[1]:
        return []
    message = "the file has no log, so programs can only read it"
    place = metadata.current
    return [Finding(Severity.WARNING, "log-missing", message, metadata.path, place.structure, place.offset_bytes)]


def _cut_short(metadata: Metadata, bat: Bat) -> list[Finding]:
    """The file ends inside a block, past the end of the disk."""
    missing = end_of_blocks(metadata, bat) - metadata.view.size()
    if missing <= 0:
        return []
    message = f"the last block lacks {missing} bytes past the end of the disk; 7-Zip reports an error for this"
    return [Finding(Severity.WARNING, "block-cut", message, metadata.path, "file", metadata.view.size())]


def _hidden_places(metadata: Metadata, bat: Bat) -> list[Finding]:
    """Entries of blocks that are zeros or not present, but still have an offset in the file."""
    found, count = None, 0
    for numbers, entries in bat.used():
        states = entries & np.uint64(layout.BAT_STATE_MASK)
        is_odd = np.isin(states, (BlockState.NOT_PRESENT, BlockState.ZERO))
        is_odd &= entries & np.uint64(layout.BAT_OFFSET_MASK) != 0
        is_odd &= numbers % (metadata.shape.ratio + 1) != metadata.shape.ratio
        count += int(np.count_nonzero(is_odd))
        if found is None and count:
            found = int(numbers[is_odd][0])
    if found is None:
        return []
    message = (
        f"its state is zero or not present, but it has an offset in the file (number of such entries: {count}): if the"
        " state is damaged, the block's data is at that offset; a repair cannot know"
    )
    offset = metadata.regions.bat.file_offset + found * layout.BAT_ENTRY_SIZE
    structure = metadata.shape.structure(found)
    return [Finding(Severity.NOTE, "block-hidden", message, metadata.path, structure, offset)]


def _bits(count: int) -> str:
    return "1 bit is" if count == 1 else f"{count} bits are"


def _stray_bits(metadata: Metadata, bat: Bat, progress: Callable[[int, int], None] | None) -> list[Finding]:
    """Bits of sector bitmaps that should be clear; only the first few bitmaps are listed."""
    found: list[Finding] = []
    more = 0
    for one in stray_bits(metadata, bat, progress):
        if len(found) >= _MAX_LISTED:
            more += 1
            continue
        structure = f"sector bitmap of chunk {one.chunk_index}"
        if one.past_end:  # Windows sets those of the whole page in which the disk ends
            message = f"{_bits(one.count)} set past the end of the disk, where programs ignore them"
            severity, code = Severity.NOTE, "bits-past-end"
        else:
            message = f"{_bits(one.count)} set for blocks that are not present; some programs read these as data"
            severity, code = Severity.WARNING, "bits-absent"
        found.append(Finding(severity, code, message, metadata.path, structure, one.offset_bytes))
    if more:
        message = f"the same is true of {more} more sector {'bitmap' if more == 1 else 'bitmaps'}"
        found.append(Finding(found[-1].severity, found[-1].code, message, metadata.path))
    return found
