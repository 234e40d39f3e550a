# SPDX-License-Identifier: Apache-2.0
"""INV-MERGE-PRESERVES for any chain: what a merge plans and moves makes the target read as the leaf did.

Fed: a chain in memory as a few bytes (see `parse`): kinds, sizes, block sizes, written runs, zeros; then false bits in
bitmaps, false BAT entries, files cut short. Tried: folding the upper layers into one of the others, or into a new
image. The leaf must read the same after each block, the target in the end, and every refusal is a `VhdkitError`
(INV-BOUNDED). The bytes are also read as the record of a merge, which is believed only within its folder; and with the
highest bit of the first byte they say what a whole record in a real folder claims (`_claim`): no file goes because of
it but the layers of the merge that was stopped there (INV-RECORD-PROVEN).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import tempfile
from collections.abc import Sequence

from fuzz.loop import main
from fuzz.mutate import mutate_bytes
from fuzz.recipe import Reader
from tests.harness.chains import BLOCK_SIZES, ChainPlan, LayerPlan, interesting_sectors, make_store
from tests.harness.model import ParsedVhd, walk_read
from tests.harness.power import LINK
from tests.harness.stores import MemStore
from vhdkit import VhdkitError
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.records.intent import KIND, decode
from vhdkit.chain.verbs.create import create_child, create_image
from vhdkit.chain.verbs.merge_plan import plan_merge
from vhdkit.chain.verbs.merge_recovery import resume_merge
from vhdkit.chain.verbs.merge_steps import is_complete
from vhdkit.disk import open_disk
from vhdkit.errors import InvalidArgument
from vhdkit.folder import sidecar_path
from vhdkit.formats.probe import FormatName, open_layer
from vhdkit.formats.raw import create_raw
from vhdkit.formats.vhd.create import create_differencing, create_dynamic, create_fixed
from vhdkit.formats.vhd.footers import image_id
from vhdkit.image import Layer
from vhdkit.store import FileStore
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
    if data[:1] >= b"\x80":
        _act_on_record(data)
        return
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
    merge = plan_merge(sources, into, below_bytes=below[0].size_bytes if below else 0, fresh=fresh)
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
    try:
        intent = decode(data, _FOLDER, ())
    except InvalidArgument as error:
        assert str(error).isprintable()
        return
    assert all(any(one.unique_id) for one in intent.sources)
    for one in (intent.target, *intent.sources):
        assert os.path.commonpath((one.path, _FOLDER)) == _FOLDER, one


_PATHS = (
    "base.vhd", "leaf.avhd", "middle.avhd", "gone.avhd", "other.vhd", "others.avhd", "notes.txt", "link",
    "sub/deep.avhd", "../outside.avhd", "/etc/passwd", "", ".", "..", "./base.vhd", "sub/../leaf.avhd",
    "nothing/../../x", "a\0b", "\udc80", "x" * 300,
)  # fmt: skip
_ODD: tuple[object, ...] = (None, 7, -1, [], {}, True, "", "11" * 16, "00" * 16, "zz", ["leaf.avhd"], 1e300)
_KEYS = ("format", "phase", "target", "sources", "relink")
_MERGED = {"leaf.avhd", "middle.avhd"}  # what a true record would name: the chain is leaf, middle, base


def _claim(data: bytes, ids: dict[str, str]) -> object:
    """A record's document: odd shapes now and then, else names and ids that are there, or may be.

    flags u8 | phase u8 | relink u8 | target: path u8, id u8 | sources u8, each: path u8, id u8
    | odd u8: key u8, value u8
    """
    reader = Reader(data)
    reader.u8()
    phase, relink = ("copy", "relink", "remove")[reader.u8() % 3], reader.u8() % 2 == 1

    def one() -> dict[str, str]:
        path, which = _PATHS[reader.u8() % len(_PATHS)], reader.u8() % (len(ids) + 2)
        own = ids.get(path, "22" * 16)
        return {"path": path, "unique_id": [own, own, *ids.values()][which]}

    target_ = one() if reader.u8() % 4 == 0 else {"path": "base.vhd", "unique_id": ids["base.vhd"]}
    document: dict[str, object] = {
        "format": "vhdkit merge record 1",
        "phase": phase,
        "target": target_,
        "sources": [one() for _ in range(reader.u8() % 5)],
        "relink": relink,
    }
    for _ in range(max(reader.u8() % 6 - 3, 0)):
        document[_KEYS[reader.u8() % len(_KEYS)]] = _ODD[reader.u8() % len(_ODD)]
    return document


def _act_on_record(data: bytes) -> None:
    """A record in a folder with files of all kinds; then resume, or open for writing, or take a snapshot."""
    with tempfile.TemporaryDirectory(prefix="vhdkit-fuzz-") as top:
        folder = os.path.join(top, "images")
        ids = _make_folder(folder)
        line = json.dumps(_claim(data, ids)).encode() + b"\n"
        with open(sidecar_path(os.path.join(folder, "base.vhd"), KIND), "wb") as record:
            record.write(line + hashlib.sha256(line).hexdigest().encode() + b"\n")
        before, leaf = _files(top), _disk(os.path.join(folder, "leaf.avhd"))
        try:
            kind = data[0] % 3
            if kind == 0:
                resume_merge(os.path.join(folder, "base.vhd"))
            elif kind == 1:
                open_disk(os.path.join(folder, "base.vhd"), writable=True).close()
            else:
                open_disk(os.path.join(folder, "leaf.avhd"), writable=True).close()
        except VhdkitError as error:
            assert str(error).isprintable()
        after = _files(top)
        missing = {name for name in before if name not in after and not name.endswith(KIND)}
        assert {os.path.basename(name) for name in missing} <= _MERGED, f"{missing} went"
        names = [name for name in ("leaf.avhd", "middle.avhd", "base.vhd") if os.path.join("images", name) in after]
        if "leaf.avhd" in names:
            assert _disk(os.path.join(folder, "leaf.avhd")) == leaf, "the leaf reads otherwise"
        for name, content in before.items():
            if os.path.basename(name) not in {*_MERGED, "base.vhd"} and not name.endswith(KIND):
                assert after[name] == content, f"{name} has changed"


def _make_folder(folder: str) -> dict[str, str]:
    """A chain of three, another of two, and other files; the ids by path."""
    os.makedirs(os.path.join(folder, "sub"))
    pairs = (
        ("middle.avhd", "base.vhd"), ("leaf.avhd", "middle.avhd"), ("others.avhd", "other.vhd"),
        ("sub/deep.avhd", "other.vhd"), ("../outside.avhd", "other.vhd"),
    )  # fmt: skip
    for name in ("base.vhd", "other.vhd"):
        create_image(os.path.join(folder, name), 64 * SECTOR_SIZE, block_size_bytes=MIB // 2)
    options = OpenOptions(parent_dirs=(folder,))
    for child, parent in pairs:
        create_child(os.path.join(folder, child), os.path.join(folder, parent))
        with open_disk(os.path.join(folder, child), writable=True, options=options) as disk:
            disk.write(0, child.encode())
    with open(os.path.join(folder, "notes.txt"), "wb") as file:
        file.write(b"important")
    os.symlink("others.avhd", os.path.join(folder, "link"))
    ids = {}
    for path in ("base.vhd", "other.vhd", *(child for child, _ in pairs)):
        with FileStore.open(os.path.join(folder, path)) as store:
            ids[path] = image_id(store).hex()
    return ids | {"link": ids["others.avhd"], "notes.txt": "00" * 16}


def _files(top: str) -> dict[str, bytes]:
    """Every file below, links as what they are, with its content."""
    found = {}
    for place, _, names in os.walk(top):
        for name in names:
            path = os.path.join(place, name)
            if os.path.islink(path):
                found[os.path.relpath(path, top)] = os.readlink(path).encode()
            else:
                with open(path, "rb") as file:
                    found[os.path.relpath(path, top)] = file.read()
    return found


def _disk(path: str) -> bytes:
    with open_disk(path, options=OpenOptions(lock=False)) as disk:
        return disk.read(0, disk.size_bytes)


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
