# SPDX-License-Identifier: Apache-2.0
"""The definition of a machine: its settings, their limits, and its form on disk.

Decides the name and meaning of every setting and which settings exclude each other. Pure: it examines no files,
devices or processes. A definition that was loaded or made is valid; `changed` returns a new one or raises
InvalidSpec.

The limits are Hyper-V's (Windows Server 2008 R2): two IDE controllers with two units each, four SCSI controllers with
64 units, no boot from SCSI, eight synthetic and four legacy adapters.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from vmm.model.complaints import words_of
from vmm.model.errors import InvalidSpec
from vmm.model.formats import ImageFormat
from vmm.model.paths import check_name

SCHEMA_VERSION: Final = 1
MIB = 1 << 20
MIN_MEMORY_BYTES = 2 * MIB  # SeaBIOS and a boot sector
MAX_MEMORY_BYTES = 1 << 40
MAX_CPU_COUNT = 255  # limit of QEMU's pc machine
IDE_CONTROLLERS, IDE_UNITS = 2, 2
SCSI_CONTROLLERS, SCSI_UNITS = 4, 64
VIRTIO_UNITS = 12  # each takes a PCI slot, of which a machine has 32
DEFAULT_STORM_FRAMES = 1000  # per second; in normal use, guests flood about a hundredth of that
MIN_BANDWIDTH_BITS = 64_000  # below this, a single frame is a burst of several seconds
MAX_SYNTHETIC_ADAPTERS, MAX_LEGACY_ADAPTERS = 8, 4
MAX_SERIAL_CHARACTERS = 20  # limit of IDE and virtio disks

DiskKind = Literal["vhd", "pass-through", "iso"]
Controller = Literal["ide", "scsi", "virtio"]
CacheMode = Literal["writeback", "none"]
BootDevice = Literal["disk", "cdrom", "network"]
UNITS: dict[Controller, tuple[int, int]] = {
    "ide": (IDE_CONTROLLERS, IDE_UNITS),
    "scsi": (SCSI_CONTROLLERS, SCSI_UNITS),
    "virtio": (1, VIRTIO_UNITS),
}
DeviceId = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,31}$")]


class DiskPlace(NamedTuple):
    """Where a disk is attached: the number of its controller among those of its kind, and its unit on it."""

    controller_index: int
    unit: int


class _Settings(BaseModel):
    # An unknown setting is a typing error or comes from a newer vmm: to ignore it would change the machine.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class DiskSpec(_Settings):
    """A disk, or a drive for ISO images.

    `path`: an image (the leaf of its chain), a block device or `iscsi://` URL, or an ISO image (None: no medium).
    The guest identifies the disk by `serial`. `parent_dirs` are further folders to search for parents. `cache`: what
    the host's page cache keeps of an image, as `vhdkit.OpenOptions` says.
    """

    id: DeviceId
    kind: DiskKind = "vhd"
    path: str | None
    controller: Controller = "ide"
    controller_index: int = Field(default=0, ge=0)
    unit: int = Field(default=0, ge=0)
    read_only: bool = False
    serial: str = Field(
        default_factory=lambda: uuid.uuid4().hex[:MAX_SERIAL_CHARACTERS], pattern=r"^[A-Za-z0-9_-]{1,20}$"
    )
    format: ImageFormat | None = None  # fixed at the first probe: what the guest writes must not change it
    sector_bytes: Literal[512, 4096] = 512  # as the image says; the guest sees such a disk
    physical_sector_bytes: Literal[512, 4096] = 512
    parent_dirs: tuple[str, ...] = ()
    allow_raw_parent: bool = False
    cache: CacheMode = "writeback"  # by measurement: docs/vmm.md
    identity: str | None = None  # of a pass-through device: WWN or similar, checked at every open

    @model_validator(mode="after")
    def _fits(self) -> Self:
        controllers, units = UNITS[self.controller]
        if self.controller_index >= controllers or self.unit >= units:
            raise ValueError(
                f"{self.controller} has controllers 0 to {controllers - 1} with units 0 to {units - 1}, "
                f"so {self.place} does not exist"
            )
        if self.kind == "iso" and self.controller != "ide":
            raise ValueError("a drive for ISO images must be on IDE")
        if self.sector_bytes > 512 and self.controller == "ide":
            raise ValueError(
                f"a disk with sectors of {self.sector_bytes} bytes cannot be on IDE: put it on scsi or virtio"
            )
        if self.kind != "iso" and self.path is None:
            raise ValueError("only a drive for ISO images may be empty")
        if self.path is not None and (not self.path or "\0" in self.path):
            raise ValueError("a path must not be empty or contain a zero byte")
        return self

    @property
    def place(self) -> str:
        """The place where the disk is attached, as people write it: `ide0:1`."""
        return f"{self.controller}{self.controller_index}:{self.unit}"

    @property
    def kind_word(self) -> str:
        """What the disk is, as lists show it: the format of an image, else its kind; and that it is not cached."""
        return (self.format or self.kind) + (", not cached" if self.cache == "none" else "")

    @property
    def is_image(self) -> bool:
        """True for an image of any format. The kind "vhd" stands for all of them; `format` names the format."""
        return self.kind == "vhd"

    @property
    def is_writable_image(self) -> bool:
        """True for an image that the machine writes to, which no other machine may use."""
        return self.is_image and not self.read_only


VlanId = Annotated[int, Field(ge=1, le=4094)]


class AdapterSpec(_Settings):
    """A network adapter, connected to a switch or to none.

    It uses no VLAN, or `vlan` (its untagged frames belong to that VLAN), or `trunk` (the guest tags frames with these
    VLANs; untagged frames belong to `native_vlan`, where 0 means no VLAN). A limit of 0 means no limit.
    """

    id: DeviceId
    switch: str | None = None
    kind: Literal["synthetic", "legacy"] = "synthetic"
    mac: str | None = Field(default=None, pattern=r"^[0-9a-f]{2}(:[0-9a-f]{2}){5}$")
    vlan: VlanId | None = None
    trunk: tuple[VlanId, ...] = ()
    native_vlan: int = Field(default=0, ge=0, le=4094)
    queues: int = Field(default=1, ge=1, le=8)
    spoofing: bool = False
    dhcp_guard: bool = False
    router_guard: bool = False
    bandwidth_bits_per_second: int = Field(default=0, ge=0, le=10**12)
    storm_frames_per_second: int = Field(default=DEFAULT_STORM_FRAMES, ge=0, le=10**9)
    mirror: Literal["none", "source", "destination"] = "none"
    link_up: bool = True

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.vlan is not None and self.trunk:
            raise ValueError("an adapter has a VLAN or is a trunk, not both")
        if self.native_vlan and not self.trunk:
            raise ValueError("only a trunk can have a native VLAN")
        if 0 < self.bandwidth_bits_per_second < MIN_BANDWIDTH_BITS:
            raise ValueError(f"a bandwidth limit must be {MIN_BANDWIDTH_BITS} bits/s or more")
        if self.kind == "legacy" and self.queues > 1:
            raise ValueError("a legacy adapter can have only one queue")
        return self


class IntegrationSpec(_Settings):
    """The integration services that are offered to the guest."""

    heartbeat: bool = True
    shutdown: bool = True
    time_sync: bool = True
    key_value: bool = True
    backup: bool = True


class AutomaticSpec(_Settings):
    """What happens to the machine when the host starts or stops, and when QEMU exits unexpectedly."""

    start: Literal["nothing", "if-was-running", "always"] = "if-was-running"
    start_delay_seconds: int = Field(default=0, ge=0, le=86400)
    stop: Literal["save", "turn-off", "shut-down"] = "save"
    recovery: Literal["none", "restart", "revert"] = "none"


class PathsSpec(_Settings):
    """Folders for this machine only. None: the host's default (`vmm host paths`)."""

    disks: str | None = None
    snapshots: str | None = None


class MachineSpec(_Settings):
    """The definition of a machine. `machine_type` and `cpu_model` are versioned: saved memory depends on them."""

    schema_version: Literal[1] = 1
    id: str = Field(default_factory=lambda: str(uuid.uuid4()), pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")
    name: str
    generation: Literal[1] = 1
    memory_bytes: int = Field(default=512 * MIB, ge=MIN_MEMORY_BYTES, le=MAX_MEMORY_BYTES, multiple_of=MIB)
    cpu_count: int = Field(default=1, ge=1, le=MAX_CPU_COUNT)
    machine_type: str = Field(default="pc", pattern=r"^[a-z0-9._-]{1,64}$")
    cpu_model: str = Field(default="Nehalem-v1", pattern=r"^[A-Za-z0-9._+=,-]{1,256}$")
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    firmware: Literal["bios", "uefi"] = "bios"
    boot_order: tuple[BootDevice, ...] = ("cdrom", "disk", "network")
    kernel: str | None = None
    initrd: str | None = None
    append: str | None = None
    screen: bool = True
    rtc: Literal["utc", "local"] = "utc"  # what the clock on the mainboard shows; Windows takes it for local time
    disks: tuple[DiskSpec, ...] = ()
    adapters: tuple[AdapterSpec, ...] = ()
    integration: IntegrationSpec = IntegrationSpec()
    automatic: AutomaticSpec = AutomaticSpec()
    paths: PathsSpec = PathsSpec()
    background_capture: bool = False  # QEMU may save memory while the guest runs (`kvm.userfault`)
    notes: str = Field(default="", max_length=64 * 1024)

    @field_validator("kernel", "initrd", "append")
    @classmethod
    def _can_be_passed_on(cls, word: str | None) -> str | None:
        if word is not None and "\0" in word:
            raise ValueError("contains a zero byte")
        return word

    @field_validator("name")
    @classmethod
    def _good_name(cls, name: str) -> str:
        check_name(name)
        return name

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        _check_unique("disk id", [disk.id for disk in self.disks])
        _check_unique("disk serial", [disk.serial for disk in self.disks])
        _check_unique("place of a disk", [disk.place for disk in self.disks])
        _check_unique("adapter id", [adapter.id for adapter in self.adapters])
        _check_unique("MAC address", [adapter.mac for adapter in self.adapters if adapter.mac is not None])
        _check_unique("boot device", self.boot_order)
        for kind, limit in (("synthetic", MAX_SYNTHETIC_ADAPTERS), ("legacy", MAX_LEGACY_ADAPTERS)):
            if sum(adapter.kind == kind for adapter in self.adapters) > limit:
                raise ValueError(f"a machine has at most {limit} {kind} adapters")
        if self.kernel is None and (self.initrd is not None or self.append is not None):
            raise ValueError("an initrd and kernel arguments require a kernel")
        hard_disks = [disk for disk in self.disks if disk.kind != "iso"]
        if hard_disks and all(disk.controller == "scsi" for disk in hard_disks) and not self._boots_otherwise():
            raise ValueError("a machine cannot boot from SCSI: put the first disk on ide or virtio")
        small = [disk for disk in hard_disks if disk.controller != "scsi" and disk.sector_bytes == 512]
        if hard_disks and not small and self.firmware == "bios" and not self._boots_otherwise():
            raise ValueError(
                "the BIOS boots from disks with sectors of 512 bytes only, and the machine has none that it could boot"
                " from: choose the firmware uefi"
            )
        return self

    def _boots_otherwise(self) -> bool:
        """True if the machine can boot from something other than a disk."""
        return self.kernel is not None or bool(self.adapters) or any(disk.kind == "iso" for disk in self.disks)

    # -- lookups -------------------------------------------------------------------------------------------------

    def disk(self, disk_id: str) -> DiskSpec | None:
        """The disk with that id, or None."""
        return next((disk for disk in self.disks if disk.id == disk_id), None)

    def free_disk_id(self) -> str:
        """The first unused `disk-N`."""
        taken = {disk.id for disk in self.disks}
        return next(name for number in range(len(taken) + 1) if (name := f"disk-{number}") not in taken)

    def adapter(self, adapter_id: str) -> AdapterSpec | None:
        """The adapter with that id, or None."""
        return next((one for one in self.adapters if one.id == adapter_id), None)

    def free_adapter_id(self) -> str:
        """The first unused `nic-N`."""
        taken = {one.id for one in self.adapters}
        return next(name for number in range(len(taken) + 1) if (name := f"nic-{number}") not in taken)

    def free_place(self, controller: Controller) -> DiskPlace:
        """The first free place. Raises InvalidSpec if all are taken."""
        taken = {(disk.controller_index, disk.unit) for disk in self.disks if disk.controller == controller}
        controllers, units = UNITS[controller]
        for index in range(controllers):
            for unit in range(units):
                if (index, unit) not in taken:
                    return DiskPlace(index, unit)
        raise InvalidSpec(
            f"all {controllers * units} places on {controller} are taken",
            machine=self.name,
            hint="put the disk on scsi" if controller != "scsi" else None,
        )

    # -- changing and storing ------------------------------------------------------------------------------------

    def changed(self, **changes: object) -> MachineSpec:
        """A copy of the definition with other settings. Raises InvalidSpec."""
        return _validated({**self.model_dump(), **_plain(changes)}, self.name)

    def to_json(self) -> bytes:
        """The definition as it is stored on disk."""
        return self.model_dump_json(indent=2).encode() + b"\n"


def _plain(changes: dict[str, object]) -> dict[str, object]:
    """The changes with models turned into plain values, so that everything is validated again."""

    def plain(value: object) -> object:
        if isinstance(value, BaseModel):
            return value.model_dump()
        return [plain(one) for one in value] if isinstance(value, list | tuple) else value

    return {name: plain(value) for name, value in changes.items()}


def make_spec(**settings: object) -> MachineSpec:
    """A definition from settings. Raises InvalidSpec, which lists everything wrong with them."""
    return _validated(_plain(settings), str(settings.get("name", "")) or None)


def make_disk(**settings: object) -> DiskSpec:
    """A disk from settings. Raises InvalidSpec."""
    try:
        return DiskSpec.model_validate(settings)
    except ValidationError as error:
        raise InvalidSpec(words_of(error)) from error


def make_adapter(**settings: object) -> AdapterSpec:
    """An adapter from settings. Raises InvalidSpec."""
    try:
        return AdapterSpec.model_validate(settings)
    except ValidationError as error:
        raise InvalidSpec(words_of(error)) from error


def read_spec(content: bytes, path: str) -> MachineSpec:
    """Parse a definition from the content of a file. Raises InvalidSpec for anything else."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidSpec("is not a machine definition: it is not JSON", path=path) from error
    if not isinstance(document, dict):
        raise InvalidSpec("is not a machine definition: it is not a JSON object", path=path)
    version = document.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise InvalidSpec(
            f"was written by a newer vmm (schema {version}, this one reads {SCHEMA_VERSION})",
            path=path,
            hint="use that version",
        )
    try:
        return MachineSpec.model_validate(document)
    except ValidationError as error:
        raise InvalidSpec(f"is not a machine definition: {words_of(error)}", path=path) from error


def _validated(settings: dict[str, Any], machine: str | None) -> MachineSpec:
    try:
        return MachineSpec.model_validate(settings)
    except ValidationError as error:
        is_of_name = any(one["loc"] == ("name",) for one in error.errors(include_url=False))  # it says the name itself
        raise InvalidSpec(words_of(error), machine=None if is_of_name else machine) from error


def _check_unique(what: str, values: Sequence[object]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"the {what} {value} is used twice")
