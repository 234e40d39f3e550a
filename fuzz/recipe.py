# SPDX-License-Identifier: Apache-2.0
"""A folder full of hostile images as a few bytes: what `fuzz_chain` reads and `make_corpus` writes.

Decides the grammar. Every input means some folder: missing bytes are zeros, numbers are taken modulo what there is
to choose from. In texts `%R` stands for the real path of the allowed folder and `%O` for a folder outside.

    flags u8 | files u8 | per file: name u8, kind u8, id u8, parent id u8, shape u8, name text, locators u8,
    per locator: code u8, flavour u8, text | patches u8, per patch: offset u16, text        (text: length u16, bytes)
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

from tests.harness.stores import MemStore
from tests.harness.vhd_builder import DIFFERENCING, DYNAMIC, FIXED, GIB, KIB, MIB, Block, Locator, Vhd, put, seal
from vhdkit.formats.vhdx.crc import sealed
from vhdkit.formats.vhdx.create import create, new_disk
from vhdkit.image import ParentName, ParentRef

MAX_FILES = 6
# The leaf is file 0 and always gets the first name. The case of names differs on purpose.
NAMES = (
    "leaf.vhd", "parent.vhd", "base.vhd", "sub/inner.vhd", "Parent.VHD", "SUB2/deep/other.vhd", "link.vhd",
    "folder.vhd", "pipe.vhd", "näme with  spaces.vhd", "-dash.vhd", "new\nline\x1b[31m.vhd", "linkdir/through.vhd",
    "%2e%2e", "C:\\odd\\name.vhd", "a" * 250 + ".vhd",
)  # fmt: skip
DIFF, DYN, FIX, RAW, LINK, PIPE, FOLDER, HARD, EMPTY, DIFF_X, DYN_X = range(11)  # the last two are VHDX
KINDS = 11
CODES = (b"W2ru", b"W2ku", b"MacX", b"Wi2r", b"Wi2k", b"Mac ", b"\x1b[2J")
VHDX_KEYS = (
    "relative_path", "absolute_win32_path", "volume_path", "relative_path", "volume_path", "note", "\x1b[2J",
)  # fmt: skip
_ENCODINGS = ("utf-16-le", "utf-16-le", "utf-8", "latin-1", "latin-1", "utf-8", "utf-8")
IDS = 6  # 0 is all zeros, which records a raw parent
ALLOW_RAW, ALLOW_EXTRA, NO_LOCK, WRITABLE = 1, 2, 4, 8


def id_of(number: int) -> bytes:
    """One of a few unique ids."""
    return bytes([number % IDS]) * 16


class Reader:
    """Bytes taken from the front; zeros when there are no more."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def u8(self) -> int:
        """The next byte."""
        return self.take(1).ljust(1, b"\0")[0]

    def u16(self) -> int:
        """The next two bytes, big-endian."""
        return int.from_bytes(self.take(2).ljust(2, b"\0"), "big")

    def take(self, count: int) -> bytes:
        """Up to `count` bytes."""
        piece = self._data[self._at : self._at + count]
        self._at += count
        return piece

    def text(self) -> bytes:
        """A length and that many bytes."""
        return self.take(self.u16())


@dataclass
class Link:
    """One locator: `flavour` 1 keeps the bytes as they are, 2 claims a wild length, 3 an offset far away."""

    code: int
    text: bytes
    flavour: int = 0


@dataclass
class Entry:
    """One file of the folder."""

    name: int = 0
    kind: int = DIFF
    own_id: int = 1
    parent_id: int = 2
    shape: int = 0
    parent_name: bytes = b""
    links: list[Link] = field(default_factory=list)
    patches: list[tuple[int, bytes]] = field(default_factory=list)

    @property
    def path(self) -> str:
        """Its name within the folder."""
        return NAMES[self.name]


@dataclass
class Recipe:
    """All of it."""

    flags: int = 0
    entries: list[Entry] = field(default_factory=lambda: [Entry()])

    def encode(self) -> bytes:
        """The input that means this folder."""
        raw = bytes([self.flags, len(self.entries) - 1])
        for one in self.entries:
            raw += bytes([one.name, one.kind, one.own_id, one.parent_id, one.shape]) + _text(one.parent_name)
            raw += bytes([len(one.links)])
            raw += b"".join(bytes([link.code, link.flavour]) + _text(link.text) for link in one.links)
            raw += bytes([len(one.patches)])
            raw += b"".join(struct.pack(">H", offset) + _text(piece) for offset, piece in one.patches)
        return raw


def _text(raw: bytes) -> bytes:
    return struct.pack(">H", len(raw)) + raw


def parse(data: bytes) -> Recipe:
    """The folder that `data` means."""
    reader = Reader(data)
    flags, count = reader.u8(), reader.u8() % MAX_FILES + 1
    entries = []
    for index in range(count):
        one = Entry(reader.u8() % len(NAMES), reader.u8() % KINDS, reader.u8() % IDS, reader.u8() % IDS, reader.u8())
        if index == 0:
            one.name, one.kind = 0, one.kind if one.kind in (DIFF, DYN, FIX, DIFF_X, DYN_X) else DIFF
        one.parent_name = reader.text()
        for _ in range(reader.u8() % 9):
            code, flavour = reader.u8() % len(CODES), reader.u8() % 4
            one.links.append(Link(code, reader.text(), flavour))
        one.patches = [(reader.u16(), reader.text()) for _ in range(reader.u8() % 4)]
        entries.append(one)
    return Recipe(flags, entries)


def build(recipe: Recipe, root: Path, outside: Path) -> Path:
    """Put the folder on disk, in `root`; returns the leaf. A name that cannot be is left out, but for the leaf's."""
    for one in recipe.entries:
        path = root / one.path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.parent.resolve().is_relative_to(root) or os.path.lexists(path):
                continue
            _place(one, path, root, outside)
        except (OSError, ValueError):
            if one is recipe.entries[0]:
                raise
    return root / NAMES[0]


def _place(one: Entry, path: Path, root: Path, outside: Path) -> None:
    if one.kind == LINK:
        path.symlink_to(os.fsdecode(_filled(one.parent_name, root, outside)) or "leaf.vhd")
    elif one.kind == PIPE:
        os.mkfifo(path)
    elif one.kind == FOLDER:
        path.mkdir()
    elif one.kind == HARD:
        os.link(root / NAMES[0], path)
    elif one.kind in (RAW, EMPTY):
        path.write_bytes(one.parent_name if one.kind == RAW else b"")
    elif one.kind in (DIFF_X, DYN_X):
        vhdx_image(one, root, outside).write(path)
    else:
        image(one, root, outside).build().write(path)
        if one.patches:
            _patch(one, path)


def _filled(text: bytes, root: Path, outside: Path) -> bytes:
    return text.replace(b"%R", os.fsencode(root)).replace(b"%O", os.fsencode(outside))


def image(one: Entry, root: Path, outside: Path) -> Vhd:
    """The image of an entry that is one."""
    vhd = Vhd(
        size=MIB << (one.shape & 3),
        block_size=(512 * KIB) << (one.shape >> 2 & 1),
        disk_type={DIFF: DIFFERENCING, DYN: DYNAMIC}.get(one.kind, FIXED),
        unique_id=id_of(one.own_id),
        parent_id=id_of(one.parent_id),
        parent_timestamp=one.shape,
        hidden=one.shape >> 7,
    )
    if one.kind == FIX:
        return vhd
    vhd.blocks = {
        one.shape >> 3 & int(vhd.needed_entries > 1): Block(b"x" * 512, bits=b"\x80" if one.shape & 0x10 else None)
    }
    vhd.parent_name = _filled(one.parent_name, root, outside).decode("utf-8", "replace").encode("utf-16-be")[:512]
    for slot, link in enumerate(one.links[:8]):
        raw = _filled(link.text, root, outside)
        if link.flavour != 1:
            raw = raw.decode("utf-8", "replace").encode(_ENCODINGS[link.code], "replace")
        place = Locator(CODES[link.code], raw)
        if link.flavour == 2:
            place.length = (len(raw) << one.shape % 24) & 0xFFFFFFFF
        elif link.flavour == 3:
            place.offset = GIB << one.shape % 33
        vhd.locators[slot] = place
    return vhd


class _Sectors(MemStore):
    """An image in memory that can be put on disk."""

    def write(self, path: Path) -> None:
        """Make it a sparse file."""
        with path.open("wb") as file:
            file.truncate(self.size())
            for number, raw in self._sectors.items():
                file.seek(number * len(raw))
                file.write(raw)


def vhdx_image(one: Entry, root: Path, outside: Path) -> _Sectors:
    """The VHDX of an entry that is one. Patches lie over its locator, or over the start of its BAT."""
    store = _Sectors("image.vhdx")
    names: list[ParentName] = []
    for link in one.links:
        text = _filled(link.text, root, outside).decode("utf-8", "replace")[:30000]
        key = VHDX_KEYS[link.code]
        if text and key not in [name.structure for name in names]:
            names.append(ParentName(key, text))
    parent = ParentRef((id_of(one.parent_id), id_of(one.parent_id + 1 if one.shape & 0x20 else 0)), 0, tuple(names))
    block = MIB << (one.shape >> 2 & 1)
    create(store, new_disk(MIB << (one.shape & 3)), block, parent=parent if one.kind == DIFF_X else None)
    if one.shape & 0x18:
        start = store.size()
        store.truncate(start + block)
        store.pwrite(start, b"x" * 512)
        state = 7 if one.shape & 0x10 and one.kind == DIFF_X else 6
        store.pwrite(3 * MIB, (start | state).to_bytes(8, "little"))
        if state == 7:
            bits = store.size()
            store.truncate(bits + MIB)
            store.pwrite(bits, b"\x01")
            store.pwrite(3 * MIB + 8 * (4 * GIB // block), (bits | 6).to_bytes(8, "little"))
    for slot in (64 * KIB, 128 * KIB):
        raw = store.pread(slot, 4 * KIB)
        store.pwrite(slot, sealed(put(raw, 32, id_of(one.own_id)), 4))
    for offset, piece in one.patches:
        within = offset % 2048
        store.pwrite((2 * MIB + 64 * KIB if offset & 2048 else 3 * MIB) + within, piece[: 4 * KIB])
    return store


def _patch(one: Entry, path: Path) -> None:
    """Lay bytes over the first 4 KiB and make the checksums right again."""
    with path.open("r+b") as file:
        head = file.read(4096)
        for offset, piece in one.patches:
            head = put(head, offset % 4096, piece)[:4096]
        if len(head) >= 1536 and one.kind != FIX:
            head = seal(head[:512], 64) + seal(head[512:1536], 36) + head[1536:]
        file.seek(0)
        file.write(head)
