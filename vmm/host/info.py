# SPDX-License-Identifier: Apache-2.0
"""Facts about this host: system, processors, memory.

Decides which of the kernel's files they come from. Everything is read below one root folder, which tests replace; an
unknown fact is None, never a guess.

Sources: os-release(5), proc_cpuinfo(5), proc_meminfo(5), sysfs-devices-system-cpu.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass

_MAX_FILE_BYTES = 4 << 20
_KIB = 1024


@dataclass(frozen=True, slots=True)
class HostInfo:
    """Facts about one host. Memory in bytes; `virtualization` is the CPU feature that KVM uses ("vmx" or "svm")."""

    name: str
    system: str | None
    kernel: str
    architecture: str
    processor: str | None
    processor_count: int
    virtualization: str | None
    is_guest: bool
    memory_bytes: int | None
    available_bytes: int | None
    user: str


def gather(root: str = "/") -> HostInfo:
    """Gather the facts."""
    cpu = _pairs(_read(root, "proc/cpuinfo").split("\n\n")[0])
    memory = _pairs(_read(root, "proc/meminfo"))
    flags = frozenset(cpu.get("flags", "").split())
    machine = os.uname()
    return HostInfo(
        name=machine.nodename,
        system=_system_name(_read(root, "etc/os-release")),
        kernel=f"{machine.sysname} {machine.release}",
        architecture=platform.machine(),
        processor=cpu.get("model name"),
        processor_count=len(os.sched_getaffinity(0)),
        virtualization=next((flag for flag in ("vmx", "svm") if flag in flags), None),
        is_guest="hypervisor" in flags,
        memory_bytes=_kib(memory.get("MemTotal")),
        available_bytes=_kib(memory.get("MemAvailable")),
        user="root" if os.geteuid() == 0 else f"user {os.geteuid()}",
    )


def _read(root: str, name: str) -> str:
    try:
        with open(os.path.join(root, name), "rb") as file:
            return file.read(_MAX_FILE_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def _pairs(text: str) -> dict[str, str]:
    """Parse lines of the form "name : value"."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            found.setdefault(name.strip(), value.strip())
    return found


def _kib(text: str | None) -> int | None:
    """Parse "1234 kB" into bytes."""
    match = re.fullmatch(r"(\d+) kB", text or "")
    return int(match[1]) * _KIB if match else None


def _system_name(text: str) -> str | None:
    match = re.search(r"""^PRETTY_NAME=(["']?)(.*)\1$""", text, re.MULTILINE)
    return match[2] if match else None
