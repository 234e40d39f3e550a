# SPDX-License-Identifier: Apache-2.0
"""What this host and its QEMU cannot provide, checked at the request, before the machine starts.

Decides what can be known at that time: whether QEMU has the processor model and the machine type, whether the host
can ever have so much memory, whether a target that answers has the LUN. What cannot be known, such as the answer of a
target that is unreachable now, is accepted; starting the machine then reports it.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from vmm.kvm import machine_types
from vmm.kvm.program import SYSTEM_PROGRAM
from vmm.model.errors import InvalidSpec
from vmm.model.spec import MachineSpec

_MEMORY = re.compile(r"^(MemTotal|SwapTotal):\s+(\d+) kB$", re.MULTILINE)


def refuse_impossible(spec: MachineSpec, settings: Collection[str]) -> None:
    """Raise InvalidSpec for one of these settings that this host cannot give a machine; QemuFailed, TimedOut."""
    if "memory_bytes" in settings:
        _refuse_memory(spec)
    if "cpu_model" in settings:
        _refuse_model(spec)
    if "machine_type" in settings:
        _refuse_machine_type(spec)


def _refuse_memory(spec: MachineSpec) -> None:
    available = host_memory_bytes()
    if available is not None and spec.memory_bytes > available:
        raise InvalidSpec(
            f"needs {_mib(spec.memory_bytes)} of memory, and this host has {_mib(available)}, swap space included",
            machine=spec.name, hint="give it less memory: --memory SIZE",
        )  # fmt: skip


def host_memory_bytes() -> int | None:
    """Memory and swap space of this host; None if unknown."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = _MEMORY.findall(file.read())
    except (OSError, ValueError):
        return None
    return sum(int(kib) << 10 for _, kib in found) if found else None


def _mib(size_bytes: int) -> str:
    return f"{size_bytes >> 20} MiB"


def _refuse_model(spec: MachineSpec) -> None:
    model = spec.cpu_model.split(",")[0]
    known = machine_types.processor_models()
    if known and model not in known:
        alike = sorted(one for one in known if one.lower().startswith(model.lower()[:4]))
        raise InvalidSpec(
            f"QEMU has no processor model {model!r}", machine=spec.name,
            hint=f"similar models: {', '.join(alike[:8])}" if alike else f"{SYSTEM_PROGRAM} -cpu help lists them",
        )  # fmt: skip


def _refuse_machine_type(spec: MachineSpec) -> None:
    known = machine_types.machine_types()
    if known and spec.machine_type not in known:
        raise InvalidSpec(
            f"QEMU has no machine type {spec.machine_type!r}", machine=spec.name,
            hint=f"{SYSTEM_PROGRAM} -machine help lists them",
        )  # fmt: skip
