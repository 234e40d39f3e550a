# SPDX-License-Identifier: Apache-2.0
"""Disks with known content for the tests with other programs.

Decides what is written to our disks so that a mistake of another reader, or of ours, shows: runs that begin and end
inside sectors and blocks, whole blocks, zeros over data, data over zeros. Next to each disk a bytearray takes the same
writes; every reader must show its content.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

from vhdkit import Disk, DiskFormat, create_child, create_image, open_disk

SECTOR = 512
KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True)
class Shape:
    """One image to create. Sizes in bytes; `block_size` is ignored for a fixed one."""

    disk_format: DiskFormat
    size: int
    block_size: int = 2 * MIB

    def __str__(self) -> str:
        return f"{self.disk_format}-{self.size // SECTOR}s-{self.block_size // KIB}K"


FIXED_SHAPES = tuple(
    Shape(DiskFormat.FIXED, size) for size in (SECTOR, 3 * MIB, 5 * MIB + 3 * SECTOR, 68 * 61 * SECTOR)
)
DYNAMIC_SHAPES = (
    Shape(DiskFormat.DYNAMIC, SECTOR, 512 * KIB),
    Shape(DiskFormat.DYNAMIC, 3 * MIB + 7 * SECTOR, 512 * KIB),
    Shape(DiskFormat.DYNAMIC, 5 * MIB - SECTOR, MIB),
    Shape(DiskFormat.DYNAMIC, 8 * MIB),
    Shape(DiskFormat.DYNAMIC, 9 * MIB + 5 * SECTOR),
    Shape(DiskFormat.DYNAMIC, 40 * MIB + SECTOR, 32 * MIB),
)


def create_with_content(path: Path, shape: Shape, seed: int = 1) -> bytes:
    """Create the image, write to it, close it; returns its expected content."""
    create_image(path, shape.size, disk_format=shape.disk_format, block_size_bytes=shape.block_size)
    model = bytearray(shape.size)
    with open_disk(path, writable=True) as disk:
        scribble(disk, model, seed)
        erase(disk, model, seed)
    return bytes(model)


def scribble(disk: Disk, model: bytearray, seed: int, *, runs: int = 16) -> None:
    """Write random runs, one in four of them zeros, to the disk and the model, also to the last sector."""
    rng = random.Random(seed)
    for number in range(runs):
        size = min(rng.choice((1, SECTOR, 700, 4 * KIB, 33 * SECTOR, 200 * KIB)), len(model))
        offset = rng.randrange(len(model) - size + 1)
        if rng.random() < 0.7:
            offset -= offset % SECTOR
        if number % 4 == 3:
            disk.write_zeroes(offset, size)
            model[offset : offset + size] = bytes(size)
        else:
            write(disk, model, offset, rng.randbytes(size))
    write(disk, model, len(model) - SECTOR, rng.randbytes(SECTOR))


def write(disk: Disk, model: bytearray, offset: int, data: bytes) -> None:
    """Write the same data to both."""
    disk.write(offset, data)
    model[offset : offset + len(data)] = data


def erase(disk: Disk, model: bytearray, seed: int) -> None:
    """Trim random whole sectors, which makes them zeros where no layer below has data, and write over one of them."""
    rng = random.Random(-seed)
    sectors = len(model) // SECTOR
    for _ in range(4 if sectors > 1 else 0):
        count = rng.randint(1, min(sectors // 2, 40))
        first = rng.randrange(sectors - count)  # the last sector stays
        disk.trim(first * SECTOR, count * SECTOR)
        model[first * SECTOR : (first + count) * SECTOR] = bytes(count * SECTOR)
    if sectors > 1:
        write(disk, model, first * SECTOR, rng.randbytes(SECTOR))


def grow_chain(folder: Path, base: Shape, depth: int, *, seed: int = 1, whole_blocks: bool = False) -> list[bytes]:
    """Make a base and `depth` children, `0.vhd` to `<depth>.vhd`; returns the expected content of each, the base
    first.

    With `whole_blocks` children own only whole blocks.
    """
    contents = [create_with_content(folder / "0.vhd", base, seed)]
    for number in range(1, depth + 1):
        path = folder / f"{number}.vhd"
        create_child(path, folder / f"{number - 1}.vhd", block_size_bytes=base.block_size)
        model = bytearray(contents[-1])
        with open_disk(path, writable=True) as disk:
            if whole_blocks:
                _fill_blocks(disk, model, base.block_size, seed + number)
            else:
                scribble(disk, model, seed + number)
        contents.append(bytes(model))
    return contents


def _fill_blocks(disk: Disk, model: bytearray, block_size: int, seed: int) -> None:
    """Write every third block completely, beginning at another one for each seed."""
    rng = random.Random(seed)
    for offset in range(seed % 3 * block_size, len(model), 3 * block_size):
        write(disk, model, offset, rng.randbytes(min(block_size, len(model) - offset)))


def content_of(path: Path) -> bytes:
    """What vhdkit reads."""
    with open_disk(path) as disk:
        return disk.read(0, disk.size_bytes)


def content_sha256(disk: Disk) -> str:
    """The SHA-256 of the whole disk, read in pieces that do not match blocks."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(5 * MIB + SECTOR))
    for offset in range(0, disk.size_bytes, len(buffer)):
        piece = buffer[: min(len(buffer), disk.size_bytes - offset)]
        disk.read_into(offset, piece)
        digest.update(piece)
    return digest.hexdigest()


def sha256(content: bytes) -> str:
    """The SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def unpack_tar(archive: Path, folder: Path) -> None:
    """The regular files of an archive. `extractall` differs between the supported Python versions."""
    with tarfile.open(archive) as tar:
        for member in tar:
            source = tar.extractfile(member)
            if source is not None:
                path = folder / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                with source, path.open("wb") as target:
                    shutil.copyfileobj(source, target, MIB)
