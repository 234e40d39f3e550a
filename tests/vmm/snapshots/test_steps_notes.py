# SPDX-License-Identifier: Apache-2.0
"""What changes the images of a machine that is off after its disk server was killed."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

import vhdkit
import vmm
from tests.vhdkit.formats.test_remember import killed
from tests.vmm.snapshots.machines import Machines, each_kind
from vhdkit.formats import probed
from vhdkit.formats.vhd.dynamic import DynamicImage
from vhdkit.formats.vhdx.blocks import VhdxImage
from vhdkit.store import FileStore
from vmm.snapshots.preflight import look_before_discarding
from vmm.snapshots.steps import options_to_change
from vmm.store import registry

# A killed process closes no file: the image that stands for one is dropped.
pytestmark = pytest.mark.filterwarnings("ignore:.*was never closed:ResourceWarning")


def leave_notes(path: str, folder: str) -> None:
    """What a killed disk server leaves: a write that it answered, in its notes only."""
    os.makedirs(folder, exist_ok=True)
    store = FileStore.open(path, writable=True)
    store.notes_folder = folder
    layer = probed(store).open(store, writable=True)
    assert isinstance(layer, DynamicImage | VhdxImage)
    layer.write(700, memoryview(b"answered".ljust(512)))
    killed(layer)


def resized(machines: Machines, disk: str) -> str:
    """A larger disk."""
    vmm.Manager().resize_disk("web", disk, 2 << 20)
    return registry.load("web").spec.disks[0].path or ""


def frozen(machines: Machines, disk: str) -> str:
    """A snapshot."""
    vmm.Manager().snapshots("web").create("two")
    return registry.load("web").spec.disks[0].path or ""


def merged(machines: Machines, disk: str) -> str:
    """A snapshot less, and its image merged into the one below."""
    vmm.Manager().snapshots("web").delete("one")
    machines.merge("web")
    return registry.load("web").spec.disks[0].path or ""


def applied(machines: Machines, disk: str) -> str:
    """The state of a snapshot."""
    vmm.Manager().snapshots("web").apply("one", discard_current=True)
    return registry.load("web").spec.disks[0].path or ""


@each_kind
@pytest.mark.parametrize("verb", [resized, frozen, merged, applied])
def test_a_machine_that_was_killed_is_changed(machines: Machines, verb: Callable[[Machines, str], str]) -> None:
    """When a machine is opened of which no process is left, the notes go with its other leftovers, because its guest
    was cut off, too; whatever changes an image then is not refused because of them."""
    machines.create("web")
    vmm.Manager().snapshots("web").create("one")
    machine = registry.load("web")
    [disk] = machine.spec.disks
    assert disk.path is not None
    leave_notes(disk.path, machine.runtime.notes)
    with pytest.raises(vhdkit.NotesUnwritten):
        vhdkit.open_disk(disk.path, writable=True)
    path = verb(machines, disk.id)
    assert not os.path.exists(machine.runtime.notes)
    with vhdkit.open_disk(path, writable=True):
        pass
    assert not [one.code for one in vhdkit.check(path) if one.code.startswith("notes")]
    vmm.Manager().delete("web", with_disks=True, with_snapshots=True)
    assert not machines.images()


@each_kind
def test_the_notes_that_exist_are_written(machines: Machines) -> None:
    """INV-ANSWERED-SURVIVES: a change of a machine's image names the machine's own folder of notes."""
    machines.create("web")
    machine = registry.load("web")
    path = machine.spec.disks[0].path or ""
    for change in (look_before_discarding, changed):
        leave_notes(path, machine.runtime.notes)
        change(machine)
        assert not os.listdir(machine.runtime.notes)
        with vhdkit.open_disk(path, writable=True) as opened:
            assert opened.read(700 * 512, 8) == b"answered"
            opened.write(700 * 512, bytes(8))


def changed(machine: registry.Machine) -> None:
    """A child made with the options for changes."""
    path = machine.spec.disks[0].path or ""
    child = f"{path}.child"
    vhdkit.create_child(child, path, options=options_to_change(machine))
    os.unlink(child)
