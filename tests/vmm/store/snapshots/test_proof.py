# SPDX-License-Identifier: Apache-2.0
"""Which files count as images that were made for a machine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import vhdkit
from tests.vmm.snapshots.machines import Machines, each_kind
from vmm.store import registry
from vmm.store.snapshots.proof import doubt
from vmm.store.snapshots.snapshot import Image
from vmm.store.snapshots.store import load_tree


def leaf_of(machines: Machines) -> tuple[str, Image]:
    """The image that the machine writes to, and what the tree records about it."""
    machine = registry.load("web")
    path = str(machine.spec.disks[0].path)
    return path, load_tree(machine.paths).images[path]


@each_kind
def test_an_image_stays_ours_whatever_is_written(machines: Machines) -> None:
    """INV-PROVEN-OURS: an image is known again after each session that writes to it, also one whose linkage id changes
    with it; a parent that was written to since is no longer the one that it stands on."""
    machines.create().create("a")
    path, image = leaf_of(machines)
    assert (image.id is None) == (machines.kind == "vhdx") and image.format == machines.kind
    for number in range(3):
        machines.write("web", 4096 * number, b"more" * 100)
        assert doubt(path, image, ()) is None


@each_kind
def test_other_files_are_not_ours(machines: Machines) -> None:
    """INV-PROVEN-OURS: another image under the name of ours, a link, a file of another place and one that is no image
    are left alone."""
    web = machines.create()
    web.create("a")
    path, image = leaf_of(machines)
    other = machines.disk(f"other.{machines.kind}")
    kept = machines.folder / "kept"
    os.rename(path, kept)
    for make in (
        lambda: os.link(other, path),
        lambda: os.symlink(kept, path),
        lambda: Path(path).write_bytes(b"text"),
    ):
        make()
        assert doubt(path, image, ()) is not None
        os.unlink(path)
    vhdkit.create_child(path, other)
    assert doubt(path, image, ()) is not None
    os.unlink(path)
    assert doubt(path, image, ()) is None, "an image that is gone needs no proof"
    os.rename(kept, path)
    assert doubt(path, image, ()) is None
    assert doubt(path, Image(str(machines.folder / "elsewhere" / "web.vhd"), ours=True), ()) is not None


def test_a_vhdx_of_another_name_is_not_ours(machines: Machines) -> None:
    """INV-PROVEN-OURS: without an id that stays, the name must be one that vmm gives to images of this format."""
    base, leaf = machines.folder / "base.vhdx", machines.folder / "leaf.vhdx"
    vhdkit.create_image(base, 1 << 20, disk_format="vhdx")
    vhdkit.create_child(leaf, base)
    record = Image(str(base), ours=True, format="vhdx")
    assert doubt(str(leaf), record, ()) is not None
    shutil.move(leaf, machines.folder / "leaf.avhdx")
    assert doubt(str(machines.folder / "leaf.avhdx"), record, ()) is None
