# SPDX-License-Identifier: Apache-2.0
"""Sound VHDX images in memory, damage to their structures, and what a repair must preserve."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable

from tests.harness.stores import MemStore
from tests.vhdkit.formats.vhdx.images import (
    BAT,
    LOG,
    LOG_GUID,
    METADATA,
    PARENT,
    SIZE,
    add_log,
    image,
    page,
    set_entry,
    set_header,
    set_regions,
)
from vhdkit.finding import Severity
from vhdkit.formats.draft import DraftStore
from vhdkit.formats.format import Consent, Fix
from vhdkit.formats.undo import apply_change, belongs, plan_change, roll_back
from vhdkit.formats.vhdx import layout
from vhdkit.formats.vhdx.format import VHDX
from vhdkit.formats.vhdx.layout import RegionEntry
from vhdkit.formats.vhdx.log import LogChange
from vhdkit.image import NULL_ID, ExtentKind
from vhdkit.units import KIB, MIB, SECTOR_SIZE, sectors_to_bytes, whole_sectors

ALL, NONE = Consent(data_loss=True, writer_is_dead=True), Consent()
BELOW = b"\xbe" * SECTOR_SIZE  # what the parent holds, everywhere
BLOCKS = SIZE // MIB
H1, H2 = layout.HEADER_OFFSETS
T1, T2 = layout.REGION_TABLE_OFFSETS
Change = Callable[[MemStore], object]


def filled(store: MemStore, seed: int = 0) -> MemStore:
    """The image with two full blocks, and one block with a few written sectors."""
    rng = random.Random(seed)
    layer = VHDX.open(store, writable=True)
    for block, first, count in ((2, 0, 2048), (0, 0, 2048), (3, 8, 9), (3, 100, 1)):
        layer.write(block * 2048 + first, memoryview(rng.randbytes(sectors_to_bytes(count))))
    layer.close()
    return store


def child() -> MemStore:
    """A child with blocks of its own, one of which is partially present."""
    return filled(image(parent=PARENT))


def base() -> MemStore:
    """A dynamic image with blocks."""
    return filled(image())


def content(store: MemStore) -> bytes:
    """The content of the disk, over a parent filled with a byte that occurs nowhere else."""
    layer = VHDX.open(store)
    found = bytearray(layer.size_bytes)
    for one in layer.extents(0, whole_sectors(layer.size_bytes)):
        start = sectors_to_bytes(one.sector_index)
        if one.store_offset_bytes is not None:
            found[start : start + one.size_bytes] = store.pread(one.store_offset_bytes, one.size_bytes)
        elif one.kind is ExtentKind.ABSENT:
            found[start : start + one.size_bytes] = BELOW * one.sector_count
    return bytes(found)


def held(store: MemStore) -> tuple[int, dict[int, bytes]]:
    """The size and bytes of the file, in a form that is quick to compare."""
    return store.size(), dict(store._sectors)


def faults(store: MemStore) -> list[str]:
    """The codes of all findings worse than a note."""
    return [one.code for one in VHDX.check(store) if one.severity > Severity.NOTE]


def repaired(store: MemStore, consent: Consent = NONE) -> tuple[MemStore, list[Fix]]:
    """The store after a repair, and the fixes. Planning writes nothing; the undo log takes everything back."""
    before = held(store)
    draft = DraftStore(store)
    fixes = VHDX.repair(draft, consent)
    assert held(store) == before, "planning a repair wrote something"
    writes = draft.diff()
    made = store.copy()
    changed = bool(writes) or draft.size() != store.size()
    assert changed == any(fix.needs is None for fix in fixes), fixes
    assert all(str(fix.message).isprintable() for fix in fixes)
    if changed:
        log = plan_change(made, NULL_ID, writes, draft.size())
        apply_change(made, log)
        assert belongs(store, log) and belongs(made, log)
        taken_back = made.copy()
        roll_back(taken_back, log)
        assert held(taken_back) == before, "the log does not hold every byte that changed"
    return made, fixes


def patched(*places: int, raw: bytes = b"\x55\xaa" * 16) -> Change:
    """Write garbage at these offsets."""

    def change(store: MemStore) -> None:
        for one in places:
            store.pwrite(one, raw)

    return change


def both(first: Change, second: Change) -> Change:
    """One change after the other."""

    def change(store: MemStore) -> None:
        first(store)
        second(store)

    return change


def entry(number: int, state: int, offset: int = 0) -> Change:
    """Replace an entry of the BAT."""
    return lambda store: set_entry(store, number, state, offset)


def state(number: int, value: int) -> Change:
    """Change the state of a BAT entry, but not its offset."""
    return lambda store: store.pwrite(BAT + 8 * number, bytes([store.pread(BAT + 8 * number, 1)[0] & 0xF8 | value]))


def same(number: int, other: int) -> Change:
    """Copy a BAT entry from another block."""
    return lambda store: store.pwrite(BAT + 8 * number, store.pread(BAT + 8 * other, 8))


def equal_headers(store: MemStore) -> None:
    """Make both headers equal, as Disk2VHD does."""
    set_header(store, sequence_number=1)


def dirty(store: MemStore) -> None:
    """Leave a page of the BAT in the log only: it has a new block, after all others."""
    offset = store.size()
    raw = bytearray(store.pread(BAT, 4096))
    raw[8:16] = (offset | 6).to_bytes(8, "little")
    add_log(store, [[LogChange(BAT, 4096, bytes(raw))]], last=offset + MIB)


def gap_in_log(store: MemStore) -> None:
    """Remove the first of two log entries that belong together."""
    changes = [LogChange(BAT, 4096, page(b"\0"))]
    add_log(store, [changes, changes])
    store.pwrite(LOG, bytes(4096))


def other_table(store: MemStore) -> None:
    first = store.pread(T1, layout.REGION_TABLE_SIZE)
    set_regions(store, lambda entries: entries.append(RegionEntry(uuid.UUID(int=9).bytes, 64 * MIB, MIB, 0)))
    store.pwrite(T1, first)


def cut_after_disk(store: MemStore) -> None:
    """Let the disk end inside its last block, and the file where the disk ends."""
    place = METADATA + layout.METADATA_TABLE_SIZE
    raw = store.pread(place, 4 * KIB)
    size = (SIZE).to_bytes(8, "little")
    at = place + raw.index(size)
    store.pwrite(at, (SIZE - MIB // 2).to_bytes(8, "little"))
    offset = int.from_bytes(store.pread(BAT + 24, 8), "little") & ~0xFFFFF
    store.truncate(offset + MIB // 2)


HARMLESS: dict[str, tuple[str, Change]] = {
    "identifier": ("file-identifier", lambda s: s.pwrite(0, b"no disk!")),
    "header 1": ("header-damaged", patched(H1 + 8)),
    "header 2": ("header-damaged", patched(H2)),
    "headers equal": ("headers-equal", equal_headers),
    "headers differ": ("headers-differ", lambda s: set_header(s, [0], data_write_guid=b"q" * 16)),
    "both checksums": ("header-checksum", patched(H1 + 4, H2 + 4, raw=b"1234")),
    "header checksum, other gone": ("header-checksum", both(patched(H1 + 2000), patched(H2))),
    "log": ("log-not-replayed", dirty),
    "no log": ("log-missing", lambda s: set_header(s, log_length=0, log_offset=0)),
    "log place": ("log-place", lambda s: set_header(s, log_offset=MIB + 512)),
    "table 1": ("region-table-damaged", patched(T1 + 20)),
    "table 2": ("region-table-damaged", patched(T2)),
    "tables differ": ("region-tables-differ", other_table),
    "both table checksums": ("region-table", patched(T1 + 4, T2 + 4, raw=b"1234")),
    "one table checksum": ("region-table", both(patched(T1 + 5000), patched(T2))),
    "metadata signature": ("metadata-table", lambda s: s.pwrite(METADATA, b"nonsense")),
    "metadata count": ("metadata-table", lambda s: s.pwrite(METADATA + 10, b"\0\0")),
    "block cut": ("block-cut", cut_after_disk),
}


def first_block(store: MemStore) -> int:
    """The offset of the first block."""
    return int.from_bytes(store.pread(BAT, 8), "little") & ~0xFFFFF


def judge(damaged: MemStore, expected: bytes, made: MemStore, fixes: list[Fix]) -> None:
    """Outside the named ranges the disk is unchanged; inside them, each sector has content that existed somewhere."""
    found = content(made)
    named = [one for fix in fixes if fix.needs is None for one in (*fix.lost, *fix.doubtful)]
    known = {*damaged._sectors.values(), bytes(SECTOR_SIZE), BELOW}
    for at in range(0, len(expected), SECTOR_SIZE):
        sector = found[at : at + SECTOR_SIZE]
        if any(offset < at + SECTOR_SIZE and at < offset + size for offset, size in named):
            assert sector in known or sector == expected[at : at + SECTOR_SIZE], f"invented: byte {at:#x}"
        else:
            assert sector == expected[at : at + SECTOR_SIZE], f"byte {at:#x} reads differently, and was not named"


LOSSY: dict[str, tuple[str, Change]] = {
    "outside": ("bat", entry(0, 6, 64 * MIB)),
    "far": ("bat", entry(0, 6, 1 << 62)),
    "over headers": ("bat", entry(0, 6, 0)),
    "over the log": ("bat", entry(2, 6, LOG)),
    "over the BAT": ("bat", entry(2, 6, BAT)),
    "state 4": ("bat", state(0, 4)),
    "state 5": ("bat", state(2, 5)),
    "state 4, no place": ("bat", entry(0, 4)),
    "cut": ("bat", lambda s: s.truncate(s.size() - MIB - 600 * KIB)),
    "log sequence": ("log-discarded", lambda s: set_header(s, log_guid=LOG_GUID)),
    "log gap": ("log-discarded", gap_in_log),
    "log place": ("log-place", lambda s: set_header(s, log_guid=LOG_GUID, log_offset=64 * MIB)),
    "log over data": ("log-discarded", lambda s: add_log(s, [[LogChange(first_block(s), 4096, page(b"x"))]])),
    "log truncated": ("log-truncated", lambda s: add_log(s, [[]], flushed=64 * MIB)),
    "headers": ("header-checksum", patched(H1, H2)),
    "header pair": ("header-pair", both(equal_headers, lambda s: set_header(s, [0], data_write_guid=b"q" * 16))),
    "tables": ("region-table", patched(T1, T2)),
    "tables, metadata header": ("region-table", both(patched(T1, T2), patched(METADATA))),
    "tables, metadata count": ("region-table", both(patched(T1, T2), patched(METADATA + 10, raw=b"\0\0"))),
    "region twice": ("region-table", lambda s: set_regions(s, lambda e: e.append(e[0]))),
    "first mebibyte": ("file-identifier", patched(0, raw=bytes(MIB))),
    "first mebibyte, metadata header": ("file-identifier", both(patched(0, raw=bytes(MIB)), patched(METADATA))),
}
