# SPDX-License-Identifier: Apache-2.0
"""What vmm makes from images is never more widely readable than they are, whatever the umask."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmm
from tests.vmm.snapshots.machines import Machines
from vmm.api.export_import.exporting import export
from vmm.api.export_import.importing import import_machine
from vmm.snapshots.dependents import images_of
from vmm.store import registry


@pytest.fixture(autouse=True)
def generous() -> Iterator[None]:
    """A umask that gives every user all rights."""
    before = os.umask(0)
    try:
        yield
    finally:
        os.umask(before)


def readable(folder: Path) -> list[Path]:
    """The files in a folder that other users may read."""
    return [path for path in folder.rglob("*") if path.is_file() and path.stat().st_mode & 0o077]


def test_leaves_copies_and_backups_of_a_private_image(machines: Machines) -> None:
    """A leaf of a machine that is off, before and after applying a snapshot, a backup, and exports are as private as
    the image."""
    images = machines.folder / "images"
    images.mkdir()
    image = machines.disk("images/a.vhd")
    image.chmod(0o600)
    web = machines.create("web", [image])
    web.create("a")
    web.apply("a", discard_current=True)
    assert len(list(images.iterdir())) == 2 and readable(images) == []
    manager = vmm.Manager()
    for name in ("backup", "export", "flat"):
        target = machines.folder / name
        if name == "backup":
            manager.save_night("web", str(target))
        else:
            export("web", str(target), flat=name == "flat")
        assert target.stat().st_mode & 0o077 == 0 and readable(target) == []
        assert list(target.rglob("*.vhd"))
    import_machine(str(machines.folder / "export"), name="copy")
    (leaf,) = images_of(registry.load("copy").spec).values()
    assert readable(Path(leaf).parent) == [] and readable(machines.folder / "home") == []
