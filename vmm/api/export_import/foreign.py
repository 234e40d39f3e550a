# SPDX-License-Identifier: Apache-2.0
"""Which settings of an untrusted definition a machine on this host may have, and what its user must allow first.

The author of an exported folder is not trusted. If root imported its definition unchanged, that author could choose
which files of this host a guest reads and writes. So every setting has a decision:

    allowed     it concerns the guest alone: memory, processors, its own controllers
    confined    it leads into the imported folder, or the user replaces it (`--map OLD=NEW`, `--switch`)
    asked       it gives the guest, or QEMU, more than the user may expect: the user must allow it by name (`--allow`)
    dropped     it is determined anew on this host
    nested      its own settings are decided one by one

`INV-IMPORT-CONFINED`: no path of an imported definition leads out of the imported folder unless the user named it.

Pure: no files are examined here. Must not know where the folder lies or how it is read.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel

from vmm.model.formats import ImageFormat
from vmm.model.spec import AdapterSpec, AutomaticSpec, DiskSpec, IntegrationSpec, MachineSpec, PathsSpec

Decision = Literal["allowed", "confined", "asked", "dropped", "nested"]
Allowance = Literal["background-capture", "autostart", "spoofing", "mirror", "memory"]
LEAVE_OUT = ""  # as the new name of a file: the machine goes without it
UNPLUGGED = "-"  # as the name of a switch
SWITCH = "switch:"  # before the name of a switch that is allowed by its name

ALLOWANCES: dict[Allowance, str] = {
    "background-capture": "QEMU gets a right to protect memory, which may be CAP_SYS_PTRACE",
    "autostart": "the machine starts with this host",
    "spoofing": "an adapter may send from any MAC address",
    "mirror": "an adapter takes part in mirroring a switch's frames",
}

# A setting that is missing here is refused, and a test fails.
DECISIONS: dict[type[BaseModel], dict[str, Decision]] = {
    MachineSpec: {
        "schema_version": "allowed", "id": "allowed", "name": "allowed", "generation": "allowed",
        "memory_bytes": "allowed", "cpu_count": "allowed", "machine_type": "allowed", "cpu_model": "allowed",
        "accelerator": "allowed", "firmware": "allowed", "boot_order": "allowed", "kernel": "confined",
        "initrd": "confined", "append": "allowed", "screen": "allowed", "rtc": "allowed", "disks": "nested",
        "adapters": "nested", "integration": "nested", "automatic": "nested", "paths": "nested",
        "background_capture": "asked",
        "notes": "allowed",
    },
    DiskSpec: {
        "id": "allowed", "kind": "allowed", "path": "confined", "controller": "allowed",
        "controller_index": "allowed", "unit": "allowed", "read_only": "allowed", "serial": "allowed",
        "format": "allowed", "sector_bytes": "allowed", "physical_sector_bytes": "allowed",
        "parent_dirs": "dropped", "allow_raw_parent": "allowed", "identity": "dropped",
        "cache": "allowed",
    },
    AdapterSpec: {
        "id": "allowed", "switch": "confined", "kind": "allowed", "mac": "allowed", "vlan": "allowed",
        "trunk": "allowed", "native_vlan": "allowed", "queues": "allowed", "spoofing": "asked",
        "dhcp_guard": "allowed", "router_guard": "allowed", "bandwidth_bits_per_second": "allowed",
        "storm_frames_per_second": "allowed", "mirror": "asked", "link_up": "allowed",
    },
    IntegrationSpec: {
        "heartbeat": "allowed", "shutdown": "allowed", "time_sync": "allowed", "key_value": "allowed",
        "backup": "allowed",
    },
    AutomaticSpec: {
        "start": "asked", "start_delay_seconds": "allowed", "stop": "allowed", "recovery": "allowed",
    },
    PathsSpec: {"disks": "confined", "snapshots": "confined"},
}  # fmt: skip
_KINDS = {"vhd": "the image", "iso": "the ISO image", "pass-through": "the device"}


@dataclass(frozen=True, slots=True)
class Consent:
    """What the user of this host allows an import to have.

    `paths`: a path as the definition has it -> the file, device or folder to use here, "" for none. `switches`: the
    name of a switch -> the one to use here, "-" for none. `allow`: which of `ALLOWANCES`. `everything`: all that the
    definition has, as it is. `by_name`: the user allows things by their names (`--allow`) rather than replacing them.
    """

    paths: Mapping[str, str] = field(default_factory=dict)
    switches: Mapping[str, str] = field(default_factory=dict)
    allow: frozenset[str] = frozenset()
    everything: bool = False
    by_name: bool = False

    def path(self, path: str) -> str | None:
        """What to use for a path of the definition, "" for nothing; None if it is not allowed."""
        return self.paths.get(path, path if self.everything else None)

    def switch(self, switch: str) -> str | None:
        """What to use for a switch of the definition; None if it is not allowed."""
        return self.switches.get(switch, switch if self.everything else None)

    def allows(self, what: Allowance) -> bool:
        """True if the definition may have this one of `ALLOWANCES`."""
        return self.everything or what in self.allow


@dataclass(slots=True)
class Judged:
    """A definition after judging. With `refused` the import must not be made; `granted` is what the user allowed.

    `given` are the ids of disks whose file or device the user named: they are not yet looked at. `used` are the words
    of the consent that applied to something.
    """

    spec: MachineSpec
    refused: dict[str, str] = field(default_factory=dict)  # what it is -> the option that allows it
    granted: list[str] = field(default_factory=list)
    given: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)


def judge(
    spec: MachineSpec, *, images: Mapping[str, tuple[str, ImageFormat]], inside: Mapping[str, str], consent: Consent
) -> Judged:
    """The definition as allowed on this host.

    `images`: disk id -> (path, format) of the images in the export. `inside`: a path as the definition has it -> the
    file of the import that it means.
    """
    judged = Judged(spec)
    finding = _Finding(judged, inside, consent)
    disks = [finding.disk(disk, images) for disk in spec.disks]
    kernel = finding.path("the kernel", spec.kernel)
    boot: dict[str, Any] = {"kernel": kernel, "initrd": finding.path("the initrd", spec.initrd)}
    if kernel is None:
        boot = {"kernel": None, "initrd": None, "append": None}
    finding.allowed("background-capture", spec.background_capture)
    finding.allowed("autostart", spec.automatic.start == "always")
    paths = PathsSpec(
        disks=finding.path("the folder for disks", spec.paths.disks),
        snapshots=finding.path("the folder for snapshots", spec.paths.snapshots),
    )
    adapters = [finding.adapter(adapter) for adapter in spec.adapters]
    finding.unknown(spec, spec.integration, spec.automatic, spec.paths, *spec.disks, *spec.adapters)
    if not judged.refused:  # otherwise it may lack what a valid definition needs
        judged.spec = spec.changed(
            disks=[disk for disk in disks if disk is not None], adapters=adapters, paths=paths, **boot
        )
    return judged


class _Finding:
    """One definition being judged."""

    def __init__(self, judged: Judged, inside: Mapping[str, str], consent: Consent) -> None:
        self._judged = judged
        self._inside = inside
        self._consent = consent

    def path(self, what: str, path: str | None) -> str | None:
        """The file that a path means on this host; None if it has none, or is not allowed."""
        if path is None:
            return None
        if path in self._inside:
            return self._inside[path]
        new = self._consent.path(path)
        if new is None:
            option = f"--allow {shlex.quote(path)}" if self._consent.by_name else f"--map {shlex.quote(f'{path}=NEW')}"
            self._judged.refused[f"{what} {path}"] = option
            return None
        self._judged.used.add(path)
        words = f"{what} {path}" + (f" is {new}" if new != path else "")
        self._grant(words if new else f"goes without {what} {path}")
        return new or None

    def disk(self, disk: DiskSpec, images: Mapping[str, tuple[str, ImageFormat]]) -> DiskSpec | None:
        """The disk as allowed on this host; None if the machine goes without it."""
        changes: dict[str, Any] = {"parent_dirs": (), "identity": None}  # its parents lie beside it
        if disk.is_image and disk.id in images:
            path, kind = images[disk.id]
            raw_below = disk.allow_raw_parent or (disk.format == "raw" and kind != "raw")
            return disk.model_copy(update={**changes, "path": path, "format": kind, "allow_raw_parent": raw_below})
        is_device = disk.kind == "pass-through"
        path_now = _Finding(self._judged, {} if is_device else self._inside, self._consent).path(
            f"disk {disk.id}: {_KINDS[disk.kind]}", disk.path
        )
        if path_now is None and disk.kind != "iso":
            return None
        if path_now is not None and (is_device or disk.path not in self._inside):
            self._judged.given.add(disk.id)
            changes["format"] = None
        return disk.model_copy(update={**changes, "path": path_now})

    def adapter(self, adapter: AdapterSpec) -> AdapterSpec:
        """The adapter on the switch that the user named."""
        self.allowed("spoofing", adapter.spoofing)
        self.allowed("mirror", adapter.mirror != "none")
        if adapter.switch is None:
            return adapter
        new = self._consent.switch(adapter.switch)
        if new is None:
            by_name = f"--allow {shlex.quote(f'{SWITCH}{adapter.switch}')}"
            option = by_name if self._consent.by_name else f"--switch {shlex.quote(f'{adapter.switch}=NEW')}"
            self._judged.refused[f"adapter {adapter.id}: the switch {adapter.switch}"] = option
            return adapter
        self._judged.used.add(adapter.switch)
        if new in ("", UNPLUGGED):
            self._grant(f"adapter {adapter.id} is not on a switch")
            return adapter.model_copy(update={"switch": None})
        lan = f", VLAN {adapter.vlan}" if adapter.vlan is not None else ""
        if adapter.trunk:
            lan = f", a trunk of the VLANs {', '.join(map(str, adapter.trunk))}"
        self._grant(f"adapter {adapter.id} is on the switch {new}{lan}")
        return adapter.model_copy(update={"switch": new})

    def allowed(self, what: Allowance, is_wanted: bool) -> None:
        """Note that the definition wants one of `ALLOWANCES`."""
        if not is_wanted:
            return
        if self._consent.allows(what):
            self._judged.used.add(what)
            self._grant(ALLOWANCES[what])
        else:
            self._judged.refused[ALLOWANCES[what]] = f"--allow {what}"

    def unknown(self, *models: BaseModel) -> None:
        """Refuse settings that have no decision."""
        for model in models:
            for name in sorted(set(type(model).model_fields) - set(DECISIONS[type(model)])):
                self._judged.refused[f"the setting {name}"] = "export it without that setting"

    def _grant(self, words: str) -> None:
        if words not in self._judged.granted:
            self._judged.granted.append(words)
