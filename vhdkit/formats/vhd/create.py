# SPDX-License-Identifier: Apache-2.0
"""New VHD images, written whole into an empty store.

Decides what our own files look like: footer copy and dynamic header in page 0, the BAT on pages of its own,
then the locators, then the trailing footer; later blocks have their data on 4 KiB boundaries.

    0        512              4096        ...        ...
    | copy   | dynamic header | BAT (FF)  | locators | footer |

The creator is written as `win ` 10.0 on `Wi2k`: every program takes the current size of such a file as its virtual
size, while several (QEMU before 10.0 among them) use cylinders x heads x sectors for creators that they do not know.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, replace

from vhdkit import errors
from vhdkit.formats.format import DEFAULT_BLOCK_SIZE
from vhdkit.formats.vhd import geometry, layout, locator
from vhdkit.formats.vhd.layout import DynamicHeader, Footer, LocatorEntry
from vhdkit.formats.vhd.metadata import MAX_BLOCK_SIZE, MIN_BLOCK_SIZE
from vhdkit.store import Store
from vhdkit.units import GIB, MIB, PAGE_SIZE, SECTOR_SIZE, format_size, is_power_of_two, round_up

CREATOR_APPLICATION = b"win "
CREATOR_VERSION = 0x000A0000
CREATOR_HOST_OS = b"Wi2k"
_BAT_WRITE_BYTES = MIB


@dataclass(frozen=True, slots=True)
class ParentLink:
    """What a differencing image records of its parent.

    `relative` and `absolute` are Windows paths. `unique_id` is the 16 bytes in the parent's footer, all zeros for a
    raw parent.
    """

    unique_id: bytes
    timestamp: int
    name: str
    relative: str
    absolute: str


def check_size(size_bytes: int, *, fixed: bool = False) -> None:
    """Raise InvalidArgument for a virtual size that no VHD can have."""
    if size_bytes % SECTOR_SIZE:
        raise errors.InvalidArgument(
            f"a disk of {size_bytes} bytes is not a whole number of {SECTOR_SIZE}-byte sectors"
        )
    if size_bytes <= 0:
        raise errors.InvalidArgument("a disk needs at least one sector")
    if size_bytes > geometry.MAX_CREATE_BYTES:
        kind = "fixed" if fixed else "dynamic"
        raise errors.InvalidArgument(
            f"a {kind} VHD holds at most {geometry.MAX_CREATE_BYTES // GIB} GiB, not {format_size(size_bytes)}",
            hint="a VHDX holds up to 64 TiB",
        )


def check_block_size(block_size_bytes: int) -> None:
    """Raise InvalidArgument for a block size that we do not write."""
    if not (is_power_of_two(block_size_bytes) and MIN_BLOCK_SIZE <= block_size_bytes <= MAX_BLOCK_SIZE):
        raise errors.InvalidArgument(
            f"a block size is a power of two from {format_size(MIN_BLOCK_SIZE)} to {format_size(MAX_BLOCK_SIZE)},"
            f" not {block_size_bytes} bytes"
        )


def new_footer(disk_type: int, size_bytes: int) -> Footer:
    """A footer for a disk created now, with a fresh unique id."""
    shape = geometry.geometry_for(size_bytes)
    return Footer(
        cookie=layout.FOOTER_COOKIE,
        features=layout.FEATURES_RESERVED,
        file_format_version=layout.FORMAT_VERSION,
        data_offset=layout.NO_DATA_OFFSET if disk_type == layout.DISK_TYPE_FIXED else layout.FOOTER_SIZE,
        timestamp=max(0, int(time.time()) - layout.EPOCH_UNIX_SECONDS),
        creator_application=CREATOR_APPLICATION,
        creator_version=CREATOR_VERSION,
        creator_host_os=CREATOR_HOST_OS,
        original_size=size_bytes,
        current_size=size_bytes,
        cylinders=shape.cylinders,
        heads=shape.heads,
        sectors_per_track=shape.sectors_per_track,
        disk_type=disk_type,
        checksum=0,
        unique_id=uuid.uuid4().bytes,
        saved_state=0,
        hidden=0,
        reserved=bytes(layout.FOOTER_RESERVED_SIZE),
    )


def create_fixed(store: Store, size_bytes: int, *, preallocate: bool = False) -> Footer:
    """Make the empty `store` a fixed VHD of zeros: sparse, or with all its space allocated.

    Raises InvalidArgument, NoSpace.
    """
    check_size(size_bytes, fixed=True)
    if preallocate:
        store.reserve(0, size_bytes)
    footer = new_footer(layout.DISK_TYPE_FIXED, size_bytes)
    store.pwrite(size_bytes, layout.build_footer(footer))
    return footer


def create_dynamic(store: Store, size_bytes: int, *, block_size_bytes: int = DEFAULT_BLOCK_SIZE) -> Footer:
    """Make the empty `store` a dynamic VHD of zeros. Raises InvalidArgument, NoSpace."""
    return _create_sparse(store, new_footer(layout.DISK_TYPE_DYNAMIC, size_bytes), block_size_bytes, None)


def create_differencing(
    store: Store, size_bytes: int, link: ParentLink, *, block_size_bytes: int = DEFAULT_BLOCK_SIZE
) -> Footer:
    """Make the empty `store` a differencing VHD that owns nothing yet.

    Raises InvalidArgument, also for a parent whose name cannot be written in UTF-16, and NoSpace.
    """
    return _create_sparse(store, new_footer(layout.DISK_TYPE_DIFFERENCING, size_bytes), block_size_bytes, link)


def _create_sparse(store: Store, footer: Footer, block_size_bytes: int, link: ParentLink | None) -> Footer:
    check_size(footer.current_size)
    check_block_size(block_size_bytes)
    entry_count = -(-footer.current_size // block_size_bytes)
    table_offset = PAGE_SIZE
    table_size = round_up(entry_count * layout.BAT_ENTRY_SIZE, PAGE_SIZE)
    header = DynamicHeader(
        cookie=layout.HEADER_COOKIE,
        data_offset=layout.NO_DATA_OFFSET,
        table_offset=table_offset,
        header_version=layout.FORMAT_VERSION,
        max_table_entries=entry_count,
        block_size=block_size_bytes,
        checksum=0,
        parent_unique_id=bytes(layout.UUID_SIZE),
        parent_timestamp=0,
        reserved1=0,
        parent_unicode_name=bytes(layout.PARENT_NAME_SIZE),
        parent_locators=(LocatorEntry(locator.NO_PLATFORM, 0, 0, 0, 0),) * layout.LOCATOR_COUNT,
        reserved2=bytes(layout.HEADER_RESERVED_SIZE),
    )
    end = table_offset + table_size
    texts: list[tuple[int, bytes]] = []
    if link is not None:
        header, texts, end = linked_header(header, link, end)
    assert table_offset >= layout.FOOTER_SIZE + layout.HEADER_SIZE
    raw_footer = layout.build_footer(footer)
    store.pwrite(0, raw_footer + layout.build_header(header))
    _fill_table(store, table_offset, table_size)
    for offset, raw in texts:
        store.pwrite(offset, raw)
    store.pwrite(end, raw_footer)
    return footer


def without_parent(header: DynamicHeader) -> DynamicHeader:
    """`header` as that of an image that has no parent, and no name of one."""
    return replace(
        header,
        parent_unique_id=bytes(layout.UUID_SIZE),
        parent_timestamp=0,
        parent_unicode_name=bytes(layout.PARENT_NAME_SIZE),
        parent_locators=(LocatorEntry(locator.NO_PLATFORM, 0, 0, 0, 0),) * layout.LOCATOR_COUNT,
    )


def linked_header(
    header: DynamicHeader, link: ParentLink, offset: int
) -> tuple[DynamicHeader, list[tuple[int, bytes]], int]:
    """`header` with the names of the parent, the locator texts to write from `offset` on, and their end."""
    texts = [(locator.RELATIVE, link.relative), (locator.ABSOLUTE, link.absolute)]
    try:
        entries, writes, end = locator.place_locators(texts, offset)
        name = locator.encode_parent_name(link.name)
    except UnicodeEncodeError as error:
        raise errors.InvalidArgument(
            "the parent's path is not valid text and cannot be stored in a VHD; rename it",
            path=link.relative,
        ) from error
    if any(entry.data_length > locator.MAX_LOCATOR_BYTES for entry in entries):
        raise errors.InvalidArgument("the parent's path is too long to be stored in a VHD", path=link.relative)
    linked = replace(
        header,
        parent_unique_id=link.unique_id,
        parent_timestamp=link.timestamp,
        parent_unicode_name=name,
        parent_locators=entries,
    )
    return linked, writes, round_up(end, SECTOR_SIZE)


def _fill_table(store: Store, offset_bytes: int, size_bytes: int) -> None:
    """Mark every BAT entry, and the padding of its last page, as unallocated."""
    empty = b"\xff" * min(size_bytes, _BAT_WRITE_BYTES)
    for position in range(0, size_bytes, _BAT_WRITE_BYTES):
        store.pwrite(offset_bytes + position, empty[: size_bytes - position])
