# SPDX-License-Identifier: Apache-2.0
"""Block devices: kind, transport, DAS or SAN, identity and users, from file trees like the kernel's."""

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
def test_the_transport_follows_from_the_place_in_the_tree(
    host: FakeHost, place: str, transport: str, attachment: str
) -> None:
    """The place in the tree of devices gives the transport, and with it DAS or SAN."""
    host.disk("sda", place)
    (disk,) = host.view.devices()
    assert (disk.kind, disk.transport, disk.attachment) == ("disk", transport, attachment)


def test_nvme_local_and_over_a_network(host: FakeHost) -> None:
    """An NVMe controller states its transport itself, also behind a subsystem with several controllers."""
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
    """NBD and RBD devices have no hardware, and count as SAN."""
    host.disk("nbd0", "virtual")
    host.disk("rbd0", "virtual")
    assert [(one.kind, one.transport, one.attachment) for one in host.view.devices()] == [
        ("network", "nbd", "SAN"),
        ("network", "rbd", "SAN"),
    ]


def test_a_multipath_device_is_one_san_disk(host: FakeHost) -> None:
    """The multipath device holds the paths of a LUN, and has the LUN's transport and WWN."""
    for name in ("sdb", "sdc"):
        host.disk(name, "fc" if name == "sdb" else "iscsi", wwid="naa.600a0b80")
    host.mapped("dm-0", "mpatha", "mpath-3600a0b80", ["sdb", "sdc"])
    multipath = host.view.device("dm-0")
    assert (multipath.kind, multipath.path, multipath.attachment) == ("multipath", "/dev/mapper/mpatha", "SAN")
    assert multipath.wwn == "3600a0b80" and multipath.members == ("sdb", "sdc")
    assert host.view.device("sdb").holders == ("dm-0",)


def test_volumes_have_the_transport_of_their_members(host: FakeHost) -> None:
    """A logical volume on a RAID of local partitions is DAS; one member on the SAN makes it SAN."""
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


def test_a_cycle_of_devices(host: FakeHost) -> None:
    """Devices that are listed as members of each other (a broken tree) do not hang the list."""
    host.disk("dm-0", "virtual", dm__name="a", dm__uuid="x")
    host.disk("dm-1", "virtual", dm__name="b", dm__uuid="y")
    host.hold("dm-0", ["dm-1"])
    host.hold("dm-1", ["dm-0"])
    assert [one.attachment for one in host.view.devices()] == [None, None]


def test_facts_of_a_disk(host: FakeHost) -> None:
    """Size, sectors, model, serial number and flags come from the files."""
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
def test_the_order_of_identities(
    host: FakeHost, files: dict[str, str], links: list[str], identity: str | None
) -> None:
    """A WWN comes before a serial number, that before a link of udev; a kernel name is never an identity."""
    host.disk_of("sda", "scsi", files)
    for link in links:
        host.link(link, "sda")
    assert host.view.device("sda").identity == identity
    host.partition("sda", 2)
    expected = None if identity is None else f"{identity},partition=2"
    assert host.view.device("sda2").identity == expected


def test_the_identity_survives_a_new_name(host: FakeHost, tmp_path: Path) -> None:
    """The same disk under another name is found by its identity; a missing one is not found."""
    host.disk("sda", "ata", device__wwid="naa.1")
    later = FakeHost(tmp_path / "later")
    later.disk("sda", "usb", device__wwid="naa.2")
    later.disk("sdb", "ata", device__wwid="naa.1")
    identity = host.view.device("sda").identity
    assert identity is not None
    assert [one.name for one in later.view.by_identity(identity)] == ["sdb"]
    assert later.view.by_identity("wwn=naa.3") == []


def test_users_of_a_disk(host: FakeHost) -> None:
    """Mounts (by number, and by source where the number is the file system's own), swap and partitions are found."""
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


def test_swap_under_another_name(host: FakeHost) -> None:
    """Swap on a logical volume is listed with a name that is a link to the device."""
    host.disk("sda")
    host.mapped("dm-0", "vg-swap", "LVM-1", ["sda"])
    host.swap_to("/dev/dm-0")
    assert host.view.device("dm-0").is_swap


def test_loop_devices(host: FakeHost) -> None:
    """A loop device names its file; one without a file has no size."""
    host.disk("loop0", "virtual", loop__backing_file="/images/a b.raw")
    host.disk("loop1", "virtual", sectors=0)
    first, second = host.view.devices()
    assert (first.kind, first.file, first.identity) == ("loop", "/images/a b.raw", "file=/images/a b.raw")
    assert first.attachment is None and not second.is_present and second.identity is None


def test_cdrom_drives_and_compressed_memory(host: FakeHost) -> None:
    """A CD-ROM drive is recognised by its SCSI type, compressed memory by its name."""
    host.disk("sr0", "ata", device__type="5")
    host.disk("zram0", "virtual")
    host.disk("sda", "scsi", device__type="0")
    assert {one.name: one.kind for one in host.view.devices()} == {"sr0": "cd-rom", "zram0": "memory", "sda": "disk"}


def test_names_with_a_slash(host: FakeHost) -> None:
    """The kernel writes a slash in a name as an exclamation mark."""
    host.disk("cciss!c0d0", "scsi")
    assert host.view.device("cciss!c0d0").path == "/dev/cciss/c0d0"


def test_order_of_the_list(host: FakeHost) -> None:
    """Disks are in natural order, each followed by its partitions."""
    for name in ("sdaa", "sdb", "sda"):
        host.disk(name, {"sda": "ata", "sdb": "sas", "sdaa": "usb"}[name])
    host.partition("sda", 10)
    host.partition("sda", 2)
    assert [one.name for one in host.view.devices()] == ["sda", "sda2", "sda10", "sdb", "sdaa"]


def test_a_host_without_sysfs(tmp_path: Path) -> None:
    """Without sysfs the list is empty, and an unknown name is an error."""
    assert block.HostDevices(str(tmp_path)).devices() == []
    with pytest.raises(NotFound):
        block.HostDevices(str(tmp_path)).device("sda")


def test_a_device_that_vanishes_is_left_out(host: FakeHost) -> None:
    """A device that was unplugged between listing and reading is not listed."""
    host.disk("sda")
    os.unlink(host.place("sda") / "dev")
    assert host.view.devices() == []


@pytest.mark.parametrize("text", ["", "garbage\n", "1 2 3\n", "22 1 8:1 / /x rw -\n", "22 1 8:1 / /x rw - ext4\n"])
def test_malformed_lines_of_tables(host: FakeHost, text: str) -> None:
    """Malformed lines of mountinfo and swaps are skipped."""
    host.disk("sda")
    (host.root / "proc/self/mountinfo").write_text(text)
    (host.root / "proc/swaps").write_text(text)
    assert host.view.device("sda").name == "sda"


def test_errors_say_what_a_path_is(tmp_path: Path) -> None:
    """A file, a folder, a character device and a missing path are each refused with what they are."""
    file = tmp_path / "file"
    file.write_text("")
    for path, what in ((file, "a file"), (tmp_path, "a folder"), (Path("/dev/null"), "a character device")):
        with pytest.raises(InvalidSpec, match=f"is {what}, not a block device.*vmm host disks"):
            block.find(str(path))
    with pytest.raises(NotFound, match="the device does not exist"):
        block.find(str(tmp_path / "none"))


def test_the_mark_of_written_sectors(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mark consists of the boot, the disk's sequence number, and the number of sectors written, the seventh
    number."""
    host.disk("sda", stat="1 2 3 4 5 6 77 8 9 10 11", diskseq="9")
    boot = host.root / "proc/sys/kernel/random/boot_id"
    boot.parent.mkdir(parents=True)
    boot.write_text("abc\n")
    view = host.view
    monkeypatch.setattr(block, "find", lambda path, root: view.device("sda"))
    assert block.write_mark("/dev/sda", root=str(host.root)) == ["abc", "9", 77]
    (host.place("sda") / "stat").write_text("short")
    assert block.write_mark("/dev/sda", root=str(host.root)) == ["abc", "9", None]


def test_the_real_hosts_devices() -> None:
    """The real host's devices can be listed by every user, and each is found again by its number."""
    view = block.HostDevices()
    for device in view.devices():
        assert view.device_of_number(device.number) == device
