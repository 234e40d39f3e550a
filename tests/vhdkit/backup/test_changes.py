# SPDX-License-Identifier: Apache-2.0
"""Which parts of a file a merge can change: nothing outside of them does, and they are few."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest

import vhdkit
from tests.support import daily_or_nightly
from vhdkit.backup.changes import NOTHING, changed_ranges, touched_blocks, touched_sectors
from vhdkit.chain.names.options import OpenOptions
from vhdkit.chain.verbs.merge_in_place import plan_in_place, prepare, run
from vhdkit.chain.verbs.merge_parts import opened
from vhdkit.store import FileStore
from vhdkit.units import KIB, MIB

SIZE = 40 * MIB
KINDS = {"dynamic": "vhd", "fixed": "vhd", "vhdx": "vhdx", "vhdx-fixed": "vhdx", "raw": "raw"}


def scribble(path: Path, rng: random.Random, count: int) -> None:
    """Write pieces of all sizes, some of them zeros."""
    with vhdkit.open_disk(path, writable=True, options=OpenOptions(allow_raw_parent=True)) as disk:
        for _ in range(count):
            size = rng.choice([512, 4096, 70 * KIB, 2 * MIB])
            at = rng.randrange((SIZE - size) // 512) * 512
            disk.write(at, rng.randbytes(size) if rng.random() < 0.8 else bytes(size))
        disk.flush()


def outside(ranges: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """What lies between the ranges."""
    found, at = [], 0
    for begin, length in ranges:
        found.append((at, begin))
        at = begin + length
    return [(begin, end) for begin, end in [*found, (at, size)] if end > begin]


def require_same_outside(old: bytes, path: Path, ranges: list[tuple[int, int]]) -> int:
    """Nothing outside the ranges has changed. Returns how many bytes are outside."""
    new = path.read_bytes()
    for begin, end in outside(ranges, len(new)):
        assert end <= len(old), "what is new has changed"
        assert old[begin:end] == new[begin:end], (begin, end)
    return sum(end - begin for begin, end in outside(ranges, len(new)))


@pytest.mark.parametrize("kind", KINDS)
def test_only_these_ranges_change(tmp_path: Path, kind: str) -> None:
    """Outside the ranges that are named before a merge, or in whole blocks after it, no byte of the target changes; of
    a child whose parent is exchanged no byte outside its structures does."""
    for run_number in range(daily_or_nightly(1, 40)):
        rng = random.Random(f"{kind} {run_number}")
        folder = tmp_path / str(run_number)
        folder.mkdir()
        suffix = "avhdx" if "vhdx" in kind else "avhd"
        paths = [folder / f"base.{KINDS[kind]}", *(folder / f"{number}.{suffix}" for number in range(3))]
        options = OpenOptions(allow_raw_parent=True)
        vhdkit.create_image(paths[0], SIZE, disk_format=kind)
        scribble(paths[0], rng, rng.randrange(12))
        for below, path in pairwise(paths):
            vhdkit.create_child(path, below, options=options)
            scribble(path, rng, rng.randrange(8))
        with vhdkit.open_disk(paths[2], options=options) as disk:
            expected = disk.read(0, SIZE)
        old, child = paths[0].read_bytes(), paths[3].read_bytes()
        with opened(paths[2], options) as layers:
            plan = plan_in_place(layers, 2, relink_children=True)
            with prepare(plan, options) as prepared:
                fine = touched_sectors(plan)
                seen: list[int] = []

                def look(_: object, fine=fine, old=old, child=child, seen=seen, plan=plan, paths=paths) -> None:  # type: ignore[no-untyped-def]
                    with FileStore.open(paths[0]) as store:
                        seen.append(require_same_outside(old, paths[0], changed_ranges(store, fine)))
                        seen.append(require_same_outside(old, paths[0], changed_ranges(store, touched_blocks(plan))))
                    with FileStore.open(paths[3]) as store:
                        require_same_outside(child, paths[3], changed_ranges(store, NOTHING))

                run(prepared, None, look)
        assert len(seen) == 2 and seen[0] >= seen[1]
        with vhdkit.open_disk(paths[0]) as disk:
            assert disk.read(0, SIZE) == expected


@pytest.mark.parametrize("kind", ["dynamic", "vhdx"])
def test_a_small_change_touches_little(tmp_path: Path, kind: str) -> None:
    """A merge of a few pages into a full image names little more than these pages and the structures."""
    base, child = tmp_path / f"base.{KINDS[kind]}", tmp_path / f"child.a{KINDS[kind]}"
    vhdkit.create_image(base, SIZE, disk_format=kind)
    with vhdkit.open_disk(base, writable=True) as disk:
        disk.write(0, random.Random(1).randbytes(SIZE))
    vhdkit.create_child(child, base)
    with vhdkit.open_disk(child, writable=True) as disk:
        for at in range(0, SIZE, 10 * MIB):
            disk.write(at + 12 * KIB, b"x" * 4096)
    with opened(child, OpenOptions()) as layers, FileStore.open(base) as store:
        plan = plan_in_place(layers, 1, relink_children=True)
        few = sum(size for _, size in changed_ranges(store, touched_sectors(plan)))
        more = sum(size for _, size in changed_ranges(store, touched_blocks(plan)))
        structures = sum(size for _, size in changed_ranges(store, NOTHING))
    assert structures <= few <= structures + 4 * (4096 + 70 * KIB) < more
    assert structures < 5 * MIB
