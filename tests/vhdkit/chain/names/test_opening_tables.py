# SPDX-License-Identifier: Apache-2.0
"""The memory that the tables of a whole chain take, and that a table read from its file has the same entries."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pytest

import vhdkit
from vhdkit.chain.engine.chain import Chain
from vhdkit.chain.names import opening
from vhdkit.chain.verbs.live import freezing
from vhdkit.formats.vhd.bat import ENTRIES_PER_PART, MAX_PARTS, Bat, BatInFile
from vhdkit.formats.vhd.dynamic import DynamicImage
from vhdkit.store import FileStore
from vhdkit.units import GIB, KIB, MIB

LAYERS = 12
BLOCK = 512 * KIB


def written(folder: Path, size: int, rng: random.Random) -> Path:
    """A chain in which each layer owns a few pages, spread over the disk; returns its leaf."""
    leaf = folder / "0.vhd"
    vhdkit.create_image(leaf, size, block_size_bytes=BLOCK)
    for number in range(1, LAYERS):
        with vhdkit.open_disk(leaf, writable=True) as disk:
            for _ in range(6):
                disk.write(rng.randrange(size // 4096) * 4096, rng.randbytes(4096))
        leaf = Path(vhdkit.snapshot(leaf, folder / f"{number}.avhd"))
    return leaf


def held(chain: Chain) -> int:
    """The bytes of tables in memory."""
    return sum(layer.table_bytes for layer in chain.layers if isinstance(layer, DynamicImage))


def test_tables_of_a_long_chain_take_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-BOUNDED: the memory of a chain is its map and a few tables, however many layers it has."""
    monkeypatch.setattr(opening, "MAX_TABLE_BYTES", MIB)
    leaf = written(tmp_path, 64 * GIB, random.Random(5))
    tables = LAYERS * 64 * GIB // BLOCK * 5
    tracemalloc.start()
    try:
        with Chain.open(leaf) as chain:
            now, peak = tracemalloc.get_traced_memory()
            assert 0 < held(chain) <= MIB
            map_bytes = 8 * chain.map.grain_count + 8 * len(chain.map.fine)
            assert now - map_bytes < tables // 3 and peak - map_bytes < tables
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("limit", [0, 5000])
def test_a_chain_reads_the_same_with_tables_in_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """INV-MAP-EQUALS-WALK: wherever the BAT is kept, reading, listing, freezing and merging give the same results."""
    leaf = written(tmp_path, 64 * MIB, random.Random(6))
    with vhdkit.open_disk(leaf) as disk:
        wanted, runs = disk.read(0, disk.size_bytes), list(disk.extents())
    monkeypatch.setattr(opening, "MAX_TABLE_BYTES", limit)
    with vhdkit.open_disk(leaf) as disk:
        assert held(disk.chain) <= limit
        assert disk.read(0, disk.size_bytes) == wanted and list(disk.extents()) == runs
    chain = Chain.open(leaf, writable=True)
    with freezing([(chain, str(tmp_path / "top.avhd"))]) as prepared:
        (chain,) = prepared.freeze()
        prepared.done()
    assert held(chain) <= limit
    chain.close()
    vhdkit.merge(tmp_path / "top.avhd", into=tmp_path / "3.avhd")
    with vhdkit.open_disk(tmp_path / "3.avhd") as disk:
        assert disk.read(0, disk.size_bytes) == wanted


def test_a_table_in_its_file_has_the_same_entries(tmp_path: Path) -> None:
    """Entry by entry and as a whole, over more parts than are cached, and where the file has since been truncated."""
    count = ENTRIES_PER_PART * (MAX_PARTS + 2) + 5
    rng = random.Random(8)
    path = tmp_path / "table"
    raw = b"".join(rng.choice((b"\xff" * 4, rng.randbytes(4))) for _ in range(count))
    path.write_bytes(bytes(512) + raw)
    with FileStore.open(path, writable=True) as store:
        loaded, left = Bat.load(store, 512, count), BatInFile(store, 512, count)
        assert len(left) == count and (left.entries == loaded.entries).all()
        assert (left.allocated() == loaded.allocated()).all()
        numbers = [*range(count), *(rng.randrange(count) for _ in range(1000))]
        assert [left.block_start(one) for one in numbers] == [loaded.block_start(one) for one in numbers]
        store.truncate(512 + 4 * 100)
        assert BatInFile(store, 512, count).block_start(100) == -1
