# SPDX-License-Identifier: Apache-2.0
"""Merges whose power is cut: several files and a folder that all stop at the same moment.

A `World` holds the images of a chain as `CrashStore`s, and a simulated folder: which names exist, and the merge's
record. Inside each operation on them the watcher makes folders that a cut right there could leave, and judges each:

    the leaf exists        it reads as before the merge; so do its children
    the leaf is gone       the target reads as the leaf did
    then recovery          as in `vhdkit merge --resume`, sometimes cut a second time; only the target is left

A violated promise raises `Violation`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from tests.harness.model import ParsedVhd
from tests.harness.power import BLOCK_SIZE, DISK_SIZE, Violation
from tests.harness.stores import CrashStore, MemStore, PowerCut
from vhdkit import errors
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.records.intent import Intent, Named, Phase
from vhdkit.chain.verbs.merge_plan import plan_merge
from vhdkit.chain.verbs.merge_steps import carry_out, drop_earlier_try, fill_target, is_complete, remove_sources
from vhdkit.formats.probe import FormatName, open_layer
from vhdkit.formats.raw import create_raw
from vhdkit.formats.vhd.create import ParentLink, create_differencing, create_dynamic, create_fixed
from vhdkit.formats.vhd.metadata import read_metadata
from vhdkit.formats.vhd.opening import open_dynamic
from vhdkit.formats.vhd.relink import relink
from vhdkit.image import Layer
from vhdkit.units import SECTOR_SIZE, sectors_to_bytes, whole_sectors

Runs = Sequence[tuple[int, int]]  # (first sector, sectors; below zero: written zeros)


def identity(store: MemStore) -> bytes:
    """The unique id of an image, all zeros for a raw one."""
    return read_metadata(store).footer.unique_id if store.name.endswith("vhd") else bytes(16)


def layer_of(store: MemStore, *, writable: bool = False) -> Layer:
    """The open image."""
    name = FormatName.VHD if store.name.endswith("vhd") else FormatName.RAW
    return open_layer(store, format_name=name, writable=writable)


def content_of(stores: Sequence[MemStore]) -> bytearray:
    """The content of the chain of these files, leaf first."""
    chain = Chain([layer_of(store) for store in stores])
    buffer = bytearray(chain.size_bytes)
    chain.read_into(0, memoryview(buffer))
    return buffer


def write_runs(store: MemStore, runs: Runs, rng: random.Random) -> MemStore:
    """Write the runs into the image itself, over whatever is below it."""
    layer = layer_of(store, writable=True)
    for first, count in runs:
        if count < 0:
            layer.write_zeroes(first, -count)
        else:
            layer.write(first, memoryview(rng.randbytes(sectors_to_bytes(count))))
    layer.close()
    return store


def child_of(parent: MemStore, name: str, runs: Runs, rng: random.Random, *, size: int = DISK_SIZE) -> MemStore:
    """A differencing image on `parent` that owns the runs."""
    store = MemStore(name)
    link = ParentLink(identity(parent), 0, parent.name, f".\\{parent.name}", f"\\{parent.name}")
    create_differencing(store, size, link, block_size_bytes=BLOCK_SIZE)
    return write_runs(store, runs, rng)


def base_image(kind: str, runs: Runs, rng: random.Random, *, size: int = DISK_SIZE) -> MemStore:
    """A raw, fixed or dynamic image."""
    store = MemStore("base.img" if kind == "raw" else "base.vhd")
    if kind == "dynamic":
        create_dynamic(store, size, block_size_bytes=BLOCK_SIZE)
    else:
        (create_raw if kind == "raw" else create_fixed)(store, size)
    return write_runs(store, runs, rng)


def unaligned(store: MemStore) -> MemStore:
    """The same image with its blocks one sector further on, as programs without alignment write them."""
    parsed = ParsedVhd.parse(store)
    size = parsed.bitmap_bytes + BLOCK_SIZE
    footer = store.pread(0, SECTOR_SIZE)
    moved = store.copy()
    table = bytearray(store.pread(parsed.table_offset_bytes, 4 * len(parsed.entries)))
    starts = [sectors_to_bytes(entry) for entry in parsed.entries if entry != 0xFFFFFFFF]
    first = min(starts)
    moved.truncate(first)
    place = first + SECTOR_SIZE
    for block, entry in enumerate(parsed.entries):
        if entry != 0xFFFFFFFF:
            moved.pwrite(place, store.pread(sectors_to_bytes(entry), size))
            table[4 * block : 4 * block + 4] = whole_sectors(place).to_bytes(4, "big")
            place += size
    moved.pwrite(parsed.table_offset_bytes, table)
    moved.pwrite(place, footer)
    return moved


@dataclass
class Scene:
    """Files of a chain, leaf first; those before `index` are merged into that one. `children` are the leaf's."""

    stores: list[MemStore]
    index: int
    children: list[MemStore] = field(default_factory=list)

    @property
    def intent(self) -> Intent:
        """The merge, as its record describes it."""
        names = [Named(store.name, identity(store)) for store in self.stores[: self.index + 1]]
        return Intent(Phase.COPY, names[-1], tuple(names[:-1]), bool(self.children))


@dataclass
class Found:
    """A folder after a cut."""

    files: dict[str, MemStore]
    record: Intent | None


class World:
    """A folder with images whose power can be cut; also the `Names` of a merge in it."""

    def __init__(self, files: dict[str, MemStore], record: Intent | None, index: int, order: list[str]) -> None:
        self.files = {name: CrashStore(store) for name, store in files.items()}
        self.order = order  # the chain at the start, leaf first
        self.index = index
        self.record = record
        self.watcher: Callable[[], None] | None = None
        self.cut_at: int | None = None
        self.operation_count = 0
        self._records: list[Intent | None] = [record]  # those that a cut may leave
        self._gone: list[str] = []  # being removed
        for store in self.files.values():
            store.watcher = self._operation

    def _operation(self) -> None:
        self.operation_count += 1
        if self.watcher is not None:
            self.watcher()
        if self.cut_at is not None and self.operation_count >= self.cut_at:
            for store in self.files.values():
                store.dead = True
            raise PowerCut(f"at operation {self.operation_count}")

    def after_cut(self, rng: random.Random) -> Found:
        """What is found when the power is back: one of the many possible folders."""
        files = {name: store.after_cut(rng) for name, store in self.files.items()}
        for name in self._gone:
            if rng.random() < 0.5:
                del files[name]
        return Found(files, rng.choice(self._records))

    # -- Names --------------------------------------------------------------------------------------------------

    def write(self, intent: Intent) -> None:
        """See `Names.write`."""
        self._records = [self.record, intent]
        self._operation()
        self.record, self._records = intent, [intent]

    def remove_record(self) -> None:
        """See `Names.remove_record`."""
        assert self.record is not None
        self._records = [self.record, None]
        self._operation()
        self.record, self._records = None, [None]

    def remove(self, path: str) -> None:
        """See `Names.remove`."""
        if path in self.files:
            self._gone.append(path)
        self._operation()
        for name in self._gone:
            del self.files[name]
        self._gone.clear()

    # -- merging ------------------------------------------------------------------------------------------------

    def chain(self) -> list[CrashStore]:
        """The existing files of the chain, leaf first."""
        return [self.files[name] for name in self.order if name in self.files]

    def merge(self, intent: Intent) -> None:
        """The merge, as `chain.verbs.merge` does it with real files."""
        stores = self.chain()
        layers = [layer_of(store) for store in stores]
        index = self.index
        below = layers[index + 1].size_bytes if layers[index + 1 :] else 0
        plan = plan_merge(layers[:index], layers[index], below_bytes=below)
        target = layer_of(stores[index], writable=True) if intent.phase is Phase.COPY else layers[index]

        def fill() -> tuple[int, int]:
            return fill_target(plan, target, partial(layer_of, stores[index], writable=True))

        carry_out(intent, self, fill, [partial(self._repoint, name, intent) for name in self._children()])

    def _children(self) -> list[str]:
        return [name for name in self.files if name not in self.order]

    def _repoint(self, name: str, intent: Intent) -> None:
        store = self.files[name]
        header = read_metadata(store).header
        assert header is not None
        if header.parent_unique_id == intent.leaf.unique_id:
            path = intent.target.path
            link = ParentLink(intent.target.unique_id, 0, path, f".\\{path}", f"\\{path}")
            relink(open_dynamic(store, writable=True), link)

    def recover(self) -> None:
        """The same as `resume_merge`."""
        if self.record is None:
            return
        if self.record.leaf.path in self.files:
            layers = [layer_of(store) for store in self.chain()]
            plan = plan_merge(layers[: self.index], layers[self.index], below_bytes=DISK_SIZE)
            if self.record.phase is not Phase.COPY:
                whole = is_complete(plan, Chain(layers), Chain(layers[self.index :]))
                assert whole, "INV-MERGE-PRESERVES: the record says complete, and it is not"
            else:
                drop_earlier_try(layer_of(self.chain()[self.index], writable=True))
            self.merge(self.record)
        else:
            assert self.record.phase is Phase.REMOVE, "INV-MERGE-PRESERVES: the leaf is gone, the target not complete"
            remove_sources(self.record, self)


@dataclass
class MergeRun:
    """One merge, cut inside every operation; `cuts` folders are judged there, and every third is recovered."""

    scene: Scene
    cuts: int = 3
    judged: int = 0
    operations: int = 0
    seen: set[str] = field(default_factory=set)  # which states were found after a cut

    def run(self) -> None:
        """Run the merge; raises Violation."""
        scene = self.scene
        self.order = [store.name for store in scene.stores]
        self.before = content_of(scene.stores)
        self.child_content = {child.name: content_of([child, *scene.stores]) for child in scene.children}
        files = {store.name: store for store in (*scene.stores, *scene.children)}
        world = World(files, None, scene.index, self.order)
        world.watcher = lambda: self._watch(world)
        world.merge(scene.intent)
        self.operations = world.operation_count
        self._watch(world)
        self._judge_finished(world.after_cut(random.Random(0)), "the end")

    def _watch(self, world: World) -> None:
        for cut in range(self.cuts):
            seed = f"operation {world.operation_count}, cut {cut}"
            rng = random.Random(seed)
            found = world.after_cut(rng)
            self.judge(found, seed)
            if cut == 0:
                self._recover(found, rng, seed)

    def _recover(self, found: Found, rng: random.Random, seed: str) -> None:
        """The power comes back, fails again in the middle of the recovery, and comes back for good."""
        world = World(found.files, found.record, self.scene.index, self.order)
        world.cut_at = rng.randint(1, 40)
        try:
            world.recover()
        except PowerCut:
            found = world.after_cut(rng)
            self.judge(found, f"{seed}, second cut")
            world = World(found.files, found.record, self.scene.index, self.order)
            world.recover()
        finally_found = world.after_cut(rng)
        self.judge(finally_found, f"{seed}, recovered")
        if found.record is not None:
            self._judge_finished(finally_found, f"{seed}, recovered")

    def judge(self, found: Found, seed: str) -> None:
        """Check what a reader sees in this folder."""
        self.judged += 1
        leaf, target = self.order[0], self.order[self.scene.index]
        self.seen.add(f"{found.record.phase if found.record else None}, {'leaf' if leaf in found.files else 'gone'}")
        start = 0 if leaf in found.files else self.scene.index
        self._compare(found, self.order[start:], self.before, f"{seed}: {self.order[start]}")
        for name, content in self.child_content.items():
            header = read_metadata(found.files[name]).header
            assert header is not None
            moved = header.parent_unique_id == identity(found.files[target])
            names = self.order[self.scene.index if moved else 0 :]
            self._compare(found, [name, *names], content, f"{seed}: {name}")

    def _compare(self, found: Found, names: list[str], expected: bytearray, seed: str) -> None:
        missing = [name for name in names if name not in found.files]
        if missing:
            raise Violation(f"INV-MERGE-PRESERVES: {missing} gone while still needed ({seed})")
        for writable in (False, True):
            stores = [found.files[name].copy() for name in names]
            try:
                if writable and stores[0].name.endswith("vhd"):
                    layer_of(stores[0], writable=True).close()
                observed = content_of(stores)
            except errors.VhdkitError as error:
                raise Violation(f"INV-MERGE-PRESERVES: no open after a cut: {error} ({seed})") from error
            if observed != expected:
                wrong = [
                    i for i in range(0, len(expected), SECTOR_SIZE) if observed[i : i + 512] != expected[i : i + 512]
                ]
                raise Violation(
                    f"INV-MERGE-PRESERVES: {len(wrong)} sectors differ, the first {wrong[0] // SECTOR_SIZE} ({seed})"
                )

    def _judge_finished(self, found: Found, seed: str) -> None:
        kept = [*self.order[self.scene.index :], *self.child_content]
        if sorted(found.files) != sorted(kept) or found.record is not None:
            raise Violation(f"INV-MERGE-PRESERVES: {sorted(found.files)} left, record {found.record} ({seed})")
        target = found.files[self.order[self.scene.index]]
        if target.name.endswith(".avhd") or (target.name == "base.vhd" and target.pread(0, 8) == b"conectix"):
            layer_of(target, writable=True).close()
            faults = ParsedVhd.parse(target).overlaps()
            if faults:
                raise Violation(f"INV-BLOCKS-DISJOINT: {faults} ({seed})")
