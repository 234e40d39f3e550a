# SPDX-License-Identifier: Apache-2.0
"""The images that `benchmarks/vhdx.py` works on. Decides what is in them; nothing is measured here."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

import vhdkit
from vhdkit.formats.vhdx.metadata import read_metadata
from vhdkit.store import FileStore

MIB = 1 << 20
PIECE = 2 * MIB


def fill(path: Path, size: int) -> Path:
    """A dynamic image of the format of its name, with data in all of its blocks."""
    vhdkit.create_image(path, size, disk_format="vhdx" if path.suffix == ".vhdx" else "dynamic")
    rng = random.Random(1)
    noise = [rng.randbytes(PIECE) for _ in range(4)]
    with vhdkit.open_disk(path, writable=True) as disk:
        for offset in range(0, size, PIECE):
            disk.write(offset, noise[offset // PIECE % len(noise)])
    return path


def mixed_raw(path: Path, size: int) -> None:
    """A raw disk: random runs, runs of zeros that were written, and holes."""
    rng = random.Random(7)
    with path.open("wb") as file:
        file.truncate(size)
        position = 0
        while position < size:
            count = min(rng.choice((64 << 10, 512 << 10, 2 << 20, 8 << 20)), size - position)
            kind = rng.randrange(3)
            if kind < 2:
                file.seek(position)
                file.write(rng.randbytes(count) if kind else bytes(count))
            position += count


def allocate_all(path: Path) -> None:
    """Point every BAT entry of a VHDX at a separate block, in a hole of the file."""
    store = FileStore.open(path, writable=True)
    try:
        metadata = read_metadata(store)
        shape, block = metadata.shape, metadata.items.block_size
        numbers = np.arange(shape.entry_count, dtype=np.uint64)
        chunks, within = np.divmod(numbers, np.uint64(shape.ratio + 1))
        blocks = chunks * np.uint64(shape.ratio) + within
        entries = (np.uint64(store.size()) + blocks * np.uint64(block)) | np.uint64(6)
        entries[(within == shape.ratio) | (blocks >= shape.block_count)] = 0
        store.pwrite(metadata.regions.bat.file_offset, entries.astype("<u8").tobytes())
        store.truncate(store.size() + shape.block_count * block)
    finally:
        store.close()
