# SPDX-License-Identifier: Apache-2.0
"""Devices of the host, and LUNs, each given to one machine as a whole.

Decides which device may be given away, how it is claimed and recognised, and which block device it becomes in QEMU.
The list of devices, and their users, come from `host.block`.

- INV-DEVICE-CLAIMED: as long as a guest can write to a device, its open file description holds the kernel's exclusive
  claim (O_EXCL): no other program can mount it, swap to it, or make a file system on it. QEMU by itself takes no such
  claim. The descriptor is opened here and passed to QEMU, so the claim lasts as long as either of them has it, and
  QEMU needs no privileges for it.
- INV-DEVICE-IDENTITY: the claimed device is the requested one: the identity is read from the device that is already
  open, after the claim, and a name like /dev/sdb alone is never enough.

Refusals list all reasons at once and are pure functions of facts. The claim itself is decisive: the mounts of a
container are in no table that we can read. A LUN has no claim that other hosts would respect: only what this host
knows about it, and the target's own access rules, keep it to one machine.

Sources: open(2); block/bdev.c of Linux (exclusive claims of a disk and its partitions exclude each other); QEMU's
qapi/block-core.json (BlockdevOptionsFile, BlockdevOptionsIscsi); RFC 3721 and libiscsi's README (URLs).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from vmm.host import block
from vmm.host.block import BlockDevice, HostDevices
from vmm.host.loops import Inode, inode_of
from vmm.kvm import iscsi
from vmm.kvm.iscsi import Reason
from vmm.model.errors import AccessDenied, InUse, InvalidSpec, NotFound, Refused, VmmError, of_os_error

if TYPE_CHECKING:
    from vmm.model.spec import MachineSpec

BLKGETSIZE64 = 0x80081272
RIGHTS_HINT = "run this as root, or give your user access to the device: sudo setfacl -m u:$USER:rw "
NO_IDENTITY = (
    "has neither WWN nor serial number nor udev link, so another disk could have its name after the next boot"
)


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """A device and everything that matters for giving it away."""

    device: BlockDevice
    partitions: tuple[BlockDevice, ...] = ()
    whole: BlockDevice | None = None  # for a partition: the whole disk
    holders: tuple[BlockDevice, ...] = ()  # devices built on it or on its partitions
    twins: tuple[BlockDevice, ...] = ()  # other devices with the same identity


@dataclass(frozen=True, slots=True)
class Given:
    """What machines already have, each with its machine: identities of devices and LUNs, and image files by real path
    and by inode (a file may have several names). `below` returns the inodes of all layers on which machines' images
    stand; it is called only for a device that is backed by a file."""

    identities: Mapping[str, str] = field(default_factory=dict)
    images: Mapping[str, str] = field(default_factory=dict)
    inodes: Mapping[Inode, str] = field(default_factory=dict)
    below: Callable[[], Mapping[Inode, str]] = dict


def given_of(specs: Iterable[MachineSpec], *, except_id: str | None = None, follow_links: bool = True) -> Given:
    """Everything that these machines have, except the one with the id `except_id`. Pure except for links in paths.

    A disk without a recorded identity, as in a definition written by hand, counts by its URL. Following links accesses
    the storage of the images, and blocks if that does not answer.
    """
    identities: dict[str, str] = {}
    images: dict[str, str] = {}
    inodes: dict[Inode, str] = {}
    for spec in specs:
        if spec.id == except_id:
            continue
        for disk in spec.disks:
            if disk.path is None:
                continue
            if disk.kind == "pass-through":
                with contextlib.suppress(InvalidSpec):
                    url = iscsi.parse(disk.path) if iscsi.is_url(disk.path) else None
                    identity = disk.identity or (url.identity if url else None)
                    if identity is not None:
                        identities[identity] = spec.name
            else:
                images[os.path.realpath(disk.path) if follow_links else disk.path] = spec.name
                if follow_links and (inode := inode_of(disk.path)) is not None:
                    inodes[inode] = spec.name
    return Given(identities, images, inodes)


# -- devices: may it be given away? -------------------------------------------------------------------------------


def inspect(path: str, *, root: str = "/") -> DeviceFacts:
    """The facts about the device at a path. Raises NotFound, InvalidSpec."""
    device = block.find(path, root=root)
    return facts_of(device, HostDevices(root))


def facts_of(device: BlockDevice, host: HostDevices) -> DeviceFacts:
    """The facts about a device, from one view of the host."""
    partitions = _existing(host, device.partitions)
    holders = [name for one in (device, *partitions) for name in one.holders]
    twins = host.by_identity(device.identity) if device.identity else []
    return DeviceFacts(
        device,
        partitions,
        host.device(device.parent) if device.parent else None,
        _existing(host, dict.fromkeys(holders)),
        tuple(one for one in twins if one.name != device.name),
    )


def _existing(host: HostDevices, names: Iterable[str]) -> tuple[BlockDevice, ...]:
    found = []
    for name in names:
        try:
            found.append(host.device(name))
        except NotFound:
            continue
    return tuple(found)


def refusals(facts: DeviceFacts, *, read_only: bool = False, given: Given | None = None) -> list[Reason]:
    """All reasons why this device must not be given to a machine; empty if it may be. Pure."""
    return [
        *_nature(facts.device, read_only),
        *_users(facts),
        *_given_already(facts, given or Given()),
        *_not_known_again(facts),
    ]


def _nature(device: BlockDevice, read_only: bool) -> Iterator[Reason]:
    if device.kind == "cd-rom":
        yield Reason("is a CD-ROM drive (give the machine an image of the medium: --cdrom)")
    elif device.kind == "memory":
        yield Reason("is part of this host's memory, not a disk")
    elif not device.is_present:
        yield Reason("has no file behind it" if device.kind == "loop" else "has no medium")
    elif device.read_only and not read_only:
        yield Reason("is write-protected")


def _users(facts: DeviceFacts) -> Iterator[Reason]:
    for one in (facts.device, *facts.partitions):
        who = "" if one is facts.device else f"its partition {one.path} "
        if one.mounts:
            yield Reason(f"{who}is mounted at {', '.join(one.mounts)}", in_use=True)
        if one.is_swap:
            yield Reason(f"{who}is swap space of this host", in_use=True)
        for name in one.holders:
            holder = next((held for held in facts.holders if held.name == name), None)
            what = "is one path of" if holder is not None and holder.kind == "multipath" else "is part of"
            yield Reason(f"{who}{what} {holder.path if holder else name}", in_use=True)


def _given_already(facts: DeviceFacts, given: Given) -> Iterator[Reason]:
    device = facts.device
    related = [(device, "")]
    related += [(one, f"its partition {one.path} ") for one in facts.partitions]
    related += [(facts.whole, f"the whole disk {facts.whole.path} ")] if facts.whole else []
    for one, who in related:
        if one.identity is not None and one.identity in given.identities:
            yield Reason(f"{who}belongs to the machine {given.identities[one.identity]}", in_use=True)
    for one, who in related:
        if one.file is not None:
            machine = given.images.get(one.file)  # the kernel reports the path with links resolved
            if machine is None and one.file_inode is not None:
                machine = given.inodes.get(one.file_inode)
            if machine is not None:
                yield Reason(f"{who}is the file {one.file}, a disk of the machine {machine}", in_use=True)
            elif one.file_inode is not None and (owner := given.below().get(one.file_inode)) is not None:
                yield Reason(
                    f"{who}is the file {one.file}, on which a disk of the machine {owner} stands", in_use=True
                )


def _not_known_again(facts: DeviceFacts) -> Iterator[Reason]:
    device = facts.device
    if device.identity is None:
        if device.is_present and device.kind not in ("cd-rom", "memory"):
            yield Reason(NO_IDENTITY)
    elif facts.twins and not any(one.kind == "multipath" for one in facts.holders):
        names = ", ".join(one.path for one in facts.twins)
        yield Reason(f"has the same identity as {names} and could be taken for it")


def refuse(path: str, reasons: Sequence[Reason], look: str = "vmm host disks") -> None:
    """Raise InUse or Refused with all reasons, if there are any; `look` is the command that shows more."""
    if reasons:
        kind = InUse if any(one.in_use for one in reasons) else Refused
        text = "; ".join(map(str, reasons))
        raise kind(f"cannot be passed through: it {text}", path=path, hint=f"{look} shows more")


# -- devices: claiming --------------------------------------------------------------------------------------------


class Claim:
    """A device that is open and exclusively ours; `fd` is for QEMU. Use it as a context manager, or `close` it."""

    def __init__(self, fd: int, path: str, device: BlockDevice, size_bytes: int, *, read_only: bool) -> None:
        self.fd = fd
        self.path = path
        self.device = device
        self.size_bytes = size_bytes
        self.read_only = read_only

    @property
    def identity(self) -> str:
        """The identity of the device; never empty."""
        assert self.device.identity is not None
        return self.device.identity

    def close(self) -> None:
        """Close our descriptor; the device stays claimed while QEMU has its own copy."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def claim(
    path: str,
    *,
    identity: str | None = None,
    read_only: bool = False,
    given: Given | None = None,
    root: str = "/",
) -> Claim:
    """Claim the device at `path`, or, if that name now leads to another device, the one that has `identity`.

    Raises NotFound (gone), InUse (mounted, swap, part of a volume, used by a program or a machine), Refused (not
    identifiable, or not the requested device), AccessDenied, InvalidSpec (not a block device).
    """
    path = locate(path, identity, root=root)
    facts = inspect(path, root=root)
    refuse(path, refusals(facts, read_only=read_only, given=given))
    fd = _open_exclusively(path, read_only=read_only)
    try:
        held = _device_of(fd, path, root)
        wanted = identity or facts.device.identity
        if held.identity is None or held.identity != wanted:
            raise Refused(f"is not the same device as before: {held.identity} instead of {wanted}", path=path)
        size = struct.unpack("=Q", fcntl.ioctl(fd, BLKGETSIZE64, bytes(8)))[0]
    except OSError as error:
        os.close(fd)
        raise of_os_error(error, "use the device", path=path) from error
    except BaseException:
        os.close(fd)
        raise
    return Claim(fd, path, held, size, read_only=read_only)


def locate(path: str, identity: str | None, *, root: str = "/") -> str:
    """The present path of the device with this identity: `path` itself if it still leads there.

    Raises NotFound if the device is gone, Refused if several have its identity, and whatever `block.find` raises if no
    identity is known.
    """
    if identity is None:
        return path
    try:
        if block.find(path, root=root).identity == identity:
            return path
    except VmmError:
        pass  # the name is gone or belongs to another device: search by identity below
    found = HostDevices(root).by_identity(identity)
    whole = [one for one in found if not one.holders] or found
    if not whole:
        raise NotFound(f"the device {identity} is gone", path=path, hint=block.LIST_HINT)
    if len(whole) > 1:
        names = ", ".join(one.path for one in whole)
        raise Refused(f"several devices have the identity {identity}: {names}", path=path)
    return whole[0].stable_path or whole[0].path


def _open_exclusively(path: str, *, read_only: bool) -> int:
    # O_NONBLOCK: a drive without a medium must not block us.
    flags = os.O_EXCL | os.O_DIRECT | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_RDONLY if read_only else os.O_RDWR)
    try:
        return os.open(path, flags)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise InUse(
                "is in use by another program on this host",
                path=path,
                hint=f"sudo fuser -v {path} and lsblk {path} show which one",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise AccessDenied(f"could not be opened: {error.strerror}", path=path, hint=RIGHTS_HINT + path) from error
        raise of_os_error(error, "open the device", path=path) from error


def _device_of(fd: int, path: str, root: str) -> BlockDevice:
    facts = os.fstat(fd)
    if not stat.S_ISBLK(facts.st_mode):
        raise InvalidSpec("is not a block device", path=path)
    return HostDevices(root).device_of_number(
        block.name_of_number(os.major(facts.st_rdev), os.minor(facts.st_rdev)),
    )


def blockdev_of(node_name: str, fd_set: int, *, read_only: bool = False) -> dict[str, Any]:
    """QEMU's block device on a claimed descriptor, which QEMU got with `-add-fd set=FD_SET,fd=…`. Pure.

    Bypasses the host's cache, so that what the guest flushed is visible to other initiators and survives a power cut.
    """
    return {
        "driver": "host_device",
        "node-name": node_name,
        "filename": f"/dev/fdset/{fd_set}",
        "cache": {"direct": True, "no-flush": False},
        "aio": "native",
        "discard": "unmap",
        "read-only": read_only,
    }
