# SPDX-License-Identifier: Apache-2.0
"""A setting that this host can never provide is refused when it is requested, and the machine stays as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmm.api.manager import Manager
from vmm.api.possible import host_memory_bytes
from vmm.kvm.machine_types import models_in, types_in
from vmm.model.errors import InvalidSpec, NotFound

MIB = 1 << 20


def test_impossible_settings_are_refused_at_once(manager: Manager, tmp_path: Path) -> None:
    """With too much memory, an unknown processor model or machine type, no machine is made or changed."""
    memory = host_memory_bytes()
    assert memory is not None
    too_much = (memory // MIB + 1) * MIB
    with pytest.raises(InvalidSpec, match=r"this host has \d+ MiB, swap space included"):
        manager.create("web", memory_bytes=too_much)
    with pytest.raises(InvalidSpec, match=r"no processor model 'Nehalemm'.*Nehalem-v1"):
        manager.create("web", cpu_model="Nehalemm,+x2apic")
    with pytest.raises(InvalidSpec, match=r"no machine type 'pc-i440fx-0\.0'"):
        manager.create("web", machine_type="pc-i440fx-0.0")
    with pytest.raises(NotFound):
        manager.show("web")
    manager.create("web", memory_bytes=16 * MIB, cpu_model="qemu64,-svm")
    before = manager.show("web").spec
    with pytest.raises(InvalidSpec, match="swap space included"):
        manager.set("web", memory_bytes=too_much)
    with pytest.raises(InvalidSpec, match="no processor model"):
        manager.set("web", cpu_model="z80")
    assert manager.show("web").spec == before
    manager.set("web", notes="fine")


def test_reading_qemus_lists() -> None:
    """Names of models and machine types are read in the forms before and since QEMU 10, without headings and flags."""
    old = "Available CPUs:\nx86 486  (alias)\nx86 host   all\n\nRecognized CPUID flags:\n  3dnow abm\n"
    new = "Available CPUs:\n  486            (alias)\n  host     all\n\nRecognized CPUID flags:\n  3dnow abm\n"
    assert models_in(old) == models_in(new) == {"486", "host"}
    assert types_in("Supported machines are:\npc     Standard (alias of pc-1)\npc-1   Standard\n") == {"pc", "pc-1"}
