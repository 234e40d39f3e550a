# SPDX-License-Identifier: Apache-2.0
"""The two headers of a VHDX: which one is current.

Decides whether each slot is valid and which of the two is current. Must not know the log, regions or blocks.

A header is 4096 bytes protected by a checksum. Of the intact headers, the one with the larger sequence number is
current. Two intact headers with the same number are accepted if they are identical, as Disk2VHD writes them.

Source: [MS-VHDX] 2.2.2; for Disk2VHD, files that it wrote.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vhdkit.errors import CorruptImage, CorruptReason
from vhdkit.finding import Finding, Severity
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.crc import is_sealed
from vhdkit.formats.vhdx.layout import Header
from vhdkit.image import NULL_ID
from vhdkit.store import ReadStore


class HeaderState(StrEnum):
    """The state of a header slot."""

    GOOD = "good"
    CHECKSUM = "checksum wrong"
    SIGNATURE = "no header here"
    OUTSIDE = "outside the file"


@dataclass(frozen=True, slots=True)
class HeaderPlace:
    """One of the two slots: `raw` is its content, up to 4096 bytes."""

    slot: int
    raw: bytes
    state: HeaderState

    @property
    def structure(self) -> str:
        """Its name in messages."""
        return f"header {self.slot + 1}"

    @property
    def offset_bytes(self) -> int:
        """Its offset in the file."""
        return layout.HEADER_OFFSETS[self.slot]

    @property
    def header(self) -> Header:
        """Its fields, valid or not."""
        return layout.parse_header(self.raw.ljust(layout.HEADER_SIZE, b"\0"))


def read_headers(store: ReadStore) -> tuple[HeaderPlace, HeaderPlace]:
    """Both slots, each examined by itself."""
    first, second = (_read(store, slot) for slot in range(2))
    return first, second


def _read(store: ReadStore, slot: int) -> HeaderPlace:
    offset = layout.HEADER_OFFSETS[slot]
    raw = store.pread(offset, layout.HEADER_SIZE) if offset < store.size() else b""
    if len(raw) < layout.HEADER_SIZE:
        state = HeaderState.OUTSIDE
    elif not raw.startswith(layout.HEADER_SIGNATURE):
        state = HeaderState.SIGNATURE
    elif not is_sealed(raw, layout.HEADER_CHECKSUM_OFFSET):
        state = HeaderState.CHECKSUM
    else:
        state = HeaderState.GOOD
    return HeaderPlace(slot, raw, state)


def current_slot(places: tuple[HeaderPlace, HeaderPlace]) -> int | None:
    """The slot of the current header; None if none is intact, or if two with the same number differ."""
    good = [place for place in places if place.state is HeaderState.GOOD]
    if len(good) == 2:
        first, second = (place.header.sequence_number for place in good)
        if first == second:
            return 0 if good[0].raw == good[1].raw else None
        return 0 if first > second else 1
    return good[0].slot if good else None


def current_header(path: str, places: tuple[HeaderPlace, HeaderPlace]) -> HeaderPlace:
    """The current header. Raises CorruptImage."""
    slot = current_slot(places)
    if slot is None:
        raise _none_counts(path, places)
    place = places[slot]
    header = place.header
    if header.version != layout.HEADER_VERSION:
        raise CorruptImage(
            CorruptReason.HEADER_VERSION,
            "unknown version",
            path=path,
            structure=place.structure,
            offset_bytes=place.offset_bytes,
            expected=layout.HEADER_VERSION,
            found=header.version,
        )
    return place


def _none_counts(path: str, places: tuple[HeaderPlace, HeaderPlace]) -> CorruptImage:
    first, second = places
    if first.state is second.state is HeaderState.GOOD:
        return CorruptImage(
            CorruptReason.HEADER_PAIR,
            f"both headers have the sequence number {first.header.sequence_number} but differ, so it is unknown which"
            " one is current",
            path=path,
            structure=second.structure,
            offset_bytes=second.offset_bytes,
        )
    outside = HeaderState.OUTSIDE in (first.state, second.state)
    return CorruptImage(
        CorruptReason.HEADER_OUTSIDE_FILE if outside else CorruptReason.HEADER_CHECKSUM,
        f"neither header is intact (header 1: {first.state}, header 2: {second.state})",
        path=path,
        structure=first.structure,
        offset_bytes=first.offset_bytes,
    )


def exhausted(path: str, place: HeaderPlace) -> CorruptImage | None:
    """The error if the sequence number cannot grow any further, so that the image can only be read; else None."""
    if place.header.sequence_number <= layout.MAX_HEADER_NUMBER:
        return None
    return CorruptImage(
        CorruptReason.HEADER_NUMBER,
        "the sequence number cannot be increased any further, so the image can only be read",
        path=path,
        structure=place.structure,
        offset_bytes=place.offset_bytes,
        expected=f"at most {layout.MAX_HEADER_NUMBER}",
        found=place.header.sequence_number,
        hint="convert it to a new image",
    )


def header_findings(path: str, places: tuple[HeaderPlace, HeaderPlace], current: HeaderPlace) -> list[Finding]:
    """What is worth reporting about the header that is not current."""
    other = places[1 - current.slot]
    if other.state is HeaderState.GOOD:
        return []
    message = f"{other.state}; the other header is used"
    return [Finding(Severity.WARNING, "header-damaged", message, path, other.structure, other.offset_bytes)]


def is_dirty(header: Header) -> bool:
    """Whether the log holds changes that may not have been applied to the file yet."""
    return header.log_guid != NULL_ID
