# SPDX-License-Identifier: Apache-2.0
"""What a VHD file says about itself: which footer to believe, the dynamic header, the parent's name.

Decides between the trailing footer and its copy, and whether header and BAT can be what they claim. Reads a few
sectors, never blocks; needs no lock, so `info` works on an image in use. Where the BAT entries point is
examined in `dynamic`.

    offset 0                                                          end - 512
    | footer copy | dynamic header | BAT | locators | blocks ...      | footer |
      (fixed images have only data and the footer)

The trailing footer is believed first: in a fixed image the first sector belongs to the guest, who could write
something like a footer there. `INV-FOOTER-COPY`: if either one is good, the image opens.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from vhdkit.errors import CorruptImage, CorruptReason
from vhdkit.finding import Finding, Severity, left_by_repair
from vhdkit.formats.vhd import geometry, layout
from vhdkit.formats.vhd.layout import BatmapHeader, DynamicHeader, Footer
from vhdkit.formats.vhd.locator import Locator, decode_parent_name, read_locators, space_bytes
from vhdkit.formats.vhd.padding import footer_before_zeros
from vhdkit.formats.vhd.room import end_of_room
from vhdkit.store import ReadStore
from vhdkit.units import MIB, SECTOR_SIZE, format_size, is_power_of_two, round_up

MIN_BLOCK_SIZE = MIB // 2  # with the largest virtual size this bounds a block map at 4 Mi entries
MAX_BLOCK_SIZE = 256 * MIB
_KILLED_BYTE = 0xC7  # tapdisk fills the trailing footer with it while it holds the image for writing
_TAP_CREATOR = b"tap\0"
_FIRST_VERSION_WITH_BATMAP = 0x00010001


class FooterState(StrEnum):
    """What stands where a footer belongs."""

    GOOD = "good"
    SHORT = "good, 511 bytes"
    ABSENT = "absent"
    CHECKSUM = "checksum wrong"
    VERSION = "version unknown"
    POISONED = "poisoned: a journaled resize did not finish"
    KILLED = "overwritten with 0xC7: another program holds or held the image"
    STALE = "of another image, which was on this device before"

    @property
    def usable(self) -> bool:
        """True when the footer can be believed."""
        return self in (FooterState.GOOD, FooterState.SHORT)


@dataclass(frozen=True, slots=True)
class FooterPlace:
    """One of the two places of a footer, and what is there."""

    structure: str
    offset_bytes: int
    raw: bytes
    state: FooterState

    @property
    def footer(self) -> Footer:
        """The fields, whatever they are worth."""
        return layout.parse_footer(self.raw)


@dataclass(frozen=True, slots=True)
class Metadata:
    """All of a VHD but its BAT and blocks."""

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
        """True when the image stands on a parent."""
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
        """The header's parent name, empty where there is none."""
        return decode_parent_name(self.header.parent_unicode_name) if self.header is not None else ""

    @property
    def footer_raw(self) -> bytes:
        """The bytes of the believed footer, 512 of them."""
        place = self.tail if self.tail.state.usable else self.copy
        assert place is not None
        return place.raw.ljust(layout.FOOTER_SIZE, b"\0")

    def vital_structures(self) -> list[tuple[str, int, int]]:
        """(name, offset, size) of what the image cannot be read without, in bytes; the trailing footer left out."""
        if self.header is None:
            return []
        return [
            ("footer copy", 0, layout.FOOTER_SIZE),
            ("dynamic header", self.footer.data_offset, layout.HEADER_SIZE),
            ("BAT", self.header.table_offset, self.block_count * layout.BAT_ENTRY_SIZE),
        ]

    def stray_locators(self) -> list[Locator]:
        """Locators whose text is said to lie outside the file, of known kinds or not."""
        ends = ((one, one.data_offset_bytes + one.data_length_bytes) for one in self.locators)
        return [one for one, end in ends if one.data_length_bytes and end > self.file_size_bytes]

    def forbidden_to_blocks(self) -> list[tuple[str, int, int]]:
        """(name, offset, size) of what no block may lie over: what is vital, and the texts that are in the file.

        Texts alone, not the room they claim: a claim may reach past the end of the file, where blocks will be.
        """
        stray = self.stray_locators()
        texts = [(one.structure, one.data_offset_bytes, one.data_length_bytes) for one in self.locators]
        inside = [place for place, one in zip(texts, self.locators, strict=True) if one not in stray and place[2]]
        return self.vital_structures() + inside

    def structures(self) -> list[tuple[str, int, int]]:
        """(name, offset, size) of everything that is said to lie in the file and is no block; footer left out."""
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
    """Where XenServer puts the batmap header: behind the whole BAT, on a sector."""
    return round_up(header.table_offset + header.max_table_entries * layout.BAT_ENTRY_SIZE, SECTOR_SIZE)


def footer_state(raw: bytes) -> FooterState:
    """Judge the bytes where a footer belongs, 512 or 511 of them."""
    if raw and raw.count(_KILLED_BYTE) == len(raw):
        return FooterState.KILLED
    if raw.startswith(layout.POISONED_COOKIE):
        return FooterState.POISONED
    if not raw.startswith(layout.FOOTER_COOKIE) or len(raw) < layout.SHORT_FOOTER_SIZE:
        return FooterState.ABSENT
    if layout.checksum(raw, layout.FOOTER_CHECKSUM_OFFSET) != layout.stored_checksum(
        raw, layout.FOOTER_CHECKSUM_OFFSET
    ):
        return FooterState.CHECKSUM
    if layout.parse_footer(raw).file_format_version & layout.FORMAT_MAJOR_MASK != layout.FORMAT_VERSION:
        return FooterState.VERSION
    return FooterState.GOOD if len(raw) == layout.FOOTER_SIZE else FooterState.SHORT


def read_footers(store: ReadStore) -> tuple[FooterPlace, FooterPlace]:
    """What stands at the end of the file, or before zeros there, and at its beginning. Raises only for I/O errors."""
    size = store.size()
    offset = max(size - layout.FOOTER_SIZE, 0)
    raw = store.pread(offset, layout.FOOTER_SIZE)
    state = footer_state(raw)
    if not state.usable and size % SECTOR_SIZE == layout.SHORT_FOOTER_SIZE:
        short = store.pread(size - layout.SHORT_FOOTER_SIZE, layout.SHORT_FOOTER_SIZE)
        if footer_state(short) is not FooterState.ABSENT:
            offset, raw, state = size - layout.SHORT_FOOTER_SIZE, short, footer_state(short)
    copy_raw = store.pread(0, layout.FOOTER_SIZE)
    copy = FooterPlace("footer copy", 0, copy_raw, footer_state(copy_raw))
    if state is FooterState.ABSENT and not (copy.state.usable and copy.footer.disk_type != layout.DISK_TYPE_FIXED):
        found = footer_before_zeros(store)
        if found is not None and footer_state(found[1]) is FooterState.GOOD:
            offset, raw, state = *found, FooterState.GOOD
    tail = FooterPlace("footer", offset, raw, state)
    if end_of_room(store) is not None and _is_stale(tail, copy):
        tail = replace(tail, state=FooterState.STALE)
    return tail, copy


def _is_stale(tail: FooterPlace, copy: FooterPlace) -> bool:
    """True when an image was copied to a device at whose end an earlier, other one still has its footer.

    Never for the footer of a fixed image: the beginning of that is its guest's.
    """
    if not (tail.state.usable and copy.state.usable):
        return False
    is_fixed = layout.DISK_TYPE_FIXED in (tail.footer.disk_type, copy.footer.disk_type)
    return not is_fixed and tail.footer.unique_id != copy.footer.unique_id


def image_id(store: ReadStore) -> bytes:
    """The id other images know this one by: its footer's, or all zeros where no footer is good (a raw image)."""
    for place in read_footers(store):
        if place.state.usable:
            return place.footer.unique_id
    return bytes(layout.UUID_SIZE)


def looks_like_vhd(store: ReadStore) -> bool:
    """True when a footer, good or damaged, stands at either place."""
    tail, copy = read_footers(store)
    strange = (FooterState.ABSENT, FooterState.KILLED)  # 0xC7 alone is no proof: any raw disk may end so
    return tail.state not in strange or copy.state not in strange


_REASON = {
    FooterState.ABSENT: CorruptReason.NO_FOOTER,
    FooterState.KILLED: CorruptReason.NO_FOOTER,
    FooterState.CHECKSUM: CorruptReason.FOOTER_CHECKSUM,
    FooterState.VERSION: CorruptReason.FOOTER_VERSION,
    FooterState.POISONED: CorruptReason.FOOTER_POISONED,
}


def _choose(path: str, tail: FooterPlace, copy: FooterPlace) -> FooterPlace:
    """The footer to believe. Raises CorruptImage when neither can be."""
    if tail.state.usable:
        return tail
    if copy.state.usable and copy.footer.disk_type != layout.DISK_TYPE_FIXED:
        return copy
    # A good footer here is a fixed disk's, at offset 0: data of the guest, which says nothing of the file.
    silent = (FooterState.ABSENT, FooterState.KILLED, FooterState.GOOD)
    fault = next((place for place in (tail, copy) if place.state not in silent), tail)
    hint = None
    if fault.state is FooterState.POISONED:
        hint = "finish or revert the resize with the tool that began it"
    problem = "there is no VHD footer here and no good copy at the beginning of the file"
    if fault.state is not FooterState.ABSENT:
        problem = f"no usable footer: {fault.state}, and the other one cannot be used either"
    raise CorruptImage(
        _REASON[fault.state],
        problem,
        path=path,
        structure=fault.structure,
        offset_bytes=fault.offset_bytes,
        hint=hint,
    )


def read_metadata(store: ReadStore) -> Metadata:
    """Read and verify footer, header and locators.

    Raises CorruptImage. A locator that cannot be read is no error here (another may serve).
    """
    path = store.name
    tail, copy = read_footers(store)
    chosen = _choose(path, tail, copy)
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
        findings = [*_footer_findings(path, tail, None, footer), *_padding_findings(store, tail)]
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
        tuple(_footer_findings(path, tail, copy, footer)),
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
            "no header here",
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
    """Refuse a BAT that cannot be where and as long as the header says."""
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
    """XenServer's batmap header, where the creator is one that writes it and it looks right."""
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


def _padding_findings(store: ReadStore, tail: FooterPlace) -> list[Finding]:
    """A fixed image that was made longer as if it were a raw disk."""
    padding = store.size() - tail.offset_bytes - len(tail.raw)
    if not padding:
        return []
    message = f"{padding} bytes of zeros follow the footer: the file was made longer as if it were a raw disk"
    return [Finding(Severity.WARNING, "padding", message, store.name, tail.structure, tail.offset_bytes)]


def _image_inside(store: ReadStore, copy: FooterPlace) -> list[Finding]:
    """A fixed disk's device that begins like another image, as after that was copied over the disk.

    The fixed disk is believed: what it begins with is its guest's, who could else have the host open any parent.
    """
    others = (layout.DISK_TYPE_DYNAMIC, layout.DISK_TYPE_DIFFERENCING)
    if end_of_room(store) is None or not copy.state.usable or copy.footer.disk_type not in others:
        return []
    try:
        _read_header(store, copy.footer, copy.footer.current_size)
    except CorruptImage:
        return []
    message = (
        "an image begins here, and at its end the device has the footer of a fixed disk, which counts: the guest of a"
        " fixed disk can write an image here. If it was copied over an old disk, clear the last sector of the device"
    )
    message = left_by_repair(message, "it cannot know which of the two is meant")
    return [Finding(Severity.WARNING, "image-inside", message, store.name, copy.structure, copy.offset_bytes)]


def _footer_findings(path: str, tail: FooterPlace, copy: FooterPlace | None, footer: Footer) -> list[Finding]:
    """What a reader can live with but a person may want to know."""
    findings = []
    for place in (tail, copy):
        if place is None or place.state is FooterState.GOOD:
            continue
        severity = Severity.NOTE if place.state is FooterState.SHORT else Severity.WARNING
        message = f"{place.state}" + ("" if place.state.usable else "; the other footer is used")
        if place.state in (FooterState.KILLED, FooterState.POISONED):
            message = left_by_repair(message, "without --writer-is-dead it does not know that nobody is at work on it")
        findings.append(Finding(severity, "footer", message, path, place.structure, place.offset_bytes))
    stated = footer.current_size
    if geometry.size_is_chs(footer) and stated != geometry.footer_geometry(footer).size_bytes:
        findings.append(
            Finding(
                Severity.WARNING,
                "size-chs",
                left_by_repair(
                    f"current size is {stated} bytes, but creator {footer.creator_application!r} means"
                    f" cylinders x heads x sectors = {geometry.footer_geometry(footer).size_bytes} bytes",
                    "a guest may have seen either; a copy that `vhdkit convert` makes is read alike by all",
                ),
                path,
            )
        )
    if stated % SECTOR_SIZE:
        findings.append(
            Finding(
                Severity.WARNING,
                "size-odd",
                left_by_repair(
                    f"current size {stated} is not a whole number of sectors",
                    "some programs have the rest of the last one, others do not; a copy that `vhdkit convert` makes"
                    " is read alike by all",
                ),
                path,
            )
        )
    return findings
