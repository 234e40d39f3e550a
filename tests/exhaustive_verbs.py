# SPDX-License-Identifier: Apache-2.0
"""The verbs that `tests/exhaustive.py` combines, and the disks that they change.

Each verb does one thing to the disk `MAIN` of a `World`, as a user would, and updates the world: which file is the
disk's leaf now, and what the disk must read as.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import vhdkit
from vhdkit.units import KIB, PAGE_SIZE, SECTOR_SIZE

FOLDERS = ("a", "b")
MAIN, TWIN, COPY = "main", "twin", "copy"


@dataclass(frozen=True, slots=True)
class Kind:
    """The format of the images."""

    disk_format: vhdkit.DiskFormat
    base_suffix: str
    child_suffix: str
    block_size_bytes: int
    disk_size_bytes: int


KINDS = {
    "vhd": Kind(vhdkit.DiskFormat.DYNAMIC, ".vhd", ".avhd", 512 * KIB, 1024 * KIB + 37 * SECTOR_SIZE),
    "vhdx": Kind(vhdkit.DiskFormat.VHDX, ".vhdx", ".avhdx", 1024 * KIB, 2048 * KIB + 5 * PAGE_SIZE),
}


class Unfit(Exception):
    """The verb does not apply to this folder."""


@dataclass(frozen=True, slots=True)
class Head:
    """A disk: the path of its leaf inside the folder, and its expected content."""

    path: str
    content: bytes


@dataclass
class World:
    """A folder with disks in it; the verbs change both."""

    folder: Path
    disks: dict[str, Head]
    seed: str
    kind: Kind

    def place(self, disk: str) -> str:
        """The leaf of a disk. Raises Unfit if it does not exist."""
        if disk not in self.disks:
            raise Unfit
        return str(self.folder / self.disks[disk].path)

    def moved(self, disk: str, path: str) -> None:
        """Record that the disk's leaf is another file now."""
        self.disks[disk] = replace(self.disks[disk], path=str(Path(path).relative_to(self.folder)))


# -- the verbs --------------------------------------------------------------------------------------------------


def write(world: World) -> None:
    """Write a sector, some pages and some zeros."""
    path, rng = world.place(MAIN), random.Random(f"write {world.seed}")
    content = bytearray(world.disks[MAIN].content)
    with vhdkit.open_disk(path, writable=True) as disk:
        for size in (SECTOR_SIZE, 3 * PAGE_SIZE, 700):
            offset = rng.randrange(disk.size_bytes - size)
            data = rng.randbytes(size)
            disk.write(offset, data)
            content[offset : offset + size] = data
        offset = rng.randrange(disk.size_bytes - world.kind.block_size_bytes)
        disk.write_zeroes(offset, PAGE_SIZE)
        content[offset : offset + PAGE_SIZE] = bytes(PAGE_SIZE)
    world.disks[MAIN] = replace(world.disks[MAIN], content=bytes(content))


def snapshot(world: World) -> None:
    """Make a new leaf with a default name."""
    world.moved(MAIN, vhdkit.snapshot(world.place(MAIN)))


def clone(world: World) -> None:
    """Make two children on the disk's leaf."""
    base = Path(world.place(MAIN))
    if TWIN in world.disks:
        raise Unfit
    main, twin = vhdkit.clone(base, [base.with_name(f"{name}{world.kind.child_suffix}") for name in ("c1", "c2")])
    world.disks[TWIN] = world.disks[MAIN]
    world.moved(MAIN, main)
    world.moved(TWIN, twin)


def merge(world: World) -> None:
    """Merge the leaf into its parent."""
    world.moved(MAIN, vhdkit.merge(world.place(MAIN)).target)


def merge_all(world: World) -> None:
    """Merge every layer into the base."""
    leaf = world.place(MAIN)
    world.moved(MAIN, vhdkit.merge(leaf, into=vhdkit.chain_paths(leaf)[-1]).target)


def merge_middle(world: World) -> None:
    """Merge the layer below the leaf into its parent; the leaf gets another parent."""
    chain = vhdkit.chain_paths(world.place(MAIN))
    if len(chain) < 3:
        raise Unfit
    vhdkit.merge(chain[1], relink_children=True)


def compact(world: World) -> None:
    """Compact the leaf's file."""
    vhdkit.compact(world.place(MAIN))


def compact_base(world: World) -> None:
    """Compact the base's file."""
    chain = vhdkit.chain_paths(world.place(MAIN))
    if len(chain) < 2:
        raise Unfit
    vhdkit.compact(chain[-1])


def resize(world: World) -> None:
    """Grow the disk by a block."""
    path, head = world.place(MAIN), world.disks[MAIN]
    size = vhdkit.resize(path, len(head.content) + world.kind.block_size_bytes).virtual_size_after_bytes
    world.disks[MAIN] = replace(head, content=head.content.ljust(size, b"\0"))


def rebase(world: World) -> None:
    """Write the names of the parent again."""
    chain = vhdkit.chain_paths(world.place(MAIN))
    if len(chain) < 2:
        raise Unfit
    vhdkit.rebase(chain[0], chain[1])


def pull(world: World) -> None:
    """Make the leaf independent of its parents."""
    leaf = world.place(MAIN)
    if len(vhdkit.chain_paths(leaf)) < 2:
        raise Unfit
    vhdkit.pull(leaf, independent=True)


def pull_middle(world: World) -> None:
    """Fill the layer below the leaf from its parent, and leave that one out."""
    chain = vhdkit.chain_paths(world.place(MAIN))
    if len(chain) < 3:
        raise Unfit
    vhdkit.pull(chain[1], to=chain[2], relink=True)


def relocate(world: World) -> None:
    """Move the chain to the other folder."""
    leaf = Path(world.place(MAIN))
    other = world.folder / FOLDERS[1 - FOLDERS.index(leaf.parent.name)]
    vhdkit.relocate(leaf, other)
    world.moved(MAIN, str(other / leaf.name))


def repair(world: World) -> None:
    """Repair the leaf."""
    vhdkit.repair(world.place(MAIN))


def collect_garbage(world: World) -> None:
    """Remove layers that no disk needs."""
    folder = Path(world.place(MAIN)).parent
    keep = [str(world.folder / head.path) for head in world.disks.values()]
    vhdkit.collect_garbage(folder, [path for path in keep if Path(path).parent == folder], delete=True)


def convert(world: World) -> None:
    """Copy the disk to one file, which replaces an earlier one."""
    source = Path(world.place(MAIN))
    target, kind = source.with_name(f"flat{world.kind.base_suffix}"), world.kind
    vhdkit.convert(source, target, kind.disk_format, block_size_bytes=kind.block_size_bytes, replace=True)
    world.disks[COPY] = Head(str(target.relative_to(world.folder)), world.disks[MAIN].content)


VERBS: dict[str, Callable[[World], None]] = {
    verb.__name__.replace("_", "-"): verb
    for verb in (
        write, snapshot, clone, merge, merge_all, merge_middle, compact, compact_base, resize, rebase, pull,
        pull_middle, relocate, repair, collect_garbage, convert,
    )
}  # fmt: skip
CHANGES_CONTENT = {"write", "resize"}
NEW_LEAF = {"snapshot", "clone"}  # the newest leaf is the disk as soon as it exists
