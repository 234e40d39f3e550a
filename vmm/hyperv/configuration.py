# SPDX-License-Identifier: Apache-2.0
"""From the keys of a configuration to what they say about the machine.

Decides which key means what, and which keys are not known. Must not know how a file stores them, nor what becomes of
the machine here.

A missing key has Hyper-V's default value. A key of an unexpected type, or one that contradicts another, is a doubt,
which is reported with the machine. A configuration without a name, an id, memory or processors is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

from vmm.hyperv import ids
from vmm.hyperv.keys import Key, Value
from vmm.hyperv.machine import (
    Device,
    Feature,
    Firmware,
    HyperVAdapter,
    HyperVDrive,
    HyperVMachine,
    HyperVMemory,
    Power,
    Processors,
    SavedState,
)
from vmm.hyperv.problems import refuse

_MAX_UNITS = {"ide": 2, "scsi": 64, "floppy": 1}
_MAX_DEVICES = 512  # of a manifest; Hyper-V attaches at most 4 controllers and 12 adapters
_MAX_DOUBTS = 100  # that are reported
_FILETIME_START_SECONDS = 11_644_473_600  # from 1601 to 1970
_TICKS_PER_SECOND = 10_000_000
_UUID = re.compile(r"[0-9A-F]{8}(-[0-9A-F]{4}){3}-[0-9A-F]{12}")
_MAC = re.compile(r"([0-9A-Fa-f]{2}[-:]?){5}[0-9A-Fa-f]{2}")
_DRIVE_NAME = re.compile(r"drive([0-9]{1,3})", re.IGNORECASE)
# Keys that change nothing for another hypervisor: counters, the host's own notes, settings of the manifest.
_WITHOUT_MEANING = re.compile(
    r"(.*/)?(vdevversion|channelinstanceguid|vpciinstanceguid|clustermonitored|portname|altportname|poolid|flags)"
    r"|manifest/(size|version)|global_settings/(metrics/.*|owner/sid|vhd_path_acled|devices/generation_id"
    r"|snapshots/list/size)"
    r"|properties/(last_.*_time|highly_available)|settings/stopped_at_host_shutdown"
)

T = TypeVar("T", int, bool, str, bytes)


def configuration(path: str, tree: Key) -> HyperVMachine:
    """What a tree says; `path` is the file it was read from, for messages. Raises BadConfiguration."""
    root = tree.at("configuration")
    if root is None:
        index = tree.at("Configurations/VirtualMachines")
        if index is not None:
            hint = "name one of the configurations that it lists, or their folder"
            refuse(path, "it is a host's index of machines, not a machine", hint=hint)
        refuse(path, "it does not describe a machine: the key `configuration` is missing", hint=None)
    return _Reading(path, root).machine()


class _Reading:
    """One reading of one tree."""

    def __init__(self, path: str, root: Key) -> None:
        self._path = path
        self._root = root
        self._parts: dict[str, list[Key]] = {}  # the keys below the root
        for key in root.children:
            self._parts.setdefault(key.name.casefold(), []).append(key)
        self._read: set[int] = set()  # the ids of the keys that were read
        self._doubts: list[str] = []

    def machine(self) -> HyperVMachine:
        """See `configuration`."""
        machine_id = self._id("properties/global_id")
        logical_id = self._id("settings/global/logical_id", machine_id)
        devices = tuple(self._devices())
        subtype = self._number("properties/subtype", 0)
        version = self._number("properties/version", 0)
        scsi = [one.instance.lower() for one in devices if one.kind == ids.SCSI]
        is_checkpoint = self._text("properties/type_id").casefold() == "snapshots"
        found = HyperVMachine(
            id=machine_id,
            machine_id=logical_id,
            name=self._text("properties/name"),
            notes=self._text("properties/notes").replace("\r\n", "\n"),
            is_checkpoint=is_checkpoint,
            generation=subtype + 1,
            version=f"{version >> 8}.{version & 0xFF}",
            created_seconds=self._created(),
            memory=self._memory(),
            processors=self._processors(),
            scsi_controllers=len(scsi),
            drives=(
                *self._drives("ide", 0, f"_{ids.IDE}_", "controller0"),
                *self._drives("ide", 1, f"_{ids.IDE}_", "controller1"),
                *(one for number, name in enumerate(scsi) for one in self._drives("scsi", number, f"_{name}_")),
                *self._drives("floppy", 0, f"_{ids.FLOPPY}_"),
            ),
            adapters=tuple(self._adapters(devices)),
            com_ports=tuple(
                self._text(f"_{ids.COM_PORTS}_/port{number}/connection")
                for number in (0, 1)
                if self._at(f"_{ids.COM_PORTS}_/port{number}") is not None
            ),
            firmware=self._firmware(),
            clock_skew_seconds=round(
                self._number(f"_{ids.CLOCK}_/RtcDevice/CmosUtcSkew", 0, least=None) / _TICKS_PER_SECOND
            ),
            power=Power(
                self._maybe_number("global_settings/power/host_startup/action"),
                self._maybe_number("global_settings/power/host_shutdown/action"),
                self._maybe_number("global_settings/unexpected_termination/action"),
            ),
            saved=self._saved(),
            has_tpm=self._is("security/settings/tpm_enabled"),
            is_shielded=self._is("security/settings/shielding_requested"),
            merge_pending=self._is("global_settings/disk_merge_pending"),
            devices=devices,
            doubts=(),
            unknown=(),
        )
        self._doubt_generation(found)
        self._doubt_controllers(scsi)
        return replace(found, doubts=tuple(self._doubts[:_MAX_DOUBTS]), unknown=tuple(self._unknown()))

    # -- values -------------------------------------------------------------------------------------------------

    def _at(self, path: str, below: Key | None = None) -> Key | None:
        """A key; None if it is missing, and, with a doubt, if there are several."""
        if below is not None:
            found = below.every(path)
        else:
            first, _, rest = path.partition("/")
            parts = self._parts.get(first.casefold(), [])
            found = tuple(key for part in parts for key in (part.every(rest) if rest else (part,)))
        if len(found) > 1:
            self._doubts.append(f"the key {path} occurs {len(found)} times, so it is not read")
        return found[0] if len(found) == 1 else None

    def _value(self, path: str, kind: type[T], below: Key | None = None) -> T | None:
        """The value of a key; None if it is missing, and, with a doubt, if it has another type."""
        found = self._at(path, below)
        if found is None:
            return None
        self._read.add(id(found))
        value = found.value
        if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
        if value is not None:
            self._doubts.append(f"the key {path} is {_shown(value)}, which is not expected there")
        return None

    def _text(self, path: str, below: Key | None = None) -> str:
        return self._value(path, str, below) or ""

    def _is(self, path: str, below: Key | None = None) -> bool:
        return bool(self._value(path, bool, below))

    def _number(self, path: str, otherwise: int, below: Key | None = None, *, least: int | None = 0) -> int:
        found = self._value(path, int, below)
        if found is None:
            return otherwise
        if least is not None and found < least:
            self._doubts.append(f"the key {path} is {found}, which is not expected there")
            return otherwise
        return found

    def _maybe_number(self, path: str) -> int | None:
        return self._value(path, int)

    def _id(self, path: str, otherwise: str | None = None) -> str:
        found = self._text(path).strip().strip("{}").upper()
        if _UUID.fullmatch(found):
            return found
        if otherwise is None:
            refuse(self._path, f"it does not describe a machine: its key {path} does not hold an id")
        if found:
            self._doubts.append(f"the key {path} is {found!r}, which is not an id")
        return otherwise

    def _needed(self, path: str) -> int:
        found = self._value(path, int)
        if found is None or found < 1:
            refuse(self._path, f"it does not describe a machine: its key {path} does not hold a number above 0")
        return found

    # -- parts --------------------------------------------------------------------------------------------------

    def _created(self) -> int | None:
        found = self._at("properties/creation_time")
        if found is None:
            return None
        self._read.add(id(found))
        value = found.value
        ticks = int.from_bytes(value, "little") if isinstance(value, bytes) and len(value) == 8 else value
        if not isinstance(ticks, int) or isinstance(ticks, bool) or ticks <= 0:
            return None
        return ticks // _TICKS_PER_SECOND - _FILETIME_START_SECONDS

    def _memory(self) -> HyperVMemory:
        bank = "settings/memory/bank"
        dynamic = self._is(f"{bank}/dynamic_memory_enabled")
        minimum = self._number(f"{bank}/reservation", 0)
        maximum = self._number(f"{bank}/limit", 0)
        for name in ("priority", "target_memory_buffer"):
            self._number(f"{bank}/{name}", 0)
        return HyperVMemory(
            self._needed(f"{bank}/size"), dynamic, minimum if dynamic else None, maximum if dynamic else None
        )

    def _processors(self) -> Processors:
        return Processors(
            count=self._needed("settings/processors/count"),
            limit=self._number("settings/processors/limit", 100_000),
            reservation=self._number("settings/processors/reservation", 0),
            weight=self._number("settings/processors/weight", 100),
            is_nested=self._is("settings/processors/nested_virtualization/enabled"),
        )

    def _devices(self) -> Iterator[Device]:
        manifest = self._at("manifest")
        entries = [] if manifest is None else [entry for entry in manifest.children if entry.children]
        if len(entries) > _MAX_DEVICES:
            refuse(self._path, f"its manifest has {len(entries)} devices; {_MAX_DEVICES} are read", hint=None)
        seen = set()
        for entry in entries:
            kind = ids.plain(self._text("device", entry))
            instance = ids.plain(self._text("instance", entry)).upper()
            if instance in seen:
                self._doubts.append(f"the manifest names {instance} more than once")
                continue
            seen.add(instance)
            yield Device(kind, instance, self._text("name", entry))

    def _drives(self, bus: str, controller: int, place: str, part: str = "controller0") -> Iterator[HyperVDrive]:
        parent = self._at(f"{place}/{part}")
        seen = set()
        for key in () if parent is None else parent.children:
            match = _DRIVE_NAME.fullmatch(key.name)
            if match is None:
                continue
            unit = int(match[1])
            if unit in seen:
                self._doubts.append(f"{bus} {controller} has two drives {unit}")
            seen.add(unit)
            kind = self._text("type", key).upper()
            drive = HyperVDrive(
                bus, controller, unit, kind, self._text("pathname", key), self._text("pool_id", key),
                self._is("persistent_reservations_supported", key),
            )  # fmt: skip
            for name in ("iops_limit", "iops_reservation", "weight"):
                self._number(name, 0, key)
            if unit >= _MAX_UNITS[bus]:
                self._doubts.append(f"{bus} {controller} has a unit {unit}")
            if kind not in ("NONE", ""):
                yield drive

    def _adapters(self, devices: tuple[Device, ...]) -> Iterator[HyperVAdapter]:
        for device in devices:
            if device.kind != ids.ADAPTER:
                continue
            key = self._at(f"_{device.instance}_")
            if key is None:
                self._doubts.append(f"the adapter {device.instance} has no settings")
                continue
            yield HyperVAdapter(
                instance=device.instance,
                name=self._text("FriendlyName", key) or device.name,
                model="synthetic",
                mac=self._mac(self._text("MacAddress", key), device.instance),
                is_static=self._is("MacAddressIsStatic", key),
                is_connected=self._is("IsConnected", key),
                switch_id=self._text("SwitchName", key),
                switch_name=self._text("Connection/AltSwitchName", key),
                features=tuple(self._features(key)),
            )

    def _mac(self, text: str, instance: str) -> str | None:
        if not text:
            return None
        digits = re.sub("[-:]", "", text)
        if not _MAC.fullmatch(text) or len(digits) != 12:
            self._doubts.append(f"the adapter {instance} has the MAC address {text!r}, which is not one")
            return None
        if not int(digits, 16):
            return None
        return ":".join(digits[at : at + 2] for at in range(0, 12, 2)).lower()

    def _features(self, adapter: Key) -> Iterator[Feature]:
        connection = self._at("Connection", adapter)
        for key in () if connection is None else connection.children:
            head, _, name = key.name.partition("_")
            if head.casefold() != "feature" or not name:
                continue
            for setting in key.children:
                if setting.name.casefold().startswith("setting_"):
                    data = self._value("Data", bytes, setting) or b""
                    self._number("Version", 0, setting)
                    yield Feature(name.upper(), ids.FEATURES.get(ids.plain(name), ""), data)

    def _firmware(self) -> Firmware:
        place = f"_{ids.FIRMWARE}_"
        boot = self._at(f"{place}/boot")
        order = [] if boot is None else [self._text(key.name, boot) for key in boot.children if key.value is not None]
        guid = ids.plain(self._text(f"{place}/bios_guid"))
        serial = self._text(f"{place}/bios_serial_number")
        for name in ("base_board/serial_number", "chassis/serial_number"):
            self._text(f"{place}/{name}")
        for name in ("num_lock", "pause_after_boot_failure"):
            self._is(f"{place}/{name}")
        return Firmware(
            bios_guid=guid if _UUID.fullmatch(guid.upper()) else None,
            serial=serial or None,
            asset_tag=self._text(f"{place}/chassis/asset_tag") or None,
            boot_order=tuple(word for word in order if word),
            secure_boot=self._is(f"{place}/secure_boot_enabled"),
            secure_boot_template=self._text(f"{place}/secure_boot_template_id") or None,
        )

    def _saved(self) -> SavedState | None:
        kind = self._text("savedstate/type")
        places = tuple(filter(None, (self._text("savedstate/vsvlocation"), self._text("savedstate/memlocation"))))
        return SavedState(kind, places) if kind or places else None

    # -- doubts, and what is not known ----------------------------------------------------------------------------

    def _doubt_generation(self, found: HyperVMachine) -> None:
        if found.generation not in (1, 2):
            refuse(self._path, f"it is of generation {found.generation}; 1 and 2 are known", hint=None)
        if not found.name:
            refuse(self._path, "it does not describe a machine: its key properties/name is empty")
        if found.generation == 2 and any(one.bus != "scsi" for one in found.drives if one.path):
            self._doubts.append("it is of generation 2, and has drives on other buses than SCSI")

    def _doubt_controllers(self, scsi: list[str]) -> None:
        """Controllers without settings are normal (nothing is attached), drives of others are not."""
        known = {f"_{name}_" for name in (*scsi, ids.IDE, ids.FLOPPY)}
        for key in self._root.children:
            if key.name.lower() not in known and key.at("controller0/drive0") is not None:
                self._doubts.append(f"{key.name} has drives, but the manifest does not list it as a controller")

    def _unknown(self) -> Iterator[tuple[str, str]]:
        for path, key in self._root.walk():
            is_leaf = key.value is not None or not key.children
            if is_leaf and id(key) not in self._read and not _WITHOUT_MEANING.fullmatch(path.casefold()):
                yield path, "" if key.value is None else _shown(key.value)


def _shown(value: Value) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)
