# SPDX-License-Identifier: Apache-2.0
"""The seeds of the VHDX targets: small images, each in a state of its own, and single structures.

Decides which states the targets begin with. Deterministic: the random ids of new images come from a fixed sequence.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

from fuzz.fuzz_vhdx_tables import ITEMS, LOCATOR, REGIONS
from fuzz.mutate_vhdx import HEADERS, LOG_ID, PAGE, REGION_TABLES
from fuzz.sparse import Sparse
from tests.harness.stores import MemStore
from vhdkit.formats.vhdx import layout, log
from vhdkit.formats.vhdx.crc import sealed
from vhdkit.formats.vhdx.create import create, new_disk
from vhdkit.formats.vhdx.log import LogChange
from vhdkit.formats.vhdx.opening import open_vhdx
from vhdkit.image import ParentRef
from vhdkit.units import GIB, MIB, SECTOR_SIZE, TIB

_PARENT = ParentRef.of_paths(b"p" * 16, 0, relative=".\\base.vhdx", absolute="\\srv\\base.vhdx", name="base.vhdx")
_LOG, _METADATA, _BAT = MIB, 2 * MIB, 3 * MIB


def packed(store: MemStore) -> bytes:
    """A store as a sparse input: zeros at the ends of sectors and equal sectors take no space."""
    image = Sparse(store.size())
    sectors = sorted(store._sectors.items())
    at = 0
    while at < len(sectors):
        first, raw = sectors[at]
        count = 1
        while at + count < len(sectors) and sectors[at + count] == (first + count, raw):
            count += 1
        if raw.count(raw[0]) == SECTOR_SIZE:
            image.put(first * SECTOR_SIZE, raw[:1], SECTOR_SIZE * count)
        elif count > 1:
            image.put(first * SECTOR_SIZE, raw, count)
        else:
            image.put(first * SECTOR_SIZE, raw.rstrip(b"\0"))
        at += count
    return image.encode()


def _image(
    size: int = 4 * MIB, block: int = MIB, *, fixed: bool = False, child: bool = False, sector: int = SECTOR_SIZE
) -> MemStore:
    store = MemStore("image.vhdx")
    create(store, new_disk(size, sector), block, fixed=fixed, parent=_PARENT if child else None)
    return store


def _written(store: MemStore, *, closed: bool = True) -> MemStore:
    """Some writes, in two sessions; without `closed` the second one's log is left."""
    for part in range(2):
        layer = open_vhdx(store, writable=True)
        last = layer.size_bytes // SECTOR_SIZE
        layer.write(8 * part, memoryview(b"w" * 8 * SECTOR_SIZE))
        layer.write(min(4096, last - 8), memoryview(b"x" * 8 * SECTOR_SIZE))
        layer.write_zeroes(0, min(2048, last) if part else 8)
        layer.flush()
        if closed or not part:
            layer.close()
    return store


def _entries(store: MemStore, first: int, runs: list[list[LogChange]], *, tail: int = 0, number: int = 5) -> MemStore:
    """Entries in the ring from sector `first` on; the headers name them."""
    head = first * PAGE
    for changes in runs:
        raw = log.build_entry(LOG_ID, number, tail, changes, flushed_file_offset=0, last_file_offset=store.size())
        for at in range(0, len(raw), PAGE):
            store.pwrite(_LOG + (head + at) % MIB, raw[at : at + PAGE])
        head, number = (head + len(raw)) % MIB, number + 1
    for offset in HEADERS:
        header = replace(layout.parse_header(store.pread(offset, 4096)), log_guid=LOG_ID)
        store.pwrite(offset, sealed(layout.build_header(header).ljust(4096, b"\0"), 4))
    return store


def _bat_page(*entries: int) -> LogChange:
    raw = b"".join(one.to_bytes(8, "little") for one in entries)
    return LogChange(_BAT, PAGE, raw.ljust(PAGE, b"\0"))


def _with_entry(store: MemStore, *entries: int) -> MemStore:
    store.pwrite(_BAT, b"".join(one.to_bytes(8, "little") for one in entries))
    return store


def images() -> Iterator[tuple[str, MemStore]]:
    """Whole images."""
    yield "dynamic", _image()
    yield "dynamic-written", _written(_image())
    yield "dynamic-open", _written(_image(), closed=False)
    yield "dynamic-4096", _written(_image(sector=4096))
    yield "dynamic-256m", _written(_image(3 * GIB + 4096, 256 * MIB))
    yield "fixed", _image(2 * MIB, fixed=True)
    yield "child", _image(child=True)
    yield "child-written", _written(_image(child=True))
    yield "child-open", _written(_image(child=True), closed=False)
    yield "child-over-a-chunk", _written(_image(5 * GIB, 2 * MIB, child=True))
    yield "child-states", _with_entry(_written(_image(child=True)), 1, 2, 3 | 9 << 20, 2)
    yield "empty-64tib", _image(64 * TIB, 256 * MIB)
    yield "reserved-bits", _with_entry(_image(), 8)
    grown = _image()
    page = _bat_page(grown.size() | 6)
    grown.truncate(grown.size() + MIB)
    yield "log-page", _entries(grown.copy(), 0, [[], [page]])
    yield "log-wraps", _entries(grown.copy(), 255, [[page], [], [LogChange(_BAT, PAGE, None)]], tail=255 * PAGE)
    yield "log-zeros", _entries(grown.copy(), 3, [[page, LogChange(_BAT, MIB, None), page]], tail=3 * PAGE)
    table = grown.pread(REGION_TABLES[0], PAGE)
    yield "log-regions", _entries(grown.copy(), 0, [[LogChange(at, PAGE, table) for at in REGION_TABLES]])
    many = [LogChange(_BAT + PAGE * (one % 4), PAGE, bytes([one]) * PAGE) for one in range(130)]
    yield "log-two-descriptor-sectors", _entries(grown.copy(), 0, [[replace(one, data=None) for one in many]])
    yield "log-over-data", _entries(grown.copy(), 0, [[page], [LogChange(4 * MIB, PAGE, b"d" * PAGE)]])
    yield "log-truncated", _entries(grown.copy(), 0, [[page]], tail=PAGE)
    one = grown.copy()
    one.pwrite(HEADERS[0], bytes(PAGE))
    one.pwrite(REGION_TABLES[0], bytes(PAGE))
    yield "first-copies-gone", one


def _structures() -> Iterator[tuple[str, bytes]]:
    for name, store in (("dynamic", _image()), ("child", _image(child=True))):
        table = store.pread(REGION_TABLES[0], PAGE).rstrip(b"\0")
        yield f"regions-{name}", bytes([REGIONS]) + table
        values = store.pread(_METADATA + layout.METADATA_TABLE_SIZE, PAGE)
        yield f"items-{name}", bytes([ITEMS]) + store.pread(_METADATA, SECTOR_SIZE) + values
        layer = open_vhdx(store)
        if layer.metadata.items.locator is not None:
            yield "locator", bytes([LOCATOR]) + layer.metadata.items.locator.raw


def _fixed_ids() -> mock._patch[object]:
    rng = random.Random(4)
    return mock.patch("uuid.uuid4", lambda: uuid.UUID(bytes=rng.randbytes(16)))


def open_seeds() -> dict[str, bytes]:
    """The seeds of `fuzz_vhdx_open` and `fuzz_vhdx_log`."""
    with _fixed_ids():
        return {name: packed(store) for name, store in images()}


def table_seeds() -> dict[str, bytes]:
    """The seeds of `fuzz_vhdx_tables`."""
    with _fixed_ids():
        return dict(_structures())
