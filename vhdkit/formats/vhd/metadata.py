# SPDX-License-Identifier: Apache-2.0
"""The metadata of a VHD file: the footer in use, the dynamic header, the parent's name.

Decides whether header and BAT are possible. Reads a few sectors, never blocks; needs no lock, so `info` works on an
image in use. Which footer is used is decided in `footers`; where the BAT entries point is examined in `entries`.

    offset 0                                                          end - 512
    | footer copy | dynamic header | BAT | locators | blocks ...      | footer |
      (fixed images have only data and the footer)
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from vhdkit.errors import CorruptImage, CorruptReason
from vhdkit.finding import Finding, Severity, left_by_repair
from vhdkit.formats.vhd import geometry, layout
from vhdkit.formats.vhd.footers import FooterPlace, choose, footer_findings, padding_findings, read_footers
from vhdkit.formats.vhd.layout import BatmapHeader, DynamicHeader, Footer
from vhdkit.formats.vhd.locator import Locator, decode_parent_name, read_locators, space_bytes
from vhdkit.formats.vhd.room import end_of_room
from vhdkit.store import ReadStore
from vhdkit.units import MIB, SECTOR_SIZE, format_size, is_power_of_two, round_up

MIN_BLOCK_SIZE = MIB // 2  # with the largest virtual size this bounds a block map at 4 Mi entries
MAX_BLOCK_SIZE = 256 * MIB
_TAP_CREATOR = b"tap\0"
_FIRST_VERSION_WITH_BATMAP = 0x00010001


@dataclass(frozen=True, slots=True)
class Metadata:
    """Everything in a VHD except its BAT and blocks."""

    path: str
    file_size_bytes: int
    footer: Footer
    tail: FooterPlace
    copy: FooterPlace | None  # None in a fixed image
    size_bytes: int
    header: DynamicHeader | None
    locators: tuple[Locator, ...]
    batmap: BatmapHeader | None
    findings: tuple[Finding, ...]

    @property
    def is_differencing(self) -> bool:
        """True when the image has a parent."""
        return self.footer.disk_type == layout.DISK_TYPE_DIFFERENCING

    @property
    def kind(self) -> str:
        """fixed, dynamic or differencing."""
        return {layout.DISK_TYPE_FIXED: "fixed", layout.DISK_TYPE_DYNAMIC: "dynamic"}.get(
            self.footer.disk_type, "differencing"
        )

    @property
    def block_count(self) -> int:
        """Blocks needed to hold the virtual size."""
        assert self.header is not None
        return -(-self.size_bytes // self.header.block_size)

    @property
    def parent_name(self) -> str:
        """The header's parent name, empty if there is none."""
        return decode_parent_name(self.header.parent_unicode_name) if self.header is not None else ""

    @property
    def footer_raw(self) -> bytes:
        """The 512 bytes of the footer in use."""
        place = self.tail if self.tail.state.usable else self.copy
        assert place is not None
        return place.raw.ljust(layout.FOOTER_SIZE, b"\0")

    def vital_structures(self) -> list[tuple[str, int, int]]:
        """(name, offset, size) of what is needed to read the image, in bytes, except the trailing footer."""
        if self.header is None:
            return []
        return [
            ("footer copy", 0, layout.FOOTER_SIZE),
            ("dynamic header", self.footer.data_offset, layout.HEADER_SIZE),
            ("BAT", self.header.table_offset, self.block_count * layout.BAT_ENTRY_SIZE),
        ]

    def stray_locators(self) -> list[Locator]:
        """Locators whose text would lie outside the file, of known kinds or not."""
        ends = ((one, one.data_offset_bytes + one.data_length_bytes) for one in self.locators)
        return [one for one, end in ends if one.data_length_bytes and end > self.file_size_bytes]

    def forbidden_to_blocks(self) -> list[tuple[str, int, int]]:
        """(name, offset, size) of what no block may lie over: the vital structures, and the texts inside the file.

        Only the texts, not the space they claim: a claim may reach past the end of the file, where blocks will be.
        """
        stray = self.stray_locators()
        texts = [(one.structure, one.data_offset_bytes, one.data_length_bytes) for one in self.locators]
        inside = [place for place, one in zip(texts, self.locators, strict=True) if one not in stray and place[2]]
        return self.vital_structures() + inside

    def structures(self) -> list[tuple[str, int, int]]:
        """(name, offset, size) of all stated structures except blocks and the trailing footer."""
        if self.header is None:
            return []
        places = self.vital_structures()
        for locator in self.locators:
            space = space_bytes(self.header.parent_locators[locator.slot])
            if locator.fault is None and locator.data_length_bytes:
                places.append((locator.structure, locator.data_offset_bytes, space))
        if self.batmap is not None:
            places.append(("batmap header", self._batmap_offset(), layout.BATMAP_HEADER_SIZE))
            places.append(("batmap", self.batmap.batmap_offset, self.batmap.batmap_size * SECTOR_SIZE))
        return places

    def _batmap_offset(self) -> int:
        assert self.header is not None
        return batmap_header_offset(self.header)


def batmap_header_offset(header: DynamicHeader) -> int:
    """Where XenServer puts the batmap header: after the whole BAT, on a sector boundary."""
    return round_up(header.table_offset + header.max_table_entries * layout.BAT_ENTRY_SIZE, SECTOR_SIZE)


def read_metadata(store: ReadStore) -> Metadata:
    """Read and verify footer, header and locators.

    Raises CorruptImage, but not for a locator that cannot be read (another may be usable).
    """
    path = store.name
    tail, copy = read_footers(store)
    chosen = choose(path, tail, copy)
    footer = chosen.footer
    where: dict[str, Any] = {
        "path": path,
        "structure": chosen.structure,
        "offset_bytes": chosen.offset_bytes,
    }
    if footer.disk_type not in (
        layout.DISK_TYPE_FIXED,
        layout.DISK_TYPE_DYNAMIC,
        layout.DISK_TYPE_DIFFERENCING,
    ):
        raise CorruptImage(
            CorruptReason.DISK_TYPE,
            "unknown disk type",
            expected="2, 3 or 4",
            found=footer.disk_type,
            **where,
        )
    fixed = footer.disk_type == layout.DISK_TYPE_FIXED
    size_bytes = geometry.virtual_size(footer, tail.offset_bytes)
    limit = geometry.MAX_FIXED_BYTES if fixed else geometry.MAX_DYNAMIC_BYTES
    if not 0 < size_bytes <= limit:
        raise CorruptImage(
            CorruptReason.VIRTUAL_SIZE,
            "impossible virtual size",
            expected=f"1 sector to {format_size(limit)}",
            found=f"{size_bytes} bytes",
            **where,
        )
    if fixed:
        if size_bytes > tail.offset_bytes:
            raise CorruptImage(
                CorruptReason.DATA_OUTSIDE_FILE,
                "the file is shorter than the disk it holds",
                expected=f"{size_bytes} bytes before the footer",
                found=tail.offset_bytes,
                **where,
            )
        findings = [*footer_findings(path, tail, None, footer), *padding_findings(store, tail)]
        findings += _image_inside(store, copy)
        return Metadata(path, store.size(), footer, tail, None, size_bytes, None, (), None, tuple(findings))
    header = _read_header(store, footer, size_bytes)
    locators = read_locators(store, header) if footer.disk_type == layout.DISK_TYPE_DIFFERENCING else ()
    return Metadata(
        path,
        store.size(),
        footer,
        tail,
        copy,
        size_bytes,
        header,
        locators,
        _read_batmap(store, footer, header),
        tuple(footer_findings(path, tail, copy, footer)),
    )


def _read_header(store: ReadStore, footer: Footer, size_bytes: int) -> DynamicHeader:
    path, offset = store.name, footer.data_offset
    where: dict[str, Any] = {"path": path, "structure": "dynamic header", "offset_bytes": offset}
    raw = store.pread(offset, layout.HEADER_SIZE) if offset < store.size() else b""
    if len(raw) < layout.HEADER_SIZE:
        raise CorruptImage(
            CorruptReason.HEADER_OUTSIDE_FILE,
            "the footer points at a header past the end of the file",
            found=f"a file of {store.size()} bytes",
            **where,
        )
    if not raw.startswith(layout.HEADER_COOKIE):
        raise CorruptImage(
            CorruptReason.HEADER_COOKIE,
            "this is not a dynamic header",
            expected=layout.HEADER_COOKIE,
            found=raw[:8],
            **where,
        )
    computed = layout.checksum(raw, layout.HEADER_CHECKSUM_OFFSET)
    stored = layout.stored_checksum(raw, layout.HEADER_CHECKSUM_OFFSET)
    if computed != stored:
        raise CorruptImage(
            CorruptReason.HEADER_CHECKSUM,
            "checksum wrong",
            expected=f"{computed:#010x}",
            found=f"{stored:#010x}",
            **where,
        )
    header = layout.parse_header(raw)
    if header.header_version & layout.FORMAT_MAJOR_MASK != layout.FORMAT_VERSION:
        raise CorruptImage(
            CorruptReason.HEADER_VERSION, "unknown version", found=f"{header.header_version:#010x}", **where
        )
    if not (is_power_of_two(header.block_size) and MIN_BLOCK_SIZE <= header.block_size <= MAX_BLOCK_SIZE):
        raise CorruptImage(
            CorruptReason.BLOCK_SIZE,
            "impossible block size",
            expected=f"a power of two from {format_size(MIN_BLOCK_SIZE)} to {format_size(MAX_BLOCK_SIZE)}",
            found=header.block_size,
            **where,
        )
    _check_table(store, header, size_bytes)
    _check_apart(store, header, offset, size_bytes)
    return header


def _check_apart(store: ReadStore, header: DynamicHeader, header_offset: int, size_bytes: int) -> None:
    """Refuse a footer copy, header and BAT that lie over each other: writing one would destroy another."""
    table_size = -(-size_bytes // header.block_size) * layout.BAT_ENTRY_SIZE
    places = [
        ("footer copy", 0, layout.FOOTER_SIZE),
        ("dynamic header", header_offset, layout.HEADER_SIZE),
        ("BAT", header.table_offset, table_size),
    ]
    for (lower, start, size), (upper, offset, _) in itertools.pairwise(sorted(places, key=lambda place: place[1])):
        if offset < start + size:
            raise CorruptImage(
                CorruptReason.STRUCTURES_OVERLAP,
                f"begins inside the {lower}",
                path=store.name,
                structure=upper,
                offset_bytes=offset,
            )


def _check_table(store: ReadStore, header: DynamicHeader, size_bytes: int) -> None:
    """Refuse a BAT whose stated place or length is impossible."""
    where: dict[str, Any] = {"path": store.name, "structure": "BAT", "offset_bytes": header.table_offset}
    needed = -(-size_bytes // header.block_size)
    if header.max_table_entries < needed:
        raise CorruptImage(
            CorruptReason.BAT_TOO_SHORT,
            "too few entries for the virtual size",
            expected=f"at least {needed}",
            found=header.max_table_entries,
            **where,
        )
    if header.table_offset + needed * layout.BAT_ENTRY_SIZE > store.size():
        raise CorruptImage(
            CorruptReason.BAT_OUTSIDE_FILE,
            "the table reaches past the end of the file",
            found=f"{needed} entries in a file of {store.size()} bytes",
            **where,
        )


def _read_batmap(store: ReadStore, footer: Footer, header: DynamicHeader) -> BatmapHeader | None:
    """XenServer's batmap header, if the creator writes one and it is plausible."""
    if footer.creator_application != _TAP_CREATOR or footer.creator_version < _FIRST_VERSION_WITH_BATMAP:
        return None
    offset = batmap_header_offset(header)
    raw = store.pread(offset, layout.BATMAP_HEADER_SIZE) if offset < store.size() else b""
    if len(raw) < layout.BATMAP_HEADER_SIZE or not raw.startswith(layout.BATMAP_COOKIE):
        return None
    batmap = layout.parse_batmap_header(raw)
    if batmap.batmap_offset + batmap.batmap_size * SECTOR_SIZE > store.size():
        return None
    return batmap


def _image_inside(store: ReadStore, copy: FooterPlace) -> list[Finding]:
    """A fixed disk's device that begins like another image, as if that image was copied over the disk.

    The fixed disk counts: its beginning belongs to its guest, which could otherwise make the host open any parent.
    """
    others = (layout.DISK_TYPE_DYNAMIC, layout.DISK_TYPE_DIFFERENCING)
    if end_of_room(store) is None or not copy.state.usable or copy.footer.disk_type not in others:
        return []
    try:
        _read_header(store, copy.footer, copy.footer.current_size)
    except CorruptImage:
        return []
    message = (
        "an image begins here, but the footer of a fixed disk at the end of the device has priority: the guest of a"
        " fixed disk can write an image here. If the image was copied over an old disk, clear the last sector of the"
        " device"
    )
    message = left_by_repair(message, "it cannot know which of the two is intended")
    return [Finding(Severity.WARNING, "image-inside", message, store.name, copy.structure, copy.offset_bytes)]
