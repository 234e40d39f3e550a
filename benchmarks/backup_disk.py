# SPDX-License-Identifier: Apache-2.0
"""The disk that `benchmarks/backup.py` saves: a chain, and the same content as a raw file for other programs.

Decides what is on it, where changes lie, and how a night of it is written. Must not know what is measured.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import vhdkit
from benchmarks.backup_live import PAGE
from vhdkit.backup.manifest import Consistency, Manifest
from vhdkit.backup.night import Circumstances, FrozenDisk, Wishes, writing
from vhdkit.backup.repository import create_repository
from vhdkit.chain.engine.chain import Chain
from vhdkit.units import GIB, MIB, SECTOR_SIZE

MACHINE = "benchmark"


def used_bytes(size_bytes: int) -> int:
    """How much of a disk of this size is used: a sixteenth, at most 1 GiB."""
    return min(size_bytes // 16, GIB)


@dataclass
class Disk:
    """A disk as a chain, and the same content as a raw file."""

    folder: Path
    size_bytes: int
    base_bytes: int
    leaf: Path
    raw: Path

    @classmethod
    def made(cls, folder: Path, size_bytes: int, used: int | None = None) -> Disk:
        """A disk with `used_bytes` of it used, or with another number."""
        used = used_bytes(size_bytes) if used is None else used
        disk = cls(folder, size_bytes, used, folder / "disk.vhd", folder / "disk.raw")
        vhdkit.create_image(disk.leaf, size_bytes)
        with vhdkit.open_disk(disk.leaf, writable=True) as image, disk.raw.open("wb") as raw:
            raw.truncate(size_bytes)
            rng = random.Random(1)
            for offset in range(0, used, MIB):
                data = rng.randbytes(MIB)
                image.write(offset, data)
                os.pwrite(raw.fileno(), data, offset)
        return disk

    def places(self, kind: str, seed: int) -> list[int]:
        """Where 1 % of the pages lie that change: anywhere, or in runs of 64."""
        rng, count = random.Random(seed), self.size_bytes // PAGE // 100
        if kind == "random":
            return sorted(rng.sample(range(self.size_bytes // PAGE), count))
        runs = rng.sample(range(self.size_bytes // PAGE // 64), count // 64)
        return sorted(run * 64 + page for run in runs for page in range(64))

    def change(self, places: Sequence[int], seed: int) -> None:
        """Write these pages to the chain's leaf and to the raw file."""
        rng = random.Random(seed)
        with vhdkit.open_disk(self.leaf, writable=True) as image, self.raw.open("r+b") as raw:
            for page in places:
                data = rng.randbytes(PAGE)
                image.write(page * PAGE, data)
                os.pwrite(raw.fileno(), data, page * PAGE)

    def freeze(self) -> Path:
        """Go on in a new child; the frozen layer."""
        frozen, self.leaf = self.leaf, Path(vhdkit.snapshot(self.leaf))
        return frozen


def save(disk: Disk, repository: Path) -> Manifest:
    """Freeze the disk and write a night."""
    frozen = disk.freeze()
    facts = Circumstances(datetime.now(UTC), "UTC", timedelta(0), "benchmark", Consistency.CRASH)
    with (
        create_repository(repository) as opened,
        writing(opened, MACHINE, MACHINE, Wishes()) as night,
        Chain.open(frozen) as chain,
    ):
        return night.save([FrozenDisk("disk", chain, keeps_layer=True)], facts)


def space_of(folder: Path) -> int:
    """How much space the files of a folder take."""
    return sum(one.stat().st_blocks * SECTOR_SIZE for one in folder.rglob("*") if one.is_file())
