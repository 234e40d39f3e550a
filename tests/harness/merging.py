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

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from tests.harness.model import ParsedVhd
from tests.harness.power import BLOCK_SIZE, DISK_SIZE, Violation, faults_of
from tests.harness.stores import CrashStore, MemStore, PowerCut
from vhdkit import errors, formats
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.records.intent import Intent, Named, Phase
from vhdkit.chain.verbs.merge_plan import MergePlan, plan_merge
from vhdkit.chain.verbs.merge_steps import carry_out, drop_earlier_try, fill_target, is_complete, remove_sources
from vhdkit.formats.format import Format
from vhdkit.formats.probe import FormatName, open_layer
from vhdkit.formats.raw import create_raw
from vhdkit.formats.vhd.create import create_dynamic, create_fixed
from vhdkit.formats.vhdx.create import create as create_vhdx
from vhdkit.formats.vhdx.create import new_disk
from vhdkit.image import Layer, ParentRef
from vhdkit.units import MIB, SECTOR_SIZE, sectors_to_bytes, whole_sectors

Runs = Sequence[tuple[int, int]]  # (first sector, sectors; below zero: written zeros)


def format_of(store: MemStore) -> Format:
    """The format, by the file's name."""
    for suffix, name in ((".vhd", FormatName.VHD), (".avhd", FormatName.VHD), (".img", FormatName.RAW)):
        if store.name.endswith(suffix):
            return formats.named(name)
    return formats.named(FormatName.VHDX)


def identity(store: MemStore) -> bytes:
    """The id by which children know an image, all zeros for a raw one."""
    return format_of(store).linkage_id(store) or bytes(16)


def layer_of(store: MemStore, *, writable: bool = False) -> Layer:
    """The open image."""
    return open_layer(store, format_name=FormatName(format_of(store).name), writable=writable)


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


def link_to(ids: tuple[bytes, ...], name: str) -> ParentRef:
    """A reference to a parent in the same folder."""
    link = ParentRef.of_paths(ids[0], 0, relative=f".\\{name}", absolute=f"\\{name}", name=name)
    return replace(link, linkage_ids=ids) if any(ids[0]) else link


def child_of(parent: MemStore, name: str, runs: Runs, rng: random.Random, *, size: int | None = None) -> MemStore:
    """A differencing image on `parent` that owns the runs."""
    store, below = MemStore(name), layer_of(parent)
    made_by, link = formats.for_children_of(below), link_to((identity(parent),), parent.name)
    disk = below if made_by.name == below.format_name else None
    size = size or (below.size_bytes if name.endswith("vhdx") else DISK_SIZE)
    made_by.create_child(store, size, link, block_size_bytes=block_size_of(name), disk=disk)
    return write_runs(store, runs, rng)


def block_size_of(name: str) -> int:
    """The size of the blocks in these tests; a VHDX has none smaller than this."""
    return MIB if name.endswith("vhdx") else BLOCK_SIZE


def base_image(kind: str, runs: Runs, rng: random.Random, *, size: int = DISK_SIZE) -> MemStore:
    """A raw, fixed or dynamic image, or a VHDX (`vhdx`, `vhdx-fixed`)."""
    store = MemStore({"raw": "base.img", "vhdx": "base.vhdx", "vhdx-fixed": "base.vhdx"}.get(kind, "base.vhd"))
    if store.name.endswith("vhdx"):
        create_vhdx(store, new_disk(size), MIB, fixed=kind == "vhdx-fixed")
    elif kind == "dynamic":
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
        self.changes_names = False  # the operation is one on the record or on a name
        self._records: list[Intent | None] = [record]  # those that a cut may leave
        self._gone: list[str] = []  # being removed
        for store in self.files.values():
            store.watcher = self._operation

    def _name_operation(self) -> None:
        self.changes_names = True
        self._operation()
        self.changes_names = False

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
        self._name_operation()
        self.record, self._records = intent, [intent]

    def hand_on(self, intent: Intent) -> None:
        """See `Names.hand_on`: these images have no marks."""

    def remove_record(self) -> None:
        """See `Names.remove_record`."""
        assert self.record is not None
        self._records = [self.record, None]
        self._name_operation()
        self.record, self._records = None, [None]

    def remove(self, path: str) -> None:
        """See `Names.remove`."""
        if path in self.files:
            self._gone.append(path)
        self._name_operation()
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
        plan = self._plan(layers)
        target = layer_of(stores[index], writable=True) if intent.phase is Phase.COPY else layers[index]
        if intent.phase is Phase.COPY and intent.target.renewed_id is None:
            intent = replace(intent, target=replace(intent.target, renewed_id=formats.of(target).renewed_id(target)))

        def accepted(layer: Layer) -> Layer:
            if intent.target.renewed_id is not None:
                accept_renewed_id(stores[index - 1], layer, intent.target)
            return layer

        def fill() -> tuple[int, int]:
            return fill_target(plan, accepted(target), lambda: accepted(layer_of(stores[index], writable=True)))

        carry_out(intent, self, fill, [partial(self._repoint, name, intent) for name in self._children()])

    def _plan(self, layers: list[Layer]) -> MergePlan:
        below = layers[self.index + 1].size_bytes if layers[self.index + 1 :] else 0
        return plan_merge(layers[: self.index], layers[self.index], below_bytes=below)

    def _children(self) -> list[str]:
        return [name for name in self.files if name not in self.order]

    def _repoint(self, name: str, intent: Intent) -> None:
        store = self.files[name]
        if intent.leaf.unique_id in parents_of(store):
            path = intent.target.path
            format_of(store).relink(store, link_to((identity(self.files[path]),), path))

    def recover(self) -> None:
        """The same as `resume_merge`."""
        if self.record is None:
            return
        if self.record.leaf.path in self.files:
            layers = [layer_of(store) for store in self.chain()]
            plan = self._plan(layers)
            if self.record.phase is not Phase.COPY:
                whole = is_complete(plan, Chain(layers), Chain(layers[self.index :]))
                assert whole, "INV-MERGE-PRESERVES: the record says complete, and it is not"
            else:
                drop_earlier_try(layer_of(self.chain()[self.index], writable=True))
            self.merge(self.record)
        else:
            assert self.record.phase is Phase.REMOVE, "INV-MERGE-PRESERVES: the leaf is gone, the target not complete"
            remove_sources(self.record, self)


def accept_renewed_id(child: MemStore, target: Layer, named: Named) -> None:
    """As in `chain.verbs.merge_steps`, without marks beside the files."""
    assert named.renewed_id is not None
    formats.of(target).set_renewed_id(target, named.renewed_id)
    format_of(child).relink(child, link_to((named.renewed_id, named.unique_id), named.path))


def parents_of(store: MemStore) -> tuple[bytes, ...]:
    """The ids that an image records of its parent."""
    parent = format_of(store).facts(store).parent
    return () if parent is None else parent.linkage_ids


@dataclass
class MergeRun:
    """One merge, cut inside every operation; `cuts` folders are judged there, and every third is recovered.

    With `every` n only each n-th operation on the images is cut.
    """

    scene: Scene
    cuts: int = 3
    every: int = 1
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
        if world.operation_count % self.every and not world.changes_names:
            return
        for cut in range(self.cuts * (3 if world.changes_names else 1)):
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
        ids = {name: identity(store) for name, store in found.files.items()}
        known = {name: parents_of(store) for name, store in found.files.items()}
        self._compare(found, self.order[start:], self.before, f"{seed}: {self.order[start]}")
        chains = [self.order[start:]]
        for name, content in self.child_content.items():
            moved = ids[target] in known[name]
            chains.append([name, *self.order[self.scene.index if moved else 0 :]])
            self._compare(found, chains[-1], content, f"{seed}: {name}")
        for names in chains:
            for upper, lower in itertools.pairwise(names):
                if any(ids[lower]) and ids[lower] not in known[upper]:
                    raise Violation(f"INV-PARENT-ID: {upper} does not know its parent {lower} ({seed})")

    def _compare(self, found: Found, names: list[str], expected: bytearray, seed: str) -> None:
        missing = [name for name in names if name not in found.files]
        if missing:
            raise Violation(f"INV-MERGE-PRESERVES: {missing} gone while still needed ({seed})")
        for writable in (False, True):
            stores = [found.files[name].copy() for name in names]
            try:
                if writable and not stores[0].name.endswith(".img"):
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
        if layer_of(target).block_size_bytes:
            layer_of(target, writable=True).close()
            faults = faults_of(target)
            if faults:
                raise Violation(f"INV-BLOCKS-DISJOINT: {faults} ({seed})")
