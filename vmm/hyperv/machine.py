# SPDX-License-Identifier: Apache-2.0
"""What a configuration says about a machine of Hyper-V, or about a checkpoint of one.

Decides nothing: values without behaviour, in Hyper-V's own terms. Sizes of memory are in MiB, as there.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HyperVDrive:
    """What is in one place of a controller."""

    bus: str  # "ide", "scsi" or "floppy"
    controller: int  # the number of its controller among those of the bus
    unit: int
    kind: str  # "VHD", "ISO", "VFD", "HDD" for a disk of the host, "NONE", or a word that is not known
    path: str  # as on the host; empty without a medium
    pool_id: str = ""
    is_shared: bool = False  # with persistent reservations: several machines may have it


@dataclass(frozen=True)
class Feature:
    """A setting of the switch's port, whose data only Hyper-V can interpret."""

    id: str
    name: str  # "VLAN", "security" or "bandwidth"; empty if it is not known
    data: bytes


@dataclass(frozen=True)
class HyperVAdapter:
    """A network adapter."""

    instance: str
    name: str
    model: str  # "synthetic" or "legacy"
    mac: str | None  # as "00:15:5d:0a:0b:01"; None if it has not been given one
    is_static: bool
    is_connected: bool
    switch_id: str
    switch_name: str
    features: tuple[Feature, ...] = ()


@dataclass(frozen=True)
class HyperVMemory:
    """MiB. Without dynamic memory the minimum and the maximum mean nothing."""

    start_mib: int
    is_dynamic: bool
    minimum_mib: int | None
    maximum_mib: int | None


@dataclass(frozen=True)
class Processors:
    """Virtual processors, and their share of the host's."""

    count: int
    limit: int  # 100000 is all
    reservation: int
    weight: int
    is_nested: bool  # it may run virtual machines itself


@dataclass(frozen=True)
class Firmware:
    """What the guest sees of its board, and how it boots."""

    bios_guid: str | None
    serial: str | None
    asset_tag: str | None
    boot_order: tuple[str, ...]  # means nothing for generation 2
    secure_boot: bool
    secure_boot_template: str | None


@dataclass(frozen=True)
class Power:
    """What the host does, as numbers of Hyper-V; None where the configuration says nothing."""

    at_host_start: int | None  # 0 nothing, 1 start if it ran, 2 start
    at_host_stop: int | None  # 0 power off, 1 save, 2 shut down
    after_crash: int | None  # 0 nothing, 1 restart, 2 go back


@dataclass(frozen=True)
class SavedState:
    """Saved memory and devices, which only Hyper-V can load."""

    kind: str
    places: tuple[str, ...]


@dataclass(frozen=True)
class Device:
    """An entry of the manifest."""

    kind: str  # the id of its class, lower case
    instance: str
    name: str


@dataclass(frozen=True)
class HyperVMachine:
    """A machine, or a checkpoint of one."""

    id: str  # upper case, without braces
    machine_id: str  # the machine's, also in a checkpoint
    name: str
    notes: str
    is_checkpoint: bool
    generation: int
    version: str  # of the configuration, as "5.0"
    created_seconds: int | None  # since 1970, UTC
    memory: HyperVMemory
    processors: Processors
    scsi_controllers: int
    drives: tuple[HyperVDrive, ...]
    adapters: tuple[HyperVAdapter, ...]
    com_ports: tuple[str, ...]  # the pipe of each port, or an empty string
    firmware: Firmware
    clock_skew_seconds: int  # of the guest's clock from UTC
    power: Power
    saved: SavedState | None
    has_tpm: bool
    is_shielded: bool
    merge_pending: bool  # a merge of disks was not finished
    devices: tuple[Device, ...]
    doubts: tuple[str, ...]  # contradictions and missing parts, in sentences
    unknown: tuple[tuple[str, str], ...]  # keys that are not read: path, value
