# SPDX-License-Identifier: Apache-2.0
"""The block devices of this host: their kind, how they are attached, and what uses them.

Decides how a device's kind, transport and identity are read from sysfs and /proc, and whether it is attached directly
(DAS) or through a storage network (SAN). What may be done with a device is decided in `kvm.passthrough`. Opens no
device except loop devices (to identify their file), and works without privileges; everything is read below one root
folder, which tests replace.

The identity is what stays the same when the kernel renumbers its devices: a WWN, a serial number, the id of a volume,
the file behind a loop device. A device without any of these has no identity; its name is never used as one.

Sources: Linux Documentation/ABI/{stable,testing}/sysfs-block, sysfs-class-* and sysfs-devices-*; udev's
60-persistent-storage.rules for the order of trust among identities.
"""

from __future__ import annotations

import errno
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from vmm.host import device_uses, loops
from vmm.host.loops import Inode
from vmm.model.errors import InvalidSpec, NotFound

Kind = Literal["disk", "partition", "cd-rom", "loop", "raid", "mapper", "multipath", "memory", "network"]
Attachment = Literal["DAS", "SAN"]

SYSFS_SECTOR_BYTES = 512  # unit of every `size` file, whatever the device's own sector size
SAN_TRANSPORTS = frozenset({"iscsi", "fc", "nvme-tcp", "nvme-rdma", "nvme-fc", "nbd", "rbd"})
_MAX_FILE_BYTES = 1 << 20
_SECTORS_WRITTEN = 6  # index in a device's `stat`
_MAX_DEPTH = 16  # of stacked devices
# The first pattern that matches the device's path in sysfs decides.
_TRANSPORT_OF_PLACE = (
    (re.compile(r"/session\d+/"), "iscsi"),
    (re.compile(r"/rport-\d+"), "fc"),
    (re.compile(r"/end_device-\d+"), "sas"),
    (re.compile(r"/usb\d+/"), "usb"),
    (re.compile(r"/ata\d+/"), "ata"),
    (re.compile(r"/nvme/nvme\d+/"), "nvme-pcie"),
    (re.compile(r"/mmc_host/"), "mmc"),
    (re.compile(r"/(vmbus|VMBUS)", re.IGNORECASE), "vmbus"),
    (re.compile(r"/vbd-\d+"), "xen"),
    (re.compile(r"/virtio\d+/"), "virtio"),
    (re.compile(r"/host\d+/target"), "scsi"),
)
# udev links that are not based on an identity, or are based on one that we read ourselves in a better form.
_WEAK_LINKS = ("lvm-pv-uuid-", "dm-name-")
_STRONG_LINKS = ("wwn-", "nvme-eui.", "nvme-uuid.", "scsi-3", "dm-uuid-", "md-uuid-")


@dataclass(frozen=True, slots=True)
class BlockDevice:
    """One block device. Sizes in bytes; a string is None if the host does not report it."""

    name: str  # assigned by the kernel, and different from boot to boot: "sda"
    path: str
    number: str  # "8:0"
    kind: Kind
    size_bytes: int
    logical_sector_bytes: int
    model: str | None
    serial: str | None
    wwn: str | None
    identity: str | None
    stable_path: str | None  # a link below /dev/disk/by-id
    transport: str | None
    attachment: Attachment | None
    read_only: bool
    removable: bool
    rotational: bool
    parent: str | None  # for a partition: the name of the whole disk
    partitions: tuple[str, ...]
    holders: tuple[str, ...]  # devices built on this one
    members: tuple[str, ...]  # devices that this one is built from
    mounts: tuple[str, ...]
    is_swap: bool
    file: str | None  # the file behind a loop device
    file_inode: Inode | None = None  # of that file, which may have other names

    @property
    def is_present(self) -> bool:
        """False for a drive without a medium and a loop device without a file."""
        return self.size_bytes > 0


class HostDevices:
    """The kernel's view below a root folder: `HostDevices().devices()`. Tables and devices are read once."""

    def __init__(self, root: str = "/") -> None:
        self._root = root
        self._mounts = device_uses.mounts_by_device(self._text("proc/self/mountinfo") or "")
        self._swaps = frozenset(device_uses.swaps(self._text("proc/swaps") or ""))
        self._links = self._links_by_id()
        self._cache: dict[str, BlockDevice] = {}

    def devices(self) -> list[BlockDevice]:
        """All devices, each disk followed by its partitions. Devices that disappear meanwhile are omitted."""
        folder = self._path("sys/class/block")
        try:
            names = os.listdir(folder)
        except OSError:
            return []
        found = []
        for name in names:
            try:
                if self._value(name, "hidden") != "1":
                    found.append(self.device(name))
            except NotFound:
                continue
        return sorted(found, key=lambda one: (_natural(one.parent or one.name), _natural(one.name)))

    def device(self, name: str) -> BlockDevice:
        """The device with that kernel name. Raises NotFound."""
        if name not in self._cache:
            self._cache[name] = self._read(name)
        return self._cache[name]

    def device_of_number(self, number: str) -> BlockDevice:
        """The device with that number, such as "8:0". Raises NotFound."""
        place = self._path(f"sys/dev/block/{number}")
        if not os.path.islink(place):
            raise NotFound(f"the kernel has no block device {number}")
        return self.device(os.path.basename(os.readlink(place)))

    def by_identity(self, identity: str) -> list[BlockDevice]:
        """All devices with this identity: none if the device is gone, several if identities are not unique.

        Loop devices on one file count as one identity, even if they use different names of the file.
        """
        found = [one for one in self.devices() if one.identity == identity]
        inodes = {one.file_inode for one in found if one.file_inode is not None}
        return [one for one in self.devices() if one in found or one.file_inode in inodes]

    # -- one device ---------------------------------------------------------------------------------------------

    def _read(self, name: str) -> BlockDevice:
        place = os.path.realpath(self._sys(name))
        number = self._value(name, "dev")
        if number is None:
            raise NotFound(f"block device {name!r} does not exist")
        parent = os.path.basename(os.path.dirname(place)) if self._value(name, "partition") is not None else None
        disk = parent or name
        kind = self._kind(name, parent)
        path = self._device_path(name)
        members = self._listing(name, "slaves")
        transport = self._transport(disk, members)
        links = self._links.get(self._resolved(path), ())
        wwn, serial = self._wwn(disk, kind), self._serial(disk)
        file = self._value(name, "loop/backing_file")
        return BlockDevice(
            name=name,
            path=path,
            number=number,
            kind=kind,
            size_bytes=_number(self._value(name, "size")) * SYSFS_SECTOR_BYTES,
            logical_sector_bytes=_number(self._value(disk, "queue/logical_block_size")) or SYSFS_SECTOR_BYTES,
            model=self._model(disk),
            serial=serial,
            wwn=wwn,
            identity=self._identity(name, parent, wwn, serial, file, links),
            stable_path=_best_link(links),
            transport=transport,
            attachment=self._attachment(disk, transport, members),
            read_only=self._value(name, "ro") == "1",
            removable=self._value(disk, "removable") == "1",
            rotational=self._value(disk, "queue/rotational") == "1",
            parent=parent,
            partitions=() if parent else self._partitions(name),
            holders=self._listing(name, "holders"),
            members=members,
            mounts=tuple(self._mounts.get(number, ())) or tuple(self._mounts.get(path, ())),
            is_swap=any(self._resolved(swap) == self._resolved(path) for swap in self._swaps),
            file=file,
            file_inode=None if file is None else loops.inode_behind(self._path(f"dev/{name}"), file),
        )

    def _kind(self, name: str, parent: str | None) -> Kind:
        if parent is not None:
            return "partition"
        if name.startswith("dm-"):
            return "multipath" if (self._value(name, "dm/uuid") or "").startswith("mpath-") else "mapper"
        for prefix, kind in _KIND_OF_NAME.items():
            if re.fullmatch(prefix + r"\d+", name):
                return kind
        return "cd-rom" if self._value(name, "device/type") == "5" else "disk"

    def _transport(self, disk: str, members: tuple[str, ...]) -> str | None:
        fabric = self._value(disk, "device/transport")  # for an NVMe controller; for a subsystem, see below
        if fabric is None and disk.startswith("nvme"):
            fabric = next(self._fabrics_of_subsystem(disk), None)
        if fabric is not None:
            return f"nvme-{fabric}"
        place = os.path.realpath(self._sys(disk)) + "/"
        for pattern, transport in _TRANSPORT_OF_PLACE:
            if pattern.search(place):
                return transport
        if disk.startswith(("nbd", "rbd")):
            return disk[:3]
        kinds = {self._transport(self._whole(member), ()) for member in members}
        return kinds.pop() if len(kinds) == 1 else None

    def _fabrics_of_subsystem(self, disk: str) -> Iterator[str]:
        """Transports of the controllers of a multipath NVMe disk, whose parent in sysfs is a subsystem."""
        subsystem = os.path.join(self._sys(disk), "device")
        try:
            names = sorted(os.listdir(subsystem))
        except OSError:
            return
        for name in names:
            if re.fullmatch(r"nvme\d+", name):
                fabric = _read_text(os.path.join(subsystem, name, "transport"))
                if fabric:
                    yield fabric

    def _attachment(
        self, disk: str, transport: str | None, members: tuple[str, ...], depth: int = 0
    ) -> Attachment | None:
        """SAN if any component is reached over a network; None for devices without hardware."""
        if transport is not None:
            return "SAN" if transport in SAN_TRANSPORTS else "DAS"
        if depth >= _MAX_DEPTH:
            return None
        found = set()
        for member in members:
            whole = self._whole(member)
            below = self._listing(whole, "slaves")
            found.add(self._attachment(whole, self._transport(whole, below), below, depth + 1))
        return "SAN" if "SAN" in found else "DAS" if "DAS" in found else None

    # -- identity -----------------------------------------------------------------------------------------------

    def _identity(
        self,
        name: str,
        parent: str | None,
        wwn: str | None,
        serial: str | None,
        file: str | None,
        links: tuple[str, ...],
    ) -> str | None:
        """A text that identifies this device wherever it appears; the most reliable source wins."""
        if parent is not None:
            of_disk = self.device(parent).identity
            return f"{of_disk},partition={self._value(name, 'partition')}" if of_disk else None
        volume = self._value(name, "dm/uuid") or self._value(name, "md/uuid")
        model = self._model(name)
        if volume:
            return f"volume={volume}"
        if wwn:
            return f"wwn={wwn}"
        if serial:
            return f"serial={model + ' ' if model else ''}{serial}"
        if file is not None:
            return f"file={file}"
        best = _best_link(links)
        return f"id={os.path.basename(best)}" if best else None

    def _wwn(self, disk: str, kind: Kind) -> str | None:
        if kind == "multipath":
            return (self._value(disk, "dm/uuid") or "").removeprefix("mpath-") or None
        text = self._value(disk, "wwid") or self._value(disk, "device/wwid")
        # A "t10." name is made of vendor, model and serial, and is used only by devices without a WWN.
        return " ".join(text.split()) if text else None

    def _serial(self, disk: str) -> str | None:
        for name in ("serial", "device/serial", "device/cid"):
            text = self._value(disk, name)
            if text:
                return text
        page = self._bytes(disk, "device/vpd_pg80")  # SCSI unit serial number page: a header of four bytes
        text = page[4:].decode("ascii", "replace").strip(" \0") if len(page) > 4 else ""
        return text or None

    def _model(self, disk: str) -> str | None:
        parts = [self._value(disk, "device/vendor"), self._value(disk, "device/model")]
        if parts[0] in ("ATA", "NVMe") or (parts[0] or "").startswith("0x"):
            parts[0] = None  # the kind of bus or a PCI vendor number, not the manufacturer
        text = " ".join(part for part in parts if part) or self._value(disk, "dm/name")
        return text or self._value(disk, "device/name")

    # -- reading ------------------------------------------------------------------------------------------------

    def _path(self, below: str) -> str:
        return os.path.join(self._root, below)

    def _sys(self, name: str) -> str:
        return self._path(f"sys/class/block/{name}")

    def _text(self, below: str) -> str | None:
        return _read_text(self._path(below))

    def _value(self, device: str, name: str) -> str | None:
        return _read_text(os.path.join(self._sys(device), name))

    def _bytes(self, device: str, name: str) -> bytes:
        return _read_bytes(os.path.join(self._sys(device), name)) or b""

    def _listing(self, device: str, name: str) -> tuple[str, ...]:
        try:
            return tuple(sorted(os.listdir(os.path.join(self._sys(device), name)), key=_natural))
        except OSError:
            return ()

    def _partitions(self, disk: str) -> tuple[str, ...]:
        return tuple(one for one in self._listing(disk, "") if self._value(disk, f"{one}/partition") is not None)

    def _whole(self, name: str) -> str:
        """The disk of a partition, or the device itself."""
        if self._value(name, "partition") is None:
            return name
        return os.path.basename(os.path.dirname(os.path.realpath(self._sys(name))))

    def _device_path(self, name: str) -> str:
        mapped = self._value(name, "dm/name")
        if mapped:
            return f"/dev/mapper/{mapped}"
        return "/dev/" + name.replace("!", "/")

    def _resolved(self, path: str) -> str:
        """The path, with links below this root's /dev resolved."""
        return os.path.realpath(self._path(path.lstrip("/")))

    def _links_by_id(self) -> Mapping[str, tuple[str, ...]]:
        found = defaultdict(list)
        folder = "dev/disk/by-id"
        try:
            names = sorted(os.listdir(self._path(folder)))
        except OSError:
            return {}
        for name in names:
            found[self._resolved(f"{folder}/{name}")].append(f"/{folder}/{name}")
        return {target: tuple(links) for target, links in found.items()}


_KIND_OF_NAME: dict[str, Kind] = {
    "loop": "loop",
    "md": "raid",
    "zram": "memory",
    "ram": "memory",
    "nbd": "network",
    "rbd": "network",
    "sr": "cd-rom",
}


def name_of_number(major: int, minor: int) -> str:
    """A device number as the kernel writes it."""
    return f"{major}:{minor}"


def find(path: str, *, root: str = "/") -> BlockDevice:
    """The block device that a path, under any of its names, leads to. Raises NotFound or InvalidSpec."""
    try:
        facts = os.stat(path)
    except OSError as error:
        raise NotFound(_unseen(error), path=path, hint=LIST_HINT) from error
    if not _is_block(facts.st_mode):
        raise InvalidSpec(f"is {_what(facts.st_mode)}, not a block device", path=path, hint=LIST_HINT)
    number = name_of_number(os.major(facts.st_rdev), os.minor(facts.st_rdev))
    try:
        return HostDevices(root).device_of_number(number)
    except NotFound as error:
        raise NotFound("is a device node whose device does not exist", path=path, hint=LIST_HINT) from error


def write_mark(path: str, *, root: str = "/") -> list[str | int | None]:
    """[boot id, disk sequence number, sectors written since boot]: changes when any program on this host writes to the
    device, or when it was unplugged meanwhile. Raises as `find`."""
    name = find(path, root=root).name
    folder = os.path.join(root, "sys/class/block", name)
    boot = _read_text(os.path.join(root, "proc/sys/kernel/random/boot_id"))
    counters = (_read_text(os.path.join(folder, "stat")) or "").split()
    written = int(counters[_SECTORS_WRITTEN]) if len(counters) > _SECTORS_WRITTEN else None
    return [boot, _read_text(os.path.join(folder, "diskseq")), written]


LIST_HINT = "vmm host disks lists the disks of this host"


def _unseen(error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return "the device does not exist"
    return f"the device cannot be examined: {error.strerror}"


def _is_block(mode: int) -> bool:
    return mode & 0o170000 == 0o060000


def _what(mode: int) -> str:
    names = {0o040000: "a folder", 0o100000: "a file", 0o020000: "a character device", 0o010000: "a pipe"}
    return names.get(mode & 0o170000, "something else")


def _best_link(links: tuple[str, ...]) -> str | None:
    """The link that best identifies the device itself, otherwise any link that is not weak."""
    usable = [link for link in links if not os.path.basename(link).startswith(_WEAK_LINKS)]
    strong = [link for link in usable if os.path.basename(link).startswith(_STRONG_LINKS)]
    return next(iter(strong or usable), None)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key that puts sda2 before sda10, and sdz before sdaa."""
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(part), "") if part.isdigit() else (1, len(part), part) for part in parts]


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdigit() else 0


def _read_bytes(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read(_MAX_FILE_BYTES)
    except OSError:
        return None


def _read_text(path: str) -> str | None:
    """A file's text without surrounding blanks; None if it cannot be read."""
    content = _read_bytes(path)
    return None if content is None else content.decode("utf-8", "backslashreplace").strip(" \n\0")
