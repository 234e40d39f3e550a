# SPDX-License-Identifier: Apache-2.0
"""Machines for tests of snapshots: small disks with known content, and the expected content of every state."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import vhdkit
import vmm
from vmm.api.machine_snapshots import MachineSnapshots
from vmm.host.proc import ProcessRef
from vmm.model.spec import DiskSpec
from vmm.snapshots import background_merge as fold
from vmm.snapshots.preflight import definition_of
from vmm.snapshots.steps import options_of
from vmm.store import registry
from vmm.store.snapshots.store import load_tree, read_merging
from vmm.store.state import processes_of

each_kind = pytest.mark.parametrize("machines", ["vhd", "vhdx"], indirect=True)
each_kind_nightly = pytest.mark.parametrize(
    "machines", ["vhd", pytest.param("vhdx", marks=pytest.mark.nightly)], indirect=True
)
SUFFIXES = (".vhd", ".avhd", ".vhdx", ".avhdx")
DISK_BYTES = 1 << 20
BLOCK_BYTES = 512 << 10
_END_BYTES = 64 << 20


@dataclass
class Machines:
    """All machines of one test, whose disks are images of one kind: vhd or vhdx."""

    folder: Path
    kind: str = "vhd"

    def create(self, name: str = "web", disks: Sequence[Path] | int = 1, **settings: Any) -> MachineSnapshots:
        """Make a machine with that many new disks on SCSI and IDE, or with these."""
        if isinstance(disks, int):
            disks = [self.disk(f"{name}-{number}.{self.kind}") for number in range(disks)]
        vmm.Manager().create(
            name, disks=[vmm.DiskRequest(str(path)) for path in disks], memory_bytes=16 << 20, **settings
        )
        return vmm.Manager().snapshots(name)

    def disk(self, name: str) -> Path:
        """Make a new image with a unique first sector."""
        path = self.folder / name
        if path.suffix == ".vhdx":
            vhdkit.create_image(path, DISK_BYTES, disk_format="vhdx")
        else:
            vhdkit.create_image(path, DISK_BYTES, block_size_bytes=BLOCK_BYTES)
        with vhdkit.open_disk(path, writable=True) as disk:
            disk.write(0, name.encode().ljust(512, b"\0"))
        return path

    def write(self, name: str, offset_bytes: int, data: bytes) -> None:
        """Write to all disks of the machine, as a guest would that ran in the meantime."""
        for disk in vmm.Manager().show(name).spec.disks:  # type: ignore[union-attr]
            assert disk.path is not None
            with vhdkit.open_disk(disk.path, writable=True, options=options_of(disk)) as opened:
                opened.write(offset_bytes, data)

    def now(self, name: str) -> dict[str, str]:
        """The hash of each disk in its present state."""
        spec = registry.load(name).spec
        return {disk.id: digest(disk) for disk in spec.disks}

    def of_snapshot(self, name: str, word: str) -> dict[str, str]:
        """The hash of each disk of a snapshot."""
        snapshot = load_tree(registry.load(name).paths).find(word)
        return {disk.id: digest(disk) for disk in definition_of(snapshot).disks}

    def states(self, name: str) -> dict[str | None, dict[str, str]]:
        """The hashes by snapshot id, with None for the present state."""
        tree = load_tree(registry.load(name).paths)
        found: dict[str | None, dict[str, str]] = {one: self.of_snapshot(name, one) for one in tree.snapshots}
        return found | {None: self.now(name)}

    def merge(self, name: str) -> int:
        """Do all due merges, in this process."""
        machine = registry.load(name)
        fold.follow(machine.paths, lambda merging: None)
        return fold.Fold(machine.paths, machine.runtime).run()

    def quiet(self, name: str) -> None:
        """Wait for the merge in the background."""
        machine = registry.load(name)
        time.sleep(0.05)  # another process begins it, and leaves no trace before that
        fold.follow(machine.paths, lambda merging: None)

    def images(self) -> set[str]:
        """The names of all images in the folder."""
        return {path.name for path in self.folder.iterdir() if path.suffix in SUFFIXES}

    def end(self) -> None:
        """Kill whatever still runs."""
        refs: list[ProcessRef] = []
        for machine in registry.load_all()[0]:
            refs += [ref for part, ref in processes_of(machine.runtime).items() if part in ("keeper", "worker")]
            refs += processes_of(machine.runtime).values()
            if (merging := read_merging(machine.paths)) is not None:
                refs.append(merging.ref)
        for ref in refs:
            if ref.pid != os.getpid():
                ref.send(signal.SIGKILL)
                ref.wait(10)


def digest(disk: DiskSpec) -> str:
    """The hash of the whole content of a disk, or of both ends of a huge one."""
    assert disk.path is not None
    options = vhdkit.OpenOptions(
        parent_dirs=disk.parent_dirs, allow_raw_parent=disk.allow_raw_parent, lock=False,
        format_name=vhdkit.FormatName(disk.format) if disk.format else None,
    )  # fmt: skip
    with vhdkit.open_disk(disk.path, options=options) as opened:
        size = min(opened.size_bytes, _END_BYTES)
        return hashlib.sha256(opened.read(0, size) + opened.read(opened.size_bytes - size, size)).hexdigest()
