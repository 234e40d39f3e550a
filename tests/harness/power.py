# SPDX-License-Identifier: Apache-2.0
"""The power-cut harness: a random workload on a `CrashStore`, judged inside every write and every sync.

The engine is deterministic, so one run of the workload is enough: inside each operation the watcher makes several
files that a cut right there could leave, opens each from scratch and compares it with the model.

    workload --> SectorModel (updated first)
             `-> Disk --> Chain --> DynamicImage --> CrashStore --(inside each operation)--> after_cut(seed)
    after_cut(seed) --> judge --> now and then: more work, a second cut --> judge

A file that breaks the promise raises `Violation`, which names the invariant.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.harness.model import ParsedVhd, SectorModel
from tests.harness.stores import CrashStore, MemStore, PowerCut
from vhdkit import errors, formats
from vhdkit.chain.engine.chain import Chain
from vhdkit.disk import Disk
from vhdkit.finding import Severity
from vhdkit.formats.probe import FormatName, open_layer
from vhdkit.formats.raw import create_raw
from vhdkit.formats.vhd.create import ParentLink, create_differencing, create_dynamic
from vhdkit.formats.vhdx.create import create as create_vhdx
from vhdkit.formats.vhdx.create import new_disk
from vhdkit.formats.vhdx.format import VHDX
from vhdkit.image import Layer, ParentRef
from vhdkit.store import Store
from vhdkit.units import KIB, MIB, SECTOR_SIZE, covering_sectors, sectors_to_bytes, whole_sectors

BLOCK_SIZE = 512 * KIB
DISK_SIZE = 3 * BLOCK_SIZE + sectors_to_bytes(37)
VHDX_SIZE = MIB + 36 * SECTOR_SIZE  # two blocks; every cut opens the image several times
LINK = ParentLink(uuid.UUID(int=1).bytes, 0, "base.vhd", ".\\base.vhd", "\\srv\\base.vhd")


class Violation(AssertionError):
    """A power cut left a file that breaks an invariant."""


@dataclass(slots=True)
class Scene:
    """An image as the workload finds it, the layers below it, and what the disk holds."""

    leaf: MemStore
    parents: list[Layer]
    content: bytes

    @property
    def block_size_bytes(self) -> int:
        """The size of the image's blocks; 0 for an image without blocks."""
        return open_layer(self.leaf, format_name=format_of(self.leaf)).block_size_bytes


def format_of(store: Store) -> FormatName | None:
    """RAW for a file with the name of a raw disk; None lets the file be probed."""
    return FormatName.RAW if store.name.endswith(".img") else None


def open_mem(leaf: Store, parents: Sequence[Layer] = (), *, writable: bool = False) -> Disk:
    """A disk over an image in memory and the open layers below it; read before mending, as when opened by path."""
    layer = open_layer(leaf)
    if writable:
        layer = open_layer(leaf, writable=True)
    return Disk(Chain([layer, *parents]))


def scribble(disk: Disk, content: bytearray, rng: random.Random, writes: int) -> None:
    """Small random writes of whole sectors, also into `content`. They leave blocks without space."""
    for _ in range(writes):
        size = rng.randint(1, 60) * SECTOR_SIZE
        offset = rng.randrange(0, disk.size_bytes - size, SECTOR_SIZE)
        data = rng.randbytes(size)
        disk.write(offset, data)
        content[offset : offset + size] = data


def random_range(rng: random.Random, disk_size: int, unit: int) -> tuple[int, int]:
    """An offset and a size, in units; mostly small, sometimes across blocks, often at a block's edge."""
    size = unit * (rng.randint(1, 40) if rng.random() < 0.85 else rng.randint(1, 2 * BLOCK_SIZE // unit))
    size = min(size, disk_size // unit * unit)
    offset = rng.randrange(0, disk_size - size + 1)
    if rng.random() < 0.3:
        edge = rng.randrange(0, disk_size, BLOCK_SIZE) + rng.randint(-4, 4) * unit
        offset = min(max(edge, 0), disk_size - size)
    return offset // unit * unit, size


def dynamic_scene(seed: int, *, writes: int = 3, size_bytes: int = DISK_SIZE) -> Scene:
    """A dynamic image, with some content when `writes` is not 0."""
    rng = random.Random(f"scene {seed}")
    leaf = MemStore("leaf.vhd")
    create_dynamic(leaf, size_bytes, block_size_bytes=BLOCK_SIZE)
    content = bytearray(size_bytes)
    with open_mem(leaf, writable=True) as disk:
        scribble(disk, content, rng, writes)
    return Scene(leaf, [], bytes(content))


def child_scene(seed: int, *, writes: int = 2, raw_base: bool = False, size_bytes: int = DISK_SIZE) -> Scene:
    """A differencing image over a base with content; it owns parts of some blocks."""
    rng = random.Random(f"base {seed}")
    base, leaf = MemStore("base.vhd"), MemStore("leaf.avhd")
    content = bytearray(rng.randbytes(DISK_SIZE // 2 // SECTOR_SIZE * SECTOR_SIZE).ljust(DISK_SIZE, b"\0"))
    if raw_base:
        base.name = "base.img"
        create_raw(base, DISK_SIZE)
    else:
        create_dynamic(base, DISK_SIZE, block_size_bytes=BLOCK_SIZE)
    with open_mem(base, writable=True) as disk:
        disk.write(0, content)
    parents = [open_layer(base.copy(frozen=True))]
    create_differencing(leaf, size_bytes, LINK, block_size_bytes=BLOCK_SIZE)
    content.extend(bytes(size_bytes - DISK_SIZE))
    with open_mem(leaf, parents, writable=True) as disk:
        scribble(disk, content, rng, writes)
    return Scene(leaf, parents, bytes(content))


def vhdx_scene(seed: int, *, writes: int = 2, size_bytes: int = VHDX_SIZE) -> Scene:
    """A dynamic VHDX with blocks of 1 MiB, with some content when `writes` is not 0."""
    leaf, content = MemStore("leaf.vhdx"), bytearray(size_bytes)
    create_vhdx(leaf, new_disk(size_bytes), MIB)
    with open_mem(leaf, writable=True) as disk:
        scribble(disk, content, random.Random(seed), writes)
    return Scene(leaf, [], bytes(content))


def vhdx_child_scene(seed: int, *, writes: int = 1, below: Scene | None = None) -> Scene:
    """A VHDX child over an image with content; it owns parts of blocks."""
    below = vhdx_scene(seed) if below is None else below
    size_bytes = len(below.content)
    parents, content = [open_layer(below.leaf.copy(frozen=True))], bytearray(below.content)
    linkage_id = VHDX.linkage_id(below.leaf)
    assert linkage_id is not None
    parent = ParentRef.of_paths(linkage_id, 0, relative=".\\b.vhdx", absolute="\\b.vhdx", name="b.vhdx")
    leaf = MemStore("leaf.avhdx")
    VHDX.create_child(leaf, size_bytes, parent, block_size_bytes=MIB, disk=parents[0])
    with open_mem(leaf, parents, writable=True) as disk:
        scribble(disk, content, random.Random(seed + 1), writes)
    return Scene(leaf, parents, bytes(content))


def lost_tail_scene(seed: int) -> Scene:
    """A child whose trailing footer is gone."""
    scene = child_scene(seed)
    scene.leaf.truncate(scene.leaf.size() - SECTOR_SIZE)
    return scene


def bad_copy_scene(seed: int) -> Scene:
    """A child whose footer copy at offset 0 is damaged."""
    scene = child_scene(seed)
    scene.leaf.pwrite(100, b"\xff" * 50)
    return scene


def short_block_scene(seed: int) -> Scene:
    """A dynamic image whose last block is cut by the trailing footer; the rest of it reads as zeros."""
    scene = dynamic_scene(seed, writes=0, size_bytes=4 * BLOCK_SIZE)
    rng = random.Random(f"short {seed}")
    content = bytearray(scene.content)
    with open_mem(scene.leaf, writable=True) as disk:
        for block in rng.sample(range(4), 3):
            data = rng.randbytes(rng.randint(1, 100) * SECTOR_SIZE)
            disk.write(block * BLOCK_SIZE, data)
            content[block * BLOCK_SIZE : block * BLOCK_SIZE + len(data)] = data
            stored = len(data)
    footer = scene.leaf.pread(scene.leaf.size() - SECTOR_SIZE, SECTOR_SIZE)
    end = scene.leaf.size() - SECTOR_SIZE - BLOCK_SIZE + stored + rng.randint(0, 3) * SECTOR_SIZE
    scene.leaf.truncate(end)
    scene.leaf.pwrite(end, footer)
    return Scene(scene.leaf, [], bytes(content))


def cut_block_scene(seed: int) -> Scene:
    """A dynamic image whose last block is stored only up to the end of the disk, with the footer right behind."""
    scene = dynamic_scene(seed, writes=0)
    rng = random.Random(f"cut {seed}")
    content = bytearray(scene.content)
    start = DISK_SIZE // BLOCK_SIZE * BLOCK_SIZE
    with open_mem(scene.leaf, writable=True) as disk:
        for offset in (BLOCK_SIZE, start):  # the last block of the disk is the last one of the file
            data = rng.randbytes(DISK_SIZE - start)
            disk.write(offset, data)
            content[offset : offset + len(data)] = data
    footer = scene.leaf.pread(scene.leaf.size() - SECTOR_SIZE, SECTOR_SIZE)
    end = scene.leaf.size() - SECTOR_SIZE - BLOCK_SIZE + DISK_SIZE - start
    scene.leaf.truncate(end)
    scene.leaf.pwrite(end, footer)
    return Scene(scene.leaf, [], bytes(content))


@dataclass
class PowerRun:
    """One workload, cut everywhere. `cuts` files are judged inside each operation."""

    scene: Scene
    seed: int
    cuts: int = 3
    steps: int = 22
    second_cuts: bool = True
    script: Callable[[Disk, SectorModel], None] | None = None  # instead of random steps
    make_store: Callable[[MemStore], CrashStore] = CrashStore
    judged: int = 0
    operations: int = 0
    syncs: int = 0
    store: CrashStore = field(init=False)
    model: SectorModel = field(init=False)

    def run(self) -> None:
        """Open, work, close; raises Violation."""
        self.store = self.make_store(self.scene.leaf)
        self.model = SectorModel(self.scene.content)
        self.store.watcher = self._watch
        disk = open_mem(self.store, self.scene.parents, writable=True)
        if self.script is not None:
            self.script(disk, self.model)
        else:
            rng = random.Random(f"workload {self.seed}")
            for _ in range(self.steps):
                work(disk, self.model, rng)
                self._watch()
        disk.close()
        self.model.flushed()
        self._watch()
        self.operations, self.syncs = self.store.operation_count, self.store.sync_count

    def _watch(self) -> None:
        for cut in range(self.cuts):
            seed = f"cut {self.seed} {self.store.operation_count} {cut}"
            rng = random.Random(seed)
            found = self.store.after_cut(rng)
            observed = self._judged(found, self.model, seed)
            if self.second_cuts and cut == 0:
                self._cut_again(found, observed, rng, seed)

    def _judged(self, found: MemStore, model: SectorModel, seed: str) -> bytes:
        self.judged += 1
        return judge(found, self.scene.parents, model, seed)

    def _cut_again(self, found: MemStore, observed: bytes, rng: random.Random, seed: str) -> None:
        """Use continues after a cut: mend, work, flush; then the power fails again."""
        model = SectorModel(observed)
        store = CrashStore(found)
        store.cut_at = rng.randint(1, 25)
        try:
            disk = open_mem(store, self.scene.parents, writable=True)
            for _ in range(6):
                work(disk, model, rng)
            disk.close()
            model.flushed()
        except PowerCut:
            pass
        self._judged(store.after_cut(rng), model, f"{seed}, second cut")


def judge(found: MemStore, parents: Sequence[Layer], model: SectorModel, seed: str) -> bytes:
    """Check what a reader sees in a file found after a cut. Raises Violation."""
    observed = _read_all(found.copy(frozen=True), parents, False, seed)
    _compare(model, observed, f"{seed}, read-only")
    mended = found.copy()
    if _read_all(mended, parents, True, seed) != observed:
        raise Violation(f"INV-FLUSHED-OR-NEWER: mending changed the content ({seed})")
    faults = faults_of(mended)
    if faults:
        raise Violation(f"INV-BLOCKS-DISJOINT: {faults} ({seed})")
    return observed


def faults_of(store: MemStore) -> list[str]:
    """What is wrong with the layout of the file: for a VHD found by an independent reader, else by its format."""
    found = formats.probed(store)
    if found.name == FormatName.VHD:
        return ParsedVhd.parse(store).overlaps()
    return [one.message for one in found.check(store) if one.severity is Severity.ERROR]


def _read_all(store: MemStore, parents: Sequence[Layer], writable: bool, seed: str) -> bytes:
    try:
        disk = open_mem(store, parents, writable=writable)
        return disk.read(0, disk.size_bytes)
    except errors.VhdkitError as error:
        kind = "writable" if writable else "read-only"
        raise Violation(f"INV-FOOTER-COPY: no {kind} open after a cut: {error} ({seed})") from error


def _compare(model: SectorModel, observed: bytes, seed: str) -> None:
    if len(observed) != model.size_bytes:
        raise Violation(f"the disk has {len(observed)} bytes now ({seed})")
    wrong = model.violations(observed)
    if wrong:
        block, first = divmod(wrong[0], whole_sectors(BLOCK_SIZE))
        raise Violation(
            f"INV-FLUSHED-OR-NEWER: {len(wrong)} sectors hold neither their flushed content nor anything written"
            f" since; the first is sector {first} of block {block} ({seed})"
        )


def work(disk: Disk, model: SectorModel, rng: random.Random) -> None:
    """One random step on the disk and the model."""
    kinds: tuple[tuple[Callable[[Disk, SectorModel, random.Random], None], int], ...] = (
        (_write, 10),
        (_zero, 3),
        (_trim, 2),
        (_flush, 3),
        (_read, 1),
    )
    (step,) = rng.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])
    step(disk, model, rng)


def _write(disk: Disk, model: SectorModel, rng: random.Random) -> None:
    offset, size = random_range(rng, disk.size_bytes, rng.choice((1, 100, SECTOR_SIZE, SECTOR_SIZE)))
    data, fua = rng.randbytes(size), rng.random() < 0.15
    model.write(offset, data)
    if fua or not disk.try_write(offset, memoryview(data)):
        disk.write(offset, data, fua=fua)
    if fua:
        model.flushed_range(offset, size)


def _zero(disk: Disk, model: SectorModel, rng: random.Random) -> None:
    offset, size = random_range(rng, disk.size_bytes, rng.choice((100, SECTOR_SIZE)))
    fua = rng.random() < 0.15
    model.write(offset, bytes(size))
    disk.write_zeroes(offset, size, fua=fua)
    if fua:
        model.flushed_range(offset, size)


def _trim(disk: Disk, model: SectorModel, rng: random.Random) -> None:
    offset, size = random_range(rng, disk.size_bytes, SECTOR_SIZE)
    model.begin_trim(offset, size)
    disk.trim(offset, size)
    model.adopt(disk.read(offset, size), offset)


def _flush(disk: Disk, model: SectorModel, rng: random.Random) -> None:
    disk.flush()
    model.flushed()


def _read(disk: Disk, model: SectorModel, rng: random.Random) -> None:
    """While the power is on, a disk always reads correctly."""
    offset, size = random_range(rng, disk.size_bytes, 1)
    assert disk.read(offset, size) == model.current[offset : offset + size]
    first, end = offset // SECTOR_SIZE * SECTOR_SIZE, covering_sectors(offset + size) * SECTOR_SIZE
    buffer = memoryview(bytearray(end - first))
    assert not disk.try_read_into(first, buffer) or buffer == model.current[first:end]
