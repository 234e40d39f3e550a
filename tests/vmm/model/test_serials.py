# SPDX-License-Identifier: Apache-2.0
"""The serial number of a disk, which stays with its image."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import vhdkit
import vmm
from tests.vmm.snapshots.machines import Machines
from vmm.model.serials import ATTRIBUTE, kept_serial, serial_of_device


def serial(manager: vmm.Manager, name: str, disk: str) -> str:
    """The serial of a disk in the definition."""
    spec = manager.show(name).spec
    assert spec is not None
    found = spec.disk(disk)
    assert found is not None
    return found.serial


def test_the_serial_stays_with_the_image(machines: Machines) -> None:
    """A disk that is removed and added again keeps its serial, also in another machine and after a snapshot."""
    machines.create(disks=1)
    manager, data = vmm.Manager(), machines.disk("data.vhd")
    first = manager.add_disk("web", vmm.DiskRequest(str(data))).serial
    manager.remove_disk("web", str(data))
    assert manager.add_disk("web", vmm.DiskRequest(str(data))).serial == first
    manager.snapshots("web").create("one")
    leaf = manager.remove_disk("web", first).path
    assert leaf != str(data)
    manager.create("other", disks=[vmm.DiskRequest(str(leaf))], memory_bytes=16 << 20)
    assert serial(manager, "other", "disk-0") == first
    manager.delete("other")
    manager.create("third", disks=[vmm.DiskRequest(str(leaf))], memory_bytes=16 << 20)
    assert serial(manager, "third", "disk-0") == first


def test_a_given_serial_is_used(machines: Machines) -> None:
    """`serial=` overrides the serial recorded on the image, and is recorded there from then on."""
    machines.create(disks=1)
    manager, data = vmm.Manager(), machines.disk("data.vhd")
    manager.add_disk("web", vmm.DiskRequest(str(data)))
    manager.remove_disk("web", str(data))
    manager.add_disk("web", vmm.DiskRequest(str(data), serial="CHOSEN"))
    manager.remove_disk("web", str(data))
    assert manager.add_disk("web", vmm.DiskRequest(str(data))).serial == "CHOSEN"


def test_serials_are_unique_in_a_machine(machines: Machines) -> None:
    """A copy with the serial of another disk of the same machine gets a new one."""
    machines.create(disks=1)
    manager, data, copy = vmm.Manager(), machines.disk("data.vhd"), machines.folder / "copy.vhd"
    first = manager.add_disk("web", vmm.DiskRequest(str(data))).serial
    vhdkit.convert(data, copy, "dynamic")
    os.setxattr(copy, ATTRIBUTE, first.encode())
    assert manager.add_disk("web", vmm.DiskRequest(str(copy))).serial != first


@pytest.mark.parametrize("content", [b"", b"x" * 21, b"a b", b"\xff", b"a\nb", b"x,y=z"])
def test_a_malformed_serial_is_ignored(tmp_path: Path, content: bytes) -> None:
    """Every user who may write to an image may write its attribute, so a malformed serial counts as none."""
    path = tmp_path / "a.vhd"
    path.touch()
    assert kept_serial(str(path), ()) is None
    os.setxattr(path, ATTRIBUTE, content)
    assert kept_serial(str(path), ()) is None
    os.setxattr(path, ATTRIBUTE, b"GOOD")
    assert (kept_serial(str(path), ()), kept_serial(str(path), ["GOOD"])) == ("GOOD", None)


def test_the_serial_of_a_device() -> None:
    """The same device or LUN always gets the same serial; one without an identity has none."""
    one = serial_of_device("wwn=0x5000c500a1b2c3d4", ())
    assert one == serial_of_device("wwn=0x5000c500a1b2c3d4", ["OTHER"]) and one is not None and len(one) == 20
    assert one != serial_of_device("wwn=0x5000c500a1b2c3d5", ())
    assert serial_of_device(None, ()) is None and serial_of_device("wwn=0x5000c500a1b2c3d4", [one]) is None
