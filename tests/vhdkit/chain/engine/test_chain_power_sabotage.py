# SPDX-License-Identifier: Apache-2.0
"""Proof that the power-cut harness can fail: it must find the classic fault that each of these engines has."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.harness.model import SectorModel
from tests.harness.power import BLOCK_SIZE, PowerRun, Scene, Violation, child_scene, dynamic_scene, short_block_scene
from vhdkit.disk import Disk
from vhdkit.formats.vhd import dynamic, opening
from vhdkit.formats.vhd.bat import ENTRIES_PER_SECTOR
from vhdkit.formats.vhd.commit import Commit
from vhdkit.formats.vhd.layout import BAT_ENTRY_SIZE, BAT_UNALLOCATED
from vhdkit.formats.vhd.metadata import Metadata
from vhdkit.store import Store
from vhdkit.units import SECTOR_SIZE, round_up, sectors_to_bytes

SEEDS = range(6)  # the correct engine passes with every one of these


def run_all(make_scene: Callable[[int], Scene]) -> None:
    """The workloads that the correct engine survives."""
    for seed in SEEDS:
        PowerRun(make_scene(seed), seed, second_cuts=False).run()


@pytest.mark.parametrize("make_scene", [dynamic_scene, child_scene])
def test_a_bat_entry_written_at_once_is_caught(
    make_scene: Callable[[int], Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    """INV-DATA-BEFORE-METADATA: the harness finds a BAT entry that is written before its block is synced."""
    honest = Commit.publish

    def publish(self: Commit, block_index: int, start_bytes: int, bitmap: bytearray | None) -> None:
        """As vhd-lib does: the entry is written to the file with the first write."""
        honest(self, block_index, start_bytes, bitmap)
        number = block_index // ENTRIES_PER_SECTOR
        first = number * ENTRIES_PER_SECTOR
        raw = self._bat.entries[first : first + ENTRIES_PER_SECTOR].astype(">u4").tobytes()
        self._store.pwrite(self._bat.sector_offset(number), raw)

    monkeypatch.setattr(Commit, "publish", publish)
    with pytest.raises(Violation):
        run_all(make_scene)


@pytest.mark.parametrize("make_scene", [dynamic_scene, child_scene])
def test_metadata_without_a_sync_before_it_is_caught(
    make_scene: Callable[[int], Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    """INV-DATA-BEFORE-METADATA: the harness finds a flush that syncs data and metadata together."""
    monkeypatch.setattr(Commit, "_sync_data", lambda self: self.guard.check())
    with pytest.raises(Violation):
        run_all(make_scene)


def test_a_bitmap_written_at_once_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-DATA-BEFORE-METADATA: the harness finds a bitmap that is written before its data is synced."""
    honest = Commit.touch

    def touch(self: Commit, block_index: int) -> None:
        """The bits are written to the file with the data."""
        honest(self, block_index)
        self._store.pwrite(self._bat.block_start(block_index), bytes(self.bitmaps[block_index]))

    monkeypatch.setattr(Commit, "touch", touch)
    with pytest.raises(Violation, match="INV-FLUSHED-OR-NEWER"):
        run_all(child_scene)


def test_a_flush_without_a_sync_of_metadata_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-FLUSHED-OR-NEWER: the harness finds a flush that returns before its bitmaps and BAT are durable."""

    def write_metadata(self: Commit, bitmaps: dict[int, bytes], table: dict[int, bytes]) -> None:
        """Everything but the sync at the end."""
        for start_bytes, raw in bitmaps.items():
            self._store.pwrite(start_bytes, raw)
        for number, raw in table.items():
            self._store.pwrite(self._bat.sector_offset(number), raw)

    monkeypatch.setattr(Commit, "_write_metadata", write_metadata)
    with pytest.raises(Violation):
        run_all(child_scene)


def test_reusing_trimmed_space_too_early_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-NO-REUSE: the harness finds space that a trim freed and a second block took before the BAT was flushed."""
    free: list[int] = []
    honest_trim, honest_place = dynamic.DynamicImage.trim, Commit.place_block

    def trim(self: dynamic.DynamicImage, sector_index: int, sector_count: int) -> None:
        """Frees whole blocks at once."""
        honest_trim(self, sector_index, sector_count)
        for block, _, count in list(self._split(sector_index, sector_count)):
            start = self.bat.block_start(block)
            if start >= 0 and sectors_to_bytes(count) == BLOCK_SIZE:
                free.append(start)
                self.bat.set(block, sectors_to_bytes(BAT_UNALLOCATED))

    def place_block(self: Commit, raw_bitmap: bytearray, fill: Callable[[int], object] | None) -> int:
        """Uses freed space first."""
        if not free:
            return honest_place(self, raw_bitmap, fill)
        start = free.pop()
        self._store.punch(start, self._bitmap_size + self._block_size)
        self._store.pwrite(start, raw_bitmap)
        if fill is not None:
            fill(start + self._bitmap_size)
        return start

    def script(disk: Disk, model: SectorModel) -> None:
        """Block 0 is trimmed, and block 1 takes its space while the file still assigns it to block 0."""
        for offset in (0, BLOCK_SIZE):
            data = bytes([offset % 251 + 1]) * (64 * SECTOR_SIZE)
            model.write(offset, data)
            disk.write(offset, data)
            if offset == 0:
                disk.flush()
                model.flushed()
                model.begin_trim(0, BLOCK_SIZE)
                disk.trim(0, BLOCK_SIZE)
                disk.chain.map._forget(0)
                model.adopt(disk.read(0, BLOCK_SIZE))
        disk.flush()
        model.flushed()

    def run() -> None:
        for seed in SEEDS:
            free.clear()
            scene = dynamic_scene(seed, writes=0)
            PowerRun(scene, seed, script=script, second_cuts=False).run()

    run()  # the correct engine passes the same script
    monkeypatch.setattr(dynamic.DynamicImage, "trim", trim)
    monkeypatch.setattr(Commit, "place_block", place_block)
    with pytest.raises(Violation):
        run()


def test_a_block_over_the_trailing_footer_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-NO-REUSE: the harness finds a new block that begins where the last footer is, as most writers do."""
    honest_init, honest_place = Commit.__init__, Commit.place_block

    def begin(self: Commit, *args: object, **options: int) -> None:
        """Blocks are not aligned, so the first one begins on the footer."""
        honest_init(self, *args, **options)  # type: ignore[arg-type]
        self._free_bytes = round_up(self._free_bytes, SECTOR_SIZE) - 2 * SECTOR_SIZE

    def place_block(self: Commit, raw_bitmap: bytearray, fill: Callable[[int], object] | None) -> int:
        """Ignores what is at the end of the file."""
        with monkeypatch.context() as blind:
            blind.setattr(self._store, "size", lambda: 0)
            return honest_place(self, raw_bitmap, fill)

    monkeypatch.setattr(Commit, "__init__", begin)
    monkeypatch.setattr(Commit, "place_block", place_block)
    with pytest.raises(Violation):
        run_all(child_scene)


def test_two_footers_in_one_phase_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-FOOTER-COPY: the harness finds a copy and a trailing footer that are written between the same two syncs."""
    honest = Commit.place_block

    def place_block(self: Commit, raw_bitmap: bytearray, fill: Callable[[int], object] | None) -> int:
        """Refreshes the copy as well, as vhd-lib does."""
        self._store.pwrite(0, self._footer_raw)
        return honest(self, raw_bitmap, fill)

    monkeypatch.setattr(Commit, "place_block", place_block)
    with pytest.raises(Violation, match="INV-FOOTER-COPY"):
        run_all(dynamic_scene)


def test_mending_in_the_wrong_order_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-FLUSHED-OR-NEWER: the harness finds a mend that writes the new footer before it has removed the old one,
    which is inside a block."""

    def mend(store: Store, metadata: Metadata, nominal_end: int, *, cut_end: int | None) -> bool:
        """Writes the new footer first, then the hole."""
        if cut_end is None:
            return False
        store.pwrite(max(nominal_end, store.size()), metadata.footer_raw)
        store.sync()
        store.punch(metadata.tail.offset_bytes, SECTOR_SIZE)
        store.sync()
        return True

    monkeypatch.setattr(opening, "mend", mend)
    with pytest.raises(Violation, match="INV-FLUSHED-OR-NEWER"):
        run_all(short_block_scene)


def test_the_sabotage_writes_whole_sectors() -> None:
    """The sabotage above rewrites whole BAT sectors, as the engine does."""
    assert ENTRIES_PER_SECTOR * BAT_ENTRY_SIZE == SECTOR_SIZE
