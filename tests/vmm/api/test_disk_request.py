# SPDX-License-Identifier: Apache-2.0
"""The disks that a user requests, and what the machine gets or refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import vhdkit
from tests.vmm.discs import make_iso
from tests.vmm.kvm.loops import loop_device
from tests.vmm.small_guests import make_machine, wait_counting
from vmm.api.disk_request import disk_of
from vmm.api.manager import DiskRequest, Manager
from vmm.model.errors import InvalidSpec, NotFound, StoreFailed
from vmm.model.spec import MachineSpec, make_spec
from vmm.store import registry

MIB = 1 << 20


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MachineSpec:
    """A machine without disks, in a home for this test."""
    monkeypatch.setenv("VMM_HOME", str(tmp_path / "home"))
    return make_spec(name="web")


def test_an_iso_image_as_a_disk_needs_format_raw(spec: MachineSpec, tmp_path: Path) -> None:
    """An ISO image given as a disk is refused with the option to use; with format=raw it is a hard disk."""
    image = make_iso(tmp_path / "system.iso", "installer")
    with pytest.raises(InvalidSpec, match="file system of a CD") as refused:
        disk_of(DiskRequest(str(image)), spec)
    assert "--cdrom" in str(refused.value) and ",format=raw" in str(refused.value)
    assert disk_of(DiskRequest(str(image), format="raw"), spec).format == "raw"
    assert disk_of(DiskRequest(str(image), kind="iso"), spec).kind == "iso"


def test_an_iso_image_inside_a_vhd_is_a_disk(spec: MachineSpec, tmp_path: Path) -> None:
    """A VHD is a hard disk, whatever its guest has written to its beginning."""
    path = tmp_path / "disk.vhd"
    vhdkit.create_image(path, 4 * MIB)
    with vhdkit.open_disk(path, writable=True) as disk:
        disk.write(0, make_iso(tmp_path / "system.iso", "installer").read_bytes())
    assert disk_of(DiskRequest(str(path)), spec).format == "vhd"


def test_large_sectors_are_never_on_ide(spec: MachineSpec, tmp_path: Path) -> None:
    """A VHDX with sectors of 4096 bytes is refused on IDE; by default it goes to SCSI, or as the first disk to virtio,
    with its sector sizes."""
    for name, sector_bytes in (("large", 4096), ("small", 512)):
        vhdkit.create_image(tmp_path / f"{name}.vhdx", 4 * MIB, disk_format="vhdx", sector_bytes=sector_bytes)
    large, small = DiskRequest(str(tmp_path / "large.vhdx")), DiskRequest(str(tmp_path / "small.vhdx"))
    with pytest.raises(InvalidSpec, match="on IDE has sectors of 512"):
        disk_of(replace(large, controller="ide"), spec)
    first = disk_of(large, spec.changed(firmware="uefi"))
    assert (first.controller, first.sector_bytes, first.physical_sector_bytes) == ("virtio", 4096, 4096)
    ordinary = disk_of(small, spec)
    assert (ordinary.controller, ordinary.sector_bytes, ordinary.physical_sector_bytes) == ("ide", 512, 4096)
    assert disk_of(large, spec.changed(disks=[ordinary])).controller == "scsi"


def test_the_largest_vhdx_is_a_disk(spec: MachineSpec, tmp_path: Path) -> None:
    """A disk of 64 TiB is examined like any other."""
    vhdkit.create_image(tmp_path / "huge.vhdx", 64 << 40, disk_format="vhdx", block_size_bytes=256 * MIB)
    assert disk_of(DiskRequest(str(tmp_path / "huge.vhdx")), spec).format == "vhdx"


def test_a_read_only_disk_is_never_on_ide(spec: MachineSpec, tmp_path: Path) -> None:
    """A read-only disk on IDE is refused; by default it goes to virtio or, as a further one, to SCSI."""
    for name in ("one", "two"):
        vhdkit.create_image(tmp_path / f"{name}.vhd", 4 * MIB)
    with pytest.raises(InvalidSpec, match="cannot be read-only"):
        disk_of(DiskRequest(str(tmp_path / "one.vhd"), "ide", read_only=True), spec)
    first = disk_of(DiskRequest(str(tmp_path / "one.vhd"), read_only=True), spec)
    assert first.controller == "virtio"
    with_one = spec.changed(disks=[first])
    assert disk_of(DiskRequest(str(tmp_path / "two.vhd"), read_only=True), with_one).controller == "scsi"


def test_an_empty_drive(spec: MachineSpec) -> None:
    """A drive may be without a medium; a disk without an image is refused."""
    drive = disk_of(DiskRequest(None, kind="iso"), spec)
    assert (drive.kind, drive.path, drive.place) == ("iso", None, "ide0:0")
    with pytest.raises(InvalidSpec, match="may be empty"):
        disk_of(DiskRequest(None, kind="pass-through"), spec)


@pytest.mark.kvm
def test_a_definition_with_a_read_only_disk_on_ide(manager: Manager, tmp_path: Path) -> None:
    """A definition that an older version or another host made leads to an error when the machine starts."""
    make_machine(manager, tmp_path)
    definition = Path(registry.load("small").paths.definition)
    definition.write_text(definition.read_text().replace('"read_only": false', '"read_only": true'))
    with pytest.raises(InvalidSpec, match="cannot be read-only") as refused:
        manager.start("small")
    assert "vmm disk remove small disk-0" in str(refused.value)


@pytest.mark.kvm
def test_accepted_disks_can_start(manager: Manager, tmp_path: Path) -> None:
    """With read-only disks where they were requested, an empty drive and a block device as a CD, the machine
    starts."""
    make_machine(manager, tmp_path)
    vhdkit.create_image(tmp_path / "data.vhd", 4 * MIB)
    vhdkit.create_image(tmp_path / "more.vhd", 4 * MIB)
    manager.add_disk("small", DiskRequest(str(tmp_path / "data.vhd"), read_only=True))
    manager.add_disk("small", DiskRequest(str(tmp_path / "more.vhd"), "virtio", read_only=True))
    manager.add_disk("small", DiskRequest(None, kind="iso"))
    with loop_device(make_iso(tmp_path / "system.iso", "installer"), read_only=True) as device:
        manager.add_disk("small", DiskRequest(device, kind="iso"))
        manager.start("small")
        wait_counting(manager)
        manager.stop("small")


def test_trusted_folders_are_recorded(spec: MachineSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the folders that the user trusts permanently, only those that contain parents go into the definition."""
    bases, other, leaves = (tmp_path / name for name in ("bases", "other", "leaves"))
    for folder in (bases, other, leaves):
        folder.mkdir()
    vhdkit.create_image(bases / "base.vhd", "1M")
    leaf = leaves / "leaf.avhd"
    vhdkit.create_child(leaf, bases / "base.vhd")
    with pytest.raises(StoreFailed):
        disk_of(DiskRequest(str(leaf)), spec)
    monkeypatch.setenv("VHDKIT_PARENT_DIRS", f"{other}:{bases}")
    assert disk_of(DiskRequest(str(leaf)), spec).parent_dirs == (str(bases),)
    wish = DiskRequest(str(leaf), parent_dirs=(str(bases),))
    assert disk_of(wish, spec).parent_dirs == (str(bases),)
    assert disk_of(DiskRequest(str(bases / "base.vhd"), read_only=True, controller="scsi"),
                   spec).parent_dirs == ()  # fmt: skip


def test_what_is_proposed_for_a_missing_image(spec: MachineSpec, tmp_path: Path) -> None:
    """Only a name that `vhdkit create` makes a disk of is proposed for that; a snapshot's image needs its parent."""
    for name, hint in {
        "a b.vhdx": f"create it: vhdkit create '{tmp_path}/a b.vhdx' --size 10G",
        "a.avhdx": f"or make a child of another image: vhdkit create {tmp_path}/a.avhdx --parent PARENT",
        "a.qcow2": "name an image that exists",
    }.items():
        with pytest.raises(NotFound) as refused:
            disk_of(DiskRequest(str(tmp_path / name)), spec)
        assert str(refused.value.hint).endswith(hint)
