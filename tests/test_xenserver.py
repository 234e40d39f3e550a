# SPDX-License-Identifier: Apache-2.0
"""XenServer's tools and Xen Orchestra accept images, whichever verbs changed them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vhdkit
from tests.harness.vhd_builder import Block, Locator, Vhd, absolute, bits_of, child, pattern, relative
from tests.xenserver import faults_of
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.names.opening import open_layers
from vhdkit.chain.verbs.live_merge import live_merge
from vhdkit.finding import Severity
from vhdkit.units import KIB, MIB, SECTOR_SIZE

BLOCK = 512 * KIB
SIZE = 3 * BLOCK + 37 * SECTOR_SIZE
ROOM = 1024 * BLOCK  # as much as a BAT of one page can address
SPARE = 200_000  # entries of a BAT, as for 100 GiB
SEEN = 8 * MIB  # of a disk that grew beyond that
LONG = "a folder with a name as long as people like them to be, to have room for all that they say " * 2


class World:
    """A chain in a folder, its model, and the verbs, each of which leaves the chain whole."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        self.number = 0
        self.size = SIZE
        self.content = bytearray(SEEN)

    def path(self) -> Path:
        """A new name, sometimes a long one."""
        self.number += 1
        return self.folder / f"{self.number}{'-long' * self.rng.choice((0, 0, 40))}.avhd"

    def start(self, kind: str) -> None:
        """A base and a child, made by us or as XenServer makes them."""
        base, leaf = self.path().with_suffix(".vhd"), self.path()
        if kind == "ours":
            vhdkit.create_image(base, SIZE, block_size_bytes=BLOCK)
            vhdkit.create_child(leaf, base)
        else:
            make_xen_chain(base, leaf, spare=kind == "spare")
        self.leaf = leaf
        with vhdkit.open_disk(leaf) as disk:
            self.content[:SIZE] = disk.read(0, SIZE)

    @property
    def chain(self) -> list[Path]:
        """The files, leaf first."""
        return [Path(path) for path in vhdkit.chain_paths(self.leaf)]

    def write(self) -> None:
        """Write some sectors, also at the end of the disk."""
        with vhdkit.open_disk(self.leaf, writable=True) as disk:
            for place in (self.rng.randrange(SIZE - BLOCK), min(self.size, SEEN) - 9 * SECTOR_SIZE):
                data = self.rng.randbytes(self.rng.choice((1, 5, 9)) * SECTOR_SIZE)
                disk.write(place, data)
                self.content[place : place + len(data)] = data
            place = self.rng.randrange(0, SIZE - BLOCK, SECTOR_SIZE)
            disk.write_zeroes(place, BLOCK)
            self.content[place : place + BLOCK] = bytes(BLOCK)

    def fill(self) -> None:
        """Fill the last block of the original disk, to its end."""
        start = SIZE // BLOCK * BLOCK
        with vhdkit.open_disk(self.leaf, writable=True) as disk:
            data = self.rng.randbytes(min(self.size, start + BLOCK) - start)
            disk.write(start, data)
            self.content[start : start + len(data)] = data

    def snapshot(self) -> None:
        """Add a child."""
        if len(self.chain) < 5:
            leaf = self.path()
            vhdkit.create_child(leaf, self.leaf)
            self.leaf = leaf

    def merge(self) -> None:
        """Merge the leaf into its parent."""
        if len(self.chain) > 2:
            self.leaf = Path(vhdkit.merge(self.leaf).target)

    def merge_middle(self) -> None:
        """Merge a layer in the middle; its child gets another parent."""
        if len(self.chain) > 2:
            vhdkit.merge(self.chain[1], relink_children=True)

    def merge_live(self) -> None:
        """The same in an open chain."""
        layers = open_layers(self.leaf, writable=True)
        chain = Chain(layers)
        if len(layers) < 3 or len({one.size_bytes for one in layers[:3]}) > 1:
            chain.close()
            return
        with live_merge(chain, 1, 2) as merging:
            merging.copy()
            chain, problem = merging.exchange()
            assert problem is None
            merging.done()
        chain.close()

    def rebase(self) -> None:
        """Give a parent another name."""
        number = self.rng.randrange(1, len(self.chain))
        child, parent, *_ = self.chain[number - 1 :]
        moved = parent.rename(self.path().with_suffix(parent.suffix))
        vhdkit.rebase(child, moved)

    def relocate(self) -> None:
        """Move the whole chain to another folder."""
        there = self.folder.parent / self.rng.choice(("here", "there", LONG.strip()[:200]))
        there.mkdir(exist_ok=True)
        vhdkit.relocate(self.leaf, there)
        self.folder, self.leaf = there, there / self.leaf.name

    def grow(self) -> None:
        """Grow the disk, once beyond its BAT."""
        self.size = self.rng.choice((self.size + 5 * SECTOR_SIZE, self.size + BLOCK, max(self.size, ROOM) + BLOCK))
        vhdkit.resize(self.leaf, self.size)

    def compact(self) -> None:
        """Compact a layer's file."""
        vhdkit.compact(self.rng.choice(self.chain))

    def repair(self) -> None:
        """A repair finds nothing to do."""
        assert not vhdkit.repair(self.leaf).fixes

    def judge(self, after: str) -> None:
        """Others accept every file, our check reports nothing, and the disk reads as it should."""
        for path in self.chain:
            assert not faults_of(path), (after, faults_of(path))
        found = [one for one in vhdkit.check(self.leaf) if one.severity > Severity.NOTE]
        assert not found, (after, found)
        with vhdkit.open_disk(self.leaf) as disk:
            assert disk.size_bytes == self.size
            count = min(self.size, SEEN)
            assert disk.read(0, count) == self.content[:count], after


VERBS: tuple[Callable[[World], None], ...] = (
    World.write, World.fill, World.snapshot, World.merge, World.merge_middle, World.merge_live,
    World.rebase, World.relocate, World.grow, World.compact, World.repair,
)  # fmt: skip


def xen_names(parent: str) -> dict[int, Locator]:
    """The three names that XenServer writes, all relative."""
    return {
        0: Locator(b"MacX", f"file://./{parent}".encode()),
        1: absolute(f".\\{parent}"),
        2: relative(f".\\{parent}"),
    }


def make_xen_chain(base: Path, leaf: Path, *, spare: bool) -> None:
    """Lay out a chain like vhd-util: BAT after the header, batmap, names, aligned blocks; or with a BAT to grow
    into."""
    fields: dict[str, Any] = {
        "size": SIZE, "block_size": BLOCK, "creator": b"tap\0", "creator_version": 0x00010003, "host_os": b"\0\0\0\0",
        "aligned": True, "entry_count": SPARE if spare else None, "chs": (45, 4, 17),
    }  # fmt: skip
    map_bytes = SPARE // 8 if spare else 1
    base_id = bytes(range(16, 32))
    blocks = {0: Block(pattern(BLOCK)), 3: Block(pattern(5 * SECTOR_SIZE), bits_of(set(range(5)), BLOCK))}
    own = {"unique_id": base_id, "blocks": blocks, "batmap": b"\x80".ljust(map_bytes, b"\0")}
    Vhd(**(fields | own)).build().write(base)
    values = fields | {
        "parent_id": base_id, "parent_name": base.name.encode("utf-16-be"), "locators": xen_names(base.name),
        "blocks": {2: Block(pattern(3 * SECTOR_SIZE, 3), bits_of({0, 1, 2}, BLOCK)), 1: Block(pattern(BLOCK, 4))},
        "batmap": b"\x40".ljust(map_bytes, b"\0"),
    }  # fmt: skip
    child(base.name, **values).build().write(leaf)


def run(folder: Path, kind: str, seed: int, steps: int) -> None:
    """Run random verbs, and judge the result of each."""
    (folder / "here").mkdir()
    world = World(folder / "here", random.Random(f"xenserver {kind} {seed}"))
    world.start(kind)
    history = [kind]
    world.judge(kind)
    for _ in range(steps):
        verb = world.rng.choice(VERBS)
        history.append(verb.__name__)
        verb(world)
        world.judge(" ".join(history))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["ours", "xen", "spare"])
def test_xenserver_accepts_images_after_any_verbs(kind: str, seed: int, tmp_path: Path) -> None:
    """Random verbs on a chain of ours or of XenServer's leave images that vhd-util and vhd-lib call valid."""
    run(tmp_path, kind, seed, 7)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(100, 140))
@pytest.mark.parametrize("kind", ["ours", "xen", "spare"])
def test_xenserver_accepts_images_after_many_verbs(kind: str, seed: int, tmp_path: Path) -> None:
    """The same with more verbs."""
    run(tmp_path, kind, seed, 25)
