# SPDX-License-Identifier: Apache-2.0
"""The settings that `Manager.create` and `Manager.set` take, as types.

Decides nothing: names and meaning are those of `spec.MachineSpec`, and a test compares the two. It exists so that a
type checker finds a misspelt setting, or a value of the wrong type, before the program runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from vmm.model.spec import AutomaticSpec, BootDevice, IntegrationSpec, PathsSpec


class MachineSettings(TypedDict, total=False):
    """The settings of a new machine. A group (`automatic`) is given as a whole, as its model or as a mapping."""

    memory_bytes: int
    cpu_count: int
    machine_type: str
    cpu_model: str
    accelerator: Literal["auto", "kvm", "tcg"]
    firmware: Literal["bios", "uefi"]
    boot_order: Sequence[BootDevice]
    kernel: str | None
    initrd: str | None
    append: str | None
    screen: bool
    rtc: Literal["utc", "local"]
    integration: IntegrationSpec | Mapping[str, Any]
    automatic: AutomaticSpec | Mapping[str, Any]
    paths: PathsSpec | Mapping[str, Any]
    background_capture: bool
    notes: str


class ChangedSettings(MachineSettings, total=False):
    """The settings that can be changed: the same, and the name."""

    name: str


# Settings that a running machine keeps until it is restarted. The others take effect at once; disks and adapters can
# be added and removed at run time.
HARDWARE = set(ChangedSettings.__annotations__) - {"notes", "automatic", "name", "paths"}
