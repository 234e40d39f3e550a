# SPDX-License-Identifier: Apache-2.0
"""Block devices: kind, transport, DAS or SAN, identity and users, from trees of files as the kernel makes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.vmm.host.fake_host import FakeHost
from vmm.host import block
from vmm.model.errors import InvalidSpec, NotFound


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    """A host without devices."""
    return FakeHost(tmp_path / "root")


@pytest.mark.parametrize(
    ("place", "transport", "attachment"),
    [
        ("ata", "ata", "DAS"),
        ("sas", "sas", "DAS"),
        ("usb", "usb", "DAS"),
        ("scsi", "scsi", "DAS"),
        ("mmc", "mmc", "DAS"),
        ("virtio", "virtio", "DAS"),
        ("virtio-scsi", "virtio", "DAS"),
        ("vmbus", "vmbus", "DAS"),
        ("xen", "xen", "DAS"),
        ("iscsi", "iscsi", "SAN"),
        ("fc", "fc", "SAN"),
    ],
)
def test_transport_is_where_the_device_lies(host: FakeHost, place: str, transport: str, attachment: str) -> None:
    """The place in the tree of devices says the transport, and that says DAS or SAN."""
    host.disk("sda", place)
    (disk,) = host.view.devices()
    assert (disk.kind, disk.transport, disk.attachment) == ("disk", transport, attachment)


def test_nvme_local_and_over_a_network(host: FakeHost) -> None:
    """An NVMe controller names its transport itself, also behind a subsystem with several controllers."""
    host.disk("nvme0n1", "nvme", device__transport="pcie")
    host.disk("nvme1n1", "nvme-tcp", device__transport="tcp")
    subsystem = host.disk("nvme2n1", "nvme-subsystem", device__nvme2__transport="rdma")
    hidden = host.disk("nvme2c2n1", "nvme-subsystem", hidden="1")
    found = {disk.name: (disk.transport, disk.attachment) for disk in host.view.devices()}
    assert found == {
        "nvme0n1": ("nvme-pcie", "DAS"),
        "nvme1n1": ("nvme-tcp", "SAN"),
        "nvme2n1": ("nvme-rdma", "SAN"),
    }
    assert subsystem != hidden


def test_network_block_devices(host: FakeHost) -> None:
    """NBD and RBD devices have no hardware behind them, and come over a network."""
    host.disk("nbd0", "virtual")
    host.disk("rbd0", "virtual")
    assert [(one.kind, one.transport, one.attachment) for one in host.view.devices()] == [
        ("network", "nbd", "SAN"),
        ("network", "rbd", "SAN"),
    ]


def test_multipath_is_one_disk_of_the_san(host: FakeHost) -> None:
    """The paths of a LUN are held by the multipath device, which has the LUN's transport and WWN."""
    for name in ("sdb", "sdc"):
        host.disk(name, "fc" if name == "sdb" else "iscsi", wwid="naa.600a0b80")
    host.mapped("dm-0", "mpatha", "mpath-3600a0b80", ["sdb", "sdc"])
    multipath = host.view.device("dm-0")
    assert (multipath.kind, multipath.path, multipath.attachment) == ("multipath", "/dev/mapper/mpatha", "SAN")
    assert multipath.wwn == "3600a0b80" and multipath.members == ("sdb", "sdc")
    assert host.view.device("sdb").holders == ("dm-0",)


def test_volumes_take_after_what_they_are_on(host: FakeHost) -> None:
    """A logical volume on a RAID of local partitions is DAS; one leg on the SAN makes it SAN."""
    host.disk("sda", "ata")
    host.disk("sdb", "sas")
    host.disk("sdc", "iscsi")
    host.disk("md0", "virtual", md__uuid="aa:bb")
    host.hold("md0", [host.partition("sda", 1), host.partition("sdb", 1)])
    host.mapped("dm-0", "vg-local", "LVM-abc", ["md0"])
    host.mapped("dm-1", "vg-mixed", "LVM-abd", ["md0", "sdc"])
    assert [host.view.device(name).attachment for name in ("md0", "dm-0", "dm-1")] == ["DAS", "DAS", "SAN"]
    assert host.view.device("md0").kind == "raid" and host.view.device("dm-0").kind == "mapper"
    assert host.view.device("dm-0").identity == "volume=LVM-abc"


def test_a_ring_of_devices_ends(host: FakeHost) -> None:
    """Devices that claim to be made of each other (a broken tree) do not hang the list."""
    host.disk("dm-0", "virtual", dm__name="a", dm__uuid="x")
    host.disk("dm-1", "virtual", dm__name="b", dm__uuid="y")
    host.hold("dm-0", ["dm-1"])
    host.hold("dm-1", ["dm-0"])
    assert [one.attachment for one in host.view.devices()] == [None, None]


def test_facts_of_a_disk(host: FakeHost) -> None:
    """Size, sectors, model, serial number and flags are what the files say."""
    page = b"\x00\x80\x00\x08WX123   "
    host.disk(
        "sda",
        "ata",
        sectors=4096,
        device__vendor="ATA     ",
        device__model="SuperDisk 1 ",
        device__vpd_pg80=page,
        device__wwid="naa.5000c500",
        queue__logical_block_size="4096",
        queue__rotational="1",
        removable="1",
        ro="1",
    )
    disk = host.view.device("sda")
    assert disk.size_bytes == 4096 * 512 and disk.logical_sector_bytes == 4096
    assert (disk.model, disk.serial, disk.wwn) == ("SuperDisk 1", "WX123", "naa.5000c500")
    assert disk.read_only and disk.removable and disk.rotational and disk.is_present


@pytest.mark.parametrize(
    ("files", "links", "identity"),
    [
        ({"device/wwid": "naa.5000"}, [], "wwn=naa.5000"),
        ({"wwid": "eui.0025"}, ["nvme-eui.0025"], "wwn=eui.0025"),
        ({"serial": "S1"}, [], "serial=S1"),
        ({"device/serial": "S1", "device/model": "M"}, ["ata-M_S1"], "serial=M S1"),
        ({}, ["virtio-x", "wwn-0x5"], "id=wwn-0x5"),
        ({}, ["scsi-SX"], "id=scsi-SX"),
        ({}, ["lvm-pv-uuid-q"], None),
        ({}, [], None),
    ],
)
def test_identity_in_the_order_of_trust(
    host: FakeHost, files: dict[str, str], links: list[str], identity: str | None
) -> None:
    """A WWN before a serial number before a link of udev; a name of the kernel is no identity at all."""
    host.disk_of("sda", "scsi", files)
    for link in links:
        host.link(link, "sda")
    assert host.view.device("sda").identity == identity
    host.partition("sda", 2)
    expected = None if identity is None else f"{identity},partition=2"
    assert host.view.device("sda2").identity == expected


def test_identity_survives_a_new_name(host: FakeHost, tmp_path: Path) -> None:
    """The same disk under another name is found by its identity, and one that is gone is not."""
    host.disk("sda", "ata", device__wwid="naa.1")
    later = FakeHost(tmp_path / "later")
    later.disk("sda", "usb", device__wwid="naa.2")
    later.disk("sdb", "ata", device__wwid="naa.1")
    identity = host.view.device("sda").identity
    assert identity is not None
    assert [one.name for one in later.view.by_identity(identity)] == ["sdb"]
    assert later.view.by_identity("wwn=naa.3") == []


def test_users_of_a_disk(host: FakeHost) -> None:
    """Mounts (by number, and by source where the number is the file system's own), swap and partitions are seen."""
    host.disk("sda")
    for index in (1, 2, 3, 10):
        host.partition("sda", index)
    view = host.view
    host.mount(view.device("sda1").number, "/dev/sda1", "/boot")
    host.mount("0:44", "/dev/sda2", "/with\\040blank")
    host.swap_to("/dev/sda3")
    host.swap_to("/swapfile", kind="file")
    view = host.view
    assert view.device("sda").partitions == ("sda1", "sda2", "sda3", "sda10")
    assert view.device("sda1").mounts == ("/boot",) and view.device("sda2").mounts == ("/with blank",)
    assert [one.name for one in view.devices() if one.is_swap] == ["sda3"]
    assert view.device("sda10").parent == "sda" and view.device("sda10").kind == "partition"


def test_swap_by_another_name(host: FakeHost) -> None:
    """Swap on a logical volume is listed under a name that is a link to the device."""
    host.disk("sda")
    host.mapped("dm-0", "vg-swap", "LVM-1", ["sda"])
    host.swap_to("/dev/dm-0")
    assert host.view.device("dm-0").is_swap


def test_loop_devices(host: FakeHost) -> None:
    """A loop device is its file; one without a file has no size."""
    host.disk("loop0", "virtual", loop__backing_file="/images/a b.raw")
    host.disk("loop1", "virtual", sectors=0)
    first, second = host.view.devices()
    assert (first.kind, first.file, first.identity) == ("loop", "/images/a b.raw", "file=/images/a b.raw")
    assert first.attachment is None and not second.is_present and second.identity is None


def test_drives_and_memory(host: FakeHost) -> None:
    """A CD-ROM drive is known by its SCSI type, compressed memory by its name, a disk by neither."""
    host.disk("sr0", "ata", device__type="5")
    host.disk("zram0", "virtual")
    host.disk("sda", "scsi", device__type="0")
    assert {one.name: one.kind for one in host.view.devices()} == {"sr0": "cd-rom", "zram0": "memory", "sda": "disk"}


def test_names_with_a_folder(host: FakeHost) -> None:
    """The kernel writes a slash in a name as an exclamation mark."""
    host.disk("cciss!c0d0", "scsi")
    assert host.view.device("cciss!c0d0").path == "/dev/cciss/c0d0"


def test_order_of_the_list(host: FakeHost) -> None:
    """Disks in the order people count, each followed by its partitions."""
    for name in ("sdaa", "sdb", "sda"):
        host.disk(name, {"sda": "ata", "sdb": "sas", "sdaa": "usb"}[name])
    host.partition("sda", 10)
    host.partition("sda", 2)
    assert [one.name for one in host.view.devices()] == ["sda", "sda2", "sda10", "sdb", "sdaa"]


def test_host_without_sysfs(tmp_path: Path) -> None:
    """Nothing to read is an empty list, and an unknown name an error."""
    assert block.HostDevices(str(tmp_path)).devices() == []
    with pytest.raises(NotFound):
        block.HostDevices(str(tmp_path)).device("sda")


def test_device_that_vanishes_is_left_out(host: FakeHost) -> None:
    """A device that was unplugged between listing and reading is not listed."""
    host.disk("sda")
    os.unlink(host.place("sda") / "dev")
    assert host.view.devices() == []


@pytest.mark.parametrize("text", ["", "garbage\n", "1 2 3\n", "22 1 8:1 / /x rw -\n", "22 1 8:1 / /x rw - ext4\n"])
def test_odd_tables(host: FakeHost, text: str) -> None:
    """Lines of mountinfo and swaps that say nothing are passed over."""
    host.disk("sda")
    (host.root / "proc/self/mountinfo").write_text(text)
    (host.root / "proc/swaps").write_text(text)
    assert host.view.device("sda").name == "sda"


def test_find_says_what_a_path_is(tmp_path: Path) -> None:
    """A file, a folder, a character device and nothing at all are each refused by name."""
    file = tmp_path / "file"
    file.write_text("")
    for path, what in ((file, "a file"), (tmp_path, "a folder"), (Path("/dev/null"), "a character device")):
        with pytest.raises(InvalidSpec, match=f"is {what}, not a block device.*vmm host disks"):
            block.find(str(path))
    with pytest.raises(NotFound, match="no such device"):
        block.find(str(tmp_path / "none"))


def test_mark_of_what_was_written(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mark is the boot, the disk's sequence number, and the sectors written, which is the seventh number."""
    host.disk("sda", stat="1 2 3 4 5 6 77 8 9 10 11", diskseq="9")
    boot = host.root / "proc/sys/kernel/random/boot_id"
    boot.parent.mkdir(parents=True)
    boot.write_text("abc\n")
    view = host.view
    monkeypatch.setattr(block, "find", lambda path, root: view.device("sda"))
    assert block.write_mark("/dev/sda", root=str(host.root)) == ["abc", "9", 77]
    (host.place("sda") / "stat").write_text("short")
    assert block.write_mark("/dev/sda", root=str(host.root)) == ["abc", "9", None]


def test_the_host_it_runs_on() -> None:
    """The real host can be listed by anybody, and each device is found again by its number."""
    view = block.HostDevices()
    for device in view.devices():
        assert view.device_of_number(device.number) == device
