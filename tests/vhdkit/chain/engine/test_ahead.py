# SPDX-License-Identifier: Apache-2.0
"""Reading pieces that are known in advance: what is asked for ahead, and how much."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vhdkit
from vhdkit.chain.engine.ahead import AHEAD_BYTES, Ahead, announced
from vhdkit.chain.engine.chain import Chain
from vhdkit.units import KIB, MIB, SECTOR_SIZE, sectors_to_bytes, whole_sectors

_STEP = whole_sectors(MIB)


class Watched(Chain):
    """A chain that notes what is prefetched, and is cold from one sector on."""

    cold_from = 0
    asked: list[tuple[int, int]]

    def prefetch(self, sector_index: int, sector_count: int) -> bool:
        """Note the range."""
        self.asked.append((sector_index, sector_count))
        return super().prefetch(sector_index, sector_count)

    def try_read_into(self, sector_index: int, buffer: memoryview) -> bool:
        """Fail in the cold part."""
        self.read_into(sector_index, buffer)
        return sector_index < self.cold_from


@pytest.fixture
def chain(tmp_path: Path) -> Watched:
    """A dynamic disk of 40 MiB, each MiB of which holds its number."""
    vhdkit.create_image(tmp_path / "a.vhd", 40 * MIB)
    with vhdkit.open_disk(tmp_path / "a.vhd", writable=True) as disk:
        for number in range(40):
            disk.write(number * MIB, bytes([number + 1]) * 4 * KIB)
    opened = Watched.open(tmp_path / "a.vhd")
    assert isinstance(opened, Watched)
    opened.asked = []
    return opened


def read_all(chain: Watched) -> list[int]:
    """Read the disk by MiB as `convert` does; returns, for each, how many bytes were asked for and not yet read."""
    ahead, buffer, pending = Ahead(chain), memoryview(bytearray(MIB)), []
    runs = [(number * _STEP, _STEP) for number in range(40)]
    for first, _ in announced(runs, lambda run: run[1], lambda run: ahead.expect(*run)):
        ahead.read_into(first, buffer)
        assert buffer[0] == first // _STEP + 1 and not any(buffer[4 * KIB :])
        pending.append(sum(sectors_to_bytes(count) for start, count in chain.asked if start > first))
    return pending


def test_a_disk_in_memory_is_not_asked_for(chain: Watched) -> None:
    """While every read finds its pages, the kernel is asked for nothing."""
    chain.cold_from = 1 << 40
    with chain:
        read_all(chain)
    assert chain.asked == []


@pytest.mark.parametrize("cold_from", [0, 25])
def test_from_the_first_miss_on_everything_is_asked_for_once(chain: Watched, cold_from: int) -> None:
    """What follows the first piece that was not in memory is prefetched, each part once, in order and bounded."""
    chain.cold_from = cold_from * _STEP
    with chain:
        pending = read_all(chain)
    assert chain.asked == [(number * _STEP, _STEP) for number in range(cold_from + 1, 40)]
    assert max(pending) == min(AHEAD_BYTES, (39 - cold_from) * MIB)


@given(st.lists(st.integers(0, 4 * AHEAD_BYTES // SECTOR_SIZE), max_size=30))
def test_items_are_announced_in_order_and_within_the_bound(counts: list[int]) -> None:
    """`INV-AHEAD-BOUNDED`: items are announced before they are returned, and at most one goes beyond the bound."""
    news: list[int] = []
    for number, count in enumerate(announced(counts, lambda one: one, news.append)):
        assert news[: number + 1] == counts[: number + 1] and news[number] == count
        assert sectors_to_bytes(sum(news[number + 1 : -1])) <= AHEAD_BYTES
    assert news == counts
