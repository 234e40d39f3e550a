# SPDX-License-Identifier: Apache-2.0
"""INV-MERGE-PRESERVES for any chain: what a merge plans and moves makes the target read as the leaf did.

Fed: a chain in memory as a few bytes (see `parse`): kinds, sizes, block sizes, written runs, zeros; then false bits in
bitmaps, false BAT entries, files cut short. Tried: folding the upper layers into one of the others, or into a new
image. The leaf must read the same after each block, the target in the end, and every refusal is a `VhdkitError`
(INV-BOUNDED). The bytes are also read as the record of a merge, which is believed only within its folder.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Sequence

from fuzz.loop import main
from fuzz.mutate import mutate_bytes
from fuzz.recipe import Reader
from tests.chains import BLOCK_SIZES, ChainPlan, LayerPlan, interesting_sectors, make_store
from tests.model import ParsedVhd, walk_read
from tests.power import LINK
from tests.stores import MemStore
from vhdkit import VhdkitError
from vhdkit.chain.chain import Chain
from vhdkit.chain.intent import decode
from vhdkit.chain.merge_plan import MergePlan
from vhdkit.chain.merge_steps import is_complete
from vhdkit.formats.probe import FormatName, open_layer
from vhdkit.formats.raw import create_raw
from vhdkit.formats.vhd.create import create_differencing, create_dynamic, create_fixed
from vhdkit.image import Layer
from vhdkit.units import MIB, SECTOR_SIZE, whole_sectors

MAX_LAYERS = 5
_MAX_SECTORS = whole_sectors(3 * MIB)
_BASES = ("dynamic", "fixed", "raw")
_FOLDER = "/srv/images"


def parse(data: bytes) -> tuple[ChainPlan, int, bool, list[tuple[int, int, int, int]]]:
    """The chain, which layer is the target, whether the result is a new image, and the damage that is done.

    flags u8 | layers u8 | target u8 | per layer: kind u8, sectors u16, block size u8, runs u8, per run: first u16,
    count u16 | damages u8, per damage: layer u8, kind u8, place u16, value u16
    """
    reader = Reader(data)
    flags, count = reader.u8(), reader.u8() % (MAX_LAYERS - 1) + 2
    index = reader.u8() % (count - 1) + 1
    fresh = bool(flags & 1)
    layers: list[LayerPlan] = []
    for number in range(count):
        base = _BASES[reader.u8() % len(_BASES)]
        kind = base if number == count - 1 else "differencing"
        sectors, block_size = reader.u16() % _MAX_SECTORS + 1, BLOCK_SIZES[reader.u8() % len(BLOCK_SIZES)]
        if number == index and not fresh:
            sectors = layers[0].sector_count
        runs = []
        for _ in range(reader.u8() % 8):
            first, length = reader.u16() % sectors, reader.u16()
            runs.append((first, min(length + 1, sectors - first)))
        layers.append(LayerPlan(kind, sectors, block_size, tuple(runs)))
    damages = [(reader.u8() % count, reader.u8() % 4, reader.u16(), reader.u16()) for _ in range(reader.u8() % 6)]
    return ChainPlan(tuple(layers), bool(flags & 2)), index, fresh, damages


def _damage(store: MemStore, kind: int, place: int, value: int) -> None:
    """Spoil one file: a few bits of a bitmap, a BAT entry, its end, or any of its bytes."""
    if kind == 3:
        store.pwrite(place * 97 % store.size(), value.to_bytes(2, "big"))
        return
    if kind == 2:
        store.truncate(max(store.size() - value // 8 * SECTOR_SIZE, 2048))
        return
    if store.pread(0, 8) != b"conectix":
        return
    parsed = ParsedVhd.parse(store)
    if kind == 0:
        starts = [entry * SECTOR_SIZE for entry in parsed.entries if entry != 0xFFFFFFFF]
        if starts:
            at = starts[place % len(starts)] + value % parsed.bitmap_bytes
            byte = store.pread(at, 1) or b"\0"
            store.pwrite(at, bytes([byte[0] ^ (place >> 8 | 1)]))
    else:
        entry = 0xFFFFFFFF if value % 3 == 0 else value
        store.pwrite(parsed.table_offset_bytes + 4 * (place % len(parsed.entries)), entry.to_bytes(4, "big"))


def _content(layers: Sequence[Layer]) -> bytes:
    buffer = bytearray(layers[0].size_bytes)
    Chain(layers).read_into(0, memoryview(buffer))
    return bytes(buffer)


def _new_image(like: LayerPlan, size: int) -> MemStore:
    store = MemStore("new.img" if like.kind == "raw" else "new.vhd")
    if like.kind == "differencing":
        create_differencing(store, size, LINK, block_size_bytes=like.block_size_bytes)
    elif like.kind == "dynamic":
        create_dynamic(store, size, block_size_bytes=like.block_size_bytes)
    else:
        (create_raw if like.kind == "raw" else create_fixed)(store, size)
    return store


def target(data: bytes) -> None:
    """Build the chain, spoil it, merge it, and look at every disk."""
    _read_record(data)
    plan, index, fresh, damages = parse(data)
    stores = [make_store(one, number) for number, one in enumerate(plan.layers)]
    for number, kind, place, value in sorted(damages, key=lambda damage: damage[1]):  # structures first, then bytes
        _damage(stores[number], kind, place, value)
    try:
        _merge(plan, stores, index, fresh)
    except VhdkitError as error:
        assert damages, "a sound chain was refused"
        assert str(error).isprintable()


def _merge(plan: ChainPlan, stores: list[MemStore], index: int, fresh: bool) -> None:
    def opened(store: MemStore, number: int, *, writable: bool = False) -> Layer:
        name = FormatName.RAW if plan.layers[number].kind == "raw" else FormatName.VHD
        return open_layer(store, format_name=name, writable=writable, ignore_bitmaps=plan.ignore_bitmaps)

    layers = [opened(store, number) for number, store in enumerate(stores)]
    before = _content(layers)
    sectors = interesting_sectors(plan, random.Random(1))[::9]
    naive = [walk_read(layers, sector) for sector in sectors]
    if not fresh and layers[index].size_bytes != layers[0].size_bytes:
        return  # the damage changed a size
    store = _new_image(plan.layers[index], layers[0].size_bytes) if fresh else stores[index].copy()
    for one in stores:
        one.frozen = True
    into = opened(store, index, writable=True)
    sources, below = layers[: index + 1 if fresh else index], layers[index + 1 :]
    merge = MergePlan(sources, into, below_bytes=below[0].size_bytes if below else 0, fresh=fresh)
    for pieces in merge.blocks():
        if pieces:
            into.copy_in(pieces)
            if not fresh:
                now = [walk_read([*sources, into, *below], sector) for sector in sectors]
                assert now == naive, "the leaf changed in the middle of the merge"
    into.close()
    found = [opened(store, index), *below]
    assert _content(found) == before, "the target does not read as the leaf did"
    assert is_complete(merge, Chain(layers), Chain(found))
    if plan.layers[index].kind in ("dynamic", "differencing"):
        assert not ParsedVhd.parse(store).overlaps()


def _read_record(data: bytes) -> None:
    """Any bytes as a merge's record: nothing, or files inside the folder."""
    intent = decode(data, _FOLDER, ())
    if intent is not None:
        for one in (intent.target, *intent.sources):
            assert os.path.commonpath((one.path, _FOLDER)) == _FOLDER, one


def mutate(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Another chain near `data`, short enough to be all meaning."""
    return mutate_bytes(data, rng, others)[:400]


def encode(
    plan: ChainPlan, index: int, *, fresh: bool = False, damages: Sequence[tuple[int, int, int, int]] = ()
) -> bytes:
    """The input that means this chain: the reverse of `parse`."""
    raw = bytes([fresh | plan.ignore_bitmaps << 1, len(plan.layers) - 2, index - 1])
    for number, layer in enumerate(plan.layers):
        is_base = number == len(plan.layers) - 1
        raw += bytes([_BASES.index(layer.kind) if is_base else 0]) + (layer.sector_count - 1).to_bytes(2, "big")
        raw += bytes([BLOCK_SIZES.index(layer.block_size_bytes), len(layer.runs)])
        raw += b"".join(first.to_bytes(2, "big") + (count - 1).to_bytes(2, "big") for first, count in layer.runs)
    raw += bytes([len(damages)])
    for layer_index, kind, place, value in damages:
        raw += bytes([layer_index, kind]) + place.to_bytes(2, "big") + value.to_bytes(2, "big")
    assert parse(raw)[0] == plan, "not what it says"
    return raw


if __name__ == "__main__":
    sys.exit(main(target, "fuzz_merge", mutate))
