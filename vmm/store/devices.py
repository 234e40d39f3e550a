# SPDX-License-Identifier: Apache-2.0
"""Disks that are not files of vmm's: devices of the host and LUNs, which a machine gets whole.

Decides when such a disk is examined (when it is defined, so that an unsuitable one is refused at once) and when it is
claimed (when QEMU starts or the disk is plugged in, and for as long as QEMU lives), and what cannot be done with a
machine that has one: there is no image of ours beneath it, so its content cannot be preserved while the guest goes on
writing. What may be given away, and the claim, are decided in `kvm.passthrough` and `kvm.iscsi`; which machines there
are, in `registry`.
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

GiveSet = Callable[
    [int], tuple[int, int]
]  # our descriptor -> (set, the number that QEMU is told); ours is QEMU's then
GiveSecret = Callable[[str, bytes], Device]  # (id, content) -> the object to make first


def looked_at(path: str, *, read_only: bool, machine_id: str) -> dict[str, str]:
    """Settings of a disk that is a device or LUN: the name and the identity it is known by. Takes nothing.

    The device is claimed for a moment, so that whatever stands in the way is said now. A LUN is tried where its target
    answers, and taken as it is where that is away. Raises InvalidSpec, NotFound, InUse, Refused, AccessDenied.
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
    """Take a disk for QEMU, and say what QEMU is told. Raises as `looked_at`, and for what `give_set` raises."""
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
    """What all machines but this one have, and the layers below the images of all, this one too.

    Machines that cannot be read hold nothing back.
    """
    machines, _ = registry.load_all()
    given = passthrough.given_of((one.spec for one in machines), except_id=machine_id)
    return replace(given, below=_layers_of_all)


def _layers_of_all() -> dict[Inode, str]:
    """The files of every chain that belongs to a machine, its snapshots or a backup: inode -> the machine's name.

    A layer that cannot be opened ends its chain: what lies below it is not known.
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
    """The first line of a file that nobody else may read. Raises NotFound, AccessDenied, Refused."""
    try:
        with open(path, "rb") as file:
            facts = os.fstat(file.fileno())
            content = file.read(MAX_PASSWORD_BYTES + 2).split(b"\n")[0].rstrip(b"\r")
    except OSError as error:
        raise of_os_error(error, "read the password", path=path) from error
    if facts.st_mode & 0o077:
        raise Refused("may be read by others", path=path, hint=f"chmod 600 {path}")
    if not 0 < len(content) <= MAX_PASSWORD_BYTES:
        raise Refused(f"holds no password of 1 to {MAX_PASSWORD_BYTES} bytes on its first line", path=path)
    return content


def size_bytes_of(disk: DiskSpec) -> int | None:
    """The size of a device as the kernel knows it; None for a LUN. Raises NotFound, InvalidSpec."""
    assert disk.path is not None
    if iscsi.is_url(disk.path):
        return None
    return block.find(passthrough.locate(disk.path, disk.identity)).size_bytes


def refuse_passed_through(spec: MachineSpec, what: str, *, hint: str | None = None) -> None:
    """Raise Refused when the machine has a device or LUN, of which `what` ("a snapshot") could hold nothing."""
    found = [disk for disk in spec.disks if disk.kind == "pass-through"]
    if found:
        names = ", ".join(f"{disk.id} ({disk.path})" for disk in found)
        raise Refused(
            f"has passed-through disks, which {what} cannot contain: {names}",
            machine=spec.name,
            hint=hint or f"remove them first: vmm disk remove {spec.name} {found[0].id}",
        )


def look_of(disk: DiskSpec, machine_id: str) -> list[Any] | None:
    """What changes when anybody writes to a device or LUN: for a machine's saved memory, which would not fit.

    Of a device writes on this host count, and another boot counts anew; of a LUN samples of its content. None where it
    cannot be told, as when the device is gone or the target does not answer.
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
