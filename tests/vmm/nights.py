# SPDX-License-Identifier: Apache-2.0
"""What the nights of a machine hold, and a machine that writes while one is taken."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vhdkit
from tests.vmm.guests.boot_sector import BootOptions
from tests.vmm.small_guests import MIB, make_disk, wait_counting
from tests.vmm.snapshots.machines import SUFFIXES
from vhdkit import backups
from vmm.api.manager import DiskRequest, Manager
from vmm.processes.worker_connection import MachineRef
from vmm.store.snapshots.store import load_tree
from vmm.store.snapshots.tree import Tree


def restored(repository: Path, word: str) -> dict[str, str]:
    """The hash of each disk of a night, NAME@NIGHT."""
    with tempfile.TemporaryDirectory(dir=repository.parent) as folder:
        found = backups.restore(repository, word, folder)
        return {disk: content_of(path) for disk, path in found.disks.items()}


def all_restored(repository: Path, name: str) -> list[dict[str, str]]:
    """The same for every night of a machine, oldest first; none if the repository does not have it."""
    if not os.path.isdir(repository / "machines"):
        return []
    try:
        with backups.open_repository(repository) as opened, opened.machine(opened.find_machine(name)) as machine:
            numbers = [one.number for one in machine.nights()]
    except (vhdkit.NotFound, backups.DamagedRepository):
        return []
    return [restored(repository, f"{name}@{one}") for one in numbers]


def content_of(path: str) -> str:
    """The hash of a disk, of all that its image and those below show."""
    with vhdkit.open_disk(path, options=vhdkit.OpenOptions(lock=False)) as disk:
        found = hashlib.sha256()
        for offset in range(0, disk.size_bytes, 1 << 20):
            found.update(disk.read(offset, min(1 << 20, disk.size_bytes - offset)))
        return found.hexdigest()


def files_of(folder: Path) -> list[str]:
    """The images in that folder."""
    return sorted(path.name for path in folder.iterdir() if path.suffix in SUFFIXES)


def tree() -> Tree:
    """The tree of the machine "small"."""
    return load_tree(MachineRef.of("small").machine)


def make_writing(manager: Manager, folder: Path, *, kind: str = "vhd") -> Path:
    """A running machine whose guest writes to its disk all the time; its image."""
    leaf = make_disk(folder, "small", BootOptions(print_every=4, write_every=4), kind=kind)
    manager.create("small", disks=[DiskRequest(str(leaf))], memory_bytes=16 * MIB, accelerator="tcg")
    manager.start("small")
    wait_counting(manager)
    return leaf


@contextlib.contextmanager
def recorded(beside: Callable[[], object] = lambda: None) -> Iterator[list[dict[str, str]]]:
    """What the frozen images show when each night begins to be written; `beside` is done then."""
    found: list[dict[str, str]] = []
    save = backups.Writing.save

    def recording(self: backups.Writing, disks: Any, *words: Any) -> Any:
        found.append({one.disk_id: content_of(one.chain.leaf.store.name) for one in disks})
        beside()
        return save(self, disks, *words)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(backups.Writing, "save", recording)
        yield found
