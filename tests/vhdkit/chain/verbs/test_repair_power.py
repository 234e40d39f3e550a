# SPDX-License-Identifier: Apache-2.0
"""Power cuts while a repair clears bits that claim too much or cuts off zeros behind a footer; in a resize, too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import vhdkit
from tests.harness.folder_power import Files, FolderPower, files_of, fill, repeatable
from tests.harness.vhd_builder import FIXED, Block, Vhd, bits_of, pattern
from tests.vhdkit.formats.vhdx.damaged import HARMLESS, base
from vhdkit.units import KIB, SECTOR_SIZE

BLOCK = 512 * KIB
UNIT = 64 * KIB
SIZE = BLOCK + 9 * SECTOR_SIZE
NAME = "disk.vhd"


def bits_past_end() -> bytes:
    """The last block's bits are all set, and the bytes behind the end of the disk are not zeros."""
    blocks = {0: Block(pattern(BLOCK)), 1: Block(pattern(BLOCK, 2))}
    return Vhd(size=SIZE, block_size=BLOCK, blocks=blocks, chs=(15, 4, 17)).build().store().contents()


def batmap_of_too_much() -> bytes:
    """The batmap marks blocks as complete that own one sector or cross the disk's end; bits behind it are set."""
    blocks = {0: Block(pattern(SECTOR_SIZE), bits_of({0}, BLOCK)), 1: Block(pattern(BLOCK, 2))}
    image = Vhd(
        size=SIZE, block_size=BLOCK, blocks=blocks, chs=(15, 4, 17), creator=b"tap\0", creator_version=0x00010003,
        aligned=True, batmap=b"\xc0",
    )  # fmt: skip
    return image.build().store().contents()


def padded(size: int = 4 * UNIT, padding: int = 3 * UNIT) -> bytes:
    """A fixed disk that was extended as if it were raw."""
    cylinders = size // SECTOR_SIZE // (4 * 17)
    return (
        pattern(UNIT).ljust(size, b"\0")
        + Vhd(disk_type=FIXED, size=size, chs=(cylinders, 4, 17)).footer()
        + bytes(padding)
    )


def vhdx_of_doubts() -> bytes:
    """A VHDX whose log was not replayed, with damaged copies of a header and of the region table."""
    store = base()
    for fault in ("log", "header 2", "table 1"):
        HARMLESS[fault][1](store)
    return store.contents()


def content(path: Path) -> bytes:
    """The whole disk."""
    with vhdkit.open_disk(path) as disk:
        return disk.read(0, disk.size_bytes)


def warnings(path: Path) -> list[str]:
    """The findings of `check` that are more than notes."""
    return [one.code for one in vhdkit.check(path) if one.severity > vhdkit.Severity.NOTE]


def cut_everywhere(folder: Path, start: Files, verb: Callable[[Path], object], seed: str) -> list[Files]:
    """Every folder that a cut inside the verb may leave, and the folder at the end."""
    fill(folder, start)
    power = FolderPower(folder, seed)
    with repeatable(seed):
        power.run(lambda: verb(folder / NAME))
    assert len(power.cuts) > 3, "the power was never cut"
    return [*(cut.files for cut in power.cuts), files_of(folder)]


def judged(folder: Path, found: Files, verb: Callable[[Path], object], expected: tuple[bytes, ...]) -> None:
    """What is found reads as before or as after, for a reader and for a writer; the verb then completes."""
    path = folder / NAME
    fill(folder, found)
    assert content(path) in expected
    fill(folder, found)
    with vhdkit.open_disk(path, writable=True) as disk:
        assert disk.read(0, disk.size_bytes) in expected
    assert content(path) in expected
    verb(path)
    assert content(path) == expected[-1] and not vhdkit.repair(path, dry_run=True).fixes
    assert set(warnings(path)) <= {"undo-log-ignored"}  # an undo log may leave zeros of its length


@pytest.mark.parametrize("damaged", [bits_past_end, batmap_of_too_much, padded, vhdx_of_doubts])
def test_inv_repair_whole_at_a_cut(damaged: Callable[[], bytes], tmp_path: Path) -> None:
    """INV-REPAIR-WHOLE: cut anywhere, and once more during the second repair, the disk reads as it did."""
    start, folder = {NAME: damaged()}, tmp_path / "here"
    fill(folder, start)
    expected = content(folder / NAME)
    assert vhdkit.repair(folder / NAME, dry_run=True).fixes, "the scene needs no repair"
    for number, found in enumerate(cut_everywhere(folder, start, vhdkit.repair, "repair")):
        judged(folder, found, vhdkit.repair, (expected,))
        if number % 6 == 4:
            for again in cut_everywhere_or_nothing(folder, found, f"again {number}"):
                judged(folder, again, vhdkit.repair, (expected,))


def cut_everywhere_or_nothing(folder: Path, start: Files, seed: str) -> list[Files]:
    """As `cut_everywhere`, for a repair that may have nothing left to do."""
    fill(folder, start)
    power = FolderPower(folder, seed)
    with repeatable(seed):
        power.run(lambda: vhdkit.repair(folder / NAME))
    return [cut.files for cut in power.cuts]


@pytest.mark.parametrize("size", [2 * UNIT, 5 * UNIT, 9 * UNIT])
def test_inv_resize_whole_before_zeros(size: int, tmp_path: Path) -> None:
    """INV-RESIZE-WHOLE: a padded fixed disk that is resized has its old or its new size after every cut."""
    start, folder = {NAME: padded()}, tmp_path / "here"
    before = pattern(UNIT).ljust(4 * UNIT, b"\0")

    def resize(path: Path) -> None:
        vhdkit.resize(path, size, shrink=True)

    for found in cut_everywhere(folder, start, resize, "resize"):
        judged(folder, found, resize, (before, before[:size].ljust(size, b"\0")))
