# SPDX-License-Identifier: Apache-2.0
"""The versioned machine types and the processor models of this host's QEMU.

Decides only which version a family name such as `pc` means today: a machine keeps that version for life, because its
saved memory and its guest's view of the hardware depend on it.
"""

from __future__ import annotations

import re

from vmm.kvm import program
from vmm.model.errors import QemuFailed

_ALIAS = re.compile(r"^(\S+)\s.*\(alias of (\S+)\)")


def newest(family: str) -> str:
    """The versioned type that `pc` stands for. Raises Unsupported without QEMU, QemuFailed."""
    return newest_in(program.answer([program.find(), "-machine", "help"]), family)


def newest_in(listing: str, family: str) -> str:
    """As `newest`, from QEMU's listing. Raises QemuFailed if the family is missing there."""
    for line in listing.splitlines():
        found = _ALIAS.match(line)
        if found is not None and found[1] == family:
            return found[2]
    raise QemuFailed(f"this QEMU has no machine type {family}")


def machine_types() -> frozenset[str]:
    """The names of all machine types. Raises Unsupported without QEMU, QemuFailed."""
    return types_in(program.answer([program.find(), "-machine", "help"]))


def types_in(listing: str) -> frozenset[str]:
    """As `machine_types`, from QEMU's listing: a heading, then lines that begin with a name."""
    return frozenset(line.split()[0] for line in listing.splitlines()[1:] if line.strip())


def processor_models() -> frozenset[str]:
    """The names of all processor models. Raises Unsupported without QEMU, QemuFailed."""
    return models_in(program.answer([program.find(), "-cpu", "help"]))


def models_in(listing: str) -> frozenset[str]:
    """As `processor_models`, from a listing with lines like "x86 Nehalem-v1 ..." (before 10.0) or "  Nehalem..."."""
    found = set()
    for line in listing.partition("CPUID flags")[0].splitlines():
        words = line.split()
        if words[:1] == ["x86"]:
            words.pop(0)
        if words and line.startswith(("x86 ", "  ")):
            found.add(words[0])
    return frozenset(found)
