# SPDX-License-Identifier: Apache-2.0
"""The thorough examination of one VHD file behind `vhdkit check`.

Decides what is an error (data is read wrong or not at all), what a warning (we read it correctly, but other
programs may not, or space is lost) and what a note. Changes nothing and raises only for I/O errors. Parents are
checked in `chain.verbs.check`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from vhdkit.errors import CorruptImage, CorruptReason
from vhdkit.finding import Finding, Severity, finding_of, left_by_repair
from vhdkit.formats.bits import runs
from vhdkit.formats.vhd import bitmap, geometry, layout
from vhdkit.formats.vhd.bat import Bat
from vhdkit.formats.vhd.entries import bad_entries, entry_error, used_sizes
from vhdkit.formats.vhd.footers import FooterState
from vhdkit.formats.vhd.front import after_first_block
from vhdkit.formats.vhd.last_block import bits_past_end, wrong_batmap_bits
from vhdkit.formats.vhd.metadata import Metadata, read_metadata
from vhdkit.formats.vhd.move import batmap_lies_apart
from vhdkit.formats.vhd.places import block_data_end, block_starts, table_range
from vhdkit.formats.vhd.room import end_of_room
from vhdkit.store import ReadStore
from vhdkit.units import KIB, MIB, SECTOR_SIZE, format_size, round_up, sectors_to_bytes, whole_sectors

_MAX_LISTED = 16  # findings of one kind, before the rest are only counted
LEAK_BYTES = 64 * KIB  # a smaller gap is alignment
MAX_FREED_BYTES = 16 * MIB  # of data in unreferenced space: a backup of more would be unreasonably large
_TOO_MUCH = f"they hold more data than the {format_size(MAX_FREED_BYTES)} that a backup should hold"
_BITMAPS_AHEAD = 64  # asked for at once, because each is small and waits for a device by itself
_PROGRESS_EVERY = 256  # blocks between two reports of progress
_READ_SECTORS = whole_sectors(256 * KIB)


def check_vhd(
    store: ReadStore, *, ignore_bitmaps: bool = False, progress: Callable[[int, int], None] | None = None
) -> list[Finding]:
    """Examine a VHD file. If a footer or header is missing, that is the only finding; otherwise all are listed.

    `ignore_bitmaps` omits what does not matter to a reader that ignores them. `progress` is called with the bytes of
    the disk that were examined, and the bytes in all. Raises IoFailed.
    """
    try:
        metadata = read_metadata(store)
    except CorruptImage as error:
        return [finding_of(error, store.name)]
    findings = list(metadata.findings)
    findings += _footer_findings(metadata)
    if metadata.header is None:
        findings += _fixed_findings(store, metadata)
        return findings
    findings += _header_findings(store, metadata)
    bat = Bat.load(store, metadata.header.table_offset, metadata.block_count)
    table_errors = _table_errors(metadata, bat)
    findings += table_errors
    findings += _space_findings(store, metadata, bat)
    findings += _front_findings(metadata, bat)
    if not table_errors:
        findings += _limited(_promise_findings(store, metadata, bat), store.name, "blocks")
        found = _bitmap_findings(store, metadata, bat, ignore_bitmaps, progress)
        findings += _limited(found, store.name, "blocks")
    return findings


def _table_errors(metadata: Metadata, bat: Bat) -> list[Finding]:
    """The bad entries, with only the first few of each kind listed: a hostile table has millions."""
    found = []
    for reason, blocks in bad_entries(metadata, bat):
        listed = blocks[:_MAX_LISTED].tolist()
        found += [finding_of(entry_error(metadata, bat, reason, block), metadata.path) for block in listed]
        if len(blocks) > len(listed):
            message = f"and {len(blocks) - len(listed)} more BAT entries like this"
            found.append(Finding(Severity.ERROR, reason.value, message, metadata.path))
    return found


def _limited(findings: Iterator[Finding], path: str, what: str) -> list[Finding]:
    """The first few of many, and a last one that counts the others."""
    listed: list[Finding] = []
    more = 0
    for finding in findings:
        if len(listed) < _MAX_LISTED:
            listed.append(finding)
        else:
            more += 1
    if more:
        last = listed[-1]
        listed.append(Finding(last.severity, last.code, f"and {more} more {what} like this", path))
    return listed


def _warning(metadata: Metadata, code: str, message: str, structure: str, offset: int | None = None) -> Finding:
    return Finding(Severity.WARNING, code, message, metadata.path, structure, offset)


def _note(metadata: Metadata, code: str, message: str, structure: str, offset: int | None = None) -> Finding:
    return Finding(Severity.NOTE, code, message, metadata.path, structure, offset)


def _footer_findings(metadata: Metadata) -> Iterator[Finding]:
    footer, tail, copy = metadata.footer, metadata.tail, metadata.copy
    both_usable = copy is not None and tail.state.usable and copy.state.usable
    if copy is not None and both_usable and copy.raw != tail.raw.ljust(layout.FOOTER_SIZE, b"\0"):
        differing = [
            field.name
            for field in layout.STRUCTURES["footer"]
            if getattr(copy.footer, field.name) != getattr(tail.footer, field.name)
        ]
        yield _warning(
            metadata,
            "footers-differ",
            f"the footer and its copy differ in {', '.join(differing)}",
            "footer copy",
            0,
        )
    shape, expected = geometry.footer_geometry(footer), geometry.geometry_for(metadata.size_bytes)
    if shape not in (expected, geometry.NO_GEOMETRY) and not geometry.size_is_chs(footer):
        severity = Severity.WARNING if shape.size_bytes > metadata.size_bytes else Severity.NOTE
        message = f"geometry {'/'.join(map(str, shape))} where the size gives {'/'.join(map(str, expected))}"
        yield Finding(severity, "geometry", message, metadata.path, "footer", tail.offset_bytes)
    if footer.saved_state not in (0, 1):
        yield _note(metadata, "saved-state", f"saved state is {footer.saved_state}, not 0 or 1", "footer")
    if footer.hidden:
        yield _note(metadata, "hidden", "marked hidden: an inner node of a XenServer chain", "footer")
    if not any(footer.unique_id):
        message = left_by_repair(
            "the unique id is all zeros: no child can name this image",
            "its existing children would not recognise it any more; a copy made by `vhdkit convert` has an id",
        )
        yield _warning(metadata, "no-id", message, "footer")


def _fixed_findings(store: ReadStore, metadata: Metadata) -> Iterator[Finding]:
    spare = metadata.tail.offset_bytes - metadata.size_bytes
    if not spare:
        return
    message, data_end = f"{spare} bytes between the data and the footer", spare_of_fixed(metadata)
    if data_end is None:
        message = left_by_repair(
            message,
            "other programs read them as a part of the disk; all programs read a copy made by `vhdkit convert` alike",
        )
    elif is_much(store, data_end, metadata.tail.offset_bytes - data_end):
        message = left_by_repair(message, f"{_TOO_MUCH}; a copy made by `vhdkit convert` does not have them")
    yield _warning(metadata, "trailing-space", message, "data", metadata.size_bytes)


def spare_of_fixed(metadata: Metadata) -> int | None:
    """Where unused bytes before the footer of a fixed image begin; None if some programs read them as the disk."""
    data_end = max(metadata.size_bytes, metadata.footer.current_size)
    return data_end if data_end < metadata.tail.offset_bytes and data_end % SECTOR_SIZE == 0 else None


def _header_findings(store: ReadStore, metadata: Metadata) -> Iterator[Finding]:
    assert metadata.header is not None
    header = metadata.header
    if header.data_offset != layout.NO_DATA_OFFSET:
        yield _note(
            metadata,
            "header-data-offset",
            f"unused data offset is {header.data_offset:#x}, not all ones",
            "dynamic header",
        )
    spare = header.max_table_entries - metadata.block_count
    if spare:
        yield _note(
            metadata,
            "bat-spare",
            f"{spare} more entries than the virtual size needs",
            "BAT",
            header.table_offset,
        )
    for locator in metadata.locators:
        if locator.fault is not None:
            message = {
                CorruptReason.LOCATOR_LENGTH: f"{locator.data_length_bytes} bytes of text are not possible",
                CorruptReason.LOCATOR_OUTSIDE_FILE: "the text lies past the end of the file",
            }.get(locator.fault, "the text cannot be decoded")
            if locator.fault is not CorruptReason.LOCATOR_OUTSIDE_FILE:
                message += "; `check --repair` rewrites the names once it finds the parent"
            yield _warning(metadata, locator.fault.value, message, locator.structure, locator.data_offset_bytes)
    if metadata.is_differencing and not metadata.parent_name and not any(one.text for one in metadata.locators):
        yield Finding(Severity.ERROR, "parent-unnamed", "nothing names the parent", metadata.path, "dynamic header")
    elif metadata.is_differencing and not metadata.parent_name:
        message = "a locator names the parent, but the header does not: XenServer refuses such an image"
        yield _warning(metadata, "parent-name", message, "dynamic header", metadata.footer.data_offset)
    table_end = header.table_offset + metadata.block_count * layout.BAT_ENTRY_SIZE
    padding = store.pread(table_end, round_up(table_end, SECTOR_SIZE) - table_end)
    if not spare and padding.strip(b"\xff"):
        yield _note(metadata, "bat-padding", "the rest of its last sector is not all ones", "BAT", table_end)


def gaps(metadata: Metadata, bat: Bat) -> Iterator[tuple[int, int]]:
    """(offset, size) of unreferenced space between structures, blocks and the end of the data.

    Gaps smaller than LEAK_BYTES are alignment and left out.
    """
    whole, _ = used_sizes(metadata)
    starts = block_starts(bat)
    # A locator may claim any 64-bit place: what is outside the file takes no space in it.
    limit = metadata.file_size_bytes
    places = [(offset, min(offset + size, limit)) for _, offset, size in metadata.structures() if offset < limit]
    places.append(table_range(metadata, bat))
    edges = np.concatenate([np.array(places, dtype=np.int64), np.stack([starts, starts + whole], axis=1)])
    edges = edges[np.argsort(edges[:, 0], kind="stable")]
    covered = np.maximum.accumulate(edges[:, 1])
    sizes = np.append(edges[1:, 0], block_data_end(metadata)) - covered
    for index in np.flatnonzero(sizes >= LEAK_BYTES).tolist():
        start = round_up(int(covered[index]), SECTOR_SIZE)  # the rest of a table's last sector is padding
        yield start, int(covered[index] + sizes[index]) - start


def is_much(store: ReadStore, offset_bytes: int, size_bytes: int) -> bool:
    """True when a range holds so much data that a repair does not drop it."""
    return held_bytes(store, offset_bytes, size_bytes, enough=MAX_FREED_BYTES + 1) > MAX_FREED_BYTES


def held_bytes(store: ReadStore, offset_bytes: int, size_bytes: int, *, enough: int | None = None) -> int:
    """How much of a range may hold data, the rest being holes; not counted beyond `enough`."""
    held = 0
    for _, size, may_hold in store.data_runs(offset_bytes, size_bytes):
        held += size if may_hold else 0
        if enough is not None and held >= enough:
            break
    return held


def _space_findings(store: ReadStore, metadata: Metadata, bat: Bat) -> Iterator[Finding]:
    """Unreferenced space, and truncated blocks."""
    assert metadata.header is not None
    whole, last = used_sizes(metadata)
    starts = bat.entries[bat.allocated()].astype(np.int64) * SECTOR_SIZE
    data_end = block_data_end(metadata)
    first_block = int(starts.min()) if len(starts) else data_end
    # A hole before the first block costs nothing and has a use: the table can grow there.
    leaks = [
        one
        for one in gaps(metadata, bat)
        if one[0] >= first_block or held_bytes(store, *one, enough=LEAK_BYTES) >= LEAK_BYTES
    ]
    if end_of_room(store) is not None:  # a device: the space between the last block and the footer is for new blocks
        leaks = [one for one in leaks if one[0] + one[1] < data_end]
    if leaks:
        leaked, first = sum(size for _, size in leaks), leaks[0][0]
        listed = leaks[:_MAX_LISTED]
        # File systems keep whole pages, so a hole may hold a little at its ends.
        if len(leaks) > len(listed) or any(
            held_bytes(store, *leak, enough=LEAK_BYTES) >= LEAK_BYTES for leak in listed
        ):
            message = f"{format_size(leaked)} are unreferenced"
            if has_spare_entries(store, metadata):
                message = left_by_repair(message, "entries of the table past the end of the disk may point there")
            elif sum(held_bytes(store, *leak, enough=MAX_FREED_BYTES + 1) for leak in leaks) > MAX_FREED_BYTES:
                message = left_by_repair(message, f"{_TOO_MUCH}; `vhdkit compact` frees them")
            yield _warning(metadata, "leaked-space", message, "file", first)
        else:
            message = f"{format_size(leaked)} are unreferenced, but a hole that takes no space"
            yield _note(metadata, "leaked-space", message, "file", first)
    final = bat.block_start(len(bat) - 1)
    ends = starts + np.where(starts == final, last, whole)
    data_starts = starts + bitmap.bitmap_size(metadata.header.block_size)
    cuts = np.maximum(ends - np.maximum(data_starts, data_end), 0)  # per block: never more than its data
    lost, count = int(cuts.sum()), int(np.count_nonzero(cuts))
    if count:
        what = f"a block lacks its last {lost} bytes" if count == 1 else f"{count} blocks lack {lost} bytes in all"
        severity = Severity.WARNING if metadata.tail.state is FooterState.GOOD else Severity.ERROR
        yield Finding(
            severity,
            "block-cut",
            f"{what}, which read as zeros",
            metadata.path,
            "file",
            data_end,
        )


def _front_findings(metadata: Metadata, bat: Bat) -> Iterator[Finding]:
    """Structures where XenServer expects none."""
    for structure, offset in after_first_block(metadata, bat):
        message = "lies after the first block: XenServer treats such an image as invalid"
        yield _warning(metadata, "behind-blocks", message, structure, offset)


def _promise_findings(store: ReadStore, metadata: Metadata, bat: Bat) -> Iterator[Finding]:
    """Bits and batmap entries that are wrongly set."""
    bits = bits_past_end(store, metadata, bat)
    if bits is not None:
        severity = Severity.WARNING if metadata.is_differencing else Severity.NOTE  # only children are coalesced
        message = f"{bits.count} bits are set past the end of the disk"
        if metadata.is_differencing:
            message += ": XenServer cannot coalesce it"
        structure = f"bitmap of block {bits.block_index}"
        yield Finding(severity, "bits-past-end", message, metadata.path, structure, bits.offset_bytes)
    for block in wrong_batmap_bits(store, metadata, bat).tolist():
        start = bat.block_start(block)
        fact = "its bitmap does not" if start >= 0 else "which is not allocated"
        message = f"the batmap marks block {block} as full, {fact}"
        if not batmap_lies_apart(metadata, bat):
            message = left_by_repair(message, "the batmap lies over another structure")
        yield _warning(metadata, "batmap", message, f"bitmap of block {block}", start if start >= 0 else None)


def has_spare_entries(store: ReadStore, metadata: Metadata) -> bool:
    """True when the table has entries past the end of the disk that are not empty: another program's blocks."""
    assert metadata.header is not None
    header = metadata.header
    position = header.table_offset + metadata.block_count * layout.BAT_ENTRY_SIZE
    left = (header.max_table_entries - metadata.block_count) * layout.BAT_ENTRY_SIZE
    while left > 0:
        raw = store.pread(position, min(left, MIB))
        if not raw:
            return False
        if raw.count(0xFF) != len(raw):
            return True
        position += len(raw)
        left -= len(raw)
    return False


def _bitmap_findings(
    store: ReadStore,
    metadata: Metadata,
    bat: Bat,
    ignore_bitmaps: bool,
    progress: Callable[[int, int], None] | None,
) -> Iterator[Finding]:
    """Clear bits over data in dynamic disks."""
    assert metadata.header is not None
    block_size = metadata.header.block_size
    size, sector_count = bitmap.bitmap_size(block_size), whole_sectors(block_size)
    blocks = np.flatnonzero(bat.allocated()).tolist()
    for number, block in enumerate(blocks):
        if number % _BITMAPS_AHEAD == 0:
            for coming in blocks[number : number + _BITMAPS_AHEAD]:
                store.prefetch(bat.block_start(coming), size)
        if progress is not None and number % _PROGRESS_EVERY == 0:
            progress(block * block_size, metadata.size_bytes)
        start = bat.block_start(block)
        raw = store.pread(start, size).ljust(size, b"\0")
        inside = min(sector_count, whole_sectors(metadata.size_bytes - block * block_size))
        if bitmap.is_full(raw, inside) or metadata.is_differencing or ignore_bitmaps:
            continue
        owned = bitmap.owned(raw, sector_count)
        for first, count, is_owned in runs(owned[:inside]):
            place = None if is_owned else _first_data(store, start + size + sectors_to_bytes(first), count)
            if place is not None:
                yield _warning(
                    metadata,
                    "hidden-data",
                    left_by_repair(
                        f"data under clear bits of block {block} is not zeros; some programs show it"
                        " (--dynamic-bitmap ignore)",
                        "it cannot know which is intended; all programs read a copy made by `vhdkit convert` alike",
                    ),
                    f"block {block}",
                    place,
                )
                break


def _first_data(store: ReadStore, offset_bytes: int, sector_count: int) -> int | None:
    """Offset of the first sector that is not zeros, or None."""
    for offset, size, may_hold in store.data_runs(offset_bytes, sectors_to_bytes(sector_count)):
        position = offset
        while may_hold and position < offset + size:
            raw = store.pread(position, min(sectors_to_bytes(_READ_SECTORS), offset + size - position))
            if not raw:
                break
            if raw.count(0) != len(raw):
                return position + len(raw) - len(raw.lstrip(b"\0"))
            position += len(raw)
    return None
