# SPDX-License-Identifier: Apache-2.0
"""Disks that are not files of vmm: host devices and LUNs, each given to one machine as a whole.

Decides when such a disk is examined (when it is defined, so that an unsuitable one is refused at once) and when it is
claimed (when QEMU starts or the disk is plugged in, and for as long as QEMU lives), and which operations a machine
with such a disk does not support: the disk is not one of our images, so its content cannot be preserved while the
guest keeps writing. Whether a disk may be given away, and the claim itself, are decided in `kvm.passthrough` and
`kvm.iscsi`; the list of machines comes from `registry`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import vhdkit
from vmm.host import block
from vmm.host.loops import Inode, inode_of
from vmm.kvm import iscsi, passthrough, target
from vmm.kvm.cmdline import Device, Medium
from vmm.kvm.passthrough import Given
from vmm.model.errors import Refused, VmmError, of_os_error
from vmm.model.spec import DiskSpec, MachineSpec
from vmm.store import known_images, registry

MAX_PASSWORD_BYTES = 255

GiveSet = Callable[[int], tuple[int, int]]  # our descriptor -> (set, the descriptor for QEMU); QEMU then owns ours
GiveSecret = Callable[[str, bytes], Device]  # (id, content) -> the object to make first


def looked_at(path: str, *, read_only: bool, machine_id: str) -> dict[str, str]:
    """Settings for a device or LUN: the stable path and the identity.

    The device is claimed for a moment, so that any obstacle is reported now, and released again. A LUN is tried if
    its target answers, and accepted unchecked otherwise. Raises InvalidSpec, NotFound, InUse, Refused, AccessDenied.
    """
    given = given_to_others(machine_id)
    if iscsi.is_url(path):
        lun = iscsi.parse(path)
        _refuse_lun(path, lun, given)
        password = None if lun.password_file is None else read_password(lun.password_file)
        target.refuse_missing(path, lun, machine_id, password)
        return {"path": path, "identity": lun.identity}
    with passthrough.claim(path, read_only=read_only, given=given) as claim:
        return {"path": claim.device.stable_path or claim.device.path, "identity": claim.identity}


def medium_of(spec: MachineSpec, disk: DiskSpec, *, give_set: GiveSet, give_secret: GiveSecret) -> Medium:
    """Claim a disk for QEMU; returns how QEMU gets it. Raises as `looked_at`, and whatever `give_set` raises."""
    assert disk.kind == "pass-through" and disk.path is not None
    given = given_to_others(spec.id)
    if iscsi.is_url(disk.path):
        lun = iscsi.parse(disk.path)
        _refuse_lun(disk.path, lun, given)
        secrets: tuple[Device, ...] = ()
        secret_id = None
        if lun.password_file is not None:
            secret_id = f"{disk.id}-password"
            secrets = (give_secret(secret_id, read_password(lun.password_file)),)
        node = iscsi.blockdev_of_lun(
            disk.id, lun, initiator=iscsi.initiator_name(spec.id), read_only=disk.read_only, secret_id=secret_id
        )
        return Medium(node, objects=secrets)
    claim = passthrough.claim(disk.path, identity=disk.identity, read_only=disk.read_only, given=given)
    set_number, descriptor = give_set(claim.fd)
    return Medium(passthrough.blockdev_of(disk.id, set_number, read_only=disk.read_only), ((set_number, descriptor),))


def _refuse_lun(path: str, lun: iscsi.Lun, given: Given) -> None:
    sessions = iscsi.host_sessions()
    passthrough.refuse(path, iscsi.refusals(lun, identities=given.identities, sessions=sessions), "vmm list")


def given_to_others(machine_id: str) -> Given:
    """Everything that other machines have, and the layers below the images of all machines, including this one.

    Machines that cannot be read are left out.
    """
    machines, _ = registry.load_all()
    given = passthrough.given_of((one.spec for one in machines), except_id=machine_id)
    return replace(given, below=_layers_of_all)


def _layers_of_all() -> dict[Inode, str]:
    """The files of every chain of a machine, its snapshots or a backup: inode -> the machine's name.

    A layer that cannot be opened ends its chain: the layers below it are unknown.
    """
    machines, _ = registry.load_all()
    found: dict[Inode, str] = {}
    known = known_images.look().by_machine
    for machine in machines:
        folders = tuple(one for disk in machine.spec.disks for one in disk.parent_dirs)
        options = vhdkit.OpenOptions(parent_dirs=folders, allow_raw_parent=True, lock=False)
        for path in known.get(machine.name, ()):
            layers = [path]
            with contextlib.suppress(vhdkit.VhdkitError):
                layers = vhdkit.chain_paths(path, options=options)
            for layer in layers:
                if (inode := inode_of(layer)) is not None:
                    found.setdefault(inode, machine.name)
    return found


def read_password(path: str) -> bytes:
    """The first line of a file that no other user may read. Raises NotFound, AccessDenied, Refused."""
    try:
        with open(path, "rb") as file:
            facts = os.fstat(file.fileno())
            content = file.read(MAX_PASSWORD_BYTES + 2).split(b"\n")[0].rstrip(b"\r")
    except OSError as error:
        raise of_os_error(error, "read the password", path=path) from error
    if facts.st_mode & 0o077:
        raise Refused("can be read by other users", path=path, hint=f"chmod 600 {path}")
    if not 0 < len(content) <= MAX_PASSWORD_BYTES:
        raise Refused(f"must have a password of 1 to {MAX_PASSWORD_BYTES} bytes as its first line", path=path)
    return content


def size_bytes_of(disk: DiskSpec) -> int | None:
    """The size of a device according to the kernel; None for a LUN. Raises NotFound, InvalidSpec."""
    assert disk.path is not None
    if iscsi.is_url(disk.path):
        return None
    return block.find(passthrough.locate(disk.path, disk.identity)).size_bytes


def refuse_passed_through(spec: MachineSpec, what: str, *, hint: str | None = None) -> None:
    """Raise Refused if the machine has a device or LUN, whose content `what` ("a snapshot") could not include."""
    found = [disk for disk in spec.disks if disk.kind == "pass-through"]
    if found:
        names = ", ".join(f"{disk.id} ({disk.path})" for disk in found)
        raise Refused(
            f"has passed-through disks, which {what} cannot contain: {names}",
            machine=spec.name,
            hint=hint or f"remove them first: vmm disk remove {spec.name} {found[0].id}",
        )


def look_of(disk: DiskSpec, machine_id: str) -> list[Any] | None:
    """A value that changes when a device or LUN is written to; saved memory does not fit a disk that changed.

    For a device: the writes on this host since boot. For a LUN: samples of its content. None if it cannot be
    determined, for example because the device is gone or the target does not answer.
    """
    assert disk.path is not None
    try:
        if iscsi.is_url(disk.path):
            from vmm.kvm.lun_look import look_at_lun

            lun = iscsi.parse(disk.path)
            password = None if lun.password_file is None else read_password(lun.password_file)
            found = look_at_lun(lun, initiator=iscsi.initiator_name(machine_id), password=password)
            return None if found is None else ["content", found]
        return block.write_mark(passthrough.locate(disk.path, disk.identity))
    except VmmError:
        return None
