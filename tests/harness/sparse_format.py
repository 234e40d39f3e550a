# SPDX-License-Identifier: Apache-2.0
"""A made-up format, to prove that the contract of a format is whole: sectors of 4096 bytes, found by a table.

    0       4096    8192            round_up(table)
    | slot | slot | table of u32 ... | pages of 4096 bytes ...

A slot holds a header; the valid one with the higher turn counts, and only the other one is ever written. A table entry
is the page of a sector in the file, 0 for one without space. Its ids are its own rule: children do not record the id
of the file but another one, which changes with the first write of each session. A child may record several.

    first write of a session: header with the new id -> sync
    new page: data -> sync -> table -> sync        in a page that exists: in place, so nothing is ever used again
"""

from __future__ import annotations

import json
import struct
import threading
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vhdkit import errors
from vhdkit.errors import CorruptImage, CorruptReason
from vhdkit.finding import Finding, Severity
from vhdkit.formats.draft import DraftStore
from vhdkit.formats.format import Compactable, Consent, CreateRequest, Fix, ImageDetails, Resizable, StructureDump
from vhdkit.formats.guard import SyncGuard
from vhdkit.image import (
    Extent,
    ExtentKind,
    ImageFacts,
    Layer,
    NameDialect,
    ParentName,
    ParentRef,
    Piece,
    copy_piece,
)
from vhdkit.store import ReadStore, Store
from vhdkit.units import PAGE_SIZE, SECTOR_SIZE, round_up, sectors_to_bytes, whole_sectors

NAME = "sparse"
# Magic, CRC of the rest, turn, size, file id, linkage id, length of the parent.
_HEADER = struct.Struct(">8sIQQ16s16sH")
_MAGIC = b"SPARSE-1"
_TABLE = 2 * PAGE_SIZE
_PER_PAGE = whole_sectors(PAGE_SIZE)


@dataclass(frozen=True, order=True)
class _Header:
    turn: int
    size_bytes: int
    file_id: bytes
    linkage_id: bytes
    parent: bytes

    def slot(self) -> bytes:
        """The bytes of a slot."""
        fields = (self.turn, self.size_bytes, self.file_id, self.linkage_id, len(self.parent))
        rest = _HEADER.pack(_MAGIC, 0, *fields)[12:] + self.parent
        if len(rest) > PAGE_SIZE - 12:
            raise errors.InvalidArgument("the names of the parent are too long to be stored")
        rest = rest.ljust(PAGE_SIZE - 12, b"\0")
        return _MAGIC + zlib.crc32(rest).to_bytes(4, "big") + rest


def _read(store: ReadStore) -> _Header | None:
    """The active header, or None."""
    found = []
    for place in (0, PAGE_SIZE):
        raw = store.pread(place, PAGE_SIZE)
        if raw.startswith(_MAGIC) and zlib.crc32(raw[12:]) == int.from_bytes(raw[8:12], "big"):
            *_, turn, size, file_id, linkage_id, length = _HEADER.unpack_from(raw)
            found.append(_Header(turn, size, file_id, linkage_id, raw[_HEADER.size : _HEADER.size + length]))
    return max(found, default=None)


def _switch(store: Store, **changes: bytes) -> None:
    """Write a header with these changes into the inactive slot; the caller syncs."""
    header = _read(store)
    assert header is not None
    slot = replace(header, turn=header.turn + 1, **changes).slot()  # type: ignore[arg-type]
    store.pwrite(header.turn % 2 * PAGE_SIZE, slot)


def _parent_document(parent: ParentRef) -> bytes:
    names = [[one.structure, one.text, one.dialect] for one in parent.names]
    return json.dumps([[one.hex() for one in parent.linkage_ids], parent.timestamp, names]).encode()


def _data_start(size_bytes: int) -> int:
    return round_up(_TABLE + size_bytes // PAGE_SIZE * 4, PAGE_SIZE)


class SparseLayer:
    """See `Layer`: every allocated block is one sector of 4096 bytes, wholly owned."""

    format_name = NAME
    sector_bytes = block_size_bytes = PAGE_SIZE
    data_end_bytes = 1 << 62
    damage: CorruptImage | None = None
    ignore_bitmaps = False
    table_bytes = 0

    def __init__(self, store: Store, facts: ImageFacts, *, writable: bool) -> None:
        self.store, self.facts, self.writable = store, facts, writable
        self.unique_id = facts.linkage_id
        self.size_bytes = facts.size_bytes
        self.unowned = ExtentKind.ABSENT if facts.parent is not None else ExtentKind.ZERO
        self.findings: list[Finding] = []
        raw = store.pread(_TABLE, self.size_bytes // PAGE_SIZE * 4)
        self.table = np.frombuffer(raw, dtype=">u4").astype(np.int64)
        self._next = max(round_up(store.size(), PAGE_SIZE), _data_start(self.size_bytes))
        self._dirty: set[int] = set()
        self._guard, self._lock = SyncGuard(store), threading.Lock()
        self.next_id = uuid.uuid4().bytes if writable else None  # False until the first write of this session

    def _ready(self) -> None:
        """Before each write of content: the first one gives the image another linkage id, durably."""
        assert self.writable
        self._guard.check()
        with self._lock:
            if self.next_id is not None:
                _switch(self.store, linkage_id=self.next_id)
                self._guard.sync()
                self.unique_id, self.next_id = self.next_id, None

    def allocated_blocks(self) -> NDArray[np.bool_]:
        """See `Layer`."""
        return np.asarray(self.table != 0)

    def zero_blocks(self) -> NDArray[np.bool_]:
        """See `Layer`."""
        return np.zeros(0, dtype=np.bool_)

    def block_offset(self, block_index: int) -> int:
        """See `Layer`."""
        return int(self.table[block_index]) * PAGE_SIZE or -1

    def owned_sectors(self, block_index: int) -> NDArray[np.bool_] | None:
        """See `Layer`."""
        return None

    def prefetch_ownership(self, block_index: int) -> None:
        """See `Layer`."""

    def extents(self, sector_index: int, sector_count: int) -> Iterator[Extent]:
        """See `Layer`: not joined."""
        position, end = sector_index, sector_index + sector_count
        while position < end:
            block, within = divmod(position, _PER_PAGE)
            count, offset = min(_PER_PAGE - within, end - position), self.block_offset(block)
            if offset < 0:
                yield Extent(position, count, self.unowned)
            else:
                yield Extent(position, count, ExtentKind.DATA, 0, offset + sectors_to_bytes(within))
            position += count

    def _blocks(self, sector_index: int, sector_count: int) -> range:
        assert self.writable and sector_index % _PER_PAGE == 0 and sector_count % _PER_PAGE == 0
        assert sectors_to_bytes(sector_index + sector_count) <= self.size_bytes
        self._ready()
        return range(sector_index // _PER_PAGE, (sector_index + sector_count) // _PER_PAGE)

    def _put(self, block: int, data: memoryview) -> bool:
        """Write a whole block; True when it had no space before."""
        if (offset := self.block_offset(block)) >= 0:
            self.store.pwrite(offset, data)
            return False
        self.store.pwrite(self._next, data)
        with self._lock:
            self.table[block] = self._next // PAGE_SIZE
            self._next += PAGE_SIZE
            self._dirty.add(block)
        return True

    def write(self, sector_index: int, data: memoryview) -> bool:
        """See `Layer`."""
        blocks = self._blocks(sector_index, whole_sectors(len(data)))
        pages = [data[place : place + PAGE_SIZE] for place in range(0, len(data), PAGE_SIZE)]
        grew = [self._put(block, page) for block, page in zip(blocks, pages, strict=True)]
        return any(grew)

    def write_in_place(self, store_offset_bytes: int, data: memoryview) -> None:
        """See `Layer`."""
        self._ready()
        self.store.pwrite(store_offset_bytes, data)

    def write_zeroes(self, sector_index: int, sector_count: int) -> bool:
        """See `Layer`."""
        grew = False
        for block in self._blocks(sector_index, sector_count):
            if (offset := self.block_offset(block)) >= 0:
                self.store.punch(offset, PAGE_SIZE)
            elif self.unowned is ExtentKind.ABSENT:
                grew |= self._put(block, memoryview(bytes(PAGE_SIZE)))
        return grew

    def copy_in(self, pieces: Sequence[Piece]) -> None:
        """See `Layer`: all pieces belong to one block, which they may cover in part."""
        self._ready()
        block = pieces[0].sector_index // _PER_PAGE
        if self.block_offset(block) < 0:
            if self.unowned is ExtentKind.ZERO and all(piece.source is None for piece in pieces):
                return
            self._put(block, memoryview(bytes(PAGE_SIZE)))
        base = self.block_offset(block) - sectors_to_bytes(block * _PER_PAGE)
        for piece in pieces:
            if piece.source is None:
                self.store.pwrite(base + sectors_to_bytes(piece.sector_index), bytes(piece.size_bytes))
            else:
                copy_piece(piece, self.store, base + sectors_to_bytes(piece.sector_index))

    def trim(self, sector_index: int, sector_count: int) -> None:
        """See `Layer`."""
        for block in self._blocks(sector_index, sector_count):
            if (offset := self.block_offset(block)) >= 0:
                self.store.punch(offset, PAGE_SIZE)

    def refuse_writing(self) -> None:
        """See `Layer`."""
        self._guard.refuse()

    def pin_blocks(self) -> None:
        """See `Layer`: nothing ever moves."""

    def leave_table(self) -> None:
        """See `Layer`."""

    def flush_is_due(self) -> bool:
        """See `Layer`."""
        return False

    def flush(self) -> None:
        """See `Layer`: the data of new blocks, then their entries."""
        if not self.writable:
            return
        with self._lock:
            entries = {block: int(self.table[block]) for block in self._dirty}
            self._dirty -= entries.keys()
        try:
            self._guard.sync()
            for block, page in entries.items():
                self.store.pwrite(_TABLE + 4 * block, page.to_bytes(4, "big"))
            if entries:
                self._guard.sync()
        except BaseException:
            with self._lock:
                self._dirty |= entries.keys()
            raise

    seal = flush

    def close(self) -> None:
        """See `Layer`."""
        try:
            if self.writable:
                self._guard.finish(self.flush)
        finally:
            self.store.close()


class SparseFormat:
    """See `Format`."""

    name = title = child_format = NAME
    suffixes, child_suffix = (".sparse", ".asparse"), ".asparse"
    kinds, sector_sizes, larger_child = (NAME,), (SECTOR_SIZE, PAGE_SIZE), ""
    size_unit_bytes, is_plain = SECTOR_SIZE, False

    def probe(self, store: ReadStore) -> bool:
        """See `Format`."""
        return _MAGIC in (store.pread(0, 8), store.pread(PAGE_SIZE, 8))

    def refuse_name(self, store: ReadStore) -> None:
        """See `Format`."""
        raise CorruptImage(CorruptReason.HEADER_COOKIE, "has no header", path=store.name)

    def facts(self, store: ReadStore) -> ImageFacts:
        """See `Format`."""
        header = _read(store)
        if header is None or store.size() < _data_start(header.size_bytes):
            raise CorruptImage(CorruptReason.HEADER_CHECKSUM, "has no whole header and table", path=store.name)
        size, parent = header.size_bytes, None
        if header.parent:
            linkage_ids, timestamp, names = json.loads(header.parent)
            parent_names = tuple(
                ParentName(structure, text, NameDialect(dialect)) for structure, text, dialect in names
            )
            parent = ParentRef(tuple(bytes.fromhex(one) for one in linkage_ids), timestamp, parent_names)
        return ImageFacts(
            store.name,
            NAME,
            NAME if parent is None else "sparse child",
            NAME if parent is None else "sparse child",
            size,
            size,
            PAGE_SIZE,
            PAGE_SIZE,
            header.file_id,
            header.linkage_id,
            parent=parent,
        )

    def describe(self, store: ReadStore) -> tuple[ImageFacts, ImageDetails]:
        """See `Format`."""
        facts = self.facts(store)
        names = facts.parent.names if facts.parent is not None else ()
        return facts, ImageDetails(block_size_bytes=PAGE_SIZE, parent_name=names[-1].text if names else "")

    def file_id(self, store: ReadStore) -> bytes | None:
        """See `Format`."""
        header = _read(store)
        return None if header is None else header.file_id

    def linkage_id(self, store: ReadStore) -> bytes | None:
        """See `Format`."""
        header = _read(store)
        return None if header is None else header.linkage_id

    def renewed_id(self, layer: Layer) -> bytes | None:
        """See `Format`."""
        assert isinstance(layer, SparseLayer)
        return layer.next_id

    def set_renewed_id(self, layer: Layer, linkage_id: bytes) -> None:
        """See `Format`."""
        layer.next_id = linkage_id  # type: ignore[attr-defined]

    def take_over_disk(self, layer: Layer, disk: Layer, *, dry_run: bool = False) -> None:
        """See `Format`: nothing else belongs to the disk."""

    def parent_ids(self, store: ReadStore) -> frozenset[bytes]:
        """See `Format`."""
        header = _read(store)
        if header is None or not header.parent:
            return frozenset()
        return frozenset(bytes.fromhex(one) for one in json.loads(header.parent)[0])

    def claimed_parent(self, store: ReadStore) -> tuple[bytes | None, bool]:
        """See `Format`."""
        return None, False

    def may_be_changing(self, store: ReadStore, file_id: bytes, sizes_bytes: tuple[int, int]) -> bool:
        """See `Format`."""
        return self.file_id(store) in (None, file_id)

    def is_torn(self, sector: bytes, before: bytes, after: bytes) -> bool:
        """See `Format`: its structures are never changed under an undo log."""
        return False

    def written_at(self, modified_ns: int) -> int:
        """See `Format`."""
        return modified_ns // 10**9

    def open(self, store: Store, *, writable: bool = False, ignore_bitmaps: bool = False) -> Layer:
        """See `Format`."""
        return SparseLayer(store, self.facts(store), writable=writable)

    def check_block_size(self, block_size_bytes: int) -> None:
        """See `Format`."""

    def check_request(self, request: CreateRequest) -> None:
        """See `Format`."""
        if request.size_bytes <= 0 or request.size_bytes % PAGE_SIZE:
            raise errors.InvalidArgument("a sparse disk is whole sectors of 4096 bytes")

    def create(self, store: Store, request: CreateRequest) -> None:
        """See `Format`."""
        self._make(store, request.size_bytes, b"")

    def _make(self, store: Store, size_bytes: int, parent: bytes) -> None:
        store.truncate(_data_start(size_bytes))
        store.pwrite(0, _Header(1, size_bytes, uuid.uuid4().bytes, uuid.uuid4().bytes, parent).slot())

    def stream_end(self, kind: str, size_bytes: int) -> bytes | None:
        """See `Format`."""
        return None

    def create_child(
        self, store: Store, size_bytes: int, parent: ParentRef, *, block_size_bytes: int, disk: Layer | None = None
    ) -> None:
        """See `Format`."""
        self._make(store, size_bytes, _parent_document(parent))

    def relink(self, store: Store, parent: ParentRef) -> None:
        """See `Format`: the inactive slot is written."""
        _switch(store, parent=_parent_document(parent))
        store.sync()

    def prepare_detach(self, layer: Layer) -> None:
        """See `Format`: every block is a whole sector."""

    def detach(self, store: Store) -> None:
        """See `Format`."""
        _switch(store, parent=b"")
        store.sync()

    def check(
        self, store: ReadStore, *, ignore_bitmaps: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> list[Finding]:
        """See `Format`."""
        try:
            size = self.facts(store).size_bytes
        except CorruptImage as error:
            return [Finding(Severity.ERROR, "header", error.problem, store.name)]
        table = np.frombuffer(store.pread(_TABLE, size // PAGE_SIZE * 4), dtype=">u4")
        used = table[table != 0]
        if len(np.unique(used)) == len(used) and not (used < _data_start(size) // PAGE_SIZE).any():
            return []
        return [Finding(Severity.ERROR, "table", "entries lie over each other, or over the table", store.name)]

    def repair(self, draft: DraftStore, consent: Consent) -> list[Fix]:
        """See `Format`."""
        return []

    def settle(self, draft: DraftStore) -> list[Fix]:
        """See `Format`."""
        return []

    def dump(self, store: ReadStore) -> list[StructureDump]:
        """See `Format`."""
        return []

    def refuse_foreign_writer(self, layer: Layer) -> None:
        """See `Format`."""

    def drop_unreferenced(self, layer: Layer) -> None:
        """See `Format`."""
        used = layer.allocated_blocks().nonzero()[0].tolist()
        ends = [layer.block_offset(block) + PAGE_SIZE for block in used]
        layer.store.truncate(max([_data_start(layer.size_bytes), *ends]))

    def resizable(self, layer: Layer) -> Resizable | None:
        """See `Format`."""
        return None

    def compactable(self, layer: Layer) -> Compactable | None:
        """See `Format`."""
        return None


SPARSE = SparseFormat()
