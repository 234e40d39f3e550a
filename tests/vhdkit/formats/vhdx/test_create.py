# SPDX-License-Identifier: Apache-2.0
"""What vhdkit writes, byte by byte, against Hyper-V's rules: new images, and images that were written to and closed.

The bytes are parsed here independently, with the offsets of the specification. One test for each rule.
"""

from __future__ import annotations

import itertools
import random
import struct
import uuid
from dataclasses import dataclass
from functools import cache

import pytest

from fuzz.fuzz_vhdx_log import _sequence
from tests.harness.stores import MemStore
from tests.vhdkit.formats.vhdx.images import PARENT
from vhdkit.formats.vhdx.create import create, new_disk
from vhdkit.formats.vhdx.opening import open_vhdx
from vhdkit.units import GIB, KIB, MIB, whole_sectors

HEADERS, TABLES = (64 * KIB, 128 * KIB), (192 * KIB, 256 * KIB)
BAT_ID = uuid.UUID("2DC27766-F623-4200-9D64-115E9BFD4A08")
METADATA_ID = uuid.UUID("8B7CA206-4790-4B9A-B8FE-575F050F886E")
ITEM_FLAGS = {  # the length and flags of each item in files that Windows wrote
    uuid.UUID("CAA16737-FA36-4D43-B3B6-33F0AA44E76B"): (8, 4),
    uuid.UUID("2FA54224-CD1B-4876-B211-5DBED83BF4B8"): (8, 6),
    uuid.UUID("8141BF1D-A96F-4709-BA47-F233A8FAAB5F"): (4, 6),
    uuid.UUID("CDA348C7-445D-4471-9CC9-E9885251C556"): (4, 6),
    uuid.UUID("BECA12AB-B2E6-4523-93EF-C309E000C746"): (16, 6),
}
LOCATOR_ID = uuid.UUID("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")
KINDS = ("dynamic", "fixed", "child", "dynamic-4096", "child-4096", "child-over-a-chunk")


class Watched(MemStore):
    """A store that examines every write to the log and to a header before it is made."""

    looked_at = 0

    def pwrite(self, offset_bytes: int, data: bytes | bytearray | memoryview) -> None:
        """See `Store.pwrite`."""
        raw = bytes(data)
        if offset_bytes in HEADERS and any(raw[48:64]):
            assert _sequence(self.pread(MIB, MIB), raw[48:64]), "a header names a log without an entry of it"
            self.looked_at += 1
        if MIB <= offset_bytes < 2 * MIB:
            for header in HEADERS:
                log_guid = self.pread(header, 80)[48:64]
                if any(log_guid):
                    ring = bytearray(self.pread(MIB, MIB))
                    ring[offset_bytes - MIB : offset_bytes - MIB + len(raw)] = b"\xff" * len(raw)
                    assert _sequence(bytes(ring), log_guid), "a torn entry would leave no whole sequence"
                    self.looked_at += 1
        super().pwrite(offset_bytes, data)


def work(store: MemStore, seed: int) -> None:
    """A session: writes, zeros and trims of all sizes, flushes, close."""
    rng, layer = random.Random(seed), open_vhdx(store, writable=True)
    unit, total = whole_sectors(layer.sector_bytes), whole_sectors(layer.size_bytes)
    layer.write(0, memoryview(rng.randbytes(512) * 4096))  # the first blocks end in every state that there is
    layer.write_zeroes(4096, 4096)
    layer.write(8192, memoryview(rng.randbytes(512) * unit))
    for _ in range(60):
        count = rng.choice((unit, 8 * unit, 100 * unit, 2048, 4096))
        first = rng.randrange(16384, total - count + 1) // unit * unit
        kind = rng.randrange(5)
        if kind < 3:
            layer.write(first, memoryview(rng.randbytes(512) * count))
        elif kind == 3:
            layer.write_zeroes(first, count)
        else:
            layer.trim(first, count)
        if rng.random() < 0.3:
            layer.flush()
    layer.close()


@cache
def made(kind: str) -> tuple[bytes, Watched]:
    """(the first MiB of the new image, the image after two sessions)."""
    name, _, more = kind.partition("-")
    size = 5 * GIB + 8 * KIB if more == "over-a-chunk" else 24 * MIB + 8 * KIB
    store = Watched("image.vhdx")
    sector = 4096 if more == "4096" else 512
    parent = PARENT if name == "child" else None
    create(store, new_disk(size, sector), 2 * MIB, fixed=name == "fixed", preallocate=name == "fixed", parent=parent)
    head = store.pread(0, MIB)
    for seed in range(2):
        work(store, seed)
    assert store.looked_at > 3 or name == "fixed"  # which needs no log
    return head, store


@dataclass(frozen=True)
class Table:
    """The bytes, parsed."""

    size: int
    block: int
    ratio: int
    count: int
    entries: tuple[int, ...]
    regions: dict[uuid.UUID, tuple[int, int]]
    has_parent: bool

    def block_of(self, number: int) -> int | None:
        """The block of an entry; None for a bitmap."""
        chunk, within = divmod(number, self.ratio + 1)
        return None if within == self.ratio else chunk * self.ratio + within


def regions_of(store: MemStore) -> list[tuple[uuid.UUID, int, int, int]]:
    """(id, offset, length, required) of each region."""
    raw = store.pread(TABLES[0], 64 * KIB)
    entries = [raw[16 + 32 * number : 48 + 32 * number] for number in range(int.from_bytes(raw[8:12], "little"))]
    return [(uuid.UUID(bytes_le=one[:16]), *struct.unpack("<QII", one[16:])) for one in entries]


def items_of(store: MemStore) -> dict[uuid.UUID, tuple[bytes, int, int]]:
    """(value, flags, offset) of each item."""
    start = {one: offset for one, offset, _, _ in regions_of(store)}[METADATA_ID]
    raw = store.pread(start, 64 * KIB)
    found = {}
    for number in range(int.from_bytes(raw[10:12], "little")):
        entry = raw[32 + 32 * number : 64 + 32 * number]
        offset, length, flags, reserved = struct.unpack("<IIII", entry[16:])
        assert reserved == 0
        found[uuid.UUID(bytes_le=entry[:16])] = (store.pread(start + offset, length), flags, offset)
    return found


def table_of(store: MemStore) -> Table:
    """The BAT."""
    values = [value for value, _, _ in (items_of(store)[one] for one in ITEM_FLAGS)]
    (block, flags), size = struct.unpack("<II", values[0]), int.from_bytes(values[1], "little")
    ratio = (1 << 23) * int.from_bytes(values[2], "little") // block
    regions = {one: (offset, length) for one, offset, length, _ in regions_of(store)}
    count, (start, length) = -(-size // block), regions[BAT_ID]
    entries, has_parent = struct.unpack(f"<{length // 8}Q", store.pread(start, length)), bool(flags & 2)
    needed = -(-count // ratio) * (ratio + 1) if has_parent else count + (count - 1) // ratio
    assert needed <= len(entries) and not any(entries[needed:])
    return Table(size, block, ratio, count, entries[:needed], regions, has_parent)


@pytest.mark.parametrize("kind", KINDS)
def test_headers(kind: str) -> None:
    """Both are valid, equal except for number and checksum, of version 1, without a log id; reserved bytes are 0."""
    head, store = made(kind)
    for raw in (head, store.pread(0, MIB)):
        first, second = (raw[at : at + 4096] for at in HEADERS)
        assert first[:4] == second[:4] == b"head" and first[16:] == second[16:]
        assert abs(int.from_bytes(first[8:16], "little") - int.from_bytes(second[8:16], "little")) == 1
        assert not any(first[48:64]), "a clean close leaves nothing to replay"
        assert struct.unpack("<HHIQ", first[64:80]) == (0, 1, MIB, MIB), "versions, and a log of 1 MiB at 1 MiB"
        assert not any(first[80:]) and not any(raw[HEADERS[0] + 4096 : HEADERS[1]])
        assert not any(raw[HEADERS[1] + 4096 : TABLES[0]]) and not any(raw[320 * KIB :])
        assert raw[:8] == b"vhdxfile" and raw[8:20].decode("utf-16-le") == "vhdkit" and not any(raw[20 : 64 * KIB])


@pytest.mark.parametrize("kind", KINDS)
def test_guids(kind: str) -> None:
    """Two sessions set new ids, none of them zero; both slots have the newest."""
    head, store = made(kind)
    for place in (16, 32):
        before, after = head[HEADERS[0] + place :][:16], store.pread(HEADERS[0] + place, 16)
        assert any(before) and any(after) and before != after


@pytest.mark.parametrize("kind", KINDS)
def test_region_tables(kind: str) -> None:
    """Both tables are equal; BAT and metadata are required, on whole mebibytes, and apart from everything else."""
    head, store = made(kind)
    for raw in (head, store.pread(0, MIB)):
        assert raw[TABLES[0] : TABLES[0] + 64 * KIB] == raw[TABLES[1] : TABLES[1] + 64 * KIB]
        assert raw[TABLES[0] :][:4] == b"regi" and not any(raw[TABLES[0] + 12 : TABLES[0] + 16])
        assert not any(raw[TABLES[0] + 16 + 2 * 32 : TABLES[0] + 64 * KIB])
    found = regions_of(store)
    assert {one for one, *_ in found} == {BAT_ID, METADATA_ID}
    assert all(required == 1 and offset % MIB == length % MIB == 0 < length for _, offset, length, required in found)
    places = sorted([(MIB, MIB), *((offset, length) for _, offset, length, _ in found)])
    assert all(low + size <= high for (low, size), (high, _) in itertools.pairwise(places))


@pytest.mark.parametrize("kind", KINDS)
def test_items(kind: str) -> None:
    """Each item has the length and flags that Windows gives it; only children have a locator."""
    _, store = made(kind)
    found = items_of(store)
    start = {one: offset for one, offset, _, _ in regions_of(store)}[METADATA_ID]
    raw = store.pread(start, 64 * KIB)
    assert raw[:8] == b"metadata" and not any(raw[8:10]) and not any(raw[12:32])
    assert not any(raw[32 + 32 * len(found) :])
    locator = found.pop(LOCATOR_ID, None)
    assert (locator is not None) == kind.startswith("child")
    assert locator is None or locator[1] == 4
    assert {one: (len(value), flags) for one, (value, flags, _) in found.items()} == ITEM_FLAGS
    block, flags = struct.unpack("<II", found[next(iter(ITEM_FLAGS))][0])
    assert block == 2 * MIB and flags == {"dynamic": 0, "fixed": 1, "child": 2}[kind.partition("-")[0]]
    assert all(offset >= 64 * KIB for _, _, offset in found.values())


@pytest.mark.parametrize("kind", KINDS)
def test_places_of_blocks(kind: str) -> None:
    """All blocks, also the last one, lie completely in the file, apart, on whole mebibytes; so does the file's end."""
    _, store = made(kind)
    table = table_of(store)
    assert store.size() % MIB == 0
    spans = [(0, MIB), (MIB, MIB), *table.regions.values()]
    for number, entry in enumerate(table.entries):
        assert entry & 0xFFFF8 == 0, "reserved bits"
        if entry & 7 >= 6:
            spans.append((entry >> 20 << 20, MIB if table.block_of(number) is None else table.block))
    spans.sort()
    assert all(low + size <= high for (low, size), (high, _) in itertools.pairwise(spans))
    assert spans[-1][0] + spans[-1][1] <= store.size() and len(spans) > 5


@pytest.mark.parametrize("kind", KINDS)
def test_states(kind: str) -> None:
    """Only the states 0 and 6 occur, in children also 2 and 7; 0 and 2 have no offset, and 7 needs a bitmap."""
    _, store = made(kind)
    table, seen = table_of(store), set()
    for number, entry in enumerate(table.entries):
        block, state = table.block_of(number), entry & 7
        if block is None:
            assert state in ((0, 6) if table.has_parent else (0,)) and (state or not entry)
        else:
            seen.add(state)
            assert state in ((0, 2, 6, 7) if table.has_parent else (0, 6)), f"block {block}: {state}"
            assert block < table.count or entry == 0
            assert state >= 6 or entry == state
        if state == 7:
            assert table.entries[number // (table.ratio + 1) * (table.ratio + 1) + table.ratio] & 7 == 6
    assert seen == ({6} if kind == "fixed" else {0, 2, 6, 7} if table.has_parent else seen | {6})


@pytest.mark.parametrize("kind", ["child", "child-4096", "child-over-a-chunk"])
def test_bits(kind: str) -> None:
    """Only partially present blocks have bits set, since other programs also read the bits of other blocks."""
    _, store = made(kind)
    table, partial = table_of(store), 0
    size = table.block // (4096 if kind == "child-4096" else 512) // 8
    for number, entry in enumerate(table.entries):
        block = table.block_of(number)
        bitmap = table.entries[number // (table.ratio + 1) * (table.ratio + 1) + table.ratio]
        if block is None or bitmap & 7 != 6 or block >= table.count:
            continue
        bits = store.pread((bitmap >> 20 << 20) + block % table.ratio * size, size)
        assert entry & 7 == 7 or not any(bits)
        partial += any(bits)
    assert partial


def test_a_fixed_image_has_its_space() -> None:
    """Every block is present, and the file is as large as the disk and its structures."""
    _, store = made("fixed")
    table = table_of(store)
    assert sum(one & 7 == 6 for one in table.entries) == table.count
    assert store.size() == 4 * MIB + table.count * table.block
