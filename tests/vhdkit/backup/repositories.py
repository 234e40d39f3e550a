# SPDX-License-Identifier: Apache-2.0
"""Repositories for tests: nights whose images are made with vhdkit's ordinary verbs, and what each night must read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import vhdkit
from vhdkit.backup.manifest import Consistency, DiskRecord, FileRecord, How, Manifest
from vhdkit.backup.names import ImagePlace, night_word
from vhdkit.backup.repository import MachineFolder, create_repository, open_repository
from vhdkit.backup.sums import make_table
from vhdkit.chain.names.parents import linkage_id_of
from vhdkit.units import MIB

MACHINE = "11112222333344445555666677778888"
FIRST = datetime(2026, 1, 1, 2, 30, tzinfo=UTC)
DISK_BYTES = 8 * MIB


def manifest(night: int = 1, repository: str = "ab" * 16, **changes: object) -> Manifest:
    """A manifest without disks, which nothing is made for."""
    made = Manifest(
        repository=repository,
        machine_id=MACHINE,
        machine_name="web",
        night=night,
        id=f"{night:032x}",
        previous=night - 1 or None,
        taken=FIRST + timedelta(days=night),
        zone="Europe/Berlin",
        utc_offset=timedelta(hours=1),
        finished=FIRST + timedelta(days=night, minutes=1),
        tool="vhdkit 0.2",
        consistency=Consistency.CRASH,
        disks=(),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def disk_record(disk_id: str = "disk-0", **changes: object) -> DiskRecord:
    """The record of a disk that nothing is made for."""
    made = DiskRecord(
        disk_id=disk_id,
        image=ImagePlace(disk_id, "00001.vhd"),
        image_id="cd" * 16,
        parent_image=None,
        virtual_size_bytes=DISK_BYTES,
        file_size_bytes=3 * MIB,
        data_bytes=2 * MIB,
        sums_root="ef" * 32,
        how=How.FULL,
        slot="scsi0:0",
        serial="S1",
    )
    return replace(made, **changes)  # type: ignore[arg-type]


@dataclass
class Nights:
    """A repository with one machine. `content` is what each disk of each night reads."""

    path: Path
    extension: str = "vhd"
    content: dict[int, dict[str, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        create_repository(self.path).close()

    @contextmanager
    def machine(self, machine_id: str = MACHINE) -> Iterator[MachineFolder]:
        """The machine, open."""
        with open_repository(self.path) as repository, repository.machine(machine_id) as machine:
            yield machine

    def add(
        self,
        changes: Mapping[str, Mapping[int, bytes]],
        *,
        on: int | None = None,
        files: Mapping[str, bytes] | None = None,
        **more: object,
    ) -> int:
        """Add a night: for each disk the bytes that change, by offset, against the night `on` (None: the newest).

        A disk without changes makes no image. Returns the night's number.
        """
        with (
            open_repository(self.path) as repository,
            repository.made_machine(MACHINE, "web") as machine,
            machine.held("a test"),
        ):
            nights = machine.nights()
            number = machine.next_number(nights)
            base = next((one.manifest for one in reversed(nights) if on in (None, one.number)), None)
            disks = tuple(self._disk(machine, number, base, disk, of) for disk, of in sorted(changes.items()))
            made = manifest(number, repository.id, disks=disks, files=self._files(machine, number, files or {}))
            machine.write_manifest(replace(made, **more))  # type: ignore[arg-type]
            return number

    def _disk(
        self, machine: MachineFolder, number: int, base: Manifest | None, disk: str, of: Mapping[int, bytes]
    ) -> DiskRecord:
        before = None if base is None else base.disk(disk)
        old = self.content[base.night][disk] if base is not None and before is not None else bytes(DISK_BYTES)
        new = bytearray(old)
        for offset, data in of.items():
            new[offset : offset + len(data)] = data
        self.content.setdefault(number, {})[disk] = bytes(new)
        if before is not None and not of:
            assert base is not None
            return replace(before, how=How.SAME, reference_night=base.night)
        with machine.images(disk, make=True) as folder:
            name = f"{night_word(number)}.{'a' if before is not None else ''}{self.extension}"
            path = os.path.join(folder.path, name)
            if before is None:
                vhdkit.create_image(path, DISK_BYTES, disk_format="vhdx" if self.extension == "vhdx" else "dynamic")
            else:
                vhdkit.create_child(path, os.path.join(folder.path, before.image.name))
            with vhdkit.open_disk(path, writable=True) as image:
                for offset, data in of.items():
                    image.write(offset, data)
                image.flush()
            return self.recorded(
                machine,
                disk_record(
                    disk,
                    image=ImagePlace(disk, name),
                    parent_image=None if before is None else before.image,
                    how=How.FULL if before is None else How.LAYERS,
                    reference_night=None if base is None or before is None else base.night,
                ),
            )

    def recorded(self, machine: MachineFolder, record: DiskRecord) -> DiskRecord:
        """The record with the sums and the ids of the image as it is now."""
        with machine.images(record.disk_id) as folder, folder.file(record.image.name) as store:
            with folder.new_file(record.image.sums_name, replace=True) as table:
                root = make_table(store, table)
            return replace(
                record,
                image_id=linkage_id_of(store).hex(),
                file_size_bytes=store.size(),
                data_bytes=store.allocated_bytes(),
                sums_root=root,
            )

    def _files(self, machine: MachineFolder, number: int, files: Mapping[str, bytes]) -> tuple[FileRecord, ...]:
        if not files:
            return ()
        with machine.meta(number, make=True) as folder:
            for name, raw in files.items():
                folder.write(name, raw)
        return tuple(FileRecord(name, len(raw), hashlib.sha256(raw).hexdigest()) for name, raw in files.items())

    def image(self, number: int, disk: str) -> Path:
        """The path of the image of a night."""
        with self.machine() as machine:
            night = machine.night(number)
            assert night is not None and night.manifest is not None
            record = night.manifest.disk(disk)
            assert record is not None
            return Path(machine.path, record.image.text)

    def check(self, *numbers: int) -> None:
        """Every disk of these nights reads as it must, by its image's own chain."""
        for number in numbers:
            for disk, content in self.content[number].items():
                with vhdkit.open_disk(self.image(number, disk)) as image:
                    assert image.read(0, image.size_bytes) == content, (number, disk)
