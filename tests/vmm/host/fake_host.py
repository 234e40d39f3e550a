# SPDX-License-Identifier: Apache-2.0
"""A made-up host: trees of /sys, /proc and /dev as the kernel and udev make them, for hardware that tests lack.

The places of devices in the tree follow Linux's names for them, which include the transport.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from vmm.host.block import HostDevices

PCI = "devices/pci0000:00/0000:00:1f.2"
PLACES = {
    "ata": f"{PCI}/ata1/host0/target0:0:0/0:0:0:0",
    "sas": f"{PCI}/host1/port-1:0/end_device-1:0/target1:0:0/1:0:0:0",
    "usb": f"{PCI}/usb2/2-1/2-1:1.0/host6/target6:0:0/6:0:0:0",
    "scsi": f"{PCI}/host2/target2:0:0/2:0:0:0",
    "iscsi": "devices/platform/host7/session1/target7:0:0/7:0:0:1",
    "fc": f"{PCI}/host8/rport-8:0-2/target8:0:0/8:0:0:3",
    "mmc": f"{PCI}/mmc_host/mmc0/mmc0:0001",
    "virtio": f"{PCI}/virtio1",
    "virtio-scsi": f"{PCI}/virtio3/host3/target3:0:0/3:0:0:0",
    "vmbus": "devices/LNXSYSTM:00/VMBUS:00/5a1c-9/host4/target4:0:0/4:0:0:0",
    "xen": "devices/vbd-51712",
    "nvme": f"{PCI}/nvme/nvme0",
    "nvme-tcp": "devices/virtual/nvme-fabrics/ctl/nvme1",
    "nvme-subsystem": "devices/virtual/nvme-subsystem/nvme-subsys2",
    "virtual": "devices/virtual",
}
MOUNTINFO_HEAD = "22 1 0:21 / /proc rw,nosuid - proc proc rw\n"


class FakeHost:
    """Files below `root`; `view` reads them as vmm does."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._minor = 0
        self._mountinfo = MOUNTINFO_HEAD
        self._swaps = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
        (root / "sys/class/block").mkdir(parents=True)
        (root / "sys/dev/block").mkdir(parents=True)
        (root / "dev/disk/by-id").mkdir(parents=True)
        (root / "dev/mapper").mkdir(parents=True)
        self._write_tables()

    @property
    def view(self) -> HostDevices:
        """The host as it is now."""
        return HostDevices(str(self.root))

    def _write_tables(self) -> None:
        (self.root / "proc/self").mkdir(parents=True, exist_ok=True)
        (self.root / "proc/self/mountinfo").write_text(self._mountinfo)
        (self.root / "proc/swaps").write_text(self._swaps)

    def _put(self, place: Path, files: Mapping[str, str | bytes]) -> None:
        for name, content in files.items():
            path = place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode() + b"\n")

    def _register(self, name: str, place: Path, sectors: int, files: dict[str, str | bytes]) -> str:
        self._minor += 1
        number = f"8:{self._minor}"
        for folder in ("holders", "slaves"):
            (place / folder).mkdir(parents=True)
        self._put(place, {"dev": number, "size": str(sectors), "ro": "0", **files})
        for link in (self.root / "sys/class/block" / name, self.root / "sys/dev/block" / number):
            link.symlink_to(os.path.relpath(place, link.parent))
        node = self.root / "dev" / name.replace("!", "/")
        node.parent.mkdir(exist_ok=True)
        node.write_text("")
        return number

    def disk(self, name: str, place: str = "ata", *, sectors: int = 2048, **files: str | bytes) -> str:
        """Add a whole disk; `files` are relative to its folder, with "__" for "/". Returns its number."""
        return self.disk_of(name, place, {key.replace("__", "/"): value for key, value in files.items()}, sectors)

    def disk_of(self, name: str, place: str, files: Mapping[str, str | bytes], sectors: int = 2048) -> str:
        """Like `disk`, with the names of the files as they are."""
        parent = self.root / "sys" / PLACES[place]
        folder = parent / name if place.startswith("nvme") else parent / "block" / name
        queue: dict[str, str | bytes] = {"queue/logical_block_size": "512", "queue/rotational": "0", "removable": "0"}
        number = self._register(name, folder, sectors, queue)
        if place != "virtual":
            (folder / "device").symlink_to(os.path.relpath(parent, folder))
        self._put(folder, files)
        return number

    def partition(self, disk: str, index: int, *, sectors: int = 512) -> str:
        """Add a partition to a disk. Returns its name."""
        name = f"{disk}p{index}" if disk[-1].isdigit() else f"{disk}{index}"
        self._register(name, self.place(disk) / name, sectors, {"partition": str(index)})
        return name

    def place(self, name: str) -> Path:
        """The folder of a device in /sys."""
        return (self.root / "sys/class/block" / name).resolve()

    def mapped(self, name: str, label: str, uuid: str, members: list[str]) -> str:
        """Add a device-mapper device on members. Returns its number."""
        number = self.disk(name, "virtual", dm__name=label, dm__uuid=uuid)
        self.hold(name, members)
        (self.root / "dev/mapper" / label).symlink_to(f"../{name}")
        return number

    def hold(self, name: str, members: list[str]) -> None:
        """Record that a device consists of members."""
        for member in members:
            (self.place(name) / "slaves" / member).symlink_to(self.place(member))
            (self.place(member) / "holders" / name).symlink_to(self.place(name))

    def link(self, name: str, target: str) -> None:
        """Add a link below /dev/disk/by-id."""
        (self.root / "dev/disk/by-id" / name).symlink_to(f"../../{target}")

    def mount(self, number: str, source: str, point: str) -> None:
        """Mount a device."""
        self._mountinfo += f"30 22 {number} / {point} rw,relatime shared:1 - ext4 {source} rw\n"
        self._write_tables()

    def swap_to(self, path: str, kind: str = "partition") -> None:
        """Use it as swap space."""
        self._swaps += f"{path} {kind} 1024 0 -2\n"
        self._write_tables()
