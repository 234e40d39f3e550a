# SPDX-License-Identifier: Apache-2.0
"""The two footers of a VHD: where they are, whether each is valid, and which one is used.

Decides between the trailing footer and its copy, and how a damaged one is reported. Must not know the header or the
BAT (`metadata`).

    offset 0                                end - 512
    | footer copy | ...                     | footer |      dynamic and differencing images
    | the guest's first sector ...          | footer |      fixed images

The trailing footer has priority: in a fixed image the first sector belongs to the guest, which could write something
like a footer there. `INV-FOOTER-COPY`: if either one is good, the image opens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from vhdkit.errors import CorruptImage, CorruptReason
from vhdkit.finding import Finding, Severity, left_by_repair
from vhdkit.formats.vhd import geometry, layout
from vhdkit.formats.vhd.layout import Footer
from vhdkit.formats.vhd.padding import footer_before_zeros
from vhdkit.formats.vhd.room import end_of_room
from vhdkit.store import ReadStore
from vhdkit.units import SECTOR_SIZE

_KILLED_BYTE = 0xC7  # tapdisk fills the trailing footer with it while it holds the image for writing


class FooterState(StrEnum):
    """What is found in the place of a footer."""

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
        """True when the footer can be used."""
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
        """The fields, valid or not."""
        return layout.parse_footer(self.raw)


def footer_state(raw: bytes) -> FooterState:
    """The state of the bytes in the place of a footer, 512 or 511 of them."""
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
    """The footer at the end of the file, or before zeros there, and the copy. Raises only for I/O errors."""
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

    Never for the footer of a fixed image, whose beginning belongs to the guest.
    """
    if not (tail.state.usable and copy.state.usable):
        return False
    is_fixed = layout.DISK_TYPE_FIXED in (tail.footer.disk_type, copy.footer.disk_type)
    return not is_fixed and tail.footer.unique_id != copy.footer.unique_id


def image_id(store: ReadStore) -> bytes:
    """The id by which other images name this one: its footer's, or all zeros without a good footer (a raw image)."""
    for place in read_footers(store):
        if place.state.usable:
            return place.footer.unique_id
    return bytes(layout.UUID_SIZE)


def looks_like_vhd(store: ReadStore) -> bool:
    """True when there is a footer, good or damaged, at either place."""
    tail, copy = read_footers(store)
    strange = (FooterState.ABSENT, FooterState.KILLED)  # 0xC7 alone proves nothing: any raw disk may end with it
    return tail.state not in strange or copy.state not in strange


_REASON = {
    FooterState.ABSENT: CorruptReason.NO_FOOTER,
    FooterState.KILLED: CorruptReason.NO_FOOTER,
    FooterState.CHECKSUM: CorruptReason.FOOTER_CHECKSUM,
    FooterState.VERSION: CorruptReason.FOOTER_VERSION,
    FooterState.POISONED: CorruptReason.FOOTER_POISONED,
}


def choose(path: str, tail: FooterPlace, copy: FooterPlace) -> FooterPlace:
    """The footer to use. Raises CorruptImage if neither can be used."""
    if tail.state.usable:
        return tail
    if copy.state.usable and copy.footer.disk_type != layout.DISK_TYPE_FIXED:
        return copy
    # A good footer here is a fixed disk's, at offset 0: data of the guest, which proves nothing about the file.
    silent = (FooterState.ABSENT, FooterState.KILLED, FooterState.GOOD)
    fault = next((place for place in (tail, copy) if place.state not in silent), tail)
    hint = None
    if fault.state is FooterState.POISONED:
        hint = "finish or revert the resize with the tool that started it"
    problem = "no VHD footer here, and no good copy at the beginning of the file"
    if fault.state is not FooterState.ABSENT:
        problem = f"no usable footer: {fault.state}, and the other one is not usable either"
    raise CorruptImage(
        _REASON[fault.state],
        problem,
        path=path,
        structure=fault.structure,
        offset_bytes=fault.offset_bytes,
        hint=hint,
    )


def footer_findings(path: str, tail: FooterPlace, copy: FooterPlace | None, footer: Footer) -> list[Finding]:
    """Findings about footers that do not prevent reading."""
    findings = []
    for place in (tail, copy):
        if place is None or place.state is FooterState.GOOD:
            continue
        severity = Severity.NOTE if place.state is FooterState.SHORT else Severity.WARNING
        message = f"{place.state}" + ("" if place.state.usable else "; the other footer is used")
        if place.state in (FooterState.KILLED, FooterState.POISONED):
            message = left_by_repair(
                message, "without --writer-is-dead it must assume that the other program is still writing"
            )
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
                    "a guest may have seen either; all programs read a copy made by `vhdkit convert` alike",
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
                    "some programs include the rest of the last one, others do not; all programs read a copy made by"
                    " `vhdkit convert` alike",
                ),
                path,
            )
        )
    return findings


def padding_findings(store: ReadStore, tail: FooterPlace) -> list[Finding]:
    """A fixed image that was extended as if it were a raw disk."""
    padding = store.size() - tail.offset_bytes - len(tail.raw)
    if not padding:
        return []
    message = f"{padding} bytes of zeros follow the footer: the file was extended as if it were a raw disk"
    return [Finding(Severity.WARNING, "padding", message, store.name, tail.structure, tail.offset_bytes)]
