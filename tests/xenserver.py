# SPDX-License-Identifier: Apache-2.0
"""What XenServer and Xen Orchestra require of an image, applied to its bytes.

Facts about `vhd-util check`, `vhd-util coalesce` (blktap) and vhd-lib's readers, written independently: no code of the
library is used, so a rule that the library gets wrong is found here. It is stricter in two points: blocks of any size
are checked, and so is the last one, which the end of the disk may cut.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

SECTOR = 512
UNUSED = 0xFFFFFFFF
EPOCH = 946684800
CLOCK_SLACK = 1800  # seconds that a time stamp may lie in the future
DYNAMIC, DIFFERENCING = 3, 4
CODES = (b"MacX", b"Mac ", b"W2ku", b"W2ru", b"Wi2r", b"Wi2k")
READ_CODES = (b"MacX", b"W2ku", b"W2ru")
NOTHING = bytes(24)


class Bytes(Protocol):
    """A file, as it is read here."""

    def pread(self, offset_bytes: int, size_bytes: int) -> bytes:
        """The bytes at an offset."""
        ...

    def size(self) -> int:
        """The size in bytes."""
        ...


@dataclass(frozen=True, slots=True)
class OnDisk:
    """A file by its path."""

    path: Path

    def pread(self, offset_bytes: int, size_bytes: int) -> bytes:
        """See `Bytes`."""
        with self.path.open("rb") as file:
            return os.pread(file.fileno(), size_bytes, offset_bytes)

    def size(self) -> int:
        """See `Bytes`."""
        return self.path.stat().st_size


def faults_of(path: Path) -> list[str]:
    """Why XenServer or Xen Orchestra would refuse the image at `path`, its parents left out; empty if neither does."""
    return [f"{path.name}: {fault}" for fault in _Judge(OnDisk(path), path).faults()]


def faults_in(file: Bytes) -> list[str]:
    """The same for an image that has no path: whether its parent exists is not checked."""
    return list(_Judge(file, None).faults())


@dataclass
class _Judge:
    file: Bytes
    path: Path | None
    footer: bytes = b""
    header: bytes = b""
    starts: dict[int, int] = field(default_factory=dict)

    def faults(self) -> Iterator[str]:
        end = self.file.size()
        if end % SECTOR:
            yield f"a file of {end} bytes"
            return
        self.footer, copy = self.file.pread(end - SECTOR, SECTOR), self.file.pread(0, SECTOR)
        yield from self._of_footer()
        if self.footer != copy:
            yield "the footers differ"
        (place,) = struct.unpack_from(">Q", self.footer, 16)
        if place != SECTOR:
            yield f"the header lies at {place:#x}"  # Xen Orchestra
        self.header = self.file.pread(place, 1024)
        broken = list(self._of_header())
        yield from broken
        if broken:
            return
        yield from self._of_blocks()
        yield from self._of_batmap()
        yield from self._of_bitmaps()
        yield from self._of_parent()

    # -- fields -------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        return int(struct.unpack_from(">Q", self.footer, 48)[0])

    @property
    def is_child(self) -> bool:
        return struct.unpack_from(">I", self.footer, 60) == (DIFFERENCING,)

    @property
    def table_at(self) -> int:
        return int(struct.unpack_from(">Q", self.header, 16)[0])

    @property
    def stated_entries(self) -> int:
        return int(struct.unpack_from(">I", self.header, 28)[0])

    @property
    def block_size(self) -> int:
        return int(struct.unpack_from(">I", self.header, 32)[0])

    @property
    def bitmap_size(self) -> int:
        return _up(self.block_size // SECTOR // 8)

    @property
    def locators(self) -> list[tuple[bytes, int, int, int, int]]:
        """(code, space, length, reserved, offset) of the eight locators, as stored."""
        return [struct.unpack_from(">4sIIIQ", self.header, 576 + 24 * slot) for slot in range(8)]

    # -- rules --------------------------------------------------------------------------------------------------

    def _of_footer(self) -> Iterator[str]:
        raw = self.footer
        features, version, _, stamp = struct.unpack_from(">IIQI", raw, 8)
        original, current, cylinders, heads, sectors = struct.unpack_from(">QQHBB", raw, 40)
        if not raw.startswith(b"conectix") or not _sum_is_right(raw, 64):
            yield "no footer, or a wrong checksum"
        if features & ~1 != 2 or version != 0x00010000:
            yield "the footer's features or version"
        if stamp > time.time() - EPOCH + CLOCK_SLACK:
            yield "made in the future"
        if (cylinders, heads, sectors) > _largest_geometry(current):
            yield "the geometry is too large"
        if original > current:
            yield "the original size is larger than the current one"  # Xen Orchestra
        if struct.unpack_from(">I", raw, 60)[0] not in (DYNAMIC, DIFFERENCING):
            yield "the disk type"
        if not any(raw[68:84]) or raw[84] > 1 or raw[85] > 1 or any(raw[86:]):
            yield "the id, saved state, hidden or reserved bytes of the footer"

    def _of_header(self) -> Iterator[str]:
        raw = self.header
        if not raw.startswith(b"cxsparse") or not _sum_is_right(raw, 36):
            yield "no header, or a wrong checksum"
            return
        if raw[8:16] != b"\xff" * 8 or raw[24:28] != b"\0\1\0\0" or any(raw[60:64]) or any(raw[768:]):
            yield "the header's data offset, version or reserved bytes"
        table_end = self.table_at + 4 * self.stated_entries
        if not self.table_at or self.table_at % SECTOR or table_end > self.file.size() - SECTOR:
            yield "the place of the table"
        if self.stated_entries * self.block_size < self.size:
            yield "too few entries"
        if self.block_size & self.block_size - 1 or self.block_size > 2 << 20:
            yield "the block size"
        if not self.is_child and any(raw[40:60] + raw[64:768]):
            yield "a parent of a disk that has none"

    def _end_of_headers(self) -> int:
        places = [(struct.unpack_from(">Q", self.footer, 16)[0], 1024), (self.table_at, _up(4 * self.stated_entries))]
        places += [(at, _space(space)) for code, space, _, _, at in self.locators if any(code)]
        if self._has_batmap():
            header = self._batmap_at()
            at, sectors = struct.unpack_from(">QI", self.file.pread(header, SECTOR), 8)
            places += [(header, SECTOR), (at, sectors * SECTOR)]
        return max(int(at + size) for at, size in places)

    def _of_blocks(self) -> Iterator[str]:
        count = -(-self.size // self.block_size)
        entries = struct.unpack(f">{count}I", self.file.pread(self.table_at, 4 * count))
        self.starts = {block: entry * SECTOR for block, entry in enumerate(entries) if entry != UNUSED}
        eoh, end, whole = self._end_of_headers(), self.file.size() - SECTOR, self.bitmap_size + self.block_size
        before = 0
        for start, block in sorted((start, block) for block, start in self.starts.items()):
            if start < eoh:
                yield f"block {block} at {start:#x} clobbers headers, which end at {eoh:#x}"
            if start + whole > end:
                yield f"block {block} clobbers the footer"
            if start < before:
                yield f"block {block} clobbers another one"
            before = start + whole

    def _has_batmap(self) -> bool:
        creator, version = self.footer[28:32], struct.unpack_from(">I", self.footer, 32)[0]
        return creator == b"tap\0" and version >= 0x00010001 and self.file.pread(self._batmap_at(), 8) == b"tdbatmap"

    def _batmap_at(self) -> int:
        return _up(self.table_at + 4 * self.stated_entries)

    def _of_batmap(self) -> Iterator[str]:
        if not self._has_batmap():
            return
        raw = self.file.pread(self._batmap_at(), SECTOR)
        at, sectors, version, stored = struct.unpack_from(">QIII", raw, 8)
        body = self.file.pread(at, sectors * SECTOR)
        if (
            at % SECTOR
            or at + sectors * SECTOR > self.file.size() - SECTOR
            or sectors * SECTOR * 8 < self.stated_entries
        ):
            yield "the place or size of the batmap"
        if version > 0x00010002 or ~sum(body) & 0xFFFFFFFF != stored:
            yield "the version or checksum of the batmap"
        for block in range(-(-self.size // self.block_size)):
            if not body[block // 8] & 0x80 >> block % 8:
                continue
            if block not in self.starts:
                yield f"the batmap shows block {block} full, which has no space"
            elif (block + 1) * self.block_size > self.size:
                yield f"coalescing writes all of block {block}, behind the end of the disk"

    def _of_bitmaps(self) -> Iterator[str]:
        for block, start in self.starts.items():
            bits = self.file.pread(start, self.block_size // SECTOR // 8)
            inside = (self.size - block * self.block_size) // SECTOR
            number = int.from_bytes(bits, "big")
            behind = 8 * len(bits) - inside
            if behind > 0 and number & (1 << behind) - 1:
                yield f"bits of block {block} behind the end of the disk: coalescing fails"
            if number == (1 << 8 * len(bits)) - 1:
                continue
            data = self.file.pread(start + self.bitmap_size, self.block_size)
            for sector in range(8 * len(bits)):
                clear = not bits[sector // 8] & 0x80 >> sector % 8
                if clear and any(data[sector * SECTOR : (sector + 1) * SECTOR]):
                    yield f"sector {sector} of block {block} has data where the bitmap is clear"
                    break

    def _of_parent(self) -> Iterator[str]:
        if not self.is_child:
            return
        if struct.unpack_from(">I", self.header, 56)[0] > time.time() - EPOCH + CLOCK_SLACK:
            yield "a parent of the future"
        name = self.header[64:576].decode("utf-16-be").split("\0", 1)[0].replace("\\", "/")
        seen: list[bytes] = []
        for slot, (code, space, length, reserved, at) in enumerate(self.locators):
            if not any(code):
                if self.header[576 + 24 * slot : 600 + 24 * slot] != NOTHING:
                    yield f"locator {slot} is not empty"
                continue
            if code not in CODES or code in seen or not at or not space or not length or reserved:
                yield f"locator {slot} of kind {code!r}"
            if at + _space(space) > self.file.size() - SECTOR:
                yield f"locator {slot} lies over the footer"
            seen.append(code)
            if code in READ_CODES:
                yield from self._of_locator(slot, code, self.file.pread(at, length), name)
        if not any(code in READ_CODES for code in seen):
            yield "no locator that is read"

    def _of_locator(self, slot: int, code: bytes, raw: bytes, name: str) -> Iterator[str]:
        text = raw.decode("utf-8").removeprefix("file://") if code == b"MacX" else raw.decode("utf-16-le")
        text = text.replace("\\", "/")
        if not text.isascii() or os.path.basename(text) != name:
            yield f"locator {slot} says {text!r}, the header {name!r}"
        if self.path is None:
            return
        found = Path(text) if text.startswith("/") and Path(text).exists() else self.path.parent / text.lstrip("/")
        if not found.exists():
            yield f"locator {slot} leads to {text!r}, where nothing is"
        elif OnDisk(found).pread(found.stat().st_size - SECTOR, SECTOR)[68:84] != self.header[40:56]:
            yield f"locator {slot} leads to a parent with another id"


def _up(size: int) -> int:
    return -(-size // SECTOR) * SECTOR


def _space(space: int) -> int:
    """Sectors, or bytes, from one sector on."""
    return space * SECTOR if space < SECTOR else space


def _sum_is_right(raw: bytes, at: int) -> bool:
    return struct.unpack_from(">I", raw, at) == (~(sum(raw) - sum(raw[at : at + 4])) & 0xFFFFFFFF,)


def _largest_geometry(size: int) -> tuple[int, int, int]:
    """The geometry of a disk of this size, calculated as in the specification."""
    count = min(max(-(-size // SECTOR), 1), 65535 * 16 * 255)
    if count >= 65535 * 16 * 63:
        return count // 255 // 16, 16, 255
    tracks = count // 17
    heads = max((tracks + 1023) // 1024, 4)
    if tracks < heads * 1024 and heads <= 16:
        return tracks // heads, heads, 17
    tracks = count // 31
    if tracks < 16 * 1024:
        return tracks // 16, 16, 31
    return count // 63 // 16, 16, 63
