# SPDX-License-Identifier: Apache-2.0
"""Snapshots of leaves whose writer was killed, in every format: the power is cut, or the process killed, anywhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import vhdkit
from tests.harness.folder_power import Cut, FolderPower, files_of, fill, repeatable
from tests.harness.killing import killings
from tests.support import daily_or_nightly
from tests.vhdkit.chain.verbs.test_merge import FAMILIES, Family, content
from vhdkit.units import MIB, SECTOR_SIZE

SIZE = 2 * MIB


def left_by_a_kill(folder: Path, family: Family) -> tuple[str, str, bytes]:
    """A leaf that a killed process flushed and wrote to again, above a base; returns leaf, new child, content."""
    base, leaf = folder / family.base, folder / family.child("leaf")
    with repeatable("snapshot"):
        vhdkit.create_image(base, SIZE, disk_format=family.kind, block_size_bytes=family.block_size_bytes)
        with vhdkit.open_disk(base, writable=True) as disk:
            disk.write(0, b"base" * 3000)
        vhdkit.create_child(leaf, base)
        if (writer := os.fork()) == 0:
            disk = vhdkit.open_disk(leaf, writable=True)
            disk.write(SECTOR_SIZE, b"flushed" * 300)
            disk.write(MIB + 5 * SECTOR_SIZE, b"another block" * 300)
            disk.flush()
            disk.write(SECTOR_SIZE, b"rewrite" * 300)
            os._exit(0)
        os.waitpid(writer, 0)
    return leaf.name, family.child("snapshot"), content(leaf)


def assert_disks_hold(folder: Path, leaf: str, child: str, expected: bytes) -> None:
    """The disk reads as before, through its new leaf if there is one; a new leaf has no content of its own."""
    assert content(folder / leaf) == expected
    if (folder / child).exists():
        assert content(folder / child) == expected
        assert not [one for one in vhdkit.check(folder / child) if one.severity is vhdkit.Severity.ERROR]


def complete(folder: Path, leaf: str, child: str) -> None:
    """Repeat the snapshot unless it was made, and write to the new leaf."""
    if not (folder / child).exists():
        vhdkit.snapshot(folder / leaf, folder / child)
    with vhdkit.open_disk(folder / child, writable=True) as disk:
        disk.write(0, b"after the snapshot")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_cut_of_a_snapshot(name: str, tmp_path: Path) -> None:
    """INV-SET-HARMLESS: wherever the power is cut while a leaf is frozen, its log replayed and its child made, every
    disk reads as before; so it does if the power is cut again while the snapshot is repeated."""
    work, found, again = (tmp_path / one for one in ("work", "found", "again"))
    work.mkdir()
    leaf, child, expected = left_by_a_kill(work, FAMILIES[name])
    counts = [0, 0]

    def judge_again(cut: Cut) -> None:
        counts[1] += 1
        fill(again, cut.files)
        assert_disks_hold(again, leaf, child, expected)

    def judge(cut: Cut) -> None:
        counts[0] += 1
        fill(found, cut.files)
        assert_disks_hold(found, leaf, child, expected)
        if not (found / child).exists():
            again_power = FolderPower(found, f"again {counts[0]}", judge=judge_again, every=daily_or_nightly(5, 1))
            again_power.run(lambda: vhdkit.snapshot(found / leaf, found / child))
        complete(found, leaf, child)

    with repeatable("taken"):
        FolderPower(work, name, judge=judge).run(lambda: vhdkit.snapshot(work / leaf, work / child))
    assert_disks_hold(work, leaf, child, expected)
    assert counts[0] > 3 and counts[1] > daily_or_nightly(0, 5), counts


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kill_of_a_snapshot(name: str, tmp_path: Path) -> None:
    """INV-SET-HARMLESS: after a kill before any call that changes a file, every disk reads as before, and the snapshot
    can be repeated."""
    work = tmp_path / "work"
    work.mkdir()
    leaf, child, expected = left_by_a_kill(work, FAMILIES[name])
    start = files_of(work)
    for number in killings(lambda: vhdkit.snapshot(work / leaf, work / child), step=daily_or_nightly(7, 1)):
        assert_disks_hold(work, leaf, child, expected)
        assert number > 0 or (work / child).exists()
        complete(work, leaf, child)
        fill(work, start)
