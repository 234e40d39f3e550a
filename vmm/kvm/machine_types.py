# SPDX-License-Identifier: Apache-2.0
"""The versioned machine types and the processor models that this host's QEMU has.

Decides only which version a family's name means today: a machine keeps it for life, because its saved
memory and its guest's view of the hardware depend on it.
"""

from __future__ import annotations

import re

from vmm.kvm import program
from vmm.model.errors import QemuFailed

_ALIAS = re.compile(r"^(\S+)\s.*\(alias of (\S+)\)")


def newest(family: str) -> str:
    """The versioned type behind `pc`. Raises Unsupported where there is no QEMU, QemuFailed."""
    return newest_in(program.answer([program.find(), "-machine", "help"]), family)


def newest_in(listing: str, family: str) -> str:
    """The same, in what QEMU lists. Raises QemuFailed where the family is not in it."""
    for line in listing.splitlines():
        found = _ALIAS.match(line)
        if found is not None and found[1] == family:
            return found[2]
    raise QemuFailed(f"this QEMU has no machine type {family}")


def machine_types() -> frozenset[str]:
    """The names of all machine types. Raises Unsupported where there is no QEMU, QemuFailed."""
    return types_in(program.answer([program.find(), "-machine", "help"]))


def types_in(listing: str) -> frozenset[str]:
    """The same, in what QEMU lists: after a heading a name begins each line."""
    return frozenset(line.split()[0] for line in listing.splitlines()[1:] if line.strip())


def processor_models() -> frozenset[str]:
    """The names of all processor models. Raises Unsupported where there is no QEMU, QemuFailed."""
    return models_in(program.answer([program.find(), "-cpu", "help"]))


def models_in(listing: str) -> frozenset[str]:
    """The same, in what QEMU lists: lines such as "x86 Nehalem-v1 ..." (before 10.0) or "  Nehalem-v1 ..."."""
    found = set()
    for line in listing.partition("CPUID flags")[0].splitlines():
        words = line.split()
        if words[:1] == ["x86"]:
            words.pop(0)
        if words and line.startswith(("x86 ", "  ")):
            found.add(words[0])
    return frozenset(found)
