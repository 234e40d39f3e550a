# SPDX-License-Identifier: Apache-2.0
"""A disk that is backed up in tests: it is written to, frozen, saved, merged; and what every night of it must read."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import vhdkit
from vhdkit.backup.graph import Images
from vhdkit.backup.layers import opened_layers
from vhdkit.backup.manifest import Consistency, Manifest
from vhdkit.backup.night import Circumstances, FrozenDisk, Wishes, Writing, writing
from vhdkit.backup.repository import create_repository, open_repository
from vhdkit.chain.engine.chain import Chain
from vhdkit.units import KIB, MIB, SECTOR_SIZE

MACHINE = "11112222333344445555666677778888"
SIZE = 4 * MIB
BLOCK = {"vhd": 512 * KIB, "vhdx": MIB, "raw": 512 * KIB}
RAW = vhdkit.OpenOptions(allow_raw_parent=True)


def facts(day: int = 0) -> Circumstances:
    """A moment."""
    taken = datetime(2026, 1, 1, 2, 30, tzinfo=UTC) + timedelta(days=day)
    return Circumstances(taken, "Europe/Berlin", timedelta(hours=1), "vhdkit test", Consistency.CRASH)


@dataclass
class Source:
    """A disk in a folder. `content` is what it reads now, `nights` what it read in each night of a repository."""

    folder: Path
    kind: str = "vhd"
    name: str = "web"
    disk_id: str = "disk-0"
    leaf: Path = field(init=False)
    content: bytes = b""
    nights: dict[tuple[str, int], bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.leaf = self.folder / f"{self.name}.{self.kind}"
        kind = {"vhd": "dynamic", "vhdx": "vhdx", "raw": "raw"}[self.kind]
        vhdkit.create_image(self.leaf, SIZE, disk_format=kind, block_size_bytes=BLOCK[self.kind])
        self.content = bytes(SIZE)
        self.write(0, 9000)
        self.write(2 * MIB + 5 * SECTOR_SIZE, 70_000)

    def write(self, offset: int, size: int = 4096) -> None:
        """Write bytes drawn by chance."""
        self._change(offset, random.Random(f"{self.leaf} {offset} {hash(self.content)}").randbytes(size))

    def write_zeroes(self, offset: int, size: int) -> None:
        """Write zeros over what there was."""
        self._change(offset, bytes(size))

    def _change(self, offset: int, data: bytes) -> None:
        with vhdkit.open_disk(self.leaf, writable=True, options=RAW) as disk:
            if any(data):
                disk.write(offset, data)
            else:
                disk.write_zeroes(offset, len(data))
        self.content = self.content[:offset] + data + self.content[offset + len(data) :]

    def freeze(self) -> Path:
        """Go on in a new child; returns the frozen layer."""
        frozen, self.leaf = self.leaf, Path(vhdkit.snapshot(self.leaf, options=RAW))
        return frozen

    def merge(self, frozen: Path) -> None:
        """Merge a frozen layer into its parent."""
        vhdkit.merge(frozen, relink_children=True, options=RAW)

    def save(self, repository: Path, *, frozen: Path | None = None, day: int = 0, **wishes: object) -> Manifest:
        """Freeze the disk, unless `frozen` is its frozen layer already, and write a night."""
        frozen = frozen or self.freeze()
        with saving([(self, frozen)], repository, **wishes) as (night, disks):  # type: ignore[arg-type]
            return night.save(disks, facts(day))


@contextmanager
def saving(
    frozen: list[tuple[Source, Path]], repository: Path, machine_id: str = MACHINE, **wishes: object
) -> Iterator[tuple[Writing, list[FrozenDisk]]]:
    """A night of these disks that is about to be written, and remembered when the block ends without an error."""
    with ExitStack() as held:
        opened = held.enter_context(create_repository(repository))
        night = held.enter_context(writing(opened, machine_id, "web", Wishes(**wishes)))  # type: ignore[arg-type]
        disks = []
        for one, path in frozen:
            chain = held.enter_context(Chain.open(path, options=RAW))
            disks.append(FrozenDisk(one.disk_id, chain, slot="scsi0:0", serial="S", keeps_layer=True))
        yield night, disks
        for one, _ in frozen:
            one.nights[(str(repository), night.number)] = one.content


def content_of(repository: Path, number: int, disk_id: str = "disk-0", machine_id: str = MACHINE) -> bytes:
    """What a disk of a night reads, by our engine through the manifests."""
    with open_repository(repository) as opened, opened.machine(machine_id) as machine:
        manifests = {one.number: one.manifest for one in machine.nights()}
        manifest = manifests[number]
        assert manifest is not None
        record = manifest.disk(disk_id)
        assert record is not None
        images = Images(one for one in manifests.values() if one is not None)
        with opened_layers(machine, images.chain(record.image)) as layers:
            chain = Chain(layers)
            buffer = bytearray(chain.size_bytes)
            chain.read_into(0, memoryview(buffer))
            return bytes(buffer)


def numbers_in(repository: Path, machine_id: str = MACHINE) -> list[int]:
    """The nights that exist, all of which have readable manifests."""
    if not list(repository.glob("machines/*/nights/*.json")):
        return []
    try:
        with open_repository(repository) as opened, opened.machine(machine_id) as machine:
            nights = machine.nights()
    except vhdkit.NotFound:
        return []
    assert all(one.manifest is not None for one in nights)
    return [one.number for one in nights]


def check_nights(source: Source, repository: Path, expected: Mapping[int, bytes] | None = None) -> list[int]:
    """Every night that exists reads as the disk did then, by the manifests and by its image's own names."""
    numbers = numbers_in(repository)
    for number in numbers:
        content = (expected or {}).get(number) or source.nights[(str(repository), number)]
        assert content_of(repository, number, source.disk_id) == content, number
        with open_repository(repository) as opened, opened.machine(MACHINE) as machine:
            night = machine.night(number)
            assert night is not None and night.manifest is not None
            record = night.manifest.disk(source.disk_id)
            assert record is not None
            path = Path(machine.path, record.image.text)
        with vhdkit.open_disk(path) as disk:
            assert disk.read(0, disk.size_bytes) == content, path
    return numbers
