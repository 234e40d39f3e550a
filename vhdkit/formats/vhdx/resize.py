# SPDX-License-Identifier: Apache-2.0
"""Changing the virtual size of a VHDX.

Decides where a longer BAT and the new blocks of a fixed image go, and the order of all writes. Must not judge whether
a disk may shrink: the caller (`chain.verbs.resize`) ensures that nothing of value lies after the new end.

    grow:    room at the end of the file for a longer BAT and the blocks of a fixed image
             bytes after the old end -> zeros                                                                  | sync
             entries and bits after the old end -> zeros                                                       | log
             a longer BAT in its place                                                                         | sync
             the size, and where the BAT lies                                                  | one entry of the log
    shrink:  the size                                                                          | one entry of the log
             entries that are no longer needed, bits after the new end -> zeros                                | log
             the gaps are filled, the file is truncated                                                        | `move`

What is done before the log entry with the size is invisible in a disk of the old size, and what is done after it is
invisible in a disk of the new size: a power cut leaves one or the other (`INV-RESIZE-WHOLE`). For example, a block of
a child that was dropped before the disk became smaller would show the parent.

A BAT that has no room for the larger disk is written anew at the end of the file. The space of the old one stays
unused, because an entry of the log may still be replayed over it; `compact` frees it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from vhdkit import errors
from vhdkit.formats.format import Moved
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.bat import ENTRIES_PER_PAGE, BlockState, Shape, full_entries, offset_of, state_of
from vhdkit.formats.vhdx.blocks import VhdxImage
from vhdkit.formats.vhdx.create import FILL_ENTRIES
from vhdkit.formats.vhdx.entries import end_of_structures, places, whole_sizes
from vhdkit.formats.vhdx.layout import RegionEntry
from vhdkit.formats.vhdx.log import SECTOR, LogChange
from vhdkit.formats.vhdx.move import Packing, carry_out, cut_end, drop, gone_entries, plan_packing
from vhdkit.formats.vhdx.opening import open_vhdx
from vhdkit.formats.vhdx.regions import table_writes
from vhdkit.units import MIB, round_down, round_up

_BITS = 8  # in a byte of a sector bitmap


@dataclass(frozen=True, slots=True)
class Growth:
    """A larger image: the shape and region of its table, where its new blocks begin if it is fixed, and its end."""

    shape: Shape
    table: RegionEntry
    first_new_block_bytes: int
    file_end_bytes: int


def shape_for(image: VhdxImage, size_bytes: int) -> Shape:
    """The table's shape if the image had this size."""
    return Shape(size_bytes, image.block_size_bytes, image.sector_bytes, has_parent=image.is_differencing)


def plan_grow(image: VhdxImage, size_bytes: int) -> Growth:
    """Where everything goes. Raises NoSpace, and InvalidArgument if the last block cannot be completed."""
    _check_last_block(image)
    metadata, shape = image.metadata, shape_for(image, size_bytes)
    end = round_up(max(end_of_structures(metadata, image.bat), image.store.size()), MIB)
    table, needed = metadata.regions.bat, shape.entry_count * layout.BAT_ENTRY_SIZE
    if table.length < needed:
        table = replace(table, file_offset=end, length=round_up(needed, MIB))
        end += table.length
    first_new_block = end
    if metadata.items.leaves_blocks_allocated:
        end += (shape.block_count - image.bat.shape.block_count) * image.block_size_bytes
    if end > layout.MAX_FILE_BYTES:
        raise errors.NoSpace("a VHDX file cannot grow past 66 TiB", path=image.store.name)
    return Growth(shape, table, first_new_block, end)


def _check_last_block(image: VhdxImage) -> None:
    """Refuse if another block or structure lies in the part of the last block that the disk does not use yet."""
    last = image.bat.shape.block_count - 1
    entry, (_, unused) = image.bat.block(last), _tail_of_last_block(image)
    if state_of(entry) < BlockState.FULLY_PRESENT or not unused:
        return
    start, end = offset_of(entry), offset_of(entry) + image.block_size_bytes
    numbers, offsets, _ = places(image.metadata, image.bat)
    is_other = numbers != image.bat.shape.block_entry(last)
    blocks = is_other & (offsets < end) & (offsets + whole_sizes(image.metadata, numbers) > start)
    structures = (place < end and place + size > start for _, place, size in image.metadata.structures())
    if blocks.any() or any(structures):
        raise errors.InvalidArgument(
            "the last block cannot be completed: another structure lies in the part that the disk does not use yet",
            path=image.store.name,
            structure=image.bat.shape.structure(image.bat.shape.block_entry(last)),
            offset_bytes=end - unused,
            hint="convert it to a new image and resize that",
        )


def _tail_of_last_block(image: VhdxImage) -> tuple[int, int]:
    """(first byte, size) of the part of the last block that lies after the end of the disk."""
    used = image.size_bytes - (image.bat.shape.block_count - 1) * image.block_size_bytes
    return used, image.block_size_bytes - used


def grow(image: VhdxImage, size_bytes: int, growth: Growth) -> None:
    """Make the disk larger. The open image still has the old size, and must be closed afterwards.

    Raises NoSpace, IoFailed, SyncFailed; the disk then has its old size, or the new one, and every byte.
    """
    commit, store = image.commit, image.store
    size_before = store.size()
    try:
        _make_room(image, growth)
        commit.begin()
        _drop_behind(image, image.bat.shape)
        _clear_bits_from(image, image.size_bytes)
        commit.flush()
        if growth.table == image.metadata.regions.bat:
            commit.write_in_order(_pages_of_table(image, growth))
        else:
            _write_table(image, growth)
    except BaseException:  # Ctrl-C too
        _give_back(image, size_before)
        raise
    regions = replace(image.metadata.regions, bat=growth.table)
    tables = table_writes(regions) if growth.table != image.metadata.regions.bat else []
    commit.write_pages([_size_write(image, size_bytes), *tables])
    _finish(image)


def _make_room(image: VhdxImage, growth: Growth) -> None:
    """Durably make space at the end of the file, and zero the rest of the disk's last block."""
    store, bat = image.store, image.bat
    if growth.file_end_bytes > store.size():
        store.truncate(growth.file_end_bytes)
    entry, (used, unused) = bat.block(bat.shape.block_count - 1), _tail_of_last_block(image)
    if state_of(entry) >= BlockState.FULLY_PRESENT:
        store.punch(offset_of(entry) + used, unused)
    image.commit.sync()


def _write_table(image: VhdxImage, growth: Growth) -> None:
    """Durably write the BAT in its new place, to which nothing refers yet."""
    bat, place = image.bat, growth.table.file_offset
    for first, raw in bat.pieces():
        image.store.pwrite(place + first * layout.BAT_ENTRY_SIZE, raw)
    if image.metadata.items.leaves_blocks_allocated:
        for first in range(bat.shape.entry_count, growth.shape.entry_count, FILL_ENTRIES):
            numbers = range(first, min(first + FILL_ENTRIES, growth.shape.entry_count))
            image.store.pwrite(place + first * layout.BAT_ENTRY_SIZE, _new_entries(image, growth, numbers))
    image.commit.sync()


def _new_entries(image: VhdxImage, growth: Growth, numbers: range) -> bytes:
    """The stored entries of the larger disk's new blocks; those of other blocks are 0."""
    if not image.metadata.items.leaves_blocks_allocated:
        return bytes(len(numbers) * layout.BAT_ENTRY_SIZE)
    entries = full_entries(
        growth.shape,
        numbers,
        image.block_size_bytes,
        first_block=image.bat.shape.block_count,
        offset_bytes=growth.first_new_block_bytes,
    )
    return entries.astype("<u8").tobytes()


def _pages_of_table(image: VhdxImage, growth: Growth) -> Iterator[LogChange]:
    """The pages of the table that change: bytes after its last entry are junk, or from a larger disk."""
    bat, base = image.bat, growth.table.file_offset
    first, stop = bat.shape.entry_count // ENTRIES_PER_PAGE, -(-growth.shape.entry_count // ENTRIES_PER_PAGE)
    is_fixed, next_page = image.metadata.items.leaves_blocks_allocated, first
    for start, size, may_hold_data in list(image.store.data_runs(base + first * SECTOR, (stop - first) * SECTOR)):
        if not may_hold_data and not is_fixed:
            continue
        low, high = (start - base) // SECTOR, -(-(start + size - base) // SECTOR)
        for number in range(max(low, next_page), high):
            old = np.frombuffer(bat.page(number), dtype="<u8")
            numbers = range(number * ENTRIES_PER_PAGE, (number + 1) * ENTRIES_PER_PAGE)
            raw = (old | np.frombuffer(_new_entries(image, growth, numbers), dtype="<u8")).tobytes()
            if raw != image.store.pread(base + number * SECTOR, SECTOR):
                yield LogChange(base + number * SECTOR, SECTOR, raw)
        next_page = max(high, next_page)


def _clear_bits_from(image: VhdxImage, offset_bytes: int) -> None:
    """Clear the bits of all sectors from this byte of the disk to the end of their sector bitmap, in memory."""
    commit, shape = image.commit, image.bat.shape
    bitmap, bit = divmod(offset_bytes // image.sector_bytes, layout.SECTORS_PER_CHUNK)
    if not image.is_differencing or bitmap >= shape.chunk_count or image.bat.bitmap_offset(bitmap) < 0:
        return
    base = image.bat.bitmap_offset(bitmap)
    place, end = base + bit // _BITS, base + layout.BITMAP_BLOCK_SIZE
    keep = (1 << bit % _BITS) - 1  # of the first byte
    while place < end:
        stop = min(round_down(place, SECTOR) + SECTOR, end)
        with commit.changing:
            raw = commit.bits_to_change(place, stop - place)
            cleared = bytes([raw[0] & keep]) + bytes(len(raw) - 1)
            if raw != cleared:
                commit.put_bits(place, cleared)
        place, keep = stop, 0


def _drop_behind(image: VhdxImage, shape: Shape) -> None:
    """Clear the entries past the end of a disk of this shape, in memory."""
    commit = image.commit
    for numbers, _ in list(image.bat.used()):
        for number in numbers[shape.is_behind(numbers)].tolist():
            with commit.changing:
                commit.set_entry(number, BlockState.NOT_PRESENT)
            commit.limit()


def _size_write(image: VhdxImage, size_bytes: int) -> tuple[int, bytes]:
    """(offset, bytes) of the item with the size of the disk."""
    wanted = layout.ITEM_VIRTUAL_DISK_SIZE
    item = next(one for one in image.metadata.items.all if one.entry.item_id == wanted and not one.is_user)
    return item.offset_bytes, size_bytes.to_bytes(item.entry.length, "little")


def _give_back(image: VhdxImage, size_before: int) -> None:
    """Truncate the file to its old size, once no log entry requires the larger one."""
    with contextlib.suppress(errors.VhdkitError):
        cut_end(image, size_before)


def _finish(image: VhdxImage) -> None:
    """Leave a file that can be opened again, and refuse more writes: the open image has the old size."""
    image.commit.settle()
    image.refuse_writing()


def gone_after(image: VhdxImage, size_bytes: int) -> tuple[int, Packing]:
    """(number of blocks dropped, what moves) in a shrink that was not begun yet."""
    smaller = shape_for(image, size_bytes)
    allocated = np.flatnonzero(image.allocated_blocks()).astype(np.int64)
    dropped = allocated[allocated >= smaller.block_count]
    gone = gone_entries(image, dropped)
    for numbers, _ in image.bat.used():
        gone = np.concatenate([gone, numbers[smaller.is_behind(numbers)]])
    return len(dropped), plan_packing(image, gone)


def shrink(image: VhdxImage, size_bytes: int, moved: Moved | None = None) -> None:
    """Make the disk and its file smaller. Afterwards the image can only be closed.

    Nothing of value may lie after the new end. Raises NoSpace, IoFailed, SyncFailed; the disk then has its old size,
    or the new one.
    """
    commit = image.commit
    commit.begin()
    commit.write_pages([_size_write(image, size_bytes)])
    _drop_behind(image, shape_for(image, size_bytes))
    _clear_bits_from(image, size_bytes)
    commit.flush()
    _finish(image)
    smaller = open_vhdx(image.store, writable=True)
    nothing = np.zeros(0, dtype=np.int64)
    drop(smaller, nothing)
    carry_out(smaller, plan_packing(smaller, nothing), moved)
