# SPDX-License-Identifier: Apache-2.0
"""Machines exported while a change to one of their images is unfinished or in progress."""

from __future__ import annotations

from pathlib import Path

import pytest

import vhdkit
from tests.vmm.snapshots.machines import Machines
from vhdkit.chain.records import pending
from vhdkit.formats.undo import apply_change, plan_change
from vhdkit.formats.vhd.footers import image_id
from vhdkit.store import FileStore
from vmm.api.export_import.exporting import export
from vmm.api.export_import.importing import import_machine
from vmm.model.errors import VmmError


def half_changed(path: str) -> None:
    """Leave an image as a program does that is killed in the middle of a change: the log lies beside it."""
    with FileStore.open(path, writable=True) as store:
        size = store.size()
        log = plan_change(store, image_id(store), [(size - 512 - 1024, b"!" * 512)], None)
        pending.write_log(pending.undo_path(path), log, like=store)
        apply_change(store, log)


@pytest.fixture
def pair(machines: Machines) -> tuple[Path, Path]:
    """The images of the machine web: a base and a leaf."""
    base, leaf = machines.disk("base.vhd"), machines.folder / "one.avhd"
    vhdkit.clone(base, [leaf])
    machines.create("web", [leaf])
    machines.write("web", 4096, b"x" * 512)
    return base, leaf


@pytest.mark.parametrize("which", [0, 1], ids=["base", "leaf"])
def test_a_half_changed_image_is_not_copied(machines: Machines, pair: tuple[Path, Path], which: int) -> None:
    """Without its undo log the copy would be damaged. The command in the hint undoes the change."""
    states = machines.states("web")
    half_changed(str(pair[which]))
    assert machines.states("web") == states
    with pytest.raises(VmmError, match="unfinished change") as caught:
        export("web", str(machines.folder / "out"))
    assert caught.value.hint == f"first undo the change: vhdkit check {pair[which]} --repair"
    assert not (machines.folder / "out").exists()
    vhdkit.repair(pair[which])
    export("web", str(machines.folder / "out"))
    import_machine(str(machines.folder / "out"), name="copy")
    assert machines.states("copy") == states


def test_a_half_changed_image_is_not_imported(machines: Machines, pair: tuple[Path, Path]) -> None:
    """An export whose image was being changed is refused in the same way."""
    states = machines.states("web")
    export("web", str(machines.folder / "out"))
    half_changed(str(machines.folder / "out/disks/base.vhd"))
    with pytest.raises(VmmError, match="unfinished change"):
        import_machine(str(machines.folder / "out"), name="copy")
    vhdkit.repair(machines.folder / "out/disks/base.vhd")
    import_machine(str(machines.folder / "out"), name="copy")
    assert machines.states("copy") == states


def test_an_image_that_is_written_to_is_not_copied(machines: Machines, pair: tuple[Path, Path]) -> None:
    """If another program has the disk open for writing, the copy would have only some of its writes."""
    options = vhdkit.OpenOptions(parent_dirs=(str(machines.folder),))
    with vhdkit.open_disk(pair[1], writable=True, options=options), pytest.raises(VmmError):
        export("web", str(machines.folder / "out"))
    export("web", str(machines.folder / "out"))
