# SPDX-License-Identifier: Apache-2.0
"""Which entries of a BAT are impossible.

Decides which states and places are impossible, and which of these prevent reading. Must not know what the blocks hold.

Source: [MS-VHDX] 2.5.1; blocks in states 1 to 3 may keep an offset, of trimmed space.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vhdkit.errors import CUT_SHORT_HINT, CorruptImage, CorruptReason
from vhdkit.formats.spans import covered, touches
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.bat import Bat, BlockState, Shape
from vhdkit.formats.vhdx.metadata import Metadata
from vhdkit.formats.vhdx.sound import is_sound

_STATE = np.uint64(layout.BAT_STATE_MASK)
_OFFSET = np.uint64(layout.BAT_OFFSET_MASK)
_RESERVED = np.uint64(layout.BAT_RESERVED_MASK)


def read_bat(metadata: Metadata) -> Bat:
    """The table, after checking that the image can be read with it. Raises CorruptImage, IoFailed."""
    bat = Bat.load(metadata.view, metadata.regions.bat.file_offset, metadata.shape)
    if not is_sound(metadata, bat):
        for fault in faults(metadata, bat):
            raise fault
    return bat


def faults(metadata: Metadata, bat: Bat) -> Iterator[CorruptImage]:
    """Errors for the entries that prevent reading; at most one of a kind for each part of the table."""
    for numbers, entries in bat.used():
        yield from _state_faults(metadata, bat, numbers, entries)
        yield from _place_faults(metadata, numbers, entries)
    yield from _overlaps(metadata, bat)
    yield from _logged_data(metadata, bat)


def reserved_bits(metadata: Metadata, bat: Bat) -> CorruptImage | None:
    """The first entry with bits that must be zero: other programs refuse it, and the image is not written to."""
    if not bat.has_bits(layout.BAT_RESERVED_MASK):
        return None
    for numbers, entries in bat.used():
        for place in np.flatnonzero(entries & _RESERVED)[:1].tolist():
            number, entry = int(numbers[place]), int(entries[place])
            return _fault(metadata, number, CorruptReason.BAT_RESERVED, "reserved bits are set", found=f"{entry:#x}")
    return None


def _fault(metadata: Metadata, number: int, reason: CorruptReason, problem: str, **values: Any) -> CorruptImage:
    return CorruptImage(
        reason,
        problem,
        path=metadata.path,
        structure=metadata.shape.structure(number),
        offset_bytes=metadata.regions.bat.file_offset + number * layout.BAT_ENTRY_SIZE,
        **values,
    )


def _is_bitmap(metadata: Metadata, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
    shape = metadata.shape
    return np.asarray(numbers % (shape.ratio + 1) == shape.ratio)


def _is_stored(metadata: Metadata, numbers: NDArray[np.int64], states: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether an entry refers to bytes of the file that are in use; bitmaps are not, in an image without a parent."""
    stored = states >= BlockState.FULLY_PRESENT
    return stored if metadata.items.has_parent else stored & ~_is_bitmap(metadata, numbers)


def _state_faults(
    metadata: Metadata, bat: Bat, numbers: NDArray[np.int64], entries: NDArray[np.uint64]
) -> Iterator[CorruptImage]:
    states, is_bitmap = entries & _STATE, _is_bitmap(metadata, numbers)
    is_block = ~is_bitmap & (_blocks(metadata, numbers) < metadata.shape.block_count)
    impossible = is_block & ((states == 4) | (states == 5))
    if metadata.items.has_parent:
        impossible |= is_bitmap & (states != BlockState.NOT_PRESENT) & (states != BlockState.FULLY_PRESENT)
    else:
        impossible |= is_block & (states == BlockState.PARTIALLY_PRESENT)
    for place in np.flatnonzero(impossible)[:1].tolist():
        problem = "impossible state"
        yield _fault(metadata, int(numbers[place]), CorruptReason.BLOCK_STATE, problem, found=int(states[place]))
    if not metadata.items.has_parent:
        return
    partial = numbers[is_block & (states == BlockState.PARTIALLY_PRESENT)]
    chunks = np.bincount(partial // (metadata.shape.ratio + 1))  # `np.unique` loads a slow part of numpy
    for chunk in np.flatnonzero(chunks).tolist():
        if bat.bitmap_offset(chunk) < 0:
            number = int(partial[partial // (metadata.shape.ratio + 1) == chunk][0])
            problem = f"is partially present, but the sector bitmap of chunk {chunk} is missing"
            yield _fault(metadata, number, CorruptReason.BITMAP_MISSING, problem)
            return


def _blocks(metadata: Metadata, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    chunks, within = np.divmod(numbers, metadata.shape.ratio + 1)
    return np.asarray(chunks * metadata.shape.ratio + within)


def whole_sizes(metadata: Metadata, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many bytes belong to each entry's block, even if the disk or the file ends inside it."""
    return np.where(_is_bitmap(metadata, numbers), layout.BITMAP_BLOCK_SIZE, metadata.items.block_size)


def sizes_in_file(metadata: Metadata, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many bytes of each entry's block must be in the file: of the last block, those inside the disk."""
    shape, block_size = metadata.shape, metadata.items.block_size
    sizes = whole_sizes(metadata, numbers)
    last = shape.block_entry(shape.block_count - 1)
    sizes[numbers == last] = metadata.items.size_bytes - (shape.block_count - 1) * block_size
    return np.asarray(sizes)


def _place_faults(
    metadata: Metadata, numbers: NDArray[np.int64], entries: NDArray[np.uint64]
) -> Iterator[CorruptImage]:
    stored = _is_stored(metadata, numbers, entries & _STATE)
    used = numbers[stored]
    offsets = (entries[stored] & _OFFSET).astype(np.int64)  # below 2^63 only where possible: see the next line
    outside = (offsets < layout.HEADER_SECTION_SIZE) | (offsets > layout.MAX_FILE_BYTES)
    outside |= offsets + sizes_in_file(metadata, used) > metadata.view.size()
    for place in np.flatnonzero(outside)[:1].tolist():
        low = 0 <= int(offsets[place]) < layout.HEADER_SECTION_SIZE
        yield _fault(
            metadata,
            int(used[place]),
            CorruptReason.BLOCK_OVER_METADATA if low else CorruptReason.BLOCK_OUTSIDE_FILE,
            "lies over the headers" if low else "does not lie inside the file",
            found=f"byte {int(entries[stored][place] & _OFFSET):#x} of {metadata.view.size()}",
            hint=None if low else CUT_SHORT_HINT,
        )


def places(metadata: Metadata, bat: Bat) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(entry numbers, offsets, sizes in the file) of all blocks and sector bitmaps in use, in order of offset."""
    parts = [(numbers, entries) for numbers, entries in bat.used()]
    if not parts:
        empty = np.zeros(0, dtype=np.int64)
        return empty, empty, empty
    numbers, entries = (np.concatenate(column) for column in zip(*parts, strict=True))
    stored = _is_stored(metadata, numbers, entries & _STATE)
    numbers, offsets = numbers[stored], (entries[stored] & _OFFSET).astype(np.int64)
    if len(offsets) > 1 and (offsets[1:] < offsets[:-1]).any():
        order = np.argsort(offsets, kind="stable")
        numbers, offsets = numbers[order], offsets[order]
    return numbers, offsets, sizes_in_file(metadata, numbers)


def end_of_structures(metadata: Metadata, bat: Bat) -> int:
    """Where the last block or structure ends, in bytes; the file may end earlier, inside its last block."""
    return max([end_of_blocks(metadata, bat), *(start + size for _, start, size in metadata.structures())])


def end_of_blocks(metadata: Metadata, bat: Bat) -> int:
    """Where the last block ends, in bytes; 0 without blocks."""
    numbers, offsets, _ = places(metadata, bat)
    return int((offsets + whole_sizes(metadata, numbers)).max()) if len(offsets) else 0


def _overlaps(metadata: Metadata, bat: Bat) -> Iterator[CorruptImage]:
    """Blocks that overlap each other or other structures."""
    numbers, offsets, sizes = places(metadata, bat)
    for place in np.flatnonzero(offsets[1:] < offsets[:-1] + sizes[:-1])[:1].tolist():
        lower = metadata.shape.structure(int(numbers[place]))
        problem = f"lies over the block of {lower}"
        found = f"byte {int(offsets[place + 1]):#x}"
        yield _fault(metadata, int(numbers[place + 1]), CorruptReason.BLOCKS_OVERLAP, problem, found=found)
    for name, start, size in metadata.structures():
        for place in range(*_between(offsets, sizes, start, start + size)):
            yield _fault(
                metadata,
                int(numbers[place]),
                CorruptReason.BLOCK_OVER_METADATA,
                f"lies over the {name}",
                found=f"byte {int(offsets[place]):#x}",
            )
            break


def _between(offsets: NDArray[np.int64], sizes: NDArray[np.int64], start: int, stop: int) -> tuple[int, int]:
    """(first, stop) of the positions, in order of offset, whose blocks share bytes with a range."""
    last = int(np.searchsorted(offsets, stop))
    first = int(np.searchsorted(offsets, start))
    if first and offsets[first - 1] + sizes[first - 1] > start:
        first -= 1
    return first, last


def _logged_data(metadata: Metadata, bat: Bat) -> Iterator[CorruptImage]:
    """A log that was not replayed and would change a guest's data, which programs never log."""
    if metadata.replay is None:
        return
    numbers, offsets, sizes = places(metadata, bat)
    is_block = ~_is_bitmap(metadata, numbers)
    numbers, offsets, sizes = numbers[is_block], offsets[is_block], sizes[is_block]
    for one in metadata.replay.changes:
        first, last = _between(offsets, sizes, one.file_offset_bytes, one.end_bytes)
        if first < last:
            block = metadata.shape.structure(int(numbers[first]))
            yield CorruptImage(
                CorruptReason.LOG_OVER_DATA,
                f"changes byte {one.file_offset_bytes:#x}, in the data of {block}",
                path=metadata.path,
                structure="log",
                offset_bytes=metadata.log[0],
            )
            return


def changes_data(metadata: Metadata, bat: Bat) -> bool:
    """Whether the log changes a guest's data. Blocks that overlap structures or bitmaps do not count."""
    assert metadata.replay is not None
    numbers, offsets, sizes = places(metadata, bat)
    is_block = ~_is_bitmap(metadata, numbers)
    others = [(start, start + size) for _, start, size in metadata.structures()]
    others += zip(offsets[~is_block].tolist(), (offsets + sizes)[~is_block].tolist(), strict=True)
    edges = np.array(others, dtype=np.int64)
    metadata_spans = covered(edges[:, 0], edges[:, 1], 1)
    starts, ends = offsets[is_block], (offsets + sizes)[is_block]
    apart = ~touches(metadata_spans, starts, ends) & (starts >= 0) & (starts <= layout.MAX_FILE_BYTES)
    blocks = covered(starts[apart], ends[apart], 1)
    changes = metadata.replay.changes
    changed = np.array([(one.file_offset_bytes, one.end_bytes) for one in changes], dtype=np.int64).reshape(-1, 2)
    return bool(touches(blocks, changed[:, 0], changed[:, 1]).any())


def gaps(metadata: Metadata, bat: Bat) -> Iterator[tuple[int, int]]:
    """(offset, size) of the parts of the file to which no structure, block or entry refers, whatever its state."""
    starts, ends = [start for _, start, _ in metadata.structures()], []
    ends += [start + size for _, start, size in metadata.structures()]
    parts = [(numbers, entries & _OFFSET) for numbers, entries in bat.used()]
    numbers = np.concatenate([np.zeros(0, dtype=np.int64), *(numbers for numbers, _ in parts)])
    offsets = np.concatenate([np.zeros(0, dtype=np.uint64), *(offsets for _, offsets in parts)]).astype(np.int64)
    named = (offsets >= layout.HEADER_SECTION_SIZE) & (offsets <= layout.MAX_FILE_BYTES)
    numbers, offsets = numbers[named], offsets[named]
    all_starts = np.concatenate([np.array(starts, dtype=np.int64), offsets])
    all_ends = np.concatenate([np.array(ends, dtype=np.int64), offsets + whole_sizes(metadata, numbers)])
    taken = covered(all_starts, all_ends, 1)
    end = metadata.view.size()
    edges = np.append(np.minimum(taken[:, 0], end), end)
    for place in np.flatnonzero(np.append(0, taken[:, 1]) < edges).tolist():
        start = int(taken[place - 1, 1]) if place else 0
        yield start, int(edges[place]) - start


def unused_data(metadata: Metadata, bat: Bat, enough: int | None = None) -> int:
    """The bytes outside all structures and blocks that may hold data; not counted beyond `enough`. Raises IoFailed."""
    held = 0
    for start, size in gaps(metadata, bat):
        for _, length, may_hold_data in metadata.view.data_runs(start, size):
            held += length if may_hold_data else 0
            if enough is not None and held >= enough:
                return held
    return held


def is_possible_page(shape: Shape, first: int, raw: bytes, file_size: int) -> bool:
    """Whether these bytes could be entries of a BAT, from number `first` on; it need not be the image's own."""
    entries = np.frombuffer(raw[: len(raw) // layout.BAT_ENTRY_SIZE * layout.BAT_ENTRY_SIZE], dtype="<u8")
    numbers = np.arange(first, first + len(entries))
    states = entries & _STATE
    is_bitmap = numbers % (shape.ratio + 1) == shape.ratio
    stored = (states == BlockState.FULLY_PRESENT) | (states == BlockState.PARTIALLY_PRESENT)
    possible = (states < 4) | stored
    possible &= ~is_bitmap | (states == BlockState.NOT_PRESENT) | (states == BlockState.FULLY_PRESENT)
    offsets = entries & _OFFSET
    possible &= ~stored | ((offsets >= layout.HEADER_SECTION_SIZE) & (offsets < file_size))
    return bool((possible & (entries & _RESERVED == 0)).all())
