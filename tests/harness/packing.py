# SPDX-License-Identifier: Apache-2.0
"""Images worth compacting and resizing: blocks in any order, with gaps, of zeros, partly owned, unaligned.

Built by `vhd_builder` and `vhdx_builder`, so nothing of the library decides what they look like. `cut_everywhere`
runs an operation on an image whose power may fail, and judges inside every write and sync what a cut would leave.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from tests.harness.model import ParsedVhd
from tests.harness.power import faults_of, open_mem
from tests.harness.stores import CrashStore, MemStore
from tests.harness.vhd_builder import Block, Vhd, bitmap_space, bits_of, child, pattern
from tests.harness.vhdx_builder import LINKAGE, Vhdx, VhdxBlock
from vhdkit import errors
from vhdkit.formats.probe import open_layer
from vhdkit.formats.vhd import layout
from vhdkit.formats.vhd.create import ParentLink, linked_header
from vhdkit.formats.vhd.metadata import read_metadata
from vhdkit.image import ExtentKind, Layer
from vhdkit.store import Store
from vhdkit.units import KIB, MIB, SECTOR_SIZE, sectors_to_bytes

BLOCK = 512 * KIB
SECTORS = BLOCK // SECTOR_SIZE
_ZEROS = bytes(4 * KIB)
Content = bytes | tuple[int, bytes]  # of a disk, or `short` of it


@dataclass(slots=True)
class Crowd:
    """An image, the layers below it, and the content of its disk."""

    store: MemStore
    parents: list[Layer]
    content: bytes

    @property
    def layers(self) -> list[Layer]:
        """The image, opened for writing as in a chain, and its parents."""
        return self.over(self.store)

    def over(self, store: Store) -> list[Layer]:
        """The same with another store for the image."""
        return [open_layer(store, writable=True), *self.parents]


def crowd(seed: int, *, blocks: int = 9, differencing: bool = False, batmap: bool = False) -> Crowd:
    """A random image of 512 KiB blocks, the last of them cut by the disk's end."""
    rng = random.Random(f"crowd {seed}")
    size = blocks * BLOCK - rng.choice((0, 0, 37, 1000)) * SECTOR_SIZE
    parents = _parents(rng, size) if differencing else []
    order = rng.sample(range(blocks), rng.randint(blocks // 2, blocks))
    made = {block: _block(rng, differencing) for block in order}
    if rng.random() < 0.5:  # gaps between blocks, some wide enough for one
        position = 64 * KIB
        for block in made.values():
            block.start = position
            position += bitmap_space(BLOCK) + BLOCK + rng.choice((0, 0, 7, 8, 1100, 2300)) * SECTOR_SIZE
    fields: dict[str, object] = {"size": size, "block_size": BLOCK, "blocks": made, "aligned": rng.random() < 0.5}
    if batmap:
        full = {number for number, block in made.items() if block.bits is None}
        fields |= {"creator": b"tap\0", "creator_version": 0x00010003, "batmap": _map(full, blocks)}
    image = child(**fields) if differencing else Vhd(**fields)  # type: ignore[arg-type]  # names are Vhd's
    store = image.build().store()
    with open_mem(store.copy(), parents) as disk:
        return Crowd(store, parents, disk.read(0, size))


def _map(full: set[int], blocks: int) -> bytes:
    raw = bytearray(-(-blocks // 8))
    for block in full:
        raw[block // 8] |= 0x80 >> block % 8
    return bytes(raw)


def _block(rng: random.Random, differencing: bool) -> Block:
    """Zeros or data, owned entirely or in part."""
    kind = rng.choice(("data", "data", "zeros", "zeros", "part", "zero part", "end"))
    first = rng.randrange(SECTORS - 100)
    run = set(range(first, first + rng.randint(1, 100)))
    at = sectors_to_bytes(first)
    data = pattern(len(run) * SECTOR_SIZE, rng.randrange(200))
    if kind == "data":
        return Block(pattern(BLOCK, rng.randrange(200)))
    if kind == "zeros":
        return Block(b"")
    if kind == "end":
        return Block(b"\1" * SECTOR_SIZE, at=BLOCK - 200 * SECTOR_SIZE)
    if kind == "zero part":
        return Block(data if differencing else b"", bits_of(set(range(SECTORS)) - run, BLOCK), at=at)
    return Block(data, bits_of(run, BLOCK), at=at)


def _parents(rng: random.Random, size: int) -> list[Layer]:
    """A dynamic base with data in some blocks, as large as the child or a little smaller."""
    blocks = {block: _block(rng, False) for block in rng.sample(range(size // BLOCK), size // BLOCK // 2)}
    base = Vhd(size=size - rng.choice((0, 0, 5)) * SECTOR_SIZE, block_size=BLOCK, blocks=blocks)
    return [open_layer(base.build().store("base.vhd", frozen=True))]


def vhdx_crowd(
    seed: int, *, blocks: int = 6, differencing: bool = False, sector_bytes: int = SECTOR_SIZE, fixed: bool = False
) -> Crowd:
    """A random VHDX of blocks of 1 or 2 MiB, the last of them cut by the disk's end, sometimes by the file's, too.

    Log, metadata and BAT lie anywhere among the blocks; entries without space in the file may keep an offset.
    """
    rng = random.Random(f"vhdx {seed}")
    block_size = rng.choice((MIB, 2 * MIB))
    size = blocks * block_size - rng.choice((0, 37 * 4096, 200 * 4096))
    image = Vhdx(size, block_size, sector_bytes, fixed)
    parents = []
    if differencing:
        base = Vhdx(size - rng.choice((0, 5 * 4096)), block_size, sector_bytes)
        for number in rng.sample(range(blocks), blocks // 2):
            base.blocks[number] = VhdxBlock(data=_vhdx_data(rng, block_size))
        _arrange(rng, base)
        parents = [open_layer(base.store("base.vhdx", frozen=True))]
        image.parent = LINKAGE
    for number in range(blocks) if fixed else rng.sample(range(blocks), rng.randint(blocks // 2, blocks)):
        image.blocks[number] = _vhdx_block(rng, image)
    _arrange(rng, image)
    store = image.store()
    with open_mem(store.copy(), parents) as disk:
        return Crowd(store, parents, disk.read(0, size))


def _vhdx_data(rng: random.Random, block_size: int) -> dict[int, bytes]:
    """A few sectors of data in a block."""
    places = (rng.randrange(block_size // 4096 - 10) * 4096 for _ in range(3))
    return {place: pattern(rng.randint(1, 10) * 4096, rng.randrange(200)) for place in places}


def _vhdx_block(rng: random.Random, image: Vhdx) -> VhdxBlock:
    """Zeros or data, owned entirely or in part, or zeros without space."""
    if image.fixed:
        return VhdxBlock(data=_vhdx_data(rng, image.block_size))
    kind = rng.choice(("data", "data", "zeros", "zeros", "without space", "part", "part", "zero part"))
    if kind == "without space":
        return VhdxBlock(rng.choice((1, 2, 3)))
    data = {} if kind.startswith("zero") else _vhdx_data(rng, image.block_size)
    if image.parent is None or "part" not in kind:
        return VhdxBlock(6, data=data)
    sectors, bits = image.block_size // image.sector_bytes, set[int]()
    for _ in range(3):
        first = rng.randrange(sectors - 8)
        bits |= set(range(first, min(first + rng.choice((8, 100, 1000)), sectors)))
    for place in data:  # a part of the data is owned for certain
        bits |= {place // image.sector_bytes}
    return VhdxBlock(7, data=data, bits=bits)


def _arrange(rng: random.Random, image: Vhdx) -> None:
    """Give everything in the image its place: one after the other in a random order, sometimes with gaps."""
    if (image.parent is not None and any(block.bits for block in image.blocks.values())) or (
        image.parent and rng.random() < 0.5
    ):
        image.bitmaps[0] = 0
    things: list[object] = ["log", "metadata", "table", *image.bitmaps, *image.blocks.values()]
    if rng.random() < 0.5:
        things.append("other")
    if rng.random() < 0.7:
        rng.shuffle(things)
    position, gaps = MIB, rng.random() < 0.5
    for thing in things:
        if isinstance(thing, VhdxBlock):
            if thing.state >= 6:
                thing.place = position
                position += image.block_size
            elif thing.state in (1, 3) and rng.random() < 0.5:  # space that the block once had
                thing.place = position
                thing.data = {4096 * 3: pattern(4096, 77)}
                position += image.block_size
        elif isinstance(thing, int):
            image.bitmaps[thing] = position
            position += MIB
        else:
            setattr(image, str(thing), position)
            position += MIB
        position += rng.choice((0, 0, 1, 2, 3)) * MIB if gaps else 0
    last = image.blocks.get(-(-image.size // image.block_size) - 1)
    if last is not None and last.state >= 6 and last.place == max(one.place for one in image.blocks.values()):
        ends = [image.log, image.metadata, image.table, image.other or 0, *image.bitmaps.values()]
        if last.place > max(ends) and rng.random() < 0.7:
            image.file_size = last.place + (image.size - 1) % image.block_size + 1
            last.data = {at: raw for at, raw in last.data.items() if last.place + at + len(raw) <= image.file_size}


def content_of(store: Store, parents: list[Layer], *, writable: bool = False) -> bytes:
    """The whole disk as a reader sees it; with `writable` the image is opened as for writing first."""
    disk = open_mem(store, parents, writable=writable)
    return disk.read(0, disk.size_bytes)


def short(content: bytes) -> tuple[int, bytes]:
    """A disk's size, and its content without the zeros at its end: large disks here are mostly zeros."""
    return len(content), _without_end(content)


def _without_end(content: bytes) -> bytes:
    """Without the zeros at its end; compares many at a time, as `rstrip` does not."""
    end = len(content)
    while content.endswith(_ZEROS, 0, end):
        end -= len(_ZEROS)
    return content[:end].rstrip(b"\0")


def short_content_of(store: Store, parents: list[Layer], *, writable: bool = False) -> tuple[int, bytes]:
    """`short` of the disk, without reading sectors that no layer owns."""
    disk = open_mem(store, parents, writable=writable)
    end = max((one.offset_bytes + one.size_bytes for one in disk.extents() if one.kind is ExtentKind.DATA), default=0)
    return disk.size_bytes, _without_end(disk.read(0, end))


def names_behind(store: MemStore, link: ParentLink, *, header: bool) -> MemStore:
    """Put the parent's names, or the header too, behind the blocks, as an earlier vhdkit or a power cut left them."""
    metadata = read_metadata(store)
    assert metadata.header is not None
    end = store.size()
    linked, texts, after = linked_header(metadata.header, link, end + layout.HEADER_SIZE)
    place = end if header else metadata.footer.data_offset
    for offset, raw in [(place, layout.build_header(linked)), *texts]:
        store.pwrite(offset, raw)
    footer = layout.build_footer(replace(metadata.footer, data_offset=place))
    store.pwrite(0, footer)
    store.pwrite(after, footer)
    return store


def sound(store: MemStore) -> list[str]:
    """What is wrong with the layout of a file."""
    return ParsedVhd.parse(store).overlaps()


def cut_everywhere(
    start: Crowd,
    work: Callable[[list[Layer]], object],
    allowed: tuple[Content, ...],
    *,
    seed: int = 0,
    cuts: int = 3,
    again: bool = True,
    chance: float = 0.3,
) -> set[Content]:
    """Do `work`; a cut inside any of its operations leaves one of the `allowed` contents, and a second run completes.

    The second run, which some of the cuts get, is cut as well, unless `again` is false. Returns the contents that were
    seen.
    """
    rng = random.Random(f"cuts {seed}")
    store = CrashStore(start.store)
    seen: set[Content] = set()
    states = [content if isinstance(content, tuple) else short(content) for content in allowed]
    beginning = short(start.content)

    def judge() -> None:
        for number in range(cuts):
            found = store.after_cut(rng)
            try:
                content = short_content_of(found.copy(frozen=True), start.parents)
            except errors.CorruptImage as error:
                raise AssertionError(f"operation {store.operation_count}, cut {number}: {error}") from error
            assert content in states, f"operation {store.operation_count}, cut {number}: another content"
            seen.add(allowed[states.index(content)])
            mended = found.copy()
            assert short_content_of(mended, start.parents, writable=True) == content, "mending changed the content"
            assert not faults_of(mended), faults_of(mended)
            if again and number == 0 and content == beginning and rng.random() < chance:
                rest = Crowd(found, start.parents, start.content)
                cut_everywhere(rest, work, allowed, seed=rng.randrange(1 << 30), cuts=1, again=False)

    layers = start.over(store)
    store.watcher = judge
    work(layers)
    layers[0].close()
    store.watcher = None
    assert short_content_of(store, start.parents) == states[-1]
    assert not faults_of(store)
    return seen
