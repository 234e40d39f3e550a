# SPDX-License-Identifier: Apache-2.0
"""A user's program about machines, which only has to pass the type checker (it is never run)."""

from __future__ import annotations

from typing import assert_type

import vmm


def look_after(manager: vmm.Manager, name: str) -> str:
    """Everything that a program does with a machine, with the types it sees."""
    info = manager.create(name, memory_bytes=1 << 30, disks=[vmm.DiskRequest("/srv/web.vhd", controller="virtio")])
    assert_type(info, vmm.MachineInfo)
    assert_type(manager.start(name), vmm.MachineState)
    assert_type(manager.state(name), vmm.MachineState)
    assert_type(manager.machines(), list[vmm.MachineInfo])
    disk = manager.add_disk(name, vmm.DiskRequest("/srv/data.vhd", "scsi"))
    assert_type(disk, vmm.DiskSpec)
    assert_type(manager.resize_disk(name, disk.id, 2 << 30), int)
    try:
        manager.shutdown(name, timeout_seconds=60)
    except vmm.TimedOut as error:
        manager.stop(name)
        return error.hint or error.problem
    except vmm.VmmError as error:
        return f"{error.machine}: {error} ({error.exit_code})"
    plan = manager.plan_delete(name, with_disks=True)
    assert_type(plan.disks, tuple[str, ...])
    return manager.delete(name).folder


def look_inside(name: str) -> None:
    """Its attributes are values of public types, whichever folders the machines lie in."""
    manager = vmm.Manager(home="/srv/vmm", runtime="/run/vmm-lab")
    assert_type(manager.disks(name), tuple[vmm.DiskInfo, ...])
    assert_type(manager.save_night(name, "/backups", vmm.BackupWishes(consistent=True)), vmm.MachineNight)
    assert_type(manager.forget_nights(name), vmm.ForgottenNights)
    assert_type(manager.events(name), list[vmm.Event])
    assert_type(manager.plan_delete(name).kept, tuple[vmm.KeptDisk, ...])
    assert_type(manager.snapshots(name).create("before"), vmm.Snapshot)
    assert_type(manager.snapshots(name).merge_live(), tuple[vmm.MergeResult, ...])
    guest = manager.guest(name)
    assert_type(guest.ping(), vmm.Heartbeat)
    assert_type(guest.info(), vmm.GuestInfo)
    assert_type(guest.get_item("role"), vmm.ExchangedItem)
    assert_type(guest.open_console(), vmm.ConsoleConnection)
    manager.add_disk(name, vmm.DiskWish("/srv/more.vhd"))  # its name in 0.1.0
