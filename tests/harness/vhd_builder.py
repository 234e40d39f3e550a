# SPDX-License-Identifier: Apache-2.0
"""VHD images built from the specification alone: the odd, old, damaged and hostile ones that vhdkit never writes.

Independent of the library on purpose: every field is packed here once more, from the text of the specification,
so a wrong offset in `layout.py` cannot stay hidden. Every value can be set, even to a senseless one. The
checksums are right unless a test breaks them.

    image = Vhd(size=4 * MIB, blocks={1: Block(b"hello")})       what the file is to contain
    image.build().store()  or  .write(path)                      the file, sparse, in memory or on disk
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

from tests.harness.stores import MemStore

SECTOR = 512
KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB
ALL_ONES_64 = 0xFFFFFFFFFFFFFFFF
FREE = 0xFFFFFFFF  # a BAT entry that means: not allocated

FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4
DEFAULT_ID = bytes(range(0x10, 0x20))
PARENT_ID = bytes(range(0xA0, 0xB0))


def round_up(value: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return (value + unit - 1) // unit * unit


def checksum(raw: bytes, at: int) -> int:
    """Specification: "one's complement of the sum of all the bytes in the footer without the checksum field"."""
    total = 0
    for position, byte in enumerate(raw):
        if not at <= position < at + 4:
            total += byte
    return 0xFFFFFFFF - (total & 0xFFFFFFFF)


def seal(raw: bytes, at: int) -> bytes:
    """`raw` with a correct checksum at offset `at`."""
    return raw[:at] + struct.pack(">I", checksum(raw, at)) + raw[at + 4 :]


def seal_footer(raw: bytes) -> bytes:
    """A footer with a correct checksum, at 64."""
    return seal(raw, 64)


def seal_header(raw: bytes) -> bytes:
    """A dynamic header with a correct checksum, at 36."""
    return seal(raw, 36)


def put(raw: bytes, at: int, piece: bytes) -> bytes:
    """`raw` with `piece` over it at `at`."""
    return raw[:at] + piece + raw[at + len(piece) :]


def bits_of(sectors: set[int], block_size: int) -> bytes:
    """The bitmap of a block that owns these sectors, the most significant bit first, without padding."""
    raw = bytearray(block_size // SECTOR // 8)
    for sector in sectors:
        raw[sector // 8] |= 0x80 >> sector % 8
    return bytes(raw)


def bitmap_space(block_size: int) -> int:
    """Bytes a bitmap takes in the file."""
    return round_up(block_size // SECTOR // 8, SECTOR)


@dataclass
class Block:
    """One block: its data from `at` on (the rest is zeros), its bitmap (None: all ones), its place (None: the next
    one)."""

    data: bytes = b""
    bits: bytes | None = None
    at: int = 0
    start: int | None = None


@dataclass
class Locator:
    """One parent locator: `data` as it is stored in the file. None where the builder chooses."""

    code: bytes
    data: bytes
    space: int | None = None
    length: int | None = None
    offset: int | None = None


def relative(path: str) -> Locator:
    """A W2ru locator, UTF-16 little-endian."""
    return Locator(b"W2ru", path.encode("utf-16-le"))


def absolute(path: str) -> Locator:
    """A W2ku locator."""
    return Locator(b"W2ku", path.encode("utf-16-le"))


@dataclass
class Built:
    """A finished file: its pieces, and zeros everywhere else."""

    size: int
    pieces: list[tuple[int, bytes]]
    starts: dict[int, int]  # of the blocks' bitmaps, by block
    footer_at: int

    def store(self, name: str = "built.vhd", *, frozen: bool = False) -> MemStore:
        """The file in memory."""
        store = MemStore(name)
        store.truncate(self.size)
        for offset, raw in self.pieces:
            store.pwrite(offset, raw[: max(self.size - offset, 0)])
        store.frozen = frozen
        return store

    def write(self, path: Path) -> Path:
        """The file on disk, with holes."""
        with path.open("wb") as file:
            file.truncate(self.size)
            for offset, raw in self.pieces:
                file.seek(offset)
                file.write(raw[: max(self.size - offset, 0)])
        return path


@dataclass
class Vhd:
    """What the file is to contain. Sizes and offsets in bytes. The defaults make a plain, sound dynamic disk."""

    size: int = 4 * MIB  # current size
    disk_type: int = DYNAMIC
    creator: bytes = b"win "
    creator_version: int = 0x000A0000
    host_os: bytes = b"Wi2k"
    original_size: int | None = None
    chs: tuple[int, int, int] = (0, 0, 0)
    unique_id: bytes = DEFAULT_ID
    features: int = 2
    footer_version: int = 0x00010000
    timestamp: int = 0x20DC6568
    saved_state: int = 0
    hidden: int = 0
    data: bytes = b""  # of a fixed disk, from its first byte
    data_size: int | None = None  # of a fixed disk, where its footer goes; None: the size

    header_offset: int = 512
    header_version: int = 0x00010000
    table_offset: int | None = None  # None: behind the header
    entry_count: int | None = None  # max_table_entries; None: as many as the size needs
    entries: dict[int, int] = field(default_factory=dict)  # BAT entries to falsify, in sectors
    junk: bytes | None = None  # behind the BAT entries that are needed; None: ones up to the sector
    block_size: int = 2 * MIB
    blocks: dict[int, Block] = field(default_factory=dict)  # in their order in the file
    aligned: bool = False  # data on 4 KiB boundaries
    first_block: int | None = None  # None: behind everything else
    parent_id: bytes = bytes(16)
    parent_timestamp: int = 0
    parent_name: bytes = b""  # raw, UTF-16 big-endian
    locators: dict[int, Locator] = field(default_factory=dict)  # by slot
    batmap: bytes | None = None  # bits; XenServer's, needs creator tap\0 and version 0x00010001 or later

    footer_size: int = 512
    tail: bytes | None = None  # instead of the footer at the end; b"": none at all
    copy: bytes | None = None  # instead of the footer copy
    footer_at: int | None = None  # where the trailing footer goes; None: behind everything

    @property
    def needed_entries(self) -> int:
        """The number of blocks that the size needs."""
        return -(-self.size // self.block_size)

    @property
    def table_at(self) -> int:
        """Where the BAT begins."""
        return self.header_offset + 1024 if self.table_offset is None else self.table_offset

    def footer(self) -> bytes:
        """The 512 bytes of the footer, field after field as in the specification."""
        original = self.size if self.original_size is None else self.original_size
        offset = ALL_ONES_64 if self.disk_type == FIXED else self.header_offset
        raw = b"conectix"
        raw += struct.pack(">II", self.features, self.footer_version)
        raw += struct.pack(">QI", offset, self.timestamp)
        raw += self.creator + struct.pack(">I", self.creator_version) + self.host_os
        raw += struct.pack(">QQ", original, self.size)
        raw += struct.pack(">HBB", *self.chs)
        raw += struct.pack(">II", self.disk_type, 0)
        raw += self.unique_id
        raw += struct.pack(">BB", self.saved_state, self.hidden)
        raw += bytes(427 - 1)
        assert len(raw) == 512
        return seal_footer(raw)

    def header(self, entries: list[bytes] | None = None) -> bytes:
        """The 1024 bytes of the dynamic header; `entries` are its eight locator entries."""
        count = self.needed_entries if self.entry_count is None else self.entry_count
        raw = b"cxsparse"
        raw += struct.pack(">QQ", ALL_ONES_64, self.table_at)
        raw += struct.pack(">III", self.header_version, count, self.block_size)
        raw += struct.pack(">I", 0)
        raw += self.parent_id + struct.pack(">II", self.parent_timestamp, 0)
        raw += self.parent_name.ljust(512, b"\0")
        raw += b"".join(entries if entries is not None else [bytes(24)] * 8)
        raw += bytes(256)
        assert len(raw) == 1024
        return seal_header(raw)

    def build(self) -> Built:
        """Lay the file out: copy, header, BAT, locators, batmap, blocks, footer."""
        footer = self.footer()
        tail = footer[: self.footer_size] if self.tail is None else self.tail
        if self.disk_type == FIXED:
            end = self.size if self.data_size is None else self.data_size
            return Built(end + len(tail), [(0, self.data), (end, tail)], {}, end)
        pieces: list[tuple[int, bytes]] = []
        end = self.table_at + round_up(max(self.needed_entries, self.entry_count or 0) * 4, SECTOR)
        end = self._place_batmap(pieces, end)
        entries, end = self._place_locators(pieces, end)
        end = max(end, self.header_offset + 1024)
        starts, end = self._place_blocks(pieces, end if self.first_block is None else self.first_block)
        end = max([end, *(offset + len(raw) for offset, raw in pieces)])
        pieces.append((self.table_at, self._table(starts)))
        pieces.append((0, footer if self.copy is None else self.copy))
        pieces.append((self.header_offset, self.header(entries)))
        footer_at = end if self.footer_at is None else self.footer_at
        pieces.append((footer_at, tail))
        return Built(footer_at + len(tail), pieces, starts, footer_at)

    def _place_batmap(self, pieces: list[tuple[int, bytes]], end: int) -> int:
        if self.batmap is None:
            return end
        body = self.batmap.ljust(round_up(len(self.batmap), SECTOR), b"\0")
        raw = b"tdbatmap" + struct.pack(">QII", end + SECTOR, len(body) // SECTOR, 0x00010002)
        raw += struct.pack(">IB", 0xFFFFFFFF - sum(body), 0)
        pieces.append((end, raw.ljust(SECTOR, b"\0") + body))
        return end + SECTOR + len(body)

    def _place_locators(self, pieces: list[tuple[int, bytes]], end: int) -> tuple[list[bytes], int]:
        entries = [bytes(24)] * 8
        for slot, one in self.locators.items():
            offset = end if one.offset is None else one.offset
            space = round_up(len(one.data), SECTOR)
            stated = space if one.space is None else one.space
            length = len(one.data) if one.length is None else one.length
            entries[slot] = one.code + struct.pack(">IIIQ", stated, length, 0, offset)
            if one.offset is None or one.offset < GIB:
                pieces.append((offset, one.data))
            if one.offset is None:
                end += space
        return entries, end

    def _place_blocks(self, pieces: list[tuple[int, bytes]], end: int) -> tuple[dict[int, int], int]:
        starts = {}
        space = bitmap_space(self.block_size)
        for index, block in self.blocks.items():
            start = end if block.start is None else block.start
            if self.aligned and block.start is None:
                start = round_up(end + space, 4096) - space
            starts[index] = start
            bits = b"\xff" * space if block.bits is None else block.bits
            pieces.append((start, bits.ljust(space, b"\0")))
            pieces.append((start + space + block.at, block.data))
            end = max(end, start + space + self.block_size)
        return starts, end

    def _table(self, starts: dict[int, int]) -> bytes:
        raw = bytearray(b"\xff" * (self.needed_entries * 4))
        for index, start in starts.items():
            struct.pack_into(">I", raw, index * 4, start // SECTOR)
        for index, entry in self.entries.items():
            struct.pack_into(">I", raw, index * 4, entry)
        if self.junk is not None:
            return bytes(raw) + self.junk
        stated = max(self.entry_count or 0, self.needed_entries)
        return bytes(raw).ljust(round_up(min(stated * 4, len(raw) + MIB), SECTOR), b"\xff")


def child(parent: str = "parent.vhd", **fields: object) -> Vhd:
    """A differencing image that names its parent in a W2ru locator and in its header."""
    values: dict[str, object] = {
        "disk_type": DIFFERENCING,
        "parent_id": PARENT_ID,
        "parent_name": parent.encode("utf-16-be"),
        "locators": {0: relative(".\\" + parent)},
        "unique_id": bytes(range(0xC0, 0xD0)),
    }
    return Vhd(**(values | fields))  # type: ignore[arg-type]  # every name is one of Vhd's


def pattern(size: int, seed: int = 1) -> bytes:
    """Bytes that differ from sector to sector and from seed to seed; no sector of them is zeros."""
    sectors = -(-size // SECTOR)
    return b"".join(struct.pack(">I", 1 << 31 | seed << 20 | one) * (SECTOR // 4) for one in range(sectors))[:size]
