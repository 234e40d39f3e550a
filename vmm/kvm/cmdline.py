# SPDX-License-Identifier: Apache-2.0
"""Builds QEMU's command line from a machine's definition. Pure: the same definition and facts give the same result.

Decides which device a setting becomes, its id, and its place on a bus: saved memory can be restored only into the same
devices in the same places, so what is here changes only with a new machine type. The ids:

    buses        ide.0, ide.1 (part of the machine), scsi0 to scsi3
    disks        the disk's id: node, export and device; the guest identifies it by its serial
    channels     agent (org.qemu.guest_agent.0), kvp (org.vmm.kvp.0), on the bus serialbus
    chardevs     qmp, serial, agent, kvp

Must not open, bind or start anything: it gets descriptors and paths as facts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from vmm.model.spec import DiskSpec, MachineSpec

MIB = 1 << 20
RECONNECT_SECONDS = 5  # QEMU's main loop can block for this long while the disk server is down
AGENT_PORT, KEY_VALUE_PORT = "agent", "kvp"
SERIAL_BUS = "serialbus"
UEFI_CODE = "uefi-code"
UEFI_VARIABLES = "uefi-variables"
# PCI slots are assigned explicitly: a device that is added in a later version must not move the others.
# 4 to 7 are for SCSI controllers, 8 to 19 for virtio disks, 20 to 31 for adapters.
_SLOT_SCREEN, _SLOT_SERIAL_BUS, _SLOT_SCSI, _SLOT_VIRTIO_DISK, _SLOT_ADAPTER = 2, 3, 4, 8, 20

_RTC_BASES = {"utc": "utc", "local": "localtime"}

Device = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sockets:
    """Descriptors of listening unix sockets, as QEMU inherits them; None if the channel does not exist."""

    qmp: int
    serial: int
    agent: int | None = None
    key_value: int | None = None


@dataclass(frozen=True, slots=True)
class Medium:
    """What a disk without a chain is made of, found by the disk's id: a descriptor set, or a whole block device node.

    `descriptors` are (set number, our descriptor) pairs that QEMU is given first.
    """

    node: Device
    descriptors: tuple[tuple[int, int], ...] = ()
    objects: tuple[Device, ...] = ()  # objects that the node refers to, created before it


@dataclass(frozen=True, slots=True)
class Adapter:
    """A network adapter, as the network modules deliver it."""

    netdev: Device
    device: Device


@dataclass(frozen=True, slots=True)
class StartFacts:
    """Facts that depend on this host and this start."""

    accelerator: str
    nbd_socket: str
    sockets: Sockets
    vnc_socket: str | None = None
    kernel_path: str | None = None
    initrd_path: str | None = None
    uefi_code_path: str | None = None
    uefi_variables: Medium | None = None
    media: Mapping[str, Medium] = field(default_factory=dict)
    adapters: tuple[Adapter, ...] = ()
    incoming: bool = False  # memory and devices come from a saved state


def qemu_arguments(spec: MachineSpec, facts: StartFacts) -> list[str]:
    """The arguments after the program's name."""
    words = [
        *("-name", f"guest={_quoted(spec.name)},debug-threads=on"),
        *("-uuid", spec.id),
        "-nodefaults",
        "-no-user-config",
        "-no-shutdown",  # QEMU stays until it gets the command quit, so any other exit is a crash
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *("-machine", ",".join(_machine(spec, facts))),
        *("-cpu", spec.cpu_model),
        *("-smp", f"cpus={spec.cpu_count}"),
        *("-m", f"size={spec.memory_bytes // MIB}M"),
        *("-rtc", f"base={_RTC_BASES[spec.rtc]},driftfix=slew"),
        *("-boot", "strict=on"),
    ]
    words += _screen(spec, facts)
    words += _channels(spec, facts.sockets)
    words += _firmware(spec, facts)
    words += _disks(spec, facts)
    for adapter in facts.adapters:
        words += ["-netdev", _json(adapter.netdev), "-device", _json(adapter.device)]
    if facts.incoming:
        words += ["-S", "-incoming", "defer"]
    return words


def _machine(spec: MachineSpec, facts: StartFacts) -> Iterator[str]:
    yield f"type={spec.machine_type}"
    yield f"accel={facts.accelerator}"
    yield "vmport=off"
    if spec.firmware == "uefi":
        yield f"pflash0={UEFI_CODE}"
        yield f"pflash1={UEFI_VARIABLES}"


def _screen(spec: MachineSpec, facts: StartFacts) -> list[str]:
    if not spec.screen:
        return ["-display", "none"]
    device = {"driver": "VGA", "id": "screen", "bus": "pci.0", "addr": f"{_SLOT_SCREEN:#x}", "vgamem_mb": 16}
    words = ["-device", _json(device)]
    if facts.vnc_socket is None:
        return [*words, "-display", "none"]
    return [*words, "-vnc", f"unix:{_quoted(facts.vnc_socket)},share=ignore"]


def _channels(spec: MachineSpec, sockets: Sockets) -> list[str]:
    words = [
        *("-chardev", f"socket,id=qmp,fd={sockets.qmp},server=on,wait=off"),
        *("-mon", "chardev=qmp,mode=control"),
        # QEMU waits for the worker, which is connected already, so that no output of the guest is lost.
        *("-chardev", f"socket,id=serial,fd={sockets.serial},server=on,wait=on"),
        *("-device", _json({"driver": "isa-serial", "id": "serial0", "chardev": "serial"})),
    ]
    # It has 64 queues, however many ports are used. An eventfd for each would be one more descriptor for the main loop
    # to poll with every frame that it moves for an adapter; these channels carry too little data to gain from one.
    bus = {"driver": "virtio-serial-pci", "id": SERIAL_BUS, "bus": "pci.0", "addr": f"{_SLOT_SERIAL_BUS:#x}",
           "ioeventfd": False}  # fmt: skip
    words += ["-device", _json(bus)]
    ports = ((AGENT_PORT, 1, "org.qemu.guest_agent.0", sockets.agent),
             (KEY_VALUE_PORT, 2, "org.vmm.kvp.0", sockets.key_value))  # fmt: skip
    for port_id, number, name, descriptor in ports:
        if descriptor is not None:
            words += ["-chardev", f"socket,id={port_id},fd={descriptor},server=on,wait=off"]
            port = {"driver": "virtserialport", "id": port_id, "bus": f"{SERIAL_BUS}.0", "nr": number,
                    "chardev": port_id, "name": name}  # fmt: skip
            words += ["-device", _json(port)]
    return words


def _firmware(spec: MachineSpec, facts: StartFacts) -> list[str]:
    words: list[str] = []
    if spec.firmware == "uefi":
        assert facts.uefi_code_path is not None and facts.uefi_variables is not None
        code = {"driver": "file", "node-name": UEFI_CODE, "filename": facts.uefi_code_path, "read-only": True}
        words += ["-blockdev", _json(code)]
        words += _medium_words(facts.uefi_variables)
    if facts.kernel_path is not None:
        words += ["-kernel", facts.kernel_path]
        if facts.initrd_path is not None:
            words += ["-initrd", facts.initrd_path]
        if spec.append is not None:
            words += ["-append", spec.append]
    return words


# -- disks ---------------------------------------------------------------------------------------------------------


def _disks(spec: MachineSpec, facts: StartFacts) -> list[str]:
    words: list[str] = []
    # There is always one SCSI controller, for disks that are added while the machine runs.
    used = {disk.controller_index for disk in spec.disks if disk.controller == "scsi"}
    for number in sorted(used | {0}):
        words += ["-device", _json(scsi_controller(number))]
    order = boot_indices(spec)
    for disk in spec.disks:
        medium = facts.media.get(disk.id)
        if disk.is_image:
            words += ["-blockdev", _json(chain_node(disk, facts.nbd_socket))]
        elif medium is not None:
            words += _medium_words(medium)
        words += ["-device", _json(disk_device(disk, boot_index=order.get(disk.id)))]
    return words


def _medium_words(medium: Medium) -> list[str]:
    words: list[str] = []
    for set_number, descriptor in medium.descriptors:
        # The `opaque` word identifies the set when the disk is unplugged.
        words += ["-add-fd", f"set={set_number},fd={descriptor},opaque={medium.node['node-name']}"]
    for one in medium.objects:
        words += ["-object", _json(one)]
    return [*words, "-blockdev", _json(medium.node)]


def scsi_controller(number: int) -> Device:
    """The SCSI controller with that number."""
    return {"driver": "virtio-scsi-pci", "id": f"scsi{number}", "bus": "pci.0", "addr": f"{_SLOT_SCSI + number:#x}"}


def chain_node(disk: DiskSpec, nbd_socket: str) -> Device:
    """The block node of a chain served by the disk server; `blockdev-add` takes it as well."""
    return {
        "driver": "nbd",
        "node-name": disk.id,
        "server": {"type": "unix", "path": nbd_socket},
        "export": disk.id,
        "reconnect-delay": RECONNECT_SECONDS,
        "read-only": disk.read_only,
        "discard": "unmap",
    }


def file_node(node_name: str, set_number: int, *, read_only: bool, is_device: bool = False) -> Device:
    """A raw file, or block device, that QEMU can reach only through a descriptor set. QEMU's own locking is off.

    A device needs a driver of its own, because QEMU's driver for files refuses devices.
    """
    driver = "host_device" if is_device else "file"
    return {
        "driver": "raw",
        "node-name": node_name,
        "read-only": read_only,
        "file": {"driver": driver, "filename": f"/dev/fdset/{set_number}", "read-only": read_only, "locking": "off"},
    }


def disk_device(disk: DiskSpec, *, boot_index: int | None = None) -> Device:
    """The device of a disk or drive; `device_add` takes it as well."""
    device: dict[str, Any] = {"id": disk.id}
    if disk.controller == "ide":
        driver = "ide-cd" if disk.kind == "iso" else "ide-hd"
        device |= {"driver": driver, "bus": f"ide.{disk.controller_index}", "unit": disk.unit}
    elif disk.controller == "scsi":
        device |= {"driver": "scsi-hd", "bus": f"scsi{disk.controller_index}.0", "channel": 0, "scsi-id": disk.unit,
                   "lun": 0}  # fmt: skip
    else:
        device |= {"driver": "virtio-blk-pci", "bus": "pci.0", "addr": f"{_SLOT_VIRTIO_DISK + disk.unit:#x}"}
    if disk.path is not None:
        device["drive"] = disk.id
    device["serial"] = disk.serial
    if disk.sector_bytes > 512 or disk.physical_sector_bytes > 512:
        device |= {"logical_block_size": disk.sector_bytes, "physical_block_size": disk.physical_sector_bytes}
    if disk.kind != "iso":
        device |= {"werror": "stop", "rerror": "stop"}
    if boot_index is not None:
        device["bootindex"] = boot_index
    return device


def boot_indices(spec: MachineSpec) -> dict[str, int]:
    """Boot order of disks and adapters: id -> number from 1. Devices that are missing are not booted from."""
    if spec.kernel is not None:
        return {}
    disks = [disk for disk in spec.disks if disk.kind != "iso" and disk.controller != "scsi"]
    disks.sort(key=lambda disk: (disk.controller != "ide", disk.controller_index, disk.unit))
    of_kind = {
        "disk": [disk.id for disk in disks],
        "cdrom": [disk.id for disk in spec.disks if disk.kind == "iso"],
        "network": [adapter.id for adapter in spec.adapters],
    }
    ordered = [device_id for kind in spec.boot_order for device_id in of_kind[kind]]
    return {device_id: number for number, device_id in enumerate(ordered, 1)}


def adapter_slot(number: int) -> int:
    """The PCI slot of the adapter with that number (0 to 11)."""
    return _SLOT_ADAPTER + number


def _json(document: Device) -> str:
    return json.dumps(document, separators=(",", ":"))


def _quoted(text: str) -> str:
    """Escape text for use as a value in QEMU's NAME=VALUE lists."""
    return text.replace(",", ",,")
