# SPDX-License-Identifier: Apache-2.0
"""Nights of machines that are off, for tests: written with the library, and what they must read as."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import vhdkit
from vhdkit import backups
from vmm.store import registry
from vmm.store.night_files import night_files, snapshot_facts
from vmm.store.snapshots.store import load_tree


def save_night(
    name: str,
    repository: Path,
    *,
    consistency: backups.Consistency = backups.Consistency.OFF_CLEAN,
    compare: bool = True,
    files: Mapping[str, bytes] | None = None,
    hours: int = 0,
) -> backups.Manifest:
    """Save the machine as it is. `files` take the place of the night's own."""
    machine = registry.load(name)
    wanted = [disk for disk in machine.spec.disks if disk.is_image]
    taken = datetime(2026, 11, 30, 2, 30, tzinfo=UTC) + timedelta(hours=hours)
    facts = backups.Circumstances(
        taken, "UTC", timedelta(), "vmm test", consistency,
        snapshots=snapshot_facts(load_tree(machine.paths)),
    )  # fmt: skip
    with contextlib.ExitStack() as held:
        opened = held.enter_context(backups.create_repository(repository))
        wishes = backups.Wishes(compare=compare)
        night = held.enter_context(backups.writing(opened, machine.spec.id, name, wishes))
        disks = []
        for disk in wanted:
            assert disk.path is not None
            options = vhdkit.OpenOptions(parent_dirs=disk.parent_dirs, allow_raw_parent=disk.allow_raw_parent)
            chain = held.enter_context(vhdkit.open_disk(disk.path, options=options)).chain
            disks.append(backups.FrozenDisk(disk.id, chain, slot=disk.place, serial=disk.serial))
        own = night_files(machine.paths, machine.spec, [disk.id for disk in wanted])
        return night.save(disks, facts, {**own, **(files or {})})


def hashes(repository: Path) -> dict[str, str]:
    """Every file of a repository with the hash of its content; leases and locks come and go."""
    return {
        str(path.relative_to(repository)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(repository.rglob("*"))
        if path.is_file() and path.name != "lock" and path.parent.name != "leases"
    }


def lease_count(repository: Path) -> int:
    """How many leases there are."""
    return len(list((repository / "leases").glob("*.json")))


def content(path: str, **options: Any) -> bytes:
    """What an image reads as."""
    with vhdkit.open_disk(path, options=vhdkit.OpenOptions(lock=False, **options)) as disk:
        return disk.read(0, disk.size_bytes)
